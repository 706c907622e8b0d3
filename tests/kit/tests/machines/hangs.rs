//! Devices that hang are told from devices that have nothing to do.

use crate::fixture::{LONG, builder, deadlines, honest, start};
use crate::supervised::{
    assert_whole_and_end, events_until, kinds, restarted, signal, until_joined,
};
use rustix::process::Signal;
use standstill_coordinator::{Deadlines, Events, Hang, Machine, MachineBuilder, MachineEvent};
use standstill_protocol::transition::Loss;
use standstill_testkit::{Pulse, Script, Step, Trace, Trigger};
use std::time::Duration;

const BEAT: Duration = Duration::from_millis(100);
const STALL: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(3);

fn watched() -> MachineBuilder {
    let limits = Deadlines { stall: STALL, silence: SILENCE, ..deadlines() };
    builder().deadlines(limits).heartbeat(BEAT)
}

/// A device whose signs of life say that of its data threads.
fn pulse(pulse: Pulse) -> Script {
    Script::honest().progress().on(Trigger::Welcome, [Step::Pulse(pulse)])
}

async fn hung(events: &mut Events) -> (String, Hang, Vec<MachineEvent>) {
    let is = |event: &MachineEvent| matches!(event, MachineEvent::DeviceHung { .. });
    let seen = events_until(events, "a hang", is).await;
    match seen.last().cloned() {
        Some(MachineEvent::DeviceHung { device, hang, .. }) => (device, hang, seen),
        other => panic!("{other:?}"),
    }
}

/// Nothing is said of any hang for so long.
async fn nobody_hangs(machine: &Machine, time: Duration) {
    let mut events = machine.events();
    let hang = tokio::time::timeout(time, hung(&mut events)).await;
    assert!(hang.is_err(), "{hang:?}");
}

#[tokio::test]
async fn data_threads_that_do_not_do_what_there_is_to_do_hang() {
    let trace = Trace::new().unwrap();
    let hangs =
        pulse(Pulse::Working).on_in(1, Trigger::Memory, [Step::Ack, Step::Pulse(Pulse::Hanging)]);
    let machine = start(
        watched()
            .device(pulse(Pulse::Idle).device("idle", &trace).unwrap())
            .device(pulse(Pulse::Working).device("works", &trace).unwrap())
            // It does not tell its progress, so what it says of it means nothing.
            .device(
                Script::honest()
                    .on(Trigger::Welcome, [Step::Pulse(Pulse::Hanging)])
                    .device("silent", &trace)
                    .unwrap(),
            )
            .device(restarted(hangs, "hangs", &trace)),
    )
    .await;
    nobody_hangs(&machine, STALL * 2).await;
    let mut events = machine.events();
    machine.declare_ram(tempfile::tempfile().unwrap()).await.unwrap();
    let (device, hang, _) = hung(&mut events).await;
    assert_eq!(device, "hangs");
    assert!(matches!(hang, Hang::Data { standing } if standing >= STALL), "{hang:?}");
    let (seen, incarnation) = until_joined(&mut events, "hangs").await;
    assert_eq!(incarnation, 2);
    let loss = seen.iter().find_map(|event| match event {
        MachineEvent::DeviceLost { loss, .. } => Some(*loss),
        _ => None,
    });
    assert_eq!(loss, Some(Loss::Hung), "{seen:?}");
    assert_whole_and_end(&machine, &trace, 4).await;
}

/// A device that is stopped makes no progress, whatever there is to do.
#[tokio::test]
async fn a_stopped_device_does_not_hang() {
    let trace = Trace::new().unwrap();
    let machine = start(watched().device(restarted(pulse(Pulse::Hanging), "d0", &trace))).await;
    let stopped = machine.pause().await.unwrap();
    nobody_hangs(&machine, STALL * 2).await;
    let mut events = machine.events();
    stopped.resume().await.unwrap();
    // Now it is expected to.
    let (device, hang, _) = hung(&mut events).await;
    assert!(device == "d0" && matches!(hang, Hang::Data { .. }), "{hang:?}");
}

#[tokio::test]
async fn a_process_that_is_stopped_by_a_signal_hangs_also_when_it_is_idle() {
    let trace = Trace::new().unwrap();
    let machine = start(watched().device(honest("d0", &trace)).device(restarted(
        Script::honest(),
        "frozen",
        &trace,
    )))
    .await;
    let mut events = machine.events();
    signal(&machine, "frozen", Signal::STOP).await;
    let (device, hang, mut seen) = hung(&mut events).await;
    assert_eq!(device, "frozen");
    assert!(matches!(hang, Hang::Control { silent } if silent >= SILENCE), "{hang:?}");
    let (rest, _) = until_joined(&mut events, "frozen").await;
    seen.extend(rest);
    let order = kinds(&seen, "frozen");
    assert_eq!(order, ["hung", "lost", "exited", "fenced", "restarting", "joined"], "{seen:?}");
    assert_whole_and_end(&machine, &trace, 2).await;
}

#[tokio::test]
async fn without_signs_of_life_nobody_hangs() {
    let trace = Trace::new().unwrap();
    let limits = Deadlines { stall: BEAT, silence: BEAT, ..deadlines() };
    let machine =
        start(builder().deadlines(limits).heartbeat(Duration::ZERO).device(honest("d0", &trace)))
            .await;
    nobody_hangs(&machine, Duration::from_secs(1)).await;
    assert!(LONG > SILENCE);
    assert_whole_and_end(&machine, &trace, 1).await;
}
