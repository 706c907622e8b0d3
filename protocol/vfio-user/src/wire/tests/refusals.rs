//! What is refused, by command: the tables of what libvfio-user refuses, as far as bytes alone tell.

use super::*;
use proptest::prelude::*;

/// What a refusal is for.
#[derive(Debug, PartialEq, Eq)]
enum Why {
    Short,
    Argsz,
    Flags,
    DataLength,
    TooLong,
    Range,
    Field,
    Fds,
    Unknown,
}

fn why(error: &WireError) -> Why {
    match error {
        WireError::Short { .. } => Why::Short,
        WireError::Argsz { .. } => Why::Argsz,
        WireError::Flags { .. } => Why::Flags,
        WireError::DataLength { .. } => Why::DataLength,
        WireError::TooLong { .. } => Why::TooLong,
        WireError::Range { .. } => Why::Range,
        WireError::Field { .. } | WireError::Version { .. } => Why::Field,
        WireError::Fds { .. } => Why::Fds,
        WireError::UnknownCommand { .. } | WireError::UnknownFeature { .. } => Why::Unknown,
    }
}

fn refused(command: Command, body: &[u8], expected: &Why) {
    let error = request(command, body).expect_err("refused");
    assert_eq!(&why(&error), expected, "{command}: {error}");
    assert_eq!(error.errno(), Errno::EINVAL);
}

#[test]
fn dma_map() {
    let map = |argsz: u32, flags: u32, rest: [u64; 3]| {
        [words(&[argsz, flags]), long_words(&rest)].concat()
    };
    let good = [0, 0x1000, 0x1000];
    assert!(request(Command::DmaMap, &map(32, 3, good)).is_ok());
    // The very last page of the address space.
    assert!(request(Command::DmaMap, &map(32, 3, [0, 0xffff_ffff_ffff_f000, 0x1000])).is_ok());
    refused(Command::DmaMap, &map(32, 3, good)[..31], &Why::Short);
    refused(Command::DmaMap, &map(31, 3, good), &Why::Argsz);
    refused(Command::DmaMap, &map(32, 1 << 4, good), &Why::Flags);
    refused(Command::DmaMap, &map(32, u32::MAX, good), &Why::Flags);
    // By mmap, or by pread and pwrite, of nothing.
    refused(Command::DmaMap, &map(32, 1 << 2 | 3, good), &Why::Fds);
    refused(Command::DmaMap, &map(32, 1 << 3 | 3, good), &Why::Fds);
    refused(Command::DmaMap, &map(32, 3, [0, 0x1000, 0]), &Why::Range);
    refused(Command::DmaMap, &map(32, 3, [0, 0x1000, u64::MAX]), &Why::Range);
    let with_fds = |rest, fds| DmaMap::decode(&map(32, 3, rest), fds).map_err(|error| why(&error));
    assert!(with_fds(good, 1).is_ok());
    assert_eq!(with_fds(good, 2), Err(Why::Fds));
    assert_eq!(with_fds([u64::MAX, 0x1000, 0x1000], 1), Err(Why::Range));
    assert_eq!(with_fds([i64::MAX as u64, 0x1000, 0x1000], 1), Err(Why::Range));
}

#[test]
fn dma_unmap() {
    let unmap =
        |argsz: u32, flags: u32, rest: &[u64]| [words(&[argsz, flags]), long_words(rest)].concat();
    let refuse = |argsz, flags, rest: &[u64], why| {
        refused(Command::DmaUnmap, &unmap(argsz, flags, rest), &why);
    };
    let accept = |argsz, flags, rest: &[u64]| {
        assert!(request(Command::DmaUnmap, &unmap(argsz, flags, rest)).is_ok());
    };
    accept(24, 0, &[0x1000, 0x1000]);
    accept(24, 2, &[0, 0]);
    accept(48, 1, &[0x1000, 0x1000, 0x1000, 8]);
    refuse(23, 0, &[0x1000, 0x1000], Why::Argsz);
    refuse(24, 0, &[0x1000], Why::Short);
    refuse(24, 0, &[0x1000, 0], Why::Range);
    refuse(24, 0, &[0x1000, u64::MAX], Why::Range);
    // Everything and a range; everything and a bitmap; flags that do not exist.
    refuse(24, 2, &[0x1000, 0], Why::Range);
    refuse(24, 2, &[0, 0x1000], Why::Range);
    refuse(48, 3, &[0, 0, 0x1000, 8], Why::Flags);
    refuse(24, 4, &[0x1000, 0x1000], Why::Flags);
    refuse(24, u32::MAX, &[0x1000, 0x1000], Why::Flags);
    // A bitmap that did not come whole, has odd pages, is too short, or does not fit.
    refuse(48, 1, &[0x1000, 0x1000, 0x1000], Why::Short);
    refuse(48, 1, &[0x1000, 0x1000, 0, 8], Why::Field);
    refuse(48, 1, &[0x1000, 0x1000, 0x1001, 8], Why::Field);
    refuse(48, 1, &[0x1000, 0x1000, 0x1000, 7], Why::Field);
    refuse(48, 1, &[0, 65 << 12, 0x1000, 8], Why::Field);
    refuse(47, 1, &[0x1000, 0x1000, 0x1000, 8], Why::Argsz);
    refuse(u32::MAX, 1, &[0x1000, 0x1000, 0x1000, (1 << 20) + 1], Why::TooLong);
    refuse(u32::MAX, 1, &[0x1000, 0x1000, 0x1000, u64::MAX], Why::TooLong);
    refuse(u32::MAX, 1, &[0, u64::MAX, 1, 1 << 20], Why::Field);
}

