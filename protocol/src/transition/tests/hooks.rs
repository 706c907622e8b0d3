//! Hooks: their places, their order, and what happens when they fail or hang.

use super::*;
use HookMoment::{Start, Stop};
use MigrationState as S;

const HOOK_NS: u64 = 50;

fn hook(number: u32, slot: Slot, rank: i32) -> Hook {
    Hook {
        id: HookId(number),
        stop: slot,
        start: slot.mirrored(),
        stop_rank: rank,
        start_rank: -rank,
        budget_ns: HOOK_NS,
        stopped: false,
    }
}

fn stopped(hooks: &[Hook]) -> Vec<Hook> {
    hooks.iter().map(|hook| Hook { stopped: true, ..*hook }).collect()
}

/// One in each slot, two of them in order before the first phase and two at the same time after.
fn hooks() -> Vec<Hook> {
    vec![
        hook(0, Slot::Before, 1),
        hook(1, Slot::Before, 0),
        hook(2, Slot::Between, 0),
        hook(3, Slot::After, 7),
        hook(4, Slot::After, 7),
    ]
}

fn with_hooks(operation: Operation, state: S, hooks: Vec<Hook>) -> Plan {
    Plan { hooks, ..machine(operation, &[state]) }
}

/// Lets everything go well to the end; in order, what was called and what was told.
fn follow(script: &mut Script) -> Vec<String> {
    let mut seen = Vec::new();
    while script.outcome().is_none() {
        let hooks = script.hooks();
        seen.extend(script.sent().iter().map(|(_, phase, _)| phase.to_string()));
        if hooks.is_empty() {
            script.reach_all();
        } else {
            let names: Vec<_> = hooks.iter().map(|(number, _)| number.to_string()).collect();
            seen.push(names.join("+"));
            for (number, moment) in hooks {
                script.step(Event::HookDone(HookId(number), moment));
            }
        }
    }
    seen
}

#[test]
fn a_stop_runs_hooks_by_slot_and_rank_and_a_start_mirrors_it() {
    let mut script = Script::begin(with_hooks(Operation::Pause, S::Running, hooks()));
    assert_eq!(follow(&mut script), ["1", "0", "PrepareStop", "2", "Stop", "3+4"]);
    assert_eq!(script.outcome(), Some(&Outcome::Done));
    assert!(script.transition.hooks().iter().all(|hook| hook.stopped));

    let mut script = Script::begin(with_hooks(Operation::Resume, S::Stop, stopped(&hooks())));
    assert_eq!(follow(&mut script), ["3+4", "PrepareStart", "2", "Start", "0", "1"]);
    assert!(script.transition.hooks().iter().all(|hook| !hook.stopped));
}

#[test]
fn a_hook_can_have_the_same_place_in_both_directions() {
    let first = Hook { start: Slot::Before, ..hook(0, Slot::Before, 0) };
    let mut script = Script::begin(with_hooks(Operation::Resume, S::Stop, stopped(&[first])));
    assert_eq!(follow(&mut script), ["0", "PrepareStart", "Start"]);
}

#[test]
fn a_hook_is_not_called_for_what_it_was_called_for_already() {
    let mut script = Script::begin(with_hooks(Operation::Pause, S::Running, stopped(&hooks())));
    assert_eq!(follow(&mut script), ["PrepareStop", "Stop"]);
    let mut script = Script::begin(with_hooks(Operation::Resume, S::Stop, hooks()));
    assert_eq!(follow(&mut script), ["PrepareStart", "Start"]);
}

#[test]
fn hooks_of_the_next_rank_wait_for_all_of_this_one() {
    let both = vec![hook(0, Slot::Before, 0), hook(1, Slot::Before, 0), hook(2, Slot::Before, 1)];
    let mut script = Script::begin(with_hooks(Operation::Pause, S::Running, both));
    assert_eq!(script.hooks(), [(0, Stop), (1, Stop)]);
    assert!(script.effects.contains(&Effect::Arm(Timer::Hook(HookId(1), Stop), HOOK_NS)));
    assert_eq!(script.step(Event::HookDone(HookId(1), Stop)).len(), 1, "its timer is disarmed");
    assert_eq!(script.step(Event::HookDone(HookId(1), Stop)), [], "a duplicate");
    assert_eq!(script.step(Event::HookDone(HookId(0), Start)), [], "another call");
    script.step(Event::HookDone(HookId(0), Stop));
    assert_eq!(script.hooks(), [(2, Stop)]);
}

