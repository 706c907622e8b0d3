//! Lost devices are restarted, and brought to the machine's state before they count.

use crate::fixture::{LONG, SHORT, builder, deadlines, fenced, honest, report_of, start};
use crate::supervised::{
    SOON, assert_nothing_left, assert_whole_and_end, device, events_until, kinds, restarted,
    signal, until_joined,
};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use standstill_coordinator::error::{MachineError, StartError};
use standstill_coordinator::process::Exit;
use standstill_coordinator::{
    Deadlines, DeviceSpec, DeviceStanding, LossPolicy, MachineEvent, QEMU_VFIO_USER, RestartPolicy,
};
use standstill_protocol::message::{FileIdentity, Phase};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{Loss, MachineState};
use standstill_testkit::{Gate, Script, Step, Trace, Trigger, What, within};
use std::time::Duration;

const MEMORY: FileIdentity = FileIdentity { device: 7, inode: 4711 };

#[tokio::test]
async fn on_a_running_machine_it_runs_again_and_counts() {
    let trace = Trace::new().unwrap();
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(restarted(Script::honest(), "d1", &trace))
            .device(honest("d2", &trace)),
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "d1", Signal::KILL).await;
    let (seen, incarnation) = until_joined(&mut events, "d1").await;
    assert_eq!(incarnation, 2);
    let mut order = kinds(&seen, "d1");
    // Channel and process end at the same time; either may be seen first.
    order[..2].sort_unstable();
    assert_eq!(order, ["exited", "lost", "fenced", "restarting", "joined"], "{seen:?}");
    for event in &seen {
        match event {
            MachineEvent::DeviceLost { incarnation, loss, during, .. } => {
                assert_eq!((*incarnation, *during), (1, None));
                assert!(matches!(loss, Loss::Exited | Loss::Disconnected), "{loss:?}");
            }
            MachineEvent::DeviceExited { exit, .. } | MachineEvent::DeviceFenced { exit, .. } => {
                assert_eq!(*exit, Exit::Signal { signal: 9, core_dumped: false });
            }
            MachineEvent::DeviceRestarting { attempt, after, .. } => {
                assert_eq!((*attempt, *after), (1, SOON.first_backoff));
            }
            MachineEvent::DeviceJoined { state, .. } => assert_eq!(*state, MigrationState::Running),
            other => panic!("{other:?}"),
        }
    }
    // It was stopped and started alone.
    assert_eq!(trace.received(Phase::Stop).len(), 1, "{}", trace.text());
    assert_eq!(trace.received(Phase::Start).len(), 1, "{}", trace.text());
    let status = device(&machine, "d1").await;
    assert_eq!((status.incarnation, status.state), (2, Some(MigrationState::Running)));
    assert_whole_and_end(&machine, &trace, 3).await;
}

#[tokio::test]
async fn on_a_stopped_machine_it_stays_in_stop() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace)).device(restarted(
        Script::honest(),
        "d1",
        &trace,
    )))
    .await;
    machine.pause().await.unwrap().leave_stopped();
    let mut events = machine.events();
    signal(&machine, "d1", Signal::TERM).await;
    let (_, incarnation) = until_joined(&mut events, "d1").await;
    assert_eq!(incarnation, 2);
    assert_eq!(device(&machine, "d1").await.state, Some(MigrationState::Stop));
    assert!(trace.received(Phase::Start).is_empty(), "{}", trace.text());
    let report = within(LONG, "resume", machine.resume()).await.unwrap();
    assert_eq!((report.outcome.name(), report.participants.len()), ("Done", 2), "{report}");
    assert_whole_and_end(&machine, &trace, 2).await;
}

