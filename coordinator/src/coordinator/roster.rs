//! Who belongs to the machine, and the numbers that nobody else ever gets.

use super::state::Device;
use standstill_protocol::transition::ParticipantId;
use std::collections::HashMap;

/// Gives numbers to participants, each once: every incarnation of a device has its own, so that
/// whatever comes late from an earlier one is known by its number.
#[derive(Debug, Default)]
pub(super) struct Ids(u32);

impl Ids {
    /// The next number; `None` when there are no more (after four thousand million incarnations).
    pub(super) fn next(&mut self) -> Option<ParticipantId> {
        let id = ParticipantId(self.0);
        self.0 = self.0.checked_add(1)?;
        Some(id)
    }
}

/// The devices, in the order of the description, found by the number of their incarnation.
#[derive(Default)]
pub(super) struct Roster {
    devices: Vec<Device>,
    index: HashMap<ParticipantId, usize>,
}

impl Roster {
    pub(super) fn get_mut(&mut self, id: ParticipantId) -> Option<&mut Device> {
        self.devices.get_mut(*self.index.get(&id)?)
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, Device> {
        self.devices.iter()
    }

    pub(super) fn iter_mut(&mut self) -> std::slice::IterMut<'_, Device> {
        self.devices.iter_mut()
    }

    /// Adds a device behind the others.
    pub(super) fn push(&mut self, device: Device) {
        self.index.insert(device.id, self.devices.len());
        self.devices.push(device);
    }
}

impl Roster {
    pub(super) fn get(&self, id: ParticipantId) -> Option<&Device> {
        self.devices.get(*self.index.get(&id)?)
    }

    /// Puts another incarnation in the place of that one.
    pub(super) fn replace(&mut self, id: ParticipantId, device: Device) {
        let Some(at) = self.index.remove(&id) else { return };
        self.index.insert(device.id, at);
        self.devices[at] = device;
    }

    /// Takes a device out; the others keep their order.
    pub(super) fn remove(&mut self, id: ParticipantId) -> Option<Device> {
        let at = self.index.remove(&id)?;
        let device = self.devices.remove(at);
        for (at, device) in self.devices.iter().enumerate().skip(at) {
            self.index.insert(device.id, at);
        }
        Some(device)
    }
}
