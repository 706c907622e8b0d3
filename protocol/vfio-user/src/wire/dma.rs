//! `DMA_MAP` and `DMA_UNMAP`: which of the client's memory the device can reach; `DMA_READ` and
//! `DMA_WRITE`: the server's way to what it has no fd of.

use super::bitmap::{bitmap_size, check_pages};
use super::bytes::{Put, Reader, check_argsz, check_range, size_u32};
use super::error::WireError;

const MAP: &str = "DMA_MAP";
const UNMAP: &str = "DMA_UNMAP";
const ACCESS: &str = "DMA_READ or DMA_WRITE";

/// The device may read there.
pub const DMA_READABLE: u32 = 1;
/// The device may write there.
pub const DMA_WRITABLE: u32 = 1 << 1;
/// The fd is to be used by `mmap`; an extension of libvfio-user.
pub const DMA_BY_MMAP: u32 = 1 << 2;
/// The fd is to be used by `pread` and `pwrite`; an extension of libvfio-user.
pub const DMA_BY_FILE: u32 = 1 << 3;
const DMA_FLAGS: u32 = DMA_READABLE | DMA_WRITABLE | DMA_BY_MMAP | DMA_BY_FILE;

/// The request of `DMA_MAP`; the reply has no body. A file descriptor may come with it: the memory
/// is then `size` bytes of that file from `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// [`DMA_READABLE`] and so on.
    pub flags: u32,
    /// Where in the file; 0 without one.
    pub offset: u64,
    /// First address.
    pub iova: u64,
    /// How many bytes; not 0.
    pub size: u64,
}

impl DmaMap {
    /// Size of the body, in bytes.
    pub const SIZE: usize = 32;

    /// Reads a body that came with so many `fds`.
    ///
    /// # Errors
    ///
    /// [`WireError`] for unknown flags, an empty range, one that reaches beyond the last address or
    /// the longest file, more than one fd, and flags that need an fd without one.
    pub fn decode(body: &[u8], fds: usize) -> Result<Self, WireError> {
        let mut reader = Reader::new(MAP, body);
        let argsz = reader.u32()?;
        let flags = reader.u32()?;
        let map = Self { flags, offset: reader.u64()?, iova: reader.u64()?, size: reader.u64()? };
        check_argsz(MAP, argsz, Self::SIZE as u64)?;
        if flags & !DMA_FLAGS != 0 {
            return Err(WireError::Flags { what: MAP, flags });
        }
        if fds > 1 || (fds == 0 && flags & (DMA_BY_MMAP | DMA_BY_FILE) != 0) {
            return Err(WireError::Fds { what: MAP, fds, expected: 1 });
        }
        check_range(MAP, map.iova, map.size)?;
        if fds == 1 && map.offset.checked_add(map.size).is_none_or(|end| end > i64::MAX as u64) {
            return Err(WireError::Range { what: MAP, start: map.offset, size: map.size });
        }
        Ok(map)
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(size_u32(Self::SIZE));
        out.put_u32(self.flags);
        out.put_u64(self.offset);
        out.put_u64(self.iova);
        out.put_u64(self.size);
    }
}

/// The request of `DMA_UNMAP`, and how its reply begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// The largest reply that the client takes, in bytes.
    pub argsz: u32,
    /// What to take back.
    pub what: Unmap,
}

/// What a [`DmaUnmap`] takes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// One range, which has to be one that was mapped.
    Range {
        /// First address.
        iova: u64,
        /// How many bytes.
        size: u64,
    },
    /// One range, and the reply says which of its pages are dirty. No part of the specification,
    /// but of libvfio-user.
    Bitmap {
        /// First address.
        iova: u64,
        /// How many bytes.
        size: u64,
        /// Size of a page, in bytes; a power of two.
        page_size: u64,
        /// Size of the bitmap, in bytes; enough for the range.
        bitmap_size: u64,
    },
    /// Everything.
    All,
}

/// The largest `argsz` that a request for a bitmap may have, as libvfio-user has it.
pub(crate) const MAX_BITMAP_ARGSZ: u32 = 1 << 20;

impl DmaUnmap {
    /// Size of the body without a bitmap, in bytes.
    pub const SIZE: usize = 24;
    /// Where in the body the bitmap of a reply is.
    pub const BITMAP_AT: usize = 40;

