use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::thread;

const PAGE: u64 = MIN_PAGE_SIZE;

fn bitmap(pages: u64) -> DirtyBitmap {
    DirtyBitmap::create(Layout::new(PAGE, pages * PAGE).unwrap()).unwrap()
}

/// The same memory, mapped once more, as the other process has it.
fn other_end(bitmap: &DirtyBitmap) -> DirtyBitmap {
    let fd = bitmap.as_fd().try_clone_to_owned().unwrap();
    DirtyBitmap::from_fd(fd, bitmap.layout()).unwrap()
}

fn taken(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
    let mut bits = vec![0; bitmap.layout().words()];
    bitmap.take(&mut bits);
    set_bits(&bits)
}

fn set_bits(bits: &[u64]) -> BTreeSet<u64> {
    let of_word = |(word, bits): (usize, &u64)| {
        let bits = *bits;
        (0..64).filter(move |bit| bits & (1 << bit) != 0).map(move |bit| word as u64 * 64 + bit)
    };
    bits.iter().enumerate().flat_map(of_word).collect()
}

#[test]
fn what_is_marked_is_taken_once() {
    let marks = bitmap(100);
    let reader = other_end(&marks);
    marks.mark(3 * PAGE + 17, 1);
    marks.mark(63 * PAGE, 2 * PAGE);
    marks.mark(0, 0);
    assert_eq!(taken(&reader), BTreeSet::from([3, 63, 64]));
    assert_eq!(taken(&reader), BTreeSet::new());
}

#[test]
fn nothing_is_marked_behind_the_last_page() {
    let layout = Layout::new(PAGE, 65 * PAGE + 1).unwrap();
    assert_eq!((layout.pages(), layout.words()), (66, 2));
    let marks = DirtyBitmap::create(layout).unwrap();
    marks.mark(65 * PAGE, u64::MAX);
    marks.mark(66 * PAGE, PAGE);
    marks.mark(u64::MAX, 1);
    assert_eq!(taken(&marks), BTreeSet::from([65]));
    marks.mark_all();
    assert_eq!(taken(&marks), (0..66).collect());
}

#[test]
fn sizes_are_bounded() {
    for page_size in [0, 1, 2048, 4095, 6144, MAX_PAGE_SIZE * 2] {
        let error = Layout::new(page_size, PAGE).unwrap_err();
        assert_eq!(error, LayoutError::PageSize(page_size));
    }
    for size in [0, MAX_TRACKED + 1, u64::MAX] {
        assert_eq!(Layout::new(PAGE, size), Err(LayoutError::Size(size)));
    }
    let largest = Layout::new(PAGE, MAX_TRACKED).unwrap();
    assert_eq!(largest.file_size(), (MAX_TRACKED >> 15) + (MAX_TRACKED >> 30) / 8 * 8);
    // One page of RAM: a page of summary, a page of marks.
    assert_eq!(Layout::new(MAX_PAGE_SIZE, 1).unwrap().file_size(), 2 * CHUNK);
}

#[test]
fn a_file_that_is_none_is_refused() {
    let layout = Layout::new(PAGE, 1 << 30).unwrap();
    let short = sealed::create("short", layout.file_size() - CHUNK).unwrap();
    let error = DirtyBitmap::from_fd(short, layout).unwrap_err();
    assert!(matches!(error, DirtyBitmapError::File(SealedError::WrongSize { .. })), "{error}");
    let file = tempfile::tempfile().unwrap();
    file.set_len(layout.file_size()).unwrap();
    let error = DirtyBitmap::from_fd(file.into(), layout).unwrap_err();
    assert!(matches!(error, DirtyBitmapError::File(SealedError::NotSealed)), "{error}");
}

/// A process that does not keep to the layout spoils its own marks and nothing else.
#[test]
fn whatever_is_in_the_memory_only_pages_come_out() {
    let marks = bitmap(100);
    for offset in (0..marks.layout().file_size()).step_by(8) {
        marks.word(offset).store(u64::MAX, Ordering::SeqCst);
    }
    assert_eq!(taken(&marks), (0..100).collect());
    // Marks without their bit in the summary are not seen.
    marks.marks(0).store(u64::MAX, Ordering::SeqCst);
    assert_eq!(taken(&marks), BTreeSet::new());
}

proptest! {
    /// Ranges anywhere, in bitmaps of some words to several chunks.
    #[test]
    fn marks_are_the_pages_that_a_range_touches(
        pages in prop_oneof![1..200_u64, 60_000..140_000_u64],
        shift in 0..4_u32,
        ranges in vec((any::<u64>(), 0..40_000_u64, any::<u16>()), 0..8),
    ) {
        let page_size = PAGE << shift;
        let layout = Layout::new(page_size, pages * page_size).unwrap();
        let marks = DirtyBitmap::create(layout).unwrap();
        let mut expected = BTreeSet::new();
        for (at, count, odd) in ranges {
            let (offset, len) = (at % (pages * page_size), count * page_size / 3 + u64::from(odd));
            marks.mark(offset, len);
            if len > 0 {
                expected.extend(offset / page_size..=((offset + len - 1) / page_size).min(pages - 1));
            }
        }
        prop_assert_eq!(taken(&marks), expected);
        prop_assert_eq!(taken(&marks), BTreeSet::new());
    }
}

/// Threads write into pages and mark them; a reader takes the marks and copies what is marked, over
/// and over. At the end the copy is the same, though nobody ever waited for anybody.
#[test]
fn a_copy_that_follows_the_marks_becomes_the_same() {
    const PAGES: u64 = 2 * CHUNK_PAGES + 100;
    const WRITERS: u64 = 4;
    const WRITES: u64 = 20_000;
    let bitmap = bitmap(PAGES);
    let reader = other_end(&bitmap);
    // What is "in" each page.
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; memory.len()];
    let over = AtomicBool::new(false);
    let mut rounds = 0;
    let mut bits = vec![0; bitmap.layout().words()];
    let mut collect = |copy: &mut Vec<u64>| {
        bits.fill(0);
        reader.take(&mut bits);
        for page in set_bits(&bits) {
            let page = usize::try_from(page).unwrap();
            copy[page] = memory[page].load(Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (bitmap, memory) = (&bitmap, &memory);
                scope.spawn(move || {
                    let mut random = writer + 1;
                    for number in 1..=WRITES {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        // Half of them crowd in a few words.
                        let span = if random >> 63 == 0 { 128 } else { PAGES };
                        let page = (random >> 20) % span;
                        let at = usize::try_from(page).unwrap();
                        memory[at].store(number << 8 | writer, Ordering::Relaxed);
                        bitmap.mark(page * PAGE, 8);
                    }
                })
            })
            .collect();
        let over = &over;
        scope.spawn(move || {
            for writer in writers {
                writer.join().unwrap();
            }
            over.store(true, Ordering::SeqCst);
        });
        while !over.load(Ordering::SeqCst) {
            collect(&mut copy);
            rounds += 1;
        }
    });
    collect(&mut copy);
    let memory: Vec<_> = memory.iter().map(|page| page.load(Ordering::Relaxed)).collect();
    assert!(copy == memory, "after {rounds} rounds");
    assert!(rounds > 0);
}
