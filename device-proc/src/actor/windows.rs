//! What the coordinator says about the memory behind DMA windows: RAM, with or without marks for
//! what is written to it, or gone.

use super::control::ConnectionId;
use super::{Message, State};
use crate::device::Device;
use crate::gate::Scope;
use crate::log;
use crate::memory::{DeclareError, RevokeError};
use standstill_protocol::message::{
    DeviceEvent, DeviceMessage, MemoryAccepted, MemoryDeclaration, Revocation,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// How long those who use a window may take to let go of it.
const PATIENCE: Duration = Duration::from_secs(4);

/// The most revocations, and declarations of RAM to be tracked, under way. A revocation waits on a
/// thread of its own.
const MOST_WAITS: usize = 16;

/// What was asked is not so.
#[derive(Debug, Error)]
enum Undone {
    #[error(transparent)]
    Undeclared(#[from] DeclareError),
    #[error(transparent)]
    Unrevoked(#[from] RevokeError),
    #[error(
        "{in_flight} accesses are in flight, some for more than {PATIENCE:?}: not all writes are marked"
    )]
    Unmarked { in_flight: u64 },
    #[error("more than {MOST_WAITS} declarations and revocations at a time")]
    TooMany,
}

impl<D: Device> State<D> {
    pub(super) fn declare(
        &mut self,
        id: ConnectionId,
        declaration: MemoryDeclaration,
        fds: Vec<OwnedFd>,
    ) {
        let MemoryDeclaration { term, sequence, ram_fds, dirty_page_size } = declaration;
        if term != self.lifecycle.term() {
            tracing::debug!(term = term.0, "memory declaration of another term");
            return;
        }
        let waits = dirty_page_size != 0 || self.parts.raw.is_some();
        if waits && self.memory_waits >= MOST_WAITS {
            return self.not_accepted(sequence, "memory declaration", &Undone::TooMany);
        }
        let mut ram = fds;
        let bitmaps = ram.split_off(usize::from(ram_fds).min(ram.len()));
        let declared = if dirty_page_size == 0 {
            ram.into_iter().try_for_each(|file| self.parts.memory.declare_ram(file))
        } else {
            let mut both = ram.into_iter().zip(bitmaps);
            both.try_for_each(|(file, bitmap)| self.track(file, bitmap, dirty_page_size))
        };
        if let Err(error) = declared {
            // What it is behind counts as a peer's.
            return self.not_accepted(sequence, "memory declaration", &error.into());
        }
        if let Some(raw) = &self.parts.raw {
            // It may be told of windows now, and may block.
            let (raw, myself) = (Arc::clone(raw), self.myself.clone());
            self.memory_waits += 1;
            tokio::task::spawn_blocking(move || {
                raw.ram_declared();
                // If the actor is gone, so is the process.
                let _ = myself.cast(Message::Passed(id, sequence, true));
            });
            return;
        }
        if dirty_page_size == 0 {
            return self.accepted(sequence);
        }
        self.memory_waits += 1;
        let (gate, myself) = (Arc::clone(self.parts.memory.gate()), self.myself.clone());
        tokio::spawn(async move {
            let in_time = tokio::time::timeout(PATIENCE, gate.passed()).await.is_ok();
            // If the actor is gone, so is the process.
            let _ = myself.cast(Message::Passed(id, sequence, in_time));
        });
    }

    fn track(
        &mut self,
        file: OwnedFd,
        bitmap: OwnedFd,
        page_size: u64,
    ) -> Result<(), DeclareError> {
        let tracked = self.parts.memory.track_ram(file, bitmap, page_size)?;
        let last = self.tracked.iter().position(|last| last.file == tracked.file);
        if let Some(last) = last.map(|at| self.tracked.swap_remove(at)) {
            self.parts.memory.untrack(&last);
        }
        self.tracked.push(tracked);
        Ok(())
    }

    /// Nobody takes the marks any more.
    pub(super) fn untrack(&mut self) {
        for tracked in self.tracked.drain(..) {
            self.parts.memory.untrack(&tracked);
        }
    }

    /// No write without a mark is in flight any more, unless it takes too long.
    pub(super) fn passed(&mut self, id: ConnectionId, sequence: u64, in_time: bool) {
        self.memory_waits -= 1;
        if !self.is_present(id) {
            tracing::debug!(sequence, "marks for a coordinator of before");
        } else if in_time {
            self.accepted(sequence);
        } else {
            let in_flight = self.parts.gate.in_flight(Scope::All);
            self.not_accepted(sequence, "tracking of writes", &Undone::Unmarked { in_flight });
        }
    }

    fn accepted(&mut self, sequence: u64) {
        self.send(DeviceMessage::MemoryAccepted(MemoryAccepted { sequence }));
    }

    /// Not done, so not answered.
    fn not_accepted(&mut self, sequence: u64, what: &str, error: &Undone) {
        let why = log::with_causes(error);
        tracing::error!(error = why, sequence, "{what}");
        self.send(DeviceMessage::Event(DeviceEvent::Failed(why)));
    }

    /// Takes away windows onto the memory of a process that is gone, on a thread that may wait.
    pub(super) fn revoke(&mut self, id: ConnectionId, revocation: Revocation) {
        let Revocation { term, sequence, files } = revocation;
        if term != self.lifecycle.term() {
            tracing::debug!(term = term.0, "revocation of another term");
            return;
        }
        if self.memory_waits >= MOST_WAITS {
            return self.not_accepted(sequence, "revocation", &Undone::TooMany);
        }
        self.memory_waits += 1;
        let (memory, myself) = (self.parts.memory.clone(), self.myself.clone());
        let raw = self.parts.raw.clone();
        tokio::task::spawn_blocking(move || {
            if let Some(raw) = raw {
                raw.revoke(&files);
            }
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
        self.memory_waits -= 1;
        if !self.is_present(id) {
            tracing::debug!(sequence, "a revocation has ended after the coordinator that sent it");
            return;
        }
        match result {
            Ok(windows) => {
                tracing::debug!(sequence, windows, "revoked");
                self.accepted(sequence);
            }
            Err(error) => self.not_accepted(sequence, "revocation", &error.into()),
        }
    }
}