#[test]
fn questions() {
    for (command, size) in [
        (Command::GetInfo, 16),
        (Command::GetRegionInfo, 32),
        (Command::GetIrqInfo, 16),
        (Command::GetRegionIoFds, 16),
    ] {
        let query = |argsz: u32| {
            let mut body = words(&[argsz, 0, 1, 0]);
            body.resize(size, 0);
            body
        };
        let least = u32::try_from(size).expect("small");
        assert!(request(command, &query(least)).is_ok());
        refused(command, &query(least - 1), &Why::Argsz);
        refused(command, &query(0), &Why::Argsz);
        refused(command, &query(least)[..size - 1], &Why::Short);
        refused(command, &[], &Why::Short);
    }
    refused(Command::GetRegionIoFds, &words(&[(1 << 20) + 1, 0, 1, 0]), &Why::TooLong);
    refused(Command::GetRegionIoFds, &words(&[16, 1, 1, 0]), &Why::Flags);
    refused(Command::GetRegionIoFds, &words(&[16, 0, 1, 1]), &Why::Field);
}

#[test]
fn region_accesses() {
    let access = |count: u32, data: usize| {
        let mut body = bytes(|out| RegionAccess { offset: 0, region: 2, count }.encode(out));
        body.resize(16 + data, 0);
        body
    };
    let limit = LIMITS.max_data_xfer_size;
    assert!(request(Command::RegionRead, &access(limit, 0)).is_ok());
    refused(Command::RegionRead, &access(limit + 1, 0), &Why::TooLong);
    refused(Command::RegionRead, &access(u32::MAX, 0), &Why::TooLong);
    refused(Command::RegionRead, &access(4, 0)[..15], &Why::Short);
    refused(Command::RegionWrite, &access(4, 3), &Why::DataLength);
    refused(Command::RegionWrite, &access(4, 5), &Why::DataLength);
    refused(Command::RegionWrite, &access(u32::MAX, 4), &Why::TooLong);
    let within = |offset, count| RegionAccess { offset, region: 0, count }.is_within(256);
    assert!(within(0, 256) && within(252, 4) && within(256, 0));
    assert!(!within(253, 4) && !within(257, 0) && !within(u64::MAX, 4) && !within(0, u32::MAX));
}

#[test]
fn small_writes() {
    assert_eq!(SmallWrite::new(0, 0, &[0; 9]), None);
    let mut body =
        bytes(|out| WriteMulti::encode(&[SmallWrite::new(0, 0, &[1]).expect("1 byte")], out));
    assert!(request(Command::RegionWriteMulti, &body).is_ok());
    refused(Command::RegionWriteMulti, &body[..31], &Why::DataLength);
    for count in [0, 2, u64::MAX, u64::MAX / 24 + 2] {
        body[..8].copy_from_slice(&count.to_ne_bytes());
        refused(Command::RegionWriteMulti, &body, &Why::DataLength);
    }
    body[..8].copy_from_slice(&1_u64.to_ne_bytes());
    body[20..24].copy_from_slice(&9_u32.to_ne_bytes());
    refused(Command::RegionWriteMulti, &body, &Why::TooLong);
}

#[test]
fn state_data() {
    let limit = LIMITS.max_data_xfer_size;
    for command in [Command::MigDataRead, Command::MigDataWrite] {
        refused(command, &words(&[8 + 3, 4, 0]), &Why::Argsz);
        refused(command, &words(&[u32::MAX, limit + 1]), &Why::TooLong);
        refused(command, &words(&[8]), &Why::Short);
    }
    assert!(request(Command::MigDataRead, &words(&[limit + 8, limit])).is_ok());
    refused(Command::MigDataWrite, &words(&[8 + 5, 5, 0]), &Why::DataLength);
}

#[test]
fn message_dma() {
    let access = |address, count| bytes(|out| DmaAccess { address, count }.encode(out));
    let plain = |address, count| {
        DmaAccess::decode_plain(&access(address, count), 4096).map_err(|error| why(&error))
    };
    assert!(plain(0x1000, 4096).is_ok());
    assert_eq!(plain(0x1000, 4097), Err(Why::TooLong));
    assert_eq!(plain(0x1000, u64::MAX), Err(Why::TooLong));
    assert_eq!(plain(0x1000, 0), Err(Why::Range));
    assert_eq!(plain(u64::MAX, 2), Err(Why::Range));
    let mut body = access(0, 2);
    body.push(0);
    let data = DmaAccess::decode_with_data(&body, 4096).map_err(|error| why(&error));
    assert_eq!(data, Err(Why::DataLength));
}

