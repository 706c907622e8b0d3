mod dirty;
mod log;
mod message;
mod revoke;

use super::*;
use crate::gate::Scope;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use standstill_protocol::sealed::SealedError;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;

const SHORT: Duration = Duration::from_millis(5);
const LONG: Duration = Duration::from_secs(20);

fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, size).expect("ftruncate");
    fd
}

fn again(fd: &impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().expect("dup")
}

fn window(iova: u64, size: u64) -> WindowSpec {
    WindowSpec { iova, size, offset: 0, readable: true, writable: true }
}

fn empty() -> MemoryMap {
    MemoryMap::new(Arc::new(Gate::new()))
}

/// RAM at 0x10000, a peer's memory at 0x20000, nothing to map at 0x30000, each 4 pages.
fn machine() -> (MemoryMap, SharedMemory, SharedMemory) {
    let map = empty();
    let ram = SharedMemory::create("ram", 4 * PAGE).expect("ram");
    let peer = SharedMemory::create("peer", 4 * PAGE).expect("peer");
    map.declare_ram(again(&ram)).expect("declared");
    map.map(window(0x10000, 4 * PAGE), Some(again(&ram))).expect("mapped");
    map.map(window(0x20000, 4 * PAGE), Some(again(&peer))).expect("mapped");
    map.map(window(0x30000, 4 * PAGE), None).expect("recorded");
    (map, ram, peer)
}

#[test]
fn an_exact_repeat_is_accepted_and_any_other_overlap_is_not() {
    let map = empty();
    let file = memfd(8 * PAGE);
    let spec = window(0x10000, 4 * PAGE);
    assert_eq!(map.map(spec, Some(again(&file))).expect("new"), Mapped::New);
    assert_eq!(map.map(spec, Some(again(&file))).expect("repeat"), Mapped::Repeated);
    let others = [
        (spec, Some(memfd(8 * PAGE))),
        (spec, None),
        (WindowSpec { writable: false, ..spec }, Some(again(&file))),
        (WindowSpec { offset: PAGE, ..spec }, Some(again(&file))),
        (window(0x10000, 3 * PAGE), Some(again(&file))),
        (window(0xF000, 2 * PAGE), Some(again(&file))),
        (window(0x13000, PAGE), Some(again(&file))),
        (window(0x13000, 2 * PAGE), Some(again(&file))),
        (window(0, 0x40000), None),
    ];
    for (other, fd) in others {
        let error = map.map(other, fd).expect_err("overlap");
        assert_eq!(error.errno(), libc::EEXIST, "{error}");
    }
    assert_eq!(map.windows(), 1);
    map.map(window(0xF000, PAGE), Some(again(&file))).expect("touches it from below");
    map.map(window(0x14000, PAGE), Some(again(&file))).expect("touches it from above");
}

#[test]
fn impossible_windows_are_refused() {
    let map = empty();
    let refused = |spec: WindowSpec, fd: Option<OwnedFd>, errno: i32| {
        let error = map.map(spec, fd).expect_err("refused");
        assert_eq!(error.errno(), errno, "{error}");
    };
    refused(window(0x1000, 0), Some(memfd(PAGE)), libc::EINVAL);
    refused(window(0x1001, PAGE), Some(memfd(PAGE)), libc::EINVAL);
    refused(window(0x1000, 100), Some(memfd(PAGE)), libc::EINVAL);
    refused(window(0u64.wrapping_sub(PAGE), 2 * PAGE), None, libc::EINVAL);
    refused(window(0x1000, 2 * PAGE), Some(memfd(PAGE)), libc::EINVAL);
    let odd = WindowSpec { offset: 1, ..window(0x1000, PAGE) };
    refused(odd, Some(memfd(4 * PAGE)), libc::EINVAL);
    let overflow = WindowSpec { offset: u64::MAX - PAGE + 1, ..window(0x1000, PAGE) };
    refused(overflow, Some(memfd(PAGE)), libc::EINVAL);
    refused(WindowSpec { offset: PAGE, ..window(0x1000, PAGE) }, None, libc::EINVAL);
    let (pipe, _other) = rustix::pipe::pipe().expect("pipe");
    refused(window(0x1000, PAGE), Some(pipe), libc::EINVAL);
    refused(window(0x1000, 2 * MAX_MAPPED), Some(memfd(2 * MAX_MAPPED)), libc::ENOSPC);
    assert_eq!(map.windows(), 0);
    // The last page of the address space is a page like any other.
    map.map(window(0u64.wrapping_sub(PAGE), PAGE), None).expect("recorded");
}

