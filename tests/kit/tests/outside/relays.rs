//! A relay between the coordinator and a device process: what is done to packets, exactly to those
//! that were meant, and what the machine does about it.

use crate::fixture::{LONG, SHORT, deadlines, honest, pid, report_of};
use rustix::process::{Pid, Signal, kill_process};
use standstill_coordinator::process::Exit;
use standstill_coordinator::report::TransitionReport;
use standstill_coordinator::{
    Events, LossPolicy, Machine, MachineBuilder, MachineError, MachineEvent, Outcome, RestartPolicy,
};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{Loss, MachineState};
use standstill_testkit::outside::Relay;
use standstill_testkit::plan::{Moment, OutsideAction, PacketKind};
use standstill_testkit::{Packet, Processes, Script, Step, Trace, What, within};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

/// `d0` and `d2` are as they are, `d1` is behind a relay and has short deadlines.
async fn three(trace: &Trace, relay: &Relay, d1: Script) -> Machine {
    let d1 = d1.device("d1", trace).unwrap().deadlines(SHORT, SHORT);
    let builder = MachineBuilder::new("vm")
        .deadlines(deadlines())
        .device(honest("d0", trace))
        .device(relay.wrap(d1).unwrap())
        .device(honest("d2", trace));
    within(LONG, "start", builder.start()).await.unwrap()
}

async fn pause(machine: &Machine) -> Result<Arc<TransitionReport>, MachineError> {
    let stopped = within(LONG, "pause", machine.pause()).await?;
    let report = Arc::clone(stopped.report());
    stopped.leave_stopped();
    Ok(report)
}

async fn assert_others_run(machine: &Machine, what: &str) {
    for device in machine.status().await.unwrap().devices {
        if device.name != "d1" {
            assert_eq!(device.state, Some(MigrationState::Running), "{} after {what}", device.name);
        }
    }
}

/// Waits until a fence is proven: that of `d1`.
async fn fenced(events: &mut Events) {
    loop {
        let event = within(LONG, "the proof", events.recv()).await.unwrap();
        if let MachineEvent::DeviceFenced { device, .. } = event {
            assert_eq!(device, "d1");
            return;
        }
    }
}

/// How many commands of that phase reached `d1`.
fn received(trace: &Trace, phase: Phase) -> usize {
    let is = |what| matches!(what, What::Received { phase: of, .. } if of == phase);
    trace.entries().iter().filter(|entry| entry.who == "d1" && is(entry.what)).count()
}

#[tokio::test]
async fn a_relay_in_which_nothing_is_armed_changes_nothing_and_ends_with_its_device() {
    let trace = Trace::new().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let relay = Relay::new().unwrap();
    // The coordinator asks whether somebody has the device's own file locked.
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let machine = three(&trace, &relay, Script::honest().backing_file(file.path())).await;
    let processes = Processes::of_trace(&trace).only(&["d1"]);
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(1 << 20).unwrap();
    within(LONG, "declare_ram", machine.declare_ram(&ram)).await.unwrap();
    for _ in 0..3 {
        assert_eq!(pause(&machine).await.unwrap().outcome, Outcome::Done);
        let report = within(LONG, "resume", machine.resume()).await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
    }
    assert_eq!(relay.fired().unwrap(), []);
    // The coordinator's child is the relay, and the relay's is the device.
    let device = relay.device().unwrap().unwrap();
    assert_ne!(device, pid(&machine, "d1").await);
    assert_eq!(processes.len(), 1);
    for (name, exit) in within(LONG, "shutdown", machine.shutdown()).await.unwrap() {
        assert_eq!(exit, Some(Exit::Code(0)), "{name}");
    }
    processes.assert_gone_within(LONG).await;
}

