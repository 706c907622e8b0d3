//! Devices are added to a machine and removed from it, wherever it is.

use crate::fixture::{LONG, SHORT, assert_machine, builder, deadlines, honest, report_of, start};
use crate::supervised::{
    assert_nothing_left, assert_whole_and_end, device, events_until, kinds, signal, until_joined,
};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use standstill_coordinator::error::{GreetingError, MachineError, StartError};
use standstill_coordinator::process::Exit;
use standstill_coordinator::{Deadlines, DeviceStanding, HookSpec, Machine, MachineEvent, Slot};
use standstill_protocol::message::{FileIdentity, Phase};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{Loss, MachineState};
use standstill_testkit::{
    Call, Gate, Processes, Script, Step, Trace, TracedHook, Trigger, What, within,
};
use std::fs::File;
use std::time::Duration;
use tempfile::NamedTempFile;

#[tokio::test]
async fn a_device_is_added_to_a_running_machine() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    within(LONG, "declare_ram", machine.declare_ram(tempfile::tempfile().unwrap())).await.unwrap();
    let mut events = machine.events();
    within(LONG, "add", machine.add_device(honest("d1", &trace))).await.unwrap();
    let status = device(&machine, "d1").await;
    assert_eq!((status.state, status.incarnation), (Some(MigrationState::Running), 1));
    let (seen, _) = until_joined(&mut events, "d1").await;
    assert_eq!(kinds(&seen, "d1"), ["joined"], "{seen:?}");
    let memory =
        |e: &&standstill_testkit::Entry| e.who == "d1" && matches!(e.what, What::Memory { .. });
    assert_eq!(trace.entries().iter().filter(memory).count(), 1, "{}", trace.text());
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn a_device_is_added_to_a_stopped_machine_and_stays_in_stop() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    let stopped = machine.pause().await.unwrap();
    within(LONG, "add", machine.add_device(honest("d1", &trace))).await.unwrap();
    assert_eq!(device(&machine, "d1").await.state, Some(MigrationState::Stop));
    assert!(trace.received(Phase::Start).is_empty());
    let report = within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(report.participants.len(), 2, "{report}");
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn what_is_added_or_removed_during_a_transition_waits_for_its_end() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on_nth(Phase::PrepareStop, 1, [Step::hold(&gate), Step::Ack]);
    let machine =
        start(builder().device(slow.device("slow", &trace).unwrap()).device(honest("d1", &trace)))
            .await;
    let mut events = machine.events();
    let spawn = |what: &str| {
        let (machine, spec) = (machine.clone(), honest("d2", &trace));
        let what = what.to_owned();
        tokio::spawn(async move {
            match what.as_str() {
                "pause" => {
                    machine.pause().await.map(standstill_coordinator::Stopped::leave_stopped)
                }
                "add" => machine.add_device(spec).await,
                _ => machine.remove_device("d1").await.map(drop),
            }
        })
    };
    let pause = spawn("pause");
    let told = |entries: &[standstill_testkit::Entry]| {
        entries.iter().filter(|e| matches!(e.what, What::Received { .. })).count() == 2
    };
    trace.wait_for("both to be told", told).await;
    let (add, remove) = (spawn("add"), spawn("remove"));
    for _ in 0..50 {
        let status = machine.status().await.unwrap();
        assert_eq!(status.devices.len(), 2, "{status:?}");
        assert!(status.devices.iter().all(|d| d.standing == DeviceStanding::Ready), "{status:?}");
        tokio::task::yield_now().await;
    }
    assert_eq!(trace.incarnations("d2"), 0);
    gate.open();
    within(LONG, "pause", pause).await.unwrap().unwrap();
    within(LONG, "add", add).await.unwrap().unwrap();
    within(LONG, "removal", remove).await.unwrap().unwrap();
    let removed = |event: &MachineEvent| matches!(event, MachineEvent::DeviceRemoved { .. });
    let seen = events_until(&mut events, "the removal", removed).await;
    assert!(matches!(seen[0], MachineEvent::TransitionBegan { .. }), "{seen:?}");
    assert!(matches!(seen[1], MachineEvent::Transition(_)), "{seen:?}");
    assert_machine(&machine, MachineState::Stopped).await;
    assert_eq!(device(&machine, "d2").await.state, Some(MigrationState::Stop));
    within(LONG, "resume", machine.resume()).await.unwrap();
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn a_device_that_cannot_be_added_leaves_the_machine_as_it_was() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    let cases = [
        (Trigger::Hello, vec![Step::Say("no such disk".into()), Step::Exit(3)], "no such disk"),
        (Trigger::Welcome, vec![Step::Exit(4)], "was lost before it had joined"),
        (Trigger::Phase(Phase::Stop), vec![Step::Refuse("never".into())], "never"),
        (Trigger::Phase(Phase::Start), vec![Step::Crash], "was lost before it had joined"),
    ];
    for (trigger, steps, says) in cases {
        let bad = Script::honest().on(trigger, steps).device("bad", &trace).unwrap();
        let error = within(LONG, "add", machine.add_device(bad)).await.unwrap_err();
        let text = standstill_testkit::chain(&error);
        let MachineError::NotStarted(error) = error else { panic!("{error}") };
        assert!(matches!(&*error, StartError::Greeting { device, .. } if device == "bad"));
        assert!(text.contains(says), "{text}");
        let status = machine.status().await.unwrap();
        assert_eq!(status.devices.len(), 1, "{status:?}");
        Processes::of_trace(&trace).only(&["bad"]).assert_gone_within(Duration::ZERO).await;
    }
    let error = machine.add_device(honest("d0", &trace)).await.unwrap_err();
    assert!(error.to_string().contains("two devices are named \"d0\""), "{error}");
    let missing = standstill_coordinator::DeviceSpec::new("bad", "/nowhere/at/all");
    let error = within(LONG, "add", machine.add_device(missing)).await.unwrap_err();
    assert!(standstill_testkit::chain(&error).contains("/nowhere/at/all"), "{error}");
    assert!(!matches!(
        error,
        MachineError::NotStarted(ref e)
            if matches!(**e, StartError::Greeting { source: GreetingError::Silent(_), .. })
    ));
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn a_device_is_removed_from_a_running_and_from_a_stopped_machine() {
    for stopped in [false, true] {
        let trace = Trace::new().unwrap();
        let memory = FileIdentity { device: 7, inode: 4711 };
        let gone = Script::honest().memory([memory]).device("gone", &trace).unwrap();
        let machine =
            start(builder().device(honest("d0", &trace)).device(gone).device(honest("d2", &trace)))
                .await;
        if stopped {
            machine.pause().await.unwrap().leave_stopped();
        }
        let before = trace.received(Phase::Stop).len();
        let mut events = machine.events();
        let exit = within(LONG, "removal", machine.remove_device("gone")).await.unwrap();
        assert_eq!(exit, Some(Exit::Code(0)));
        let removed = |event: &MachineEvent| matches!(event, MachineEvent::DeviceRemoved { .. });
        let seen = events_until(&mut events, "the removal", removed).await;
        assert_eq!(kinds(&seen, "gone"), ["exited", "fenced", "removed"], "{seen:?}");
        let told: Vec<_> =
            trace.received(Phase::Stop).into_iter().skip(before).map(|e| e.who).collect();
        assert_eq!(told, if stopped { vec![] } else { vec!["gone".to_owned()] });
        for peer in ["d0", "d2"] {
            let revoked = |e: &standstill_testkit::Entry| {
                e.who == peer && matches!(e.what, What::Revoked { .. })
            };
            assert!(trace.entries().iter().any(revoked), "{}", trace.text());
        }
        let error = machine.remove_device("gone").await.unwrap_err();
        assert!(matches!(error, MachineError::NoDevice { .. }), "{error}");
        if stopped {
            within(LONG, "resume", machine.resume()).await.unwrap();
        }
        assert_whole_and_end(&machine, &trace, 2).await;
    }
}

