//! Telling a device process what to do wrong: only in builds with the feature `fault-injection`.
//!
//! [`Machine::arm`](crate::Machine::arm) and
//! [`blocking::Machine::arm`](crate::blocking::Machine::arm) give the [`Journal`] in which the
//! process says what it has done. `docs/fault-injection.md` says what can be armed.

mod journal;

pub use journal::{Journal, JournalError};

use crate::error::MachineError;
use rustix::pipe::{PipeFlags, pipe_with};
use standstill_protocol::channel::SendError;
use standstill_protocol::fault::Fault;
use std::io;
use std::os::fd::OwnedFd;
use thiserror::Error;
use tokio::sync::oneshot;

/// A device process was not told what to do wrong.
#[derive(Debug, Error)]
pub enum ArmError {
    /// There is no such device process, or no machine any more.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its program was built without the feature `fault-injection`.
    #[error("device {device:?} cannot be told to do wrong: its program has no fault injection")]
    NotBuiltForIt {
        /// Its name.
        device: String,
    },
    /// It has not greeted yet, or is lost.
    #[error("device {device:?} cannot be told to do wrong: nothing reaches it now")]
    OutOfReach {
        /// Its name.
        device: String,
    },
    /// The message cannot be sent: among others, because there are too many faults, or none, or one
    /// cannot be done where it should.
    #[error("device {device:?} cannot be told to do wrong")]
    Send {
        /// Its name.
        device: String,
        /// Why.
        source: SendError,
    },
    /// There is no pipe for the journal.
    #[error("no pipe can be made for the journal")]
    Pipe(#[source] io::Error),
}

/// What an owner asks the coordinator actor.
#[derive(Debug)]
pub(crate) struct ArmRequest {
    pub(crate) device: String,
    pub(crate) faults: Vec<Fault>,
    /// The journal's other end, for the device.
    pub(crate) journal: OwnedFd,
    pub(crate) reply: oneshot::Sender<Result<(), ArmError>>,
}

/// Both ends of a journal; neither is waited for.
pub(crate) fn journal(faults: &[Fault]) -> Result<(Journal, OwnedFd), ArmError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
        .map_err(|errno| ArmError::Pipe(errno.into()))?;
    Ok((Journal::new(reader, faults.to_vec()), writer))
}
