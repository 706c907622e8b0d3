//! `DEVICE_GET_REGION_IO_FDS`: fds that stand for writes into a region, so that they need no
//! message.
//!
//! The specification's entries have 40 bytes, libvfio-user's 48. Which it is follows from the size
//! of the reply ([`IoFds::decode`]).

use super::bytes::{Put, Reader, check_argsz, size_u32};
use super::error::WireError;

const WHAT: &str = "DEVICE_GET_REGION_IO_FDS";

/// The request: `argsz` and which region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFdsQuery {
    /// The largest reply that the client takes, in bytes.
    pub argsz: u32,
    /// Which region.
    pub index: u32,
}

/// The largest `argsz` that is believed.
const MAX_ARGSZ: u32 = 1 << 20;

impl IoFdsQuery {
    /// Size of the body, in bytes.
    pub const SIZE: usize = 16;

    /// Reads the body of a request.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short, for an `argsz` below 16 or above 1 MiB, and for flags or a
    /// count that are not 0.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(WHAT, body);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        let (index, count) = (reader.u32()?, reader.u32()?);
        check_argsz(WHAT, argsz, Self::SIZE as u64)?;
        if argsz > MAX_ARGSZ {
            let (count, limit) = (u64::from(argsz), u64::from(MAX_ARGSZ));
            return Err(WireError::TooLong { what: WHAT, count, limit });
        }
        if flags != 0 {
            return Err(WireError::Flags { what: WHAT, flags });
        }
        if count != 0 {
            return Err(WireError::Field { what: WHAT, field: "count", value: count.into() });
        }
        Ok(Self { argsz, index })
    }

    /// Appends the body of a request.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.argsz);
        out.put_u32(0);
        out.put_u32(self.index);
        out.put_u32(0);
    }
}

/// A part of a region whose writes can be made through an fd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFd {
    /// Where in the region.
    pub offset: u64,
    /// Width of the writes in bytes; 0 for any.
    pub size: u64,
    /// Which of the reply's fds it is.
    pub fd_index: u32,
    /// What kind of fd.
    pub kind: IoFdKind,
}

/// What kind of fd stands for writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoFdKind {
    /// An eventfd: each write, or each write of `datamatch`, signals it.
    IoEventFd {
        /// As `KVM_IOEVENTFD`'s: 1 datamatch, 2 PIO.
        flags: u32,
        /// The value that has to be written.
        datamatch: u64,
    },
    /// A socket that takes writes as messages. No kernel has that.
    IoRegionFd {
        /// 1 PIO, 2 posted writes.
        flags: u32,
        /// Repeated in each message.
        user_data: u64,
    },
    /// An eventfd, and memory where the value is stored. No kernel has that.
    Shadow {
        /// As `KVM_IOEVENTFD`'s.
        flags: u32,
        /// Which of the reply's fds is the memory.
        memory_fd_index: u32,
        /// Where in the memory.
        memory_offset: u64,
        /// The value that has to be written; 0 where the entries are too short for it.
        datamatch: u64,
    },
}

/// How long an entry is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stride {
    /// 40 bytes, as in the specification.
    #[default]
    Specification,
    /// 48 bytes, as libvfio-user has it.
    Libvfio,
}

impl Stride {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Specification => 40,
            Self::Libvfio => 48,
        }
    }
}

/// The reply: all such parts of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoFds {
    /// Which region.
    pub index: u32,
    /// The parts.
    pub entries: Vec<IoFd>,
}

/// What came in a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IoFdsReply {
    /// Everything.
    Whole(IoFds),
    /// The entries did not fit: ask again with this `argsz`.
    Partial {
        /// How large a reply has to be possible, in bytes.
        argsz: u32,
    },
}

