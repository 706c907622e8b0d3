//! A device for unit tests, whose hooks do what they are told.

use super::parts::Parts;
use crate::device::{AccessError, Device, DeviceError, DeviceInfo, PciIdentity};
use crate::gate::Gate;
use crate::interrupt::Interrupts;
use crate::memory::MemoryMap;
use standstill_protocol::message::PeerDma;
use standstill_protocol::migration::MigrationFlags;
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

    fn save(&self, _: &mut dyn Write) -> Result<(), DeviceError> {
        Ok(())
    }

    fn load(&self, _: &mut dyn Read) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Puts one together, RUNNING.
pub(crate) fn parts(deeds: &[(&'static str, Deed)]) -> Arc<Parts<Scripted>> {
    let device = Scripted { deeds: Mutex::new(deeds.to_vec()), calls: Mutex::default() };
    let info = DeviceInfo {
        kind: "scripted".into(),
        pci: PciIdentity {
            vendor: 1,
            device: 2,
            subsystem_vendor: 3,
            subsystem: 4,
            class: 5,
            revision: 6,
        },
        bars: [const { None }; 6],
        msix_vectors: 0,
        migration: MigrationFlags::STOP_COPY_P2P,
        peer_dma: PeerDma::Possible,
        backing_files: Vec::new(),
    };
    let memory = MemoryMap::new(Arc::new(Gate::new()));
    Arc::new(Parts::new(device, info, memory, Interrupts::new()).unwrap())
}
