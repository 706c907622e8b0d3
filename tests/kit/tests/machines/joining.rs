//! A new process of a device on its way in: it may be late, slow, die, or come at a bad time.

use crate::fixture::{LONG, SHORT, builder, deadlines, honest, start};
use crate::supervised::{
    SOON, assert_nothing_left, assert_whole_and_end, device, events_until, restarted, signal,
    until_joined,
};
use rustix::process::Signal;
use standstill_coordinator::error::{GreetingError, MachineError, StartError};
use standstill_coordinator::{
    DeviceStanding, HookSpec, LossPolicy, MachineEvent, RestartPolicy, Slot,
};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Call, Gate, Script, Step, Trace, TracedHook, Trigger, What, within};
use std::time::Duration;

#[tokio::test]
async fn a_restarted_device_that_does_not_greet_is_tried_again() {
    let trace = Trace::new().unwrap();
    let mut short = deadlines();
    short.hello = Duration::from_secs(3);
    let shy = Script::honest()
        .on_in(2, Trigger::Hello, [])
        .on_in(3, Trigger::Hello, [Step::Freeze])
        .on_in(4, Trigger::Hello, [Step::Say("out of luck".into()), Step::Exit(7)]);
    let machine = start(builder().deadlines(short).device(restarted(shy, "shy", &trace))).await;
    let mut events = machine.events();
    signal(&machine, "shy", Signal::KILL).await;
    let (seen, incarnation) = until_joined(&mut events, "shy").await;
    assert_eq!(incarnation, 5, "{seen:?}");
    let why: Vec<_> = seen
        .iter()
        .filter_map(|event| match event {
            MachineEvent::DeviceNotRestarted { why, .. } => Some(why.as_str()),
            _ => None,
        })
        .collect();
    let says = ["did not say Hello", "did not say Hello", "exited with status 7"];
    assert!(why.len() == 3 && std::iter::zip(&why, says).all(|(w, s)| w.contains(s)), "{why:?}");
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn a_device_that_dies_on_its_way_in_is_tried_again() {
    let trace = Trace::new().unwrap();
    let dies = Script::honest()
        .on_in(2, Phase::PrepareStop, [Step::Crash])
        .on_in(3, Phase::Stop, [Step::Disconnect])
        .on_in(4, Trigger::Memory, [Step::Exit(1)])
        .on_in(5, Phase::Start, [Step::Refuse("not today".into())]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(restarted(dies, "dies", &trace))).await;
    machine.declare_ram(tempfile::tempfile().unwrap()).await.unwrap();
    let mut events = machine.events();
    signal(&machine, "dies", Signal::KILL).await;
    let (seen, incarnation) = until_joined(&mut events, "dies").await;
    assert_eq!(incarnation, 6, "{seen:?}");
    // Nobody else was told anything of all that.
    let others = |phase| trace.received(phase).iter().filter(|e| e.who == "d0").count();
    assert_eq!(others(Phase::PrepareStop) + others(Phase::PrepareStart), 0, "{}", trace.text());
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn all_ram_is_declared_to_the_next_process() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(restarted(Script::honest(), "d0", &trace))).await;
    // More than one message has room for.
    let files: Vec<_> = (0..20).map(|_| tempfile::tempfile().unwrap()).collect();
    for file in &files {
        within(LONG, "declare_ram", machine.declare_ram(file)).await.unwrap();
    }
    // The same again is no more.
    within(LONG, "declare_ram", machine.declare_ram(&files[0])).await.unwrap();
    let mut events = machine.events();
    signal(&machine, "d0", Signal::KILL).await;
    until_joined(&mut events, "d0").await;
    let entries = trace.entries();
    let again = entries.iter().rposition(|e| matches!(e.what, What::Began { .. })).unwrap();
    let stop = entries[again..]
        .iter()
        .position(|e| matches!(e.what, What::Reached { phase: Phase::Stop, .. }))
        .unwrap();
    let memory: Vec<_> = (again..entries.len())
        .filter(|&at| matches!(entries[at].what, What::Memory { .. }))
        .collect();
    assert_eq!(memory.len(), 2, "{}", trace.text());
    assert!(memory.iter().all(|&at| at > again + stop), "{}", trace.text());
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn a_pause_that_comes_while_a_device_joins_waits_and_is_not_refused() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on_in(2, Phase::PrepareStop, [Step::hold(&gate), Step::Ack]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(restarted(slow, "slow", &trace))).await;
    let mut events = machine.events();
    signal(&machine, "slow", Signal::KILL).await;
    let told = |entries: &[standstill_testkit::Entry]| {
        entries.iter().any(|e| matches!(e.what, What::Received { .. }))
    };
    trace.wait_for("the newcomer to be told to stop", told).await;
    let pause = tokio::spawn({
        let machine = machine.clone();
        async move { machine.pause().await }
    });
    // Answered after the pause was asked for, and it has not begun.
    let status = machine.status().await.unwrap();
    assert_eq!(status.devices[1].standing, DeviceStanding::Joining, "{status:?}");
    assert!(trace.received(Phase::PrepareStop).iter().all(|e| e.who == "slow"));
    gate.open();
    let stopped = within(LONG, "pause", pause).await.unwrap().unwrap();
    until_joined(&mut events, "slow").await;
    assert_eq!(device(&machine, "slow").await.state, Some(MigrationState::Stop));
    let report = within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(report.participants.len(), 2, "{report}");
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn a_pause_that_waits_can_be_cancelled() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on(Phase::PrepareStop, [Step::hold(&gate), Step::Ack]);
    let machine = start(builder().device(honest("d0", &trace))).await;
    let call = |adds: bool| {
        let (machine, spec) = (machine.clone(), slow.clone().device("slow", &trace).unwrap());
        tokio::spawn(async move {
            match adds {
                true => machine.add_device(spec).await,
                false => machine.pause().await.map(drop),
            }
        })
    };
    let add = call(true);
    let told = |entries: &[standstill_testkit::Entry]| {
        entries.iter().any(|e| matches!(e.what, What::Received { .. }))
    };
    trace.wait_for("the newcomer to be told to stop", told).await;
    let pause = call(false);
    // Whichever of the two is there first: the pause is cancelled, or has still to be.
    while !pause.is_finished() {
        machine.cancel().await.unwrap();
        tokio::task::yield_now().await;
    }
    let error = within(LONG, "pause", pause).await.unwrap().unwrap_err();
    assert!(matches!(error, MachineError::Cancelled { .. }), "{error}");
    gate.open();
    within(LONG, "add", add).await.unwrap().unwrap();
    assert_whole_and_end(&machine, &trace, 2).await;
}

