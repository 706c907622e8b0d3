use super::super::fuzzing::{Guest, ISLAND, check};
use super::*;
use proptest::prelude::*;

// Flags of a descriptor.
const NEXT: u16 = 1 << 0;
const WRITE: u16 = 1 << 1;
const INDIRECT: u16 = 1 << 2;

/// Where the tests put header, data and status.
const HEADER_AT: usize = 0x1000;
const DATA: u64 = 0x2000;
const STATUS_AT: u64 = 0x4000;
/// A disk of 16 sectors.
const DISK: u8 = 15 << 2;

fn guest(kind: u32, sector: u64) -> Guest {
    Guest { disk: DISK, ..Guest::default() }.header(HEADER_AT, kind, sector)
}

/// The usual three descriptors.
fn usual(guest: Guest, len: u32, flags: u16) -> Guest {
    guest
        .descriptor(0, 0, HEADER_AT as u64, 16, NEXT, 1)
        .descriptor(0, 1, DATA, len, NEXT | flags, 2)
        .descriptor(0, 2, STATUS_AT, 1, WRITE, 0)
}

fn parsed(guest: &Guest) -> (Result<Request, Unanswerable>, Pieces) {
    check(guest);
    let mut pieces = Pieces::default();
    let request = guest.parse(&mut pieces).unwrap();
    (request, pieces)
}

fn refusal(guest: &Guest) -> Refusal {
    parsed(guest).0.unwrap().what.unwrap_err()
}

fn segments(pieces: &Pieces) -> Vec<(u64, u32)> {
    pieces.data.iter().map(|segment| (segment.addr.0, segment.len)).collect()
}

#[test]
fn reads_and_writes_as_drivers_make_them() {
    let (read, pieces) = parsed(&usual(guest(VIRTIO_BLK_T_IN, 3), 1024, WRITE));
    let what = Ok(Operation::Read { offset: 3 * 512, len: 1024 });
    assert_eq!(read, Ok(Request { what, status: GuestAddress(STATUS_AT), writable: 1025 }));
    assert_eq!(segments(&pieces), [(DATA, 1024)]);

    let (write, pieces) = parsed(&usual(guest(VIRTIO_BLK_T_OUT, 14), 1024, 0));
    let what = Ok(Operation::Write { offset: 14 * 512, len: 1024 });
    assert_eq!(write, Ok(Request { what, status: GuestAddress(STATUS_AT), writable: 1 }));
    assert_eq!(segments(&pieces), [(DATA, 1024)]);
}

#[test]
fn framing_is_the_drivers_choice() {
    // Header in two pieces, the second of which has the beginning of the data.
    let split = guest(VIRTIO_BLK_T_OUT, 0)
        .descriptor(0, 0, HEADER_AT as u64, 5, NEXT, 3)
        .descriptor(0, 3, HEADER_AT as u64 + 5, 11 + 100, NEXT, 1)
        .descriptor(0, 1, DATA, 412, NEXT, 2)
        .descriptor(0, 2, STATUS_AT, 1, WRITE, 0);
    let (request, pieces) = parsed(&split);
    assert_eq!(request.unwrap().what, Ok(Operation::Write { offset: 0, len: 512 }));
    assert_eq!(segments(&pieces), [(HEADER_AT as u64 + 16, 100), (DATA, 412)]);

    // The status is the last byte of the data's descriptor.
    let joined = guest(VIRTIO_BLK_T_IN, 0)
        .descriptor(0, 0, HEADER_AT as u64, 16, NEXT, 1)
        .descriptor(0, 1, DATA, 513, WRITE, 0);
    let (request, pieces) = parsed(&joined);
    let request = request.unwrap();
    assert_eq!(request.what, Ok(Operation::Read { offset: 0, len: 512 }));
    assert_eq!((request.status, request.writable), (GuestAddress(DATA + 512), 513));
    assert_eq!(segments(&pieces), [(DATA, 512)]);
}

#[test]
fn an_indirect_table_is_followed() {
    let table = 0x5000;
    let indirect = usual(guest(VIRTIO_BLK_T_IN, 0), 512, WRITE);
    let table_of_three = indirect.memory[..48].to_vec();
    let indirect =
        indirect.put(table, &table_of_three).descriptor(0, 0, table as u64, 48, INDIRECT, 0);
    let (request, pieces) = parsed(&indirect);
    assert_eq!(request.unwrap().what, Ok(Operation::Read { offset: 0, len: 512 }));
    assert_eq!(segments(&pieces), [(DATA, 512)]);
}

