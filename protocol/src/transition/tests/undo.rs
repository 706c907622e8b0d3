//! The undo table: one test for each row, and what the rows have in common.

use super::*;
use MigrationState as S;

/// Who is told what, in which epoch after the first.
type Step<'a> = (u64, &'a [(u32, Phase, S)]);

/// Lets participant 0 refuse in a phase and follows the undo to its end, where everybody obeys.
fn undoes(plan: Plan, second_phase: bool, steps: &[Step<'_>], outcome: &Outcome) {
    let mut script = Script::begin(plan);
    if second_phase {
        script.reach_all();
    }
    let at = script.transition.state(id(0)).expect("it counts");
    script.refuse(0, at);
    assert!(script.transition.is_undoing());
    for (epoch, expected) in steps {
        assert_eq!(script.sent(), *expected);
        assert_eq!(script.transition.epoch(), Epoch(EPOCH.0 + epoch));
        for (number, ..) in *expected {
            let command = script.asked[&id(*number)];
            assert_eq!((command.term, command.epoch), (TERM, Epoch(EPOCH.0 + epoch)));
        }
        script.reach_all();
    }
    assert_eq!(script.outcome(), Some(outcome));
}

fn stay(plan: Plan) -> Plan {
    Plan { on_failure: OnFailure::StayStopped, ..plan }
}

#[test]
fn a_pause_that_fails_in_its_first_phase_goes_back() {
    undoes(
        machine(Operation::Pause, &[S::Running, S::PreCopy]),
        false,
        &[(1, &[(0, Phase::Start, S::Running), (1, Phase::Start, S::PreCopy)])],
        &Outcome::RolledBack,
    );
}

#[test]
fn a_pause_that_fails_in_its_second_phase_stops_and_starts_in_two_phases() {
    undoes(
        machine(Operation::Pause, &[S::Running, S::PreCopy]),
        true,
        &[
            (1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]),
            (
                2,
                &[(0, Phase::PrepareStart, S::RunningP2p), (1, Phase::PrepareStart, S::RunningP2p)],
            ),
            // Never back to PRE_COPY: its stream is void.
            (2, &[(0, Phase::Start, S::Running), (1, Phase::Start, S::Running)]),
        ],
        &Outcome::RolledBack,
    );
}

#[test]
fn a_pause_that_is_to_stay_stopped_goes_on_from_its_first_phase() {
    undoes(
        stay(machine(Operation::Pause, &[S::Running, S::PreCopy])),
        false,
        &[
            (1, &[(0, Phase::PrepareStop, S::RunningP2p), (1, Phase::PrepareStop, S::PreCopyP2p)]),
            (1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]),
        ],
        &Outcome::Stopped,
    );
}

#[test]
fn a_pause_that_is_to_stay_stopped_stops_again_in_its_second_phase() {
    undoes(
        stay(machine(Operation::Pause, &[S::Running, S::Running])),
        true,
        &[(1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)])],
        &Outcome::Stopped,
    );
}

#[test]
fn a_switch_over_that_fails_in_its_first_phase_goes_back_and_keeps_the_stream() {
    undoes(
        machine(Operation::SwitchOver, &[S::PreCopy, S::Running]),
        false,
        &[(1, &[(0, Phase::Start, S::PreCopy), (1, Phase::Start, S::Running)])],
        &Outcome::RolledBack,
    );
}

#[test]
fn a_switch_over_that_fails_in_its_second_phase_gives_the_stream_up() {
    undoes(
        machine(Operation::SwitchOver, &[S::PreCopy, S::Running]),
        true,
        &[
            (1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]),
            (
                2,
                &[(0, Phase::PrepareStart, S::RunningP2p), (1, Phase::PrepareStart, S::RunningP2p)],
            ),
            (2, &[(0, Phase::Start, S::Running), (1, Phase::Start, S::Running)]),
        ],
        &Outcome::RolledBack,
    );
}

#[test]
fn a_switch_over_that_is_to_stay_stopped_goes_to_stop() {
    let plan = || stay(machine(Operation::SwitchOver, &[S::PreCopy, S::StopCopy]));
    undoes(
        plan(),
        false,
        &[
            (1, &[(0, Phase::PrepareStop, S::PreCopyP2p), (1, Phase::PrepareStop, S::StopCopy)]),
            (1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::StopCopy)]),
        ],
        &Outcome::Stopped,
    );
    undoes(
        plan(),
        true,
        &[(1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::StopCopy)])],
        &Outcome::Stopped,
    );
}