#[test]
fn commands_that_are_not_a_clients() {
    for number in [0, 11, 12, 14, 19, 255, u16::MAX] {
        let error = Request::decode(number, &[0; 64], 0, LIMITS).expect_err("no command");
        assert_eq!(error, WireError::UnknownCommand { number });
    }
}

#[test]
fn fds_with_commands_that_take_none() {
    for command in Command::ALL {
        let error = Request::decode(command.number(), &[], 1, LIMITS).err();
        let takes_fds = matches!(command, Command::DmaMap | Command::SetIrqs);
        let unknown = matches!(command, Command::DmaRead | Command::DmaWrite);
        let refused = matches!(error, Some(WireError::Fds { fds: 1, expected: 0, .. }));
        assert_eq!(refused, !takes_fds, "{command}: {error:?} {unknown}");
    }
}

#[test]
fn capabilities_that_lead_nowhere() {
    let chain = |caps: &[u32]| {
        let argsz = u32::try_from(32 + 4 * caps.len()).expect("small");
        let mut body = words(&[argsz, 8 | 4, 0, 32, 0x1000, 0, 0, 0]);
        body.extend(words(caps));
        RegionInfo::decode(&body).map_err(|error| why(&error))
    };
    let id = |id: u16| {
        u32::from_ne_bytes([id.to_ne_bytes(), 1_u16.to_ne_bytes()].concat().try_into().expect("4"))
    };
    // One that is not known is skipped.
    assert!(matches!(chain(&[id(99), 0]), Ok(RegionReply::Whole(info)) if info.sparse.is_none()));
    // In a circle, back, into the fixed part, beyond the end.
    assert_eq!(chain(&[id(99), 32]), Err(Why::Field));
    assert_eq!(chain(&[id(99), 40, id(99), 32]), Err(Why::Field));
    assert_eq!(chain(&[id(99), 4]), Err(Why::Field));
    assert_eq!(chain(&[id(99), 36, 0]), Err(Why::Field));
    assert_eq!(chain(&[id(99), 41]), Err(Why::Field));
    assert_eq!(chain(&[id(99), 40]), Err(Why::Short));
    assert_eq!(chain(&[id(99), u32::MAX]), Err(Why::Field));
    // Areas: more than came, more than there can be, outside the region.
    assert_eq!(chain(&[id(1), 0, 2, 0, 0, 0, 0x1000, 0]), Err(Why::Short));
    assert_eq!(chain(&[id(1), 0, u32::MAX, 0]), Err(Why::TooLong));
    assert_eq!(chain(&[id(1), 0, 1, 0, 1, 0, 0x1000, 0]), Err(Why::Range));
    assert_eq!(chain(&[id(1), 0, 1, 0, u32::MAX, u32::MAX, 1, 0]), Err(Why::Range));
    assert!(chain(&[id(1), 0, 1, 0, 0, 0, 0x1000, 0]).is_ok());
}

#[test]
fn io_fds_that_did_not_come() {
    let kind = IoFdKind::Shadow { flags: 0, memory_fd_index: 1, memory_offset: 0, datamatch: 0 };
    let fds = IoFds { index: 0, entries: vec![IoFd { offset: 0, size: 4, fd_index: 0, kind }] };
    let body = bytes(|out| assert!(fds.encode(100, Stride::Libvfio, out)));
    assert!(IoFds::decode(&body, 2).is_ok());
    for came in 0..2 {
        assert!(matches!(IoFds::decode(&body, came), Err(WireError::Field { .. })));
    }
    // Of another size than their number says, or of a kind that does not exist.
    let decode = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut body = body.clone();
        change(&mut body);
        IoFds::decode(&body, 2).map_err(|error| why(&error))
    };
    let put = |at: usize, value: u32| {
        move |body: &mut Vec<u8>| body[at..at + 4].copy_from_slice(&value.to_ne_bytes())
    };
    assert_eq!(decode(&put(0, 16 + 39)), Err(Why::Field));
    assert_eq!(decode(&put(0, 15)), Err(Why::Field));
    assert_eq!(decode(&put(12, 2)), Err(Why::Field));
    assert_eq!(decode(&put(12, u32::MAX)), Err(Why::Field));
    assert_eq!(decode(&put(36, 3)), Err(Why::Field));
    assert_eq!(decode(&put(12, 0)), Ok(IoFdsReply::Whole(IoFds::default())));
}

proptest! {
    /// Any bytes are a request or not, by any number.
    #[test]
    fn any_bytes_are_a_request_or_not(number in 0..20_u16, mut body: Vec<u8>, fds in 0..3_usize, argsz: bool) {
        // Most of what is random fails at the first number; so some has a good one.
        if let (true, Some(size)) = (argsz, body.get_mut(..8)) {
            size.copy_from_slice(&[0, 0, 1, 0, 0, 0, 0, 0]);
        }
        let _ = Request::decode(number, &body, fds, LIMITS);
        let _ = RegionInfo::decode(&body);
        let _ = IoFds::decode(&body, fds);
        let _ = MigData::decode_data(&body, 100);
    }
}
