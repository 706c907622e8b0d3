//! `MIG_DATA_READ` and `MIG_DATA_WRITE`: a device's state as one stream of bytes. Where one message
//! ends and the next begins means nothing.
//!
//! **Padding.** libvfio-user's reply to a read always has as many bytes as were asked for, with
//! zeroes after those that count, and its client takes no other. So replies are padded on request
//! ([`MigData::encode_reply`]), and a reader trusts the size alone.

use super::bytes::{Put, Reader, check_argsz, size_u32};
use super::error::WireError;

const READ: &str = "MIG_DATA_READ";
const WRITE: &str = "MIG_DATA_WRITE";

/// How both commands and the reply to a read begin: the size of what is asked for, or follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigData {
    /// How many bytes.
    pub size: u32,
}

impl MigData {
    /// Size without the data, in bytes.
    pub const SIZE: usize = 8;

    fn decode<'a>(
        what: &'static str,
        body: &'a [u8],
        limit: u32,
    ) -> Result<(u32, &'a [u8]), WireError> {
        let mut reader = Reader::new(what, body);
        let (argsz, size) = (reader.u32()?, reader.u32()?);
        if size > limit {
            let (count, limit) = (u64::from(size), u64::from(limit));
            return Err(WireError::TooLong { what, count, limit });
        }
        check_argsz(what, argsz, u64::from(size) + Self::SIZE as u64)?;
        Ok((size, reader.rest()))
    }

    /// Reads the request of a read. `limit` is the connection's `max_data_xfer_size`.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short, the size above the limit, or `argsz` below the size.
    pub fn decode_read(body: &[u8], limit: u32) -> Result<Self, WireError> {
        Self::decode(READ, body, limit).map(|(size, _)| Self { size })
    }

    /// Reads the request of a write, or the reply to a read: the data. What is behind them is
    /// padding. For a reply `limit` is what was asked for.
    ///
    /// # Errors
    ///
    /// As [`decode_read`](Self::decode_read), and if there are fewer data than it says.
    pub fn decode_data(body: &[u8], limit: u32) -> Result<&[u8], WireError> {
        let (size, rest) = Self::decode(WRITE, body, limit)?;
        let data = usize::try_from(size).ok().and_then(|size| rest.get(..size));
        data.ok_or(WireError::DataLength { what: WRITE, length: rest.len(), count: size.into() })
    }

    /// Appends the request of a read; also what is before the data of a write and of a reply.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.size.saturating_add(size_u32(Self::SIZE)));
        out.put_u32(self.size);
    }

    /// Appends the body of the reply to a read for `asked` bytes: `data`, of which there are at
    /// most as many, and zeroes for the others if `pad`.
    pub fn encode_reply(data: &[u8], asked: u32, pad: bool, out: &mut Vec<u8>) {
        let size = size_u32(data.len());
        Self { size }.encode(out);
        out.extend_from_slice(data);
        if pad {
            let padding = usize::try_from(asked.saturating_sub(size)).unwrap_or(0);
            out.resize(out.len() + padding, 0);
        }
    }
}