/// The transition is undone first; only then the device comes again.
#[tokio::test]
async fn never_in_the_middle_of_a_transition() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on_nth(Phase::PrepareStop, 1, [Step::hold(&gate), Step::Ack]);
    let dies = Script::honest().on_in(1, Phase::PrepareStop, [Step::Exit(3)]);
    let keeps_order = Script::honest().on_nth(Phase::Start, 1, [Step::hold(&gate), Step::Ack]);
    let machine = start(
        builder()
            .device(slow.device("slow", &trace).unwrap())
            .device(keeps_order.device("d1", &trace).unwrap())
            .device(restarted(dies, "dies", &trace)),
    )
    .await;
    let mut events = machine.events();
    let pause = tokio::spawn({
        let machine = machine.clone();
        async move { machine.pause().await.map(drop) }
    });
    let fenced_it = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
    let seen = events_until(&mut events, "the fence", fenced_it).await;
    let in_pause = seen.iter().any(|event| {
        matches!(event, MachineEvent::DeviceLost { during: Some(_), device, .. } if device == "dies")
    });
    assert!(in_pause, "{seen:?}");
    // d1 is still being undone: there is nothing that may begin.
    assert_eq!(device(&machine, "dies").await.standing, DeviceStanding::Fenced);
    gate.open();
    let error = within(LONG, "pause", pause).await.unwrap().unwrap_err();
    assert_eq!(fenced(report_of(&error)), ["dies"], "{error}");
    let (seen, _) = until_joined(&mut events, "dies").await;
    let over = |event: &MachineEvent| matches!(event, MachineEvent::Transition(_));
    let restarts = |event: &MachineEvent| matches!(event, MachineEvent::DeviceRestarting { .. });
    let (over, restarts) = (seen.iter().position(over), seen.iter().position(restarts));
    assert!(over.is_some() && over < restarts, "{seen:?}");
    assert_whole_and_end(&machine, &trace, 3).await;
}

/// The pause goes on without it, and it joins the machine where that is then.
#[tokio::test]
async fn an_optional_device_fails_no_transition_and_comes_again_after_it() {
    let trace = Trace::new().unwrap();
    let dies = Script::honest().on_in(1, Phase::Stop, [Step::Exit(3)]);
    let machine = start(
        builder().device(honest("d0", &trace)).device(restarted(dies, "dies", &trace).optional()),
    )
    .await;
    let mut events = machine.events();
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(fenced(stopped.report()), ["dies"], "{}", stopped.report());
    until_joined(&mut events, "dies").await;
    assert_eq!(device(&machine, "dies").await.state, Some(MigrationState::Stop));
    let report = within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!((report.outcome.name(), report.participants.len()), ("Done", 2), "{report}");
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn a_budget_ends_and_the_owner_decides() {
    let trace = Trace::new().unwrap();
    // The first one goes when it is told to stop, those after it when they are welcomed.
    let dies = (2..9).fold(
        Script::honest().on_in(1, Phase::PrepareStop, [Step::Exit(1)]),
        |script, incarnation| {
            script.on_in(incarnation, Trigger::Welcome, [Step::Say("no!".into()), Step::Exit(2)])
        },
    );
    let policy = RestartPolicy { budget: 2, ..SOON };
    let spec = dies.device("d1", &trace).unwrap().on_loss(LossPolicy::Restart(policy));
    let machine = start(builder().device(honest("d0", &trace)).device(spec)).await;
    let mut events = machine.events();
    within(LONG, "pause", machine.pause()).await.unwrap_err();
    let exhausted =
        |event: &MachineEvent| matches!(event, MachineEvent::DeviceRestartsExhausted { .. });
    let seen = events_until(&mut events, "the budget to end", exhausted).await;
    let restarts = kinds(&seen, "d1").into_iter().filter(|kind| *kind == "restarting").count();
    assert_eq!(restarts, 2, "{seen:?}");
    assert!(
        matches!(seen.last(), Some(MachineEvent::DeviceRestartsExhausted { restarts: 2, .. })),
        "{seen:?}"
    );
    assert_eq!(trace.incarnations("d1"), 3, "{}", trace.text());

    // A pause needs nobody; a resume does.
    within(LONG, "pause", machine.pause()).await.unwrap().leave_stopped();
    let error = within(LONG, "resume", machine.resume()).await.unwrap_err();
    assert!(matches!(&error, MachineError::Missing { device, .. } if device == "d1"), "{error}");
    // Their fourth is no better, and says why.
    let error = within(LONG, "restart", machine.restart_device("d1")).await.unwrap_err();
    let MachineError::NotStarted(error) = error else { panic!("{error}") };
    assert!(error.to_string().contains("no!"), "{error}");
    assert_eq!(machine.status().await.unwrap().machine, MachineState::Stopped);
    events_until(&mut events, "the budget to end again", exhausted).await;
    within(LONG, "removal", machine.remove_device("d1")).await.unwrap();
    within(LONG, "resume", machine.resume()).await.unwrap();
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn the_owner_restarts_a_device_whatever_its_policy_is() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace)).device(honest("d1", &trace))).await;
    let mut events = machine.events();
    let error = within(LONG, "restart", machine.restart_device("d1")).await.unwrap_err();
    assert!(error.to_string().contains("it is not lost"), "{error}");
    let error = within(LONG, "restart", machine.restart_device("d9")).await.unwrap_err();
    assert!(matches!(error, MachineError::NoDevice { .. }), "{error}");
    signal(&machine, "d1", Signal::KILL).await;
    let is_fenced = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
    events_until(&mut events, "the fence", is_fenced).await;
    within(LONG, "restart", machine.restart_device("d1")).await.unwrap();
    assert_eq!(device(&machine, "d1").await.incarnation, 2);
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn restart_is_refused_where_the_client_cannot_reconnect() {
    let trace = Trace::new().unwrap();
    let spec =
        |name| restarted(Script::honest(), name, &trace).client_cannot_reconnect(QEMU_VFIO_USER);
    let error = builder().device(spec("d0")).start().await.unwrap_err();
    assert!(
        matches!(&error, StartError::RestartRefused { device, reason }
            if device == "d0" && reason == QEMU_VFIO_USER),
        "{error}"
    );
    assert!(trace.entries().is_empty(), "something was started");
    let machine = start(builder().device(honest("d0", &trace))).await;
    let error = within(LONG, "add", machine.add_device(spec("d1"))).await.unwrap_err();
    assert!(error.to_string().contains("does not reconnect"), "{error}");
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn peers_lose_their_windows_before_the_next_process_is_started() {
    let trace = Trace::new().unwrap();
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(restarted(Script::honest().memory([MEMORY]), "d1", &trace))
            .device(honest("d2", &trace)),
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "d1", Signal::KILL).await;
    until_joined(&mut events, "d1").await;
    let entries = trace.entries();
    let again =
        |e: &standstill_testkit::Entry| e.who == "d1" && matches!(e.what, What::Began { .. });
    let again = entries.iter().rposition(again).unwrap();
    for peer in ["d0", "d2"] {
        let revoked =
            entries.iter().position(|e| e.who == peer && matches!(e.what, What::Revoked { .. }));
        assert!(revoked.is_some_and(|at| at < again), "{peer}:\n{}", trace.text());
    }
    assert_whole_and_end(&machine, &trace, 3).await;
}

