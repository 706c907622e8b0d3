//! Capabilities, as a driver finds them, and each bit of them.

use super::*;

fn word(space: &ConfigSpace, offset: u64) -> u16 {
    let mut data = [0; 2];
    space.read(offset, &mut data).unwrap();
    u16::from_le_bytes(data)
}

fn byte(space: &ConfigSpace, offset: u64) -> u8 {
    let mut data = [0];
    space.read(offset, &mut data).unwrap();
    data[0]
}

/// Follows the list as a driver does: identifier and offset of each capability.
fn walk(space: &ConfigSpace) -> Vec<(u8, u64)> {
    let has_list = word(space, 0x06) & 0x10 != 0;
    let mut next = byte(space, 0x34);
    assert_eq!(has_list, next != 0, "the status says whether there is a list");
    let mut found = Vec::new();
    while next != 0 {
        let at = u64::from(next);
        assert!(at >= 0x40 && at % 4 == 0, "a capability at {at:#x}");
        assert!(found.len() < 48, "the list has no end");
        found.push((byte(space, at), at));
        next = byte(space, at + 1);
    }
    // None reaches into another, or beyond the 256 bytes that a driver can follow.
    let size = |id| match id {
        0x01 => 8,
        0x05 => 24,
        0x10 => 60,
        0x11 => 12,
        other => panic!("capability {other:#x}"),
    };
    let mut sorted = found.clone();
    sorted.sort_by_key(|(_, at)| *at);
    let ends = sorted.iter().map(|(id, at)| at + size(*id));
    for (end, begin) in ends.zip(sorted.iter().skip(1).map(|(_, at)| *at).chain([0x100])) {
        assert!(end <= begin, "a capability reaches beyond {begin:#x}");
    }
    found
}

fn everything() -> DeviceInfo {
    let bars = [
        registers(0x1_0000),
        None,
        Some(Bar { size: 1 << 20, backing: memory() }),
        None,
        None,
        None,
    ];
    info(bars, 65).msi_vectors(8).express()
}

#[test]
fn the_list_has_what_the_device_asks_for() {
    let plain = || info([None, None, None, None, None, None], 0);
    let (pm, msi, msix, express) = (0x01, 0x05, 0x11, 0x10);
    let with_msix = || DeviceInfo { msix_vectors: 3, ..plain() };
    let rows = [
        (plain(), vec![]),
        (with_msix(), vec![(msix, 0x40)]),
        (plain().power_management(), vec![(pm, 0x40)]),
        (plain().msi_vectors(1), vec![(msi, 0x40)]),
        (with_msix().msi_vectors(32), vec![(msi, 0x40), (msix, 0x58)]),
        (plain().express(), vec![(pm, 0x40), (express, 0x48)]),
        (everything(), vec![(pm, 0x40), (msi, 0x48), (msix, 0x60), (express, 0x6c)]),
    ];
    for (info, expected) in rows {
        let (layout, space) = build_from(&info);
        assert_eq!(walk(&space), expected);
        assert_eq!(space.bytes().len(), if info.express { 4096 } else { 256 });
        assert_eq!(layout.power_management, expected.iter().any(|(id, _)| *id == pm));
    }
}

#[test]
fn numbers_of_msi_vectors_that_msi_has_not_are_refused() {
    for vectors in [3, 5, 31, 33, 64, u16::MAX] {
        let odd = info([None, None, None, None, None, None], 0).msi_vectors(vectors);
        assert_eq!(PciLayout::new(&odd), Err(PciError::MsiVectors(vectors)));
    }
    for (log2, vectors) in (0..).zip([1_u16, 2, 4, 8, 16, 32]) {
        let info = info([None, None, None, None, None, None], 0).msi_vectors(vectors);
        let (layout, mut space) = build_from(&info);
        assert_eq!(layout.irqs, IrqCounts { intx: 1, msi: vectors, msix: 0 });
        assert_eq!(word(&space, 0x42), 0x0180 | log2 << 1);
        space.write(0x50, &[0xff; 4]).unwrap();
        assert_eq!(dword(&space, 0x50).count_ones(), u32::from(vectors), "one mask bit each");
    }
}

