//! What has happened to a machine since it was started or taken over.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use standstill::coordinator::report::TransitionReport;
use standstill::coordinator::{MachineEvent, Operation};
use standstill::protocol::message::Phase;
use standstill::protocol::transition::Loss;
use std::fmt::Write;
use std::time::Duration;

const OPERATIONS: [Operation; 2] = [Operation::Pause, Operation::Resume];
const OUTCOMES: [&str; 5] = ["Done", "RolledBack", "Stopped", "Degraded", "Held"];
const PHASES: [Phase; 4] = [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start];
const LOSSES: [Loss; 6] =
    [Loss::Timeout, Loss::Exited, Loss::Disconnected, Loss::Protocol, Loss::Refused, Loss::Hung];

/// A label value: the text of something, escaped, which the encoder does not do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Text<T>(pub(super) T);

impl<T: std::fmt::Display> EncodeLabelValue for Text<T> {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(&escaped(&self.0.to_string()))
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    operation: Text<Operation>,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    operation: Text<Operation>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct In {
    phase: Text<Phase>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLoss {
    device: Text<String>,
    reason: &'static str,
}

/// The labels of what is counted for one device.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Device {
    device: Text<String>,
}

impl Device {
    pub(super) fn new(device: &str) -> Self {
        Self { device: Text(device.to_owned()) }
    }
}

/// Histograms of times.
#[derive(Clone, Debug)]
struct Times;

impl MetricConstructor<Histogram> for Times {
    /// From 100 µs to 13 s, each twice the one before.
    fn new_metric(&self) -> Histogram {
        Histogram::new(exponential_buckets(1e-4, 2.0, 18))
    }
}

/// What has happened so far.
#[derive(Debug)]
pub(super) struct Totals {
    registry: Registry,
    transitions: Family<Ended, Counter>,
    durations: Family<Of, Histogram, Times>,
    phases: Family<In, Histogram, Times>,
    downtime: Histogram,
    losses: Family<DeviceLoss, Counter>,
    fences: Family<Device, Counter>,
    unproven: Family<Device, Counter>,
    attempts: Family<Device, Counter>,
    failed: Family<Device, Counter>,
    exhausted: Family<Device, Counter>,
    missed: Counter,
}

/// An empty registry of a machine's metrics.
pub(super) fn registry(machine: &str) -> Registry {
    let labels = [("machine".into(), escaped(machine).into())];
    Registry::with_prefix_and_labels("standstill", labels.into_iter())
}

impl Totals {
    /// Nothing has happened yet.
    pub(super) fn new(machine: &str) -> Self {
        let mut totals = Self {
            registry: registry(machine),
            transitions: Family::default(),
            durations: Family::new_with_constructor(Times),
            phases: Family::new_with_constructor(Times),
            // From 1 ms to 4 minutes, each four times the one before.
            downtime: Histogram::new(exponential_buckets(1e-3, 4.0, 10)),
            losses: Family::default(),
            fences: Family::default(),
            unproven: Family::default(),
            attempts: Family::default(),
            failed: Family::default(),
            exhausted: Family::default(),
            missed: Counter::default(),
        };
        totals.register();
        totals
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        let seconds = || Unit::Seconds;
        registry.register(
            "transitions",
            "Transitions of the machine that have ended",
            self.transitions.clone(),
        );
        let help = "Time of a transition from the request to its outcome";
        registry.register_with_unit("transition_duration", help, seconds(), self.durations.clone());
        let help = "Time of a phase from its first command to its last answer, without the time \
                    for evidence; only where all have answered";
        registry.register_with_unit("phase_duration", help, seconds(), self.phases.clone());
        let help = "Time from the beginning of a pause to the end of the resume after it";
        registry.register_with_unit("downtime", help, seconds(), self.downtime.clone());
        registry.register("device_losses", "Losses of the device", self.losses.clone());
        let help = "Fences of the device that were proven";
        registry.register("device_fences", help, self.fences.clone());
        let help = "Fences of the device that were not proven in time";
        registry.register("device_unproven_fences", help, self.unproven.clone());
        let help = "Attempts to start the lost device again";
        registry.register("device_restart_attempts", help, self.attempts.clone());
        let help = "Attempts to start the device that have failed";
        registry.register("device_start_failures", help, self.failed.clone());
        let help = "How often the restarts of the device were given up";
        registry.register("device_restarts_exhausted", help, self.exhausted.clone());
        let help = "Events that are in none of these numbers, since there were too many at once";
        registry.register("events_missed", help, self.missed.clone());
        // A rate needs a zero to begin from.
        for operation in OPERATIONS.map(Text) {
            for outcome in OUTCOMES {
                let operation = operation.clone();
                let _ = self.transitions.get_or_create(&Ended { operation, outcome });
            }
            let _ = self.durations.get_or_create(&Of { operation });
        }
        for phase in PHASES.map(Text) {
            let _ = self.phases.get_or_create(&In { phase });
        }
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// An event has happened.
    pub(super) fn count(&self, event: &MachineEvent) {
        let one = |family: &Family<Device, Counter>, device: &str| {
            family.get_or_create(&Device::new(device)).inc();
        };
        match event {
            MachineEvent::Transition(report) => self.ended(report),
            MachineEvent::DeviceLost { device, loss, .. } => {
                let (device, reason) = (Text(device.clone()), reason(*loss));
                let labels = DeviceLoss { device, reason };
                self.losses.get_or_create(&labels).inc();
            }
            MachineEvent::DeviceFenced { device, .. } => one(&self.fences, device),
            MachineEvent::FenceUnproven { device, .. } => one(&self.unproven, device),
            MachineEvent::DeviceRestarting { device, .. } => one(&self.attempts, device),
            MachineEvent::DeviceNotRestarted { device, .. }
            | MachineEvent::DeviceNotStarted { device, .. } => one(&self.failed, device),
            MachineEvent::DeviceRestartsExhausted { device, .. } => one(&self.exhausted, device),
            MachineEvent::DeviceRemoved { device, .. } => self.forget(device),
            MachineEvent::Missed { events } => {
                self.missed.inc_by(*events);
            }
            _ => {}
        }
    }

    fn ended(&self, report: &TransitionReport) {
        let operation = Text(report.operation);
        let outcome = report.outcome.name();
        self.transitions.get_or_create(&Ended { operation: operation.clone(), outcome }).inc();
        self.durations.get_or_create(&Of { operation }).observe(seconds(report.total_ns));
        for phase in PHASES {
            if let Some(ns) = report.barrier_ns(phase) {
                self.phases.get_or_create(&In { phase: Text(phase) }).observe(seconds(ns));
            }
        }
        if let Some(ns) = report.downtime_ns {
            self.downtime.observe(seconds(ns));
        }
    }

    /// A device that was removed has no metrics any more.
    fn forget(&self, device: &str) {
        for loss in LOSSES {
            let (device, reason) = (Text(device.to_owned()), reason(loss));
            self.losses.remove(&DeviceLoss { device, reason });
        }
        let labels = Device::new(device);
        for family in [&self.fences, &self.unproven, &self.attempts, &self.failed, &self.exhausted]
        {
            family.remove(&labels);
        }
    }
}

fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

fn reason(loss: Loss) -> &'static str {
    match loss {
        Loss::Timeout => "timeout",
        Loss::Exited => "exited",
        Loss::Disconnected => "disconnected",
        Loss::Protocol => "protocol",
        Loss::Refused => "refused",
        Loss::Hung => "hung",
    }
}