#[tokio::test]
async fn what_a_living_device_has_too_is_not_revoked() {
    let trace = Trace::new().unwrap();
    let claims = Script::honest().memory([MEMORY]);
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(claims.clone().device("owner", &trace).unwrap())
            .device(restarted(claims, "thief", &trace)),
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "thief", Signal::KILL).await;
    until_joined(&mut events, "thief").await;
    let revoked = |e: &standstill_testkit::Entry| matches!(e.what, What::Revoked { .. });
    assert!(!trace.entries().iter().any(revoked), "{}", trace.text());
    assert_whole_and_end(&machine, &trace, 3).await;
}

#[tokio::test]
async fn a_peer_that_does_not_let_go_of_its_windows_is_lost() {
    let trace = Trace::new().unwrap();
    let deaf = Script::honest().on(Trigger::Memory, []);
    let mut short = deadlines();
    short.memory = SHORT;
    let machine = start(
        builder().deadlines(short).device(deaf.device("deaf", &trace).unwrap()).device(restarted(
            Script::honest().memory([MEMORY]),
            "d1",
            &trace,
        )),
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "d1", Signal::KILL).await;
    let (seen, _) = until_joined(&mut events, "d1").await;
    let deaf = seen.iter().find_map(|event| match event {
        MachineEvent::DeviceLost { device, loss, detail, .. } if device == "deaf" => {
            Some((*loss, detail.clone()))
        }
        _ => None,
    });
    let (loss, detail) = deaf.unwrap();
    assert_eq!(loss, Loss::Timeout);
    assert!(detail.contains("windows onto the memory of \"d1\""), "{detail}");
    assert_nothing_left(&machine, &trace).await;
}

