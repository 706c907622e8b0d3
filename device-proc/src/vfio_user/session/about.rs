//! What a client asks about the device.

use super::{Refused, Reply, ReplyFd, Session};
use crate::device::Device;
use crate::interrupt::IrqIndex;
use rustix::io::Errno;
use standstill_vfio_user::wire::{
    DEVICE_PCI, DEVICE_RESETTABLE, DeviceInfo, Header, IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE,
    IoFds, IoFdsQuery, IrqInfo, PCI_IRQS, PCI_REGIONS, Query, REGION_MAPPABLE, REGION_READABLE,
    REGION_WRITABLE, RegionInfo, SparseArea, Stride,
};

impl<'a, D: Device> Session<'a, D> {
    pub(super) fn info(&self, header: &Header, reply: &mut Reply<'a>) {
        let flags = DEVICE_RESETTABLE | DEVICE_PCI;
        let info = DeviceInfo { flags, num_regions: PCI_REGIONS, num_irqs: PCI_IRQS };
        reply.set(header, |body| info.encode(body));
    }

    /// What can be mapped always has areas, so that a client asks twice and its fd goes with the
    /// whole answer.
    pub(super) fn region_info(
        &self,
        header: &Header,
        query: Query,
        reply: &mut Reply<'a>,
    ) -> Result<(), Refused> {
        let Query { argsz, index } = query;
        if index >= PCI_REGIONS {
            return Err(Errno::INVAL.into());
        }
        let memory = self.endpoint.region_memory(index).filter(|_| self.max_msg_fds() > 0);
        let info = match self.endpoint.raw() {
            Some(raw) => raw.region(index),
            None => self.own_region(index),
        };
        let info = match memory {
            Some(_) => info,
            None => RegionInfo { flags: info.flags & !REGION_MAPPABLE, sparse: None, ..info },
        };
        let mut whole = false;
        reply.set(header, |body| whole = info.encode(argsz, body));
        reply.fds.extend(memory.filter(|_| whole).map(ReplyFd::Memory));
        Ok(())
    }

    /// What a region of the runtime's is like.
    fn own_region(&self, index: u32) -> RegionInfo {
        let size = self.endpoint.region_size(index);
        let flags = if size > 0 { REGION_READABLE | REGION_WRITABLE } else { 0 };
        let info = RegionInfo { flags, index, size, ..RegionInfo::default() };
        match self.endpoint.region_memory(index) {
            Some(_) => RegionInfo {
                flags: flags | REGION_MAPPABLE,
                sparse: Some(vec![SparseArea { offset: 0, size }]),
                ..info
            },
            None => info,
        }
    }

    /// All doorbells of a region with their eventfds, or none.
    pub(super) fn region_io_fds(
        &self,
        header: &Header,
        query: IoFdsQuery,
        reply: &mut Reply<'a>,
    ) -> Result<(), Refused> {
        let IoFdsQuery { argsz, index } = query;
        if index >= PCI_REGIONS || self.endpoint.region_size(index) == 0 {
            return Err(Errno::INVAL.into());
        }
        let (entries, fds) = match self.doorbells {
            Some(doorbells) => doorbells.of_region(index),
            None => Default::default(),
        };
        if fds.len() > self.max_msg_fds() {
            tracing::debug!(index, fds = fds.len(), "the client cannot take so many eventfds");
            return Err(Errno::NOSPC.into());
        }
        let entries = IoFds { index, entries };
        let mut whole = false;
        reply.set(header, |body| whole = entries.encode(argsz, Stride::Libvfio, body));
        if whole {
            reply.fds.extend(fds.into_iter().map(ReplyFd::Doorbell));
        }
        Ok(())
    }

    pub(super) fn irq_info(
        &self,
        header: &Header,
        query: Query,
        reply: &mut Reply<'a>,
    ) -> Result<(), Refused> {
        let irq = IrqIndex::from_number(query.index).ok_or(Errno::INVAL)?;
        if let Some(raw) = self.endpoint.raw() {
            let info = raw.irq(query.index);
            reply.set(header, |body| info.encode(body));
            return Ok(());
        }
        let flags = match irq {
            IrqIndex::Intx => IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED,
            _ => IRQ_EVENTFD,
        };
        let count = irq.count(self.endpoint.parts().layout.irqs);
        let info = IrqInfo { flags, index: query.index, count };
        reply.set(header, |body| info.encode(body));
        Ok(())
    }

    fn max_msg_fds(&self) -> usize {
        self.agreed.map_or(0, |agreed| agreed.max_msg_fds)
    }
}
