//! What a device process needs to outlive its coordinator.

use super::Error;
use rustix::process::{geteuid, set_parent_process_death_signal};
use standstill_protocol::channel::{ControlListener, DeviceEnd};
use standstill_protocol::message::{OrphanPolicy, Welcome};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use uuid::Uuid;

/// Its machine, and those who may become its coordinator.
#[derive(Default)]
pub(super) struct Orphan {
    pub(super) machine: Option<Uuid>,
    listener: Option<ControlListener>,
    /// They were told Hello and have not answered.
    pub(super) candidates: Vec<DeviceEnd>,
}

impl Orphan {
    /// Takes from a Welcome what it needs.
    pub(super) fn welcome(&mut self, welcome: &Welcome, fds: Vec<OwnedFd>) -> Result<(), Error> {
        self.machine = Some(welcome.machine);
        if welcome.orphan == OrphanPolicy::Keep {
            set_parent_process_death_signal(None)?;
        }
        let mut fds = fds.into_iter();
        if welcome.listener {
            self.listener = fds.next().map(ControlListener::from_fd).transpose()?;
        }
        if welcome.log
            && let Some(log) = fds.next()
        {
            rustix::stdio::dup2_stderr(log)?;
        }
        Ok(())
    }

    /// True if another coordinator can come.
    pub(super) fn waits(&self) -> bool {
        self.listener.is_some()
    }

    /// A connection of somebody who may be a coordinator.
    pub(super) fn accept(&self) -> Result<Option<DeviceEnd>, Error> {
        let Some(listener) = &self.listener else { return Ok(None) };
        while let Some(candidate) = listener.try_accept()? {
            let uid = candidate.peer_credentials()?.uid;
            if uid == 0 || uid == geteuid().as_raw() {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    /// What is to be watched.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let listener = self.listener.iter().map(AsFd::as_fd);
        listener.chain(self.candidates.iter().map(AsFd::as_fd))
    }
}