/// What is done to `d1`'s answer to `Stop`, how that is seen, and whether it is d1's own end.
#[tokio::test]
async fn what_is_done_to_an_answer_costs_the_device_and_nobody_else() {
    let answer = Moment::Answer(Phase::Stop);
    let cases = [
        (OutsideAction::Drop, Loss::Timeout, "no answer"),
        (OutsideAction::DelayMs(60_000), Loss::Timeout, "no answer"),
        (OutsideAction::Merge, Loss::Timeout, "no answer"),
        (OutsideAction::Corrupt, Loss::Protocol, "variant index"),
        (OutsideAction::CorruptAt(0), Loss::Protocol, "packet begins with"),
        (OutsideAction::Split, Loss::Protocol, "undecodable"),
        (OutsideAction::Cut, Loss::Disconnected, "channel was closed"),
    ];
    for (action, loss, says) in cases {
        let trace = Trace::new().unwrap();
        let relay = Relay::new().unwrap();
        let machine = three(&trace, &relay, Script::honest()).await;
        let processes = Processes::of_trace(&trace).only(&["d1"]);
        // The second one: the first is passed on as it is.
        relay.arm(answer, 2, action).unwrap();
        pause(&machine).await.unwrap();
        within(LONG, "resume", machine.resume()).await.unwrap();
        assert_eq!(relay.fired().unwrap(), [], "{action:?} fired too early");
        let error = pause(&machine).await.unwrap_err();
        let report = report_of(&error);
        let text = format!("{action:?}: {report}");
        match &report.outcome {
            Outcome::Degraded { machine: MachineState::Running, fenced } => {
                assert_eq!(fenced.len(), 1, "{text}");
                assert_eq!(fenced[0].1, loss, "{text}");
            }
            _ => panic!("{text}"),
        }
        assert!(text.contains(says), "{text}\ndoes not say {says:?}");
        let fired = relay.fired().unwrap();
        assert_eq!(fired.len(), 1, "{text}");
        assert_eq!((fired[0].index, fired[0].occurrence), (0, 2), "{text}");
        // The device itself knows of nothing: it has carried the command out and answered.
        assert_eq!(received(&trace, Phase::Stop), 2, "{text}");
        processes.assert_gone_within(LONG).await;
        assert_others_run(&machine, &text).await;
    }
}

#[tokio::test]
async fn what_is_done_to_a_command_is_seen_as_the_silence_or_the_end_of_the_device() {
    let cases = [
        (OutsideAction::Drop, Loss::Timeout, 0),
        (OutsideAction::Cut, Loss::Disconnected, 0),
        // The device takes it for a broken coordinator and ends.
        (OutsideAction::Corrupt, Loss::Disconnected, 0),
        (OutsideAction::Split, Loss::Disconnected, 0),
        (OutsideAction::Kill, Loss::Disconnected, 0),
        (OutsideAction::StopMs(0), Loss::Timeout, 0),
    ];
    for (action, loss, reached) in cases {
        let trace = Trace::new().unwrap();
        let relay = Relay::new().unwrap();
        let machine = three(&trace, &relay, Script::honest()).await;
        let processes = Processes::of_trace(&trace).only(&["d1"]);
        relay.arm(Moment::Command(Phase::PrepareStop), 1, action).unwrap();
        let error = pause(&machine).await.unwrap_err();
        let text = format!("{action:?}: {}\n{}", report_of(&error), trace.text());
        match &report_of(&error).outcome {
            Outcome::Degraded { machine: MachineState::Running, fenced } => {
                let lost = fenced[0].1;
                // Its end and that of its channel are two messengers.
                let same = lost == loss || (loss, lost) == (Loss::Disconnected, Loss::Exited);
                assert!(same && fenced.len() == 1, "{text}");
            }
            _ => panic!("{text}"),
        }
        assert_eq!(relay.fired().unwrap().len(), 1, "{text}");
        assert_eq!(received(&trace, Phase::PrepareStop), reached, "{text}");
        processes.assert_gone_within(LONG).await;
        assert_others_run(&machine, &text).await;
    }
}

#[tokio::test]
async fn what_comes_twice_late_or_in_another_order_changes_nothing() {
    let trace = Trace::new().unwrap();
    let relay = Relay::new().unwrap();
    let d1 = relay.wrap(Script::honest().device("d1", &trace).unwrap()).unwrap();
    let builder = MachineBuilder::new("vm")
        .deadlines(deadlines())
        .heartbeat(Duration::from_millis(20))
        .device(honest("d0", &trace))
        .device(d1);
    let machine = within(LONG, "start", builder.start()).await.unwrap();
    let armed = [
        (Moment::Command(Phase::PrepareStop), OutsideAction::Duplicate),
        (Moment::Answer(Phase::PrepareStop), OutsideAction::Duplicate),
        (Moment::Command(Phase::Stop), OutsideAction::DelayMs(50)),
        (Moment::Answer(Phase::Stop), OutsideAction::StopMs(50)),
        // The next one that goes this way is a sign of life.
        (Moment::Answer(Phase::PrepareStart), OutsideAction::Swap),
        (Moment::Answer(Phase::Start), OutsideAction::Duplicate),
    ];
    for (moment, action) in armed {
        relay.arm(moment, 0, action).unwrap();
    }
    for round in 1..=3 {
        let report = pause(&machine).await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        let report = within(LONG, "resume", machine.resume()).await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        let fired = relay.fired().unwrap();
        for (index, armed) in (0..).zip(&armed) {
            let count = fired.iter().filter(|fired| fired.index == index).count();
            assert_eq!(count, round, "{armed:?} in round {round}");
        }
    }
}

