//! What can go wrong on a channel.

#![forbid(unsafe_code)]

use crate::codec::{DecodeError, EncodeError, MAX_PACKET};
use crate::message::MAX_FDS;
use rustix::io::Errno;
use std::io;
use std::time::Duration;
use thiserror::Error;

/// Why an fd cannot be a control channel.
#[derive(Debug, Error)]
pub enum FromFdError {
    /// It is no socket at all.
    #[error("the fd is no socket, expected a Unix SEQPACKET socket")]
    NotASocket,
    /// It is another kind of socket.
    #[error(
        "the fd is a socket of family {family} and type {kind}, \
         expected a Unix SEQPACKET socket (1 and 5)"
    )]
    WrongSocket {
        /// Its address family, an `AF_` number.
        family: u16,
        /// Its type, a `SOCK_` number.
        kind: u32,
    },
    /// The system refused to say, or to make it close-on-exec.
    #[error("the control channel's fd cannot be set up: {source}")]
    Io {
        /// Why.
        source: io::Error,
    },
}

impl FromFdError {
    pub(super) fn not_a_socket(error: Errno) -> Self {
        if error == Errno::NOTSOCK { Self::NotASocket } else { Self::io(error) }
    }

    pub(super) fn io(error: Errno) -> Self {
        Self::Io { source: error.into() }
    }
}

/// Why a message was not sent; nothing of it was.
#[derive(Debug, Error)]
pub enum SendError {
    /// The peer's queue is full. Only a deadline tells whether it will ever read.
    #[error("the peer's queue is full")]
    WouldBlock,
    /// The peer's queue stayed full.
    #[error("the peer's queue stayed full for {timeout:?}")]
    TimedOut {
        /// For how long.
        timeout: Duration,
    },
    /// The peer has closed its end.
    #[error("the peer has closed the control channel")]
    Disconnected,
    /// The caller gave another number of fds than the message announces.
    #[error("{message} announces {announced} file descriptors and was given {given}")]
    Fds {
        /// The message's name.
        message: &'static str,
        /// What it announces.
        announced: usize,
        /// What it was given.
        given: usize,
    },
    /// The frame was made for another protocol version.
    #[error("frame of protocol version {frame} on a channel of version {channel}")]
    FrameVersion {
        /// The frame's.
        frame: u16,
        /// The channel's.
        channel: u16,
    },
    /// The message cannot be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The system refused.
    #[error("{message} cannot be sent: {source}")]
    Io {
        /// The message's name.
        message: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Why nothing was received.
#[derive(Debug, Error)]
pub enum RecvError {
    /// Nothing came in time. The channel is as good as before.
    #[error("no message within {timeout:?}")]
    TimedOut {
        /// How long was waited.
        timeout: Duration,
    },
    /// The peer has closed its end, and all that it had sent was received.
    #[error("the peer has closed the control channel")]
    Disconnected,
    /// An empty packet came.
    #[error("empty packet")]
    Empty,
    /// A packet came that is longer than any message.
    #[error("packet of {length} bytes is longer than {MAX_PACKET}")]
    Oversized {
        /// Its length in bytes.
        length: usize,
    },
    /// More fds came than a message can have, or this process may open no more.
    #[error(
        "{received} file descriptors and more came with a packet: over the limit of {MAX_FDS}, \
         or this process may open no more"
    )]
    FdsTruncated {
        /// How many got through; they are closed again.
        received: usize,
    },
    /// Another number of fds came than the message announces.
    #[error("{message} announces {announced} file descriptors and came with {received}")]
    Fds {
        /// The message's name.
        message: &'static str,
        /// What it announces.
        announced: usize,
        /// What came.
        received: usize,
    },
    /// The packet is no message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The system refused.
    #[error("the control channel cannot be read: {source}")]
    Io {
        /// Why.
        source: io::Error,
    },
}