#[test]
fn a_resume_that_fails_in_its_first_phase_goes_back_to_stop() {
    undoes(
        machine(Operation::Resume, &[S::Stop, S::StopCopy]),
        false,
        // Nobody has moved as far as is known.
        &[(1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::StopCopy)])],
        &Outcome::RolledBack,
    );
}

#[test]
fn a_resume_that_fails_in_its_second_phase_is_a_whole_stop() {
    undoes(
        machine(Operation::Resume, &[S::Stop, S::StopCopy]),
        true,
        &[
            (1, &[(0, Phase::PrepareStop, S::RunningP2p), (1, Phase::PrepareStop, S::RunningP2p)]),
            (1, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]),
        ],
        &Outcome::RolledBack,
    );
}

/// A hold that runs out of its time may leave one behind in RUNNING_P2P, or in RUNNING.
#[test]
fn a_machine_that_neither_ran_nor_stood_is_stopped_whatever_fails() {
    let p2p = |n| (n, Phase::PrepareStop, S::RunningP2p);
    let stop = |n| (n, Phase::Stop, S::Stop);
    let halves = [[S::Running, S::RunningP2p], [S::RunningP2p; 2], [S::RunningP2p, S::Stop]];
    for half in halves {
        let first = |n: u32| match half[n as usize] {
            S::Stop => (n, Phase::PrepareStop, S::Stop),
            _ => p2p(n),
        };
        let plan = || machine(Operation::Pause, &half);
        let whole: [Step<'_>; 2] = [(1, &[first(0), first(1)]), (1, &[stop(0), stop(1)])];
        undoes(plan(), false, &whole, &Outcome::Stopped);
        undoes(plan(), true, &whole[1..], &Outcome::Stopped);
        // Everybody may be on the way.
        let whole: [Step<'_>; 2] = [(1, &[p2p(0), p2p(1)]), (1, &[stop(0), stop(1)])];
        for second_phase in [false, true] {
            undoes(machine(Operation::Resume, &half), second_phase, &whole, &Outcome::Stopped);
        }
    }
    // Some may be left who were all in one state.
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::RunningP2p]));
    script.lose(1);
    script.fenced(1);
    assert_eq!(script.sent(), [(0, Phase::Start, S::Running)]);
    script.reach_all();
    let fenced = vec![(id(1), Loss::Exited)];
    let outcome = Outcome::Degraded { machine: MachineState::Running, fenced };
    assert_eq!(script.outcome(), Some(&outcome));
}

#[test]
fn a_resume_goes_back_to_stop_under_either_policy() {
    undoes(
        stay(machine(Operation::Resume, &[S::Stop])),
        true,
        &[(1, &[(0, Phase::PrepareStop, S::RunningP2p)]), (1, &[(0, Phase::Stop, S::Stop)])],
        &Outcome::Stopped,
    );
}

#[test]
fn a_load_that_fails_is_reset_under_either_policy() {
    for plan in [
        machine(Operation::Load, &[S::Stop, S::Running]),
        stay(machine(Operation::Load, &[S::Stop, S::Running])),
    ] {
        undoes(
            plan,
            false,
            &[
                (1, &[(0, Phase::Reset, S::Stop), (1, Phase::Reset, S::Running)]),
                (2, &[(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]),
            ],
            &Outcome::Stopped,
        );
    }
}

#[test]
fn the_table_has_one_row_for_each_case_and_no_other() {
    for operation in [Operation::Pause, Operation::SwitchOver, Operation::Resume, Operation::Load] {
        for on_failure in [OnFailure::Rollback, OnFailure::StayStopped] {
            for second_phase in [false, true] {
                let rows = UNDO.iter().filter(|row| {
                    (row.operation, row.on_failure, row.second_phase)
                        == (operation, on_failure, second_phase)
                });
                let expected = match operation {
                    Operation::Resume => usize::from(on_failure == OnFailure::Rollback),
                    Operation::Load => usize::from(!second_phase),
                    _ => 1,
                };
                assert_eq!(rows.count(), expected, "{operation} {on_failure:?} {second_phase}");
            }
        }
    }
    assert!(UNDO.iter().all(|row| row.operation != Operation::TakeOver));
}

#[test]
fn an_undo_gives_up_only_those_who_have_not_answered() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running; 3]));
    script.reach(0);
    script.refuse(1, S::Running);
    assert_eq!(script.aborted(), [(2, EPOCH)]);
    assert_eq!(script.sent().len(), 3, "all three are told to go back");
}

