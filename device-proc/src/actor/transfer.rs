//! The state of a device through an fd that its client has given, apart from the states that the
//! lifecycle has: the client has stopped the device by means of its own, and says when the state has
//! gone over.

#![forbid(unsafe_code)]

use super::budget::Budget;
use super::parts::Parts;
use super::stream::{self, Saver, Sink as _};
use super::stream_fd::StreamFd;
use crate::device::Device;
use crate::log;
use std::os::fd::OwnedFd;
use std::time::Duration;

pub(crate) use super::stream_fd::Direction;

/// Writes or reads the device's whole state, as `Save` and `Load` do. Blocks the calling OS thread, at
/// most that long. An error is a text.
pub(crate) fn transfer<D: Device>(
    parts: &Parts<D>,
    direction: Direction,
    fd: OwnedFd,
    within: Duration,
) -> Result<(), String> {
    let fd = StreamFd::new(fd, direction, Budget::grace(within));
    let mut fd = fd.map_err(|error| format!("the fd of the state: {error}"))?;
    let is_wanted = || fd.still_wanted().is_ok();
    let hooks = match direction {
        Direction::Save => &parts.saving,
        Direction::Load => &parts.loading,
    };
    let _turn = hooks.take(is_wanted).ok_or("an earlier transfer has not ended")?;
    let done = match direction {
        Direction::Save => Saver::new(parts).finish(parts, &mut fd),
        Direction::Load => stream::load(parts, fd),
    };
    done.map_err(|error| log::with_causes(&error))
}