#[test]
fn data_behind_a_hole_in_memory_is_found_and_data_in_it_is_not() {
    let far = |addr| {
        usual(guest(VIRTIO_BLK_T_IN, 0), 512, WRITE).descriptor(0, 1, addr, 512, NEXT | WRITE, 2)
    };
    assert!(parsed(&far(ISLAND)).0.unwrap().what.is_ok());
    for addr in [ISLAND - 1, 0x7e01, 0x8000, u64::MAX - 511, 1 << 63] {
        assert_eq!(refusal(&far(addr)), Refusal::Memory(addr));
    }
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    for (sector, len) in
        [(16, 512), (15, 1024), (u64::MAX, 512), (u64::MAX >> 9, 512), (1 << 55, 512)]
    {
        for (kind, flags) in [(VIRTIO_BLK_T_IN, WRITE), (VIRTIO_BLK_T_OUT, 0)] {
            let bytes = u64::from(len);
            let request = usual(guest(kind, sector), len, flags);
            assert_eq!(refusal(&request), Refusal::Beyond { sector, bytes });
            assert_eq!(refusal(&request).status(), Status::IoError);
        }
    }
}

#[test]
fn data_is_a_number_of_blocks() {
    for len in [1, 511, 513] {
        let request = usual(guest(VIRTIO_BLK_T_IN, 0), len, WRITE);
        assert_eq!(refusal(&request), Refusal::Length(len.into()));
    }
    let none = guest(VIRTIO_BLK_T_IN, 0)
        .descriptor(0, 0, HEADER_AT as u64, 16, NEXT, 1)
        .descriptor(0, 1, STATUS_AT, 1, WRITE, 0);
    assert_eq!(refusal(&none), Refusal::Length(0));
    // 4096 bytes each.
    let large =
        |sector, len| usual(Guest { disk: DISK | 2, ..guest(VIRTIO_BLK_T_IN, sector) }, len, WRITE);
    assert_eq!(refusal(&large(0, 512)), Refusal::Length(512));
    assert_eq!(refusal(&large(1, 4096)), Refusal::Alignment(1));
    assert!(parsed(&large(8, 4096)).0.unwrap().what.is_ok());
}

#[test]
fn a_disk_that_cannot_be_written_is_not() {
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let request = usual(Guest { disk: DISK | 1, ..guest(kind, 0) }, 512, 0);
        assert_eq!(refusal(&request), Refusal::ReadOnly);
        assert_eq!(refusal(&request).status(), Status::IoError);
    }
    let flush = usual(Guest { disk: DISK | 1, ..guest(VIRTIO_BLK_T_FLUSH, 0) }, 512, 0);
    assert_eq!(parsed(&flush).0.unwrap().what, Ok(Operation::Flush));
}

#[test]
fn what_is_not_known_is_not_supported() {
    for kind in [2, 3, 5, 14, 15, 26, u32::MAX] {
        let request = usual(guest(kind, 0), 512, 0);
        assert_eq!(refusal(&request), Refusal::Type(kind));
        assert_eq!(refusal(&request).status(), Status::Unsupported);
    }
}

