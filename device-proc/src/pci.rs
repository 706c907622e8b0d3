//! The PCI view of a device: which region is what, and its configuration space.
//!
//! [`PciLayout`] says what is behind each BAR and which interrupts there are; [`ConfigSpace`] is the
//! type 0 configuration space (PCI Local Bus Specification 3.0, chapter 6) with its capabilities and
//! write masks. Both are pure: nothing here knows sockets or devices.
//!
//! The capabilities are those that a device asks for, in the order power management, MSI, MSI-X, PCI
//! Express. With PCI Express the configuration space has 4096 bytes, of which those from 256 on are
//! empty (no extended capability), and 256 otherwise. There is no expansion ROM: its BAR is 0.
//!
//! What a client writes into the configuration space is kept and has no other effect: a VMM acts on
//! the command register, on MSI and on MSI-X itself, and tells the device its vectors by
//! `SET_IRQS`. A device in D3hot goes on as before and loses nothing.
//!
//! A device with MSI-X vectors gets its vector table and pending bits in a BAR of their own, the
//! highest one that is free: a device's own BARs belong to the device, all of them. The runtime
//! keeps what a client writes there, but does not act on it.
//!
//! Memory BARs are prefetchable, register BARs are not. BARs above 2 GiB are 64-bit ones and take the
//! next index too, and so are prefetchable ones of a PCI Express endpoint (PCI Express Base 3.0,
//! 7.5.2.1); all others are 32-bit ones.

#![forbid(unsafe_code)]

mod capability;
mod config;

pub use config::{ConfigSpace, ForeignConfig, OutsideConfig};

use crate::device::{BarBacking, DeviceInfo};
use crate::interrupt::{IrqCounts, MAX_MSI_VECTORS, MAX_MSIX_VECTORS};
use thiserror::Error;

#[cfg(test)]
mod tests;

/// Size of a conventional configuration space in bytes.
pub const CONFIG_SIZE: usize = 256;
/// Size of the configuration space of a PCI Express endpoint in bytes.
pub const EXPRESS_CONFIG_SIZE: usize = 4096;

const SMALLEST_BAR: u64 = 4096;
const LARGEST_BAR: u64 = 1 << 47;
const LARGEST_32BIT_BAR: u64 = 1 << 31;

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
    /// A 64-bit BAR needs the next index for its upper half.
    #[error("BAR {bar} is a 64-bit one, but the index after it is not free")]
    NoUpperHalf {
        /// Its index.
        bar: usize,
    },
    /// More vectors than MSI-X has.
    #[error("{0} MSI-X vectors, at most 2048 are possible")]
    Vectors(u16),
    /// No number of vectors that MSI has.
    #[error("{0} MSI vectors, expected a power of two from 1 to 32")]
    MsiVectors(u16),
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

impl BarLayout {
    /// Whether reading it has no side effects.
    #[must_use]
    pub fn is_prefetchable(self) -> bool {
        self.usage == BarUse::Memory
    }
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

/// What is behind each BAR, and what else the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciLayout {
    /// BARs 0 to 5; the upper half of a 64-bit one is absent.
    pub bars: [BarLayout; 6],
    /// Where the MSI-X structures are, if the device has any.
    pub msix: Option<MsixLayout>,
    /// How many interrupts there are.
    pub irqs: IrqCounts,
    /// Whether there is a power management capability.
    pub power_management: bool,
    /// Whether it is a PCI Express endpoint.
    pub express: bool,
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
            // Endpoints' prefetchable BARs can be anywhere.
            let is_64bit = size > LARGEST_32BIT_BAR || (info.express && usage == BarUse::Memory);
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
            vectors if vectors > MAX_MSIX_VECTORS => return Err(PciError::Vectors(vectors)),
            vectors => {
                let bar = taken.iter().rposition(|taken| !taken).ok_or(PciError::NoMsixBar)?;
                let table = u32::from(vectors) * 16;
                let pending = u32::from(vectors).div_ceil(64) * 8;
                let size = u64::from(table + pending).next_power_of_two().max(SMALLEST_BAR);
                bars[bar] = BarLayout { usage: BarUse::Msix, size, is_64bit: false };
                Some(MsixLayout { bar, vectors, pending_offset: table })
            }
        };
        let msi = info.msi_vectors;
        if msi != 0 && !(msi.is_power_of_two() && msi <= MAX_MSI_VECTORS) {
            return Err(PciError::MsiVectors(msi));
        }
        let irqs = info.irqs();
        // It is not optional for an endpoint.
        let power_management = info.power_management || info.express;
        Ok(Self { bars, msix, irqs, power_management, express: info.express })
    }
}
