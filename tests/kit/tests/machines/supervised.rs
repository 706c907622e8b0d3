//! What the tests of supervision share: policies that do not wait, and questions to the events.

use crate::fixture::LONG;
use rustix::process::{Pid, Signal, kill_process};
use standstill_coordinator::{
    DeviceSpec, DeviceStanding, DeviceStatus, Events, LossPolicy, Machine, MachineEvent,
    RestartPolicy,
};
use standstill_testkit::{Processes, Script, Trace, within};
use std::time::Duration;

/// Five restarts, soon.
pub(crate) const SOON: RestartPolicy = RestartPolicy {
    budget: 5,
    window: Duration::from_secs(3600),
    first_backoff: Duration::from_millis(1),
    longest_backoff: Duration::from_millis(10),
};

/// A device that is restarted when it is lost.
pub(crate) fn restarted(script: Script, name: &str, trace: &Trace) -> DeviceSpec {
    script.device(name, trace).unwrap().on_loss(LossPolicy::Restart(SOON))
}

pub(crate) async fn device(machine: &Machine, name: &str) -> DeviceStatus {
    let status = machine.status().await.unwrap();
    status.devices.into_iter().find(|device| device.name == name).unwrap()
}

/// Sends a signal to the present process of a device.
pub(crate) async fn signal(machine: &Machine, name: &str, signal: Signal) {
    let pid = device(machine, name).await.pid.unwrap();
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// Reads events up to the first that is wanted, which is the last of what it gives.
pub(crate) async fn events_until(
    events: &mut Events,
    what: &str,
    wanted: impl Fn(&MachineEvent) -> bool,
) -> Vec<MachineEvent> {
    let mut seen = Vec::new();
    loop {
        seen.push(within(LONG, what, events.recv()).await.unwrap());
        if seen.last().is_some_and(&wanted) {
            return seen;
        }
    }
}

/// Reads events until that device has joined; gives all of them and its incarnation.
pub(crate) async fn until_joined(events: &mut Events, name: &str) -> (Vec<MachineEvent>, u64) {
    let joined = |event: &MachineEvent| matches!(event, MachineEvent::DeviceJoined { device, .. } if device == name);
    let seen = events_until(events, "the device to join", joined).await;
    match seen.last() {
        Some(MachineEvent::DeviceJoined { incarnation, .. }) => {
            let incarnation = *incarnation;
            (seen, incarnation)
        }
        other => panic!("{other:?}"),
    }
}

/// The kinds of events about a device, in order.
pub(crate) fn kinds(events: &[MachineEvent], name: &str) -> Vec<&'static str> {
    let kind = |event: &MachineEvent| {
        let (device, kind) = match event {
            MachineEvent::DeviceLost { device, .. } => (device, "lost"),
            MachineEvent::DeviceHung { device, .. } => (device, "hung"),
            MachineEvent::DeviceExited { device, .. } => (device, "exited"),
            MachineEvent::DeviceFenced { device, .. } => (device, "fenced"),
            MachineEvent::FenceUnproven { device, .. } => (device, "unproven"),
            MachineEvent::DeviceRestarting { device, .. } => (device, "restarting"),
            MachineEvent::DeviceJoined { device, .. } => (device, "joined"),
            MachineEvent::DeviceRestartsExhausted { device, .. } => (device, "exhausted"),
            MachineEvent::DeviceNotRestarted { device, .. } => (device, "not restarted"),
            MachineEvent::DeviceNotStarted { device, .. } => (device, "not started"),
            MachineEvent::DeviceRemoved { device, .. } => (device, "removed"),
            _ => return None,
        };
        (device == name).then_some(kind)
    };
    events.iter().filter_map(kind).collect()
}

/// All devices count, the machine stops and starts, and its end leaves no process of any
/// incarnation.
pub(crate) async fn assert_whole_and_end(machine: &Machine, trace: &Trace, count: usize) {
    let status = machine.status().await.unwrap();
    let ready = status.devices.iter().filter(|d| d.standing == DeviceStanding::Ready).count();
    assert_eq!((ready, status.devices.len()), (count, count), "{status:?}");
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().participants.len(), count, "{}", stopped.report());
    let report = within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(report.outcome.name(), "Done", "{report}");
    assert_eq!(report.participants.len(), count, "{report}");
    assert_nothing_left(machine, trace).await;
}

/// The end of the machine leaves no process of any incarnation.
pub(crate) async fn assert_nothing_left(machine: &Machine, trace: &Trace) {
    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
    Processes::of_trace(trace).assert_gone_within(Duration::ZERO).await;
}
