//! A channel under tokio.

#![forbid(unsafe_code)]

use super::readiness::{Readiness, writable};
use super::{Channel, Received, RecvError, SendError};
use crate::codec::Message;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use tokio::task::coop::consume_budget;

/// A [`Channel`] whose calls wait as futures. Deadlines are the caller's
/// (`tokio::time::timeout`): both futures may be dropped at any time, and a message is then either
/// sent, or received later, as a whole.
///
/// One task at a time receives; any number may send.
#[derive(Debug)]
pub struct AsyncChannel<Tx, Rx> {
    readiness: Readiness<Channel<Tx, Rx>>,
}

impl<Tx, Rx> AsyncChannel<Tx, Rx> {
    /// Registers a channel with the runtime of the calling task.
    ///
    /// # Errors
    ///
    /// As [`Readiness::new`].
    ///
    /// # Panics
    ///
    /// As [`Readiness::new`].
    pub fn new(channel: Channel<Tx, Rx>) -> io::Result<Self> {
        Ok(Self { readiness: Readiness::new(channel)? })
    }

    /// The channel, for the calls that never wait and for the protocol version.
    #[must_use]
    pub fn channel(&self) -> &Channel<Tx, Rx> {
        self.readiness.get_ref()
    }

    /// Takes the channel out of the runtime again.
    #[must_use]
    pub fn into_inner(self) -> Channel<Tx, Rx> {
        self.readiness.into_inner()
    }
}

impl<Tx, Rx: Message> AsyncChannel<Tx, Rx> {
    /// Receives a message. Cancel safe.
    ///
    /// # Errors
    ///
    /// As [`Channel::try_recv`].
    pub async fn recv(&self) -> Result<Received<Rx>, RecvError> {
        loop {
            // A peer that never stops sending must not keep other tasks from running.
            consume_budget().await;
            let ready =
                self.readiness.readable().await.map_err(|source| RecvError::Io { source })?;
            match ready.get_ref().try_recv()? {
                // Not cleared: there may be more.
                Some(received) => return Ok(received),
                None => ready.clear(),
            }
        }
    }
}

impl<Tx: Message, Rx> AsyncChannel<Tx, Rx> {
    /// Sends a message, waiting while the peer's queue is full. Cancel safe.
    ///
    /// # Errors
    ///
    /// As [`Channel::try_send`], but never [`SendError::WouldBlock`].
    pub async fn send(&self, message: &Tx, fds: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        loop {
            match self.channel().try_send(message, fds) {
                Err(SendError::WouldBlock) => {}
                done => return done,
            }
            writable(self.channel().as_fd())
                .await
                .map_err(|source| SendError::Io { message: message.name(), source })?;
        }
    }
}
