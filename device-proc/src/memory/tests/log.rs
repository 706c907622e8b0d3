//! The client's log of what is written.

use super::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

fn start(map: &MemoryMap, page_size: u64) {
    map.start_log(page_size, &[], LONG).expect("started");
}

/// One transaction that names a range to be written.
fn write(map: &MemoryMap, iova: u64, len: u64) {
    drop(map.dma().access(&[Span::write(iova, len)]).expect("access"));
}

/// The numbers of the bits that are set.
fn set(words: &[u64]) -> Vec<u64> {
    let is_set =
        |bit: &u64| words[usize::try_from(bit / 64).expect("small")] >> (bit % 64) & 1 == 1;
    (0..words.len() as u64 * 64).filter(is_set).collect()
}

fn report(map: &MemoryMap, iova: u64, length: u64, page_size: u64) -> Vec<u64> {
    let report = Report::new(iova, length, page_size).expect("acceptable");
    let words = map.report(&report).expect("started");
    assert_eq!(words.len() as u64 * 8, report.bytes());
    set(&words)
}

#[test]
fn what_a_transaction_wrote_is_reported_once() {
    let (map, _ram, _peer) = machine();
    write(&map, 0x10000, 8);
    start(&map, PAGE);
    assert_eq!(map.log_page_size(), Some(PAGE));
    assert!(report(&map, 0, 0x40000, PAGE).is_empty(), "it was written before the start");
    let dma = map.dma();
    let spans = [Span::read(0x10000, 8), Span::write(0x11ff8, 0x10), Span::write(0x20000, 8)];
    let access = dma.access(&spans).expect("access");
    assert!(report(&map, 0, 0x40000, PAGE).is_empty(), "it may still write");
    drop(access);
    assert_eq!(report(&map, 0x10000, 4 * PAGE, PAGE), [1, 2]);
    assert_eq!(report(&map, 0, 0x40000, PAGE), [0x20], "peers' memory, and the rest only once");
    map.stop_log();
    assert_eq!(map.log_page_size(), None);
    let range = Report::new(0, PAGE, PAGE).expect("acceptable");
    assert_eq!(map.report(&range), Err(LogError::NotStarted));
    write(&map, 0x10000, 8);
    start(&map, PAGE);
    assert!(report(&map, 0, 0x40000, PAGE).is_empty(), "what was set is forgotten");
}

#[test]
fn a_coarser_report_takes_bits_together_and_a_finer_one_repeats_them() {
    let map = empty();
    let ram = SharedMemory::create("ram", 1 << 22).expect("ram");
    map.map(window(0x40_0000, 1 << 22), Some(again(&ram))).expect("mapped");
    start(&map, 2 * PAGE);
    write(&map, 0x40_2000, 1);
    write(&map, 0x40_3000, 1);
    write(&map, 0x7f_ffff, 1);
    assert_eq!(report(&map, 0x40_0000, 1 << 22, 1 << 20), [0, 3]);
    write(&map, 0x40_3000, 1);
    write(&map, 0x7f_ffff, 1);
    let finer: Vec<u64> = report(&map, 0x40_0000, 1 << 22, PAGE);
    assert_eq!(finer, [2, 3, 1022, 1023], "more than 256 bits");
    // Every single one of them: the counters are large enough.
    write(&map, 0x40_0000, 1 << 22);
    assert_eq!(report(&map, 0x40_0000, 1 << 22, PAGE).len(), 1024);
    write(&map, 0x40_0000, 1 << 22);
    assert_eq!(report(&map, 0, u64::MAX, 1 << 63), [0], "one page for half of all there is");
}

#[test]
fn a_page_that_is_only_partly_in_the_range_stays_set() {
    let map = empty();
    let ram = SharedMemory::create("ram", 16 * PAGE).expect("ram");
    // It begins and ends in the middle of a page of the log.
    map.map(window(0x1000, 6 * PAGE), Some(again(&ram))).expect("mapped");
    start(&map, 4 * PAGE);
    write(&map, 0x2000, 1);
    write(&map, 0x5000, 1);
    assert_eq!(report(&map, 0x2000, PAGE, PAGE), [0]);
    assert_eq!(report(&map, 0x3000, 4 * PAGE, PAGE), [0, 1, 2, 3], "a part, and a whole");
    assert_eq!(report(&map, 0x1000, 6 * PAGE, PAGE), [0, 1, 2], "the part stayed");
    assert!(report(&map, 0, 0x10000, PAGE).is_empty());
    // Ranges need not be aligned to anything.
    write(&map, 0x4000, 1);
    assert_eq!(report(&map, 0x3fff, 2, PAGE), [0]);
    assert_eq!(report(&map, 0x4fff, 1, 2 * PAGE), [0]);
    assert_eq!(report(&map, 0x4000, 0x4000, PAGE), [0, 1, 2]);
}

