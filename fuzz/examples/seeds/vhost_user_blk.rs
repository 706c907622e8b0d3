//! Requests for a block device, as drivers make them and as no driver should.

use crate::Seeds;

// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

// Where things are. Behind the table of descriptors, and near it, so that inputs are short.
const HEADER: usize = 0x100;
const DATA: u64 = 0x120;
const STATUS: u64 = 0x110;
const TABLE: usize = 0x200;

/// A disk of 16 blocks of 512 bytes.
const DISK: u8 = 15 << 2;
/// It cannot be written.
const READ_ONLY: u8 = 1;
/// Its blocks have 4096 bytes.
const LARGE_BLOCKS: u8 = 2;

/// An input: what the disk is like, where the chain begins, and memory.
#[derive(Clone)]
struct Guest {
    disk: u8,
    memory: Vec<u8>,
}

impl Guest {
    /// With the header of a request in memory.
    fn new(kind: u32, sector: u64) -> Self {
        let mut header = u128::from(kind).to_le_bytes();
        header[8..].copy_from_slice(&sector.to_le_bytes());
        Self { disk: DISK, memory: Vec::new() }.put(HEADER, &header)
    }

    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        let end = at + bytes.len();
        self.memory.resize(self.memory.len().max(end), 0);
        self.memory[at..end].copy_from_slice(bytes);
        self
    }

    /// In the table of the ring.
    fn descriptor(self, index: u16, addr: u64, len: u32, flags: u16, next: u16) -> Self {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(usize::from(index) * 16, &bytes)
    }

    /// Of a discard or write-zeroes request.
    fn range(self, at: usize, sector: u64, sectors: u32, flags: u32) -> Self {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.put(at, &bytes)
    }

    fn is(self, disk: u8) -> Self {
        Self { disk: self.disk | disk, ..self }
    }

    fn to_bytes(&self) -> Vec<u8> {
        [&[self.disk, 0], self.memory.as_slice()].concat()
    }
}

pub(crate) fn requests() -> Seeds {
    let usual = |guest: Guest, len, flags| {
        guest
            .descriptor(0, HEADER as u64, 16, NEXT, 1)
            .descriptor(1, DATA, len, NEXT | flags, 2)
            .descriptor(2, STATUS, 1, WRITE, 0)
    };
    let read = || usual(Guest::new(0, 3), 512, WRITE);
    let table = read().memory[..48].to_vec();
    let zeroes = Guest::new(13, 0).range(0x120, 8, 8, 0).range(0x130, 0, 8, 1);
    let large = usual(Guest::new(0, 8), 4096, WRITE).is(LARGE_BLOCKS);
    let split = Guest::new(1, 0)
        .descriptor(0, HEADER as u64, 5, NEXT, 3)
        .descriptor(3, HEADER as u64 + 5, 11 + 100, NEXT, 1)
        .descriptor(1, DATA, 412, NEXT, 2)
        .descriptor(2, STATUS, 1, WRITE, 0);
    let seeds = [
        ("read", read()),
        ("write", usual(Guest::new(1, 3), 512, 0)),
        ("flush", usual(Guest::new(4, 0), 512, 0)),
        ("get id", usual(Guest::new(8, 0), 20, WRITE)),
        ("discard", usual(Guest::new(11, 0).range(0x120, 8, 8, 0), 16, 0)),
        ("write zeroes", usual(zeroes, 32, 0)),
        ("indirect", read().put(TABLE, &table).descriptor(0, TABLE as u64, 48, INDIRECT, 0)),
        ("large blocks", large),
        ("header in pieces", split),
        ("read only", usual(Guest::new(1, 3), 512, 0).is(READ_ONLY)),
        ("loop", read().descriptor(2, STATUS, 1, WRITE | NEXT, 1)),
        ("beyond memory", read().descriptor(1, 0x7ff0, 512, NEXT | WRITE, 2)),
        ("beyond the disk", usual(Guest::new(0, 16), 512, WRITE)),
    ];
    seeds.into_iter().map(|(name, guest)| (name.to_owned(), guest.to_bytes())).collect()
}
