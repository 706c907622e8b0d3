//! The time, as the coordinator actor sees it.
//!
//! Tests that run schedules of the actor set it themselves, each on its own thread: see
//! [`set`]. Everybody else has the clock of the system.

use std::time::{Duration, Instant};

#[cfg(any(test, fuzzing))]
thread_local! {
    static SCRIPTED: std::cell::Cell<Option<Instant>> = const { std::cell::Cell::new(None) };
}

/// From now on it is that time for this thread; `None`: what the system says.
#[cfg(any(test, fuzzing))]
pub(crate) fn set(now: Option<Instant>) {
    SCRIPTED.set(now);
}

/// What time it is.
pub(crate) fn now() -> Instant {
    #[cfg(any(test, fuzzing))]
    if let Some(now) = SCRIPTED.get() {
        return now;
    }
    Instant::now()
}

/// How long ago that was.
pub(crate) fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}
