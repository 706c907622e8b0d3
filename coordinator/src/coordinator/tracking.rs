//! Devices that mark which pages of RAM they write: see [`crate::dirty`].

use super::Reply;
use super::state::{Declared, Device, Standing, State, Waiting};
use super::supervision::Recovery;
use crate::dirty::{DirtyError, DirtyOptions, DirtyTracking, Registry, Untracked};
use standstill_protocol::dirty::check_page_size;
use standstill_protocol::message::{CoordinatorMessage, Untrack};
use standstill_protocol::transition::{MachineState, ParticipantId};
use std::sync::Arc;

impl State {
    /// The owner wants to know what is written.
    pub(super) fn start_dirty_tracking(
        &mut self,
        options: DirtyOptions,
        reply: Reply<DirtyTracking>,
    ) {
        let tracking = match self.track_all(options) {
            Ok(tracking) => tracking,
            Err(error) => return drop(reply.send(Err(error.into()))),
        };
        self.tracking = Some(Arc::clone(&tracking));
        match self.declare_to_all(0..self.ram.len()) {
            Ok((sequence, waiting)) => {
                self.rely_on_others(&tracking, &waiting);
                self.await_memory(sequence, waiting, Declared::Tracking(tracking, reply));
            }
            Err(error) => {
                self.stop_dirty_tracking(&tracking);
                let _ = reply.send(Err(error));
            }
        }
    }

    /// All devices and all RAM, if that is possible.
    fn track_all(&self, options: DirtyOptions) -> Result<Arc<Registry>, DirtyError> {
        check_page_size(options.page_size)?;
        if self.tracking.is_some() {
            return Err(DirtyError::AlreadyOn);
        }
        let welcomed = self
            .devices
            .iter()
            .filter(|device| matches!(device.standing, Standing::Ready | Standing::Joining));
        let unable = welcomed.clone().filter(|device| !device.tracks());
        let unable: Vec<_> = unable.map(|device| device.spec.name.clone()).collect();
        if !unable.is_empty() && options.untracked == Untracked::Refuse {
            return Err(DirtyError::Untracked(unable));
        }
        let tracking = Registry::new(options);
        self.ram.iter().try_for_each(|(_, ram)| tracking.add_file(ram))?;
        welcomed
            .for_each(|device| tracking.add_device(device.id, &device.spec.name, device.tracks()));
        // One that is lost already, and not proven gone, may write for as long.
        let unproven = |device: &&Device| {
            matches!(device.standing, Standing::Lost(..))
                || matches!(device.care.recovery, Recovery::Unproven)
        };
        for device in self.devices.iter().filter(unproven) {
            tracking.add_device(device.id, &device.spec.name, device.tracks());
            tracking.lost(device.id, false);
        }
        Ok(Arc::new(tracking))
    }

    /// Where no RAM is declared yet, there is nothing to wait for.
    fn rely_on_others(&self, tracking: &Registry, waiting: &Waiting) {
        let others = self.devices.iter().filter(|device| {
            device.standing == Standing::Ready && !waiting.contains_key(&device.id)
        });
        others.for_each(|device| tracking.relied_on(device.id));
    }

    /// Ends the tracking, unless it is another one that is under way.
    pub(super) fn stop_dirty_tracking(&mut self, tracking: &Arc<Registry>) {
        tracking.end();
        if !self.tracking.as_ref().is_some_and(|present| Arc::ptr_eq(present, tracking)) {
            return;
        }
        self.tracking = None;
        let message = CoordinatorMessage::Untrack(Untrack { term: self.term });
        for device in self.devices.iter().filter(|device| device.tracks()) {
            let Some(channel) = &device.channel else { continue };
            if let Err(error) = channel.try_send(&message, &[]) {
                // It marks what nobody reads.
                let device = &device.spec.name;
                tracing::warn!(device, %error, "cannot be told of the end of tracking");
            }
        }
    }

    /// A device is lost: it may have written what it did not mark any more, unless it stood still.
    pub(super) fn writer_lost(&mut self, id: ParticipantId) {
        let stands = self.machine == MachineState::Stopped && self.active.is_none();
        let Some(tracking) = &self.tracking else { return };
        let device = self.devices.get(id);
        let stood = device.is_some_and(|device| {
            // Who leaves was brought to STOP before.
            device.standing == Standing::Leaving || stands && device.stands()
        });
        tracking.lost(id, stood);
    }
}
