//! Looks for devices that hang; what that is, the [`watchdog`](crate::watchdog) says.

use super::Message;
use super::state::{Standing, State};
use crate::clock;
use crate::events::MachineEvent;
use standstill_protocol::migration::Activity;
use standstill_protocol::transition::Loss;

impl State {
    /// Arms the next look, if there is anything to look for.
    pub(super) fn watch(&self) {
        if let Some(ticks) = &self.ticks {
            self.after(ticks.interval(), || Message::Tick);
        }
    }

    pub(super) fn tick(&mut self) {
        let Some(ticks) = &mut self.ticks else { return };
        let passed = ticks.tick(clock::now());
        // What they have said by now counts.
        let heard = self.read_ready();
        if self.superseded.is_some() {
            return;
        }
        self.watch();
        if !heard || self.starting.is_some() || self.ending.is_some() {
            return;
        }
        // The deadlines of a transition decide about its devices.
        let idle = self.active.is_none();
        let limits = self.limits;
        let mut hung = Vec::new();
        for device in self.devices.iter_mut() {
            if !idle || device.standing != Standing::Ready || device.care.leaving.is_some() {
                device.care.pulse.reset();
                continue;
            }
            let tells = device.hello.as_ref().is_some_and(|hello| hello.capabilities.progress);
            let works = tells && device.state.activity() != Activity::Stopped;
            if let Some(hang) = device.care.pulse.tick(passed, works, &limits) {
                hung.push((device.id, device.spec.name.clone(), device.incarnation, hang));
            }
        }
        for (id, device, incarnation, hang) in hung {
            self.emit(MachineEvent::DeviceHung { device, incarnation, hang });
            self.lost(id, Loss::Hung, hang.to_string());
        }
    }
}
