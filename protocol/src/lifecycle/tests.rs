//! Tests of the device's side of the protocol: readable cases here, random ones in
//! [`properties`].

use super::*;
use crate::migration::path;

mod leases;
mod masters;
mod properties;

const TERM: Term = Term(2);

fn command(epoch: u64, phase: Phase, target: MigrationState) -> Command {
    Command { term: TERM, epoch: Epoch(epoch), phase, target, budget_ns: 1, lease_ns: 0 }
}

fn refusal() -> Refusal {
    Refusal { kind: RefusalKind::Device, text: "as the test wants".into() }
}

fn welcome(orphan: OrphanPolicy) -> Event {
    Event::Welcome { term: TERM, epoch: Epoch(0), orphan }
}

/// A device with every state, welcomed.
fn device() -> Lifecycle {
    device_with(MigrationFlags::ALL)
}

fn device_with(flags: MigrationFlags) -> Lifecycle {
    let mut device = Lifecycle::new(flags);
    assert_eq!(device.step(welcome(OrphanPolicy::Keep)), []);
    device
}

/// Carries out everything that is asked for; all effects in order.
fn carry_out(device: &mut Lifecycle, event: Event) -> Vec<Effect> {
    let mut all = Vec::new();
    let mut next = Some(event);
    while let Some(event) = next.take() {
        let effects = device.step(event);
        next = effects.iter().find_map(done);
        all.extend(effects);
    }
    all
}

/// What says that an effect was carried out, for one that has an answer.
fn done(effect: &Effect) -> Option<Event> {
    match effect {
        Effect::Arc(_) => Some(Event::ArcDone),
        Effect::WriteStream | Effect::ReadStream => Some(Event::StreamDone),
        Effect::Reset => Some(Event::ResetDone),
        _ => None,
    }
}

fn arcs(effects: &[Effect]) -> Vec<MigrationState> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Arc(arc) => Some(arc.to),
            _ => None,
        })
        .collect()
}

fn command_to(device: &mut Lifecycle, epoch: u64, phase: Phase, target: MigrationState) {
    let command = command(epoch, phase, target);
    let effects = carry_out(device, Event::Command(command));
    assert!(effects.contains(&Effect::Reached(command, target)), "{effects:?}");
}

fn client_to(device: &mut Lifecycle, state: MigrationState) {
    let effects = carry_out(device, Event::Client(ClientRequest::SetState(state)));
    assert!(effects.contains(&Effect::ClientAnswer(Ok(state))), "{effects:?}");
}

/// Brings the device to a state by a command of that epoch, whatever the phase is called.
fn bring(device: &mut Lifecycle, epoch: u64, state: MigrationState) {
    let phase = match state.activity() {
        Activity::Full => Phase::Start,
        Activity::NoPeer => Phase::PrepareStop,
        Activity::Stopped => Phase::Stop,
    };
    command_to(device, epoch, phase, state);
}

#[test]
fn a_stop_and_a_start_pass_p2p_and_each_answer_names_its_command() {
    use MigrationState as S;
    let mut device = device();
    for (epoch, phase, target, activity) in [
        (1, Phase::PrepareStop, S::RunningP2p, Activity::NoPeer),
        (1, Phase::Stop, S::Stop, Activity::Stopped),
        (2, Phase::PrepareStart, S::RunningP2p, Activity::NoPeer),
        (2, Phase::Start, S::Running, Activity::Full),
    ] {
        let command = command(epoch, phase, target);
        let effects = carry_out(&mut device, Event::Command(command));
        let [Effect::Begin(begun), Effect::Arc(arc), Effect::Reached(answered, state)] =
            effects[..]
        else {
            panic!("{effects:?}");
        };
        assert_eq!((begun, answered, state), (command, command, target));
        assert_eq!((arc.master, arc.to, arc.after), (Master::Coordinator, target, activity));
        assert_eq!(device.activity(), activity);
    }
}

#[test]
fn a_device_without_a_state_refuses_to_save_and_to_load_and_says_why() {
    use MigrationState as S;
    let mut device = device_with(MigrationFlags::NO_STATE_P2P);
    bring(&mut device, 1, S::Stop);
    for (epoch, phase, target) in [(2, Phase::Save, S::StopCopy), (3, Phase::Load, S::Stop)] {
        let command = command(epoch, phase, target);
        let effects = carry_out(&mut device, Event::Command(command));
        let [Effect::Begin(_), Effect::Refused(refused, S::Stop, refusal)] = &effects[..] else {
            panic!("{effects:?}");
        };
        assert_eq!((*refused, refusal.kind), (command, RefusalKind::Unsupported));
        assert!(refusal.text.contains("neither be saved nor loaded"), "{}", refusal.text);
    }
    bring(&mut device, 4, S::Running);
}