#[test]
fn a_file_that_cannot_be_written_is_mapped_only_for_reading() {
    let map = empty();
    let file = memfd(PAGE);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = || OwnedFd::from(File::open(&path).expect("opened again"));
    let error = map.map(window(0x1000, PAGE), Some(read_only())).expect_err("not writable");
    assert_eq!(error.errno(), libc::EACCES);
    let spec = WindowSpec { writable: false, ..window(0x1000, PAGE) };
    map.map(spec, Some(read_only())).expect("readable");
    let dma = map.dma();
    let write = dma.access(&[Span::write(0x1000, 8)]).expect_err("read only");
    assert_eq!(write, DmaError::Forbidden { iova: 0x1000, kind: AccessKind::Write });
    let _ = dma.access(&[Span::read(0x1000, 8)]).expect("readable");
}

/// Nothing of it is touched, so no huge page has to be there.
#[test]
fn a_part_of_a_huge_page_is_a_window_like_any_other() {
    let name = "huge-pages-of-a-window";
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap();
    ftruncate(&file, 4 << 30).unwrap();
    let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().matches(name).count();
    let map = empty();
    for (offset, size) in [(1 << 20, 1 << 20), (0x3000, 0x1000), ((1 << 20) - 0x1000, 1 << 30)] {
        let spec = WindowSpec { offset, ..window(0x10_0000, size) };
        assert_eq!(map.map(spec, Some(again(&file))).unwrap(), Mapped::New, "{spec:?}");
        assert_eq!(mapped(), 1);
        assert_eq!(map.map(spec, Some(again(&file))).unwrap(), Mapped::Repeated);
        map.unmap(spec.iova, spec.size, Duration::ZERO).unwrap();
        assert_eq!(mapped(), 0, "{spec:?}");
    }
}

#[test]
fn unmapping_needs_the_exact_range() {
    let (map, _ram, _peer) = machine();
    for (iova, size) in [(0x10000, PAGE), (0x11000, 3 * PAGE), (0x50000, PAGE), (0x10000, 0)] {
        let error = map.unmap(iova, size, SHORT).expect_err("no such window");
        assert_eq!(error.errno(), libc::ENOENT);
    }
    map.unmap(0x10000, 4 * PAGE, SHORT).expect("unmapped");
    let error = map.unmap(0x10000, 4 * PAGE, SHORT).expect_err("unmapped already");
    assert_eq!(error.errno(), libc::ENOENT);
    assert_eq!(map.dma().classify(0x10000, 1), None);
    map.map(window(0x10000, PAGE), None).expect("free again");
}

#[test]
fn unmapping_waits_for_who_uses_the_window() {
    let (map, _ram, _peer) = machine();
    let dma = map.dma();
    let access = dma.access(&[Span::read(0x10000, 8)]).expect("access");
    let busy = map.unmap(0x10000, 4 * PAGE, SHORT).expect_err("in use");
    assert_eq!(busy.errno(), libc::EBUSY);
    // As before: it can be used, and it is there.
    let second = dma.access(&[Span::read(0x10000, 8)]).expect("usable again");
    drop(second);
    thread::scope(|scope| {
        let unmap = scope.spawn(|| map.unmap(0x10000, 4 * PAGE, LONG));
        // From some moment on, nobody new gets in; the one who is in still reads.
        while dma.classify(0x10000, 8).is_some() {
            thread::yield_now();
        }
        assert!(dma.try_access(&[Span::read(0x10000, 8)]).is_err());
        assert!(map.map(window(0x10000, PAGE), None).is_err(), "nothing goes over it");
        access.read(0, 0, &mut [0; 8]).expect("still mapped");
        assert!(!unmap.is_finished());
        drop(access);
        assert_eq!(unmap.join().expect("no panic"), Ok(()));
    });
}

