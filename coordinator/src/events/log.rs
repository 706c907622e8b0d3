//! Every event is a line of the log: its text, with who and when as fields.
//!
//! The fields have the same names everywhere: `device`, `incarnation`, `term`, `epoch`, `phase`,
//! `operation`. Times are nanoseconds (`…_ns`).

use super::MachineEvent;
use crate::report::TransitionReport;
use standstill_protocol::message::{Epoch, Phase, Term};
use tracing::Level;

/// The target of all that is told of a machine.
pub(crate) const TARGET: &str = "standstill::machine";

/// Writes the line of an event that happens now.
pub(crate) fn log(event: &MachineEvent, term: Term, epoch: Epoch) {
    if let MachineEvent::Transition(report) = event {
        return log_report(report);
    }
    let (device, incarnation) = (event.device(), event.incarnation());
    let (term, epoch) = (term.0, epoch.0);
    macro_rules! line {
        ($level:ident) => {
            tracing::event!(target: TARGET, Level::$level, device, incarnation, term, epoch, "{event}")
        };
    }
    match level(event) {
        Level::ERROR => line!(ERROR),
        Level::WARN => line!(WARN),
        Level::INFO => line!(INFO),
        Level::DEBUG => line!(DEBUG),
        Level::TRACE => line!(TRACE),
    }
}

/// How much an event matters to an operator.
fn level(event: &MachineEvent) -> Level {
    match event {
        MachineEvent::FenceUnproven { .. }
        | MachineEvent::DeviceRestartsExhausted { .. }
        | MachineEvent::HoldBegan { .. } => Level::ERROR,
        MachineEvent::DeviceLost { .. }
        | MachineEvent::DeviceHung { .. }
        | MachineEvent::DeviceNotRestarted { .. }
        | MachineEvent::DeviceNotStarted { .. }
        | MachineEvent::Superseded { .. }
        | MachineEvent::Missed { .. } => Level::WARN,
        MachineEvent::TransitionBegan { .. }
        | MachineEvent::Transition(_)
        | MachineEvent::DeviceFenced { .. }
        | MachineEvent::DeviceRestarting { .. }
        | MachineEvent::DeviceJoined { .. }
        | MachineEvent::DeviceRemoved { .. }
        | MachineEvent::HoldEnded { .. } => Level::INFO,
        // A loss or a removal tells the same.
        MachineEvent::DeviceExited { .. } | MachineEvent::Device { .. } => Level::DEBUG,
    }
}

/// How a transition ended, what went wrong, and how long its phases took.
fn log_report(report: &TransitionReport) {
    let (term, epoch) = (report.term.0, report.last_epoch.0);
    let operation = report.operation;
    for phase in [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start] {
        if let Some(barrier_ns) = report.barrier_ns(phase) {
            let epoch = report.first_epoch.0;
            tracing::debug!(target: TARGET, %operation, term, epoch, %phase, barrier_ns, "all have answered");
        }
    }
    for line in report.failure_lines() {
        tracing::warn!(target: TARGET, %operation, term, epoch, "{line}");
    }
    tracing::info!(target: TARGET, %operation,
        term,
        epoch,
        outcome = report.outcome.name(),
        state = %report.machine,
        total_ns = report.total_ns,
        downtime_ns = report.downtime_ns,
        "transition ended"
    );
}
