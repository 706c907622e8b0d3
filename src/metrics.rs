//! `--metrics ADDR`: what a machine does as numbers, for Prometheus, over HTTP.
//!
//! - [`totals`]: what has happened, counted from the machine's events;
//! - [`present`]: where everything is, asked at each scrape;
//! - [`server`]: hands both out.
//!
//! All of it is on a thread of its own with a runtime of its own: whatever clients do there, the
//! coordinator's thread has its time for the machine.

mod present;
mod server;
#[cfg(test)]
mod tests;
mod totals;

use clap::Args;
use standstill::coordinator::{Events, Machine, Status};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::oneshot;
use totals::Totals;
use tracing_appender::non_blocking::ErrorCounter;

/// How long the machine has for its answer to a scrape. It answers at once, whatever it does.
const ANSWER: Duration = Duration::from_secs(2);

/// Whether there is a metrics endpoint.
#[derive(Args, Clone, Debug)]
pub(crate) struct MetricsArgs {
    /// Serve metrics for Prometheus at this address, such as 127.0.0.1:9464 (path /metrics);
    /// whoever reaches it may read them
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics: Option<SocketAddr>,
}

/// The endpoint cannot be made.
#[derive(Debug, Error)]
#[error("cannot serve metrics at {address}")]
pub(crate) struct MetricsError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

impl MetricsArgs {
    /// Takes the address, if one is wanted. Before the machine is started, so that nothing is begun
    /// that cannot be had.
    pub(crate) fn bind(&self) -> Result<Option<Bound>, MetricsError> {
        let Some(address) = self.metrics else { return Ok(None) };
        let bound = TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(Bound { address: listener.local_addr()?, listener })
        });
        bound.map(Some).map_err(|source| MetricsError { address, source })
    }
}

/// An endpoint without a machine: clients wait.
#[derive(Debug)]
pub(crate) struct Bound {
    listener: TcpListener,
    address: SocketAddr,
}

impl Bound {
    /// Where the metrics are.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/metrics", self.address)
    }

    /// Serves the metrics of that machine until the machine is gone or the result is dropped.
    /// `events` are to be those from its beginning.
    pub(crate) fn serve(
        self,
        machine: Machine,
        mut events: Events,
        log: ErrorCounter,
    ) -> io::Result<Endpoint> {
        let Self { listener, .. } = self;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let serve = async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let name = machine.status().await.map_or_else(|_| String::new(), |s| s.name);
            let page = Arc::new(Page { machine, totals: Mutex::new(Totals::new(&name)), log });
            let serving = tokio::spawn(server::serve(listener, Arc::clone(&page)));
            let counting = async {
                while let Some(event) = events.recv().await {
                    page.totals().count(&event);
                }
            };
            tokio::select! {
                () = counting => {}
                _ = stopped => {}
            }
            serving.abort();
            Ok::<_, io::Error>(())
        };
        std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
            if let Err(error) = runtime.block_on(serve) {
                tracing::error!(%error, "no metrics are served");
            }
        })?;
        Ok(Endpoint { _stop: stop })
    }
}

/// The endpoint of a machine, until it is dropped.
#[derive(Debug)]
#[must_use = "the endpoint ends when it is dropped"]
pub(crate) struct Endpoint {
    _stop: oneshot::Sender<()>,
}

/// What is served.
struct Page {
    machine: Machine,
    totals: Mutex<Totals>,
    log: ErrorCounter,
}

impl Page {
    fn totals(&self) -> std::sync::MutexGuard<'_, Totals> {
        // Nothing in there panics half done.
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All metrics as text; `None` if the machine is gone.
    async fn text(&self) -> Option<String> {
        let status = tokio::time::timeout(ANSWER, self.machine.status()).await.ok()?.ok()?;
        let dropped = u64::try_from(self.log.dropped_lines()).unwrap_or(u64::MAX);
        text(&self.totals(), &status, dropped).ok()
    }
}

/// All metrics, in the text format of `OpenMetrics`.
fn text(totals: &Totals, status: &Status, dropped: u64) -> Result<String, std::fmt::Error> {
    use prometheus_client::encoding::text::{encode_eof, encode_registry};
    let mut text = String::new();
    encode_registry(&mut text, totals.registry())?;
    encode_registry(&mut text, &present::registry(status, dropped))?;
    encode_eof(&mut text)?;
    Ok(text)
}
