//! What the tests share: machines of scripted devices, and questions about them.

use standstill_coordinator::error::MachineError;
use standstill_coordinator::report::TransitionReport;
use standstill_coordinator::{Deadlines, DeviceSpec, Machine, MachineBuilder, Outcome};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Script, Trace, deadlines_of, within};
use std::sync::Arc;
use std::time::Duration;

/// The deadline of a device in the phase in which it fails.
pub(crate) const SHORT: Duration = Duration::from_millis(600);
/// A deadline that never runs out: everybody keeps it also on a machine with ten times the load.
pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) const PHASES: [Phase; 4] =
    [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start];

pub(crate) fn deadlines() -> Deadlines {
    deadlines_of(LONG)
}

pub(crate) fn builder() -> MachineBuilder {
    MachineBuilder::new("vm").deadlines(deadlines())
}

/// An honest device.
pub(crate) fn honest(name: &str, trace: &Trace) -> DeviceSpec {
    Script::honest().device(name, trace).unwrap()
}

/// Gives a device a short deadline in that phase of either direction.
pub(crate) fn short_in(phase: Phase, device: DeviceSpec) -> DeviceSpec {
    match phase {
        Phase::PrepareStop | Phase::PrepareStart => device.deadlines(SHORT, LONG),
        _ => device.deadlines(LONG, SHORT),
    }
}

pub(crate) async fn start(builder: MachineBuilder) -> Machine {
    within(LONG, "start", builder.start()).await.unwrap()
}

/// `d0` and `d2` are honest, `d1` is not and has a short deadline in that phase.
pub(crate) fn three(trace: &Trace, phase: Phase, rogue: Script) -> MachineBuilder {
    builder()
        .device(honest("d0", trace))
        .device(short_in(phase, rogue.device("d1", trace).unwrap()))
        .device(honest("d2", trace))
}

/// Does what leads to that phase, with a pause before if it belongs to a resume.
pub(crate) async fn until(
    machine: &Machine,
    phase: Phase,
) -> Result<Arc<TransitionReport>, MachineError> {
    let pause = async || {
        let stopped = machine.pause().await?;
        let report = Arc::clone(stopped.report());
        stopped.leave_stopped();
        Ok(report)
    };
    match phase {
        Phase::PrepareStop | Phase::Stop => within(SHORT, "pause", pause()).await,
        _ => {
            within(LONG, "the pause before", pause()).await.unwrap();
            within(SHORT, "resume", machine.resume()).await
        }
    }
}

/// The report of what did not end as it should.
pub(crate) fn report_of(error: &MachineError) -> &Arc<TransitionReport> {
    match error {
        MachineError::Transition(report) => report,
        other => panic!("not an ended transition: {other}"),
    }
}

/// Where a machine is after a transition of that phase was undone.
pub(crate) fn undone(phase: Phase) -> (MachineState, MigrationState) {
    match phase {
        Phase::PrepareStop | Phase::Stop => (MachineState::Running, MigrationState::Running),
        _ => (MachineState::Stopped, MigrationState::Stop),
    }
}

/// The names of those who were fenced, `[]` where the outcome says nothing of it.
pub(crate) fn fenced(report: &TransitionReport) -> Vec<String> {
    match &report.outcome {
        Outcome::Degraded { fenced, .. } | Outcome::Held { fenced, .. } => {
            fenced.iter().map(|(id, _)| report.names.participant(*id)).collect()
        }
        _ => Vec::new(),
    }
}

/// Checks that the machine says of each of these that it is in that state, and that it is what
/// each of them said last.
pub(crate) async fn assert_all_in(
    machine: &Machine,
    trace: &Trace,
    names: &[&str],
    state: MigrationState,
) {
    let status = machine.status().await.unwrap();
    for name in names {
        let device = status.devices.iter().find(|device| device.name == *name).unwrap();
        assert_eq!(device.state, Some(state), "status of {name}:\n{}", trace.text());
        let last = trace.last_state(name).unwrap_or(MigrationState::Running);
        assert_eq!(last, state, "last words of {name}:\n{}", trace.text());
    }
}

/// Checks that the machine is in that state as a whole.
pub(crate) async fn assert_machine(machine: &Machine, expected: MachineState) {
    assert_eq!(machine.status().await.unwrap().machine, expected);
}

/// Removes the devices that are lost, as an owner does who goes on without them.
pub(crate) async fn remove_lost(machine: &Machine) {
    let status = machine.status().await.unwrap();
    // A local device is a part of the VMM.
    let lost = status.devices.into_iter().filter(|d| d.lost.is_some() && d.kind != "local");
    for device in lost {
        within(LONG, "removal", machine.remove_device(&device.name)).await.unwrap();
    }
}

/// Checks that the machine can be stopped and started without those who are lost, wherever it is
/// now; ends with it running.
pub(crate) async fn assert_usable(machine: &Machine) {
    remove_lost(machine).await;
    let report = within(LONG, "resume", machine.resume()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    within(LONG, "resume", stopped.resume()).await.unwrap();
}
