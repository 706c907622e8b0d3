//! Who watches the machine beside its operators: a trace file, a metrics endpoint.

use super::RunError;
use super::output::Output;
use crate::metrics::{Bound, Endpoint, MetricsArgs};
use crate::trace::{Opened, Trace, TraceArgs};
use clap::Args;
use standstill::coordinator::{Events, Machine, MachineBuilder};
use tracing_appender::non_blocking::ErrorCounter;

/// Who is to watch.
#[derive(Args, Clone, Debug)]
pub(super) struct ObserverArgs {
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

impl ObserverArgs {
    /// Takes what they need: a file, an address. `log` counts the dropped lines of the log.
    pub(super) fn prepare(&self, machine: &str, log: ErrorCounter) -> Result<Prepared, RunError> {
        let trace = self.trace.open(machine)?;
        Ok(Prepared { trace, metrics: self.metrics.bind()?, log })
    }
}

/// Observers of a machine that is still to begin.
#[derive(Debug)]
pub(super) struct Prepared {
    trace: Option<Opened>,
    metrics: Option<Bound>,
    log: ErrorCounter,
}

/// What happens to a machine from before its beginning: a reader for each observer.
pub(super) struct Readers(Events, Events);

impl Readers {
    pub(super) fn of(builder: &MachineBuilder) -> Self {
        Self(builder.events(), builder.events())
    }
}

impl Prepared {
    /// They watch that machine from now on, and know what has happened before.
    pub(super) async fn watch(
        self,
        machine: &Machine,
        readers: Readers,
        output: &Output,
    ) -> Result<Observers, RunError> {
        let system = |what| move |source| RunError::System { what, source };
        let Readers(for_trace, for_metrics) = readers;
        let trace = match self.trace {
            Some(opened) => {
                let failed = |source| RunError::Machine { what: "status".to_owned(), source };
                let status = machine.status().await.map_err(failed)?;
                Some(opened.follow(&status, for_trace).map_err(system("start the trace"))?)
            }
            None => None,
        };
        let endpoint = match self.metrics {
            Some(bound) => {
                output.say(&format!("metrics: {}", bound.url()));
                let served = bound.serve(machine.clone(), for_metrics, self.log);
                Some(served.map_err(system("serve metrics"))?)
            }
            None => None,
        };
        Ok(Observers { trace, _endpoint: endpoint })
    }
}

/// Observers at work.
#[derive(Debug)]
pub(super) struct Observers {
    trace: Option<Trace>,
    _endpoint: Option<Endpoint>,
}

impl Observers {
    /// What has happened by now is told, and nothing more.
    pub(super) async fn finish(self) {
        if let Some(trace) = self.trace {
            trace.finish().await;
        }
    }
}
