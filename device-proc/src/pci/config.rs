//! The configuration space: what is in it at power-on and what a client can make of it.

#![forbid(unsafe_code)]

use super::capability::{self, Capability, POWER_CONTROL, POWER_STATE};
use super::{BarLayout, BarUse, CONFIG_SIZE, EXPRESS_CONFIG_SIZE, PciError, PciLayout};
use crate::device::DeviceInfo;
use std::ops::Range;
use thiserror::Error;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR_0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

/// Memory space, bus master, parity response, SERR.
const COMMAND_WRITABLE: u16 = 0x0146;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR_64BIT: u32 = 0b0100;
const BAR_PREFETCHABLE: u32 = 0b1000;

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
    /// It differs where no client can write, or has what no client can write.
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

/// A type 0 configuration space. A reset of the device leaves it as it is, as Linux's vfio-pci leaves
/// that of a real device: whoever resets one brings it where it should be itself.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8]>,
    /// The bits that a client can change; as long as `bytes`.
    writable: Box<[u8]>,
    /// Where the low byte of the power state is, if there is one.
    power_control: Option<usize>,
}

impl ConfigSpace {
    /// The configuration space of a device that was just powered on.
    ///
    /// # Errors
    ///
    /// [`PciError::Class`] if the class code has more than 24 bits.
    pub fn new(info: &DeviceInfo, layout: &PciLayout) -> Result<Self, PciError> {
        let size = if layout.express { EXPRESS_CONFIG_SIZE } else { CONFIG_SIZE };
        let none = || vec![0; size].into_boxed_slice();
        let mut space = Self { bytes: none(), writable: none(), power_control: None };
        let pci = &info.pci;
        if pci.class >> 24 != 0 {
            return Err(PciError::Class(pci.class));
        }
        space.put(0x00, &pci.vendor.to_le_bytes());
        space.put(0x02, &pci.device.to_le_bytes());
        space.put(0x08, &((pci.class << 8) | u32::from(pci.revision)).to_le_bytes());
        space.put(SUBSYSTEM_VENDOR, &pci.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM_VENDOR + 2, &pci.subsystem.to_le_bytes());
        let mut command = COMMAND_WRITABLE;
        if layout.irqs.intx > 0 {
            command |= COMMAND_INTX_DISABLE;
            space.put(INTERRUPT_PIN, &[1]);
            space.allow(INTERRUPT_LINE, &[0xff]);
        }
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        for (index, bar) in layout.bars.iter().enumerate() {
            space.put_bar(BAR_0 + 4 * index, bar);
        }
        space.put_capabilities(layout);
        Ok(space)
    }

    fn put_bar(&mut self, at: usize, bar: &BarLayout) {
        if bar.usage == BarUse::Absent {
            return;
        }
        let mut kind = 0;
        if bar.is_prefetchable() {
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

    /// Puts those that the layout asks for into a list, one behind the other.
    fn put_capabilities(&mut self, layout: &PciLayout) {
        let power = layout.power_management.then(capability::power_management);
        self.power_control = power.as_ref().map(|_| FIRST_CAPABILITY + POWER_CONTROL);
        let msi = u8::try_from(layout.irqs.msi).ok().filter(|vectors| *vectors > 0);
        let list = [
            power,
            msi.map(capability::msi),
            layout.msix.map(capability::msix),
            layout.express.then(capability::express),
        ];
        let (mut pointer, mut at) = (CAPABILITIES, FIRST_CAPABILITY);
        for Capability { bytes, writable } in list.into_iter().flatten() {
            self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
            self.put(at, &bytes);
            self.allow(at, &writable);
            // The four together end below 0x100.
            self.put(pointer, &at.to_le_bytes()[..1]);
            pointer = at + 1;
            at += bytes.len().next_multiple_of(4);
        }
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

    /// Writes, any width at any offset; bits that cannot be written keep their value, and so
    /// does a power state that does not exist.
    ///
    /// # Errors
    ///
    /// [`OutsideConfig`] if the bytes do not all lie inside; then nothing was written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), OutsideConfig> {
        for (at, new) in self.inside(offset, data.len())?.zip(data) {
            let mask = self.writable[at];
            let new = (self.bytes[at] & !mask) | (new & mask);
            if self.is_acceptable(at, new) {
                self.bytes[at] = new;
            }
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
    /// [`ForeignConfig`] if it has another size, or is not what a client could have made of this one;
    /// then
    /// nothing was changed.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), ForeignConfig> {
        if saved.len() != self.bytes.len() {
            return Err(ForeignConfig::Size { saved: saved.len(), own: self.bytes.len() });
        }
        let differs = |&at: &usize| {
            (saved[at] ^ self.bytes[at]) & !self.writable[at] != 0
                || !self.is_acceptable(at, saved[at])
        };
        if let Some(offset) = (0..saved.len()).find(differs) {
            let (saved, own) = (saved[offset], self.bytes[offset]);
            return Err(ForeignConfig::Byte { offset, saved, own });
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }

    /// Whether a byte can have that value, as far as the write masks do not say so.
    fn is_acceptable(&self, at: usize, value: u8) -> bool {
        // D1 and D2 are not there; a write of them completes without effect.
        self.power_control != Some(at) || matches!(value & POWER_STATE, 0 | POWER_STATE)
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
