//! Devices that are lost: optional ones, and outside of any transition.

use crate::fixture::{
    LONG, PHASES, SHORT, assert_all_in, assert_machine, builder, deadlines, fenced, honest,
    short_in, start, until,
};
use crate::supervised::{events_until, signal};
use rustix::process::{Pid, Signal, kill_process};
use standstill_coordinator::{Events, MachineEvent, Outcome};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Packet, Processes, Script, Step, Trace, Trigger, within};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

#[tokio::test]
async fn a_machine_goes_on_without_an_optional_device() {
    for phase in PHASES {
        for steps in [vec![Step::Freeze], vec![Step::Exit(1)], vec![Step::Refuse("no".into())]] {
            let trace = Trace::new().unwrap();
            let case = format!("{steps:?} in {phase}");
            let script = Script::honest().on(phase, steps);
            let optional = short_in(phase, script.device("optional", &trace).unwrap()).optional();
            let machine = start(
                builder()
                    .device(honest("d0", &trace))
                    .device(optional)
                    .device(honest("d2", &trace)),
            )
            .await;
            let processes = Processes::of(&machine.status().await.unwrap());
            let report = until(&machine, phase).await.unwrap();
            let (expected, state) = match phase {
                standstill_protocol::message::Phase::PrepareStop
                | standstill_protocol::message::Phase::Stop => {
                    (MachineState::Stopped, MigrationState::Stop)
                }
                _ => (MachineState::Running, MigrationState::Running),
            };
            match &report.outcome {
                Outcome::Degraded { machine, .. } => assert_eq!(*machine, expected, "{case}"),
                _ => panic!("{case}: {report}"),
            }
            assert_eq!(fenced(&report), ["optional"], "{case}: {report}");
            // Nothing was undone.
            assert_eq!(report.first_epoch, report.last_epoch, "{case}: {report}");
            assert_machine(&machine, expected).await;
            assert_all_in(&machine, &trace, &["d0", "d2"], state).await;
            assert_eq!(processes.left(), ["d0", "d2"], "{case}");
        }
    }
}

/// The next two events: the loss, and its proof.
async fn lost_and_fenced(events: &mut Events) -> (String, String) {
    let lost = loop {
        match within(LONG, "the loss", events.recv()).await.unwrap() {
            // The end of its process may be seen before that of its channel.
            MachineEvent::DeviceExited { .. } => {}
            MachineEvent::DeviceLost { device, detail, .. } => break (device, detail),
            other => panic!("{other:?}"),
        }
    };
    loop {
        match within(LONG, "the proof", events.recv()).await.unwrap() {
            MachineEvent::DeviceExited { device, .. } => assert_eq!(device, lost.0),
            MachineEvent::DeviceFenced { device, .. } => {
                assert_eq!(device, lost.0);
                return lost;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_device_that_is_killed_between_transitions_is_lost_and_fenced() {
    let trace = Trace::new().unwrap();
    let devices = ["d0", "d1", "d2"].map(|name| honest(name, &trace));
    let machine = start(builder().devices(devices)).await;
    let mut events = machine.events();
    let status = machine.status().await.unwrap();
    let processes = Processes::of(&status);
    let pid = Pid::from_raw(i32::try_from(status.devices[1].pid.unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();

    let (device, _) = lost_and_fenced(&mut events).await;
    assert_eq!(device, "d1");
    assert_eq!(processes.left(), ["d0", "d2"]);
    let status = machine.status().await.unwrap();
    assert_eq!(status.devices[1].state, None);
    assert!(status.devices[1].lost.is_some());
    // The others go on, and nobody is missed.
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    assert_eq!(stopped.report().participants.len(), 2);
    assert_all_in(&machine, &trace, &["d0", "d2"], MigrationState::Stop).await;
    // Its owner does not want it any more.
    within(LONG, "removal", machine.remove_device("d1")).await.unwrap();
    within(LONG, "resume", stopped.resume()).await.unwrap();
}

#[tokio::test]
async fn a_device_that_breaks_the_protocol_between_transitions_is_lost_with_the_reason() {
    let cases = [
        (Step::Send(Packet::Garbage), "packet begins with"),
        (Step::Send(Packet::Empty), "empty packet"),
        (Step::Flood(3000), "more than 1000 messages in a second"),
        (Step::Disconnect, "channel was closed"),
    ];
    for (step, says) in cases {
        let trace = Trace::new().unwrap();
        // A memory declaration is what it is told to begin with.
        let script = Script::honest().on(Trigger::Memory, [Step::Ack, step]);
        let machine = start(
            builder().device(honest("d0", &trace)).device(script.device("d1", &trace).unwrap()),
        )
        .await;
        let mut events = machine.events();
        let ram = tempfile::tempfile().unwrap();
        // Its acceptance may come before the loss is seen, or the loss before that of the other.
        let _ = within(LONG, "declare_ram", machine.declare_ram(&ram)).await;
        let (device, why) = lost_and_fenced(&mut events).await;
        assert_eq!(device, "d1");
        assert!(why.contains(says), "{why}");
        let status = machine.status().await.unwrap();
        assert!(status.devices[1].lost.as_deref().unwrap().contains(says), "{status:?}");
    }
}

/// The loss and the call race: whichever is first, the machine stops without the dead one.
#[tokio::test]
async fn a_pause_right_after_a_death_never_hangs_and_never_counts_the_dead() {
    for _ in 0..10 {
        let trace = Trace::new().unwrap();
        let devices = ["d0", "d1", "d2"].map(|name| honest(name, &trace));
        let machine = start(builder().devices(devices)).await;
        let status = machine.status().await.unwrap();
        let pid = Pid::from_raw(i32::try_from(status.devices[2].pid.unwrap()).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        match within(SHORT, "pause", machine.pause()).await {
            Ok(stopped) => {
                assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
                stopped.leave_stopped();
            }
            Err(error) => {
                assert_eq!(fenced(crate::fixture::report_of(&error)), ["d2"], "{error}");
                assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
            }
        }
        let status = machine.status().await.unwrap();
        assert!(status.devices[2].lost.is_some(), "{status:?}");
    }
}

/// The pidfd says that it has ended long before its parent may learn how.
#[tokio::test]
async fn a_device_that_a_debugger_is_attached_to_is_proven_gone_when_that_one_lets_go() {
    let trace = Trace::new().unwrap();
    let mut limits = deadlines();
    limits.fence = SHORT;
    let devices = ["d0", "d1"].map(|name| honest(name, &trace));
    let machine = start(builder().deadlines(limits).devices(devices)).await;
    let status = machine.status().await.unwrap();
    let pid = status.devices.iter().find(|device| device.name == "d1").unwrap().pid.unwrap();
    let mut tracer = Command::new(env!("CARGO_BIN_EXE_standstill-testkit-tracer"))
        .arg(pid.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(tracer.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "traced\n", "what may refuse it: kernel.yama.ptrace_scope, seccomp");
    let mut events = machine.events();
    signal(&machine, "d1", Signal::KILL).await;
    let unproven = |event: &MachineEvent| matches!(event, MachineEvent::FenceUnproven { .. });
    let seen = events_until(&mut events, "the grace to end", unproven).await;
    let ended = |event: &MachineEvent| matches!(event, MachineEvent::DeviceExited { .. });
    assert!(!seen.iter().any(ended), "{seen:?}");
    drop(tracer.stdin.take());
    let proven = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { device, exit, .. } if device == "d1" && exit.is_kill());
    events_until(&mut events, "the proof", proven).await;
    tracer.wait().unwrap();
}
