//! Writes that are tracked.

use super::*;
use proptest::collection::vec;
use standstill_protocol::sealed;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// A new bitmap for a file, as a coordinator makes it.
fn bitmap(size: u64) -> OwnedFd {
    let bitmap = DirtyBitmap::create(Layout::new(PAGE, size).expect("layout")).expect("bitmap");
    again(&bitmap)
}

fn track(map: &MemoryMap, ram: &SharedMemory) -> Tracked {
    map.track_ram(again(ram), bitmap(ram.size()), PAGE).expect("tracked")
}

fn marked(tracked: &Tracked) -> BTreeSet<u64> {
    let mut bits = vec![0; tracked.bitmap.layout().words()];
    tracked.bitmap.take(&mut bits);
    let is_set =
        |page: &u64| bits[usize::try_from(page / 64).expect("small")] >> (page % 64) & 1 == 1;
    (0..tracked.bitmap.layout().pages()).filter(is_set).collect()
}

#[test]
fn a_transaction_marks_what_it_writes_when_it_ends() {
    let (map, ram, _peer) = machine();
    let tracked = track(&map, &ram);
    let dma = map.dma();
    let spans = [Span::read(0x10000, 8), Span::write(0x10FF8, 0x10), Span::write(0x20000, 8)];
    let access = dma.access(&spans).expect("access");
    access.write(1, 0, &[1; 16]).expect("written");
    assert_eq!(marked(&tracked), BTreeSet::new(), "it may still write");
    drop(access);
    assert_eq!(marked(&tracked), BTreeSet::from([0, 1]));
    drop(dma.access(&[Span::read(0x10000, PAGE)]).expect("access"));
    assert_eq!(marked(&tracked), BTreeSet::new());
    drop(dma.access(&[Span::read_write(0x13000, 1)]).expect("access"));
    assert_eq!(marked(&tracked), BTreeSet::from([3]));
    map.untrack(&tracked);
    drop(dma.access(&[Span::write(0x13000, 1)]).expect("access"));
    assert_eq!(marked(&tracked), BTreeSet::new());
}

#[test]
fn every_span_counts_however_many_there_are() {
    let map = empty();
    let ram = SharedMemory::create("ram", 64 * PAGE).expect("ram");
    map.map(window(0, 64 * PAGE), Some(again(&ram))).expect("mapped");
    map.declare_ram(again(&ram)).expect("declared");
    let tracked = track(&map, &ram);
    let spans: Vec<_> = (0..32).map(|page| Span::write(page * 2 * PAGE, 1)).collect();
    drop(map.dma().access(&spans).expect("access"));
    assert_eq!(marked(&tracked), (0..32).map(|page| page * 2).collect());
}

#[test]
fn windows_onto_parts_mark_where_they_lie_in_the_file() {
    let map = empty();
    let ram = SharedMemory::create("ram", 8 * PAGE).expect("ram");
    map.declare_ram(again(&ram)).expect("declared");
    let tracked = track(&map, &ram);
    // Mapped later, and twice.
    let part = WindowSpec { offset: 5 * PAGE, ..window(0x1000, 2 * PAGE) };
    map.map(part, Some(again(&ram))).expect("mapped");
    map.map(WindowSpec { offset: 2 * PAGE, ..window(0x9000, PAGE) }, Some(again(&ram)))
        .expect("mapped");
    drop(map.dma().access(&[Span::write(0x2000, 8), Span::write(0x9000, 8)]).expect("access"));
    assert_eq!(marked(&tracked), BTreeSet::from([2, 6]));
}

#[test]
fn several_readers_have_marks_of_their_own() {
    let (map, ram, _peer) = machine();
    let (one, other) = (track(&map, &ram), track(&map, &ram));
    let dma = map.dma();
    drop(dma.access(&[Span::write(0x10000, 1)]).expect("access"));
    assert_eq!(marked(&one), BTreeSet::from([0]));
    map.untrack(&one);
    drop(dma.access(&[Span::write(0x11000, 1)]).expect("access"));
    assert_eq!(marked(&one), BTreeSet::new());
    assert_eq!(marked(&other), BTreeSet::from([0, 1]));
}

#[test]
fn what_was_written_before_the_file_was_known_to_be_ram_is_marked() {
    let ram = SharedMemory::create("ram", 8 * PAGE).expect("ram");
    let map = empty();
    let part = WindowSpec { offset: 2 * PAGE, ..window(0x1000, 2 * PAGE) };
    map.map(part, Some(again(&ram))).expect("mapped");
    map.map(WindowSpec { writable: false, ..window(0x9000, PAGE) }, Some(again(&ram)))
        .expect("mapped for reading");
    assert_eq!(marked(&track(&map, &ram)), BTreeSet::from([2, 3]), "what is mapped for writing");
    assert_eq!(marked(&track(&map, &ram)), BTreeSet::new(), "it was RAM before");

    // Nobody knows any more where the window was.
    let map = empty();
    map.map(part, Some(again(&ram))).expect("mapped");
    map.unmap(0x1000, 2 * PAGE, SHORT).expect("unmapped");
    assert_eq!(marked(&track(&map, &ram)), (0..8).collect());
}

