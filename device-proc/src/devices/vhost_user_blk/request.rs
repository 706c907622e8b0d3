//! From a chain of descriptors to a request: the virtio specification, sections 2.7 and 5.2.6.
//!
//! A request is a header of 16 bytes, data, and a status byte. How they are cut into descriptors is
//! the driver's choice: the readable ones together begin with the header, the last byte of the
//! writable ones is the status. All of it comes from the guest, which can say anything.
//!
//! Nothing is done here: data is neither read nor written, and nobody is told.

#![forbid(unsafe_code)]

use super::SECTOR;
use std::ops::Deref;
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

/// The most descriptors of a request: as many buffers as one system call takes, and header and
/// status.
pub(super) const MAX_DESCRIPTORS: usize = 1024 + 2;
/// The most ranges of one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 16;
/// The most sectors of a range to be discarded: 2 GiB less 64 KiB, which is a number of blocks whatever
/// their size.
pub(super) const MAX_RANGE_SECTORS: u32 = (1 << 22) - (1 << 7);
/// The most sectors to be zeroed by one request, in one range: 128 MiB. Where the file system has no
/// better way so many zeros are written, and a stop waits for that.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 18;

/// Length of the header in bytes.
const HEADER: u32 = 16;
/// Length of one range in bytes.
const RANGE: u32 = 16;

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    /// The status byte.
    pub(super) fn byte(self) -> u8 {
        let value = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        value.to_le_bytes()[0]
    }
}

/// A piece of guest memory; it lies in the guest's memory as it was when it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) addr: GuestAddress,
    /// In bytes, not 0.
    pub(super) len: u32,
}

/// A piece of the disk, checked to be inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// In bytes.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) len: u64,
    /// Whether its blocks may be given back.
    pub(super) unmap: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Fill the segments from the disk.
    Read {
        /// Where on the disk, in bytes.
        offset: u64,
        /// In bytes, not 0.
        len: u32,
    },
    /// Write the segments to the disk.
    Write {
        /// Where on the disk, in bytes.
        offset: u64,
        /// In bytes, not 0.
        len: u32,
    },
    /// Make stable what was written.
    Flush,
    /// Fill the segments with the serial number.
    GetId,
    /// Give the ranges' blocks back.
    Discard,
    /// Fill the ranges with zeros.
    WriteZeroes,
}

/// Why a request is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    #[error("requests of type {0} are not supported")]
    Type(u32),
    #[error("a discard or write-zeroes request has flags {0:#x}")]
    Flags(u32),
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("there are {0} readable bytes, fewer than a header has")]
    Header(u64),
    #[error("{0} bytes of data: not a number of blocks, or none")]
    Length(u64),
    #[error("sectors from {sector:#x}, {bytes} bytes, are not on the disk")]
    Beyond { sector: u64, bytes: u64 },
    #[error("sector {0:#x} is not where a block begins")]
    Alignment(u64),
    #[error("{bytes} bytes of ranges: not 1 to {most} of them")]
    Ranges { bytes: u64, most: u32 },
    #[error("a range of {sectors} sectors: not 1 to {most}")]
    RangeLength { sectors: u32, most: u32 },
    #[error("data lies at {0:#x}, where there is no memory")]
    Memory(u64),
    #[error("a descriptor has no bytes")]
    Empty,
    #[error("a readable descriptor follows a writable one")]
    Order,
    #[error("more than {MAX_DESCRIPTORS} descriptors")]
    TooMany,
}

impl Refusal {
    /// What it is answered with.
    pub(super) fn status(self) -> Status {
        match self {
            Self::Type(_) | Self::Flags(_) => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

/// A chain to which nothing can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Unanswerable {
    #[error("the chain has no end: it is a loop, leaves its table, or has more than 4 GiB")]
    Endless,
    #[error("the chain has no byte that can be written, so no status")]
    NoStatus,
    #[error("the status byte lies at {0:#x}, where there is no memory")]
    Memory(u64),
}

/// A request that can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// What to do, or why not.
    pub(super) what: Result<Operation, Refusal>,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// Length of what can be written, the status included: what the used ring says once the status
    /// is there, since it is the last byte.
    pub(super) writable: u32,
}

/// The disk, as far as requests must agree with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    /// Size in bytes.
    pub(super) size: u64,
    /// Size of a block in bytes: all I/O has a multiple of it.
    pub(super) block: u32,
    /// Nothing can be written.
    pub(super) read_only: bool,
}

/// Memory of a request beside its few numbers; used again for the next one.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// Where the data is: that of a read, a write or a get-id request.
    pub(super) data: Vec<Segment>,
    /// The ranges of a discard or write-zeroes request.
    pub(super) ranges: Vec<Range>,
}

impl Pieces {
    pub(super) fn clear(&mut self) {
        self.data.clear();
        self.ranges.clear();
    }
}

