//! What the corpora of the two targets of vfio-user begin with: each command, and good answers to
//! all calls of a client.

use super::Seeds;
use standstill_fuzz::vfio_user::encode_request;
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_vfio_user::wire::{
    Capabilities, Command, DMA_READABLE, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, Feature, IoFd,
    IoFdKind, IoFds, IoFdsQuery, IrqInfo, LoggingReport, LoggingStart, MigData,
    MigrationCapability, Query, REGION_MAPPABLE, RegionAccess, RegionInfo, Request, SetIrqs,
    SmallWrite, SparseArea, Stride, Unmap, Version, WriteMulti, feature,
};

fn bytes(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

fn version() -> Version {
    Version::new(Capabilities {
        max_msg_fds: Some(16),
        max_data_xfer_size: Some(1 << 20),
        max_dma_maps: Some(65535),
        pgsizes: Some(4096),
        write_multiple: Some(true),
        twin_socket: None,
        migration: Some(MigrationCapability { pgsize: Some(4096), max_bitmap_size: Some(4096) }),
    })
}

/// One entry of an input: two bytes, the length of the body, the body.
fn entry(first: u8, second: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("a short body");
    [&[first, second], &length.to_le_bytes()[..], body].concat()
}

fn requests() -> Vec<(Command, Request<'static>)> {
    let query = Query { argsz: 64, index: 2 };
    let access = RegionAccess { offset: 0x10, region: 2, count: 4 };
    let bitmap = Unmap::Bitmap { iova: 0x1000, size: 0x2000, page_size: 0x1000, bitmap_size: 8 };
    let irqs = SetIrqs { argsz: 23, flags: 0x22, index: 2, start: 0, count: 3 };
    let mut requests = vec![
        (Command::Version, Request::Version(version())),
        (
            Command::DmaMap,
            Request::DmaMap(DmaMap { flags: DMA_READABLE, offset: 0, iova: 0x1000, size: 0x1000 }),
        ),
        (Command::GetInfo, Request::GetInfo(Query { argsz: 16, index: 0 })),
        (Command::GetRegionInfo, Request::GetRegionInfo(query)),
        (Command::GetRegionIoFds, Request::GetRegionIoFds(IoFdsQuery { argsz: 96, index: 2 })),
        (Command::GetIrqInfo, Request::GetIrqInfo(query)),
        (Command::SetIrqs, Request::SetIrqs { request: irqs, data: &[1, 0, 1] }),
        (Command::RegionRead, Request::RegionRead(access)),
        (Command::RegionWrite, Request::RegionWrite { access, data: &[1, 2, 3, 4] }),
        (Command::Reset, Request::Reset),
        (Command::MigDataRead, Request::MigDataRead(MigData { size: 100 })),
        (Command::MigDataWrite, Request::MigDataWrite(&[1, 2, 3, 4, 5])),
    ];
    for what in [Unmap::Range { iova: 0x1000, size: 0x1000 }, bitmap, Unmap::All] {
        requests.push((Command::DmaUnmap, Request::DmaUnmap(DmaUnmap { argsz: 48, what })));
    }
    let report = LoggingReport { iova: 0x1000, length: 0x2000, page_size: 0x1000 };
    let start = LoggingStart { page_size: 4096, ranges: vec![(0x1000, 0x2000)] };
    for feature in [
        Feature::Probe { feature: 8, operations: feature::FEATURE_GET },
        Feature::GetMigration,
        Feature::GetState,
        Feature::SetState(MigrationState::StopCopy),
        Feature::StartLogging(start),
        Feature::StopLogging,
        Feature::Report(report),
        Feature::GetDataSize,
    ] {
        requests.push((Command::DeviceFeature, Request::DeviceFeature(feature)));
    }
    requests
}

/// Each command alone, and all of them as one stream.
pub(super) fn server() -> Seeds {
    let mut seeds = Seeds::new();
    let mut all = vec![1, 3, 200, 7];
    let mut bodies: Vec<_> = requests()
        .iter()
        .map(|(command, request)| (*command, bytes(|out| encode_request(request, out))))
        .collect();
    let writes = [[1, 2], [3, 4]].map(|data| SmallWrite::new(2, 0x10, &data).expect("2 bytes"));
    bodies.push((Command::RegionWriteMulti, bytes(|out| WriteMulti::encode(&writes, out))));
    for (number, (command, body)) in bodies.iter().enumerate() {
        let command_number = u8::try_from(command.number()).expect("a small number");
        let entry = entry(command_number, 0, body);
        all.extend_from_slice(&entry);
        let seed = [&[1, 0, 9, 0], &entry[..]].concat();
        seeds.push((format!("{number}-{command}"), seed));
    }
    seeds.push(("all".into(), all));
    seeds
}

/// Good answers to the calls with these numbers (see `standstill_fuzz::vfio_user::call`).
fn answers() -> Vec<(u8, Vec<Vec<u8>>)> {
    let access = |offset, region, count| {
        move |out: &mut Vec<u8>| RegionAccess { offset, region, count }.encode(out)
    };
    let read = |offset, region, count: u32| {
        let mut body = bytes(access(offset, region, count));
        body.resize(body.len() + usize::try_from(count).expect("small"), 7);
        body
    };
    let region = RegionInfo {
        flags: REGION_MAPPABLE,
        index: 1,
        size: 0x4000,
        offset: 0,
        sparse: Some(vec![SparseArea { offset: 0, size: 0x1000 }]),
        msix_mappable: true,
    };
    let region = |argsz| {
        bytes(|out| {
            region.encode(argsz, out);
        })
    };
    let kind = IoFdKind::IoEventFd { flags: 0, datamatch: 0 };
    let io_fds = IoFds { index: 0, entries: vec![IoFd { offset: 0, size: 4, fd_index: 0, kind }] };
    let io_fds = |argsz| {
        bytes(|out| {
            io_fds.encode(argsz, Stride::Libvfio, out);
        })
    };
    let bitmap = Unmap::Bitmap { iova: 0, size: 0x10_0000, page_size: 0x1000, bitmap_size: 32 };
    let unmap = bytes(|out| DmaUnmap { argsz: 72, what: bitmap }.encode(out));
    let set = bytes(|out| Feature::SetState(MigrationState::StopCopy).encode(out));
    let state = bytes(|out| feature::encode_state(MigrationState::Stop, out));
    let start = LoggingStart { page_size: 4096, ranges: vec![(0, 0x1000)] };
    let chunk = |size: usize| bytes(|out| MigData::encode_reply(&vec![1; size], 4096, true, out));
    vec![
        (0, vec![bytes(|out| DeviceInfo { flags: 3, num_regions: 9, num_irqs: 5 }.encode(out))]),
        (1, vec![region(32), region(4096)]),
        (2, vec![io_fds(16), io_fds(4096)]),
        (3, vec![bytes(|out| IrqInfo { flags: 1, index: 2, count: 4 }.encode(out))]),
        (4, vec![vec![]]),
        (5, vec![read(0x10, 0, 4)]),
        (6, vec![read(0, 1, 4096), read(4096, 1, 904)]),
        (7, vec![bytes(access(0x10, 0, 4))]),
        (8, vec![vec![]]),
        (9, vec![vec![]]),
        (10, vec![[unmap, vec![5; 32]].concat()]),
        (12, vec![vec![]]),
        (13, vec![bytes(|out| feature::encode_flags(MigrationFlags::ALL, out))]),
        (14, vec![state.clone()]),
        (15, vec![set]),
        (16, vec![bytes(|out| feature::encode_data_size(99, out))]),
        (17, vec![bytes(|out| start.encode(out))]),
        (18, vec![vec![]]),
        (20, vec![chunk(4096), chunk(100)]),
        (21, vec![vec![], vec![]]),
        (22, vec![vec![]]),
        (23, vec![1_u64.to_ne_bytes().to_vec()]),
    ]
}

/// Each call with a good answer, with a refusal, and after message DMA; and all of them together.
pub(super) fn client() -> Seeds {
    let mut seeds = Seeds::new();
    let hello = entry(0, 0, &bytes(|out| version().encode(out)));
    let dma = bytes(|out| DmaAccess { address: 0x1000, count: 4 }.encode(out));
    let mut all = hello.clone();
    for (call, bodies) in answers() {
        let with_fd = u8::from(matches!(call, 1 | 2)) << 3;
        let steps: Vec<u8> = bodies.iter().flat_map(|body| entry(call, with_fd, body)).collect();
        all.extend_from_slice(&steps);
        seeds.push((format!("{call}-good"), [&hello[..], &steps].concat()));
        let refused = [&hello[..], &entry(call, 5, &[]), &steps].concat();
        seeds.push((format!("{call}-refused"), refused));
    }
    let with_dma = [&hello[..], &entry(12, 7, &dma), &entry(12, 0, &[])].concat();
    seeds.push(("dma".into(), with_dma));
    let ends = [&hello[..], &entry(12, 6, &[0xff; 40])].concat();
    seeds.push(("garbage".into(), ends));
    seeds.push(("all".into(), all));
    seeds
}