#[test]
fn every_command_walks_the_path_of_the_migration_table_arc_by_arc() {
    for bits in [0, 1, 2, 3, 5, 7] {
        let flags = MigrationFlags::new(bits).expect("a legal set");
        for from in MigrationState::ALL {
            for to in MigrationState::ALL {
                let usable = |state| flags.has(state) && state != MigrationState::Error;
                if !usable(from) || !usable(to) {
                    continue;
                }
                let mut device = device_with(flags);
                bring(&mut device, 1, from);
                let phase = match to.activity() {
                    Activity::Stopped => Phase::Stop,
                    _ if to.activity() < from.activity() => Phase::PrepareStop,
                    _ => Phase::Start,
                };
                let command = command(2, phase, to);
                let effects = carry_out(&mut device, Event::Command(command));
                match path(flags, from, to) {
                    Ok(path) => {
                        assert_eq!(arcs(&effects), path.as_slice(), "{from} to {to}");
                        assert_eq!(effects.last(), Some(&Effect::Reached(command, to)));
                    }
                    Err(_) => assert!(matches!(
                        effects.last(),
                        Some(Effect::Refused(_, at, Refusal { kind: RefusalKind::NoWay, .. }))
                            if *at == from
                    )),
                }
            }
        }
    }
}

#[test]
fn a_phase_with_a_target_that_does_not_fit_it_is_refused() {
    use MigrationState as S;
    for (at, phase, target) in [
        (S::Running, Phase::PrepareStop, S::Running),
        (S::RunningP2p, Phase::PrepareStop, S::Running),
        (S::Running, Phase::Stop, S::Running),
        (S::Running, Phase::Stop, S::RunningP2p),
        (S::Running, Phase::PrepareStart, S::RunningP2p),
        (S::Running, Phase::Start, S::Stop),
        (S::RunningP2p, Phase::Start, S::Stop),
        (S::Running, Phase::Save, S::Running),
        (S::StopCopy, Phase::Save, S::PreCopy),
    ] {
        let mut device = device();
        bring(&mut device, 1, at);
        let command = command(2, phase, target);
        let effects = carry_out(&mut device, Event::Command(command));
        let refused = matches!(
            effects[..],
            [Effect::Begin(_), Effect::Refused(_, state, Refusal { kind: RefusalKind::NoWay, .. })]
                if state == at
        );
        assert!(refused, "{phase} to {target} in {at}: {effects:?}");
    }
}

#[test]
fn one_that_is_stopped_already_answers_a_prepare_stop_and_opens_nothing() {
    use MigrationState as S;
    for at in [S::Stop, S::StopCopy, S::Resuming] {
        let mut device = device();
        bring(&mut device, 1, at);
        let command = command(2, Phase::PrepareStop, S::RunningP2p);
        let effects = carry_out(&mut device, Event::Command(command));
        assert_eq!(effects, [Effect::Begin(command), Effect::Reached(command, at)]);
    }
}

#[test]
fn a_later_epoch_overtakes_at_the_end_of_the_arc_and_the_earlier_command_is_not_answered() {
    use MigrationState as S;
    let mut device = device();
    let stop = command(1, Phase::Stop, S::Stop);
    let start = command(2, Phase::Start, S::Running);
    device.step(Event::Command(stop));
    assert_eq!(device.step(Event::Command(start)), [Effect::Hurry]);
    assert_eq!(device.state(), S::Running, "the arc is not over");
    let effects = device.step(Event::ArcDone);
    assert!(matches!(effects[..], [Effect::Begin(begun), Effect::Arc(_)] if begun == start));
    assert_eq!(device.state(), S::RunningP2p);
    assert_eq!(device.step(Event::ArcDone), [Effect::Reached(start, S::Running)]);
}

#[test]
fn an_abort_ends_the_command_at_the_end_of_the_arc_without_an_answer() {
    use MigrationState as S;
    let mut device = device();
    device.step(Event::Command(command(4, Phase::Stop, S::Stop)));
    let abort = Event::Abort(Abort { term: TERM, epoch: Epoch(4) });
    assert_eq!(device.step(abort), [Effect::Hurry]);
    assert_eq!(device.step(Event::ArcDone), []);
    assert_eq!((device.state(), device.is_busy()), (S::RunningP2p, false));
    // One that has answered its first phase is not told the second either.
    command_to(&mut device, 5, Phase::PrepareStop, S::RunningP2p);
    device.step(Event::Abort(Abort { term: TERM, epoch: Epoch(5) }));
    let second = Event::Command(command(5, Phase::Stop, S::Stop));
    assert_eq!(device.step(second), [Effect::Dropped(Stale::Epoch)]);
    // The same epoch is over for ever, and so is an epoch that was given up unheard.
    device.step(Event::Abort(Abort { term: TERM, epoch: Epoch(6) }));
    for epoch in [4, 5, 6] {
        let late = Event::Command(command(epoch, Phase::Stop, S::Stop));
        assert_eq!(device.step(late), [Effect::Dropped(Stale::Epoch)]);
    }
    command_to(&mut device, 7, Phase::Start, S::Running);
}