#[tokio::test]
async fn a_device_that_will_not_go_is_killed() {
    for (trigger, steps, killed) in [
        (Trigger::Shutdown, vec![], true),
        (Trigger::Shutdown, vec![Step::Freeze], true),
        // It ends when its channel does, or is killed: whichever is first.
        (Trigger::Phase(Phase::Stop), vec![Step::Refuse("I stay".into())], false),
    ] {
        let trace = Trace::new().unwrap();
        let stays = Script::honest().on(trigger, steps).device("stays", &trace).unwrap();
        let machine = start(builder().device(honest("d0", &trace)).device(stays)).await;
        let exit = within(LONG, "removal", machine.remove_device("stays")).await.unwrap();
        assert!(exit.is_some_and(|exit| exit.is_kill() || !killed), "{exit:?}");
        assert_whole_and_end(&machine, &trace, 1).await;
    }
}

#[tokio::test]
async fn a_lost_device_is_forgotten_and_can_come_again_under_its_name() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace)).device(honest("d1", &trace))).await;
    let mut events = machine.events();
    signal(&machine, "d1", Signal::TERM).await;
    let fenced = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
    events_until(&mut events, "the fence", fenced).await;
    let exit = within(LONG, "removal", machine.remove_device("d1")).await.unwrap();
    assert!(matches!(exit, Some(Exit::Signal { signal: 15, .. })), "{exit:?}");
    within(LONG, "add", machine.add_device(honest("d1", &trace))).await.unwrap();
    assert_whole_and_end(&machine, &trace, 2).await;
}

