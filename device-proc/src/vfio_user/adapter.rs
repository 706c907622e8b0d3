//! The rust-vmm crate's idea of a device, over ours.

use super::endpoint::Endpoint;
use crate::device::Device;
use crate::interrupt::{SET_IRQS_SIZE, SetIrqs};
use crate::memory::WindowSpec;
use crate::serve::panics::strict;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend};

/// The wire's flag of `DMA_UNMAP` for everything; the crate's own constant is another bit.
const UNMAP_ALL: u32 = 1 << 1;

/// Passes everything on. The crate's own panics are contained, those of the device are not.
#[derive(Debug)]
pub(super) struct Adapter<'a, D>(pub(super) &'a Endpoint<D>);

impl<D: Device> ServerBackend for Adapter<'_, D> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        Ok(strict(|| self.0.region_read(region, offset, data))?)
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        Ok(strict(|| self.0.region_write(region, offset, data))?)
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let window = WindowSpec {
            iova: address,
            size,
            offset,
            readable: flags.contains(DmaMapFlags::READ),
            writable: flags.contains(DmaMapFlags::WRITE),
        };
        Ok(strict(|| self.0.dma_map(window, fd.map(Into::into)))?)
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        match flags.bits() {
            0 => Ok(strict(|| self.0.dma_unmap(address, size))?),
            UNMAP_ALL if address == 0 && size == 0 => Ok(strict(|| self.0.dma_unmap_all())?),
            _ => Err(Errno::INVAL.into()),
        }
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(strict(|| self.0.reset())?)
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        let request = SetIrqs { argsz: SET_IRQS_SIZE, flags, index, start, count };
        let fds = fds.into_iter().map(Into::into).collect();
        Ok(strict(|| self.0.set_irqs(&request, &[], fds))?)
    }
}