#[tokio::test]
async fn an_answer_is_held_back_until_it_is_let_go() {
    let trace = Trace::new().unwrap();
    let relay = Relay::new().unwrap();
    let builder = MachineBuilder::new("vm")
        .deadlines(deadlines())
        .heartbeat(Duration::from_millis(20))
        .device(honest("d0", &trace))
        .device(relay.wrap(honest("d1", &trace)).unwrap());
    let machine = within(LONG, "start", builder.start()).await.unwrap();
    let index = relay.arm(Moment::Answer(Phase::Stop), 1, OutsideAction::Hold).unwrap();
    let ended = Cell::new(false);
    let paused = async {
        let report = pause(&machine).await;
        ended.set(true);
        report
    };
    let let_go = async {
        relay.until_fired(index).await;
        // It would be there long ago.
        let signs = relay.arm(Moment::Packet(PacketKind::Heartbeat), 2, OutsideAction::Duplicate);
        relay.until_fired(signs.unwrap()).await;
        assert!(!ended.get(), "a pause that has not all its answers");
        relay.let_go(index).unwrap();
    };
    let (report, ()) = tokio::join!(paused, let_go);
    assert_eq!(report.unwrap().outcome, Outcome::Done);
    // One that is let go before it comes is not held back at all.
    let index = relay.arm(Moment::Answer(Phase::Start), 1, OutsideAction::Hold).unwrap();
    relay.let_go(index).unwrap();
    let report = within(LONG, "resume", machine.resume()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    assert_eq!(relay.fired().unwrap().last().unwrap().index, index);
}

#[tokio::test]
async fn what_a_device_has_said_before_it_is_killed_counts() {
    let trace = Trace::new().unwrap();
    let relay = Relay::new().unwrap();
    let machine = three(&trace, &relay, Script::honest()).await;
    relay.arm(Moment::Answer(Phase::PrepareStop), 1, OutsideAction::Kill).unwrap();
    let error = pause(&machine).await.unwrap_err();
    let report = report_of(&error);
    let text = report.to_string();
    // It is told `Stop`, or its loss is seen before; its answer to the first phase is in the report.
    let line = text.lines().find(|line| line.trim_start().starts_with("d1")).unwrap();
    assert!(line.contains("RUNNING → RUNNING_P2P"), "{text}");
    assert!(line.contains("signal 9"), "its end is told as its own: {text}");
    assert_eq!(relay.fired().unwrap().len(), 1);
}

#[tokio::test]
async fn what_the_system_lets_through_to_nobody_is_lost_on_the_way() {
    let trace = Trace::new().unwrap();
    let relay = Relay::new().unwrap();
    let fds = [Step::Send(Packet::ManyFds), Step::Ack];
    let machine = three(&trace, &relay, Script::honest().on(Phase::Stop, fds)).await;
    match pause(&machine).await {
        Ok(report) => assert_eq!(report.outcome, Outcome::Done, "{report}"),
        // A kernel older than 6.16 lets them through.
        Err(error) => {
            let text = report_of(&error).to_string();
            assert!(text.contains("file descriptors"), "{text}");
        }
    }
}

#[tokio::test]
async fn a_device_that_stops_listening_at_its_greeting_or_memory_fails_what_waits_for_it() {
    let trace = Trace::new().unwrap();
    let relay = Relay::new().unwrap();
    relay.arm(Moment::Packet(PacketKind::Hello), 1, OutsideAction::CorruptAt(8)).unwrap();
    let d1 = relay.wrap(Script::honest().device("d1", &trace).unwrap()).unwrap();
    let builder = MachineBuilder::new("vm").deadlines(deadlines()).device(d1);
    let error = within(LONG, "start", builder.start()).await.unwrap_err();
    assert!(standstill_testkit::chain(&error).contains("variant index"), "{error}");

    let trace = Trace::new().unwrap();
    let relay = Relay::new().unwrap();
    let machine = three(&trace, &relay, Script::honest()).await;
    relay.arm(Moment::Packet(PacketKind::MemoryAccepted), 1, OutsideAction::Cut).unwrap();
    let ram = tempfile::tempfile().unwrap();
    let error = within(LONG, "declare_ram", machine.declare_ram(&ram)).await.unwrap_err();
    assert!(error.to_string().contains("d1"), "{error}");
    assert_eq!(relay.fired().unwrap().len(), 1);
}

/// Whoever kills the process that the coordinator knows, kills the device too, and what the
/// coordinator takes for a proof is one.
#[tokio::test]
async fn the_device_ends_with_its_relay_before_the_fence_is_proven() {
    for _ in 0..5 {
        let trace = Trace::new().unwrap();
        let relay = Relay::new().unwrap();
        let machine = three(&trace, &relay, Script::honest()).await;
        let device = relay.device().unwrap().unwrap();
        let process = rustix::process::pidfd_open(device, rustix::process::PidfdFlags::empty());
        let process = process.unwrap();
        let mut events = machine.events();
        kill_process(pid(&machine, "d1").await, Signal::KILL).unwrap();
        fenced(&mut events).await;
        let mut fds = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let is_gone = rustix::event::poll(&mut fds, Some(&now)).unwrap() == 1;
        assert!(is_gone || has_no_memory(device), "the device lives on");
    }
}

/// Whether a process that is killed will execute nothing any more: it lets go of its memory first,
/// then of its files (the proof), and is a zombie only after that.
fn has_no_memory(process: Pid) -> bool {
    let pages = std::fs::read_to_string(format!("/proc/{}/statm", process.as_raw_nonzero()));
    pages.map_or(true, |pages| pages.starts_with("0 "))
}

#[tokio::test]
async fn what_has_fired_does_not_fire_again_in_the_next_incarnation() {
    let trace = Trace::new().unwrap();
    let relay = Relay::new().unwrap();
    let d1 = relay.wrap(Script::honest().device("d1", &trace).unwrap()).unwrap();
    let d1 = d1.on_loss(LossPolicy::Restart(RestartPolicy::default()));
    let builder = MachineBuilder::new("vm").deadlines(deadlines()).device(d1);
    let machine = within(LONG, "start", builder.start()).await.unwrap();
    relay.arm(Moment::Command(Phase::Stop), 1, OutsideAction::Kill).unwrap();
    let mut events = machine.events();
    let first = relay.device().unwrap();
    pause(&machine).await.unwrap_err();
    loop {
        let event = within(LONG, "the restart", events.recv()).await.unwrap();
        if matches!(event, MachineEvent::DeviceJoined { .. }) {
            break;
        }
    }
    assert_ne!(relay.device().unwrap(), first);
    let report = pause(&machine).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    assert_eq!(relay.fired().unwrap().len(), 1);
    // Another one that is armed later counts from then on.
    within(LONG, "resume", machine.resume()).await.unwrap();
    relay.arm(Moment::Command(Phase::Stop), 1, OutsideAction::Kill).unwrap();
    pause(&machine).await.unwrap_err();
    assert_eq!(relay.fired().unwrap().iter().map(|fired| fired.index).collect::<Vec<_>>(), [0, 1]);
}

#[tokio::test]
async fn what_needs_no_packet_is_done_at_once() {
    for action in [OutsideAction::Cut, OutsideAction::Kill] {
        let trace = Trace::new().unwrap();
        let relay = Relay::new().unwrap();
        let machine = three(&trace, &relay, Script::honest()).await;
        let processes = Processes::of_trace(&trace).only(&["d1"]);
        let mut events = machine.events();
        let index = relay.arm(Moment::Running, 1, action).unwrap();
        relay.until_fired(index).await;
        fenced(&mut events).await;
        processes.assert_gone_within(LONG).await;
        let report = pause(&machine).await.unwrap();
        assert_eq!(report.participants.len(), 2, "{action:?}: {report}");
    }
}

#[test]
fn what_needs_a_packet_is_refused_where_there_is_none() {
    let relay = Relay::new().unwrap();
    let error = relay.arm(Moment::Running, 1, OutsideAction::Drop).unwrap_err().to_string();
    assert!(error.contains("Drop") && error.contains("Running"), "{error}");
}
