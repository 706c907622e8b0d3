//! Hooks that are called by one thread at a time, though threads of ended streams may still be in
//! them.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often whoever waits for its turn looks whether it still wants it.
const TURN_TICK: Duration = Duration::from_millis(20);

/// Lets one at a time call the hooks of one kind.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    taken: Mutex<bool>,
    freed: Condvar,
}

/// Somebody's turn; over when this is dropped.
#[derive(Debug)]
pub(crate) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits for its turn; `None` once it is not wanted any more.
    pub(crate) fn take(&self, is_wanted: impl Fn() -> bool) -> Option<Taken<'_>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken {
            if !is_wanted() {
                return None;
            }
            let waited = self.freed.wait_timeout(taken, TURN_TICK);
            taken = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken = true;
        Some(Taken(self))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.freed.notify_one();
    }
}