#[test]
fn a_bitmap_that_is_none_is_refused_and_nothing_is_declared() {
    let map = empty();
    let ram = SharedMemory::create("ram", 64 << 20).expect("ram");
    map.map(window(0, 64 << 20), Some(again(&ram))).expect("mapped");
    let refused = |bitmap: OwnedFd, page_size| {
        let error = map.track_ram(again(&ram), bitmap, page_size).expect_err("refused");
        assert_eq!(map.dma().classify(0, 1), Some(WindowClass::Peer));
        error
    };
    let size = Layout::new(PAGE, 64 << 20).expect("layout").file_size();
    assert!(matches!(refused(memfd(size), PAGE), DeclareError::Bitmap(_)), "not sealed");
    for wrong in [size - PAGE, size + PAGE] {
        let wrong = sealed::create("wrong", wrong).expect("memfd");
        assert!(matches!(refused(wrong, PAGE), DeclareError::Bitmap(_)), "wrong size");
    }
    assert!(matches!(refused(bitmap(64 << 20), 1000), DeclareError::Layout(_)));
}

proptest! {
    #[test]
    fn marks_are_the_pages_of_all_spans_that_are_written(
        transactions in vec(vec((0..32 * PAGE - 1, 1..9 * PAGE, 0..3_u8), 1..8), 1..8),
    ) {
        let map = empty();
        let ram = SharedMemory::create("ram", 32 * PAGE).expect("ram");
        map.declare_ram(again(&ram)).expect("declared");
        map.map(window(0, 32 * PAGE), Some(again(&ram))).expect("mapped");
        let tracked = track(&map, &ram);
        let dma = map.dma();
        for spans in transactions {
            let mut expected = BTreeSet::new();
            let spans: Vec<_> = spans
                .into_iter()
                .map(|(iova, len, kind)| {
                    let len = len.min(32 * PAGE - iova);
                    if kind > 0 {
                        expected.extend(iova / PAGE..=(iova + len - 1) / PAGE);
                    }
                    match kind {
                        0 => Span::read(iova, len),
                        1 => Span::write(iova, len),
                        _ => Span::read_write(iova, len),
                    }
                })
                .collect();
            drop(dma.access(&spans).expect("access"));
            prop_assert_eq!(marked(&tracked), expected);
        }
    }
}

/// Two threads write all the time; tracking is switched on under them, and a copy that is made after
/// that follows the marks. When the gate has closed, the copy is the same.
#[test]
fn a_copy_that_follows_the_marks_is_the_same_when_the_gate_has_closed() {
    const PAGES: u64 = 64;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime");
    let map = empty();
    let ram = SharedMemory::create("ram", PAGES * PAGE).expect("ram");
    map.declare_ram(again(&ram)).expect("declared");
    map.map(window(0, PAGES * PAGE), Some(again(&ram))).expect("mapped");
    let done = AtomicBool::new(false);
    let page = |page: u64| {
        let mut bytes = vec![0; usize::try_from(PAGE).expect("small")];
        ram.read(page * PAGE, &mut bytes).expect("inside");
        bytes
    };
    thread::scope(|scope| {
        for seed in 1..3_u64 {
            let (dma, done) = (map.dma(), &done);
            scope.spawn(move || {
                let mut random = seed;
                while !done.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = (random >> 20) % (PAGES * PAGE - 8);
                    let Ok(access) = dma.try_access(&[Span::write(at, 8)]) else { continue };
                    access.write(0, 0, &random.to_le_bytes()).expect("inside");
                }
            });
        }
        for round in 0..20 {
            let tracked = track(&map, &ram);
            let passed = async { tokio::time::timeout(LONG, map.gate().passed()).await };
            runtime.block_on(passed).expect("all pass");
            let mut copy: Vec<_> = (0..PAGES).map(page).collect();
            for _ in 0..20 {
                for dirty in marked(&tracked) {
                    copy[usize::try_from(dirty).expect("small")] = page(dirty);
                }
            }
            runtime.block_on(map.gate().close(Scope::All, LONG)).expect("closed");
            for dirty in marked(&tracked) {
                copy[usize::try_from(dirty).expect("small")] = page(dirty);
            }
            let same = (0..PAGES).map(page).eq(copy.iter().cloned());
            map.untrack(&tracked);
            map.gate().open(Scope::All);
            if !same {
                done.store(true, Ordering::Relaxed);
            }
            assert!(same, "round {round}");
        }
        done.store(true, Ordering::Relaxed);
    });
}