/// The descriptors of a chain by direction.
struct Layout {
    /// Bytes of the readable ones.
    readable: u64,
    /// Bytes of the writable ones.
    writable: u64,
    /// How many of [`Pieces::data`] are readable ones; they come first.
    readable_segments: usize,
    /// The last writable byte.
    status: Option<GuestAddress>,
    fault: Option<Refusal>,
}

/// Takes a chain apart. `pieces` is cleared first.
///
/// # Errors
///
/// [`Unanswerable`]: nothing of the chain can be used.
pub(super) fn parse<M>(
    chain: DescriptorChain<M>,
    disk: &Disk,
    pieces: &mut Pieces,
) -> Result<Request, Unanswerable>
where
    M: Deref + Clone,
    M::Target: GuestMemory + Sized,
{
    pieces.clear();
    let memory = chain.clone();
    let memory = memory.memory();
    let layout = lay_out(chain, &mut pieces.data)?;
    let status = layout.status.ok_or(Unanswerable::NoStatus)?;
    if !memory.check_range(status, 1, Permissions::Write) {
        return Err(Unanswerable::Memory(status.raw_value()));
    }
    let what = match layout.fault {
        Some(fault) => Err(fault),
        None => operation(memory, &layout, disk, pieces),
    };
    // A chain has less than 4 GiB.
    let writable = u32::try_from(layout.writable).unwrap_or(u32::MAX);
    Ok(Request { what, status, writable })
}

/// Looks at each descriptor once; there are at most 65535 of them.
fn lay_out<M>(
    chain: DescriptorChain<M>,
    segments: &mut Vec<Segment>,
) -> Result<Layout, Unanswerable>
where
    M: Deref,
    M::Target: GuestMemory + Sized,
{
    let mut layout =
        Layout { readable: 0, writable: 0, readable_segments: 0, status: None, fault: None };
    let mut ended = false;
    let fault = |of: &mut Layout, refusal| {
        of.fault.get_or_insert(refusal);
    };
    for descriptor in chain {
        ended = !descriptor.has_next();
        let (addr, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            fault(&mut layout, Refusal::Empty);
            continue;
        }
        if descriptor.is_write_only() {
            layout.writable += u64::from(len);
            layout.status = addr.checked_add(u64::from(len) - 1);
            if layout.status.is_none() {
                return Err(Unanswerable::Memory(addr.raw_value()));
            }
        } else if layout.writable > 0 {
            fault(&mut layout, Refusal::Order);
        } else {
            layout.readable += u64::from(len);
            layout.readable_segments += 1;
        }
        if segments.len() < MAX_DESCRIPTORS {
            segments.push(Segment { addr, len });
        } else {
            fault(&mut layout, Refusal::TooMany);
        }
    }
    // The iterator ends where it cannot go on, too.
    if ended { Ok(layout) } else { Err(Unanswerable::Endless) }
}

