mod capabilities;

use super::*;
use crate::device::{Bar, PciIdentity};
use proptest::prelude::*;
use std::os::fd::OwnedFd;

fn memory() -> BarBacking {
    let fd: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    BarBacking::Memory(fd)
}

fn info(bars: [Option<Bar>; 6], msix_vectors: u16) -> DeviceInfo {
    let pci = PciIdentity {
        vendor: 0x1234,
        device: 0x5678,
        subsystem_vendor: 0x9abc,
        subsystem: 0xdef0,
        class: 0x08_80_01,
        revision: 7,
    };
    DeviceInfo { bars, msix_vectors, ..DeviceInfo::new("test", pci) }
}

fn registers(size: u64) -> Option<Bar> {
    Some(Bar { size, backing: BarBacking::Registers })
}

fn build(bars: [Option<Bar>; 6], vectors: u16) -> (PciLayout, ConfigSpace) {
    build_from(&info(bars, vectors))
}

fn build_from(info: &DeviceInfo) -> (PciLayout, ConfigSpace) {
    let layout = PciLayout::new(info).unwrap();
    let space = ConfigSpace::new(info, &layout).unwrap();
    (layout, space)
}

fn dword(space: &ConfigSpace, offset: u64) -> u32 {
    let mut data = [0; 4];
    space.read(offset, &mut data).unwrap();
    u32::from_le_bytes(data)
}

#[test]
fn identity_is_where_the_header_has_it() {
    let (_, space) = build([registers(4096), None, None, None, None, None], 0);
    assert_eq!(dword(&space, 0), 0x5678_1234);
    assert_eq!(dword(&space, 8), 0x0880_0107);
    assert_eq!(dword(&space, 0x2c), 0xdef0_9abc);
    assert_eq!(dword(&space, 0x3c), 0x0100);
    assert_eq!(dword(&space, 0x34), 0, "no capabilities without MSI-X");
    assert_eq!(dword(&space, 4) >> 16, 0);
}

#[test]
fn sizing_a_bar_reads_back_its_size_mask() {
    let bars = [
        registers(0x1_0000),
        None,
        Some(Bar { size: 1 << 20, backing: memory() }),
        None,
        None,
        None,
    ];
    let (_, mut space) = build(bars, 0);
    for bar in 0..6 {
        space.write(0x10 + 4 * bar, &[0xff; 4]).unwrap();
    }
    assert_eq!(dword(&space, 0x10), 0xffff_0000);
    assert_eq!(dword(&space, 0x14), 0);
    assert_eq!(dword(&space, 0x18), 0xfff0_0008);
    space.write(0x10, &0xfe12_3456_u32.to_le_bytes()).unwrap();
    assert_eq!(dword(&space, 0x10), 0xfe12_0000);
}

#[test]
fn a_bar_above_two_gib_takes_two_indexes() {
    let bars = [Some(Bar { size: 1 << 33, backing: memory() }), None, None, None, None, None];
    let (layout, mut space) = build(bars, 0);
    assert!(layout.bars[0].is_64bit);
    space.write(0x10, &[0xff; 8]).unwrap();
    assert_eq!(dword(&space, 0x10), 0x0000_000c);
    assert_eq!(dword(&space, 0x14), 0xffff_fffe);

    let bars =
        [Some(Bar { size: 1 << 33, backing: memory() }), registers(4096), None, None, None, None];
    assert_eq!(PciLayout::new(&info(bars, 0)), Err(PciError::NoUpperHalf { bar: 0 }));
    let bars = [None, None, None, None, None, Some(Bar { size: 1 << 33, backing: memory() })];
    assert_eq!(PciLayout::new(&info(bars, 0)), Err(PciError::NoUpperHalf { bar: 5 }));
}

#[test]
fn the_msix_table_gets_the_highest_free_bar() {
    let bars = [registers(4096), None, None, None, None, registers(4096)];
    let (layout, mut space) = build(bars, 65);
    let msix = layout.msix.unwrap();
    assert_eq!((msix.bar, msix.pending_offset), (4, 65 * 16));
    assert_eq!(layout.bars[4], BarLayout { usage: BarUse::Msix, size: 4096, is_64bit: false });
    assert_eq!(dword(&space, 0x34), 0x40);
    assert_eq!(dword(&space, 4) >> 16, 0x10);
    assert_eq!(dword(&space, 0x40), (64 << 16) | 0x11);
    assert_eq!(dword(&space, 0x44), 4);
    assert_eq!(dword(&space, 0x48), 65 * 16 + 4);
    space.write(0x42, &[0xff, 0xff]).unwrap();
    assert_eq!(dword(&space, 0x40) >> 16, 0xc000 | 64, "only enable and function mask");
}

