//! `DEVICE_GET_INFO` and `DEVICE_GET_IRQ_INFO`, and what all questions about a device have in
//! common.

use super::bytes::{Put, Reader, check_argsz, size_u32};
use super::error::WireError;

/// `DEVICE_RESET` can be used.
pub const DEVICE_RESETTABLE: u32 = 1;
/// It is a PCI device.
pub const DEVICE_PCI: u32 = 1 << 1;

/// Regions of a PCI device: six BARs, ROM, configuration space, VGA.
pub const PCI_REGIONS: u32 = 9;
/// Number of the region that is a PCI device's configuration space.
pub const PCI_CONFIG_REGION: u32 = 7;
/// Interrupt indexes of a PCI device.
pub const PCI_IRQS: u32 = 5;

/// A question for the region or interrupt index with a number; for `DEVICE_GET_INFO` the number is
/// not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// The largest reply that the client takes, in bytes.
    pub argsz: u32,
    /// Which region or interrupt index.
    pub index: u32,
}

/// Reads the body of a question that has `size` bytes, with `index` at byte 8.
fn decode_query(what: &'static str, body: &[u8], size: usize) -> Result<Query, WireError> {
    let mut reader = Reader::new(what, body);
    reader.bytes(size)?;
    let mut reader = Reader::new(what, body);
    let (argsz, _flags, index) = (reader.u32()?, reader.u32()?, reader.u32()?);
    check_argsz(what, argsz, size as u64)?;
    Ok(Query { argsz, index })
}

impl Query {
    /// Reads the body of a `DEVICE_GET_INFO`; the index is 0.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it or its `argsz` is too short.
    pub fn decode_info(body: &[u8]) -> Result<Self, WireError> {
        let query = decode_query("DEVICE_GET_INFO", body, DeviceInfo::SIZE)?;
        Ok(Self { index: 0, ..query })
    }

    /// Reads the body of a `DEVICE_GET_REGION_INFO`.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it or its `argsz` is too short.
    pub fn decode_region(body: &[u8]) -> Result<Self, WireError> {
        decode_query("DEVICE_GET_REGION_INFO", body, super::RegionInfo::SIZE)
    }

    /// Reads the body of a `DEVICE_GET_IRQ_INFO`.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it or its `argsz` is too short.
    pub fn decode_irq(body: &[u8]) -> Result<Self, WireError> {
        decode_query("DEVICE_GET_IRQ_INFO", body, IrqInfo::SIZE)
    }

    /// Appends the body of a question that has `size` bytes: [`DeviceInfo::SIZE`],
    /// [`RegionInfo::SIZE`](super::RegionInfo::SIZE) or [`IrqInfo::SIZE`].
    pub fn encode(&self, size: usize, out: &mut Vec<u8>) {
        let end = out.len() + size;
        out.put_u32(self.argsz);
        out.put_u32(0);
        out.put_u32(self.index);
        out.resize(end, 0);
    }
}

/// The reply of `DEVICE_GET_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// [`DEVICE_RESETTABLE`], [`DEVICE_PCI`].
    pub flags: u32,
    /// How many regions there are.
    pub num_regions: u32,
    /// How many interrupt indexes there are.
    pub num_irqs: u32,
}

impl DeviceInfo {
    /// Size of the body, in bytes.
    pub const SIZE: usize = 16;

    /// Reads the body of a reply.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new("DEVICE_GET_INFO", body);
        reader.u32()?;
        Ok(Self { flags: reader.u32()?, num_regions: reader.u32()?, num_irqs: reader.u32()? })
    }

    /// Appends the body of a reply.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(size_u32(Self::SIZE));
        out.put_u32(self.flags);
        out.put_u32(self.num_regions);
        out.put_u32(self.num_irqs);
    }

    /// Whether it is a PCI device.
    #[must_use]
    pub fn is_pci(&self) -> bool {
        self.flags & DEVICE_PCI != 0
    }

    /// Whether `DEVICE_RESET` can be used.
    #[must_use]
    pub fn is_resettable(&self) -> bool {
        self.flags & DEVICE_RESETTABLE != 0
    }
}

/// Interrupts are signalled by eventfd.
pub const IRQ_EVENTFD: u32 = 1;
/// They can be masked.
pub const IRQ_MASKABLE: u32 = 1 << 1;
/// They mask themselves when they are raised.
pub const IRQ_AUTOMASKED: u32 = 1 << 2;
/// They have to be installed all at once.
pub const IRQ_NORESIZE: u32 = 1 << 3;

/// The reply of `DEVICE_GET_IRQ_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// [`IRQ_EVENTFD`] and so on.
    pub flags: u32,
    /// Which index.
    pub index: u32,
    /// How many interrupts it has.
    pub count: u32,
}

impl IrqInfo {
    /// Size of the body, in bytes.
    pub const SIZE: usize = 16;

    /// Reads the body of a reply.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new("DEVICE_GET_IRQ_INFO", body);
        reader.u32()?;
        Ok(Self { flags: reader.u32()?, index: reader.u32()?, count: reader.u32()? })
    }

    /// Appends the body of a reply.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(size_u32(Self::SIZE));
        out.put_u32(self.flags);
        out.put_u32(self.index);
        out.put_u32(self.count);
    }
}