    /// Reads the body of a request. `limit` is the longest bitmap, in bytes.
    ///
    /// # Errors
    ///
    /// [`WireError`] for flags that do not exist or do not go together, everything with a range, a
    /// range that can be none, a page size that is no power of two, and a bitmap that is too short
    /// for the range, longer than `limit` or longer than `argsz` allows, which is at most 1 MiB then.
    pub fn decode(body: &[u8], limit: u32) -> Result<Self, WireError> {
        let mut reader = Reader::new(UNMAP, body);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        let (iova, size) = (reader.u64()?, reader.u64()?);
        check_argsz(UNMAP, argsz, Self::SIZE as u64)?;
        let what = match flags {
            0 => Unmap::Range { iova, size },
            1 => {
                let (page_size, bitmap_size) = (reader.u64()?, reader.u64()?);
                Unmap::Bitmap { iova, size, page_size, bitmap_size }
            }
            2 if iova == 0 && size == 0 => return Ok(Self { argsz, what: Unmap::All }),
            2 => return Err(WireError::Range { what: UNMAP, start: iova, size }),
            _ => return Err(WireError::Flags { what: UNMAP, flags }),
        };
        check_range(UNMAP, iova, size)?;
        if let Unmap::Bitmap { page_size, bitmap_size: count, .. } = what {
            check_pages(UNMAP, iova, size, page_size)?;
            if count > u64::from(limit) {
                return Err(WireError::TooLong { what: UNMAP, count, limit: u64::from(limit) });
            }
            if count < bitmap_size(size, page_size) {
                return Err(WireError::Field { what: UNMAP, field: "bitmap size", value: count });
            }
            check_argsz(UNMAP, argsz, count + Self::BITMAP_AT as u64)?;
            if argsz > MAX_BITMAP_ARGSZ {
                let (count, limit) = (u64::from(argsz), u64::from(MAX_BITMAP_ARGSZ));
                return Err(WireError::TooLong { what: UNMAP, count, limit });
            }
        }
        Ok(Self { argsz, what })
    }

    /// Appends the body of a request, or of the reply to it; a bitmap follows there.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (flags, iova, size) = match self.what {
            Unmap::Range { iova, size } => (0, iova, size),
            Unmap::Bitmap { iova, size, .. } => (1, iova, size),
            Unmap::All => (2, 0, 0),
        };
        out.put_u32(self.argsz);
        out.put_u32(flags);
        out.put_u64(iova);
        out.put_u64(size);
        if let Unmap::Bitmap { page_size, bitmap_size, .. } = self.what {
            out.put_u64(page_size);
            out.put_u64(bitmap_size);
        }
    }
}

/// The request of `DMA_READ` and `DMA_WRITE`, and how their replies begin. Data follow in a
/// `DMA_WRITE` and in the reply to a `DMA_READ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaAccess {
    /// First address in the client's address space.
    pub address: u64,
    /// How many bytes.
    pub count: u64,
}

impl DmaAccess {
    /// Size without the data, in bytes.
    pub const SIZE: usize = 16;

    /// Reads a body: the access and the data that follow.
    fn decode(body: &[u8], limit: u32) -> Result<(Self, &[u8]), WireError> {
        let mut reader = Reader::new(ACCESS, body);
        let access = Self { address: reader.u64()?, count: reader.u64()? };
        if access.count > u64::from(limit) {
            let (count, limit) = (access.count, u64::from(limit));
            return Err(WireError::TooLong { what: ACCESS, count, limit });
        }
        check_range(ACCESS, access.address, access.count)?;
        Ok((access, reader.rest()))
    }

    /// Reads the request of a `DMA_READ`, or the reply to a `DMA_WRITE`. `limit` is the client's
    /// `max_data_xfer_size`.
    ///
    /// # Errors
    ///
    /// [`WireError`] for a count above the limit, and a range that can be none.
    pub fn decode_plain(body: &[u8], limit: u32) -> Result<Self, WireError> {
        Self::decode(body, limit).map(|(access, _)| access)
    }

    /// Reads the request of a `DMA_WRITE`, or the reply to a `DMA_READ`, with its data.
    ///
    /// # Errors
    ///
    /// As [`decode_plain`](Self::decode_plain), and [`WireError::DataLength`] if there are more
    /// data or less.
    pub fn decode_with_data(body: &[u8], limit: u32) -> Result<(Self, &[u8]), WireError> {
        let (access, data) = Self::decode(body, limit)?;
        if u64::try_from(data.len()) != Ok(access.count) {
            let (length, count) = (data.len(), access.count);
            return Err(WireError::DataLength { what: ACCESS, length, count });
        }
        Ok((access, data))
    }

    /// Appends the body, without data.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.address);
        out.put_u64(self.count);
    }
}