/// The whole of a configuration space: offset, width in bytes, value at power-on, writable bits, as
/// the specifications have it. What is not here is 0 and cannot be written.
const REGISTERS: &[(u64, usize, u32, u32)] = &[
    (0x00, 2, 0x1234, 0),
    (0x02, 2, 0x5678, 0),
    // Memory space, bus master, parity error response, SERR enable, interrupt disable.
    (0x04, 2, 0, 0x0546),
    // Capabilities list.
    (0x06, 2, 0x0010, 0),
    (0x08, 4, 0x0880_0107, 0),
    (0x0c, 1, 0, 0xff),
    // A 32-bit BAR of 64 KiB that is not prefetchable.
    (0x10, 4, 0, 0xffff_0000),
    // A prefetchable 64-bit BAR of 1 MiB.
    (0x18, 4, 0xc, 0xfff0_0000),
    (0x1c, 4, 0, 0xffff_ffff),
    // The MSI-X table, a 32-bit BAR of 4 KiB; the ROM's BAR at 0x30 is absent.
    (0x24, 4, 0, 0xffff_f000),
    (0x2c, 2, 0x9abc, 0),
    (0x2e, 2, 0xdef0, 0),
    (0x34, 1, 0x40, 0),
    (0x3c, 1, 0, 0xff),
    (0x3d, 1, 1, 0),
    // Power management: capabilities (version 3), control and status (no soft reset).
    (0x40, 2, 0x4801, 0),
    (0x42, 2, 0x0003, 0),
    (0x44, 2, 0x0008, 0x0003),
    // MSI: control (8 vectors, 64-bit, maskable), address, data, mask, pending.
    (0x48, 2, 0x6005, 0),
    (0x4a, 2, 0x0186, 0x0071),
    (0x4c, 4, 0, 0xffff_fffc),
    (0x50, 4, 0, 0xffff_ffff),
    (0x54, 2, 0, 0xffff),
    (0x58, 4, 0, 0x0000_00ff),
    (0x5c, 4, 0, 0),
    // MSI-X: control (65 vectors), table and pending bits in BAR 5.
    (0x60, 2, 0x6c11, 0),
    (0x62, 2, 64, 0xc000),
    (0x64, 4, 5, 0),
    (0x68, 4, 0x0415, 0),
    // PCI Express: version 2, endpoint.
    (0x6c, 2, 0x0010, 0),
    (0x6e, 2, 0x0002, 0),
    // Device: role-based error reporting; control: relaxed ordering, no snoop, 512 bytes; status.
    (0x70, 4, 0x0000_8000, 0),
    (0x74, 2, 0x2810, 0x781f),
    (0x76, 2, 0, 0),
    // Link: 2.5 GT/s, x1, ASPM optionality; control: ASPM, common clock, extended synch; status.
    (0x78, 4, 0x0040_0011, 0),
    (0x7c, 2, 0, 0x00c3),
    (0x7e, 2, 0x0011, 0),
    // Device 2: completion timeout disable; control; link 2: speeds; control: target speed.
    (0x90, 4, 0x0000_0010, 0),
    (0x94, 2, 0, 0x0010),
    (0x98, 4, 0x0000_0002, 0),
    (0x9c, 2, 0x0001, 0),
];

