//! The thread on which a machine lives, and the way there.

use crate::error::MachineError;
use standstill_protocol::channel::prefer_short_waits;
use std::io;
use std::sync::mpsc;
use std::time::Duration;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Its name. Those that it makes for what may block (the start of processes) have it too.
const NAME: &str = "standstill";
/// How long work that blocks is waited for at the end.
const LAST_GRACE: Duration = Duration::from_secs(2);

/// A thread with a runtime of its own. It ends when this is dropped, and with it the machine.
#[derive(Debug)]
pub(super) struct MachineThread {
    runtime: Handle,
    /// The process in which the thread is; a fork has no thread.
    process: u32,
    /// Dropped: the thread is to end.
    _life: oneshot::Sender<()>,
}

impl MachineThread {
    pub(super) fn start() -> io::Result<Self> {
        let (life, end) = oneshot::channel();
        let (reply, started) = mpsc::sync_channel(1);
        std::thread::Builder::new().name(NAME.into()).spawn(move || {
            // Here, so that here is where it is dropped: a runtime of the caller's forbids that.
            let mut runtime = Builder::new_current_thread();
            match runtime.enable_io().enable_time().thread_name(NAME).build() {
                Ok(runtime) => {
                    if let Err(error) = prefer_short_waits() {
                        tracing::debug!(%error, "the machine's thread waits as others do");
                    }
                    let _ = reply.send(Ok(runtime.handle().clone()));
                    // The sender is never used: this is its drop.
                    let _ = runtime.block_on(end);
                    runtime.shutdown_timeout(LAST_GRACE);
                }
                Err(error) => drop(reply.send(Err(error))),
            }
        })?;
        let runtime = started.recv().map_err(|_| ended())??;
        Ok(Self { runtime, process: std::process::id(), _life: life })
    }

    /// Whether the thread is in this process.
    pub(super) fn check(&self) -> Result<(), MachineError> {
        if self.process == std::process::id() { Ok(()) } else { Err(MachineError::Gone) }
    }

    /// Runs something on the thread and waits for its end, by a channel: to block in a runtime would
    /// be forbidden to callers that are in one themselves. `None` if the thread is no more.
    pub(super) fn run<T: Send + 'static>(
        &self,
        what: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        self.check().ok()?;
        let (reply, answer) = mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            // Never blocks: there is room for the one answer.
            let _ = reply.send(what.await);
        });
        answer.recv().ok()
    }

    /// Runs something on the thread.
    pub(super) fn spawn(
        &self,
        what: impl Future<Output = ()> + Send + 'static,
    ) -> tokio::task::AbortHandle {
        self.runtime.spawn(what).abort_handle()
    }
}

pub(super) fn ended() -> io::Error {
    io::Error::other("it has ended")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::RecvTimeoutError;

    #[test]
    fn after_a_fork_nothing_is_waited_for() {
        let mut thread = MachineThread::start().unwrap();
        assert_eq!(thread.run(async { 7 }), Some(7));
        thread.process = std::os::unix::process::parent_id();
        assert_eq!(thread.run(async { 7 }), None);
        assert!(matches!(thread.check(), Err(MachineError::Gone)));
    }

    #[test]
    fn with_its_last_handle_the_thread_ends_and_whoever_waits_learns_it() {
        let thread = MachineThread::start().unwrap();
        let (held, waiting) = mpsc::channel::<()>();
        thread.spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        drop(thread);
        let end = waiting.recv_timeout(Duration::from_secs(20));
        assert_eq!(end, Err(RecvTimeoutError::Disconnected));
    }
}
