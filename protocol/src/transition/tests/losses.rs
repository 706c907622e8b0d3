//! Participants that are lost, fences, local devices, and holds.

use super::*;
use MigrationState as S;

fn degraded(machine: MachineState, number: u32, why: Loss) -> Outcome {
    Outcome::Degraded { machine, fenced: vec![(id(number), why)] }
}

#[test]
fn nothing_is_started_before_the_fence_is_proven() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::Running]));
    script.reach(0);
    script.lose(1);
    assert_eq!(script.sent(), [], "the fence comes first");
    script.fenced(1);
    assert_eq!(script.sent(), [(0, Phase::Start, S::Running)]);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&degraded(MachineState::Running, 1, Loss::Exited)));
}

#[test]
fn the_second_phase_waits_for_a_fence_too() {
    let members = vec![member(0, S::Running), optional(member(1, S::Running))];
    let mut script = Script::begin(plan(Operation::Pause, members));
    script.lose(1);
    script.reach(0);
    assert_eq!(script.sent(), []);
    script.fenced(1);
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop)]);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&degraded(MachineState::Stopped, 1, Loss::Exited)));
}

#[test]
fn an_optional_participant_that_refuses_is_gone_on_without() {
    let members = vec![member(0, S::Running), optional(member(1, S::Running))];
    let mut script = Script::begin(plan(Operation::Pause, members));
    script.refuse(1, S::Running);
    assert!(script.effects.contains(&Effect::Fence(id(1), Loss::Refused)));
    script.fenced(1);
    script.reach_all();
    script.reach_all();
    assert_eq!(script.outcome(), Some(&degraded(MachineState::Stopped, 1, Loss::Refused)));
}

#[test]
fn a_loss_during_an_undo_is_fenced_and_the_undo_goes_on() {
    let mut script = Script::begin(machine(Operation::Resume, &[S::Stop, S::Stop, S::Stop]));
    script.refuse(0, S::Stop);
    script.lose(1);
    script.reach(0);
    script.reach(2);
    assert_eq!(script.outcome(), None);
    script.fenced(1);
    assert_eq!(script.outcome(), Some(&degraded(MachineState::Stopped, 1, Loss::Exited)));
}

#[test]
fn who_is_lost_before_the_beginning_is_told_nothing() {
    for (kind, going_on) in [(OnLoss::Fail, false), (OnLoss::ContinueWithout, true)] {
        let lost = Member { on_loss: kind, ..member(1, S::Running) };
        let mut script = Script::prepare(plan(Operation::Pause, vec![member(0, S::Running), lost]));
        assert_eq!(script.lose(1), []);
        assert_eq!(script.lose(1), []);
        script.step(Event::Begin);
        assert!(script.effects.contains(&Effect::Fence(id(1), Loss::Exited)));
        assert_eq!(script.sent(), []);
        script.fenced(1);
        if going_on {
            assert_eq!(script.sent(), [(0, Phase::PrepareStop, S::RunningP2p)]);
        } else {
            let outcome = degraded(MachineState::Running, 1, Loss::Exited);
            assert_eq!(script.outcome(), Some(&outcome), "nobody had been told anything");
        }
    }
}

#[test]
fn a_fence_that_is_not_proven_holds_the_machine_in_stop() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::Running]));
    script.reach(0);
    script.lose(1);
    script.expire(Timer::Fence(id(1)));
    assert_eq!(script.sent(), [(0, Phase::PrepareStop, S::RunningP2p)]);
    script.reach_all();
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop)]);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::FenceUnproven(id(1))])));
}

#[test]
fn a_proof_that_comes_too_late_is_reported_and_starts_nothing() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::Running]));
    script.lose(1);
    script.expire(Timer::Fence(id(1)));
    assert_eq!(script.fenced(1), []);
    script.reach_all();
    script.reach_all();
    let reasons = vec![HeldReason::FenceUnproven(id(1))];
    let fenced = vec![(id(1), Loss::Exited)];
    assert_eq!(script.outcome(), Some(&Outcome::Held { reasons, fenced }));
}

