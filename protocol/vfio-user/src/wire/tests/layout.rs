//! The bytes are those of the specification; where Linux has the structure, of that.

use super::*;
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::mem::{offset_of, size_of};
use vfio_bindings::bindings::vfio as linux;

/// The words of a body, from its beginning.
fn u32_at(body: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(body[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(body: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(body[at..at + 8].try_into().expect("8 bytes"))
}

#[test]
fn headers() {
    let command = Header::command(0x1234, Command::DmaRead);
    let posted = Header::posted(0x1234, Command::RegionWrite);
    let refusal = command.refusal(Errno::EINVAL);
    let encoded = bytes(|out| refusal.encode(out));
    assert_eq!(encoded[..2], 0x1234_u16.to_ne_bytes());
    assert_eq!(encoded[2..4], 11_u16.to_ne_bytes());
    assert_eq!([4, 8, 12].map(|at| u32_at(&encoded, at)), [16, 0x21, 22]);
    assert_eq!((command.flags, posted.flags, command.reply().flags), (0, 0x10, 1));
    assert_eq!(command.kind(), Some(Kind::Command));
    assert_eq!(posted.kind(), Some(Kind::Posted));
    assert_eq!(command.reply().kind(), Some(Kind::Done));
    assert_eq!(refusal.kind(), Some(Kind::Refused(Errno::EINVAL)));
    // An error without a number, or with one that is none.
    for error in [0, 4096, u32::MAX] {
        assert_eq!(Header { error, ..refusal }.kind(), Some(Kind::Refused(Errno::EIO)));
    }
    for flags in 2..16 {
        assert_eq!(Header { flags, ..command }.kind(), None);
    }
}

#[test]
fn commands() {
    for command in Command::ALL {
        assert_eq!(Command::from_number(command.number()), Some(command));
    }
    for number in [0, 14, 19, u16::MAX] {
        assert_eq!(Command::from_number(number), None);
    }
    assert_eq!(Command::Reset.number(), 13);
    assert_eq!(Command::MigDataWrite.number(), 18);
}

#[test]
fn dma_map() {
    type Linux = linux::vfio_iommu_type1_dma_map;
    let map = DmaMap { flags: 3, offset: 0x1000, iova: 0x2000, size: 0x3000 };
    let body = bytes(|out| map.encode(out));
    // vfio-user has the offset in the file where Linux has an address in the process.
    assert_eq!(body.len(), size_of::<Linux>());
    assert_eq!(u32_at(&body, offset_of!(Linux, argsz)), 32);
    assert_eq!(u32_at(&body, offset_of!(Linux, flags)), 3);
    assert_eq!(u64_at(&body, offset_of!(Linux, vaddr)), 0x1000);
    assert_eq!(u64_at(&body, offset_of!(Linux, iova)), 0x2000);
    assert_eq!(u64_at(&body, offset_of!(Linux, size)), 0x3000);
    assert_eq!(
        (DMA_READABLE, DMA_WRITABLE),
        (linux::VFIO_DMA_MAP_FLAG_READ, linux::VFIO_DMA_MAP_FLAG_WRITE)
    );
}

#[test]
fn dma_unmap() {
    type Linux = linux::vfio_iommu_type1_dma_unmap;
    type Bitmap = linux::vfio_bitmap;
    let (iova, size, page_size, bitmap_size) = (0x1000, 0x2000, 0x1000, 8);
    let what = Unmap::Bitmap { iova, size, page_size, bitmap_size };
    let body = bytes(|out| DmaUnmap { argsz: 48, what }.encode(out));
    assert_eq!(body.len(), DmaUnmap::BITMAP_AT);
    assert_eq!(u32_at(&body, offset_of!(Linux, argsz)), 48);
    assert_eq!(
        u32_at(&body, offset_of!(Linux, flags)),
        linux::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
    );
    assert_eq!(u64_at(&body, offset_of!(Linux, iova)), 0x1000);
    assert_eq!(u64_at(&body, offset_of!(Linux, size)), 0x2000);
    assert_eq!(u64_at(&body, size_of::<Linux>() + offset_of!(Bitmap, pgsize)), 0x1000);
    assert_eq!(u64_at(&body, size_of::<Linux>() + offset_of!(Bitmap, size)), 8);
    let all = bytes(|out| DmaUnmap { argsz: 24, what: Unmap::All }.encode(out));
    assert_eq!(u32_at(&all, offset_of!(Linux, flags)), linux::VFIO_DMA_UNMAP_FLAG_ALL);
    assert_eq!(all.len(), size_of::<Linux>());
}

#[test]
fn device_info() {
    type Linux = linux::vfio_device_info;
    let info = DeviceInfo { flags: 3, num_regions: 9, num_irqs: 5 };
    let body = bytes(|out| info.encode(out));
    assert_eq!(u32_at(&body, offset_of!(Linux, argsz)), 16);
    assert_eq!(u32_at(&body, offset_of!(Linux, flags)), 3);
    assert_eq!(u32_at(&body, offset_of!(Linux, num_regions)), 9);
    assert_eq!(u32_at(&body, offset_of!(Linux, num_irqs)), 5);
    assert_eq!(DEVICE_RESETTABLE, linux::VFIO_DEVICE_FLAGS_RESET);
    assert_eq!(DEVICE_PCI, linux::VFIO_DEVICE_FLAGS_PCI);
    assert_eq!(PCI_REGIONS, linux::VFIO_PCI_NUM_REGIONS);
    assert_eq!(PCI_IRQS, linux::VFIO_PCI_NUM_IRQS);
    assert_eq!(PCI_CONFIG_REGION, linux::VFIO_PCI_CONFIG_REGION_INDEX);
}

#[test]
fn region_info() {
    type Linux = linux::vfio_region_info;
    type Sparse = linux::vfio_region_info_cap_sparse_mmap;
    type Area = linux::vfio_region_sparse_mmap_area;
    type Cap = linux::vfio_info_cap_header;
    let areas =
        [(0x1000, 0x2000), (0x5000, 0x1000)].map(|(offset, size)| SparseArea { offset, size });
    let info = RegionInfo {
        flags: REGION_READABLE | REGION_WRITABLE | REGION_MAPPABLE,
        index: 2,
        size: 0x8000,
        offset: 0x10000,
        sparse: Some(areas.to_vec()),
        msix_mappable: true,
    };
    let body = bytes(|out| assert!(info.encode(4096, out)));
    assert_eq!(body.len(), 80 + 8);
    assert_eq!(RegionInfo::SIZE, size_of::<Linux>());
    assert_eq!(u32_at(&body, offset_of!(Linux, argsz)), 88);
    assert_eq!(u32_at(&body, offset_of!(Linux, flags)), 0xf);
    assert_eq!(u32_at(&body, offset_of!(Linux, index)), 2);
    assert_eq!(u32_at(&body, offset_of!(Linux, cap_offset)), 32);
    assert_eq!(u64_at(&body, offset_of!(Linux, size)), 0x8000);
    assert_eq!(u64_at(&body, offset_of!(Linux, offset)), 0x10000);
    let id_and_version = |at: usize| {
        [&body[at..at + 2], &body[at + 2..at + 4]].map(|two| u16::from_ne_bytes([two[0], two[1]]))
    };
    assert_eq!(id_and_version(32), [1, 1]);
    assert_eq!(linux::VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1);
    assert_eq!(u32_at(&body, 32 + offset_of!(Cap, next)), 80);
    assert_eq!(u32_at(&body, 32 + offset_of!(Sparse, nr_areas)), 2);
    let first = 32 + offset_of!(Sparse, areas);
    let second = first + size_of::<Area>();
    assert_eq!(u64_at(&body, first + offset_of!(Area, offset)), 0x1000);
    assert_eq!(u64_at(&body, first + offset_of!(Area, size)), 0x2000);
    assert_eq!(u64_at(&body, second + offset_of!(Area, offset)), 0x5000);
    assert_eq!(id_and_version(80), [3, 1]);
    assert_eq!(linux::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 3);
    assert_eq!(u32_at(&body, 80 + offset_of!(Cap, next)), 0);
    assert_eq!(REGION_READABLE, linux::VFIO_REGION_INFO_FLAG_READ);
    assert_eq!(REGION_WRITABLE, linux::VFIO_REGION_INFO_FLAG_WRITE);
    assert_eq!(REGION_MAPPABLE, linux::VFIO_REGION_INFO_FLAG_MMAP);
    assert_eq!(linux::VFIO_REGION_INFO_FLAG_CAPS, 8);
}

#[test]
fn interrupts() {
    type Info = linux::vfio_irq_info;
    type Set = linux::vfio_irq_set;
    let body = bytes(|out| IrqInfo { flags: 1, index: 2, count: 3 }.encode(out));
    assert_eq!(body.len(), size_of::<Info>());
    assert_eq!(u32_at(&body, offset_of!(Info, argsz)), 16);
    assert_eq!(u32_at(&body, offset_of!(Info, flags)), linux::VFIO_IRQ_INFO_EVENTFD);
    assert_eq!(u32_at(&body, offset_of!(Info, index)), 2);
    assert_eq!(u32_at(&body, offset_of!(Info, count)), 3);
    assert_eq!(
        [IRQ_EVENTFD, IRQ_MASKABLE, IRQ_AUTOMASKED, IRQ_NORESIZE],
        [
            linux::VFIO_IRQ_INFO_EVENTFD,
            linux::VFIO_IRQ_INFO_MASKABLE,
            linux::VFIO_IRQ_INFO_AUTOMASKED,
            linux::VFIO_IRQ_INFO_NORESIZE,
        ]
    );
    let set = SetIrqs { argsz: 20, flags: 0x24, index: 2, start: 4, count: 5 };
    let body = bytes(|out| set.encode(out));
    assert_eq!(body.len(), offset_of!(Set, data));
    assert_eq!(u32_at(&body, offset_of!(Set, flags)), 0x24);
    assert_eq!(u32_at(&body, offset_of!(Set, index)), 2);
    assert_eq!(u32_at(&body, offset_of!(Set, start)), 4);
    assert_eq!(u32_at(&body, offset_of!(Set, count)), 5);
    assert_eq!(
        [irq::DATA_NONE, irq::DATA_BOOL, irq::DATA_EVENTFD],
        [
            linux::VFIO_IRQ_SET_DATA_NONE,
            linux::VFIO_IRQ_SET_DATA_BOOL,
            linux::VFIO_IRQ_SET_DATA_EVENTFD
        ]
    );
    assert_eq!(
        [irq::ACTION_MASK, irq::ACTION_UNMASK, irq::ACTION_TRIGGER],
        [
            linux::VFIO_IRQ_SET_ACTION_MASK,
            linux::VFIO_IRQ_SET_ACTION_UNMASK,
            linux::VFIO_IRQ_SET_ACTION_TRIGGER
        ]
    );
}

#[test]
fn accesses() {
    let body = bytes(|out| RegionAccess { offset: 1, region: 2, count: 3 }.encode(out));
    assert_eq!((u64_at(&body, 0), u32_at(&body, 8), u32_at(&body, 12)), (1, 2, 3));
    assert_eq!(body.len(), RegionAccess::SIZE);
    // DMA has counts of 8 bytes, also in the reply to a write.
    let body = bytes(|out| DmaAccess { address: 1, count: 2 }.encode(out));
    assert_eq!((u64_at(&body, 0), u64_at(&body, 8), body.len()), (1, 2, 16));
    let write = SmallWrite::new(2, 0x10, &[1, 2]).expect("2 bytes");
    let body = bytes(|out| WriteMulti::encode(&[write], out));
    assert_eq!(body.len(), 8 + 24);
    assert_eq!((u64_at(&body, 0), u64_at(&body, 8)), (1, 0x10));
    assert_eq!((u32_at(&body, 16), u32_at(&body, 20)), (2, 2));
    assert_eq!(body[24..], [1, 2, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn io_fds() {
    let kind = IoFdKind::IoEventFd { flags: 1, datamatch: 7 };
    let entry = IoFd { offset: 0x10, size: 4, fd_index: 3, kind };
    let kind = IoFdKind::Shadow { flags: 1, memory_fd_index: 2, memory_offset: 8, datamatch: 9 };
    let shadow = IoFd { kind, ..entry };
    for (stride, size) in [(Stride::Specification, 40), (Stride::Libvfio, 48)] {
        let fds = IoFds { index: 2, entries: vec![entry, shadow] };
        let body = bytes(|out| assert!(fds.encode(4096, stride, out)));
        assert_eq!(body.len(), 16 + 2 * size);
        assert_eq!(
            [0, 4, 8, 12].map(|at| u32_at(&body, at)),
            [16 + 2 * u32::try_from(size).expect("small"), 0, 2, 2]
        );
        let first = &body[16..];
        assert_eq!((u64_at(first, 0), u64_at(first, 8)), (0x10, 4));
        assert_eq!([16, 20, 24, 28].map(|at| u32_at(first, at)), [3, 0, 1, 0]);
        assert_eq!(u64_at(first, 32), 7);
        let second = &first[size..];
        assert_eq!([16, 20, 24, 28].map(|at| u32_at(second, at)), [3, 2, 1, 2]);
        assert_eq!(u64_at(second, 32), 8);
        if size == 48 {
            assert_eq!((u64_at(first, 40), u64_at(second, 40)), (7, 9));
        }
    }
}

#[test]
fn features() {
    type Linux = linux::vfio_device_feature;
    assert_eq!(feature::FEATURE_SIZE, size_of::<Linux>());
    assert_eq!(
        [feature::FEATURE_GET, feature::FEATURE_SET, feature::FEATURE_PROBE],
        [
            linux::VFIO_DEVICE_FEATURE_GET,
            linux::VFIO_DEVICE_FEATURE_SET,
            linux::VFIO_DEVICE_FEATURE_PROBE
        ]
    );
    assert_eq!(
        [
            feature::FEATURE_MIGRATION,
            feature::FEATURE_MIG_DEVICE_STATE,
            feature::FEATURE_DMA_LOGGING_START,
            feature::FEATURE_DMA_LOGGING_STOP,
            feature::FEATURE_DMA_LOGGING_REPORT,
            feature::FEATURE_MIG_DATA_SIZE,
        ]
        .map(u32::from),
        [
            linux::VFIO_DEVICE_FEATURE_MIGRATION,
            linux::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
            linux::VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
            linux::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
            linux::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
            linux::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
        ]
    );

    type State = linux::vfio_device_feature_mig_state;
    let body = bytes(|out| Feature::SetState(MigrationState::StopCopy).encode(out));
    assert_eq!(body.len(), size_of::<Linux>() + size_of::<State>());
    assert_eq!(u32_at(&body, offset_of!(Linux, argsz)), 16);
    assert_eq!(u32_at(&body, offset_of!(Linux, flags)), 2 | 1 << 17);
    assert_eq!(u32_at(&body, size_of::<Linux>() + offset_of!(State, device_state)), 3);
    assert_eq!(u32_at(&body, size_of::<Linux>() + offset_of!(State, data_fd)), u32::MAX);

    type Control = linux::vfio_device_feature_dma_logging_control;
    type Range = linux::vfio_device_feature_dma_logging_range;
    let start = LoggingStart { page_size: 4096, ranges: vec![(0x1000, 0x2000), (0x5000, 0x3000)] };
    let body = bytes(|out| start.encode(out));
    // Linux has a pointer to the ranges, vfio-user the ranges.
    let ranges = 8 + offset_of!(Control, ranges);
    assert_eq!(body.len(), ranges + 2 * size_of::<Range>());
    assert_eq!(u64_at(&body, 8 + offset_of!(Control, page_size)), 4096);
    assert_eq!(u32_at(&body, 8 + offset_of!(Control, num_ranges)), 2);
    assert_eq!(u64_at(&body, ranges + offset_of!(Range, length)), 0x2000);
    assert_eq!(u64_at(&body, ranges + 16 + offset_of!(Range, iova)), 0x5000);

    type Report = linux::vfio_device_feature_dma_logging_report;
    let report = LoggingReport { iova: 0x1000, length: 0x2000, page_size: 4096 };
    let body = bytes(|out| report.encode(out));
    assert_eq!(body.len(), 8 + offset_of!(Report, bitmap));
    assert_eq!(u32_at(&body, 0), 8 + 24 + 8);
    assert_eq!(u64_at(&body, 8 + offset_of!(Report, iova)), 0x1000);
    assert_eq!(u64_at(&body, 8 + offset_of!(Report, length)), 0x2000);
    assert_eq!(u64_at(&body, 8 + offset_of!(Report, page_size)), 4096);

    let body = bytes(|out| feature::encode_flags(MigrationFlags::ALL, out));
    assert_eq!((u32_at(&body, 0), u32_at(&body, 4), u64_at(&body, 8)), (16, 1 | 1 << 16, 7));
    let body = bytes(|out| feature::encode_data_size(99, out));
    assert_eq!((u32_at(&body, 0), u32_at(&body, 4), u64_at(&body, 8)), (16, 9 | 1 << 16, 99));
}

#[test]
fn state_data() {
    let body = bytes(|out| MigData::encode_reply(&[1, 2], 4, true, out));
    assert_eq!((u32_at(&body, 0), u32_at(&body, 4)), (10, 2));
    assert_eq!(body[8..], [1, 2, 0, 0]);
}
