//! What the tests share.

use rustix::process::Pid;
use standstill_coordinator::report::TransitionReport;
use standstill_coordinator::{Deadlines, DeviceSpec, Machine, MachineError};
use standstill_testkit::{Script, Trace, deadlines_of};
use std::sync::Arc;
use std::time::Duration;

/// The deadline of a device that will miss it.
pub(crate) const SHORT: Duration = Duration::from_millis(600);
/// A deadline that never runs out.
pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) fn deadlines() -> Deadlines {
    deadlines_of(LONG)
}

/// An honest device.
pub(crate) fn honest(name: &str, trace: &Trace) -> DeviceSpec {
    Script::honest().device(name, trace).unwrap()
}

/// The process of a device that the coordinator knows.
pub(crate) async fn pid(machine: &Machine, name: &str) -> Pid {
    let status = machine.status().await.unwrap();
    let device = status.devices.iter().find(|device| device.name == name).unwrap();
    Pid::from_raw(i32::try_from(device.pid.unwrap()).unwrap()).unwrap()
}

/// The report of what did not end as it should.
pub(crate) fn report_of(error: &MachineError) -> &Arc<TransitionReport> {
    match error {
        MachineError::Transition(report) => report,
        other => panic!("not an ended transition: {other}"),
    }
}
