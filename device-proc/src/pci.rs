//! The PCI view of a device: which region is what, and its configuration space.
//!
//! [`PciLayout`] says what is behind each BAR; [`ConfigSpace`] is the type 0
//! configuration space (PCI Local Bus Specification 3.0, chapter 6) with its write masks. Both
//! are pure: nothing here knows sockets or devices.
//!
//! A device with MSI-X vectors gets its vector table and pending bits in a BAR of their own, the
//! highest one that is free: a device's own BARs belong to the device, all of them. The runtime
//! keeps what a client writes there, but does not act on it: a VMM traps the table itself and
//! tells the device its vectors by `SET_IRQS`.
//!
//! BARs above 2 GiB are 64-bit ones and take the next index too; all others are 32-bit ones.

#![forbid(unsafe_code)]

use crate::device::{BarBacking, DeviceInfo};
use std::ops::Range;
use thiserror::Error;

#[cfg(test)]
mod tests;

/// Size of a conventional configuration space in bytes.
pub const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR_0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const MSIX_CAPABILITY: usize = 0x40;

/// Memory space, bus master, parity response, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0546;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_MSIX: u8 = 0x11;
/// Enable and function mask of the MSI-X message control word.
const MSIX_CONTROL_WRITABLE: u16 = 0xc000;
const BAR_64BIT: u32 = 0b0100;
const BAR_PREFETCHABLE: u32 = 0b1000;

const SMALLEST_BAR: u64 = 4096;
const LARGEST_BAR: u64 = 1 << 47;
const LARGEST_32BIT_BAR: u64 = 1 << 31;
const MOST_VECTORS: u16 = 2048;

/// What a [`DeviceInfo`] says that cannot be a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PciError {
    /// The size of a BAR is not acceptable.
    #[error("BAR {bar} has {size:#x} bytes, expected a power of two from 4096 to 2^47")]
    BarSize {
        /// Its index.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// A BAR above 2 GiB needs the next index for its upper half.
    #[error("BAR {bar} is a 64-bit one, but the index after it is not free")]
    NoUpperHalf {
        /// Its index.
        bar: usize,
    },
    /// More vectors than MSI-X has.
    #[error("{0} MSI-X vectors, at most 2048 are possible")]
    Vectors(u16),
    /// The vector table needs a BAR of its own.
    #[error("no BAR is free for the MSI-X table")]
    NoMsixBar,
    /// The class code has 24 bits.
    #[error("class code {0:#x} has more than 24 bits")]
    Class(u32),
}

/// What is behind a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarUse {
    /// Nothing.
    Absent,
    /// The device's registers.
    Registers,
    /// The device's memory.
    Memory,
    /// The MSI-X table and pending bits.
    Msix,
}

/// One BAR of a [`PciLayout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarLayout {
    /// What is behind it.
    pub usage: BarUse,
    /// Its size in bytes, 0 if it is absent.
    pub size: u64,
    /// True if it takes the next index too.
    pub is_64bit: bool,
}

/// Where the MSI-X structures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// The BAR.
    pub bar: usize,
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// Offset of the pending bits in the BAR; the table is at 0.
    pub pending_offset: u32,
}

/// What is behind each BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciLayout {
    /// BARs 0 to 5; the upper half of a 64-bit one is absent.
    pub bars: [BarLayout; 6],
    /// Where the MSI-X structures are, if the device has any.
    pub msix: Option<MsixLayout>,
}

impl PciLayout {
    /// Lays out what the device says of itself.
    ///
    /// # Errors
    ///
    /// [`PciError`] if that cannot be a PCI device.
    pub fn new(info: &DeviceInfo) -> Result<Self, PciError> {
        let absent = BarLayout { usage: BarUse::Absent, size: 0, is_64bit: false };
        let mut bars = [absent; 6];
        let mut taken = [false; 6];
        for (bar, wanted) in info.bars.iter().enumerate() {
            let Some(wanted) = wanted else { continue };
            let size = wanted.size;
            if !size.is_power_of_two() || !(SMALLEST_BAR..=LARGEST_BAR).contains(&size) {
                return Err(PciError::BarSize { bar, size });
            }
            let usage = match wanted.backing {
                BarBacking::Registers => BarUse::Registers,
                BarBacking::Memory(_) => BarUse::Memory,
            };
            let is_64bit = size > LARGEST_32BIT_BAR;
            taken[bar] = true;
            if is_64bit {
                match info.bars.get(bar + 1) {
                    Some(None) => taken[bar + 1] = true,
                    _ => return Err(PciError::NoUpperHalf { bar }),
                }
            }
            bars[bar] = BarLayout { usage, size, is_64bit };
        }
        let msix = match info.msix_vectors {
            0 => None,
            vectors if vectors > MOST_VECTORS => return Err(PciError::Vectors(vectors)),
            vectors => {
                let bar = taken.iter().rposition(|taken| !taken).ok_or(PciError::NoMsixBar)?;
                let table = u32::from(vectors) * 16;
                let pending = u32::from(vectors).div_ceil(64) * 8;
                let size = u64::from(table + pending).next_power_of_two().max(SMALLEST_BAR);
                bars[bar] = BarLayout { usage: BarUse::Msix, size, is_64bit: false };
                Some(MsixLayout { bar, vectors, pending_offset: table })
            }
        };
        Ok(Self { bars, msix })
    }
}

/// An access that does not lie inside the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("access of {length} bytes at {offset:#x} leaves the configuration space of {size} bytes")]
pub struct OutsideConfig {
    /// Where it began.
    pub offset: u64,
    /// How long it was, in bytes.
    pub length: usize,
    /// Size of the configuration space, in bytes.
    pub size: usize,
}

