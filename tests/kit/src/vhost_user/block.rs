//! Requests of a block device: virtio 1.3, section 5.2.6.

use super::error::VhostUserError;
use super::guest::{Completion, Guest, Part, RequestId};
use std::time::Duration;

/// Size of a sector in bytes: the unit of all requests, whatever the size of the disk's blocks.
pub const SECTOR: usize = 512;
/// The most bytes of a serial number.
const SERIAL: usize = 20;

/// A request of a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockRequest {
    /// Reads.
    Read {
        /// From that sector on.
        sector: u64,
        /// That many bytes.
        length: usize,
    },
    /// Writes.
    Write {
        /// From that sector on.
        sector: u64,
        /// What.
        data: Vec<u8>,
    },
    /// What was written is to be on the disk.
    Flush,
    /// Asks for the serial number.
    GetId,
    /// What is in these sectors is not needed any more.
    Discard {
        /// From that sector on.
        sector: u64,
        /// How many.
        sectors: u32,
    },
    /// Makes these sectors zeros.
    WriteZeroes {
        /// From that sector on.
        sector: u64,
        /// How many.
        sectors: u32,
        /// Their space may be given up.
        unmap: bool,
    },
    /// A request of a type that there may not be.
    Other(u32),
}

/// How a request of a block device has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockStatus {
    /// It is done.
    Ok,
    /// It has failed.
    IoError,
    /// The device has no such requests.
    Unsupported,
    /// What is none of them.
    Unknown(u8),
}

/// What a block device has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockAnswer {
    /// To which request.
    pub request: RequestId,
    /// How it has ended.
    pub status: BlockStatus,
    /// What was read, or the serial number with zeros up to 20 bytes; nothing for other requests.
    pub data: Vec<u8>,
}

impl BlockRequest {
    /// How many descriptors it takes, with buffers of that many bytes.
    #[must_use]
    pub fn parts(&self, buffer: usize) -> usize {
        let (_, readable, writable) = self.shape();
        let of = |length: usize| length.div_ceil(buffer.max(1));
        2 + of(readable.len()) + of(writable)
    }

    /// Its type, what follows the header, and how much the device answers.
    fn shape(&self) -> (u32, std::borrow::Cow<'_, [u8]>, usize) {
        let range = |sector: u64, sectors: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        let nothing = || [].as_slice().into();
        match self {
            Self::Read { length, .. } => (0, nothing(), *length),
            Self::Write { data, .. } => (1, data.into(), 0),
            Self::Flush => (4, nothing(), 0),
            Self::GetId => (8, nothing(), SERIAL),
            Self::Discard { sector, sectors } => (11, range(*sector, *sectors, 0).into(), 0),
            Self::WriteZeroes { sector, sectors, unmap } => {
                (13, range(*sector, *sectors, (*unmap).into()).into(), 0)
            }
            Self::Other(kind) => (*kind, nothing(), 0),
        }
    }

    fn sector(&self) -> u64 {
        match self {
            Self::Read { sector, .. } | Self::Write { sector, .. } => *sector,
            _ => 0,
        }
    }
}

impl BlockAnswer {
    /// Reads the answer of a block device out of what it has written.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Block`] if there is no room for a status.
    pub fn of(completion: Completion) -> Result<Self, VhostUserError> {
        let Completion { request, mut data, .. } = completion;
        let status = data.pop().and_then(|status| status.first().copied());
        let status = status.ok_or_else(|| VhostUserError::Block {
            request,
            what: "it has no room for a status".to_owned(),
        })?;
        let status = match status {
            0 => BlockStatus::Ok,
            1 => BlockStatus::IoError,
            2 => BlockStatus::Unsupported,
            other => BlockStatus::Unknown(other),
        };
        Ok(Self { request, status, data: data.concat() })
    }
}

impl Guest {
    /// Puts a request of a block device into a ring, and tells nobody. Its data has as many parts as buffers
    /// of this guest's [layout](super::RingLayout) are needed for it.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    pub fn push_block(
        &mut self,
        queue: usize,
        request: &BlockRequest,
    ) -> Result<RequestId, VhostUserError> {
        let (kind, readable, writable) = request.shape();
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&request.sector().to_le_bytes());
        let buffer = self.buffer();
        let mut parts = vec![Part::Readable(&header)];
        parts.extend(readable.chunks(buffer).map(Part::Readable));
        let mut left = writable;
        while left > 0 {
            let length = left.min(buffer);
            parts.push(Part::Writable(length));
            left -= length;
        }
        parts.push(Part::Writable(1));
        self.push(queue, &parts)
    }

    /// Does one request of a block device, as [`request`](Self::request) does.
    ///
    /// # Errors
    ///
    /// As [`request`](Self::request). A device that answers with an error is no error here.
    pub fn block(
        &mut self,
        queue: usize,
        request: &BlockRequest,
        within: Duration,
    ) -> Result<BlockAnswer, VhostUserError> {
        let request = self.push_block(queue, request)?;
        BlockAnswer::of(self.answer_to(request, within)?)
    }
}
