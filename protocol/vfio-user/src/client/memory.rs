//! The memory that the device can reach.

use super::{Client, ClientError};
use crate::wire::{
    Command, DmaMap, DmaUnmap, MAX_BITMAP_ARGSZ, PageBitmap, Unmap, WireError, bitmap_size,
};
use std::os::fd::BorrowedFd;

const UNMAP: Command = Command::DmaUnmap;

fn request(source: WireError) -> ClientError {
    ClientError::Request { command: UNMAP, source }
}

impl Client {
    /// Gives the device a range of addresses. With an fd it is that file, which the server may map;
    /// without one the server asks for it by messages ([`DmaTarget`](super::DmaTarget)).
    ///
    /// # Errors
    ///
    /// [`ClientError`]; EEXIST or EINVAL from the server for a range that overlaps another one.
    pub fn dma_map(&self, map: &DmaMap, fd: Option<BorrowedFd<'_>>) -> Result<(), ClientError> {
        let ask = |body: &mut Vec<u8>| map.encode(body);
        self.call(Command::DmaMap, fd.as_slice(), ask, |_, _| Ok(()))
    }

    /// Takes back a range, which has to be one that was given. When this returns, the device does
    /// not use it any more.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; ENOENT from the server for a range that was not given.
    pub fn dma_unmap(&self, iova: u64, size: u64) -> Result<(), ClientError> {
        self.unmap(Unmap::Range { iova, size })
    }

    /// Takes back everything.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn dma_unmap_all(&self) -> Result<(), ClientError> {
        self.unmap(Unmap::All)
    }

    fn unmap(&self, what: Unmap) -> Result<(), ClientError> {
        let unmap = DmaUnmap { argsz: u32::try_from(DmaUnmap::SIZE).unwrap_or(0), what };
        self.call(UNMAP, &[], |body| unmap.encode(body), |_, _| Ok(()))
    }

    /// Takes back a range and asks which of its pages are dirty. Dirty page tracking has to be on.
    ///
    /// # Errors
    ///
    /// [`ClientError`], also for a bitmap that is longer than one transfer; many servers do not
    /// have this.
    pub fn dma_unmap_dirty(
        &self,
        iova: u64,
        size: u64,
        page_size: u64,
    ) -> Result<PageBitmap, ClientError> {
        // Servers refuse an `argsz` above that, whatever was agreed.
        let limit = self.max_data_xfer_size().min(MAX_BITMAP_ARGSZ - BITMAP_AT);
        let count = bitmap_size(size, page_size);
        let argsz = u32::try_from(count).ok().filter(|count| *count <= limit);
        let argsz = argsz.map(|count| count + BITMAP_AT);
        let too_long = WireError::TooLong { what: UNMAP.name(), count, limit: limit.into() };
        let argsz = argsz.ok_or_else(|| request(too_long))?;
        // Judged before it is sent.
        PageBitmap::new(iova, size, page_size).map_err(request)?;
        let what = Unmap::Bitmap { iova, size, page_size, bitmap_size: count };
        let unmap = DmaUnmap { argsz, what };
        self.call(
            UNMAP,
            &[],
            |body| unmap.encode(body),
            |body, _| {
                let answered = DmaUnmap::decode(body, limit)?;
                if answered.what != what {
                    let value = body.len() as u64;
                    return Err(WireError::Field { what: UNMAP.name(), field: "reply", value });
                }
                let bitmap = body.get(DmaUnmap::BITMAP_AT..).unwrap_or_default();
                PageBitmap::from_bytes(iova, size, page_size, bitmap)
            },
        )
    }
}

#[expect(clippy::cast_possible_truncation, reason = "40")]
const BITMAP_AT: u32 = DmaUnmap::BITMAP_AT as u32;