#[test]
fn a_second_phase_is_taken_once_and_only_after_its_first() {
    use MigrationState as S;
    let dropped = [Effect::Dropped(Stale::Epoch)];
    let mut device = device();
    let first = command(1, Phase::PrepareStop, S::RunningP2p);
    let second = command(1, Phase::Stop, S::Stop);
    device.step(Event::Command(first));
    assert_eq!(device.step(Event::Command(second)), dropped, "before the first was answered");
    device.step(Event::ArcDone);
    assert_eq!(device.step(Event::Command(first)), dropped, "a duplicate");
    let other = command(1, Phase::Start, S::Running);
    assert_eq!(device.step(Event::Command(other)), dropped, "the second phase of something else");
    command_to(&mut device, 1, Phase::Stop, S::Stop);
    assert_eq!(device.step(Event::Command(second)), dropped, "a duplicate");
    assert_eq!(device.step(Event::Command(first)), dropped, "out of order");
}

#[test]
fn a_second_phase_waits_for_what_the_client_began_in_between() {
    use MigrationState as S;
    let mut device = device();
    command_to(&mut device, 1, Phase::PrepareStop, S::RunningP2p);
    assert_eq!(device.step(Event::Client(ClientRequest::Reset)), [Effect::Reset]);
    let stop = command(1, Phase::Stop, S::Stop);
    assert_eq!(device.step(Event::Command(stop)), []);
    let effects = carry_out(&mut device, Event::ResetDone);
    assert_eq!(effects.first(), Some(&Effect::ClientAnswer(Ok(S::Running))));
    assert_eq!(effects.last(), Some(&Effect::Reached(stop, S::Stop)));
}

#[test]
fn before_the_first_welcome_every_coordinator_is_a_stranger() {
    let mut device = Lifecycle::new(MigrationFlags::ALL);
    let (term, epoch) = (Term(0), Epoch(1));
    let stop = Command { term, ..command(1, Phase::Stop, MigrationState::Stop) };
    for event in [
        Event::Command(stop),
        Event::Abort(Abort { term, epoch }),
        Event::Query(Query { term, epoch }),
    ] {
        assert_eq!(device.step(event), [Effect::Dropped(Stale::Term)]);
    }
}

#[test]
fn a_query_is_answered_in_the_middle_of_a_command_and_speaks_of_the_coordinators_side() {
    use MigrationState as S;
    let status = |device: &mut Lifecycle| {
        let effects = device.step(Event::Query(Query { term: TERM, epoch: Epoch(9) }));
        let [Effect::Status(status)] = effects[..] else { panic!("{effects:?}") };
        assert_eq!((status.term, status.epoch), (TERM, Epoch(9)));
        (status.state, status.client_state, status.moving_to)
    };
    let mut device = device();
    assert_eq!(status(&mut device), (S::Running, S::Running, None));
    device.step(Event::Client(ClientRequest::SetState(S::Stop)));
    assert_eq!(status(&mut device), (S::Running, S::Running, None));
    let stop = command(1, Phase::Stop, S::StopCopy);
    device.step(Event::Command(stop));
    assert_eq!(status(&mut device), (S::Running, S::Running, Some(S::StopCopy)), "it waits");
    device.step(Event::ArcDone);
    device.step(Event::ArcDone);
    assert_eq!(status(&mut device), (S::Running, S::Stop, Some(S::StopCopy)), "it walks");
    carry_out(&mut device, Event::ArcDone);
    assert_eq!(status(&mut device), (S::StopCopy, S::Stop, None));
}

#[test]
fn a_load_passes_resuming_and_ends_in_stop() {
    use MigrationState as S;
    let mut device = device();
    let load = command(1, Phase::Load, S::Stop);
    let effects = carry_out(&mut device, Event::Command(load));
    assert_eq!(arcs(&effects), [S::RunningP2p, S::Stop, S::Resuming, S::Stop]);
    let stream = effects.iter().position(|effect| *effect == Effect::ReadStream);
    assert_eq!(stream, Some(4), "{effects:?}");
    assert_eq!(effects.last(), Some(&Effect::Reached(load, S::Stop)));
}

