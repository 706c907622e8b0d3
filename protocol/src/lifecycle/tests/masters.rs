//! The coordinator and the client want different things.

use super::*;

#[test]
fn a_device_runs_only_if_both_masters_want_it_to() {
    use MigrationState as S;
    for coordinator in [S::Stop, S::RunningP2p, S::Running, S::PreCopy] {
        for client in [S::Stop, S::RunningP2p, S::Running] {
            let mut device = device();
            client_to(&mut device, client);
            bring(&mut device, 1, coordinator);
            assert_eq!((device.state(), device.client_state()), (coordinator, client));
            let cautious = coordinator.activity().min(client.activity());
            assert_eq!(device.activity(), cautious, "{coordinator} and {client}");
        }
    }
}

#[test]
fn an_arc_of_one_master_changes_nothing_that_the_other_holds_back() {
    use MigrationState as S;
    let mut device = device();
    client_to(&mut device, S::Stop);
    let effects = carry_out(&mut device, Event::Command(command(1, Phase::Stop, S::Stop)));
    for effect in &effects {
        if let Effect::Arc(arc) = effect {
            assert_eq!((arc.before, arc.after), (Activity::Stopped, Activity::Stopped));
        }
    }
    client_to(&mut device, S::Running);
    assert_eq!(device.activity(), Activity::Stopped, "the coordinator still holds it");
}

#[test]
fn one_master_at_a_time_holds_a_state_stream() {
    use MigrationState as S;
    for held in [S::PreCopy, S::PreCopyP2p, S::StopCopy, S::Resuming] {
        for wanted in [S::PreCopy, S::PreCopyP2p, S::StopCopy, S::Resuming] {
            let mut device = device();
            bring(&mut device, 1, held);
            let request = Event::Client(ClientRequest::SetState(wanted));
            let effects = carry_out(&mut device, request);
            let busy = matches!(
                effects.last(),
                Some(Effect::ClientAnswer(Err(Refusal { kind: RefusalKind::Busy, .. })))
            );
            assert!(busy, "{wanted} while the coordinator holds {held}: {effects:?}");
            assert!(!holds_stream(device.client_state()));

            let mut device = device_with(MigrationFlags::ALL);
            client_to(&mut device, held);
            let load = Event::Command(command(1, Phase::Load, S::Stop));
            let effects = carry_out(&mut device, load);
            let busy = matches!(
                effects.last(),
                Some(Effect::Refused(_, _, Refusal { kind: RefusalKind::Busy, .. }))
            );
            assert!(busy, "a load while the client holds {held}: {effects:?}");
        }
    }
}

#[test]
fn error_belongs_to_both_and_its_way_out_to_the_one_who_went_there() {
    use MigrationState as S;
    let reset = Event::Client(ClientRequest::Reset);
    let broken = Event::ArcFailed { refusal: refusal(), restored: false };
    // The client went there: DEVICE_RESET leads out.
    let mut device = device();
    device.step(Event::Client(ClientRequest::SetState(S::RunningP2p)));
    device.step(broken.clone());
    assert_eq!((device.state(), device.client_state()), (S::Error, S::Error));
    assert_eq!(device.activity(), Activity::Stopped);
    let effects = carry_out(&mut device, reset.clone());
    assert_eq!(effects, [Effect::Reset, Effect::ClientAnswer(Ok(S::Running))]);
    assert_eq!((device.state(), device.activity()), (S::Running, Activity::Full));
    // The coordinator did: it does not.
    device.step(Event::Command(command(1, Phase::PrepareStop, S::RunningP2p)));
    device.step(broken);
    assert_eq!((device.state(), device.client_state()), (S::Error, S::Error));
    let effects = carry_out(&mut device, reset);
    assert!(matches!(effects[..], [Effect::ClientAnswer(Err(_))]), "{effects:?}");
    assert_eq!(device.state(), S::Error);
}

#[test]
fn a_client_reset_follows_the_table() {
    use MigrationState as S;
    // Who brought it there, where it is, and where DEVICE_RESET leads; None where it is refused.
    let table = [
        (Master::Client, S::Running, Some(S::Running)),
        (Master::Client, S::RunningP2p, Some(S::RunningP2p)),
        (Master::Client, S::PreCopy, Some(S::PreCopy)),
        (Master::Client, S::PreCopyP2p, Some(S::PreCopyP2p)),
        (Master::Client, S::Resuming, Some(S::Running)),
        (Master::Client, S::Stop, None),
        (Master::Client, S::StopCopy, None),
        (Master::Coordinator, S::RunningP2p, Some(S::RunningP2p)),
        (Master::Coordinator, S::PreCopy, Some(S::PreCopy)),
        (Master::Coordinator, S::PreCopyP2p, Some(S::PreCopyP2p)),
        (Master::Coordinator, S::Stop, None),
        (Master::Coordinator, S::StopCopy, None),
        (Master::Coordinator, S::Resuming, None),
    ];
    for (master, at, after) in table {
        let mut device = device();
        match master {
            Master::Client => client_to(&mut device, at),
            Master::Coordinator => bring(&mut device, 1, at),
        }
        let effects = carry_out(&mut device, Event::Client(ClientRequest::Reset));
        let answered = matches!(effects.last(), Some(Effect::ClientAnswer(Ok(_))));
        assert_eq!(answered, after.is_some(), "{master:?} in {at}: {effects:?}");
        let position = match master {
            Master::Client => device.client_state(),
            Master::Coordinator => device.state(),
        };
        assert_eq!(position, after.unwrap_or(at), "{master:?} in {at}");
    }
}

#[test]
fn a_coordinators_reset_stops_what_was_stopped_and_keeps_what_ran() {
    use MigrationState as S;
    for (at, after) in [
        (S::Running, S::Running),
        (S::RunningP2p, S::RunningP2p),
        (S::Stop, S::Stop),
        (S::StopCopy, S::Stop),
        (S::Resuming, S::Stop),
    ] {
        let mut device = device();
        bring(&mut device, 1, at);
        let reset = command(2, Phase::Reset, at);
        let effects = carry_out(&mut device, Event::Command(reset));
        let all = [Effect::Begin(reset), Effect::Reset, Effect::Reached(reset, after)];
        assert_eq!(effects, all);
    }
}

#[test]
fn a_reset_that_fails_leaves_error() {
    let mut device = device();
    device.step(Event::Client(ClientRequest::Reset));
    let effects = device.step(Event::ResetFailed(refusal()));
    assert_eq!(effects, [Effect::ClientAnswer(Err(refusal()))]);
    assert_eq!(device.state(), MigrationState::Error);
}

#[test]
fn a_client_asks_one_thing_at_a_time_and_the_coordinator_goes_first() {
    use MigrationState as S;
    let mut device = device();
    let stop = command(1, Phase::PrepareStop, S::RunningP2p);
    device.step(Event::Command(stop));
    assert_eq!(device.step(Event::Client(ClientRequest::Reset)), [], "it waits");
    let effects = device.step(Event::Client(ClientRequest::Reset));
    assert!(matches!(
        effects[..],
        [Effect::ClientAnswer(Err(Refusal { kind: RefusalKind::Busy, .. }))]
    ));
    let effects = carry_out(&mut device, Event::ArcDone);
    assert_eq!(
        effects,
        [Effect::Reached(stop, S::RunningP2p), Effect::Reset, Effect::ClientAnswer(Ok(S::Running))]
    );
}
