use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::fs::File;

const PAGE: u64 = 4096;
const DISK: ParticipantId = ParticipantId(1);
const NIC: ParticipantId = ParticipantId(2);

fn file(pages: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages * PAGE).unwrap();
    file
}

/// Two devices that can be relied on, and their bitmaps for one file.
fn two(ram: &File) -> (Registry, [Arc<DirtyBitmap>; 2]) {
    let registry = Registry::new(DirtyOptions::new(PAGE));
    registry.add_file(ram).unwrap();
    let (of, _) = identity(ram).unwrap();
    let bitmaps = [(DISK, "disk"), (NIC, "nic")].map(|(id, name)| {
        registry.add_device(id, name, true);
        let bitmap = registry.add_bitmap(id, of).unwrap();
        registry.relied_on(id);
        bitmap
    });
    (registry, bitmaps)
}

fn pages(report: &DirtyReport) -> Vec<u64> {
    let [file] = &report.files[..] else { panic!("{report:?}") };
    (0..file.size.div_ceil(PAGE)).filter(|&page| file.is_dirty(page)).collect()
}

#[test]
fn marks_of_all_devices_are_told_once() {
    let ram = file(70);
    let (registry, [disk, nic]) = two(&ram);
    disk.mark(0, PAGE + 1);
    nic.mark(PAGE, PAGE);
    nic.mark(69 * PAGE, 1);
    let report = registry.collect().unwrap();
    assert_eq!((pages(&report), report.dirty_pages()), (vec![0, 1, 69], 3));
    assert_eq!(report.presumed, Vec::<String>::new());
    assert_eq!(report.of(&ram).unwrap(), report.files.first());
    assert_eq!(report.of(file(1)).unwrap(), None);
    assert_eq!(registry.collect().unwrap().dirty_pages(), 0);
}

#[test]
fn a_file_that_is_declared_again_has_the_same_bitmap() {
    let ram = file(70);
    let (registry, [disk, nic]) = two(&ram);
    let (of, _) = identity(&ram).unwrap();
    let again = [DISK, NIC].map(|id| registry.add_bitmap(id, of).unwrap());
    assert!(Arc::ptr_eq(&again[0], &disk) && Arc::ptr_eq(&again[1], &nic));
    disk.mark(3 * PAGE, 1);
    assert_eq!(pages(&registry.collect().unwrap()), [3]);
}

#[test]
fn a_fork_takes_no_marks_away() {
    let ram = file(70);
    let (mut registry, [disk, _]) = two(&ram);
    disk.mark(3 * PAGE, 1);
    registry.process = std::os::unix::process::parent_id();
    assert!(matches!(registry.collect(), Err(DirtyError::Ended)));
    registry.process = std::process::id();
    assert_eq!(pages(&registry.collect().unwrap()), [3]);
}

#[test]
fn a_lost_device_may_have_written_everything_until_its_end_was_told() {
    let ram = file(70);
    let (registry, [disk, nic]) = two(&ram);
    let all = (0..70).collect::<Vec<_>>();
    registry.lost(DISK, false);
    for _ in 0..2 {
        let report = registry.collect().unwrap();
        assert_eq!((pages(&report), &report.presumed[..]), (all.clone(), &["disk".to_owned()][..]));
    }
    disk.mark(0, 1);
    registry.gone(DISK, false);
    assert_eq!(pages(&registry.collect().unwrap()), all, "what it wrote last");
    nic.mark(5 * PAGE, 1);
    assert_eq!(pages(&registry.collect().unwrap()), [5], "what the others write");
}

#[test]
fn one_that_stood_still_has_complete_marks() {
    let ram = file(70);
    for in_order in [false, true] {
        let (registry, [disk, _nic]) = two(&ram);
        disk.mark(3 * PAGE, 1);
        if !in_order {
            registry.lost(DISK, true);
        }
        registry.gone(DISK, in_order);
        let report = registry.collect().unwrap();
        assert_eq!((pages(&report), report.presumed.len()), (vec![3], 0));
        disk.mark(4 * PAGE, 1);
        assert_eq!(registry.collect().unwrap().dirty_pages(), 0, "nobody looks there any more");
    }
}

#[test]
fn one_that_joins_may_have_written_everything_until_it_marks() {
    let ram = file(70);
    let (registry, _) = two(&ram);
    let gpu = ParticipantId(3);
    registry.add_device(gpu, "gpu", true);
    assert_eq!(registry.collect().unwrap().presumed, ["gpu"]);
    let bitmap = registry.add_bitmap(gpu, identity(&ram).unwrap().0).unwrap();
    assert_eq!(registry.collect().unwrap().presumed, ["gpu"]);
    bitmap.mark(9 * PAGE, 1);
    registry.relied_on(gpu);
    assert_eq!(pages(&registry.collect().unwrap()), [9]);
    // A device that is lost cannot be relied on again, whatever still comes of it.
    registry.lost(gpu, false);
    registry.relied_on(gpu);
    assert_eq!(registry.collect().unwrap().presumed, ["gpu"]);
}

#[test]
fn one_that_cannot_tell_may_have_written_everything_each_time() {
    let (registry, _) = two(&file(70));
    let gpu = ParticipantId(3);
    registry.add_device(gpu, "gpu", false);
    registry.relied_on(gpu);
    for _ in 0..2 {
        assert_eq!(registry.collect().unwrap().presumed, ["gpu"]);
    }
    registry.gone(gpu, true);
    assert_eq!(registry.collect().unwrap().presumed, ["gpu"]);
    assert_eq!(registry.collect().unwrap().dirty_pages(), 0);
}

#[test]
fn nothing_is_taken_when_a_file_has_another_size() {
    let ram = file(70);
    let (registry, [disk, _]) = two(&ram);
    disk.mark(0, 1);
    ram.set_len(71 * PAGE).unwrap();
    let error = registry.collect().unwrap_err();
    assert!(matches!(error, DirtyError::Resized { .. }), "{error}");
    ram.set_len(70 * PAGE).unwrap();
    assert_eq!(pages(&registry.collect().unwrap()), [0]);
}

#[test]
fn when_it_has_ended_it_says_how() {
    let (registry, _) = two(&file(1));
    registry.superseded(Term(7));
    registry.end();
    assert!(matches!(registry.collect(), Err(DirtyError::Superseded(Term(7)))));
    let (registry, _) = two(&file(1));
    registry.end();
    assert!(matches!(registry.collect(), Err(DirtyError::Ended)));
}

proptest! {
    #[test]
    fn ranges_are_the_dirty_pages(
        bits in vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 1..5),
        cut in 0..64_u64,
        odd in 1..=PAGE,
    ) {
        let pages = bits.len() as u64 * 64 - cut;
        let size = (pages - 1) * PAGE + odd;
        let mut bitmap = bits;
        if let Some(last) = bitmap.last_mut() {
            *last &= u64::MAX >> cut;
        }
        let file = FileIdentity { device: 0, inode: 0 };
        let dirty = DirtyFile { file, page_size: PAGE, size, bitmap };
        let ranges: Vec<_> = dirty.ranges().collect();
        for pair in ranges.windows(2) {
            prop_assert!(pair[0].end < pair[1].start);
        }
        for page in 0..pages {
            let (first, last) = (page * PAGE, ((page + 1) * PAGE).min(size) - 1);
            let inside = |at| ranges.iter().any(|range| range.contains(&at));
            prop_assert_eq!(inside(first), dirty.is_dirty(page));
            prop_assert_eq!(inside(last), dirty.is_dirty(page));
        }
        prop_assert!(ranges.last().is_none_or(|range| range.end <= size));
    }
}
