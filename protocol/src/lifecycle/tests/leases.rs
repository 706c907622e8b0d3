//! A device that is stopped while its machine runs.

use super::*;

const LEASE: u64 = 4_000_000_000;

/// A device that was stopped with a lease, by epoch 1.
fn leased(target: MigrationState) -> Lifecycle {
    let mut device = device();
    let stop = Command { lease_ns: LEASE, ..command(1, Phase::Stop, target) };
    let effects = carry_out(&mut device, Event::Command(stop));
    let end = [Effect::Reached(stop, target), Effect::ArmLease(LEASE, Epoch(1))];
    assert_eq!(effects[effects.len() - 2..], end);
    device
}

fn save(epoch: u64) -> Event {
    Event::Command(command(epoch, Phase::Save, MigrationState::StopCopy))
}

#[test]
fn a_lease_that_runs_out_brings_the_device_back_to_serving() {
    use MigrationState as S;
    for target in [S::Stop, S::StopCopy] {
        let mut device = leased(target);
        let effects = carry_out(&mut device, Event::LeaseExpired(Epoch(1)));
        let last = Effect::Notify(DeviceEvent::LeaseExpired(S::RunningP2p));
        assert_eq!(effects.last(), Some(&last));
        assert_eq!(device.activity(), Activity::NoPeer);
        let again = device.step(Event::LeaseExpired(Epoch(1)));
        assert_eq!(again, [Effect::Dropped(Stale::Epoch)]);
    }
}

#[test]
fn a_lease_of_another_epoch_is_none() {
    let mut device = leased(MigrationState::Stop);
    for epoch in [0, 2] {
        let effects = device.step(Event::LeaseExpired(Epoch(epoch)));
        assert_eq!(effects, [Effect::Dropped(Stale::Epoch)]);
    }
    assert_eq!(device.activity(), Activity::Stopped);
}

#[test]
fn a_device_whose_state_was_handed_over_ends_when_the_lease_does() {
    let mut device = leased(MigrationState::StopCopy);
    carry_out(&mut device, save(2));
    let effects = device.step(Event::LeaseExpired(Epoch(1)));
    assert_eq!(effects, [Effect::Exit(ExitReason::HandedOver)]);
}

#[test]
fn half_a_save_hands_nothing_over() {
    let mut device = leased(MigrationState::StopCopy);
    device.step(save(2));
    device.step(Event::StreamFailed(refusal()));
    let effects = carry_out(&mut device, Event::LeaseExpired(Epoch(1)));
    assert!(matches!(effects.last(), Some(Effect::Notify(DeviceEvent::LeaseExpired(_)))));
}

#[test]
fn a_save_that_is_under_way_is_finished_before_the_lease_counts() {
    let mut device = leased(MigrationState::StopCopy);
    device.step(save(2));
    assert_eq!(device.step(Event::LeaseExpired(Epoch(1))), []);
    let effects = device.step(Event::StreamDone);
    assert!(matches!(effects[..], [Effect::Reached(..), Effect::Exit(ExitReason::HandedOver)]));
}

#[test]
fn a_save_does_not_hold_up_a_lease_that_has_run_out() {
    use MigrationState as S;
    let mut device = leased(S::StopCopy);
    device.step(Event::LeaseExpired(Epoch(1)));
    assert_eq!(device.step(save(2)), [], "it waits");
    let effects = carry_out(&mut device, Event::ArcDone);
    assert!(effects.contains(&Effect::Notify(DeviceEvent::LeaseExpired(S::RunningP2p))));
    assert!(matches!(effects.last(), Some(Effect::Refused(_, S::RunningP2p, _))), "{effects:?}");
}

#[test]
fn any_other_command_ends_the_lease() {
    use MigrationState as S;
    for (phase, target) in
        [(Phase::PrepareStart, S::RunningP2p), (Phase::Stop, S::Stop), (Phase::Reset, S::Stop)]
    {
        let mut device = leased(S::Stop);
        let effects = device.step(Event::Command(command(2, phase, target)));
        assert_eq!(effects.first(), Some(&Effect::DisarmLease), "{phase}");
        let effects = device.step(Event::LeaseExpired(Epoch(1)));
        assert_eq!(effects, [Effect::Dropped(Stale::Epoch)], "{phase}");
    }
}

