//! What the coordinator says about the memory behind DMA windows: RAM, or gone.

use super::control::ConnectionId;
use super::{Message, State};
use crate::device::Device;
use crate::memory::RevokeError;
use standstill_protocol::message::{
    DeviceEvent, DeviceMessage, MemoryAccepted, MemoryDeclaration, Revocation,
};
use std::os::fd::OwnedFd;
use std::time::Duration;
use thiserror::Error;

/// How long those who use a window may take to let go of it.
const PATIENCE: Duration = Duration::from_secs(4);

/// The most revocations under way; each waits on a thread of its own.
const MOST_REVOCATIONS: usize = 16;

/// A revocation was not carried out.
#[derive(Debug, Error)]
enum Unrevoked {
    #[error(transparent)]
    Busy(#[from] RevokeError),
    #[error("more than {MOST_REVOCATIONS} revocations at a time")]
    TooMany,
}

impl<D: Device> State<D> {
    pub(super) fn declare(&mut self, declaration: MemoryDeclaration, fds: Vec<OwnedFd>) {
        if declaration.term != self.lifecycle.term() {
            tracing::debug!(term = declaration.term.0, "memory declaration of another term");
            return;
        }
        for fd in fds {
            if let Err(error) = self.parts.memory.declare_ram(fd) {
                // Not accepted, so not answered; what it is behind counts as a peer's.
                tracing::error!(%error, sequence = declaration.sequence, "memory declaration");
                self.send(DeviceMessage::Event(DeviceEvent::Failed(error.to_string())));
                return;
            }
        }
        let accepted = MemoryAccepted { sequence: declaration.sequence };
        self.send(DeviceMessage::MemoryAccepted(accepted));
    }

    /// Takes away windows onto the memory of a process that is gone, on a thread that may wait.
    pub(super) fn revoke(&mut self, id: ConnectionId, revocation: Revocation) {
        let Revocation { term, sequence, files } = revocation;
        if term != self.lifecycle.term() {
            tracing::debug!(term = term.0, "revocation of another term");
            return;
        }
        if self.revocations >= MOST_REVOCATIONS {
            return self.not_revoked(sequence, &Unrevoked::TooMany);
        }
        self.revocations += 1;
        let (memory, myself) = (self.parts.memory.clone(), self.myself.clone());
        tokio::task::spawn_blocking(move || {
            let result = memory.revoke(&files, PATIENCE);
            // If the actor is gone, so is the process.
            let _ = myself.cast(Message::Revoked(id, sequence, result));
        });
    }

    pub(super) fn revoked(
        &mut self,
        id: ConnectionId,
        sequence: u64,
        result: Result<usize, RevokeError>,
    ) {
        self.revocations -= 1;
        if !self.is_present(id) {
            tracing::debug!(sequence, "a revocation has ended after the coordinator that sent it");
            return;
        }
        match result {
            Ok(windows) => {
                tracing::debug!(sequence, windows, "revoked");
                self.send(DeviceMessage::MemoryAccepted(MemoryAccepted { sequence }));
            }
            Err(error) => self.not_revoked(sequence, &error.into()),
        }
    }

    /// Not done, so not answered.
    fn not_revoked(&mut self, sequence: u64, error: &Unrevoked) {
        tracing::error!(%error, sequence, "revocation");
        self.send(DeviceMessage::Event(DeviceEvent::Failed(error.to_string())));
    }
}