#[test]
fn a_local_device_that_hangs_cannot_be_fenced_and_holds_the_machine() {
    let members = vec![member(0, S::Running), local(member(1, S::Running))];
    let mut script = Script::begin(plan(Operation::Pause, members));
    script.reach(0);
    script.expire(Timer::Phase(EPOCH, Phase::PrepareStop, FIRST_NS));
    let fences = |effect: &Effect| matches!(effect, Effect::Fence(..));
    assert!(!script.effects.iter().any(fences));
    script.reach_all();
    script.reach_all();
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::LocalHung(id(1))])));
    assert_eq!(script.transition.state(id(0)), Some(S::Stop));
}

#[test]
fn a_local_device_that_refuses_is_undone_even_if_it_is_optional() {
    let members = vec![member(0, S::Running), optional(local(member(1, S::Running)))];
    let mut script = Script::begin(plan(Operation::Pause, members));
    script.reach(0);
    script.refuse(1, S::Running);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::RolledBack));
}

#[test]
fn a_hold_does_not_put_a_local_device_back_that_is_on_its_way_to_stop() {
    let members = vec![member(0, S::Running), local(member(1, S::Running))];
    let mut script = Script::begin(Plan { hooks: Vec::new(), ..plan(Operation::Pause, members) });
    script.reach_all();
    script.lose(0);
    // The undo's stop is on its way to the local device when the fence fails.
    script.expire(Timer::Fence(id(0)));
    assert_eq!(script.sent(), [(1, Phase::PrepareStop, S::Stop)]);
}

#[test]
fn a_hold_asks_for_p2p_first_where_a_stopped_participant_may_be_starting() {
    let mut script = Script::begin(machine(Operation::Resume, &[S::Stop, S::Stop]));
    script.lose(0);
    script.expire(Timer::Fence(id(0)));
    // Participant 1 was told PrepareStart and has not answered: it may have gone there.
    assert_eq!(script.sent(), [(1, Phase::PrepareStop, S::RunningP2p)]);
}

#[test]
fn a_hold_leaves_a_participant_alone_that_is_as_quiet_as_can_be() {
    let states = [S::Running, S::Running, S::Running];
    let mut script = Script::begin(machine(Operation::Pause, &states));
    script.refuse(1, S::Error);
    script.lose(0);
    script.expire(Timer::Fence(id(0)));
    assert!(script.effects.contains(&Effect::Disarm(Timer::Undo)));
    assert_eq!(script.sent(), [(2, Phase::PrepareStop, S::RunningP2p)], "1 is in ERROR");
    script.reach_all();
    script.refuse(1, S::Error);
    script.reach(2);
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::FenceUnproven(id(0))])));
    assert_eq!(script.transition.state(id(1)), Some(S::Error));
}

#[test]
fn a_hold_ends_at_its_deadline_whoever_is_silent() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running, S::Running]));
    script.lose(0);
    script.expire(Timer::Fence(id(0)));
    script.expire(Timer::Hold);
    assert!(script.effects.contains(&Effect::Fence(id(1), Loss::Timeout)));
    let reasons = [0, 1].map(|number| HeldReason::FenceUnproven(id(number)));
    assert_eq!(script.outcome(), Some(&held(&reasons)));
}

/// When all proofs have come, somebody still runs.
#[test]
fn a_hold_that_runs_out_of_its_time_says_so_if_anybody_is_not_stopped() {
    let unproven = [2, 1].map(|number| HeldReason::FenceUnproven(id(number)));
    for (stopped, reasons) in [
        (false, [unproven.as_slice(), &[HeldReason::UndoExpired]].concat()),
        (true, unproven.into()),
    ] {
        let mut script = Script::begin(machine(Operation::Pause, &[S::Running; 3]));
        script.lose(2);
        script.expire(Timer::Fence(id(2)));
        if stopped {
            script.reach_all();
        }
        script.reach(0);
        script.expire(Timer::Hold);
        assert_eq!(script.outcome(), Some(&held(&reasons)));
    }
}
