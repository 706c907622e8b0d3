//! An engine whose data thread hangs while its control thread is healthy, and one that hangs as a
//! whole.

use crate::driver::Engine;
use crate::machine::{ENGINES, Guest, LONG, deadlines, pid, until};
use crate::tracer::Tracer;
use nix::sys::wait::WaitStatus;
use rustix::process::{Signal, kill_process};
use standstill::coordinator::process::Exit;
use standstill::coordinator::{
    Deadlines, Events, Hang, Machine, MachineBuilder, MachineEvent, Outcome,
};
use standstill::device_proc::devices::copy_engine::KIND;
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::protocol::migration::MigrationState;
use standstill::protocol::transition::Loss;
use std::time::Duration;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// The one that hangs.
const HANGS: usize = 1;
const BEAT: Duration = Duration::from_millis(100);
const STALL: Duration = Duration::from_secs(3);
const SILENCE: Duration = Duration::from_secs(3);
/// Longer than either.
const QUIET: Duration = Duration::from_secs(4);
/// How long an engine may take to answer its client before its thread is stopped somewhere else.
const ANSWER: Duration = Duration::from_millis(500);

fn watched(guest: &Guest, limits: Deadlines) -> MachineBuilder {
    guest.description.builder().deadlines(limits).heartbeat(BEAT)
}

/// What happens next, other than what devices themselves tell, as that they have a client.
async fn next(events: &mut Events) -> MachineEvent {
    loop {
        let event = events.recv().await.unwrap();
        if !matches!(event, MachineEvent::Device { .. }) {
            return event;
        }
    }
}

/// Nothing happens to any device for so long.
async fn assert_quiet(machine: &Machine, time: Duration) {
    let mut events = machine.events();
    let event = timeout(time, next(&mut events)).await;
    assert!(event.is_err(), "{event:?}");
}

/// Stops the data thread of an engine at work, and no other thread of it.
///
/// A thread that is stopped while it has the lock of the registers stops whoever reads them, and
/// with that the control thread: only where the client still has its answers is it the data thread
/// alone.
async fn stop_data_thread(guest: &mut Guest, machine: &Machine) -> Tracer {
    let mut tracer = Tracer::stop(pid(machine, HANGS).await, KIND);
    loop {
        tracer.stopped().await;
        let mut engine = guest.engines.remove(HANGS);
        let mut read = spawn_blocking(move || (engine.read(STATUS), engine));
        let answered = timeout(ANSWER, &mut read).await;
        let alone = answered.is_ok();
        let answer = match answered {
            Ok(answer) => answer,
            Err(_) => {
                tracer.run();
                read.await
            }
        };
        let (status, engine) = answer.unwrap();
        assert_eq!(status, STATUS_BUSY, "it has work");
        guest.engines.insert(HANGS, engine);
        if alone {
            return tracer;
        }
        guest.assert_writing(&[HANGS]).await;
        tracer.stop_again();
    }
}

/// What happens until the one that hangs counts again: it was hung, lost by that, fenced and
/// restarted, and of the others nothing is said.
async fn hung_and_restarted(guest: &Guest, events: &mut Events) -> (Hang, Exit) {
    let name = guest.description.device(HANGS);
    let (mut kinds, mut how, mut end) = (Vec::new(), None, None);
    while kinds.last() != Some(&"joined") {
        let event = timeout(LONG, next(events)).await.unwrap();
        let (device, kind) = match &event {
            MachineEvent::DeviceHung { device, incarnation: 1, hang } => {
                how = Some(*hang);
                (device, "hung")
            }
            MachineEvent::DeviceLost { device, loss: Loss::Hung, during: None, .. } => {
                (device, "lost")
            }
            MachineEvent::DeviceExited { device, incarnation: 1, exit } => {
                end = Some(*exit);
                (device, "exited")
            }
            MachineEvent::DeviceFenced { device, incarnation: 1, .. } => (device, "fenced"),
            MachineEvent::DeviceRestarting { device, .. } => (device, "restarting"),
            MachineEvent::DeviceJoined { device, incarnation: 2, state, .. } => {
                assert_eq!(*state, MigrationState::Running);
                (device, "joined")
            }
            other => panic!("{other:?} after {kinds:?}"),
        };
        assert_eq!(*device, name, "{event:?} after {kinds:?}");
        kinds.push(kind);
    }
    assert_eq!(kinds, ["hung", "lost", "exited", "fenced", "restarting", "joined"]);
    (how.unwrap(), end.unwrap())
}