/// Its process is started, and says Hello in the middle of a pause: it gets its Welcome after it.
#[tokio::test]
async fn a_device_that_greets_during_a_transition_is_welcomed_after_it() {
    let trace = Trace::new().unwrap();
    let (greets, stops) = (Gate::closed().unwrap(), Gate::closed().unwrap());
    let late = Script::honest().on_in(2, Trigger::Hello, [Step::hold(&greets), Step::Ack]);
    let slow = Script::honest().on(Phase::Stop, [Step::hold(&stops), Step::Ack]);
    let machine = start(
        builder()
            .device(slow.device("slow", &trace).unwrap())
            .device(restarted(late, "late", &trace)),
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "late", Signal::KILL).await;
    let twice = |entries: &[standstill_testkit::Entry]| {
        let began = |e: &&standstill_testkit::Entry| {
            e.who == "late" && matches!(e.what, What::Began { .. })
        };
        entries.iter().filter(began).count() == 2
    };
    trace.wait_for("the second process", twice).await;
    let pause = tokio::spawn({
        let machine = machine.clone();
        async move { machine.pause().await }
    });
    let told = |entries: &[standstill_testkit::Entry]| {
        let stop = |e: &standstill_testkit::Entry| {
            matches!(e.what, What::Received { phase: Phase::Stop, .. })
        };
        entries.iter().any(stop)
    };
    trace.wait_for("the second phase", told).await;
    greets.open();
    for _ in 0..50 {
        let standing = machine.status().await.unwrap().devices[1].standing;
        assert_eq!(standing, DeviceStanding::Starting);
        tokio::task::yield_now().await;
    }
    stops.open();
    let stopped = within(LONG, "pause", pause).await.unwrap().unwrap();
    assert_eq!(stopped.report().participants.len(), 1, "{}", stopped.report());
    until_joined(&mut events, "late").await;
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_whole_and_end(&machine, &trace, 2).await;
}