#[test]
fn ranges_are_read_and_checked() {
    let ranges = |kind, list: &[(u64, u32, u32)]| {
        let at = |index: usize| 0x2000 + 16 * index;
        let begun = usual(guest(kind, 0), 16 * u32::try_from(list.len()).unwrap(), 0);
        let put = |guest: Guest, (index, range): (usize, &(u64, u32, u32))| {
            guest.range(at(index), range.0, range.1, range.2)
        };
        list.iter().enumerate().fold(begun, put)
    };
    let range = |offset, unmap| Range { offset, len: 1024, unmap };
    for (one, unmap) in [((14, 2, 0), false), ((14, 2, 1), true)] {
        let (request, pieces) = parsed(&ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[one]));
        assert_eq!(request.unwrap().what, Ok(Operation::WriteZeroes));
        assert_eq!(pieces.ranges, [range(14 * 512, unmap)]);
    }
    let (request, pieces) = parsed(&ranges(VIRTIO_BLK_T_DISCARD, &[(1, 2, 0), (14, 2, 0)]));
    assert_eq!(request.unwrap().what, Ok(Operation::Discard));
    assert_eq!(pieces.ranges, [range(512, false), range(14 * 512, false)]);
    let two = ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, 0), (14, 2, 1)]);
    assert_eq!(refusal(&two), Refusal::Ranges { bytes: 32, most: 1 });

    let too_long = |sectors, most| Refusal::RangeLength { sectors, most };
    for (kind, bad, why) in [
        (VIRTIO_BLK_T_DISCARD, (0, 1, 1), Refusal::Flags(1)),
        (VIRTIO_BLK_T_DISCARD, (0, 0, 0), too_long(0, MAX_RANGE_SECTORS)),
        (VIRTIO_BLK_T_DISCARD, (0, 1 << 22, 0), too_long(1 << 22, MAX_RANGE_SECTORS)),
        (VIRTIO_BLK_T_DISCARD, (15, 2, 0), Refusal::Beyond { sector: 15, bytes: 1024 }),
        (VIRTIO_BLK_T_DISCARD, (u64::MAX, 1, 0), Refusal::Beyond { sector: u64::MAX, bytes: 512 }),
    ] {
        assert_eq!(refusal(&ranges(kind, &[(0, 1, 0), bad])), why);
    }
    for (bad, why) in [
        ((0, 1, 2), Refusal::Flags(2)),
        ((0, MAX_ZEROES_SECTORS + 1, 0), too_long(MAX_ZEROES_SECTORS + 1, MAX_ZEROES_SECTORS)),
    ] {
        assert_eq!(refusal(&ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[bad])), why);
    }
    assert_eq!(Refusal::Flags(1).status(), Status::Unsupported);
    for len in [0, 1, 15, 17, 16 * 17] {
        let request = if len == 0 {
            guest(VIRTIO_BLK_T_DISCARD, 0)
                .descriptor(0, 0, HEADER_AT as u64, 16, NEXT, 2)
                .descriptor(0, 2, STATUS_AT, 1, WRITE, 0)
        } else {
            usual(guest(VIRTIO_BLK_T_DISCARD, 0), len, 0)
        };
        assert_eq!(refusal(&request), Refusal::Ranges { bytes: len.into(), most: MAX_RANGES });
    }
}

#[test]
fn descriptors_that_make_no_sense_are_answered_with_an_error() {
    let good = || usual(guest(VIRTIO_BLK_T_IN, 0), 512, WRITE);
    let empty = good().descriptor(0, 1, DATA, 0, NEXT | WRITE, 2);
    assert_eq!(refusal(&empty), Refusal::Empty);
    // The status is the last byte that can be written, wherever that is.
    let no_status = good().descriptor(0, 2, STATUS_AT, 0, WRITE, 0);
    let (request, _) = parsed(&no_status);
    assert_eq!(request.unwrap().status, GuestAddress(DATA + 511));

    let order =
        good().descriptor(0, 2, STATUS_AT, 1, WRITE | NEXT, 3).descriptor(0, 3, DATA, 16, 0, 0);
    assert_eq!(refusal(&order), Refusal::Order);
    let short = good().descriptor(0, 0, HEADER_AT as u64, 15, NEXT, 1);
    assert_eq!(refusal(&short), Refusal::Header(15));
    let written_header = good().descriptor(0, 0, HEADER_AT as u64, 16, NEXT | WRITE, 1);
    assert_eq!(refusal(&written_header), Refusal::Header(0));
    let header_nowhere = good().descriptor(0, 0, 0x9000, 16, NEXT, 1);
    assert_eq!(refusal(&header_nowhere), Refusal::Memory(0x9000));
}

#[test]
fn chains_without_an_end_or_a_status_cannot_be_answered() {
    let unanswerable = |guest: &Guest| parsed(guest).0.unwrap_err();
    let good = || usual(guest(VIRTIO_BLK_T_IN, 0), 512, WRITE);
    let endless = [
        good().descriptor(0, 2, STATUS_AT, 1, WRITE | NEXT, 1),
        good().descriptor(0, 2, STATUS_AT, 1, WRITE | NEXT, 16),
        good().descriptor(0, 0, HEADER_AT as u64, 16, NEXT, 0),
        // Longer than 4 GiB.
        good().descriptor(0, 1, DATA, u32::MAX, NEXT | WRITE, 2),
        // Tables that are none: of no number of descriptors, in a table, nowhere.
        good().descriptor(0, 0, 0x5000, 17, INDIRECT, 0),
        good().descriptor(0, 0, 0x5000, 0, INDIRECT, 0),
        good().descriptor(0, 0, 0x9000, 16, INDIRECT, 0),
        good()
            .descriptor(0, 0, 0x5000, 16, INDIRECT, 0)
            .descriptor(0x5000, 0, 0x6000, 16, INDIRECT, 0),
        good().descriptor(0, 2, 0x5000, 17, INDIRECT, 0),
        Guest { head: 16, ..good() },
    ];
    for chain in endless {
        assert_eq!(unanswerable(&chain), Unanswerable::Endless, "{chain:?}");
    }
    let no_status = usual(guest(VIRTIO_BLK_T_OUT, 0), 512, 0).descriptor(0, 2, STATUS_AT, 1, 0, 0);
    assert_eq!(unanswerable(&no_status), Unanswerable::NoStatus);
    for nowhere in [0x8000, u64::MAX] {
        let status = good().descriptor(0, 2, nowhere, 1, WRITE, 0);
        assert_eq!(unanswerable(&status), Unanswerable::Memory(nowhere));
    }
    let beyond = good().descriptor(0, 2, u64::MAX, 2, WRITE, 0);
    assert_eq!(unanswerable(&beyond), Unanswerable::Memory(u64::MAX));
}

