//! A device of your own: eight bytes of scratch memory behind a BAR, which survive migration.
//!
//! `cargo run --example scratch_device -- /run/scratch.sock` serves it to any vfio-user client;
//! started by a coordinator, it stops and starts with its machine. There is nothing to do for
//! that: the runtime has the lifecycle.

use standstill::device_proc::device::{
    AccessError, Bar, BarBacking, Device, DeviceError, DeviceInfo, PciIdentity,
};
use standstill::device_proc::{ServeOptions, serve};
use standstill::protocol::message::PeerDma;
use standstill::protocol::migration::MigrationFlags;
use std::error::Error;
use std::io::{Read, Write};
use std::sync::{Mutex, PoisonError};

#[derive(Default)]
struct Scratch(Mutex<[u8; 8]>);

impl Scratch {
    fn access(
        &self,
        offset: u64,
        width: usize,
        f: impl FnOnce(&mut [u8]),
    ) -> Result<(), AccessError> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(width);
        f(bytes.get_mut(start..end).ok_or(AccessError::NoRegister { offset, width })?);
        Ok(())
    }
}

impl Device for Scratch {
    fn region_read(&self, _bar: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.access(offset, data.len(), |bytes| data.copy_from_slice(bytes))
    }

    fn region_write(&self, _bar: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.access(offset, data.len(), |bytes| bytes.copy_from_slice(data))
    }

    fn reset(&self) -> Result<(), DeviceError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = [0; 8];
        Ok(())
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        let bytes = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        to.write_all(&bytes).map_err(DeviceError::new)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes).map_err(DeviceError::new)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args().nth(1).ok_or("usage: scratch_device SOCKET")?;
    let info = DeviceInfo {
        kind: "scratch".into(),
        pci: PciIdentity {
            vendor: 0x1234,
            device: 0x0001,
            subsystem_vendor: 0x1234,
            subsystem: 0x0001,
            class: 0x08_80_00,
            revision: 1,
        },
        bars: [
            Some(Bar { size: 4096, backing: BarBacking::Registers }),
            None,
            None,
            None,
            None,
            None,
        ],
        msix_vectors: 0,
        migration: MigrationFlags::STOP_COPY_P2P,
        peer_dma: PeerDma::RamOnly,
        backing_files: Vec::new(),
    };
    Ok(serve(ServeOptions::new(socket), |_handles| Ok((Scratch::default(), info)))?)
}