#[test]
fn a_client_that_unmaps_everything_has_all_or_nothing_of_it() {
    let (map, _ram, _peer) = machine();
    let (dma, windows) = (map.dma(), map.windows());
    let access = dma.access(&[Span::read(0x20000, 8)]).expect("access");
    for _ in 0..2 {
        let busy = map.unmap_all_or_none(SHORT).expect_err("in use");
        assert_eq!(busy.errno(), libc::EBUSY);
        assert_eq!(map.windows(), windows);
        for iova in [0x10000, 0x20000] {
            drop(dma.access(&[Span::read(iova, 8)]).expect("usable again"));
        }
    }
    drop(access);
    assert_eq!(map.unmap_all_or_none(SHORT), Ok(()));
    assert_eq!(map.windows(), 0);
}

#[test]
fn when_the_client_goes_everything_is_unmapped_but_declarations_stay() {
    let (map, ram, _peer) = machine();
    let dma = map.dma();
    let access = dma.access(&[Span::read(0x20000, 8)]).expect("access");
    assert!(map.unmap_all(SHORT).is_err(), "somebody still used one");
    assert_eq!(map.windows(), 0);
    access.read(0, 0, &mut [0; 8]).expect("still mapped");
    drop(access);
    assert_eq!(map.unmap_all(SHORT), Ok(()));
    map.map(window(0x10000, 4 * PAGE), Some(again(&ram))).expect("a new client");
    assert_eq!(dma.classify(0x10000, 8), Some(WindowClass::Ram));
    assert_eq!(map.shared.changes().mapped, 4 * PAGE);
}

#[test]
fn only_declared_files_are_ram_whatever_their_fd() {
    let (map, _ram, peer) = machine();
    let dma = map.dma();
    assert_eq!(dma.classify(0x10000, 4 * PAGE), Some(WindowClass::Ram));
    assert_eq!(dma.classify(0x20000, 8), Some(WindowClass::Peer));
    assert_eq!(dma.classify(0x30000, 8), Some(WindowClass::Peer), "without a file");
    assert_eq!(dma.classify(0x10000, 4 * PAGE + 1), None);
    assert_eq!(dma.classify(0x10000, 0), None);
    assert_eq!(dma.classify(u64::MAX, 2), None);
    map.declare_ram(again(&peer)).expect("declared late");
    assert_eq!(dma.classify(0x20000, 8), Some(WindowClass::Ram));
    map.declare_ram(again(&peer)).expect("a repeat");
}

#[test]
fn the_number_of_declared_files_is_bounded() {
    let map = empty();
    for _ in 0..MAX_RAM_FILES {
        map.declare_ram(memfd(PAGE)).expect("declared");
    }
    assert!(matches!(map.declare_ram(memfd(PAGE)), Err(DeclareError::TooMany)));
}

#[test]
fn a_transaction_copies_and_stores() {
    let (map, ram, peer) = machine();
    let dma = map.dma();
    ram.write(0x100, b"standstill").expect("inside");
    let spans = [Span::read(0x10100, 10), Span::write(0x20ff0, 10), Span::read_write(0x21000, 16)];
    let access = dma.access(&spans).expect("access");
    assert_eq!(access.class(), WindowClass::Peer);
    access.copy(0, 1).expect("copied");
    access.store_u64(2, 8, 0x0102_0304_0506_0708).expect("stored");
    assert_eq!(access.load_u64(2, 8), Ok(0x0102_0304_0506_0708));
    let mut bytes = [0; 10];
    peer.read(0xff0, &mut bytes).expect("inside");
    assert_eq!(&bytes, b"standstill");
    peer.read(0x1008, &mut bytes).expect("inside");
    assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1, 0, 0], "little endian");

    for outside in [
        access.copy(1, 0),
        access.copy(0, 2),
        access.copy(0, 9),
        access.read(1, 0, &mut [0]),
        access.write(0, 0, &[0]),
        access.read(0, 3, &mut [0; 8]),
        access.write(1, u64::MAX, &[0]),
        access.store_u64(2, 4, 0),
        access.store_u64(2, 16, 0),
    ] {
        assert!(matches!(outside, Err(DmaError::OutsideSpan { .. })), "{outside:?}");
    }
}