#[test]
fn windows_that_are_mapped_later_are_logged_and_those_that_go_are_remembered() {
    let map = empty();
    let ram = SharedMemory::create("ram", 4 * PAGE).expect("ram");
    start(&map, PAGE);
    map.map(window(0x1000, 4 * PAGE), Some(again(&ram))).expect("mapped");
    write(&map, 0x2000, 1);
    map.unmap(0x1000, 4 * PAGE, LONG).expect("unmapped");
    map.map(window(0x2000, 2 * PAGE), Some(again(&ram))).expect("mapped");
    write(&map, 0x3000, 1);
    assert_eq!(report(&map, 0x1000, 4 * PAGE, PAGE), [1, 2]);
    assert!(report(&map, 0, 0x10000, PAGE).is_empty());
    write(&map, 0x3000, 1);
    let words = map.unmap_reported(0x2000, 2 * PAGE, PAGE, LONG).expect("unmapped");
    assert_eq!(set(&words), [1]);
    assert!(report(&map, 0, 0x10000, PAGE).is_empty(), "it was told already");
    assert_eq!(map.windows(), 0);
}

#[test]
fn an_unmapping_that_cannot_be_reported_does_not_happen() {
    let (map, _ram, _peer) = machine();
    let refused = |size, page, errno| {
        let error = map.unmap_reported(0x10000, size, page, SHORT).expect_err("refused");
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!(map.windows(), 3);
    };
    refused(4 * PAGE, PAGE, libc::EINVAL); // Not started.
    start(&map, PAGE);
    refused(4 * PAGE, 0, libc::EINVAL);
    refused(4 * PAGE, 2048, libc::EINVAL);
    refused(4 * PAGE, 3 * PAGE, libc::EINVAL);
    refused(0, PAGE, libc::EINVAL);
    refused(PAGE, PAGE, libc::ENOENT);
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x10000, 8)]).expect("access");
    refused(4 * PAGE, PAGE, libc::EBUSY);
    drop(access);
    let words = map.unmap_reported(0x10000, 4 * PAGE, PAGE, SHORT).expect("unmapped");
    assert_eq!(set(&words), [0]);
    let words = map.unmap_reported(0x30000, 4 * PAGE, PAGE, SHORT).expect("without a file");
    assert!(set(&words).is_empty());
}

#[test]
fn only_windows_that_touch_a_range_are_logged() {
    let map = empty();
    let ram = SharedMemory::create("ram", 4 * PAGE).expect("ram");
    let map_at = |iova| map.map(window(iova, 2 * PAGE), Some(again(&ram))).expect("mapped");
    map_at(0x10000);
    map_at(0x20000);
    let range = |iova, length| LogRange { iova, length };
    let ranges = [range(0x21000, PAGE), range(0x30000, 1), range(0x0, 0x1000), range(0x800, 8)];
    map.start_log(PAGE, &ranges, LONG).expect("started");
    map_at(0x30000);
    map_at(0x32000);
    let all = || {
        for iova in [0x10000, 0x20000, 0x30000, 0x32000] {
            write(&map, iova, 1);
        }
        report(&map, 0, 0x40000, PAGE)
    };
    assert_eq!(all(), [0x20, 0x30]);
    // A second start adds.
    map.start_log(PAGE, &[range(0x10000, 0x2000)], LONG).expect("added");
    assert_eq!(all(), [0x10, 0x20, 0x30]);
    write(&map, 0x10000, 1);
    map.start_log(PAGE, &[], LONG).expect("everything");
    assert_eq!(report(&map, 0, 0x40000, PAGE), [0x10], "what is set stays");
    assert_eq!(all(), [0x10, 0x20, 0x30, 0x32]);
}