#[tokio::test]
async fn a_peer_that_does_not_let_go_is_waited_for_no_longer_than_in_a_first_phase() {
    let trace = Trace::new().unwrap();
    let deaf = Script::honest().on(Trigger::Memory, []).device("deaf", &trace).unwrap();
    let endless = Deadlines { memory: 20 * LONG, ..deadlines() };
    let machine = start(
        builder()
            .deadlines(endless)
            .device(deaf.deadlines(SHORT, LONG))
            .device(Script::honest().memory([MEMORY]).device("d1", &trace).unwrap())
            .device(honest("d2", &trace)),
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "d1", Signal::KILL).await;
    let of = |wanted: &'static str| move |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { device, .. } if device == wanted);
    events_until(&mut events, "the fence of d1", of("d1")).await;
    within(LONG, "removal", machine.remove_device("d1")).await.unwrap();
    let seen = events_until(&mut events, "the fence of deaf", of("deaf")).await;
    let lost = seen.iter().find_map(|event| match event {
        MachineEvent::DeviceLost { device, loss, detail, .. } => Some((device, *loss, detail)),
        _ => None,
    });
    let (device, loss, detail) = lost.unwrap();
    assert_eq!((device.as_str(), loss), ("deaf", Loss::Timeout));
    assert!(detail.contains(&format!("within {SHORT:?}")), "{detail}");
    // The other one has let go, and is there.
    within(LONG, "removal", machine.remove_device("deaf")).await.unwrap();
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn three_that_die_at_once_all_come_back() {
    let trace = Trace::new().unwrap();
    let names = ["d0", "d1", "d2"];
    let script = || Script::honest().memory([MEMORY]);
    let machine = start(
        builder()
            .devices(names.map(|name| restarted(script(), name, &trace)))
            .device(honest("d3", &trace)),
    )
    .await;
    for _ in 0..3 {
        let mut events = machine.events();
        for name in names {
            signal(&machine, name, Signal::KILL).await;
        }
        let mut back = 0;
        while back < names.len() {
            let event = within(LONG, "all to join", events.recv()).await.unwrap();
            back += usize::from(matches!(event, MachineEvent::DeviceJoined { .. }));
        }
    }
    for name in names {
        assert_eq!(device(&machine, name).await.incarnation, 4);
    }
    assert_whole_and_end(&machine, &trace, 4).await;
}

/// What an incarnation has sent, and how it ended, is of no meaning to the next one.
#[tokio::test]
async fn what_comes_late_from_an_earlier_incarnation_changes_nothing() {
    let trace = Trace::new().unwrap();
    let talks = Script::honest().on(Trigger::Memory, [Step::Ack]).on_in(
        1,
        Phase::PrepareStop,
        [Step::Flood(400), Step::Ack, Step::Flood(100), Step::Crash],
    );
    let machine =
        start(builder().device(honest("d0", &trace)).device(restarted(talks, "talks", &trace)))
            .await;
    let mut events = machine.events();
    let _ = within(LONG, "pause", machine.pause()).await;
    let (_, incarnation) = until_joined(&mut events, "talks").await;
    assert_eq!(incarnation, 2);
    if machine.status().await.unwrap().machine == MachineState::Stopped {
        within(LONG, "resume", machine.resume()).await.unwrap();
    }
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn nothing_is_restarted_before_its_fence_is_proven() {
    let trace = Trace::new().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let lock = file.reopen().unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let script = Script::honest().backing_file(file.path());
    let mut short = deadlines();
    short.fence = SHORT;
    let machine = start(
        builder()
            .deadlines(short)
            .device(honest("d0", &trace))
            .device(restarted(script, "d1", &trace)),
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "d1", Signal::KILL).await;
    let unproven = |event: &MachineEvent| matches!(event, MachineEvent::FenceUnproven { .. });
    let seen = events_until(&mut events, "the grace to end", unproven).await;
    assert!(!kinds(&seen, "d1").contains(&"restarting"), "{seen:?}");
    let error = within(LONG, "restart", machine.restart_device("d1")).await.unwrap_err();
    assert!(error.to_string().contains("not proven gone"), "{error}");
    drop(lock);
    let restarts = |event: &MachineEvent| matches!(event, MachineEvent::DeviceRestarting { .. });
    let seen = events_until(&mut events, "the restart", restarts).await;
    assert!(kinds(&seen, "d1").ends_with(&["fenced", "restarting"]), "{seen:?}");
    // The file is not locked any more, so the next process cannot be fenced: it is not taken.
    let failed = |event: &MachineEvent| matches!(event, MachineEvent::DeviceNotRestarted { .. });
    events_until(&mut events, "the attempt to fail", failed).await;
    assert_nothing_left(&machine, &trace).await;
}

#[tokio::test]
async fn an_optional_device_that_does_not_start_is_told_and_not_waited_for() {
    let trace = Trace::new().unwrap();
    let bad = Script::honest().on_in(1, Trigger::Hello, [Step::Exit(1)]);
    let builder = builder()
        .device(honest("d0", &trace))
        .device(bad.clone().device("bad", &trace).unwrap().optional())
        .device(DeviceSpec::new("missing", "/nowhere/at/all").optional())
        .device(restarted(bad, "again", &trace).optional());
    let mut events = builder.events();
    let machine = start(builder).await;
    let (seen, incarnation) = until_joined(&mut events, "again").await;
    assert_eq!(incarnation, 2, "{seen:?}");
    for name in ["bad", "missing"] {
        assert!(kinds(&seen, name).contains(&"not started"), "{name}: {seen:?}");
        assert!(device(&machine, name).await.lost.is_some());
    }
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().participants.len(), 2, "{}", stopped.report());
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_nothing_left(&machine, &trace).await;
}

#[tokio::test]
async fn a_shutdown_in_the_middle_of_it_leaves_nothing() {
    for steps in [vec![], vec![Step::Freeze]] {
        for trigger in [Trigger::Hello, Trigger::Phase(Phase::Stop)] {
            let trace = Trace::new().unwrap();
            let script = Script::honest().on_in(2, trigger, steps.clone());
            let machine = start(builder().device(restarted(script, "d0", &trace))).await;
            signal(&machine, "d0", Signal::KILL).await;
            let twice = |entries: &[standstill_testkit::Entry]| {
                entries.iter().filter(|e| matches!(e.what, What::Began { .. })).count() == 2
            };
            trace.wait_for("the second process", twice).await;
            assert_nothing_left(&machine, &trace).await;
        }
    }
}

/// Devices die and come again all the time, and the machine ends at any moment of that.
#[tokio::test]
async fn a_shutdown_at_any_moment_of_a_restart_leaves_nothing() {
    let soon = Duration::from_millis(1);
    let at_once = RestartPolicy { budget: u32::MAX, longest_backoff: soon, ..SOON };
    let triggers =
        [Trigger::Hello, Trigger::Welcome, Phase::PrepareStop.into(), Phase::Start.into()];
    for round in 0..24 {
        let trace = Trace::new().unwrap();
        let dies = (2..200).fold(Script::honest().memory([MEMORY]), |script, incarnation| {
            script.on_in(incarnation, triggers[round % triggers.len()], [Step::Exit(1)])
        });
        let device =
            |name| dies.clone().device(name, &trace).unwrap().on_loss(LossPolicy::Restart(at_once));
        // One ends late, and the others' restarts are due meanwhile.
        let late = Script::honest()
            .on(Trigger::Shutdown, [Step::Delay(Duration::from_millis(20)), Step::Ack]);
        let late = late.device("late", &trace).unwrap();
        let machine = start(builder().devices(["d0", "d1", "d2"].map(device)).device(late)).await;
        let mut events = machine.events();
        for name in ["d0", "d1", "d2"] {
            signal(&machine, name, Signal::KILL).await;
        }
        for _ in 0..=round * 2 {
            within(LONG, "some events", events.recv()).await.unwrap();
        }
        assert_nothing_left(&machine, &trace).await;
    }
}