#[test]
fn a_cancel_is_undone_like_a_failure_and_only_once() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running]));
    script.step(Event::Cancel);
    assert_eq!(script.aborted(), [(0, EPOCH)]);
    assert_eq!(script.sent(), [(0, Phase::Start, S::Running)]);
    assert_eq!(script.step(Event::Cancel), []);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
    let cancelled = |failure: &Failure| failure.kind == FailureKind::Cancelled;
    assert_eq!(script.transition.failures().iter().filter(|f| cancelled(f)).count(), 1);
}

#[test]
fn one_that_refuses_the_undos_stop_in_p2p_is_taken_along_by_the_start() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::Running]));
    script.reach_all();
    script.refuse(0, S::RunningP2p);
    assert_eq!(script.sent().len(), 2, "the undo's stop");
    script.reach(1);
    script.refuse(0, S::RunningP2p);
    let both = [(0, Phase::PrepareStart, S::RunningP2p), (1, Phase::PrepareStart, S::RunningP2p)];
    assert_eq!(script.sent(), both);
    script.reach_all();
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
}

#[test]
fn one_that_refuses_the_undos_stop_otherwise_is_fenced() {
    // Where no start follows, and where it writes to its peers.
    for (on_failure, at) in
        [(OnFailure::StayStopped, S::RunningP2p), (OnFailure::Rollback, S::Running)]
    {
        let mut plan = machine(Operation::Pause, &[S::Running, S::Running]);
        plan.on_failure = on_failure;
        let mut script = Script::begin(plan);
        script.reach_all();
        script.refuse(0, at);
        let effects = script.refuse(0, at);
        assert!(effects.contains(&Effect::Fence(id(0), Loss::Refused)), "{at}: {effects:?}");
    }
}

#[test]
fn an_undo_that_does_not_end_in_its_budget_becomes_a_hold() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::Running]));
    script.refuse(0, S::Running);
    script.reach(0);
    let undo = script.transition.epoch();
    script.expire(Timer::Undo);
    assert!(script.effects.contains(&Effect::Arm(Timer::Hold, UNDO_NS)));
    assert_eq!(script.aborted(), [(1, undo)]);
    let first = [(0, Phase::PrepareStop, S::RunningP2p), (1, Phase::PrepareStop, S::RunningP2p)];
    assert_eq!(script.sent(), first);
    script.reach_all();
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::UndoExpired])));
}

#[test]
fn a_machine_that_was_stopped_already_stays_stopped_when_a_pause_of_it_fails() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Stop, S::Stop]));
    script.lose(0);
    script.fenced(0);
    assert_eq!(script.sent(), [], "there is nothing to start");
    let fenced = vec![(id(0), Loss::Exited)];
    let outcome = Outcome::Degraded { machine: MachineState::Stopped, fenced };
    assert_eq!(script.outcome(), Some(&outcome));
}

#[test]
fn a_resume_that_is_undone_leaves_a_running_machine_running_and_says_so() {
    let running = || machine(Operation::Resume, &[S::Running, S::Running]);
    let mut script = Script::begin(running());
    script.lose(0);
    script.fenced(0);
    let fenced = vec![(id(0), Loss::Exited)];
    let degraded = Outcome::Degraded { machine: MachineState::Running, fenced };
    assert_eq!(script.outcome(), Some(&degraded));

    let mut script = Script::begin(stay(running()));
    script.refuse(0, S::Running);
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack), "nobody is in STOP");
}

#[test]
fn a_transition_with_other_numbers_does_the_same_with_other_numbers() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running; 3]));
    script.reach(2);
    script.lose(0);
    let turn = |ParticipantId(number)| ParticipantId((number + 1) % 3);
    let mut other = script.transition.renumbered(turn);
    assert_eq!(other.renumbered(turn).renumbered(turn), script.transition);
    assert_eq!(other.state(id(1)), None);
    assert_eq!(other.state(id(0)), Some(S::RunningP2p));
    assert_eq!(other.step(Event::Fenced(id(0))), [], "that is another one's fence");
    let effects = other.step(Event::Fenced(id(1)));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Send(ParticipantId(0), _))));
}