/// A saved configuration space is not this device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ForeignConfig {
    /// It has another size.
    #[error("configuration space of {saved} bytes, this device's has {own}")]
    Size {
        /// Of what was saved, in bytes.
        saved: usize,
        /// Of this device's, in bytes.
        own: usize,
    },
    /// It differs where no client can write.
    #[error(
        "configuration space differs at {offset:#x}: {saved:#04x} was saved, this device has {own:#04x}"
    )]
    Byte {
        /// The first byte that differs.
        offset: usize,
        /// What was saved.
        saved: u8,
        /// What this device has there.
        own: u8,
    },
}

/// A type 0 configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8]>,
    /// The bits that a client can change; as long as `bytes`.
    writable: Box<[u8]>,
}

impl ConfigSpace {
    /// The configuration space of a device that was just powered on.
    ///
    /// # Errors
    ///
    /// [`PciError::Class`] if the class code has more than 24 bits.
    pub fn new(info: &DeviceInfo, layout: &PciLayout) -> Result<Self, PciError> {
        let none = || vec![0; CONFIG_SIZE].into_boxed_slice();
        let mut space = Self { bytes: none(), writable: none() };
        let pci = &info.pci;
        if pci.class >> 24 != 0 {
            return Err(PciError::Class(pci.class));
        }
        space.put(0x00, &pci.vendor.to_le_bytes());
        space.put(0x02, &pci.device.to_le_bytes());
        space.put(0x08, &((pci.class << 8) | u32::from(pci.revision)).to_le_bytes());
        space.put(SUBSYSTEM_VENDOR, &pci.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM_VENDOR + 2, &pci.subsystem.to_le_bytes());
        space.put(INTERRUPT_PIN, &[1]);
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        for (index, bar) in layout.bars.iter().enumerate() {
            space.put_bar(BAR_0 + 4 * index, bar);
        }
        if let Some(msix) = layout.msix {
            space.put_msix(msix);
        }
        Ok(space)
    }

    fn put_bar(&mut self, at: usize, bar: &BarLayout) {
        if bar.usage == BarUse::Absent {
            return;
        }
        let mut kind = 0;
        if bar.usage == BarUse::Memory {
            kind |= BAR_PREFETCHABLE;
        }
        if bar.is_64bit {
            kind |= BAR_64BIT;
        }
        self.put(at, &kind.to_le_bytes());
        // Writing all ones and reading back gives the size: only address bits above it exist.
        let mask = (!(bar.size - 1)).to_le_bytes();
        self.allow(at, &mask[..4]);
        if bar.is_64bit {
            self.allow(at + 4, &mask[4..]);
        }
    }

    fn put_msix(&mut self, msix: MsixLayout) {
        let [bir, ..] = msix.bar.to_le_bytes();
        let bir = u32::from(bir);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.put(CAPABILITIES, &[MSIX_CAPABILITY.to_le_bytes()[0]]);
        self.put(MSIX_CAPABILITY, &[CAPABILITY_MSIX, 0]);
        self.put(MSIX_CAPABILITY + 2, &(msix.vectors - 1).to_le_bytes());
        self.allow(MSIX_CAPABILITY + 2, &MSIX_CONTROL_WRITABLE.to_le_bytes());
        self.put(MSIX_CAPABILITY + 4, &bir.to_le_bytes());
        self.put(MSIX_CAPABILITY + 8, &(msix.pending_offset | bir).to_le_bytes());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads `data.len()` bytes, any width at any offset.
    ///
    /// # Errors
    ///
    /// [`OutsideConfig`] if they do not all lie inside.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutsideConfig> {
        let range = self.inside(offset, data.len())?;
        data.copy_from_slice(&self.bytes[range]);
        Ok(())
    }

    /// Writes, any width at any offset; bits that cannot be written keep their value.
    ///
    /// # Errors
    ///
    /// [`OutsideConfig`] if the bytes do not all lie inside; then nothing was written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), OutsideConfig> {
        for (at, new) in self.inside(offset, data.len())?.zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (new & mask);
        }
        Ok(())
    }

    /// All of it, to be saved.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over what [`bytes`](Self::bytes) gave on another instance of the same device.
    ///
    /// # Errors
    ///
    /// [`ForeignConfig`] if it has another size, or a bit differs that no client can write; then
    /// nothing was changed.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), ForeignConfig> {
        if saved.len() != self.bytes.len() {
            return Err(ForeignConfig::Size { saved: saved.len(), own: self.bytes.len() });
        }
        let differs = |&at: &usize| (saved[at] ^ self.bytes[at]) & !self.writable[at] != 0;
        if let Some(offset) = (0..saved.len()).find(differs) {
            let (saved, own) = (saved[offset], self.bytes[offset]);
            return Err(ForeignConfig::Byte { offset, saved, own });
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }

    /// Brings every bit that a client can write to its power-on value.
    pub fn reset(&mut self) {
        for (byte, mask) in self.bytes.iter_mut().zip(&self.writable) {
            *byte &= !mask;
        }
    }

    /// The part that an access covers.
    fn inside(&self, offset: u64, length: usize) -> Result<Range<usize>, OutsideConfig> {
        let size = self.bytes.len();
        let outside = OutsideConfig { offset, length, size };
        let start = usize::try_from(offset).map_err(|_| outside)?;
        let end = start.checked_add(length).filter(|&end| end <= size).ok_or(outside)?;
        Ok(start..end)
    }
}
