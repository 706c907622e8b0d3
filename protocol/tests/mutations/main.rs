//! Each rule of the two machines, broken in one line: the model checker finds it.
//!
//! See `docs/verification.md`. The traces are printed with `--nocapture`.

#![forbid(unsafe_code)]
#![expect(
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and prints traces"
)]

#[expect(dead_code, reason = "shared with the model test, which uses all of it")]
#[path = "../model/machine/mod.rs"]
mod machine;

use machine::report;
use machine::rule::Rule;
use machine::scenario::{Faults, Scenario, Successor};
use machine::world::{Breaks, Checked};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::mutation::Mutation;
use standstill_protocol::transition::OnFailure;
use stateright::Checker;

/// Checks a scenario with a fault in one of the machines until a rule breaks, and says which.
fn finds(breaks: Breaks, scenario: Scenario, rule: Rule) {
    let checker = report::find(Checked::broken(scenario, breaks), rule);
    let mut discoveries = checker.discoveries();
    let names: Vec<_> = discoveries.keys().copied().collect();
    let Some(path) = discoveries.remove(rule.name()) else {
        panic!("{:?} did not break; what did is {names:?}", rule.name());
    };
    let trace = report::trace(checker.model(), path);
    println!("{} does not hold:\n{trace}", rule.name());
    let steps = trace.lines().filter(|line| line.trim_start().starts_with(char::is_numeric));
    assert!((1..=40).contains(&steps.count()), "a trace that nobody reads");
    assert!(trace.contains("device"), "it names who does what");
}

macro_rules! in_the_transition {
    ($mutation:ident) => {
        Breaks {
            transition: |shipped| shipped.with_mutation(Mutation::$mutation),
            lifecycle: |shipped| shipped,
        }
    };
}

macro_rules! in_the_lifecycle {
    ($mutation:ident) => {
        Breaks {
            transition: |shipped| shipped,
            lifecycle: |shipped| shipped.with_mutation(Mutation::$mutation),
        }
    };
}

fn faults(change: impl FnOnce(&mut Faults)) -> Scenario {
    let mut faults = Faults { total: 2, ..Faults::default() };
    change(&mut faults);
    Scenario { faults, ..Scenario::new("a fault in the core", 2) }
}

fn taken_over() -> Scenario {
    Scenario { successor: Successor::AfterDeath, ..Scenario::new("a fault in the core", 2) }
}

#[test]
fn a_second_phase_that_does_not_wait_for_the_last_answer() {
    let breaks = in_the_transition!(CountsOneAnswerLess);
    finds(breaks, Scenario::new("a fault in the core", 2), Rule::Barrier);
}

#[test]
fn an_end_that_does_not_wait_for_the_last_answer() {
    let breaks = in_the_transition!(CountsOneAnswerLess);
    finds(breaks, faults(|f| f.refusals = 1), Rule::EverybodyAnswered);
}

#[test]
fn an_undo_that_undoes_nothing() {
    let breaks = in_the_transition!(UndoesNothing);
    finds(breaks, faults(|f| f.refusals = 1), Rule::NothingRunsHalf);
}

#[test]
fn an_undo_that_goes_back_to_a_machine_that_neither_ran_nor_stood() {
    let breaks = in_the_transition!(GoesBackToAHalf);
    let half = |scenario| Scenario { last_from: Some(MigrationState::RunningP2p), ..scenario };
    finds(breaks, half(faults(|f| f.crashes = 1)), Rule::OutcomeIsTrue);
    finds(breaks, half(faults(|f| f.refusals = 1)), Rule::OutcomeIsTrue);
}

#[test]
fn an_undo_that_is_undone() {
    let breaks = in_the_transition!(UndoesAnUndo);
    finds(breaks, faults(|f| f.refusals = 2), Rule::FourEpochs);
}

#[test]
fn silence_that_is_taken_for_an_answer() {
    let breaks = in_the_transition!(TakesSilenceForAnAck);
    finds(breaks, faults(|f| f.timeouts = 1), Rule::SilenceIsFenced);
}

#[test]
fn a_start_that_does_not_wait_for_a_fence() {
    let breaks = in_the_transition!(GoesOnBesideAFence);
    finds(breaks, faults(|f| f.crashes = 1), Rule::NoStartBesideAFence);
}

#[test]
fn a_fence_that_is_taken_for_proven() {
    let breaks = in_the_transition!(TakesUnprovenForProven);
    let scenario = faults(|f| {
        f.crashes = 1;
        f.unproven = 1;
    });
    finds(breaks, scenario, Rule::NoStartBesideAFence);
}

#[test]
fn a_fence_that_is_taken_for_proven_by_the_outcome() {
    let breaks = in_the_transition!(TakesUnprovenForProven);
    let scenario = faults(|f| {
        f.crashes = 1;
        f.unproven = 1;
    });
    let scenario = Scenario { on_failure: OnFailure::StayStopped, ..scenario };
    finds(breaks, scenario, Rule::OutcomeIsTrue);
}