/// Header and data of a chain whose descriptors are in order. Leaves in `pieces` what belongs to
/// the operation.
fn operation<M: GuestMemory>(
    memory: &M,
    layout: &Layout,
    disk: &Disk,
    pieces: &mut Pieces,
) -> Result<Operation, Refusal> {
    let mut header = [0; HEADER as usize];
    let data = &mut pieces.data;
    let readable = data.get(..layout.readable_segments).unwrap_or_default();
    if layout.readable < u64::from(HEADER) {
        return Err(Refusal::Header(layout.readable));
    }
    gather(memory, readable, 0, &mut header)?;
    let [kind, _priority, low, high] = words(header);
    let sector = u64::from(low) | u64::from(high) << 32;
    let to_device = layout.readable - u64::from(HEADER);
    let from_device = layout.writable.saturating_sub(1);
    match kind {
        VIRTIO_BLK_T_IN => {
            data.drain(..layout.readable_segments);
            shorten(data, 1);
            let (offset, len) = place(disk, sector, from_device)?;
            within(memory, data, Permissions::Write)?;
            Ok(Operation::Read { offset, len })
        }
        VIRTIO_BLK_T_OUT if disk.read_only => Err(Refusal::ReadOnly),
        VIRTIO_BLK_T_OUT => {
            data.truncate(layout.readable_segments);
            skip(data, HEADER);
            let (offset, len) = place(disk, sector, to_device)?;
            within(memory, data, Permissions::Read)?;
            Ok(Operation::Write { offset, len })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => {
            data.drain(..layout.readable_segments);
            shorten(data, 1);
            within(memory, data, Permissions::Write)?;
            Ok(Operation::GetId)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => {
            Err(Refusal::ReadOnly)
        }
        VIRTIO_BLK_T_DISCARD => {
            ranges(memory, readable, to_device, disk, &DISCARDS, &mut pieces.ranges)?;
            Ok(Operation::Discard)
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            ranges(memory, readable, to_device, disk, &ZEROES, &mut pieces.ranges)?;
            Ok(Operation::WriteZeroes)
        }
        other => Err(Refusal::Type(other)),
    }
}

fn words(bytes: [u8; 16]) -> [u32; 4] {
    std::array::from_fn(|word| {
        u32::from_le_bytes(std::array::from_fn(|byte| bytes[4 * word + byte]))
    })
}

/// Where on the disk so many bytes from this sector are.
fn place(disk: &Disk, sector: u64, bytes: u64) -> Result<(u64, u32), Refusal> {
    let len = u32::try_from(bytes).ok().filter(|len| *len > 0 && len.is_multiple_of(disk.block));
    let len = len.ok_or(Refusal::Length(bytes))?;
    Ok((on_disk(disk, sector, bytes)?, len))
}

/// The byte where the sector begins, if so many bytes from there are on the disk.
fn on_disk(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, Refusal> {
    let offset = sector.checked_mul(u64::from(SECTOR));
    let inside = |offset: &u64| offset.checked_add(bytes).is_some_and(|end| end <= disk.size);
    let offset = offset.filter(inside).ok_or(Refusal::Beyond { sector, bytes })?;
    if offset.is_multiple_of(u64::from(disk.block)) {
        Ok(offset)
    } else {
        Err(Refusal::Alignment(sector))
    }
}

/// What a request with ranges may have.
struct RangeLimits {
    /// The most ranges.
    count: u32,
    /// The most sectors of one of them.
    sectors: u32,
    /// The flags of one that are known.
    flags: u32,
}

const DISCARDS: RangeLimits =
    RangeLimits { count: MAX_RANGES, sectors: MAX_RANGE_SECTORS, flags: 0 };
const ZEROES: RangeLimits = RangeLimits {
    count: 1,
    sectors: MAX_ZEROES_SECTORS,
    flags: VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// Reads the ranges that follow the header, `bytes` of them.
fn ranges<M: GuestMemory>(
    memory: &M,
    readable: &[Segment],
    bytes: u64,
    disk: &Disk,
    limits: &RangeLimits,
    into: &mut Vec<Range>,
) -> Result<(), Refusal> {
    let count = bytes / u64::from(RANGE);
    let whole = bytes.is_multiple_of(u64::from(RANGE));
    if !whole || !(1..=u64::from(limits.count)).contains(&count) {
        return Err(Refusal::Ranges { bytes, most: limits.count });
    }
    for index in 0..count {
        let mut range = [0; RANGE as usize];
        gather(memory, readable, u64::from(HEADER) + index * u64::from(RANGE), &mut range)?;
        let [low, high, sectors, flags] = words(range);
        if flags & !limits.flags != 0 {
            return Err(Refusal::Flags(flags));
        }
        if !(1..=limits.sectors).contains(&sectors) {
            return Err(Refusal::RangeLength { sectors, most: limits.sectors });
        }
        let len = u64::from(sectors) * u64::from(SECTOR);
        if !len.is_multiple_of(u64::from(disk.block)) {
            return Err(Refusal::Length(len));
        }
        let offset = on_disk(disk, u64::from(low) | u64::from(high) << 32, len)?;
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        into.push(Range { offset, len, unmap });
    }
    Ok(())
}

/// Copies bytes of the segments, from `skip` on; they have that many.
fn gather<M: GuestMemory>(
    memory: &M,
    segments: &[Segment],
    mut skip: u64,
    into: &mut [u8],
) -> Result<(), Refusal> {
    let mut rest = into;
    for segment in segments {
        let len = u64::from(segment.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let bytes = usize::try_from(len - skip).unwrap_or(usize::MAX).min(rest.len());
        let (now, later) = rest.split_at_mut(bytes);
        let no_memory = Refusal::Memory(segment.addr.raw_value());
        let addr = segment.addr.checked_add(skip).ok_or(no_memory)?;
        memory.read_slice(now, addr).map_err(|_| no_memory)?;
        rest = later;
        skip = 0;
        if rest.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Leaves the first bytes of the segments out; they have that many.
fn skip(segments: &mut Vec<Segment>, mut bytes: u32) {
    let whole = segments.iter().take_while(|segment| {
        let all = segment.len <= bytes;
        if all {
            bytes -= segment.len;
        }
        all
    });
    let whole = whole.count();
    segments.drain(..whole);
    if let Some(first) = segments.first_mut() {
        // If that goes beyond all addresses, it is not found in memory later.
        first.addr = first.addr.checked_add(bytes.into()).unwrap_or(GuestAddress(u64::MAX));
        first.len -= bytes;
    }
}

/// Leaves the last bytes of the segments out; they have that many.
fn shorten(segments: &mut Vec<Segment>, mut bytes: u32) {
    while let Some(last) = segments.last_mut().filter(|_| bytes > 0) {
        if last.len > bytes {
            last.len -= bytes;
            return;
        }
        bytes -= last.len;
        segments.pop();
    }
}

fn within<M: GuestMemory>(
    memory: &M,
    segments: &[Segment],
    access: Permissions,
) -> Result<(), Refusal> {
    let outside =
        |segment: &&Segment| !memory.check_range(segment.addr, segment.len as usize, access);
    match segments.iter().find(outside) {
        Some(segment) => Err(Refusal::Memory(segment.addr.raw_value())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