#[test]
fn each_bit_is_as_the_specifications_say() {
    let (_, mut space) = build_from(&everything());
    let mut power_on = vec![0; 4096];
    let mut writable = vec![0; 4096];
    for (offset, width, value, mask) in REGISTERS {
        let at = usize::try_from(*offset).unwrap();
        power_on[at..at + width].copy_from_slice(&value.to_le_bytes()[..*width]);
        writable[at..at + width].copy_from_slice(&mask.to_le_bytes()[..*width]);
    }
    let differs = |space: &ConfigSpace, expected: &[u8]| {
        let both = space.bytes().iter().zip(expected).enumerate();
        let differing = both.filter(|(_, (is, expected))| is != expected);
        differing.map(|(at, (is, to_be))| (at, *is, *to_be)).collect::<Vec<_>>()
    };
    assert_eq!(differs(&space, &power_on), [], "at power-on");
    space.write(0, &[0xff; 4096]).unwrap();
    let ones: Vec<u8> = power_on.iter().zip(&writable).map(|(is, mask)| is | mask).collect();
    assert_eq!(differs(&space, &ones), [], "all ones were written");
    space.write(0, &[0; 4096]).unwrap();
    let zeros: Vec<u8> = power_on.iter().zip(&writable).map(|(is, mask)| is & !mask).collect();
    assert_eq!(differs(&space, &zeros), [], "all zeros were written");
    space.write(0, &power_on).unwrap();
    assert_eq!(differs(&space, &power_on), [], "what it had was written");
    // Bytes one at a time do the same as all of them at once.
    for at in 0..4096 {
        space.write(at, &[0xff]).unwrap();
    }
    assert_eq!(differs(&space, &ones), [], "byte by byte");
    assert!(space.write(4096, &[0]).is_err() && space.read(4095, &mut [0; 2]).is_err());
}

#[test]
fn power_states_that_do_not_exist_are_not_entered() {
    let info = info([None, None, None, None, None, None], 0).power_management();
    let (_, mut space) = build_from(&info);
    for (written, state) in [(3, 3), (1, 3), (2, 3), (0, 0), (2, 0), (1, 0), (3, 3)] {
        space.write(0x44, &[written]).unwrap();
        assert_eq!(byte(&space, 0x44), 0x08 | state, "after a write of {written}");
    }
    // Nor are they taken over from somebody else.
    let (_, mut other) = build_from(&info);
    let mut saved = space.bytes().to_vec();
    other.restore(&saved).unwrap();
    saved[0x44] = 0x08 | 1;
    let foreign = ForeignConfig::Byte { offset: 0x44, saved: 0x09, own: 0x0b };
    assert_eq!(other.restore(&saved), Err(foreign));
}

#[test]
fn without_intx_there_is_no_pin_and_nothing_to_disable() {
    let info = info([registers(4096), None, None, None, None, None], 1).without_intx();
    let (layout, mut space) = build_from(&info);
    assert_eq!(layout.irqs, IrqCounts { intx: 0, msi: 0, msix: 1 });
    space.write(0, &[0xff; 256]).unwrap();
    assert_eq!(word(&space, 0x04), 0x0146);
    assert_eq!(word(&space, 0x3c), 0);
}

#[test]
fn there_is_no_expansion_rom() {
    let (_, mut space) = build_from(&everything());
    space.write(0x30, &0xffff_f800_u32.to_le_bytes()).unwrap();
    assert_eq!(dword(&space, 0x30), 0);
}

#[test]
fn memory_of_an_endpoint_takes_two_indexes() {
    let one = || Some(Bar { size: 4096, backing: memory() });
    let conventional = |bars| PciLayout::new(&info(bars, 0)).unwrap();
    let endpoint = |bars| PciLayout::new(&info(bars, 0).express());
    assert!(!conventional([one(), one(), None, None, None, None]).bars[0].is_64bit);
    let taken = endpoint([one(), one(), None, None, None, None]);
    assert_eq!(taken, Err(PciError::NoUpperHalf { bar: 0 }));
    let layout = endpoint([one(), None, registers(4096), registers(4096), one(), None]).unwrap();
    assert_eq!(layout.bars.map(|bar| bar.is_64bit), [true, false, false, false, true, false]);
    let small = info([one(), None, one(), None, one(), None], 1).express();
    assert_eq!(PciLayout::new(&small), Err(PciError::NoMsixBar));
}

proptest! {
    /// Whatever is written: what a client has made of it is taken over, and the list stays whole.
    #[test]
    fn any_writes_can_be_saved_and_restored(
        writes in prop::collection::vec((0u64..4096, prop::collection::vec(any::<u8>(), 0..64)), 0..40),
    ) {
        let (_, mut space) = build_from(&everything());
        let list = walk(&space);
        for (offset, data) in writes {
            let _ = space.write(offset, &data);
        }
        prop_assert_eq!(walk(&space), list);
        let (_, mut other) = build_from(&everything());
        other.restore(space.bytes()).unwrap();
        prop_assert_eq!(other.bytes(), space.bytes());
    }
}