#[test]
fn the_largest_msix_table_fits_its_bar() {
    let (layout, _) = build([None, None, None, None, None, None], 2048);
    let bar = layout.bars[5];
    assert_eq!(bar.usage, BarUse::Msix);
    assert_eq!(bar.size, 65536, "32 KiB of table and 256 bytes of pending bits");
}

#[test]
fn what_cannot_be_a_pci_device_is_refused() {
    let refused = |bars, vectors| PciLayout::new(&info(bars, vectors)).unwrap_err();
    let one = |size| [registers(size), None, None, None, None, None];
    assert_eq!(refused(one(0), 0), PciError::BarSize { bar: 0, size: 0 });
    assert_eq!(refused(one(2048), 0), PciError::BarSize { bar: 0, size: 2048 });
    assert_eq!(refused(one(12288), 0), PciError::BarSize { bar: 0, size: 12288 });
    assert_eq!(refused(one(1 << 63), 0), PciError::BarSize { bar: 0, size: 1 << 63 });
    assert_eq!(refused(one(4096), 2049), PciError::Vectors(2049));
    assert_eq!(refused([(); 6].map(|()| registers(4096)), 1), PciError::NoMsixBar);
    let mut odd = info(one(4096), 0);
    odd.pci.class = 0x0100_0000;
    let layout = PciLayout::new(&odd).unwrap();
    assert_eq!(ConfigSpace::new(&odd, &layout).unwrap_err(), PciError::Class(0x0100_0000));
}

#[test]
fn only_the_bits_that_exist_can_be_written() {
    let (_, mut space) = build([registers(4096), None, None, None, None, None], 1);
    let before = space.bytes().to_vec();
    space.write(0, &[0xff; CONFIG_SIZE]).unwrap();
    assert_eq!(space.bytes()[..4], before[..4]);
    assert_eq!(dword(&space, 4) & 0xffff, 0x0546);
    assert_eq!(dword(&space, 0x3c) & 0xffff, 0x01ff);
    space.write(0, &before).unwrap();
    assert_eq!(space.bytes(), before);
}

#[test]
fn restoring_takes_what_was_written_and_refuses_another_device() {
    let (_, mut saved) = build([registers(4096), None, None, None, None, None], 1);
    saved.write(4, &[6, 0]).unwrap();
    saved.write(0x10, &0xfe00_0000_u32.to_le_bytes()).unwrap();
    let (_, mut other) = build([registers(4096), None, None, None, None, None], 1);
    other.restore(saved.bytes()).unwrap();
    assert_eq!(other.bytes(), saved.bytes());

    let (_, mut different) = build([registers(4096), None, None, None, None, None], 2);
    let foreign = different.restore(saved.bytes()).unwrap_err();
    assert_eq!(foreign, ForeignConfig::Byte { offset: 0x42, saved: 0, own: 1 });
    let (_, mut narrow) = build([registers(8192), None, None, None, None, None], 1);
    let mut bytes = narrow.bytes().to_vec();
    bytes[0x11] = 0x10;
    assert!(narrow.restore(&bytes).is_err(), "an address below the BAR's size");
    let longer = narrow.restore(&[0; 4096]).unwrap_err();
    assert_eq!(longer, ForeignConfig::Size { saved: 4096, own: CONFIG_SIZE });
}

proptest! {
    #[test]
    fn no_access_panics_and_reads_follow_writes(
        accesses in prop::collection::vec((0u64..300, prop::collection::vec(any::<u8>(), 0..300), any::<bool>()), 0..32),
        far in any::<u64>(),
    ) {
        let (_, mut space) = build([registers(4096), None, registers(1 << 31), None, None, None], 33);
        let fixed = space.bytes().to_vec();
        for (offset, data, write) in accesses {
            let fits = usize::try_from(offset).unwrap() + data.len() <= CONFIG_SIZE;
            if write {
                prop_assert_eq!(space.write(offset, &data).is_ok(), fits);
            } else {
                let mut data = data;
                prop_assert_eq!(space.read(offset, &mut data).is_ok(), fits);
            }
        }
        prop_assert_eq!(&space.bytes()[..4], &fixed[..4]);
        let _ = space.read(far, &mut [0; 4]);
        let _ = space.write(far, &[0; 4]);
    }
}