#[test]
fn what_overtakes_a_lease_that_has_run_out_may_be_given_up_and_it_is_told_all_the_same() {
    use MigrationState as S;
    let mut device = leased(S::Stop);
    device.step(Event::LeaseExpired(Epoch(1)));
    device.step(Event::Command(command(2, Phase::PrepareStop, S::Stop)));
    device.step(Event::Abort(Abort { term: TERM, epoch: Epoch(2) }));
    let told = device.step(Event::ArcDone);
    assert_eq!(told, [Effect::Notify(DeviceEvent::LeaseExpired(S::RunningP2p))]);
    assert_eq!(device.state(), S::RunningP2p);
}

#[test]
fn leaving_stop_copy_makes_a_save_void() {
    use MigrationState as S;
    let mut device = device();
    bring(&mut device, 1, S::StopCopy);
    carry_out(&mut device, save(2));
    bring(&mut device, 3, S::Stop);
    let stop = Command { lease_ns: LEASE, ..command(4, Phase::Stop, S::StopCopy) };
    carry_out(&mut device, Event::Command(stop));
    let effects = carry_out(&mut device, Event::LeaseExpired(Epoch(4)));
    assert!(matches!(effects.last(), Some(Effect::Notify(DeviceEvent::LeaseExpired(_)))));
}

#[test]
fn a_device_without_p2p_states_goes_back_to_running() {
    use MigrationState as S;
    let mut device = device_with(MigrationFlags::STOP_COPY);
    let stop = Command { lease_ns: LEASE, ..command(1, Phase::Stop, S::Stop) };
    carry_out(&mut device, Event::Command(stop));
    carry_out(&mut device, Event::LeaseExpired(Epoch(1)));
    assert_eq!(device.state(), S::Running);
}

#[test]
fn a_lease_survives_the_loss_of_its_coordinator_and_a_take_over() {
    use MigrationState as S;
    let mut device = leased(S::Stop);
    assert_eq!(device.step(Event::Disconnected), []);
    let (term, orphan) = (Term(3), OrphanPolicy::Keep);
    assert_eq!(device.step(Event::Welcome { term, epoch: Epoch(0), orphan }), []);
    let effects = carry_out(&mut device, Event::LeaseExpired(Epoch(1)));
    assert_eq!(effects.last(), Some(&Effect::Notify(DeviceEvent::LeaseExpired(S::RunningP2p))));
}

#[test]
fn the_first_command_of_the_next_coordinator_ends_a_lease() {
    use MigrationState as S;
    let mut device = leased(S::Stop);
    let (term, orphan) = (Term(3), OrphanPolicy::Keep);
    device.step(Event::Welcome { term, epoch: Epoch(0), orphan });
    let stop = Command { term, ..command(1, Phase::Stop, S::Stop) };
    assert_eq!(device.step(Event::Command(stop)).first(), Some(&Effect::DisarmLease));
}

#[test]
fn a_stop_that_is_finished_without_its_coordinator_keeps_its_lease() {
    use MigrationState as S;
    let taken_over = Event::Welcome { term: Term(3), epoch: Epoch(0), orphan: OrphanPolicy::Keep };
    for loss in [Event::Disconnected, taken_over] {
        let mut device = device();
        command_to(&mut device, 1, Phase::PrepareStop, S::RunningP2p);
        let stop = Command { lease_ns: LEASE, ..command(1, Phase::Stop, S::Stop) };
        device.step(Event::Command(stop));
        assert_eq!(device.step(loss.clone()), [Effect::Hurry]);
        assert_eq!(device.step(Event::ArcDone), [Effect::ArmLease(LEASE, Epoch(1))]);
        let effects = carry_out(&mut device, Event::LeaseExpired(Epoch(1)));
        assert_eq!(effects.last(), Some(&Effect::Notify(DeviceEvent::LeaseExpired(S::RunningP2p))));

        // One that was cut off has stopped nothing.
        let mut device = self::device();
        command_to(&mut device, 1, Phase::PrepareStop, S::RunningP2p);
        device.step(Event::Command(stop));
        device.step(loss);
        let failed = Event::ArcFailed { refusal: refusal(), restored: true };
        assert_eq!(device.step(failed), []);
        assert_eq!(device.state(), S::RunningP2p);
    }
}