#[test]
fn spans_that_cannot_be_accessed_are_refused() {
    let (map, _ram, _peer) = machine();
    let dma = map.dma();
    for (iova, len) in [(0x0, 8), (0x13ff9, 8), (0x10000, 0), (u64::MAX, 8), (0x10000, u64::MAX)] {
        let error = dma.access(&[Span::read(iova, len)]).expect_err("not mapped");
        assert_eq!(error, DmaError::Unmapped { iova, len });
    }
    let error = dma.access(&[Span::read(0x30000, 8)]).expect_err("no file");
    assert_eq!(error, DmaError::NoMemory { iova: 0x30000 });
    let many = vec![Span::read(0x10000, 8); MAX_SPANS + 1];
    let error = dma.access(&many).expect_err("too many");
    assert_eq!(error, DmaError::TooManySpans { spans: MAX_SPANS + 1 });
    let access = dma.access(many.get(1..).expect("one less")).expect("as many as possible");
    access.read(MAX_SPANS - 1, 0, &mut [0; 8]).expect("the last one");
}

#[tokio::test]
async fn while_it_waits_at_the_gate_a_transaction_holds_no_window() {
    let (map, ram, peer) = machine();
    map.gate().close(Scope::Peer, LONG).await.expect("nothing in flight");
    let dma = map.dma();
    let spans = [Span::read(0x10000, 8), Span::write(0x20000, 8)];
    assert_eq!(dma.try_access(&spans).expect_err("closed"), DmaError::Closed);
    drop(dma.try_access(&spans[..1]).expect("RAM only"));
    ram.store_u64(0, 7).expect("inside");
    let (started, has_started) = mpsc::channel();
    thread::scope(|scope| {
        let copy = scope.spawn(|| {
            started.send(()).expect("the test waits");
            dma.access(&spans).and_then(|access| access.copy(0, 1))
        });
        has_started.recv_timeout(LONG).expect("started");
        // The window goes while it waits, and another one takes its place.
        map.unmap(0x20000, 4 * PAGE, LONG).expect("nobody holds it");
        let other = SharedMemory::create("other", PAGE).expect("memory");
        map.map(window(0x20000, PAGE), Some(again(&other))).expect("mapped");
        assert!(!copy.is_finished());
        map.gate().open(Scope::Peer);
        assert_eq!(copy.join().expect("no panic"), Ok(()));
        assert_eq!(other.load_u64(0), Ok(7), "it was looked up again");
        assert_eq!(peer.load_u64(0), Ok(0));
    });
}

#[tokio::test]
async fn closing_the_gate_waits_for_a_transaction_half_way() {
    let (map, _ram, peer) = machine();
    let dma = map.dma();
    let spans = [Span::read(0x10000, 8), Span::write(0x20000, 16)];
    let access = dma.access(&spans).expect("access");
    access.store_u64(1, 0, 1).expect("first half");
    assert!(map.gate().close(Scope::Peer, SHORT).await.is_err(), "it is in flight");
    let close = map.gate().close(Scope::Peer, LONG);
    let finish = async {
        tokio::task::yield_now().await;
        assert!(map.gate().peer().is_closed());
        access.store_u64(1, 8, 2).expect("second half");
        drop(access);
    };
    let (closed, ()) = tokio::join!(close, finish);
    closed.expect("drained");
    assert_eq!((peer.load_u64(0), peer.load_u64(8)), (Ok(1), Ok(2)));
}

