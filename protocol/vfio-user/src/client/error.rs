//! Why a call of a client has failed.

use crate::connection::{ReceiveError, SendError};
use crate::wire::{Command, Errno, WireError};
use standstill_protocol::migration::MigrationState;
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// A call has failed.
#[derive(Clone, Debug, Error)]
pub enum ClientError {
    /// The server has refused it, or failed. Error replies without a number count as EIO.
    #[error("{command}: the server answers: {errno}")]
    Refused {
        /// Which command.
        command: Command,
        /// What it says.
        errno: Errno,
    },
    /// No answer came in time. One that comes later is dropped; whether the server has done it is
    /// not known.
    #[error("{command}: no answer in time")]
    Deadline {
        /// Which command.
        command: Command,
    },
    /// The answer is none. The connection goes on.
    #[error("{command}: an answer that cannot be")]
    Reply {
        /// Which command.
        command: Command,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// The request is none, or more than was agreed. It was not sent.
    #[error("{command}: a request that cannot be")]
    Request {
        /// Which command.
        command: Command,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// Too many requests are without an answer, those included that are given up.
    #[error("{command}: {pending} requests have no answer yet")]
    Busy {
        /// Which command.
        command: Command,
        /// How many there are.
        pending: usize,
    },
    /// There is no connection any more. All calls that wait, and all later ones, get this.
    #[error("the connection has ended")]
    Ended(#[source] Arc<EndError>),
}

impl ClientError {
    /// The error number of the server, if it is one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Ended(_))
    }
}

/// Why a connection has ended.
#[derive(Debug, Error)]
pub enum EndError {
    /// Nothing can be received any more: the server has closed, or sends what is no message.
    #[error("nothing can be received from the server any more")]
    Receive(#[source] ReceiveError),
    /// Nothing can be sent any more.
    #[error("nothing can be sent to the server any more")]
    Send(#[source] SendError),
    /// A reply that nobody has asked for.
    #[error("a reply to command {command} with id {id}, which was not sent")]
    StrayReply {
        /// Its id.
        id: u16,
        /// Number of its command.
        command: u16,
    },
    /// A reply with the number of another command.
    #[error("a reply to command {command} where {expected} was asked, with id {id}")]
    WrongCommand {
        /// Its id.
        id: u16,
        /// Number of its command.
        command: u16,
        /// What was asked.
        expected: Command,
    },
    /// The thread that serves the server's commands has ended: its [`DmaTarget`](super::DmaTarget)
    /// panicked.
    #[error("the thread that serves DMA has ended")]
    ServiceEnded,
    /// The client was dropped.
    #[error("the client was dropped")]
    Dropped,
}

/// A client could not be made.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The socket could not be reached, or a resource is missing.
    #[error("no connection")]
    Io(#[from] io::Error),
    /// The version could not be sent.
    #[error("VERSION could not be sent")]
    Send(#[from] SendError),
    /// No answer came in time, or none that is a message.
    #[error("VERSION was not answered")]
    Receive(#[from] ReceiveError),
    /// The server refuses.
    #[error("VERSION: the server answers: {0}")]
    Refused(Errno),
    /// Something else came than the answer.
    #[error("a message for command {command} with id {id} in place of the answer to VERSION")]
    NotTheAnswer {
        /// Its id.
        id: u16,
        /// Number of its command.
        command: u16,
    },
    /// The answer is none.
    #[error("the answer to VERSION cannot be")]
    Answer(#[from] WireError),
    /// The server takes or gives no data at all (`max_data_xfer_size` is 0).
    #[error("the server says that no byte of data fits a message: max_data_xfer_size is 0")]
    NoData,
    /// The server agrees to what was not offered.
    #[error("the server agrees to {0}, which was not offered")]
    NotOffered(&'static str),
    /// The server speaks another version.
    #[error("the server answers with version {major}.{minor}")]
    Version {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
}

/// A migration state was not reached.
#[derive(Debug, Error)]
#[error("{wanted} was not reached")]
pub struct SetStateError {
    /// Where the device was to go.
    pub wanted: MigrationState,
    /// What the server answered.
    #[source]
    pub source: ClientError,
    /// Where the device is now, which was asked after that: any state on the way, or ERROR.
    pub now: Result<MigrationState, ClientError>,
}

/// The stream of a device's state ended early.
#[derive(Debug, Error)]
pub enum StateStreamError {
    /// The server failed.
    #[error("the device's state: after {done} bytes")]
    Client {
        /// How many bytes had been transferred.
        done: u64,
        /// What happened.
        #[source]
        source: ClientError,
    },
    /// Where the stream came from or went to failed.
    #[error("the device's state: after {done} bytes")]
    Io {
        /// How many bytes had been transferred.
        done: u64,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// There is more of it than was allowed.
    #[error("the device's state: more than {limit} bytes")]
    TooLong {
        /// How many were allowed.
        limit: u64,
    },
}
