//! The commands, by number.

use std::fmt;

/// A command. The first thirteen and the last four go from the client to the server, but for the
/// two DMA commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// The first message of a connection.
    Version = 1,
    /// The client gives the device a range of its address space for DMA.
    DmaMap = 2,
    /// The client takes one back.
    DmaUnmap = 3,
    /// What the device has.
    GetInfo = 4,
    /// What a region is like.
    GetRegionInfo = 5,
    /// Which fds stand for writes into a region.
    GetRegionIoFds = 6,
    /// How many interrupts an index has.
    GetIrqInfo = 7,
    /// Install, remove, mask, fire interrupts.
    SetIrqs = 8,
    /// Read from a region.
    RegionRead = 9,
    /// Write into a region.
    RegionWrite = 10,
    /// The server reads from the client's address space.
    DmaRead = 11,
    /// The server writes into the client's address space.
    DmaWrite = 12,
    /// Reset the device.
    Reset = 13,
    /// Several small writes at once.
    RegionWriteMulti = 15,
    /// Migration and dirty page tracking.
    DeviceFeature = 16,
    /// Read from the device's state.
    MigDataRead = 17,
    /// Write to the device's state.
    MigDataWrite = 18,
}

impl Command {
    /// All commands, by number. 14 was withdrawn.
    pub const ALL: [Self; 17] = [
        Self::Version,
        Self::DmaMap,
        Self::DmaUnmap,
        Self::GetInfo,
        Self::GetRegionInfo,
        Self::GetRegionIoFds,
        Self::GetIrqInfo,
        Self::SetIrqs,
        Self::RegionRead,
        Self::RegionWrite,
        Self::DmaRead,
        Self::DmaWrite,
        Self::Reset,
        Self::RegionWriteMulti,
        Self::DeviceFeature,
        Self::MigDataRead,
        Self::MigDataWrite,
    ];

    /// The command with that number, if there is one.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        let place = match number {
            1..=13 => number - 1,
            15..=18 => number - 2,
            _ => return None,
        };
        Self::ALL.get(usize::from(place)).copied()
    }

    /// Its number on the wire.
    #[must_use]
    pub fn number(self) -> u16 {
        self as u16
    }

    /// Its name in the specification, without the prefix that all have.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Version => "VERSION",
            Self::DmaMap => "DMA_MAP",
            Self::DmaUnmap => "DMA_UNMAP",
            Self::GetInfo => "DEVICE_GET_INFO",
            Self::GetRegionInfo => "DEVICE_GET_REGION_INFO",
            Self::GetRegionIoFds => "DEVICE_GET_REGION_IO_FDS",
            Self::GetIrqInfo => "DEVICE_GET_IRQ_INFO",
            Self::SetIrqs => "DEVICE_SET_IRQS",
            Self::RegionRead => "REGION_READ",
            Self::RegionWrite => "REGION_WRITE",
            Self::DmaRead => "DMA_READ",
            Self::DmaWrite => "DMA_WRITE",
            Self::Reset => "DEVICE_RESET",
            Self::RegionWriteMulti => "REGION_WRITE_MULTI",
            Self::DeviceFeature => "DEVICE_FEATURE",
            Self::MigDataRead => "MIG_DATA_READ",
            Self::MigDataWrite => "MIG_DATA_WRITE",
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
