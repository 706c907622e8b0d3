//! A coordinator finds devices that another one has left behind.

use super::*;
use MigrationState as S;

fn take_over(states: &[S]) -> Script {
    let script = Script::begin(machine(Operation::TakeOver, states));
    let queries = |effect: &&Effect| matches!(effect, Effect::Query(..));
    assert_eq!(script.effects.iter().filter(queries).count(), states.len());
    assert_eq!(script.sent(), [], "it asks first");
    script
}

fn status(script: &mut Script, number: u32, state: S, moving_to: Option<S>) {
    script.step(Event::Answer {
        from: id(number),
        term: TERM,
        epoch: EPOCH,
        phase: Phase::Stop,
        state,
        answer: Answer::Status { moving_to },
    });
}

#[test]
fn a_machine_that_runs_is_left_alone() {
    let mut script = take_over(&[S::Running, S::Running]);
    status(&mut script, 0, S::Running, None);
    status(&mut script, 1, S::PreCopy, None);
    assert_eq!(script.outcome(), Some(&Outcome::Done));
}

#[test]
fn a_machine_where_nobody_had_reached_stop_goes_back_to_running() {
    let mut script = take_over(&[S::Running; 4]);
    status(&mut script, 0, S::RunningP2p, None);
    status(&mut script, 1, S::Running, Some(S::RunningP2p));
    status(&mut script, 2, S::PreCopyP2p, None);
    status(&mut script, 3, S::PreCopy, None);
    assert_eq!(
        script.sent(),
        [
            (0, Phase::Start, S::Running),
            (1, Phase::Start, S::Running),
            (2, Phase::Start, S::PreCopy),
            (3, Phase::Start, S::PreCopy),
        ]
    );
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
}

#[test]
fn a_machine_where_anybody_had_reached_stop_or_was_about_to_is_held_in_stop() {
    for (at, moving_to) in [(S::Stop, None), (S::StopCopy, None), (S::RunningP2p, Some(S::Stop))] {
        let mut script = take_over(&[S::Running; 2]);
        status(&mut script, 0, S::RunningP2p, None);
        status(&mut script, 1, at, moving_to);
        assert_eq!(script.sent()[0], (0, Phase::PrepareStop, S::RunningP2p));
        script.reach_all();
        assert_eq!(script.sent()[0], (0, Phase::Stop, S::Stop));
        script.reach_all();
        assert_eq!(script.outcome(), Some(&held(&[HeldReason::TakenOverStopped])));
    }
}

#[test]
fn a_finished_switch_over_is_held_and_its_streams_stay_open() {
    let mut script = take_over(&[S::StopCopy; 2]);
    status(&mut script, 0, S::StopCopy, None);
    status(&mut script, 1, S::StopCopy, None);
    script.reach_all();
    let second = [(0, Phase::Stop, S::StopCopy), (1, Phase::Stop, S::StopCopy)];
    assert_eq!(script.sent(), second);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::TakenOverStopped])));
}

#[test]
fn a_stopped_participant_that_is_starting_passes_p2p_before_it_is_stopped_again() {
    let mut script = take_over(&[S::Running; 2]);
    status(&mut script, 0, S::Running, None);
    status(&mut script, 1, S::Stop, Some(S::RunningP2p));
    let first = [(0, Phase::PrepareStop, S::RunningP2p), (1, Phase::PrepareStop, S::RunningP2p)];
    assert_eq!(script.sent(), first);
}

#[test]
fn who_does_not_answer_is_fenced_before_anything_is_decided() {
    let mut script = take_over(&[S::Running; 2]);
    status(&mut script, 0, S::RunningP2p, None);
    script.expire(Timer::Query(EPOCH));
    assert!(script.effects.contains(&Effect::Fence(id(1), Loss::Timeout)));
    assert_eq!(script.sent(), []);
    script.fenced(1);
    assert_eq!(script.sent(), [(0, Phase::Start, S::Running)]);
    script.reach_all();
    let fenced = vec![(id(1), Loss::Timeout)];
    let outcome = Outcome::Degraded { machine: MachineState::Running, fenced };
    assert_eq!(script.outcome(), Some(&outcome));
}

#[test]
fn it_cannot_be_cancelled_before_it_knows_what_it_has_found() {
    let mut script = take_over(&[S::Running]);
    assert_eq!(script.step(Event::Cancel), []);
    status(&mut script, 0, S::RunningP2p, None);
    assert_eq!(script.sent(), [(0, Phase::Start, S::Running)]);
}