#[test]
fn impossible_logs_and_reports_are_refused() {
    let (map, _ram, _peer) = machine();
    let refused = |page, ranges: &[LogRange], errno| {
        let error = map.start_log(page, ranges, SHORT).expect_err("refused");
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!(map.log_page_size(), None);
    };
    for page in [0, 1, 2048, 4097, 3 * PAGE, MAX_LOG_PAGE * 2, 1 << 63] {
        refused(page, &[], libc::EINVAL);
    }
    refused(PAGE, &[LogRange { iova: 0, length: 0 }], libc::EINVAL);
    refused(PAGE, &[LogRange { iova: PAGE, length: u64::MAX }], libc::EINVAL);
    start(&map, PAGE);
    start(&map, PAGE);
    let other = map.start_log(2 * PAGE, &[], SHORT).expect_err("another page size");
    assert_eq!(other, LogError::Started { asked: 2 * PAGE, present: PAGE });
    assert_eq!(other.errno(), libc::EINVAL);
    let report =
        |iova, length, page| Report::new(iova, length, page).map_err(|error| error.errno());
    for page in [0, 1, 2048, 4097, 3 * PAGE] {
        assert_eq!(report(0, PAGE, page), Err(libc::EINVAL));
    }
    assert_eq!(report(0, 0, PAGE), Err(libc::EINVAL));
    assert_eq!(report(2, u64::MAX, PAGE), Err(libc::EINVAL));
    assert_eq!(report(0, u64::MAX, PAGE), Err(libc::E2BIG));
    assert!(report(0, MAX_REPORT_PAGES * PAGE, PAGE).is_ok());
    assert_eq!(report(0, MAX_REPORT_PAGES * PAGE + 1, PAGE), Err(libc::E2BIG));
}

#[test]
fn more_pages_than_can_be_logged_are_refused_before_anything_changes() {
    let map = empty();
    let size = MAX_LOG_PAGES * PAGE;
    let half = memfd(size);
    map.map(window(0, size), Some(again(&half))).expect("mapped");
    start(&map, PAGE);
    let error = map.map(window(size, PAGE), Some(memfd(PAGE))).expect_err("too many");
    assert_eq!(error.errno(), libc::ENOSPC);
    assert_eq!(map.windows(), 1);
    map.map(window(size, PAGE), None).expect("not logged");
    map.map(WindowSpec { writable: false, ..window(2 * size, PAGE) }, Some(memfd(PAGE)))
        .expect("not logged either");
    map.unmap(0, size, LONG).expect("unmapped");
    map.map(window(3 * size, size), Some(again(&half))).expect("there is place again");
    map.stop_log();
    map.map(window(5 * size, PAGE), Some(memfd(PAGE))).expect("nothing is logged");
    let error = map.start_log(PAGE, &[], LONG).expect_err("too many");
    assert_eq!(error.errno(), libc::ENOSPC);
    assert_eq!(map.log_page_size(), None);
    write(&map, 3 * size, 1);
    start(&map, 2 * PAGE);
    write(&map, 5 * size, 1);
    assert_eq!(report(&map, 3 * size, 3 * size, size), [2]);
}

#[test]
fn when_too_much_was_unmapped_everything_is_reported() {
    let map = empty();
    let size = 1 << 40;
    let file = memfd(size);
    start(&map, PAGE);
    map.map(window(0, size), Some(again(&file))).expect("mapped");
    let logged = 64 * PAGE * (1 << 20);
    write(&map, 0, logged);
    map.unmap(0, size, LONG).expect("unmapped");
    assert_eq!(report(&map, logged, PAGE, PAGE), [] as [u64; 0], "exactly as much as there may be");
    map.map(window(0, size), Some(again(&file))).expect("mapped");
    write(&map, logged, 1);
    map.unmap(0, size, LONG).expect("unmapped");
    assert_eq!(report(&map, 1 << 50, 3 * PAGE, PAGE), [0, 1, 2]);
    assert_eq!(report(&map, 1 << 50, 3 * PAGE, PAGE), [0, 1, 2], "from then on");
    map.stop_log();
    start(&map, PAGE);
    assert_eq!(report(&map, 1 << 50, 3 * PAGE, PAGE), [] as [u64; 0]);
}

#[test]
fn a_start_waits_for_the_transactions_of_before() {
    let (map, _ram, _peer) = machine();
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x10000, 8)]).expect("access");
    let error = map.start_log(PAGE, &[], SHORT).expect_err("one is in flight");
    assert_eq!(error.errno(), libc::EBUSY);
    assert_eq!(map.log_page_size(), None);
    thread::scope(|scope| {
        let started = scope.spawn(|| map.start_log(PAGE, &[], LONG));
        while map.log_page_size().is_none() {
            thread::yield_now();
        }
        let younger = dma.access(&[Span::write(0x11000, 8)]).expect("nobody is held up");
        assert!(!started.is_finished());
        drop(access);
        drop(younger);
        assert_eq!(started.join().expect("no panic"), Ok(()));
    });
    assert_eq!(report(&map, 0x10000, 4 * PAGE, PAGE), [0, 1], "they ended after the start");
}