impl IoFds {
    /// Appends the body of a reply for a client that takes `argsz` bytes, and returns whether the
    /// entries fitted: only then their fds may go with it.
    pub fn encode(&self, argsz: u32, stride: Stride, out: &mut Vec<u8>) -> bool {
        let whole = size_u32(IoFdsQuery::SIZE + self.entries.len() * stride.bytes());
        out.put_u32(whole);
        out.put_u32(0);
        out.put_u32(self.index);
        out.put_u32(size_u32(self.entries.len()));
        if whole > argsz {
            return false;
        }
        for entry in &self.entries {
            let end = out.len() + stride.bytes();
            entry.encode(out);
            out.resize(end, 0);
        }
        true
    }

    /// Reads the body of a reply that came with so many `fds`.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short, for entries of less than 40 bytes or of a kind that does
    /// not exist, and for fds that did not come.
    pub fn decode(body: &[u8], fds: usize) -> Result<IoFdsReply, WireError> {
        let mut reader = Reader::new(WHAT, body);
        let (argsz, _flags) = (reader.u32()?, reader.u32()?);
        let (index, count) = (reader.u32()?, reader.u32()?);
        let size = usize::try_from(argsz).unwrap_or(usize::MAX);
        if size > body.len() && count != 0 {
            return Ok(IoFdsReply::Partial { argsz });
        }
        let mut entries = Vec::new();
        if count != 0 {
            let bytes = size.saturating_sub(IoFdsQuery::SIZE);
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            let stride = bytes / count;
            if stride < Stride::Specification.bytes() || bytes % count != 0 {
                let value = u64::from(argsz);
                return Err(WireError::Field { what: WHAT, field: "argsz", value });
            }
            for _ in 0..count {
                entries.push(IoFd::decode(reader.bytes(stride)?, fds)?);
            }
        }
        Ok(IoFdsReply::Whole(Self { index, entries }))
    }
}

impl IoFd {
    fn encode(&self, out: &mut Vec<u8>) {
        let (number, flags, memory, value, last) = match self.kind {
            // libvfio-user has it at the end of its longer entries, for all kinds.
            IoFdKind::IoEventFd { flags, datamatch } => (0, flags, 0, datamatch, datamatch),
            IoFdKind::IoRegionFd { flags, user_data } => (1, flags, 0, user_data, 0),
            IoFdKind::Shadow { flags, memory_fd_index, memory_offset, datamatch } => {
                (2, flags, memory_fd_index, memory_offset, datamatch)
            }
        };
        let start = out.len();
        out.put_u64(self.offset);
        out.put_u64(self.size);
        out.put_u32(self.fd_index);
        out.put_u32(number);
        out.put_u32(flags);
        out.put_u32(memory);
        out.put_u64(value);
        // Where the entries are too short for it, it is cut off again.
        out.put_u64(last);
        debug_assert_eq!(out.len() - start, Stride::Libvfio.bytes());
    }

    fn decode(bytes: &[u8], fds: usize) -> Result<Self, WireError> {
        let mut reader = Reader::new(WHAT, bytes);
        let (offset, size) = (reader.u64()?, reader.u64()?);
        let (fd_index, number) = (reader.u32()?, reader.u32()?);
        let (flags, memory_fd_index, value) = (reader.u32()?, reader.u32()?, reader.u64()?);
        let kind = match number {
            0 => {
                let last = reader.u64().unwrap_or(0);
                IoFdKind::IoEventFd { flags, datamatch: if last == 0 { value } else { last } }
            }
            1 => IoFdKind::IoRegionFd { flags, user_data: value },
            2 => {
                let datamatch = reader.u64().unwrap_or(0);
                IoFdKind::Shadow { flags, memory_fd_index, memory_offset: value, datamatch }
            }
            _ => return Err(WireError::Field { what: WHAT, field: "type", value: number.into() }),
        };
        let memory = if number == 2 { memory_fd_index } else { 0 };
        for fd in [fd_index, memory] {
            if usize::try_from(fd).is_ok_and(|fd| fd >= fds) {
                return Err(WireError::Field { what: WHAT, field: "fd index", value: fd.into() });
            }
        }
        Ok(Self { offset, size, fd_index, kind })
    }
}
