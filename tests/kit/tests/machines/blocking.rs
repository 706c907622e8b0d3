//! The same machine without async: from any thread, also one of a runtime.

use crate::fixture::{LONG, SHORT, builder, honest, report_of};
use crate::supervised::SOON;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use standstill_coordinator::blocking::{Events, Machine, PreparingStop, Quiet, Stopped, TakenOver};
use standstill_coordinator::error::{MachineError, StartError};
use standstill_coordinator::{DeviceSpec, LossPolicy, MachineBuilder, MachineEvent, Outcome};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Gate, Processes, Script, Step, Trace, TracedLocal, Trigger};
use std::os::fd::BorrowedFd;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

const NAMES: [&str; 2] = ["d0", "d1"];

fn two(trace: &Trace) -> Machine {
    builder().devices(NAMES.map(|name| honest(name, trace))).start_blocking().unwrap()
}

/// An honest device, and one that is held where it is told that phase for the first time.
fn held(trace: &Trace, phase: Phase, gate: &Gate) -> MachineBuilder {
    let slow = Script::honest().on_nth(phase, 1, [Step::hold(gate), Step::Ack]);
    builder().device(honest("d0", trace)).device(slow.device("d1", trace).unwrap())
}

fn readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let within = Timespec::try_from(within).unwrap();
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&within)).unwrap() == 1
}

/// Reads events up to the first that is wanted.
fn until(events: &mut Events, wanted: impl Fn(&MachineEvent) -> bool) -> MachineEvent {
    let deadline = Instant::now() + LONG;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = events.recv_timeout(left).unwrap();
        if wanted(&event) {
            return event;
        }
    }
}

fn assert_all_in(machine: &Machine, state: MigrationState) {
    for device in machine.status().unwrap().devices {
        assert_eq!(device.state, Some(state), "{}", device.name);
    }
}

#[test]
fn a_machine_does_all_that_it_does_with_async() {
    let trace = Trace::new().unwrap();
    let machine = builder()
        .devices(NAMES.map(|name| honest(name, &trace)))
        .local_device("local", TracedLocal::new("local", &trace).unwrap())
        .on_loss(LossPolicy::Fail)
        .start_blocking()
        .unwrap();
    machine.declare_ram(tempfile::tempfile().unwrap()).unwrap();
    let stopped = machine.pause().unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    assert_all_in(&machine, MigrationState::Stop);
    let report = stopped.resume().unwrap();
    assert!(report.downtime_ns.is_some());
    assert_all_in(&machine, MigrationState::Running);

    // The guard that is dropped leaves it stopped.
    drop(machine.pause_timeout(LONG).unwrap());
    assert_eq!(machine.status().unwrap().machine, MachineState::Stopped);
    machine.resume_timeout(LONG).unwrap();

    machine.add_device(honest("d2", &trace)).unwrap();
    let mut events = machine.events();
    let pid = machine.status().unwrap().devices[0].pid.unwrap();
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    until(&mut events, |event| matches!(event, MachineEvent::DeviceFenced { .. }));
    machine.restart_device("d0").unwrap();
    assert!(machine.remove_device("d2").unwrap().unwrap().success());
    machine.cancel().unwrap();
    let error = machine.accept_hold().unwrap_err();
    assert!(matches!(error, MachineError::NotHeld(MachineState::Running)), "{error}");
    let exits = machine.shutdown().unwrap();
    assert_eq!(exits.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), NAMES);
    assert!(matches!(machine.status().unwrap_err(), MachineError::Gone));
    assert!(matches!(machine.pause().unwrap_err(), MachineError::Gone));
    assert!(matches!(machine.launch_prepare_stop(LONG).unwrap_err(), MachineError::Gone));
}

/// More calls than a task of a runtime may make before it has to yield.
#[test]
fn inside_a_runtime_calls_and_drops_do_not_panic() {
    let trace = Trace::new().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let processes = runtime.block_on(async {
        let machine = two(&trace);
        let mut events = machine.events();
        for _ in 0..200 {
            machine.status().unwrap();
        }
        let quiet = machine.launch_prepare_stop(LONG).unwrap().join().unwrap();
        quiet.launch_stop().join().unwrap().resume().unwrap();
        assert!(events.recv().is_some());
        Processes::of(&machine.status().unwrap())
    });
    runtime.block_on(processes.assert_gone_within(Duration::from_secs(3)));
}

#[test]
fn other_threads_ask_and_cancel_while_one_waits() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let machine = held(&trace, Phase::PrepareStop, &gate).start_blocking().unwrap();
    let mut events = machine.events();
    let pause = std::thread::spawn({
        let machine = machine.clone();
        move || machine.pause().map(Stopped::leave_stopped)
    });
    until(&mut events, |event| matches!(event, MachineEvent::TransitionBegan { .. }));
    let began = Instant::now();
    assert!(machine.status().unwrap().operation.is_some());
    assert!(matches!(machine.pause().unwrap_err(), MachineError::State { .. }));
    machine.cancel().unwrap();
    let error = pause.join().unwrap().unwrap_err();
    assert_eq!(report_of(&error).outcome, Outcome::RolledBack, "{error}");
    assert!(began.elapsed() < LONG, "nobody waits for the device that is held");
    drop(gate);
}

#[test]
fn who_has_no_patience_gives_up() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let machine = held(&trace, Phase::Stop, &gate).start_blocking().unwrap();
    let error = machine.pause_timeout(Duration::from_millis(50)).unwrap_err();
    assert_eq!(report_of(&error).outcome, Outcome::RolledBack, "{error}");
    assert_all_in(&machine, MigrationState::Running);
    drop(gate);
}

