//! Local devices and hooks, without their threads.

use crate::participant::{LocalAnswer, ScriptedCalls};
use standstill_protocol::message::{Command, Phase};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{HookId, HookMoment, ParticipantId};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

/// The calls of one of them.
pub(super) struct Calls<T> {
    receiver: Receiver<(u64, T)>,
    /// Grows with each hold.
    holds: Arc<AtomicU64>,
    pub(super) waiting: VecDeque<(u64, T)>,
    pub(super) hung: bool,
}

impl<T> Calls<T> {
    pub(super) fn new((receiver, holds): ScriptedCalls<T>) -> Self {
        Self { receiver, holds, waiting: VecDeque::new(), hung: false }
    }

    /// Takes what was called since the last time.
    pub(super) fn collect(&mut self) {
        self.waiting.extend(self.receiver.try_iter());
    }

    pub(super) fn moves(&self) -> bool {
        !self.hung && !self.waiting.is_empty()
    }
}

/// A device inside the VMM.
pub(super) struct LocalEnd {
    pub(super) id: ParticipantId,
    pub(super) calls: Calls<Command>,
    pub(super) state: MigrationState,
}

impl LocalEnd {
    /// The thread carries out the next call, or fails at it and is where it was. `None` if the call
    /// is void by now.
    pub(super) fn answer(&mut self, well: bool) -> Option<LocalAnswer> {
        let (told_at, command) = self.calls.waiting.pop_front()?;
        let starts = matches!(command.phase, Phase::PrepareStart | Phase::Start);
        if starts && told_at != self.calls.holds.load(Ordering::Acquire) {
            return None;
        }
        let result = if well {
            self.state = command.target;
            Ok(())
        } else {
            Err(("as the test wants".to_owned(), self.state))
        };
        Some(LocalAnswer::Device(self.id, command, result))
    }
}

/// A hook.
pub(super) struct HookEnd {
    pub(super) id: HookId,
    pub(super) calls: Calls<HookMoment>,
    /// What it stands for stands still.
    pub(super) stopped: bool,
}

impl HookEnd {
    /// The call returns, well or with an error.
    pub(super) fn answer(&mut self, well: bool) -> Option<LocalAnswer> {
        let (_, moment) = self.calls.waiting.pop_front()?;
        if well {
            self.stopped = moment == HookMoment::Stop;
        }
        let result = if well { Ok(()) } else { Err("as the test wants".to_owned()) };
        Some(LocalAnswer::Hook(self.id, moment, result))
    }
}
