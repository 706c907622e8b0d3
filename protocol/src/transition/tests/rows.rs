//! The table of targets, row by row, and which plans are admitted.

use super::*;
use crate::migration::{Activity, path};
use MigrationState as S;

const REFUSED: Option<(S, S)> = None;

#[test]
fn the_table_of_targets_is_this_one() {
    let take = |first, second| Some((first, second));
    let table = [
        (Operation::Pause, S::Error, REFUSED),
        (Operation::Pause, S::Stop, take(S::Stop, S::Stop)),
        (Operation::Pause, S::Running, take(S::RunningP2p, S::Stop)),
        (Operation::Pause, S::StopCopy, take(S::StopCopy, S::StopCopy)),
        (Operation::Pause, S::Resuming, take(S::Resuming, S::Resuming)),
        (Operation::Pause, S::RunningP2p, take(S::RunningP2p, S::Stop)),
        (Operation::Pause, S::PreCopy, take(S::PreCopyP2p, S::StopCopy)),
        (Operation::Pause, S::PreCopyP2p, take(S::PreCopyP2p, S::StopCopy)),
        (Operation::SwitchOver, S::Error, REFUSED),
        (Operation::SwitchOver, S::Stop, take(S::Stop, S::StopCopy)),
        (Operation::SwitchOver, S::Running, take(S::RunningP2p, S::StopCopy)),
        (Operation::SwitchOver, S::StopCopy, take(S::StopCopy, S::StopCopy)),
        (Operation::SwitchOver, S::Resuming, REFUSED),
        (Operation::SwitchOver, S::RunningP2p, take(S::RunningP2p, S::StopCopy)),
        (Operation::SwitchOver, S::PreCopy, take(S::PreCopyP2p, S::StopCopy)),
        (Operation::SwitchOver, S::PreCopyP2p, take(S::PreCopyP2p, S::StopCopy)),
        (Operation::Load, S::Error, REFUSED),
        (Operation::Load, S::Stop, take(S::Resuming, S::Stop)),
        (Operation::Load, S::Running, take(S::Resuming, S::Stop)),
        (Operation::Load, S::StopCopy, REFUSED),
        (Operation::Load, S::Resuming, take(S::Resuming, S::Stop)),
        (Operation::Load, S::RunningP2p, take(S::Resuming, S::Stop)),
        (Operation::Load, S::PreCopy, REFUSED),
        (Operation::Load, S::PreCopyP2p, REFUSED),
        (Operation::Resume, S::Error, REFUSED),
        (Operation::Resume, S::Stop, take(S::RunningP2p, S::Running)),
        (Operation::Resume, S::Running, take(S::Running, S::Running)),
        (Operation::Resume, S::StopCopy, take(S::RunningP2p, S::Running)),
        (Operation::Resume, S::Resuming, REFUSED),
        (Operation::Resume, S::RunningP2p, take(S::RunningP2p, S::Running)),
        (Operation::Resume, S::PreCopy, take(S::PreCopy, S::PreCopy)),
        (Operation::Resume, S::PreCopyP2p, take(S::PreCopyP2p, S::PreCopy)),
    ];
    assert_eq!(table.len(), 4 * S::ALL.len());
    for (operation, state, expected) in table {
        let found = match row(operation, state) {
            Row::Take { first, second } => Some((first, second)),
            Row::Refuse(reason) => {
                assert!(!reason.is_empty());
                None
            }
        };
        assert_eq!(found, expected, "{operation} in {state}");
    }
}

#[test]
fn every_row_is_carried_out_as_it_says() {
    for operation in [Operation::Pause, Operation::SwitchOver, Operation::Resume, Operation::Load] {
        for state in S::ALL {
            let plan = machine(operation, &[state, state]);
            let (first, second) = match row(operation, state) {
                Row::Take { first, second } => (first, second),
                Row::Refuse(reason) => {
                    let refused = PlanError::State { operation, id: id(0), state, reason };
                    assert_eq!(plan.check(), Err(refused));
                    assert_eq!(Transition::new(plan).map(drop), Err(refused));
                    continue;
                }
            };
            let mut script = Script::begin(plan);
            let (one, two) = match operation {
                Operation::Resume => (Phase::PrepareStart, Phase::Start),
                _ => (Phase::PrepareStop, Phase::Stop),
            };
            if operation == Operation::Load {
                assert_eq!(script.sent(), [(0, Phase::Load, second), (1, Phase::Load, second)]);
            } else {
                assert_eq!(script.sent(), [(0, one, first), (1, one, first)]);
                script.reach_all();
                assert_eq!(script.sent(), [(0, two, second), (1, two, second)]);
            }
            script.reach_all();
            assert_eq!(script.outcome(), Some(&Outcome::Done));
        }
    }
}