/// With the machine its thread is gone, and with it what the kernel knows of its processes.
#[tokio::test]
async fn when_the_last_handle_is_dropped_the_processes_end() {
    let trace = Trace::new().unwrap();
    let machine = two(&trace);
    let processes = Processes::of(&machine.status().unwrap());
    let stopped = machine.pause().unwrap();
    let mut events = machine.events();
    drop(machine);
    // A guard is a handle; who listens has none.
    assert_eq!(processes.left(), NAMES);
    drop(stopped);
    processes.assert_gone_within(Duration::from_secs(3)).await;
    while events.recv().is_some() {}
}

#[test]
fn events_are_waited_for_by_a_thread_and_by_an_event_loop() {
    let trace = Trace::new().unwrap();
    let description = builder().devices(NAMES.map(|name| honest(name, &trace)));
    let early = description.events();
    let machine = description.start_blocking().unwrap();
    let mut events = machine.read(early);
    assert_eq!(events.recv_timeout(Duration::ZERO).unwrap_err(), RecvTimeoutError::Timeout);
    assert!(events.try_recv().is_none());
    assert!(!readable(events.fd().unwrap(), Duration::ZERO));
    machine.pause().unwrap().leave_stopped();
    assert!(readable(events.fd().unwrap(), LONG));
    assert!(matches!(events.recv(), Some(MachineEvent::TransitionBegan { .. })));
    assert!(matches!(events.recv(), Some(MachineEvent::Transition(_))));
    assert!(!readable(events.fd().unwrap(), Duration::ZERO));
    machine.shutdown().unwrap();
    // Everything that happened until the end is told, though the thread has ended.
    drop(machine);
    let exited = |event: &MachineEvent| matches!(event, MachineEvent::DeviceExited { .. });
    assert_eq!(events.by_ref().filter(exited).count(), 2);
    assert!(readable(events.fd().unwrap(), Duration::ZERO), "the end is for ever");
    assert_eq!(events.recv_timeout(LONG).unwrap_err(), RecvTimeoutError::Disconnected);
}

#[test]
fn four_calls_are_driven_by_an_event_loop() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let machine = held(&trace, Phase::PrepareStop, &gate).start_blocking().unwrap();
    let preparing = machine.launch_prepare_stop(LONG).unwrap();
    assert!(!preparing.is_ready() && !readable(preparing.fd().unwrap(), Duration::ZERO));
    gate.open();
    assert!(readable(preparing.fd().unwrap(), LONG) && preparing.is_ready());
    let quiet = preparing.join().unwrap();
    assert!(trace.received(Phase::Stop).is_empty(), "{}", trace.text());
    let stopping = quiet.launch_stop();
    assert!(readable(stopping.fd().unwrap(), LONG));
    let stopped = stopping.join().unwrap();
    assert_all_in(&machine, MigrationState::Stop);
    let accepting = stopped.launch_prepare_start(LONG).unwrap().join().unwrap();
    assert!(trace.received(Phase::Start).is_empty(), "{}", trace.text());
    let report = accepting.launch_start().join().unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    assert_all_in(&machine, MigrationState::Running);
}

/// Launched and not joined yet, joined, and given up in so many words.
#[test]
fn a_handle_that_is_dropped_gives_the_transition_up() {
    let trace = Trace::new().unwrap();
    let machine = two(&trace);
    let mut events = machine.events();
    let mut rolled_back = || {
        let ended = until(&mut events, |event| matches!(event, MachineEvent::Transition(_)));
        let MachineEvent::Transition(report) = ended else { panic!("{ended}") };
        assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    };
    let launch = || machine.launch_prepare_stop(LONG).unwrap();
    let ready = |preparing: &PreparingStop| assert!(readable(preparing.fd().unwrap(), LONG));

    let unjoined = launch();
    ready(&unjoined);
    drop(unjoined);
    rolled_back();
    drop(launch().join().unwrap());
    rolled_back();
    let quiet: Quiet = launch().join().unwrap();
    assert_eq!(quiet.give_up().unwrap().outcome, Outcome::RolledBack);
    rolled_back();
    assert_all_in(&machine, MigrationState::Running);
    assert!(trace.received(Phase::Stop).is_empty(), "{}", trace.text());
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing() {
    let trace = Trace::new().unwrap();
    let shy = Script::honest().on(Trigger::Hello, [Step::Say("no".into()), Step::Exit(3)]);
    let began = Instant::now();
    let error = builder()
        .device(honest("d0", &trace))
        .device(shy.device("shy", &trace).unwrap())
        .start_blocking()
        .unwrap_err();
    assert!(matches!(error, StartError::Greeting { ref device, .. } if device == "shy"), "{error}");
    let error = builder().device(DeviceSpec::new("none", "/nowhere")).start_blocking().unwrap_err();
    assert!(matches!(error, StartError::Spawn { .. }), "{error}");
    assert!(began.elapsed() < LONG);
}

#[test]
fn a_machine_that_is_kept_is_taken_over() {
    let trace = Trace::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let description = || {
        let devices = NAMES.map(|name| honest(name, &trace).on_loss(LossPolicy::Restart(SOON)));
        builder().devices(devices).keep(folder.path().join("vm"))
    };
    let first = description().start_blocking().unwrap();
    drop(first);
    let TakenOver { machine, report } = description().take_over_blocking().unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    let stopped = machine.pause_timeout(SHORT).unwrap();
    stopped.resume().unwrap();
    machine.shutdown().unwrap();
}
