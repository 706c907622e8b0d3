//! Whether this coordinator may still end device processes that are to outlive it.
//!
//! A coordinator that was stopped and woken up does not know that another one has taken its
//! machine over, and its deadlines have passed. So whoever sends SIGKILL asks here first, and here
//! the record is read again. What is left is the time between the reading and the signal: a
//! coordinator that is stopped exactly there ends a device that is another one's by then. That
//! device is lost, and seen to be; it is never in a wrong state.

use crate::control_directory::{ControlDirectory, ControlDirectoryError};
use standstill_protocol::message::Term;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// One coordinator's right to the device processes of one machine.
#[derive(Debug)]
pub(crate) struct Custody {
    directory: ControlDirectory,
    uuid: Uuid,
    term: Term,
    kept: AtomicBool,
    superseded: OnceLock<Term>,
}

impl Custody {
    pub(crate) fn new(directory: ControlDirectory, uuid: Uuid, term: Term) -> Self {
        Self { directory, uuid, term, kept: AtomicBool::new(false), superseded: OnceLock::new() }
    }

    pub(crate) fn directory(&self) -> &ControlDirectory {
        &self.directory
    }

    pub(crate) fn term(&self) -> Term {
        self.term
    }

    /// From now on the processes live on when their owner here is dropped.
    pub(crate) fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// From now on they end with it again.
    pub(crate) fn give_up(&self) {
        self.kept.store(false, Ordering::Release);
    }

    /// Whether they live on when their owner here is dropped.
    pub(crate) fn spares(&self) -> bool {
        self.kept.load(Ordering::Acquire) || self.superseded().is_some()
    }

    /// The term of the coordinator that has the machine now, as far as was found out.
    pub(crate) fn superseded(&self) -> Option<Term> {
        self.superseded.get().copied()
    }

    /// Another coordinator has the machine, whatever the record says.
    pub(crate) fn supersede(&self, term: Term) {
        // Whoever was first has said the same.
        let _ = self.superseded.set(term);
    }

    /// Whether the machine is still this coordinator's. Reads the record; once it was not, it never
    /// is again.
    ///
    /// # Errors
    ///
    /// [`ControlDirectoryError::Superseded`] if it is not; others if that cannot be found out.
    pub(crate) fn check(&self) -> Result<(), ControlDirectoryError> {
        let result = match self.superseded() {
            Some(found) => Err(self.directory.superseded(found, self.term)),
            None => self.directory.check_term(self.uuid, self.term),
        };
        if let Err(ControlDirectoryError::Superseded { found, .. }) = &result {
            self.supersede(*found);
        }
        result
    }
}
