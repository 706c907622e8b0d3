//! What is encoded is decoded as the same.

use super::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use standstill_protocol::migration::MigrationState;

/// First address and size of a range, in pages of 4096 bytes.
fn range() -> impl Strategy<Value = (u64, u64)> {
    (0..1_u64 << 40, 1..1_u64 << 20).prop_map(|(start, size)| (start << 12, size << 12))
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..100)
}

/// Encodes a request and decodes it by the number of its command.
fn check(command: Command, body: &[u8], expected: &Request<'_>) -> Result<(), TestCaseError> {
    prop_assert_eq!(&request(command, body), &Ok(expected.clone()));
    // What is cut short is refused, whatever it is.
    for cut in 0..body.len() {
        if command != Command::Version {
            prop_assert!(request(command, &body[..cut]).is_err(), "{} of {}", cut, body.len());
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn headers(id: u16, command: u16, size: u32, flags: u32, error: u32) {
        let header = Header { id, command, size, flags, error };
        let encoded = bytes(|out| header.encode(out));
        prop_assert_eq!(encoded.len(), HEADER_SIZE);
        prop_assert_eq!(Header::decode(&encoded), Some(header));
        prop_assert_eq!(Header::decode(&encoded[1..]), None);
    }

    #[test]
    fn messages(id: u16, body in data(), following in 0..1000_usize) {
        let header = Header::command(id, Command::RegionWrite);
        let message = bytes(|out| {
            out.push(0xff);
            header.encode_message(out, following, |out| out.extend_from_slice(&body));
        });
        let decoded = Header::decode(&message[1..]).expect("a header");
        let size = u32::try_from(HEADER_SIZE + body.len() + following).expect("small");
        prop_assert_eq!(decoded, Header { size, ..header });
        prop_assert_eq!(decoded.body_size(), Some(body.len() + following));
        prop_assert_eq!(&message[1 + HEADER_SIZE..], &body);
    }

    #[test]
    fn dma_maps((iova, size) in range(), offset in 0..1_u64 << 50, flags in 0..16_u32) {
        let map = DmaMap { flags, offset, iova, size };
        let body = bytes(|out| map.encode(out));
        prop_assert_eq!(body.len(), DmaMap::SIZE);
        prop_assert_eq!(DmaMap::decode(&body, 1), Ok(map));
        let plain = DmaMap { flags: flags & 3, ..map };
        check(Command::DmaMap, &bytes(|out| plain.encode(out)), &Request::DmaMap(plain))?;
    }

    #[test]
    fn dma_unmaps((iova, size) in range(), shift in 12..20_u32, more in 0..4_u64, kind in 0..3) {
        let page_size = 1 << shift;
        let bitmap_size = bitmap_size(size, page_size) + 8 * more;
        let what = match kind {
            0 => Unmap::Range { iova, size },
            1 => Unmap::Bitmap { iova, size, page_size, bitmap_size },
            _ => Unmap::All,
        };
        let argsz = u32::try_from(bitmap_size).expect("small") + 40;
        let unmap = DmaUnmap { argsz, what };
        check(Command::DmaUnmap, &bytes(|out| unmap.encode(out)), &Request::DmaUnmap(unmap))?;
    }

    #[test]
    fn dma_accesses(address in 0..u64::MAX / 2, data in vec(any::<u8>(), 1..100)) {
        let access = DmaAccess { address, count: data.len() as u64 };
        let mut body = bytes(|out| access.encode(out));
        prop_assert_eq!(DmaAccess::decode_plain(&body, 100), Ok(access));
        body.extend(&data);
        prop_assert_eq!(DmaAccess::decode_with_data(&body, 100), Ok((access, &data[..])));
    }

    #[test]
    fn questions(argsz in 32..u32::MAX, index: u32) {
        let query = Query { argsz, index };
        let body = bytes(|out| query.encode(DeviceInfo::SIZE, out));
        check(Command::GetInfo, &body, &Request::GetInfo(Query { argsz, index: 0 }))?;
        let body = bytes(|out| query.encode(RegionInfo::SIZE, out));
        check(Command::GetRegionInfo, &body, &Request::GetRegionInfo(query))?;
        let body = bytes(|out| query.encode(IrqInfo::SIZE, out));
        check(Command::GetIrqInfo, &body, &Request::GetIrqInfo(query))?;
        let query = IoFdsQuery { argsz: argsz % (1 << 20), index };
        let body = bytes(|out| query.encode(out));
        if query.argsz >= 16 {
            check(Command::GetRegionIoFds, &body, &Request::GetRegionIoFds(query))?;
        }
    }

    #[test]
    fn infos(flags: u32, a: u32, b: u32) {
        let info = DeviceInfo { flags, num_regions: a, num_irqs: b };
        prop_assert_eq!(DeviceInfo::decode(&bytes(|out| info.encode(out))), Ok(info));
        let info = IrqInfo { flags, index: a, count: b };
        prop_assert_eq!(IrqInfo::decode(&bytes(|out| info.encode(out))), Ok(info));
    }

    /// In two steps, as all clients ask.
    #[test]
    fn region_infos(
        flags in 0..8_u32,
        index: u32,
        offset: u64,
        size in 1..u64::MAX,
        sparse in option::of(vec((any::<u64>(), any::<u64>()), 0..20)),
        msix_mappable: bool,
    ) {
        let areas = |areas: Vec<(u64, u64)>| {
            areas.into_iter().map(|(a, b)| {
                let offset = a % size;
                SparseArea { offset, size: b % (size - offset + 1).max(1) }
            }).collect()
        };
        let sparse = sparse.map(areas);
        let info = RegionInfo { flags, index, size, offset, sparse, msix_mappable };
        let argsz = u32::try_from(info.reply_size()).expect("small");
        let body = bytes(|out| assert!(info.encode(argsz, out)));
        prop_assert_eq!(body.len(), info.reply_size());
        prop_assert_eq!(RegionInfo::decode(&body), Ok(RegionReply::Whole(info.clone())));
        for cut in 0..body.len() {
            prop_assert_ne!(RegionInfo::decode(&body[..cut]), Ok(RegionReply::Whole(info.clone())));
        }
        if argsz > 32 {
            let mut small = Vec::new();
            prop_assert!(!info.encode(argsz - 1, &mut small));
            prop_assert_eq!(small.len(), RegionInfo::SIZE);
            // Neither bit nor place of capabilities that are not there.
            prop_assert_eq!(&small[4..8], &flags.to_ne_bytes());
            prop_assert_eq!(&small[12..16], &[0; 4]);
            prop_assert_eq!(RegionInfo::decode(&small), Ok(RegionReply::Partial { argsz }));
        }
    }

    #[test]
    fn io_fds(
        index: u32,
        parts in vec((any::<[u64; 4]>(), any::<[u32; 3]>(), 0..3), 0..10),
        long: bool,
    ) {
        let stride = if long { Stride::Libvfio } else { Stride::Specification };
        let entries = parts.into_iter().map(|([offset, size, a, b], [fd, flags, memory], kind)| {
            let kind = match kind {
                0 => IoFdKind::IoEventFd { flags, datamatch: a },
                1 => IoFdKind::IoRegionFd { flags, user_data: a },
                _ => IoFdKind::Shadow {
                    flags,
                    memory_fd_index: memory % 5,
                    memory_offset: a,
                    datamatch: if long { b } else { 0 },
                },
            };
            IoFd { offset, size, fd_index: fd % 5, kind }
        });
        let fds = IoFds { index, entries: entries.collect() };
        let argsz = u32::try_from(16 + fds.entries.len() * stride.bytes()).expect("small");
        let body = bytes(|out| assert!(fds.encode(argsz, stride, out)));
        prop_assert_eq!(IoFds::decode(&body, 5), Ok(IoFdsReply::Whole(fds.clone())));
        if !fds.entries.is_empty() {
            let small = bytes(|out| assert!(!fds.encode(argsz - 1, stride, out)));
            prop_assert_eq!(small.len(), 16);
            prop_assert_eq!(IoFds::decode(&small, 0), Ok(IoFdsReply::Partial { argsz }));
        }
    }

    #[test]
    fn interrupts(argsz: u32, flags: u32, index: u32, start: u32, count: u32, data in data()) {
        let irqs = SetIrqs { argsz, flags, index, start, count };
        let mut body = bytes(|out| irqs.encode(out));
        body.extend(&data);
        prop_assert_eq!(SetIrqs::decode(&body), Ok((irqs, &data[..])));
        let expected = Request::SetIrqs { request: irqs, data: &data };
        prop_assert_eq!(request(Command::SetIrqs, &body), Ok(expected));
    }

    #[test]
    fn region_accesses(offset: u64, region: u32, data in data()) {
        let count = u32::try_from(data.len()).expect("small");
        let access = RegionAccess { offset, region, count };
        let mut body = bytes(|out| access.encode(out));
        check(Command::RegionRead, &body, &Request::RegionRead(access))?;
        body.extend(&data);
        check(Command::RegionWrite, &body, &Request::RegionWrite { access, data: &data })?;
        body.push(0);
        prop_assert!(request(Command::RegionWrite, &body).is_err());
    }

    #[test]
    fn small_writes(writes in vec((any::<u32>(), any::<u64>(), vec(any::<u8>(), 0..=8)), 0..20)) {
        let writes: Vec<_> = writes.iter().map(|(region, offset, data)| {
            let write = SmallWrite::new(*region, *offset, data).expect("at most 8 bytes");
            assert_eq!(write.data(), data);
            write
        }).collect();
        let body = bytes(|out| WriteMulti::encode(&writes, out));
        let decoded = WriteMulti::decode(&body).expect("what was encoded");
        prop_assert_eq!(decoded.count(), writes.len() as u64);
        prop_assert_eq!(decoded.writes().collect::<Vec<_>>(), writes);
        check(Command::RegionWriteMulti, &body, &Request::RegionWriteMulti(decoded))?;
    }

    #[test]
    fn features(
        state in prop::sample::select(&MigrationState::ALL[1..]),
        shift in 0..63_u32,
        ranges in vec(range(), 0..10),
        (iova, length) in range(),
        operations in prop::sample::select(&[0, feature::FEATURE_GET, feature::FEATURE_SET][..]),
    ) {
        let start = LoggingStart { page_size: 1 << shift, ranges };
        let report = LoggingReport { iova, length, page_size: 1 << shift.max(12) };
        for feature in [
            Feature::Probe { feature: feature::FEATURE_MIG_DEVICE_STATE, operations },
            Feature::GetMigration,
            Feature::GetState,
            Feature::SetState(state),
            Feature::StartLogging(start),
            Feature::StopLogging,
            Feature::Report(report),
            Feature::GetDataSize,
        ] {
            let body = bytes(|out| feature.encode(out));
            check(Command::DeviceFeature, &body, &Request::DeviceFeature(feature))?;
        }
    }

    #[test]
    fn state_data(data in data(), more in 0..50_u32, pad: bool) {
        let size = u32::try_from(data.len()).expect("small");
        let read = MigData { size };
        check(Command::MigDataRead, &bytes(|out| read.encode(out)), &Request::MigDataRead(read))?;

        let mut body = bytes(|out| read.encode(out));
        body.extend(&data);
        check(Command::MigDataWrite, &body, &Request::MigDataWrite(&data))?;
        body.resize(body.len() + 9, 1);
        prop_assert_eq!(request(Command::MigDataWrite, &body), Ok(Request::MigDataWrite(&data)));

        let reply = bytes(|out| MigData::encode_reply(&data, size + more, pad, out));
        let padding = if pad { usize::try_from(more).expect("small") } else { 0 };
        prop_assert_eq!(reply.len(), MigData::SIZE + data.len() + padding);
        prop_assert_eq!(MigData::decode_data(&reply, size + more), Ok(&data[..]));
    }

    #[test]
    fn bitmaps((iova, size) in range(), shift in 12..20_u32, marks in vec(any::<u64>(), 0..20)) {
        let page_size = 1 << shift;
        let mut bitmap = PageBitmap::new(iova, size, page_size).expect("a range");
        let marked: std::collections::BTreeSet<u64> =
            marks.iter().map(|mark| mark % bitmap.pages()).collect();
        marked.iter().for_each(|page| bitmap.mark(*page));
        bitmap.mark(bitmap.pages());
        prop_assert_eq!(bitmap.count(), marked.len() as u64);
        let addresses: Vec<_> = marked.iter().map(|page| iova + page * page_size).collect();
        prop_assert_eq!(bitmap.dirty().collect::<Vec<_>>(), addresses);
        for page in 0..bitmap.pages().min(200) {
            let last = iova + page * page_size + page_size - 1;
            prop_assert_eq!(bitmap.is_dirty(last), marked.contains(&page));
        }
        let encoded = bytes(|out| bitmap.encode(out));
        prop_assert_eq!(encoded.len() as u64, bitmap_size(size, page_size));
        prop_assert_eq!(PageBitmap::from_bytes(iova, size, page_size, &encoded), Ok(bitmap));
    }
}

#[test]
fn a_reset_has_no_body_and_takes_one() {
    assert_eq!(request(Command::Reset, &[]), Ok(Request::Reset));
    assert_eq!(request(Command::Reset, &[1, 2, 3]), Ok(Request::Reset));
}

#[test]
fn bits_beyond_the_range_mean_nothing() {
    let bitmap = PageBitmap::from_bytes(0, 3 * 4096, 4096, &[0xff; 8]).expect("a word");
    assert_eq!(bitmap.count(), 3);
    assert_eq!(bitmap.words(), [7]);
}