#[test]
fn more_descriptors_than_a_system_call_takes_are_an_error() {
    let table = 0x1800;
    let chain = |count: u16| {
        let mut guest = guest(VIRTIO_BLK_T_IN, 0);
        let bytes = u32::from(count) * 16;
        guest = guest.descriptor(0, 0, table as u64, bytes, INDIRECT, 0);
        guest = guest.descriptor(table, 0, HEADER_AT as u64, 16, NEXT, 1);
        for index in 1..count - 1 {
            guest = guest.descriptor(table, index, 0x100, 4, NEXT | WRITE, index + 1);
        }
        guest.descriptor(table, count - 1, 0x7f00, 1, WRITE, 0)
    };
    // 1024 buffers of 4 bytes: 8 sectors.
    let most = u16::try_from(MAX_DESCRIPTORS).unwrap();
    let (request, pieces) = parsed(&chain(most));
    assert_eq!(request.unwrap().what, Ok(Operation::Read { offset: 0, len: 4096 }));
    assert_eq!(pieces.data.len(), 1024);
    let (request, _) = parsed(&chain(most + 128));
    let request = request.unwrap();
    assert_eq!(request.what, Err(Refusal::TooMany));
    assert_eq!(request.status, GuestAddress(0x7f00));
}

/// Numbers that are more often interesting than others.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0_u64..0x8000,
        1 => ISLAND - 0x10..ISLAND + 0x2010,
        1 => any::<u64>(),
        1 => (0_u64..0x100).prop_map(|back| u64::MAX - back),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(1), Just(16), Just(512), Just(4096), 0_u32..0x2000, any::<u32>()]
}

proptest! {
    /// Whatever lies in the ring: no panic, an end, and nothing that is carried out is out of bounds.
    #[test]
    fn any_chain_is_a_request_or_an_error(
        disk: u8,
        head in 0_u8..18,
        descriptors in prop::collection::vec((place(), length(), 0_u16..8, 0_u16..18), 0..40),
        kind in prop_oneof![0_u32..16, any::<u32>()],
        sector in prop_oneof![0_u64..80, any::<u64>()],
        noise in prop::collection::vec(any::<u8>(), 0..256),
    ) {
        let mut guest = Guest { disk, head, ..Guest::default() };
        guest = guest.put(0x1000, &noise);
        for at in [HEADER_AT, 0x200] {
            guest = guest.header(at, kind, sector);
        }
        // The table of the ring, and one more behind it.
        for (index, (addr, len, flags, next)) in (0..).zip(descriptors) {
            guest = guest.descriptor(0, index, addr, len, flags, next);
        }
        check(&guest);
    }

    /// Requests that are right but for one number.
    #[test]
    fn a_request_with_one_wrong_number_is_a_request_or_an_error(
        kind in 0_u32..16,
        flags in prop_oneof![Just(0), Just(WRITE)],
        len in length(),
        at in 0_usize..0x60,
        byte: u8,
    ) {
        let guest = usual(guest(kind, 1), len, flags);
        check(&guest);
        let at = if at < 0x30 { at } else { at - 0x30 + HEADER_AT };
        check(&guest.put(at, &[byte]));
    }

    #[test]
    fn an_input_is_what_it_says(disk: u8, head: u8, memory in prop::collection::vec(any::<u8>(), 0..64)) {
        let guest = Guest { disk, head, memory };
        prop_assert_eq!(&Guest::from_bytes(&guest.to_bytes()), &guest);
    }
}
