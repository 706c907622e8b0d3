//! `REGION_READ`, `REGION_WRITE`, `REGION_WRITE_MULTI`.

use super::bytes::{Put, Reader, size_u32};
use super::error::WireError;

const WHAT: &str = "REGION_READ or REGION_WRITE";
const MULTI: &str = "REGION_WRITE_MULTI";

/// The request of `REGION_READ` and `REGION_WRITE`, and how their replies begin. Data follow in a
/// `REGION_WRITE` and in the reply to a `REGION_READ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// Where in the region.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// How many bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Size without the data, in bytes.
    pub const SIZE: usize = 16;

    #[inline]
    fn decode(body: &[u8], limit: u32) -> Result<(Self, &[u8]), WireError> {
        let mut reader = Reader::new(WHAT, body);
        let access = Self { offset: reader.u64()?, region: reader.u32()?, count: reader.u32()? };
        if access.count > limit {
            let (count, limit) = (u64::from(access.count), u64::from(limit));
            return Err(WireError::TooLong { what: WHAT, count, limit });
        }
        Ok((access, reader.rest()))
    }

    /// Reads the request of a `REGION_READ`, or the reply to a `REGION_WRITE`. `limit` is the
    /// connection's `max_data_xfer_size`.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short or the count above the limit.
    #[inline]
    pub fn decode_plain(body: &[u8], limit: u32) -> Result<Self, WireError> {
        Self::decode(body, limit).map(|(access, _)| access)
    }

    /// Reads the request of a `REGION_WRITE`, or the reply to a `REGION_READ`, with its data.
    ///
    /// # Errors
    ///
    /// As [`decode_plain`](Self::decode_plain), and [`WireError::DataLength`] if there are more
    /// data or less.
    #[inline]
    pub fn decode_with_data(body: &[u8], limit: u32) -> Result<(Self, &[u8]), WireError> {
        let (access, data) = Self::decode(body, limit)?;
        if size_u32(data.len()) != access.count {
            let (length, count) = (data.len(), u64::from(access.count));
            return Err(WireError::DataLength { what: WHAT, length, count });
        }
        Ok((access, data))
    }

    /// Appends the body, without data.
    #[inline]
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.offset);
        out.put_u32(self.region);
        out.put_u32(self.count);
    }

    /// Whether it lies within a region of `size` bytes.
    #[must_use]
    pub fn is_within(&self, size: u64) -> bool {
        self.offset.checked_add(u64::from(self.count)).is_some_and(|end| end <= size)
    }
}

/// One write of a `REGION_WRITE_MULTI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallWrite {
    /// Where in the region.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    count: u32,
    data: [u8; 8],
}

impl SmallWrite {
    /// Size on the wire, in bytes.
    pub const SIZE: usize = 24;

    /// Of at most 8 bytes; `None` for more.
    #[must_use]
    pub fn new(region: u32, offset: u64, bytes: &[u8]) -> Option<Self> {
        let mut data = [0; 8];
        data.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self { offset, region, count: size_u32(bytes.len()), data })
    }

    /// What is written, at most 8 bytes.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        usize::try_from(self.count).ok().and_then(|count| self.data.get(..count)).unwrap_or(&[])
    }

    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(MULTI, bytes);
        let (offset, region, count) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let mut data = [0; 8];
        data.copy_from_slice(reader.bytes(8)?);
        if count > 8 {
            return Err(WireError::TooLong { what: MULTI, count: count.into(), limit: 8 });
        }
        Ok(Self { offset, region, count, data })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.offset);
        out.put_u32(self.region);
        out.put_u32(self.count);
        out.extend_from_slice(&self.data);
    }
}

/// The request of `REGION_WRITE_MULTI`. The reply is one number of 8 bytes: how many were done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteMulti<'a> {
    entries: &'a [u8],
}

impl<'a> WriteMulti<'a> {
    /// Size without the writes, in bytes.
    pub const SIZE: usize = 8;
    /// The most writes in one message: so many that each server has room for it. QEMU sends 200.
    pub const MOST: usize = 1024;

    /// Reads the body of a request; all writes have been judged then.
    ///
    /// # Errors
    ///
    /// [`WireError`] if there are more or fewer writes than it says, or one has more than 8 bytes.
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(MULTI, body);
        let count = reader.u64()?;
        let entries = reader.rest();
        let size = count.checked_mul(SmallWrite::SIZE as u64);
        if size.is_none_or(|size| u64::try_from(entries.len()) != Ok(size)) {
            return Err(WireError::DataLength { what: MULTI, length: entries.len(), count });
        }
        for entry in entries.chunks_exact(SmallWrite::SIZE) {
            SmallWrite::decode(entry)?;
        }
        Ok(Self { entries })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        (self.entries.len() / SmallWrite::SIZE) as u64
    }

    /// The writes, in order.
    pub fn writes(&self) -> impl Iterator<Item = SmallWrite> + 'a {
        self.entries.chunks_exact(SmallWrite::SIZE).flat_map(SmallWrite::decode)
    }

    /// Appends the body of a request.
    pub fn encode(writes: &[SmallWrite], out: &mut Vec<u8>) {
        out.put_u64(writes.len() as u64);
        for write in writes {
            write.encode(out);
        }
    }

    /// Appends the body of a reply: so many were done.
    pub fn encode_reply(done: u64, out: &mut Vec<u8>) {
        out.put_u64(done);
    }

    /// Reads the body of a reply: how many were done.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short.
    pub fn decode_reply(body: &[u8]) -> Result<u64, WireError> {
        Reader::new(MULTI, body).u64()
    }
}
