//! Eventfds that come from another process: what they must be, and how to signal them without
//! ever waiting.

#![forbid(unsafe_code)]

use super::IrqError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, write};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use thiserror::Error;

/// What the kernel calls an eventfd.
const EVENTFD_LINK: &str = "anon_inode:[eventfd]";

/// A request for interrupts that was not carried out.
#[derive(Debug, Error)]
pub enum SetIrqsError {
    /// It is not acceptable.
    #[error(transparent)]
    Request(#[from] IrqError),
    /// An fd is something else than an eventfd, and writing to it could block.
    #[error("SET_IRQS: an fd is no eventfd but {found}")]
    NotEventfd {
        /// What it is.
        found: String,
    },
    /// Nobody knows what an fd is, or it cannot be made non-blocking.
    #[error("SET_IRQS: the kind of an fd cannot be read, or its flags cannot be set")]
    Io(#[source] io::Error),
}

impl SetIrqsError {
    /// What to answer the client.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Request(error) => error.errno().raw_os_error(),
            Self::NotEventfd { .. } | Self::Io(_) => Errno::INVAL.raw_os_error(),
        }
    }
}

/// An fd that is known to be an eventfd.
#[derive(Debug)]
pub(super) struct EventFd(OwnedFd);

impl EventFd {
    /// Accepts only a real eventfd: a write to a pipe or a terminal could block, or do anything.
    ///
    /// It does not block any more after this. That is a flag of the open file, which the client
    /// shares: it finds its own fd non-blocking, too. No other way keeps a write from waiting for a
    /// client that fills the counter.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, SetIrqsError> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(SetIrqsError::Io)?;
        if link.as_os_str() != EVENTFD_LINK {
            return Err(SetIrqsError::NotEventfd { found: link.to_string_lossy().into_owned() });
        }
        let failed = |error: Errno| SetIrqsError::Io(error.into());
        let flags = fcntl_getfl(&fd).map_err(failed)?;
        if !flags.contains(OFlags::NONBLOCK) {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(failed)?;
        }
        Ok(Self(fd))
    }

    /// Adds 1 to the counter. A counter that is full is signalled already.
    ///
    /// The flags are the client's too, which could make it block again: so this asks first. A client
    /// that does that and fills the counter in between hurts only its own device, whose next stop is
    /// refused.
    pub(super) fn signal(&self) {
        let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            match poll(&mut fds, Some(&now)) {
                Ok(0) => return,
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Self::report(error),
            }
        }
        loop {
            match write(&self.0, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(error) => return Self::report(error),
            }
        }
    }

    #[cold]
    fn report(error: Errno) {
        tracing::warn!(%error, "an interrupt's eventfd could not be signalled");
    }
}
