//! What must end, or the process does.

#![forbid(unsafe_code)]

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::Builder;
use std::time::Duration;

/// While it exists something goes on that has a deadline. A process that cannot keep that is of no use
/// and may do harm: a device that says that a ring is stopped while it still writes to it corrupts the
/// guest. So it aborts, and its coordinator starts another.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub(super) struct FailStop {
    /// The end of the thread that watches.
    _done: Option<SyncSender<()>>,
}

impl FailStop {
    /// Aborts the process unless this is dropped within that time. `what` is what is waited for.
    pub(super) fn arm(what: String, within: Duration) -> Self {
        let (done, wait) = sync_channel(0);
        let watch = move || {
            if wait.recv_timeout(within) == Err(RecvTimeoutError::Timeout) {
                tracing::error!(what, ?within, "the device process ends: not done in time");
                let line = format!("device process: {what} did not end within {within:?}\n");
                crate::log::write_to_stderr(line.as_bytes());
                std::process::abort();
            }
        };
        match Builder::new().name("deadline".into()).spawn(watch) {
            Ok(_) => Self { _done: Some(done) },
            Err(error) => {
                tracing::warn!(%error, "no thread can be made that watches a deadline");
                Self { _done: None }
            }
        }
    }
}
