//! From a machine file to a machine that can be started.

use super::{DeviceEntry, MachineFile, Orphan};
use crate::run::hook::CommandHook;
use standstill::coordinator::MachineBuilder;
use std::io;
use std::path::Path;

impl MachineFile {
    /// The machine with these of its devices; what a later coordinator needs goes to `control`.
    pub(crate) fn builder<'a>(
        &self,
        devices: impl IntoIterator<Item = &'a DeviceEntry>,
        control: &Path,
    ) -> io::Result<MachineBuilder> {
        let mut builder =
            MachineBuilder::new(&self.name).deadlines(self.deadlines).on_failure(self.on_failure);
        for device in devices {
            builder = builder.device(device.spec()?);
        }
        if let Some(interval) = self.heartbeat {
            builder = builder.heartbeat(interval);
        }
        if let Some(policy) = self.defaults.on_loss {
            builder = builder.on_loss(policy);
        }
        if let Some(presence) = self.defaults.presence {
            builder = builder.presence(presence);
        }
        if self.orphan == Orphan::Keep {
            builder = builder.keep(control);
        }
        for hook in &self.hooks {
            builder = builder.hook(hook.spec(), CommandHook::new(&self.name, hook));
        }
        Ok(builder)
    }

    /// Whether the machine may start without that device.
    pub(crate) fn is_optional(&self, device: &DeviceEntry) -> bool {
        device.is_optional(&self.defaults)
    }
}