#[test]
fn a_load_that_fails_or_is_given_up_leaves_error_and_a_reset_leads_to_stop() {
    use MigrationState as S;
    let load = command(1, Phase::Load, S::Stop);
    let abort = Event::Abort(Abort { term: TERM, epoch: Epoch(1) });
    for (given_up, ended) in [
        (false, Event::StreamFailed(refusal())),
        (true, Event::StreamFailed(refusal())),
        (true, Event::StreamDone),
    ] {
        let mut device = device();
        device.step(Event::Command(load));
        for _ in 0..3 {
            device.step(Event::ArcDone);
        }
        if given_up {
            assert_eq!(device.step(abort.clone()), [Effect::Hurry]);
        }
        let effects = device.step(ended);
        assert_eq!(effects.is_empty(), given_up);
        assert_eq!((device.state(), device.client_state()), (S::Error, S::Error));
        let start = command(2, Phase::Start, S::Running);
        let effects = carry_out(&mut device, Event::Command(start));
        assert!(matches!(effects[..], [_, Effect::Refused(_, S::Error, _)]), "{effects:?}");
        let reset = command(3, Phase::Reset, S::Error);
        let effects = carry_out(&mut device, Event::Command(reset));
        assert_eq!(effects.last(), Some(&Effect::Reached(reset, S::Stop)));
        command_to(&mut device, 4, Phase::Start, S::Running);
    }
}

#[test]
fn an_arc_that_fails_is_refused_where_the_device_then_is() {
    use MigrationState as S;
    for (restored, at) in [(true, S::RunningP2p), (false, S::Error)] {
        let mut device = device();
        let stop = command(1, Phase::Stop, S::Stop);
        device.step(Event::Command(stop));
        device.step(Event::ArcDone);
        let effects = device.step(Event::ArcFailed { refusal: refusal(), restored });
        assert_eq!(effects, [Effect::Refused(stop, at, refusal())]);
        assert_eq!((device.state(), device.is_busy()), (at, false));
    }
}

#[test]
fn a_device_without_its_coordinator_follows_its_orphan_policy() {
    for (orphan, effects) in [
        (OrphanPolicy::Keep, vec![]),
        (OrphanPolicy::Exit, vec![Effect::Exit(ExitReason::Orphaned)]),
    ] {
        let mut device = Lifecycle::new(MigrationFlags::ALL);
        device.step(welcome(orphan));
        command_to(&mut device, 1, Phase::PrepareStop, MigrationState::RunningP2p);
        assert_eq!(device.step(Event::Disconnected), effects);
        assert_eq!(device.state(), MigrationState::RunningP2p);
    }
}

#[test]
fn a_kept_device_stays_in_exactly_the_state_that_it_reached() {
    use MigrationState as S;
    let mut device = device();
    device.step(Event::Command(command(1, Phase::Stop, S::Stop)));
    device.step(Event::Command(command(2, Phase::Stop, S::StopCopy)));
    assert_eq!(device.step(Event::Disconnected), [], "overtaken already");
    assert_eq!(device.step(Event::ArcDone), [], "the arc is finished, nothing more is begun");
    assert_eq!((device.state(), device.is_busy()), (S::RunningP2p, false));

    device.step(Event::Command(command(3, Phase::Start, S::Running)));
    assert_eq!(device.step(Event::Disconnected), [Effect::Hurry]);
    device.step(Event::ArcDone);
    assert_eq!(device.state(), S::Running);

    // What the client asked for is the client's.
    let stop = Event::Client(ClientRequest::SetState(S::Stop));
    device.step(stop);
    assert_eq!(device.step(Event::Disconnected), []);
    carry_out(&mut device, Event::ArcDone);
    assert_eq!(device.client_state(), S::Stop);
}

#[test]
fn only_the_present_coordinator_ends_the_process() {
    let mut device = device();
    for term in [0, 1, 3] {
        let effects = device.step(Event::Shutdown(Term(term)));
        assert_eq!(effects, [Effect::Dropped(Stale::Term)]);
    }
    assert_eq!(device.step(Event::Shutdown(TERM)), [Effect::Exit(ExitReason::Shutdown)]);
}

#[test]
fn a_new_coordinator_overtakes_what_the_old_one_asked_for() {
    use MigrationState as S;
    let mut device = device();
    device.step(Event::Command(command(5, Phase::Stop, S::Stop)));
    let (term, orphan) = (Term(3), OrphanPolicy::Keep);
    let effects = device.step(Event::Welcome { term, epoch: Epoch(0), orphan });
    assert_eq!(effects, [Effect::Hurry]);
    assert_eq!(device.step(Event::ArcDone), [], "nobody is there to be answered");
    assert_eq!((device.state(), device.term(), device.epoch()), (S::RunningP2p, term, Epoch(0)));
    let old = Event::Command(command(6, Phase::Stop, S::Stop));
    assert_eq!(device.step(old), [Effect::Dropped(Stale::Term)]);
    let again = Event::Welcome { term, epoch: Epoch(0), orphan };
    assert_eq!(device.step(again), [Effect::Dropped(Stale::Term)]);
}
