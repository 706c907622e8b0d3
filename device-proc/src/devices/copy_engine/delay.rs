//! Delays to the tenth of a millisecond, for hooks that shall take a given time.

#![forbid(unsafe_code)]

use crate::device::DeviceError;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use standstill_protocol::channel::Readiness;
use std::time::Duration;

/// Takes that long, counted from the call. tokio's own timers have whole milliseconds, and a
/// thread of its own that sleeps would be one more that has to be woken.
///
/// # Errors
///
/// If the process is just ending, or a system call fails.
pub(super) async fn delay(duration: Duration) -> Result<(), DeviceError> {
    if duration.is_zero() {
        return Ok(());
    }
    // Apart, so that the future of a hook without a delay is small.
    Box::pin(wait(duration)).await
}

async fn wait(duration: Duration) -> Result<(), DeviceError> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(DeviceError::new)?;
    let once = Itimerspec { it_interval: timespec(Duration::ZERO), it_value: timespec(duration) };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once).map_err(DeviceError::new)?;
    let timer = Readiness::new(timer).map_err(DeviceError::new)?;
    loop {
        let ready = timer.readable().await.map_err(DeviceError::new)?;
        match rustix::io::read(ready.get_ref(), &mut [0; 8]) {
            Err(Errno::AGAIN) => ready.clear(),
            Err(Errno::INTR) => {}
            result => return result.map(drop).map_err(DeviceError::new),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
