//! `--trace FILE`: writes what happens to a machine as a trace file, on a thread of its own, so that
//! a slow disk holds nothing up.

use clap::Args;
use standstill::coordinator::trace_file::TraceFile;
use standstill::coordinator::{Events, Status};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// How long the last events may take to be written.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where the trace goes.
#[derive(Args, Clone, Debug)]
pub(crate) struct TraceArgs {
    /// Write when everything happened, in all processes, as a trace for ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
}

/// The trace file cannot be made.
#[derive(Debug, Error)]
#[error("cannot write the trace {}", path.display())]
pub(crate) struct TraceError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl TraceArgs {
    /// Makes the file, if one is wanted. Before the machine is started, so that nothing is begun
    /// that cannot be had.
    pub(crate) fn open(&self, machine: &str) -> Result<Option<Opened>, TraceError> {
        let Some(path) = &self.trace else { return Ok(None) };
        let file = File::create(path).and_then(|file| TraceFile::begin(file, machine));
        match file {
            Ok(file) => Ok(Some(Opened { file, path: path.clone() })),
            Err(source) => Err(TraceError { path: path.clone(), source }),
        }
    }
}

/// A trace file without a machine.
#[derive(Debug)]
pub(crate) struct Opened {
    file: TraceFile<File>,
    path: PathBuf,
}

impl Opened {
    /// Writes these events until the machine is gone or the trace is finished. To be called inside
    /// a runtime.
    pub(crate) fn follow(self, status: &Status, events: Events) -> io::Result<Trace> {
        let Self { mut file, path } = self;
        let (runtime, status) = (Handle::current(), status.clone());
        let (send, ended) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        std::thread::Builder::new().name("trace".to_owned()).spawn(move || {
            let written = file.know(&status).and_then(|()| write(&runtime, file, events, stopped));
            if let Err(error) = written {
                tell(&path, &error);
            }
            // Nobody may be waiting.
            let _ = send.send(());
        })?;
        Ok(Trace { ended, stop })
    }
}

fn write(
    runtime: &Handle,
    mut file: TraceFile<File>,
    mut events: Events,
    mut stop: oneshot::Receiver<()>,
) -> io::Result<()> {
    loop {
        let next = runtime.block_on(async {
            tokio::select! {
                biased;
                event = events.recv() => event,
                _ = &mut stop => events.try_recv(),
            }
        });
        let Some(event) = next else { break };
        file.event(&event, SystemTime::now())?;
    }
    file.end().map(drop)
}

fn tell(path: &Path, error: &io::Error) {
    tracing::error!(path = %path.display(), %error, "the trace ends here");
}

/// A trace that is being written. It is whole at every moment but for the end of its array.
#[derive(Debug)]
pub(crate) struct Trace {
    ended: oneshot::Receiver<()>,
    stop: oneshot::Sender<()>,
}

impl Trace {
    /// Waits until everything is written that has happened by now, 2 s at most.
    pub(crate) async fn finish(self) {
        // If it has ended already, it needs not be told.
        let _ = self.stop.send(());
        if tokio::time::timeout(PATIENCE, self.ended).await.is_err() {
            tracing::warn!("the end of the trace was not written within {PATIENCE:?}");
        }
    }
}