#[test]
fn a_window_that_goes_while_it_is_written_counts_as_written() {
    let (map, _ram, _peer) = machine();
    start(&map, PAGE);
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x10000, 8)]).expect("access");
    map.unmap_all(SHORT).expect_err("in use");
    drop(access);
    assert_eq!(report(&map, 0x10000, 4 * PAGE, PAGE), [0, 1, 2, 3]);
}

#[test]
fn a_copy_that_follows_the_reports_is_the_same_when_the_writers_have_ended() {
    const PAGES: u64 = 256;
    let map = empty();
    let ram = SharedMemory::create("ram", PAGES * PAGE).expect("ram");
    map.map(window(0, PAGES * PAGE), Some(again(&ram))).expect("mapped");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let (dma, stop) = (map.dma(), &stop);
                scope.spawn(move || {
                    let mut number: u64 = writer;
                    while !stop.load(Ordering::Relaxed) {
                        // All pages of a word, and words of both.
                        let page = number.wrapping_mul(0x9e37_79b9) % PAGES;
                        let access = dma
                            .access(&[Span::write(page * PAGE + writer * 8, 8)])
                            .expect("access");
                        access.store_u64(0, 0, number).expect("stored");
                        number += 2;
                    }
                })
            })
            .collect();
        start(&map, PAGE);
        let everything = Report::new(0, PAGES * PAGE, PAGE).expect("acceptable");
        let mut copy = vec![(0, 0); 256];
        let look = |page: u64| {
            let at = page * PAGE;
            (ram.load_u64(at).expect("inside"), ram.load_u64(at + 8).expect("inside"))
        };
        for (page, copied) in (0..).zip(&mut copy) {
            *copied = look(page);
        }
        let mut follow = || {
            let reported = set(&map.report(&everything).expect("started"));
            for page in &reported {
                copy[usize::try_from(*page).expect("small")] = look(*page);
            }
            reported.len()
        };
        let (mut rounds, mut told) = (0, 0);
        while rounds < 200 || told < 2000 {
            told += follow();
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|writer| writer.join().expect("no panic"));
        follow();
        assert_eq!(copy, (0..PAGES).map(look).collect::<Vec<_>>());
    });
}

/// The simplest log there could be: sets of pages, and every byte range compared with every other.
#[derive(Default)]
struct Model {
    page: u64,
    windows: Vec<(u64, u64)>,
    /// In windows: which one, and the page's number.
    marked: BTreeSet<((u64, u64), u64)>,
    unmapped: BTreeSet<u64>,
    /// Bytes that were written and not reported, in units of [`PAGE`].
    untold: BTreeSet<u64>,
}

/// What two ranges have in common, each its first and last byte.
fn common(one: (u64, u64), other: (u64, u64)) -> Option<(u64, u64)> {
    let both = (one.0.max(other.0), one.1.min(other.1));
    (both.0 <= both.1).then_some(both)
}

impl Model {
    fn bytes(&self, page: u64) -> (u64, u64) {
        (page * self.page, (page + 1) * self.page - 1)
    }

    fn report(&mut self, iova: u64, length: u64, page_size: u64) -> Vec<u64> {
        let asked = (iova, iova + length - 1);
        let places: Vec<_> = self
            .marked
            .iter()
            .map(|(window, page)| common(self.bytes(*page), *window))
            .chain(self.unmapped.iter().map(|page| Some(self.bytes(*page))))
            .flatten()
            .collect();
        let is_set = |bit: &u64| {
            let place = (iova + bit * page_size, iova + (bit + 1) * page_size - 1);
            let place = common(place, asked).expect("a page of the report");
            places.iter().any(|written| common(*written, place).is_some())
        };
        let set = (0..length.div_ceil(page_size)).filter(is_set).collect();
        let is_inside = |place| common(place, asked) == Some(place);
        let page_size = self.page;
        let bytes = |page: u64| (page * page_size, (page + 1) * page_size - 1);
        self.marked.retain(|(window, page)| !common(bytes(*page), *window).is_some_and(is_inside));
        self.unmapped.retain(|page| !is_inside(bytes(*page)));
        set
    }

