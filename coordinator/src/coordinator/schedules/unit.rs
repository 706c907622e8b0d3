//! What a test knows about one device process, and what its actor would do.

use super::super::script::{Answered, Device};
use crate::process::Exit;
use standstill_protocol::message::{Epoch, Phase};
use standstill_protocol::migration::{Activity, MigrationState};
use standstill_protocol::transition::ParticipantId;

/// One device process, alive or dead.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) device: Device,
    pub(super) id: Option<ParticipantId>,
    pub(super) greeted: bool,
    pub(super) hung: bool,
    /// How the process has ended.
    pub(super) exit: Option<Exit>,
    pub(super) exit_seen: bool,
    /// Its actor was told to fence it.
    pub(super) fence: bool,
    pub(super) proven: bool,
    /// The grace of its fence is over.
    pub(super) given_up: bool,
    pub(super) unprovable: bool,
    pub(super) gone_seen: bool,
    /// Its fence was asked for in an earlier step, and is not proven.
    pub(super) was_pending: bool,
    /// It counted after the last step.
    pub(super) was_ready: bool,
    /// It has counted, or is to be taken over.
    pub(super) counted: bool,
    /// The owner has taken it as it is.
    pub(super) accepted: bool,
    /// The coordinator knows that its lease has run out.
    pub(super) expired: bool,
    /// What it was told last by the transition under way, and not released from by an abort.
    pub(super) told: Option<(Epoch, Phase)>,
    pub(super) welcomed_by_another: bool,
    pub(super) heard: Vec<(Epoch, Phase)>,
}

impl Unit {
    pub(super) fn new(device: Device, unprovable: bool) -> Self {
        Self {
            device,
            id: None,
            greeted: false,
            hung: false,
            exit: None,
            exit_seen: false,
            fence: false,
            proven: false,
            given_up: false,
            unprovable,
            gone_seen: false,
            was_pending: false,
            was_ready: false,
            counted: false,
            accepted: false,
            expired: false,
            told: None,
            welcomed_by_another: false,
            heard: Vec::new(),
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.exit.is_none()
    }

    /// It takes steps of its own.
    pub(super) fn moves(&self) -> bool {
        self.is_alive() && !self.hung
    }

    /// The process ends, unless it has.
    pub(super) fn ends(&mut self, exit: Exit) {
        self.exit.get_or_insert(exit);
        self.device.close();
    }

    /// What it has answered to a command.
    pub(super) fn answer(&self, (epoch, phase): (Epoch, Phase)) -> Option<Answered> {
        let mut answers = self.device.answers.iter();
        answers.find(|answer| (answer.epoch, answer.phase) == (epoch, phase)).copied()
    }

    /// Somebody is to prove that nothing of it is left, and has not yet.
    pub(super) fn is_pending(&self) -> bool {
        self.fence && !self.proven
    }

    /// It may be writing into its peers.
    pub(super) fn may_write(&self) -> bool {
        self.device.may_do() == Activity::Full
    }

    /// It stands still, in a state that has to be right.
    pub(super) fn stands(&self) -> bool {
        self.device.may_do() == Activity::Stopped
            && self.device.lifecycle.state() != MigrationState::Error
    }
}