#[test]
fn every_target_can_be_reached_in_the_phases_direction() {
    for operation in [Operation::Pause, Operation::SwitchOver, Operation::Resume] {
        for state in S::ALL {
            let Row::Take { first, second } = row(operation, state) else {
                continue;
            };
            assert!(path(MigrationFlags::ALL, state, first).is_ok());
            assert!(path(MigrationFlags::ALL, first, second).is_ok());
            let along = [state, first, second].map(S::activity);
            match operation {
                Operation::Resume => assert!(along.is_sorted(), "{operation} in {state}"),
                _ => assert!(along.iter().rev().is_sorted(), "{operation} in {state}"),
            }
            // After the first phase nobody who moves is at an end of the way.
            assert!(first == state || first.activity() == Activity::NoPeer);
        }
    }
}

#[test]
fn a_participant_without_p2p_states_is_admitted_only_where_that_is_safe() {
    let lonely = Member { flags: MigrationFlags::STOP_COPY, ..member(0, S::Running) };
    let peer = member(1, S::Running);
    let refused = Err(PlanError::OnePhase { id: id(0) });
    for operation in [Operation::Pause, Operation::SwitchOver] {
        assert_eq!(plan(operation, vec![lonely, peer]).check(), refused);
        assert_eq!(plan(operation, vec![lonely]).check(), Ok(()), "nobody else is there");
        let allowed = Member { one_phase_allowed: true, ..lonely };
        assert_eq!(plan(operation, vec![allowed, peer]).check(), Ok(()));
        let ram_only = Member { peer_dma: PeerDma::RamOnly, ..lonely };
        assert_eq!(plan(operation, vec![ram_only, peer]).check(), Ok(()));
    }
    let stopped = Member { state: S::Stop, ..lonely };
    assert_eq!(plan(Operation::Resume, vec![stopped, peer]).check(), refused);
    // These have no barrier.
    assert_eq!(plan(Operation::Load, vec![stopped, peer]).check(), Ok(()));
    assert_eq!(plan(Operation::TakeOver, vec![lonely, peer]).check(), Ok(()));
}

#[test]
fn a_participant_without_a_state_is_stopped_and_started_but_not_saved_or_loaded() {
    let plain = Member { flags: MigrationFlags::NO_STATE_P2P, ..member(0, S::Running) };
    let all = || vec![plain, member(1, S::Running)];
    assert_eq!(plan(Operation::Pause, all()).check(), Ok(()));
    for operation in [Operation::SwitchOver, Operation::Load] {
        let refused = Err(PlanError::NoState { operation, id: id(0) });
        assert_eq!(plan(operation, all()).check(), refused);
    }
}

#[test]
fn the_refusal_of_a_one_phase_participant_names_it_and_the_way_out() {
    let lonely = Member { flags: MigrationFlags::STOP_COPY, ..member(7, S::Running) };
    let error = plan(Operation::Pause, vec![lonely, member(1, S::Running)])
        .check()
        .expect_err("it is refused")
        .to_string();
    assert!(error.contains("participant 7") && error.contains("one-phase"), "{error}");
}

#[test]
fn a_participant_without_p2p_states_is_told_the_second_phase_only() {
    let flags = MigrationFlags::STOP_COPY;
    let lonely = Member { flags, one_phase_allowed: true, ..member(0, S::Running) };
    let mut script = Script::begin(plan(Operation::Pause, vec![lonely, member(1, S::Running)]));
    assert_eq!(script.sent(), [(1, Phase::PrepareStop, S::RunningP2p)]);
    script.reach_all();
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::Done));
}

#[test]
fn a_number_that_is_there_twice_is_refused() {
    let twice = plan(Operation::Pause, vec![member(4, S::Running), member(4, S::Running)]);
    assert_eq!(twice.check(), Err(PlanError::Twice { id: id(4) }));
}

#[test]
fn a_machine_without_participants_is_done_at_once() {
    for operation in [Operation::Pause, Operation::Resume, Operation::Load, Operation::TakeOver] {
        let script = Script::begin(plan(operation, Vec::new()));
        assert_eq!(script.outcome(), Some(&Outcome::Done), "{operation}");
    }
}
