//! Who watches the machine beside its operators: a trace file, a metrics endpoint.

use super::RunError;
use super::output::Output;
use crate::machine_file::Beginning;
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
    /// They watch that machine from now on, and know what has happened before. One that cannot begin is
    /// an error at a start; a machine that was taken over does without it.
    pub(super) async fn watch(
        self,
        machine: &Machine,
        readers: Readers,
        output: &Output,
        beginning: Beginning,
    ) -> Result<Observers, RunError> {
        let system = |what| move |source| RunError::System { what, source };
        let Readers(for_trace, for_metrics) = readers;
        let trace = match self.trace {
            Some(opened) => {
                let failed = |source| RunError::Machine { what: "status".to_owned(), source };
                let begun = match machine.status().await.map_err(failed) {
                    Ok(status) => {
                        opened.follow(&status, for_trace).map_err(system("start the trace"))
                    }
                    Err(error) => Err(error),
                };
                needed(begun, beginning)?
            }
            None => None,
        };
        let endpoint = match self.metrics {
            Some(bound) => {
                let url = bound.url();
                let served = bound.serve(machine.clone(), for_metrics, self.log);
                let served = needed(served.map_err(system("serve metrics")), beginning)?;
                if served.is_some() {
                    output.say(&format!("metrics: {url}"));
                }
                served
            }
            None => None,
        };
        Ok(Observers { trace, _endpoint: endpoint })
    }
}

/// What cannot begin is an error at a start. To whoever takes a machine over its devices matter more, which
/// run already.
fn needed<T>(begun: Result<T, RunError>, beginning: Beginning) -> Result<Option<T>, RunError> {
    match (begun, beginning) {
        (Ok(begun), _) => Ok(Some(begun)),
        (Err(error), Beginning::Start) => Err(error),
        (Err(error), Beginning::TakeOver) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "the machine that was taken over is not watched");
            Ok(None)
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn an_observer_that_cannot_begin_ends_no_machine_that_was_taken_over() {
        let failed = || {
            let source = io::Error::from(rustix::io::Errno::MFILE);
            Err::<(), _>(RunError::System { what: "serve metrics", source })
        };
        assert!(matches!(needed(failed(), Beginning::TakeOver), Ok(None)));
        assert!(matches!(needed(failed(), Beginning::Start), Err(RunError::System { .. })));
        assert!(matches!(needed(Ok(()), Beginning::TakeOver), Ok(Some(()))));
    }
}
