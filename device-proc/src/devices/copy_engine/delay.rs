//! Delays to the tenth of a millisecond, for hooks that shall take a given time.

#![forbid(unsafe_code)]

use crate::device::DeviceError;
use rustix::io::Errno;
use rustix::thread::{ClockId, clock_nanosleep_absolute};
use rustix::time::{Timespec, clock_gettime};
use std::time::Duration;

/// Takes that long, counted from the call. tokio's own timers have whole milliseconds.
///
/// # Errors
///
/// If the process is just ending, or the system call fails.
pub(super) async fn delay(duration: Duration) -> Result<(), DeviceError> {
    if duration.is_zero() {
        return Ok(());
    }
    let until = after(duration);
    tokio::task::spawn_blocking(move || wait_until(&until))
        .await
        .map_err(DeviceError::new)?
        .map_err(DeviceError::new)
}

fn after(duration: Duration) -> Timespec {
    let now = clock_gettime(ClockId::Monotonic);
    // Both are less than a second.
    let nanoseconds = now.tv_nsec + i64::from(duration.subsec_nanos());
    let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    let carry = nanoseconds / 1_000_000_000;
    Timespec {
        tv_sec: now.tv_sec.saturating_add(seconds).saturating_add(carry),
        tv_nsec: nanoseconds % 1_000_000_000,
    }
}

fn wait_until(until: &Timespec) -> Result<(), Errno> {
    loop {
        match clock_nanosleep_absolute(ClockId::Monotonic, until) {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