#[test]
fn a_hook_that_fails_is_undone_and_those_that_ran_are_run_the_other_way() {
    let plan = with_hooks(Operation::Pause, S::Running, hooks());
    let mut script = Script::begin(plan);
    for number in [1, 0] {
        script.step(Event::HookDone(HookId(number), Stop));
    }
    script.reach_all();
    script.step(Event::HookFailed(HookId(2), Stop));
    assert_eq!(script.sent(), [(0, Phase::Start, S::Running)]);
    script.reach_all();
    assert_eq!(script.hooks(), [(0, Start)], "the last first, and 2 not at all");
    script.step(Event::HookDone(HookId(0), Start));
    assert_eq!(script.hooks(), [(1, Start)]);
    script.step(Event::HookDone(HookId(1), Start));
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
}

#[test]
fn before_anybody_was_told_anything_only_hooks_are_undone() {
    let plan = with_hooks(Operation::Pause, S::Running, hooks());
    let mut script = Script::begin(plan);
    script.step(Event::HookDone(HookId(1), Stop));
    script.step(Event::HookFailed(HookId(0), Stop));
    assert_eq!(follow(&mut script), ["1"]);
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
}

#[test]
fn an_undo_waits_for_a_hook_that_is_still_running_and_takes_it_back() {
    let both = vec![hook(0, Slot::Before, 0), hook(1, Slot::Before, 0)];
    let mut script = Script::begin(with_hooks(Operation::Pause, S::Running, both));
    script.step(Event::HookFailed(HookId(0), Stop));
    assert_eq!(script.hooks(), []);
    script.step(Event::HookDone(HookId(1), Stop));
    assert_eq!(script.hooks(), [(1, Start)]);
}

#[test]
fn an_undo_leaves_hooks_as_it_found_them_that_the_operation_did_not_call() {
    let hooks = stopped(&[hook(0, Slot::Before, 0)]);
    let mut script = Script::begin(with_hooks(Operation::Pause, S::Stop, hooks));
    script.step(Event::Cancel);
    assert_eq!(script.hooks(), [], "the machine was paused before, vCPUs included");
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
}

#[test]
fn to_stay_stopped_calls_the_hooks_that_are_left() {
    let mut plan = with_hooks(Operation::Pause, S::Running, hooks());
    plan.on_failure = OnFailure::StayStopped;
    let mut script = Script::begin(plan);
    script.step(Event::HookDone(HookId(1), Stop));
    script.step(Event::HookFailed(HookId(0), Stop));
    assert_eq!(follow(&mut script), ["0", "PrepareStop", "2", "Stop", "3+4"]);
    assert_eq!(script.outcome(), Some(&Outcome::Stopped));
}

#[test]
fn a_hook_that_hangs_holds_the_machine_and_counts_as_called() {
    let plan = with_hooks(Operation::Pause, S::Running, vec![hook(0, Slot::Between, 0)]);
    let mut script = Script::begin(plan);
    script.reach_all();
    script.expire(Timer::Hook(HookId(0), Stop));
    assert_eq!(follow(&mut script), ["PrepareStop", "Stop"]);
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::HookHung(HookId(0))])));
    assert!(script.transition.hooks()[0].stopped, "a later resume is to start it");
}

#[test]
fn a_hung_hook_holds_the_machine_while_fencing_goes_on() {
    let hung = vec![hook(0, Slot::Before, 0)];
    let members = vec![optional(member(0, S::Running)), member(1, S::Running)];
    let mut script = Script::begin(Plan { hooks: hung, ..plan(Operation::Pause, members) });
    script.lose(0);
    script.expire(Timer::Hook(HookId(0), Stop));
    assert_eq!(script.sent(), [], "the fence comes first");
    script.fenced(0);
    script.reach_all();
    script.reach_all();
    let reasons = vec![HeldReason::HookHung(HookId(0))];
    let fenced = vec![(id(0), Loss::Exited)];
    assert_eq!(script.outcome(), Some(&Outcome::Held { reasons, fenced }));
}