    /// No write may be missing in a report; what is in it wholly is told then.
    fn check_told(&mut self, iova: u64, length: u64, page_size: u64, set: &[u64]) {
        let (first, last) = (iova, iova + length - 1);
        for unit in &self.untold {
            let bytes = (unit * PAGE, unit * PAGE + PAGE - 1);
            if let Some((from, to)) = common(bytes, (first, last)) {
                for bit in (from - iova) / page_size..=(to - iova) / page_size {
                    assert!(set.contains(&bit), "unit {unit} is missing in {set:?}");
                }
            }
        }
        self.untold.retain(|unit| unit * PAGE < first || unit * PAGE + (PAGE - 1) > last);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64),
    Unmap(u64, Option<u32>),
    Write(u64, u64),
    Report(u64, u64, u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let unit = || 0u64..40;
    let step = prop_oneof![
        3 => (unit(), 1u64..12).prop_map(|(at, len)| Step::Map(at, len)),
        2 => (unit(), prop::option::of(0u32..6)).prop_map(|(at, page)| Step::Unmap(at, page)),
        6 => (0u64..40 * PAGE, 1u64..6 * PAGE).prop_map(|(at, len)| Step::Write(at, len)),
        // Aligned and not, small and large.
        2 => (unit(), 1u64..60, 0u32..6)
            .prop_map(|(at, len, page)| Step::Report(at * PAGE, len * PAGE, page)),
        1 => (0u64..50 * PAGE, 1u64..300 * PAGE, 0u32..6)
            .prop_map(|(at, len, page)| Step::Report(at, len, page)),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    /// The log agrees with the simplest model of it, and misses nothing.
    #[test]
    fn the_log_is_a_set_of_pages(page in 0u32..6, base in 0usize..3, steps in steps()) {
        let map = empty();
        let ram = SharedMemory::create("ram", 16 * PAGE).expect("ram");
        // Bits in different words, and IOVAs that are not small.
        let base = [0, 0x3_e000, 0x7fff_ffff_0000_0000][base];
        let mut model = Model { page: PAGE << page, ..Model::default() };
        start(&map, model.page);
        for step in steps {
            match step {
                Step::Map(at, len) => {
                    let (iova, size) = (base + at * PAGE, len * PAGE);
                    let is_new = map.map(window(iova, size), Some(again(&ram)));
                    if is_new.is_ok_and(|mapped| mapped == Mapped::New) {
                        model.windows.push((iova, iova + size - 1));
                    }
                }
                Step::Unmap(at, page) => {
                    let Some(number) = model
                        .windows
                        .iter()
                        .position(|window| common(*window, (base + at * PAGE, base + at * PAGE)).is_some())
                    else { continue };
                    let window = model.windows.swap_remove(number);
                    let (iova, size) = (window.0, window.1 - window.0 + 1);
                    if let Some(page) = page {
                        let words = map.unmap_reported(iova, size, PAGE << page, LONG).expect("there");
                        prop_assert_eq!(set(&words), model.report(iova, size, PAGE << page));
                        model.check_told(iova, size, PAGE << page, &set(&words));
                    } else {
                        map.unmap(iova, size, LONG).expect("there");
                    }
                    let gone = model.marked.iter().filter(|(of, _)| *of == window);
                    model.unmapped.extend(gone.map(|(_, page)| *page));
                    model.marked.retain(|(of, _)| *of != window);
                }
                Step::Write(at, len) => {
                    let (first, last) = (base + at, base + at + len - 1);
                    let inside = |window: &&(u64, u64)| window.0 <= first && last <= window.1;
                    let Some(window) = model.windows.iter().find(inside).copied() else { continue };
                    write(&map, first, len);
                    let pages = first / model.page..=last / model.page;
                    model.marked.extend(pages.map(|page| (window, page)));
                    model.untold.extend(first / PAGE..=last / PAGE);
                }
                Step::Report(at, len, page) => {
                    let (iova, page) = (base + at, PAGE << page);
                    let told = report(&map, iova, len, page);
                    prop_assert_eq!(&told, &model.report(iova, len, page));
                    model.check_told(iova, len, page, &told);
                }
            }
        }
        let all = report(&map, base, 64 * PAGE, PAGE);
        model.check_told(base, 64 * PAGE, PAGE, &all);
        prop_assert!(model.untold.is_empty(), "{:?}", model.untold);
    }
}
