//! Taking away windows onto the memory of a process that is gone.

#![forbid(unsafe_code)]

use super::window::Window;
use super::{MemoryMap, WindowClass};
use standstill_protocol::message::FileIdentity;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Windows could not be taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "{accesses} accesses still use {windows} windows to be revoked after {waited:?}, \
     the first of them at {iova:#x}"
)]
pub struct RevokeError {
    /// First IOVA of the first window that is left.
    pub iova: u64,
    /// How many windows are left.
    pub windows: usize,
    /// How many accesses use them.
    pub accesses: u64,
    /// How long was waited.
    pub waited: Duration,
}

impl MemoryMap {
    /// Removes all windows onto these files, when nobody uses them any more; those of a file that
    /// was declared RAM stay. Blocks the calling OS thread until then, at most that long. No new
    /// access to one of them begins meanwhile: DMA there fails as it does where no window is.
    /// Returns how many windows there were.
    ///
    /// It is done once, for the windows that there are. A client that maps such a file afterwards
    /// has an fd of it in its hands, so the file lives, or it is another one under the same
    /// identity: nothing is remembered.
    ///
    /// # Errors
    ///
    /// [`RevokeError`] if some are still in use at the end. These are there and can be used as
    /// before, the others are gone.
    pub fn revoke(&self, files: &[FileIdentity], timeout: Duration) -> Result<usize, RevokeError> {
        let begin = Instant::now();
        let is_meant = |window: &&Arc<Window>| {
            window.file.is_some_and(|file| files.contains(&file))
                && window.class() == WindowClass::Peer
        };
        let all: Vec<_> = self.shared.windows().iter().filter(is_meant).cloned().collect();
        // All at once, so that they drain at the same time. One that is being unmapped is closed
        // already, by somebody who may give up and open it again.
        let closed: Vec<bool> = all.iter().map(|window| window.users.close()).collect();
        self.shared.messages.look_again();
        let (mut gone, mut busy) = (Vec::new(), Vec::new());
        for (window, mut ours) in all.iter().zip(closed) {
            let drained = loop {
                let rest = timeout.saturating_sub(begin.elapsed());
                if window.users.drained_within(rest) && window.users.is_closed() {
                    break true;
                }
                if rest.is_zero() {
                    break false;
                }
                ours |= window.users.close();
            };
            // It can have become RAM meanwhile.
            let revoked = drained && window.class() == WindowClass::Peer;
            if revoked {
                gone.push(Arc::clone(window));
            } else if !drained {
                busy.push(window);
            }
            if ours && !revoked {
                window.users.open();
            }
        }
        self.remove(&gone);
        let Some(first) = busy.first() else {
            return Ok(all.len());
        };
        let accesses = busy.iter().map(|window| window.users.in_flight()).sum();
        let (iova, windows) = (first.spec.iova, busy.len());
        Err(RevokeError { iova, windows, accesses, waited: timeout })
    }
}
