//! All that a client can ask for, as one type.

use super::access::{RegionAccess, WriteMulti};
use super::command::Command;
use super::dma::{DmaMap, DmaUnmap};
use super::error::WireError;
use super::feature::Feature;
use super::info::Query;
use super::io_fds::IoFdsQuery;
use super::irq::SetIrqs;
use super::migration::MigData;
use super::version::Version;

/// A client's command, with its body judged as far as that is possible without the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// The first message of a connection.
    Version(Version),
    /// Give the device a range of addresses. The fd, if one came, is beside this.
    DmaMap(DmaMap),
    /// Take one back.
    DmaUnmap(DmaUnmap),
    /// What the device has.
    GetInfo(Query),
    /// What a region is like.
    GetRegionInfo(Query),
    /// Which fds stand for writes into a region.
    GetRegionIoFds(IoFdsQuery),
    /// How many interrupts an index has.
    GetIrqInfo(Query),
    /// Install, remove, mask or fire interrupts. What of it can be judged only with the device is
    /// left to [`validate`](super::irq::validate); the fds that came are beside this.
    SetIrqs {
        /// The fixed part.
        request: SetIrqs,
        /// One byte for each interrupt, or nothing.
        data: &'a [u8],
    },
    /// Read from a region.
    RegionRead(RegionAccess),
    /// Write into a region.
    RegionWrite {
        /// Where.
        access: RegionAccess,
        /// What: as many bytes as the access says.
        data: &'a [u8],
    },
    /// Reset the device.
    Reset,
    /// Several small writes, in their order.
    RegionWriteMulti(WriteMulti<'a>),
    /// Migration and dirty page tracking.
    DeviceFeature(Feature),
    /// Read from the device's state.
    MigDataRead(MigData),
    /// Write to the device's state.
    MigDataWrite(&'a [u8]),
}

/// What bounds the messages of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes of one transfer.
    pub max_data_xfer_size: u32,
}

impl Limits {
    /// Room for the fixed parts of the longest message, and for those that transfer nothing but can
    /// be long (small writes, interrupts, capabilities).
    const ROOM: u32 = 64 << 10;

    /// How long a whole message can be, in bytes.
    #[must_use]
    pub fn max_message(self) -> u32 {
        self.max_data_xfer_size.saturating_add(Self::ROOM)
    }
}

impl<'a> Request<'a> {
    /// Reads the body of a command with this number, with which so many `fds` came.
    ///
    /// # Errors
    ///
    /// [`WireError`] for what the decoding of the command refuses, for a number that is no command
    /// of a client, and for fds with a command that takes none. Its
    /// [errno](WireError::errno) is what to answer; the stream is still in step.
    #[inline]
    pub fn decode(
        number: u16,
        body: &'a [u8],
        fds: usize,
        limits: Limits,
    ) -> Result<Self, WireError> {
        let limit = limits.max_data_xfer_size;
        let command = Command::from_number(number).ok_or(WireError::UnknownCommand { number })?;
        if fds > 0 && !matches!(command, Command::DmaMap | Command::SetIrqs) {
            return Err(WireError::Fds { what: command.name(), fds, expected: 0 });
        }
        Ok(match command {
            Command::RegionRead => Self::RegionRead(RegionAccess::decode_plain(body, limit)?),
            Command::RegionWrite => {
                let (access, data) = RegionAccess::decode_with_data(body, limit)?;
                Self::RegionWrite { access, data }
            }
            Command::Version => Self::Version(Version::decode(body)?),
            Command::DmaMap => Self::DmaMap(DmaMap::decode(body, fds)?),
            Command::DmaUnmap => Self::DmaUnmap(DmaUnmap::decode(body, limit)?),
            Command::GetInfo => Self::GetInfo(Query::decode_info(body)?),
            Command::GetRegionInfo => Self::GetRegionInfo(Query::decode_region(body)?),
            Command::GetRegionIoFds => Self::GetRegionIoFds(IoFdsQuery::decode(body)?),
            Command::GetIrqInfo => Self::GetIrqInfo(Query::decode_irq(body)?),
            Command::SetIrqs => {
                let (request, data) = SetIrqs::decode(body)?;
                Self::SetIrqs { request, data }
            }
            // Some clients send a body with it.
            Command::Reset => Self::Reset,
            Command::RegionWriteMulti => Self::RegionWriteMulti(WriteMulti::decode(body)?),
            Command::DeviceFeature => {
                Self::DeviceFeature(Feature::decode(body, limits.max_message())?)
            }
            Command::MigDataRead => Self::MigDataRead(MigData::decode_read(body, limit)?),
            Command::MigDataWrite => Self::MigDataWrite(MigData::decode_data(body, limit)?),
            Command::DmaRead | Command::DmaWrite => {
                return Err(WireError::UnknownCommand { number });
            }
        })
    }
}
