//! Guests that put anything into a ring, for tests and for the fuzz target.

use super::Memory;
use super::request::{
    Disk, MAX_DESCRIPTORS, MAX_RANGE_SECTORS, MAX_RANGES, Operation, Pieces, Request, Segment,
    parse,
};
use super::{SECTOR, request::Unanswerable};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

/// Descriptors of the ring, whose table is at address 0.
pub const RING: u16 = 16;
/// Memory with contents that a guest chooses, from address 0 on, in bytes.
pub const CHOSEN: usize = 0x8000;
/// A second piece of memory, behind a hole.
pub const ISLAND: u64 = 0x1_0000;
const ISLAND_LEN: usize = 0x2000;
/// The available ring; it is on the island and always has one entry.
const AVAILABLE: u64 = ISLAND + 0x1000;
/// The used ring, which nobody looks at.
const USED: u64 = ISLAND + 0x1800;

/// The memory of a guest, and one chain in its ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// Bit 0: the disk is read-only; bit 1: its blocks have 4096 bytes and not 512. The others: its
    /// size in blocks, less one.
    pub disk: u8,
    /// Where the chain begins.
    pub head: u8,
    /// What is in memory from address 0 on; at most [`CHOSEN`] bytes, 0 behind them.
    pub memory: Vec<u8>,
}

impl Guest {
    /// As an input: the two numbers, and memory.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let number = |at: usize| bytes.get(at).copied().unwrap_or(0);
        let memory = bytes.get(2..).unwrap_or_default();
        let memory = memory.get(..memory.len().min(CHOSEN)).unwrap_or_default().to_vec();
        Self { disk: number(0), head: number(1), memory }
    }

    /// What [`from_bytes`](Self::from_bytes) reads.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        [&[self.disk, self.head], self.memory.as_slice()].concat()
    }

    /// Puts bytes into memory.
    #[must_use]
    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        let end = at + bytes.len();
        self.memory.resize(self.memory.len().max(end), 0);
        self.memory[at..end].copy_from_slice(bytes);
        self
    }

    /// Puts a descriptor into the table that begins at `table`.
    #[must_use]
    pub fn descriptor(
        self,
        table: usize,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) -> Self {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + usize::from(index) * 16, &bytes)
    }

    /// Puts the header of a request into memory.
    #[must_use]
    pub fn header(self, at: usize, kind: u32, sector: u64) -> Self {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.put(at, &bytes)
    }

    /// Puts a range of a discard or write-zeroes request into memory.
    #[must_use]
    pub fn range(self, at: usize, sector: u64, sectors: u32, flags: u32) -> Self {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.put(at, &bytes)
    }

    /// The disk of this guest.
    pub(super) fn disk(&self) -> Disk {
        let block = if self.disk & 2 == 0 { SECTOR } else { 4096 };
        let size = u64::from(self.disk >> 2) + 1;
        Disk { size: size * u64::from(block), block, read_only: self.disk & 1 != 0 }
    }

    /// What becomes of its chain. `None` if the queue does not even have one.
    pub(super) fn parse(&self, pieces: &mut Pieces) -> Option<Result<Request, Unanswerable>> {
        let memory = self.memory();
        let mut queue = Queue::new(RING).ok()?;
        queue.set_desc_table_address(Some(0), Some(0));
        queue.set_avail_ring_address(Some(low(AVAILABLE)), Some(0));
        queue.set_used_ring_address(Some(low(USED)), Some(0));
        queue.set_ready(true);
        let chain = queue.iter(&memory).ok()?.next()?;
        Some(parse(chain, &self.disk(), pieces))
    }

    fn memory(&self) -> Memory {
        let ranges = [(GuestAddress(0), CHOSEN), (GuestAddress(ISLAND), ISLAND_LEN)];
        let memory = Memory::from_ranges(&ranges).expect("two small mappings");
        memory.write_slice(&self.memory, GuestAddress(0)).expect("it fits");
        let available = [0, 0, 1, 0, self.head, 0];
        memory.write_slice(&available, GuestAddress(AVAILABLE)).expect("it fits");
        memory
    }
}

fn low(addr: u64) -> u32 {
    u32::try_from(addr).unwrap_or(u32::MAX)
}

/// Whether these bytes are in the guest's memory.
fn is_memory(segment: Segment) -> bool {
    let inside = |begin: u64, len: usize| {
        let end = segment.addr.checked_add(segment.len.into());
        segment.addr.raw_value() >= begin
            && end.is_some_and(|end| end.raw_value() <= begin + len as u64)
    };
    inside(0, CHOSEN) || inside(ISLAND, ISLAND_LEN)
}

/// Takes a chain apart and checks that whoever carries the request out can rely on what is said of
/// it. Returns the request, or why there is none.
///
/// # Panics
///
/// If something does not hold.
pub fn check(guest: &Guest) -> String {
    let mut pieces = Pieces::default();
    let Some(parsed) = guest.parse(&mut pieces) else { return "no chain".to_owned() };
    let disk = guest.disk();
    assert!(pieces.data.len() <= MAX_DESCRIPTORS && pieces.ranges.len() <= MAX_RANGES as usize);
    let request = match parsed {
        Ok(request) => request,
        Err(error) => return error.to_string(),
    };
    assert!(is_memory(Segment { addr: request.status, len: 1 }), "{request:?}");
    assert!(request.writable > 0, "{request:?}");
    let what = match request.what {
        Ok(what) => what,
        Err(refusal) => return refusal.to_string(),
    };
    let bytes: u64 = pieces.data.iter().map(|segment| u64::from(segment.len)).sum();
    let on_disk = |offset: u64, len: u64| {
        let block = u64::from(disk.block);
        offset + len <= disk.size
            && offset.is_multiple_of(block)
            && len > 0
            && len.is_multiple_of(block)
    };
    let data_is_right = |len: u32| {
        bytes == u64::from(len)
            && pieces.data.iter().all(|segment| segment.len > 0 && is_memory(*segment))
    };
    match what {
        Operation::Read { offset, len } => {
            assert!(on_disk(offset, len.into()) && data_is_right(len), "{request:?} {pieces:?}");
            assert_eq!(request.writable, len + 1);
        }
        Operation::Write { offset, len } => {
            assert!(on_disk(offset, len.into()) && data_is_right(len), "{request:?} {pieces:?}");
            assert!(!disk.read_only);
        }
        Operation::GetId => assert!(data_is_right(request.writable - 1), "{pieces:?}"),
        Operation::Discard | Operation::WriteZeroes => {
            assert!(!disk.read_only && !pieces.ranges.is_empty());
            for range in &pieces.ranges {
                assert!(on_disk(range.offset, range.len), "{range:?}");
                assert!(range.len <= u64::from(MAX_RANGE_SECTORS) * u64::from(SECTOR));
                assert!(!range.unmap || what == Operation::WriteZeroes);
            }
        }
        Operation::Flush => {}
    }
    format!("{what:?}")
}
