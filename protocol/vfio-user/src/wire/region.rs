//! `DEVICE_GET_REGION_INFO`: what a region is like, and which parts of it can be mapped.

use super::bytes::{Put, Reader, size_u32};
use super::error::WireError;

const WHAT: &str = "DEVICE_GET_REGION_INFO";

/// The region can be read.
pub const REGION_READABLE: u32 = 1;
/// The region can be written to.
pub const REGION_WRITABLE: u32 = 1 << 1;
/// The region, or parts of it, can be mapped through the fd that comes with the reply.
pub const REGION_MAPPABLE: u32 = 1 << 2;
/// Capabilities follow the fixed part.
pub(super) const REGION_CAPS: u32 = 1 << 3;

/// Capability: only some areas can be mapped.
const CAP_SPARSE_MMAP: u16 = 1;
/// Capability: the MSI-X table can be mapped.
const CAP_MSIX_MAPPABLE: u16 = 3;
const CAP_HEADER: usize = 8;

/// The reply of `DEVICE_GET_REGION_INFO`. A region that the device does not have has size 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// [`REGION_READABLE`], [`REGION_WRITABLE`], [`REGION_MAPPABLE`]. That capabilities follow is
    /// not said here.
    pub flags: u32,
    /// Which region.
    pub index: u32,
    /// How many bytes it has.
    pub size: u64,
    /// Where in the file of the fd it begins.
    pub offset: u64,
    /// Which areas can be mapped; `None`: the whole, if any of it can be.
    pub sparse: Option<Vec<SparseArea>>,
    /// The MSI-X table can be mapped too.
    pub msix_mappable: bool,
}

/// An area of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseArea {
    /// Where in the region it begins.
    pub offset: u64,
    /// How many bytes it has.
    pub size: u64,
}

/// What came in a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegionReply {
    /// Everything.
    Whole(RegionInfo),
    /// The capabilities did not fit: ask again with this `argsz`.
    Partial {
        /// How large a reply has to be possible, in bytes.
        argsz: u32,
    },
}

impl RegionInfo {
    /// Size of the body without capabilities, in bytes.
    pub const SIZE: usize = 32;
    /// The most areas that are told in one reply.
    pub const MAX_AREAS: usize = 1024;

    /// How large the whole reply is, in bytes: the `argsz` that it takes.
    #[must_use]
    pub fn reply_size(&self) -> usize {
        let sparse = self.sparse.as_ref().map_or(0, |areas| CAP_HEADER + 8 + 16 * areas.len());
        Self::SIZE + sparse + if self.msix_mappable { CAP_HEADER } else { 0 }
    }

    /// Appends the body of a reply for a client that takes `argsz` bytes, and returns whether all
    /// of it fitted: only then an fd may go with it. If not, it is the fixed part alone, with the
    /// size that the whole would have and without the bit for capabilities.
    pub fn encode(&self, argsz: u32, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        let whole = size_u32(self.reply_size());
        let caps = whole > size_u32(Self::SIZE);
        let fits = whole <= argsz;
        let flags = self.flags & !REGION_CAPS;
        out.put_u32(whole);
        out.put_u32(if caps && fits { flags | REGION_CAPS } else { flags });
        out.put_u32(self.index);
        out.put_u32(if caps && fits { size_u32(Self::SIZE) } else { 0 });
        out.put_u64(self.size);
        out.put_u64(self.offset);
        if !fits {
            return false;
        }
        if let Some(areas) = &self.sparse {
            let end = Self::SIZE + CAP_HEADER + 8 + 16 * areas.len();
            put_capability(out, CAP_SPARSE_MMAP, if self.msix_mappable { end } else { 0 });
            out.put_u32(size_u32(areas.len()));
            out.put_u32(0);
            for area in areas {
                out.put_u64(area.offset);
                out.put_u64(area.size);
            }
        }
        if self.msix_mappable {
            put_capability(out, CAP_MSIX_MAPPABLE, 0);
        }
        debug_assert_eq!(out.len() - start, self.reply_size());
        true
    }

    /// Reads the body of a reply. Capabilities that are not known are skipped.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short, for a chain of capabilities that leaves the body or goes
    /// back, more than [`MAX_AREAS`](Self::MAX_AREAS) areas, and areas outside the region.
    pub fn decode(body: &[u8]) -> Result<RegionReply, WireError> {
        let mut reader = Reader::new(WHAT, body);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        let (index, cap_offset) = (reader.u32()?, reader.u32()?);
        let (size, offset) = (reader.u64()?, reader.u64()?);
        if usize::try_from(argsz).is_ok_and(|argsz| argsz > body.len()) {
            return Ok(RegionReply::Partial { argsz });
        }
        let mut info = Self { flags: flags & !REGION_CAPS, index, size, offset, ..Self::default() };
        if flags & REGION_CAPS != 0 {
            info.decode_capabilities(body, cap_offset)?;
        }
        Ok(RegionReply::Whole(info))
    }

    fn decode_capabilities(&mut self, body: &[u8], first: u32) -> Result<(), WireError> {
        let mut at = first;
        let mut earliest = size_u32(Self::SIZE);
        while at != 0 {
            let out_of_place =
                WireError::Field { what: WHAT, field: "offset of a capability", value: at.into() };
            if at < earliest {
                return Err(out_of_place);
            }
            let body =
                usize::try_from(at).ok().and_then(|at| body.get(at..)).ok_or(out_of_place)?;
            let mut reader = Reader::new(WHAT, body);
            let (id, _version, next) = (reader.u16()?, reader.u16()?, reader.u32()?);
            match id {
                CAP_SPARSE_MMAP => self.sparse = Some(decode_areas(&mut reader, self.size)?),
                CAP_MSIX_MAPPABLE => self.msix_mappable = true,
                _ => {}
            }
            // Only forward, so the chain is no longer than the body.
            earliest = at.saturating_add(size_u32(CAP_HEADER));
            at = next;
        }
        Ok(())
    }
}

fn put_capability(out: &mut Vec<u8>, id: u16, next: usize) {
    out.put_u16(id);
    out.put_u16(1);
    out.put_u32(size_u32(next));
}

fn decode_areas(reader: &mut Reader<'_>, size: u64) -> Result<Vec<SparseArea>, WireError> {
    let (count, _reserved) = (reader.u32()?, reader.u32()?);
    let limit = RegionInfo::MAX_AREAS;
    if usize::try_from(count).is_ok_and(|count| count > limit) {
        let (count, limit) = (u64::from(count), limit as u64);
        return Err(WireError::TooLong { what: WHAT, count, limit });
    }
    let mut areas = Vec::new();
    for _ in 0..count {
        let area = SparseArea { offset: reader.u64()?, size: reader.u64()? };
        if area.offset.checked_add(area.size).is_none_or(|end| end > size) {
            return Err(WireError::Range { what: WHAT, start: area.offset, size: area.size });
        }
        areas.push(area);
    }
    Ok(areas)
}
