//! A device for unit tests, whose hooks do what they are told.

use super::parts::Parts;
use crate::device::{AccessError, Device, DeviceError, DeviceInfo, Pass, PciIdentity, StateSize};
use crate::gate::Gate;
use crate::interrupt::Interrupts;
use crate::memory::MemoryMap;
use std::future::pending;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a hook does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Fails,
    Hangs,
}

/// Notes the calls of its hooks, and does what it is told.
#[derive(Debug, Default)]
pub(crate) struct Scripted {
    pub(crate) deeds: Mutex<Vec<(&'static str, Deed)>>,
    pub(crate) calls: Mutex<Vec<&'static str>>,
    /// What is saved, and what was loaded.
    pub(crate) contents: Mutex<Vec<u8>>,
    /// What the next passes save, and what each of them has loaded.
    pub(crate) passes: Mutex<Vec<(Pass, Vec<u8>)>>,
    /// The hooks that save and load wait as long as somebody holds this.
    pub(crate) hold: Mutex<()>,
}

impl Scripted {
    async fn hook(&self, name: &'static str) -> Result<(), DeviceError> {
        self.calls.lock().unwrap().push(name);
        let deed = {
            let mut deeds = self.deeds.lock().unwrap();
            let at = deeds.iter().position(|(hook, _)| *hook == name);
            at.map(|at| deeds.remove(at).1)
        };
        match deed {
            None => Ok(()),
            Some(Deed::Fails) => Err(DeviceError::new("no")),
            Some(Deed::Hangs) => pending().await,
        }
    }
}

impl Device for Scripted {
    fn region_read(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn region_write(&self, _: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.calls.lock().unwrap().push("reset");
        let fails = !self.deeds.lock().unwrap().is_empty();
        if fails { Err(DeviceError::new("no")) } else { Ok(()) }
    }

    async fn prepare_stop(&self, _: Duration) -> Result<(), DeviceError> {
        self.hook("prepare_stop").await
    }

    async fn stop(&self, _: Duration) -> Result<(), DeviceError> {
        self.hook("stop").await
    }

    async fn prepare_start(&self, _: Duration) -> Result<(), DeviceError> {
        self.hook("prepare_start").await
    }

    async fn start(&self, _: Duration) -> Result<(), DeviceError> {
        self.hook("start").await
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        let _waited = self.hold.lock().unwrap();
        to.write_all(&self.contents.lock().unwrap()).map_err(DeviceError::new)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        let _waited = self.hold.lock().unwrap();
        let mut contents = vec![0; self.contents.lock().unwrap().len()];
        from.read_exact(&mut contents).map_err(DeviceError::new)?;
        *self.contents.lock().unwrap() = contents;
        Ok(())
    }

    fn save_running(&self, pass: Pass, to: &mut dyn Write) -> Result<(), DeviceError> {
        let mut passes = self.passes.lock().unwrap();
        let at = passes.iter().position(|(of, _)| *of == pass);
        let some = at.map(|at| passes.remove(at).1).unwrap_or_default();
        to.write_all(&some).map_err(DeviceError::new)
    }

    fn load_running(&self, pass: Pass, from: &mut dyn Read) -> Result<(), DeviceError> {
        let mut some = Vec::new();
        // What a fuzzer makes up can be long.
        from.take(1 << 20).read_to_end(&mut some).map_err(DeviceError::new)?;
        let mut passes = self.passes.lock().unwrap();
        if pass == Pass::First {
            passes.clear();
        }
        passes.push((pass, some));
        Ok(())
    }

    fn state_size(&self) -> StateSize {
        let running = self.passes.lock().unwrap().iter().map(|(_, some)| some.len() as u64).sum();
        StateSize { running, stopped: self.contents.lock().unwrap().len() as u64 }
    }
}

/// Puts one together, RUNNING.
pub(crate) fn parts(deeds: &[(&'static str, Deed)]) -> Arc<Parts<Scripted>> {
    put_together(Scripted { deeds: Mutex::new(deeds.to_vec()), ..Scripted::default() }, info())
}

/// What one says of itself.
pub(crate) fn info() -> DeviceInfo {
    let pci = PciIdentity {
        vendor: 1,
        device: 2,
        subsystem_vendor: 3,
        subsystem: 4,
        class: 5,
        revision: 6,
    };
    DeviceInfo::new("scripted", pci)
}

/// Puts this one together, RUNNING.
pub(crate) fn put_together(device: Scripted, info: DeviceInfo) -> Arc<Parts<Scripted>> {
    let memory = MemoryMap::new(Arc::new(Gate::new()));
    let interrupts = Interrupts::new();
    interrupts.set_counts(info.irqs());
    Arc::new(Parts::new(device, info, memory, interrupts).unwrap())
}