/// A machine with a device "locked", which cannot be proven gone before the lock is dropped: the last of
/// what is returned.
async fn with_a_locked_device(trace: &Trace) -> (Machine, NamedTempFile, File) {
    let file = NamedTempFile::new().unwrap();
    let lock = file.reopen().unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let locked = Script::honest().backing_file(file.path()).device("locked", trace).unwrap();
    let limits = Deadlines { fence: SHORT, ..deadlines() };
    let machine = builder().deadlines(limits).device(honest("d0", trace)).device(locked);
    (start(machine).await, file, lock)
}

#[tokio::test]
async fn a_device_that_cannot_be_proven_gone_stays_until_it_can() {
    let trace = Trace::new().unwrap();
    let (machine, _file, lock) = with_a_locked_device(&trace).await;
    let error = within(LONG, "removal", machine.remove_device("locked")).await.unwrap_err();
    assert!(matches!(&error, MachineError::Unproven { device } if device == "locked"), "{error}");
    assert_eq!(device(&machine, "locked").await.standing, DeviceStanding::Lost);
    let mut events = machine.events();
    drop(lock);
    let fenced = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
    events_until(&mut events, "the fence", fenced).await;
    within(LONG, "removal", machine.remove_device("locked")).await.unwrap();
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn a_transition_says_in_which_way_a_device_was_lost_before_it() {
    let trace = Trace::new().unwrap();
    let (machine, _file, lock) = with_a_locked_device(&trace).await;
    // It is asked to end, and that cannot be proven in time.
    within(LONG, "removal", machine.remove_device("locked")).await.unwrap_err();
    let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
    let report = report_of(&error);
    let fences = report.participants.iter().filter_map(|one| one.fence.as_ref());
    let why: Vec<_> = fences.map(|fence| fence.why).collect();
    assert_eq!(why, [Loss::Timeout], "{report}");
    drop(lock);
    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
}

/// A newcomer that may run in a machine that is to stand: nothing starts before that is settled.
#[tokio::test]
async fn a_newcomer_that_cannot_be_proven_stopped_holds_a_stopped_machine() {
    let trace = Trace::new().unwrap();
    let file = NamedTempFile::new().unwrap();
    let lock = file.reopen().unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let frozen = Script::honest().backing_file(file.path()).on(Phase::PrepareStop, [Step::Freeze]);
    let frozen = frozen.device("frozen", &trace).unwrap().deadlines(SHORT, LONG);
    let limits = Deadlines { fence: SHORT, ..deadlines() };
    let machine = start(builder().deadlines(limits).device(honest("d0", &trace))).await;
    machine.pause().await.unwrap().leave_stopped();
    let mut events = machine.events();
    let error = within(LONG, "add", machine.add_device(frozen)).await.unwrap_err();
    assert!(matches!(&error, MachineError::Unproven { device } if device == "frozen"), "{error}");
    assert_machine(&machine, MachineState::Held).await;
    let began = |event: &MachineEvent| matches!(event, MachineEvent::HoldBegan { device } if device == "frozen");
    events_until(&mut events, "the hold to begin", began).await;
    within(LONG, "resume", machine.resume()).await.unwrap_err();
    drop(lock);
    let ended = |event: &MachineEvent| matches!(event, MachineEvent::HoldEnded { by_owner: false });
    events_until(&mut events, "the hold to end", ended).await;
    within(LONG, "resume", machine.resume()).await.unwrap();
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn a_device_is_removed_while_it_is_being_added_or_restarted() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    let silent = Script::honest().on(Trigger::Hello, []).device("silent", &trace).unwrap();
    let add = tokio::spawn({
        let machine = machine.clone();
        async move { machine.add_device(silent).await }
    });
    let began = |entries: &[standstill_testkit::Entry]| entries.iter().any(|e| e.who == "silent");
    trace.wait_for("its process to begin", began).await;
    within(LONG, "removal", machine.remove_device("silent")).await.unwrap();
    let error = within(LONG, "add", add).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("being removed"), "{error}");
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn only_so_many_requests_wait() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on_nth(Phase::PrepareStop, 1, [Step::hold(&gate), Step::Ack]);
    let machine = start(builder().device(slow.device("slow", &trace).unwrap())).await;
    let pause = tokio::spawn({
        let machine = machine.clone();
        async move { machine.pause().await.map(standstill_coordinator::Stopped::leave_stopped) }
    });
    let told = |entries: &[standstill_testkit::Entry]| {
        entries.iter().any(|e| matches!(e.what, What::Received { .. }))
    };
    trace.wait_for("it to be told", told).await;
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..65 {
        let machine = machine.clone();
        waiting.spawn(async move { machine.remove_device("nobody").await.unwrap_err() });
    }
    let first = within(LONG, "one too many", waiting.join_next()).await.unwrap().unwrap();
    assert!(matches!(first, MachineError::Busy(64)), "{first}");
    gate.open();
    while let Some(error) = within(LONG, "the others", waiting.join_next()).await {
        assert!(matches!(error.unwrap(), MachineError::NoDevice { .. }));
    }
    within(LONG, "pause", pause).await.unwrap().unwrap();
    within(LONG, "resume", machine.resume()).await.unwrap();
    assert_whole_and_end(&machine, &trace, 1).await;
}

