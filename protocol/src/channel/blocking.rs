//! Sending and receiving that waits, bounded by a timeout.

#![forbid(unsafe_code)]

use super::{Channel, Received, RecvError, SendError};
use crate::codec::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

impl<Tx: Message, Rx> Channel<Tx, Rx> {
    /// Sends a message, waiting while the peer's queue is full, at most for `timeout`.
    ///
    /// [`Duration::ZERO`] tries once, [`Duration::MAX`] waits for ever.
    ///
    /// # Errors
    ///
    /// [`SendError::TimedOut`]; otherwise as [`try_send`](Self::try_send), but never
    /// [`SendError::WouldBlock`].
    pub fn send(
        &self,
        message: &Tx,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(), SendError> {
        let wait = Wait::new(timeout);
        loop {
            match self.try_send(message, fds) {
                Err(SendError::WouldBlock) => {}
                done => return done,
            }
            match wait.until_ready(self.as_fd(), PollFlags::OUT) {
                Ok(true) => {}
                Ok(false) => return Err(SendError::TimedOut { timeout }),
                Err(source) => {
                    return Err(SendError::Io { message: message.name(), source });
                }
            }
        }
    }
}

impl<Tx, Rx: Message> Channel<Tx, Rx> {
    /// Receives a message, waiting for it at most for `timeout`.
    ///
    /// [`Duration::ZERO`] tries once, [`Duration::MAX`] waits for ever, and does so in the one
    /// recvmsg. Another thread can end that with shutdown(2).
    ///
    /// # Errors
    ///
    /// [`RecvError::TimedOut`]; otherwise as [`try_recv`](Self::try_recv).
    pub fn recv(&self, timeout: Duration) -> Result<Received<Rx>, RecvError> {
        let wait = Wait::new(timeout);
        let flags = if wait.is_for_ever() { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        loop {
            // A socket whose description is `O_NONBLOCK`, which its maker can set, never waits.
            if let Some(received) = self.receive(flags)? {
                return Ok(received);
            }
            match wait.until_ready(self.as_fd(), PollFlags::IN) {
                Ok(true) => {}
                Ok(false) => return Err(RecvError::TimedOut { timeout }),
                Err(source) => return Err(RecvError::Io { source }),
            }
        }
    }
}

/// When to give up; never, where the timeout is beyond what the clock can say.
struct Wait(Option<Instant>);

impl Wait {
    fn new(timeout: Duration) -> Self {
        Self(Instant::now().checked_add(timeout))
    }

    fn is_for_ever(&self) -> bool {
        self.0.is_none()
    }

    /// Waits for one of the events, an error or a hang-up; false if time ran out before.
    fn until_ready(&self, fd: BorrowedFd<'_>, events: PollFlags) -> io::Result<bool> {
        loop {
            let left = match self.0 {
                None => None,
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(false);
                    }
                    // Beyond the kernel's seconds is for ever.
                    Timespec::try_from(left).ok()
                }
            };
            match poll(&mut [PollFd::from_borrowed_fd(fd, events)], left.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
