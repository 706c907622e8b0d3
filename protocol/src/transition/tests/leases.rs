//! Participants that leave STOP by themselves when their lease has run out.

use super::*;
use MigrationState as S;

fn leased(number: u32, state: MigrationState) -> Member {
    Member { lease_ns: 77, ..member(number, state) }
}

fn expired(number: u32) -> Event {
    Event::LeaseExpired(id(number), S::RunningP2p)
}

/// A pause of two, of which the first has stopped and the second has not answered yet.
fn half_stopped(on_failure: OnFailure) -> Script {
    let members = vec![optional(leased(0, S::Running)), leased(1, S::Running)];
    let mut script = Script::begin(Plan { on_failure, ..plan(Operation::Pause, members) });
    script.reach_all();
    script.reach(0);
    script
}

#[test]
fn a_pause_whose_first_lease_runs_out_before_it_has_ended_is_rolled_back() {
    let mut script = half_stopped(OnFailure::Rollback);
    script.step(expired(0));
    assert_eq!(script.aborted(), [(1, EPOCH)]);
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]);
    assert!(script.asked.values().all(|command| command.lease_ns == 0));
    let failures: Vec<_> =
        script.transition.failures().iter().map(|f| (f.subject, f.kind)).collect();
    assert_eq!(failures, [(Subject::Participant(id(0)), FailureKind::LeaseExpired)]);
    for _ in 0..3 {
        script.reach_all();
    }
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack), "nobody is lost");
    assert_eq!(script.transition.state(id(0)), Some(S::Running));
}

#[test]
fn by_the_policy_it_stays_stopped_without_a_lease() {
    let mut script = half_stopped(OnFailure::StayStopped);
    script.step(expired(0));
    assert!(script.asked.values().all(|command| command.lease_ns == 0));
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::Stopped));
}

#[test]
fn a_lease_that_runs_out_while_the_last_hooks_are_called_is_no_less_a_failure() {
    let hook = Hook {
        id: HookId(0),
        stop: Slot::After,
        start: Slot::Before,
        stop_rank: 0,
        start_rank: 0,
        budget_ns: 1,
        stopped: false,
    };
    let members = vec![leased(0, S::Running)];
    let mut script = Script::begin(Plan { hooks: vec![hook], ..plan(Operation::Pause, members) });
    script.reach_all();
    script.reach_all();
    assert_eq!(script.hooks(), [(0, HookMoment::Stop)]);
    script.step(expired(0));
    assert_eq!(script.outcome(), None, "the hook has not returned");
    script.step(Event::HookDone(HookId(0), HookMoment::Stop));
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop)]);
}

#[test]
fn who_has_left_before_it_hears_of_a_transition_is_taken_along_from_there() {
    for (operation, states) in [
        (Operation::Pause, [S::RunningP2p, S::Stop]),
        (Operation::Resume, [S::RunningP2p, S::Running]),
    ] {
        // It is known, or is learnt before anybody is told, or after that.
        for known in 0..3 {
            let found = if known == 0 { S::RunningP2p } else { S::Stop };
            let members = vec![leased(0, found), leased(1, S::Stop)];
            let mut script = Script::prepare(plan(operation, members));
            if known == 1 {
                let hooks = vec![Hook {
                    id: HookId(0),
                    stop: Slot::Before,
                    start: Slot::Before,
                    stop_rank: 0,
                    start_rank: 0,
                    budget_ns: 1,
                    stopped: operation == Operation::Resume,
                }];
                let members = vec![leased(0, found), leased(1, S::Stop)];
                script = Script::prepare(Plan { hooks, ..plan(operation, members) });
                script.step(Event::Begin);
                let (_, moment) = script.hooks()[0];
                assert_eq!(script.step(expired(0)), []);
                script.step(Event::HookDone(HookId(0), moment));
            } else {
                script.step(Event::Begin);
            }
            if known == 2 {
                assert_eq!(script.step(expired(0)), [], "it answers for itself");
                // It may have gone to STOP again, which is as quiet as can be.
                script.reach_all();
            } else {
                assert_eq!(script.asked[&id(0)].target, states[0]);
                script.reach_all();
            }
            script.reach_all();
            assert_eq!(script.outcome(), Some(&Outcome::Done), "{operation}, {known}");
            assert_eq!(script.transition.state(id(0)), Some(states[1]));
        }
    }
}

#[test]
fn there_is_no_way_back_to_where_only_some_have_left_stop() {
    for operation in [Operation::Pause, Operation::Resume] {
        let mut script = Script::begin(machine(operation, &[S::Stop, S::Stop]));
        script.step(expired(0));
        script.step(Event::Cancel);
        while script.transition.awaited().next().is_some() {
            script.reach_all();
        }
        assert_eq!(script.outcome(), Some(&Outcome::Stopped), "{operation}");
    }
}

#[test]
fn an_undo_that_had_nobody_to_stop_stops_all_when_one_leaves_stop() {
    for operation in [Operation::Pause, Operation::Resume] {
        // A fence keeps it from telling anybody anything.
        let mut script = Script::prepare(machine(operation, &[S::Stop, S::Stop, S::Stop]));
        script.step(Event::Lost(id(2), Loss::Exited));
        script.step(Event::Begin);
        script.step(Event::Cancel);
        script.step(expired(0));
        assert_eq!(script.transition.awaited().count(), 0, "the fence is not proven yet");
        script.step(Event::Fenced(id(2)));
        assert_eq!(
            script.sent(),
            [(0, Phase::PrepareStop, S::RunningP2p), (1, Phase::PrepareStop, S::Stop)]
        );
        script.reach_all();
        assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]);
        script.reach_all();
        let fenced = vec![(id(2), Loss::Exited)];
        let stopped = Outcome::Degraded { machine: MachineState::Stopped, fenced };
        assert_eq!(script.outcome(), Some(&stopped), "{operation}");
    }
}

#[test]
fn what_is_told_of_one_that_runs_changes_nothing() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::Running]));
    let before = script.transition.strays();
    for event in [expired(0), expired(9)] {
        assert_eq!(script.step(event), []);
    }
    assert_eq!(script.transition.strays(), before + 2);
    script.reach_all();
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::Done));
}

#[test]
fn one_whose_state_is_half_loaded_has_no_lease() {
    let mut script =
        Script::begin(plan(Operation::Pause, vec![leased(0, S::Resuming), leased(1, S::Stop)]));
    script.reach_all();
    assert_eq!(script.asked[&id(0)].lease_ns, 0);
    assert_eq!(script.asked[&id(1)].lease_ns, 77);
}