#[test]
fn an_answer_of_another_epoch_that_counts() {
    let breaks = in_the_transition!(TakesAnswersOfOtherEpochs);
    let scenario = faults(|f| f.refusals = 1);
    let scenario = Scenario { on_failure: OnFailure::StayStopped, ..scenario };
    finds(breaks, scenario, Rule::OtherEpoch);
}

#[test]
fn a_refusal_that_is_passed_over() {
    let breaks = in_the_transition!(GoesOnAfterARefusal);
    finds(breaks, faults(|f| f.refusals = 1), Rule::Barrier);
}

#[test]
fn a_participant_that_is_not_told() {
    let breaks = in_the_transition!(ForgetsTheLast);
    finds(breaks, Scenario::new("a fault in the core", 2), Rule::ToldAtOnce);
}

#[test]
fn a_participant_that_is_left_out_of_an_undo() {
    let breaks = in_the_transition!(UndoForgetsTheLast);
    finds(breaks, faults(|f| f.refusals = 1), Rule::OutcomeIsTrue);
}

#[test]
fn a_second_phase_that_is_undone_as_if_it_were_the_first() {
    let breaks = in_the_transition!(UndoesTheSecondPhaseAsTheFirst);
    finds(breaks, faults(|f| f.refusals = 1), Rule::NoWriterBesideAStopped);
}

#[test]
fn answers_without_a_deadline() {
    let breaks = in_the_transition!(ArmsNoPhaseTimer);
    finds(breaks, Scenario::new("a fault in the core", 2), Rule::Deadline);
}

#[test]
fn an_outcome_that_does_not_say_who_was_fenced() {
    let breaks = in_the_transition!(HidesWhoWasFenced);
    finds(breaks, faults(|f| f.crashes = 1), Rule::OutcomeIsTrue);
}

#[test]
fn an_undo_that_is_called_done() {
    let breaks = in_the_transition!(CallsAnUndoDone);
    finds(breaks, faults(|f| f.refusals = 1), Rule::OutcomeIsTrue);
}

#[test]
fn a_hold_that_stops_nobody() {
    let breaks = in_the_transition!(HoldsWithoutStopping);
    let scenario = faults(|f| {
        f.crashes = 1;
        f.unproven = 1;
    });
    finds(breaks, scenario, Rule::OutcomeIsTrue);
}

#[test]
fn a_transition_that_acts_after_its_end() {
    let breaks = in_the_transition!(ActsAfterTheEnd);
    finds(breaks, faults(|f| f.crashes = 1), Rule::OneOutcome);
}

#[test]
fn a_take_over_that_starts_what_was_stopped() {
    let breaks = in_the_transition!(StartsWhatWasStopped);
    finds(breaks, taken_over(), Rule::StoppedIsNotStarted);
}

#[test]
fn a_hook_that_fails_and_is_passed_over() {
    let breaks = in_the_transition!(GoesOnAfterAFailedHook);
    let scenario = Scenario { hook: true, ..faults(|f| f.refusals = 1) };
    finds(breaks, scenario, Rule::OutcomeIsTrue);
}

#[test]
fn a_device_that_obeys_a_lower_term() {
    let breaks = in_the_lifecycle!(ObeysEveryTerm);
    finds(breaks, taken_over(), Rule::LowerTerm);
}

#[test]
fn a_device_that_obeys_an_earlier_epoch() {
    let breaks = in_the_lifecycle!(ObeysEveryEpoch);
    finds(breaks, faults(|f| f.repeats = 1), Rule::Repeated);
}

#[test]
fn a_device_that_welcomes_anybody() {
    let breaks = in_the_lifecycle!(WelcomesEveryTerm);
    let faults = Faults { repeats: 1, total: 1, ..Faults::default() };
    finds(breaks, Scenario { faults, ..taken_over() }, Rule::Repeated);
}

#[test]
fn a_device_that_still_does_what_the_last_coordinator_wanted() {
    let breaks = in_the_lifecycle!(KeepsTheOldCommand);
    let faults = Faults { refusals: 1, total: 1, ..Faults::default() };
    finds(breaks, Scenario { faults, ..taken_over() }, Rule::LowerTerm);
}

#[test]
fn a_device_that_answers_before_it_is_quiet() {
    let breaks = in_the_lifecycle!(AnswersBeforeTheArc);
    finds(breaks, Scenario::new("a fault in the core", 2), Rule::AnswerIsTrue);
}

#[test]
fn a_device_that_refuses_and_says_that_it_is_elsewhere() {
    let breaks = in_the_lifecycle!(RefusesFromElsewhere);
    finds(breaks, faults(|f| f.refusals = 1), Rule::AnswerIsTrue);
}

#[test]
fn a_device_that_leaves_stop_by_itself() {
    let breaks = in_the_lifecycle!(LeavesStopOnAbort);
    finds(breaks, faults(|f| f.refusals = 1), Rule::Quiet);
}