#[tokio::test]
async fn an_error_is_told_only_while_the_gate_is_open() {
    let (map, _ram, _peer) = machine();
    map.gate().close(Scope::All, LONG).await.expect("nothing in flight");
    let dma = map.dma();
    let (told, is_told) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let result = dma.access(&[Span::read(0x50000, 8)]).map(drop);
            told.send(result).expect("the test waits");
        });
        // It finds nothing, and waits; what it finds after the start is what counts.
        assert!(is_told.recv_timeout(Duration::from_millis(20)).is_err());
        map.map(window(0x50000, PAGE), Some(memfd(PAGE))).expect("mapped");
        map.gate().open(Scope::All);
        assert_eq!(is_told.recv_timeout(LONG), Ok(Ok(())));
    });
    let error = dma.access(&[Span::read(0x60000, 8)]).expect_err("open, and nothing there");
    assert_eq!(error, DmaError::Unmapped { iova: 0x60000, len: 8 });
}

#[test]
fn shared_memory_has_a_fixed_size_and_a_hash_of_its_contents() {
    let memory = SharedMemory::create("memory", 256 * 1024).expect("memory");
    let empty = memory.hash();
    assert_eq!(empty, twox_hash::XxHash3_64::oneshot(&vec![0; 256 * 1024]));
    assert!(ftruncate(&memory, PAGE).is_err(), "sealed against shrinking");
    assert!(ftruncate(&memory, 1 << 20).is_err(), "sealed against growing");
    memory.write(200_000, b"x").expect("inside");
    assert_ne!(memory.hash(), empty);

    let fd = memory.try_clone_fd().expect("fd");
    let other = SharedMemory::from_fd(again(&fd), memory.size()).expect("a second mapping");
    assert_eq!(other.hash(), memory.hash());
    other.zero();
    assert_eq!(memory.hash(), empty);
    let wrong = SharedMemory::from_fd(fd, PAGE).expect_err("another size");
    assert!(matches!(wrong, SharedMemoryError::File(SealedError::WrongSize { .. })));
    let unsealed = SharedMemory::from_fd(memfd(PAGE), PAGE).expect_err("could shrink");
    assert!(matches!(unsealed, SharedMemoryError::File(SealedError::NotSealed)));
    for size in [0, 100, MAX_SHARED_MEMORY + PAGE] {
        let error = SharedMemory::create("memory", size).expect_err("bad size");
        assert!(matches!(error, SharedMemoryError::BadSize { .. }));
    }
    assert!(memory.read(256 * 1024 - 1, &mut [0; 2]).is_err());
    assert!(memory.write(u64::MAX, &[0]).is_err());
    assert!(memory.load_u64(4).is_err(), "not aligned");
}

proptest! {
    /// The map agrees with the simplest model of it: a list of windows.
    #[test]
    fn the_map_is_a_set_of_ranges_without_overlap(
        steps in prop::collection::vec((any::<bool>(), 0u64..24, 1u64..6), 1..60),
        probes in prop::collection::vec((0u64..30 * PAGE, 1u64..3 * PAGE), 20),
    ) {
        let map = empty();
        let mut model: Vec<(u64, u64)> = Vec::new();
        for (add, page, pages) in steps {
            let (iova, size) = (page * PAGE, pages * PAGE);
            let same = model.contains(&(iova, size));
            if add {
                let free = model.iter().all(|(at, len)| iova + size <= *at || at + len <= iova);
                let result = map.map(window(iova, size), None);
                prop_assert_eq!(result.is_ok(), free || same);
                if free {
                    model.push((iova, size));
                }
            } else {
                prop_assert_eq!(map.unmap(iova, size, SHORT).is_ok(), same);
                model.retain(|window| *window != (iova, size));
            }
            prop_assert_eq!(map.windows(), model.len());
        }
        for (iova, len) in probes {
            let inside = model.iter().any(|(at, size)| *at <= iova && iova + len <= at + size);
            prop_assert_eq!(map.dma().classify(iova, len).is_some(), inside);
        }
    }
}