/// Its failure says that it is as it was: as if it had not been called.
#[test]
fn a_hook_whose_call_was_overtaken_by_a_loss_may_fail() {
    for on_failure in [OnFailure::Rollback, OnFailure::StayStopped] {
        let hooks = vec![hook(0, Slot::After, 0)];
        let states = [S::Running, S::Running];
        let plan = Plan { hooks, on_failure, ..machine(Operation::Pause, &states) };
        let mut script = Script::begin(plan);
        script.reach_all();
        script.reach_all();
        assert_eq!(script.hooks(), [(0, Stop)]);
        script.step(Event::Lost(id(1), Loss::Exited));
        script.step(Event::Fenced(id(1)));
        script.step(Event::HookFailed(HookId(0), Stop));
        let rolls_back = on_failure == OnFailure::Rollback;
        let expected: &[_] = if rolls_back { &[] } else { &["0"] };
        let seen = follow(&mut script);
        let called: Vec<_> = seen.iter().filter(|what| what.parse::<u32>().is_ok()).collect();
        assert_eq!(called, expected, "it is not called for a start, but for a stop again");
        let fenced = vec![(id(1), Loss::Exited)];
        let machine = if rolls_back { MachineState::Running } else { MachineState::Stopped };
        assert_eq!(script.outcome(), Some(&Outcome::Degraded { machine, fenced }));
        assert_eq!(script.transition.hooks()[0].stopped, !rolls_back);
    }
}

#[test]
fn a_hook_that_fails_during_an_undo_holds_the_machine() {
    let plan = with_hooks(Operation::Pause, S::Running, vec![hook(0, Slot::Before, 0)]);
    let mut script = Script::begin(plan);
    script.step(Event::HookDone(HookId(0), Stop));
    script.refuse(0, S::Running);
    script.reach_all();
    script.step(Event::HookFailed(HookId(0), Start));
    assert_eq!(follow(&mut script), ["PrepareStop", "Stop"]);
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::HookFailed(HookId(0))])));
}

#[test]
fn the_deadline_of_an_earlier_call_does_not_end_a_later_one() {
    let plan = with_hooks(Operation::Pause, S::Running, vec![hook(0, Slot::Before, 0)]);
    let mut script = Script::begin(plan);
    script.step(Event::HookDone(HookId(0), Stop));
    script.refuse(0, S::Running);
    script.reach_all();
    assert_eq!(script.hooks(), [(0, Start)]);
    // It had run out just when the hook returned, and was queued behind that.
    assert_eq!(script.expire(Timer::Hook(HookId(0), Stop)), []);
    script.step(Event::HookDone(HookId(0), Start));
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
}

#[test]
fn two_hooks_with_one_number_are_refused() {
    let twice = vec![hook(0, Slot::Before, 0), hook(1, Slot::Before, 0), hook(0, Slot::After, 0)];
    let plan = with_hooks(Operation::Pause, S::Running, twice);
    assert_eq!(Transition::new(plan), Err(PlanError::HookTwice { id: HookId(0) }));
}

/// A hold that ran out of its time has left it so. There is no one state to go back to, also as long as
/// nobody was told anything.
#[test]
fn what_neither_ran_nor_stood_is_stopped_with_its_hooks() {
    for operation in [Operation::Pause, Operation::Resume] {
        let mut plan = machine(operation, &[S::Running, S::RunningP2p]);
        let moment = match operation {
            Operation::Resume => Start,
            _ => Stop,
        };
        let stopped = moment == Start;
        plan.hooks = vec![Hook { start: Slot::Before, stopped, ..hook(0, Slot::Before, 0) }];
        let mut script = Script::begin(plan);
        assert_eq!(script.hooks(), [(0, moment)]);
        script.step(Event::Cancel);
        script.step(Event::HookDone(HookId(0), moment));
        if moment == Start {
            assert_eq!(script.hooks(), [(0, Stop)]);
            script.step(Event::HookDone(HookId(0), Stop));
        }
        assert_eq!(script.sent().len(), 2, "everybody is to be quiet");
        script.reach_all();
        script.reach_all();
        assert_eq!(script.outcome(), Some(&Outcome::Stopped), "{operation}");
        assert!(script.transition.hooks()[0].stopped, "{operation}");
    }
}