async fn pause_and_resume(machine: &Machine) {
    let stopped = machine.pause().await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    assert_eq!(stopped.report().participants.len(), ENGINES);
    let report = stopped.resume().await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
}

#[tokio::test]
async fn an_engine_whose_data_thread_stands_hangs_and_neither_an_idle_nor_a_busy_one_does() {
    let mut guest = Guest::new("data");
    let machine = watched(&guest, Deadlines { stall: STALL, ..deadlines() }).start().await.unwrap();
    machine.declare_ram(&guest.ram).await.unwrap();
    guest.connect();
    // The last one is never given anything to do.
    guest.start(0);
    guest.start(HANGS);
    guest.assert_writing(&[0, HANGS]).await;
    assert_quiet(&machine, QUIET).await;
    guest.assert_writing(&[0, HANGS]).await;
    assert_eq!(guest.engines[2].read(CONTROL), 0);

    let mut events = machine.events();
    let tracer = stop_data_thread(&mut guest, &machine).await;
    let written = guest.written(HANGS, 2);
    let end = tracer.for_good();
    let (hang, exit) = hung_and_restarted(&guest, &mut events).await;
    assert!(matches!(hang, Hang::Data { standing } if standing >= STALL), "{hang:?}");
    let exit_of_thread = match end.await {
        WaitStatus::Exited(_, code) => Exit::Code(code),
        WaitStatus::Signaled(_, signal, core_dumped) => {
            Exit::Signal { signal: signal as i32, core_dumped }
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(exit_of_thread, exit);
    // Its control thread is well, and was not left the time to exit by itself.
    assert!(exit.is_kill(), "{exit}");
    // It has done nothing more.
    assert_eq!(guest.written(HANGS, 2), written);

    // The one that was busy halts, as its window onto what hung is gone: that is no hang either.
    until("it has halted", || guest.engines[0].read(STATUS) & STATUS_HALTED != 0).await;
    guest.engines[HANGS] = Engine::connect(&guest.description.socket(HANGS));
    guest.wire(HANGS);
    assert_quiet(&machine, QUIET).await;
    for peer in [0, 2] {
        guest.map_peer(peer, HANGS);
    }
    for number in 0..ENGINES {
        guest.start(number);
    }
    guest.assert_writing(&[0, 1, 2]).await;
    pause_and_resume(&machine).await;
    guest.assert_writing(&[0, 1, 2]).await;
    machine.shutdown().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_is_stopped_as_a_whole_hangs_also_on_an_idle_machine() {
    let mut guest = Guest::new("whole");
    let limits = Deadlines { stall: STALL, silence: SILENCE, ..deadlines() };
    let machine = watched(&guest, limits).start().await.unwrap();
    machine.declare_ram(&guest.ram).await.unwrap();
    guest.connect();
    assert_quiet(&machine, QUIET).await;
    let mut events = machine.events();
    kill_process(pid(&machine, HANGS).await, Signal::STOP).unwrap();
    let (hang, exit) = hung_and_restarted(&guest, &mut events).await;
    assert!(matches!(hang, Hang::Control { silent } if silent >= SILENCE), "{hang:?}");
    assert!(exit.is_kill(), "{exit}");
    pause_and_resume(&machine).await;
    machine.shutdown().await.unwrap();
}