#[tokio::test]
async fn nothing_is_added_to_a_held_machine() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let key = gate.key();
    let hook = TracedHook::new("vcpus", &trace).unwrap().doing(move |call| match call {
        Call::Stop => Ok(key.wait()?),
        Call::Start => Ok(()),
    });
    let spec = HookSpec::new("vcpus", Slot::After).deadline(Duration::from_millis(300));
    let machine = start(builder().device(honest("d0", &trace)).hook(spec, hook)).await;
    within(LONG, "pause", machine.pause()).await.unwrap_err();
    assert_machine(&machine, MachineState::Held).await;
    let error = machine.add_device(honest("d1", &trace)).await.unwrap_err();
    assert!(error.to_string().contains("the machine is held"), "{error}");
    let error = machine.remove_device("d0").await.unwrap_err();
    assert!(error.to_string().contains("the machine is held"), "{error}");
    let mut events = machine.events();
    gate.open();
    let ended = |event: &MachineEvent| matches!(event, MachineEvent::HoldEnded { by_owner: false });
    events_until(&mut events, "the hold to end", ended).await;
    within(LONG, "add", machine.add_device(honest("d1", &trace))).await.unwrap();
    within(LONG, "resume", machine.resume()).await.unwrap();
    assert_nothing_left(&machine, &trace).await;
}