/// It was made to wait for its Welcome and would not: that is no failure of its own.
#[tokio::test]
async fn a_device_that_does_not_wait_for_its_welcome_is_not_charged_for_it() {
    let trace = Trace::new().unwrap();
    let (greets, stops) = (Gate::closed().unwrap(), Gate::closed().unwrap());
    let gives_up =
        Script::honest().on_in(2, Trigger::Hello, [Step::hold(&greets), Step::Ack, Step::Exit(0)]);
    let once = RestartPolicy { budget: 1, ..SOON };
    let gives_up = gives_up.device("gives up", &trace).unwrap().on_loss(LossPolicy::Restart(once));
    let slow = Script::honest().on(Phase::Stop, [Step::hold(&stops), Step::Ack]);
    let machine =
        start(builder().device(slow.device("slow", &trace).unwrap()).device(gives_up)).await;
    let mut events = machine.events();
    signal(&machine, "gives up", Signal::KILL).await;
    let twice = |entries: &[standstill_testkit::Entry]| {
        entries.iter().filter(|e| matches!(e.what, What::Began { .. })).count() == 3
    };
    trace.wait_for("the second process", twice).await;
    let pause = tokio::spawn({
        let machine = machine.clone();
        async move { machine.pause().await }
    });
    let told = |entries: &[standstill_testkit::Entry]| {
        let stop = |e: &standstill_testkit::Entry| {
            matches!(e.what, What::Received { phase: Phase::Stop, .. })
        };
        entries.iter().any(stop)
    };
    trace.wait_for("the second phase", told).await;
    greets.open();
    let gone =
        |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { incarnation: 2, .. });
    let seen = events_until(&mut events, "it to give up", gone).await;
    assert!(!seen.iter().any(|e| matches!(e, MachineEvent::Transition(_))), "{seen:?}");
    stops.open();
    let stopped = within(LONG, "pause", pause).await.unwrap().unwrap();
    let (seen, incarnation) = until_joined(&mut events, "gives up").await;
    assert_eq!(incarnation, 3, "{seen:?}");
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn a_device_joins_a_held_machine_in_stop_and_the_machine_stays_held() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let key = gate.key();
    let hook = TracedHook::new("vcpus", &trace).unwrap().doing(move |call| match call {
        Call::Stop => Ok(key.wait()?),
        Call::Start => Ok(()),
    });
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(restarted(Script::honest(), "d1", &trace))
            .hook(HookSpec::new("vcpus", Slot::After).deadline(SHORT), hook),
    )
    .await;
    within(LONG, "pause", machine.pause()).await.unwrap_err();
    let mut events = machine.events();
    signal(&machine, "d1", Signal::KILL).await;
    until_joined(&mut events, "d1").await;
    let status = machine.status().await.unwrap();
    assert_eq!(status.machine, MachineState::Held);
    assert_eq!(status.devices[1].state, Some(MigrationState::Stop));
    gate.open();
    let ended = |event: &MachineEvent| matches!(event, MachineEvent::HoldEnded { .. });
    events_until(&mut events, "the hold to end", ended).await;
    within(LONG, "resume", machine.resume()).await.unwrap();
    assert_nothing_left(&machine, &trace).await;
}

#[tokio::test]
async fn a_device_that_does_not_fit_in_is_given_up() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace)).device(restarted(
        Script::honest(),
        "d1",
        &trace,
    )))
    .await;
    // A device without P2P states cannot have peers.
    let spec = Script::honest().without_p2p().device("d2", &trace).unwrap();
    let error = within(LONG, "add", machine.add_device(spec)).await.unwrap_err();
    let MachineError::NotStarted(error) = error else { panic!("{error}") };
    assert!(matches!(&*error, StartError::Plan { device, .. } if device == "d2"), "{error}");
    let version = Script::honest().versions(7, 9).device("d3", &trace).unwrap();
    let error = within(LONG, "add", machine.add_device(version)).await.unwrap_err();
    let MachineError::NotStarted(error) = error else { panic!("{error}") };
    assert!(
        matches!(&*error, StartError::Greeting { source: GreetingError::Version { .. }, .. }),
        "{error}"
    );
    assert_whole_and_end(&machine, &trace, 2).await;
}
