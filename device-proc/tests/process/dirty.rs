//! Pages of RAM that a device process writes are marked for its coordinator.

use crate::child::Device;
use crate::copy::HalfWay;
use standstill_device_proc::memory::SharedMemory;
use standstill_protocol::dirty::{DirtyBitmap, Layout};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceEvent, DeviceMessage, MemoryDeclaration, Term, Untrack,
};
use std::os::fd::{AsFd, BorrowedFd};

const PAGE: u64 = 4096;

fn bitmap(size: u64) -> DirtyBitmap {
    DirtyBitmap::create(Layout::new(PAGE, size).unwrap()).unwrap()
}

fn declare(device: &Device, term: u64, sequence: u64, ram: BorrowedFd<'_>, bitmap: BorrowedFd<'_>) {
    let term = Term(term);
    let declaration = MemoryDeclaration { term, sequence, ram_fds: 1, dirty_page_size: PAGE };
    device.send_with(&CoordinatorMessage::Memory(declaration), &[ram, bitmap]);
}

fn accepted(device: &Device) -> u64 {
    match device.answer() {
        DeviceMessage::MemoryAccepted(accepted) => accepted.sequence,
        other => panic!("expected MemoryAccepted, got {other:?}"),
    }
}

fn is_marked(bitmap: &DirtyBitmap) -> bool {
    let mut bits = [0];
    bitmap.take(&mut bits);
    bits[0] != 0
}

/// A whole copy, of which the device has said that nothing of it is in flight any more.
fn copy_once(device: &Device, copy: &mut HalfWay, epoch: u64) {
    copy.again();
    copy.let_go();
    crate::child::until("the copy is whole", || copy.is_whole());
    device.pause(epoch);
    device.resume(epoch + 1);
}

#[test]
fn the_mark_comes_with_the_end_of_the_copy() {
    let device = Device::welcomed("");
    let mut copy = HalfWay::begin(&device, true);
    let marks = bitmap(copy.memory.size());
    declare(&device, 1, 9, copy.memory.as_fd(), marks.as_fd());
    for epoch in 0..20 {
        // It would come before the answer to a query: a copy without marks is half-way.
        device.query(epoch);
    }
    copy.let_go();
    assert_eq!(accepted(&device), 9);
    assert!(copy.is_whole(), "the answer came before the copy had ended");

    is_marked(&marks);
    copy.again();
    assert!(!is_marked(&marks));
    copy.let_go();
    crate::child::until("it is marked", || is_marked(&marks));
    assert!(copy.is_whole(), "the mark came before the copy had ended");
}

#[test]
fn when_tracking_has_ended_nothing_more_is_marked() {
    let device = Device::welcomed("");
    let mut copy = HalfWay::begin(&device, true);
    copy.let_go();
    let marks = bitmap(copy.memory.size());
    declare(&device, 1, 2, copy.memory.as_fd(), marks.as_fd());
    assert_eq!(accepted(&device), 2);
    // Of another term: dropped.
    device.send(&CoordinatorMessage::Untrack(Untrack { term: Term(0) }));
    copy_once(&device, &mut copy, 1);
    assert!(is_marked(&marks));
    device.send(&CoordinatorMessage::Untrack(Untrack { term: Term(1) }));
    copy_once(&device, &mut copy, 3);
    assert!(!is_marked(&marks));
}

#[test]
fn another_bitmap_takes_the_place_of_the_first() {
    let device = Device::welcomed("");
    let mut copy = HalfWay::begin(&device, true);
    copy.let_go();
    let (first, second) = (bitmap(copy.memory.size()), bitmap(copy.memory.size()));
    for (sequence, marks) in [(2, &first), (3, &second)] {
        declare(&device, 1, sequence, copy.memory.as_fd(), marks.as_fd());
        assert_eq!(accepted(&device), sequence);
    }
    is_marked(&first);
    copy_once(&device, &mut copy, 1);
    assert!(!is_marked(&first));
    assert!(is_marked(&second));
}

#[test]
fn a_later_coordinator_has_no_marks_until_it_asks_for_them() {
    let mut device = Device::kept("", None);
    let mut copy = HalfWay::begin(&device, true);
    copy.let_go();
    let marks = bitmap(copy.memory.size());
    declare(&device, 1, 2, copy.memory.as_fd(), marks.as_fd());
    assert_eq!(accepted(&device), 2);
    copy_once(&device, &mut copy, 1);
    assert!(is_marked(&marks));
    device.take_over(2);
    copy_once(&device, &mut copy, 1);
    assert!(!is_marked(&marks));
    declare(&device, 2, 3, copy.memory.as_fd(), marks.as_fd());
    assert_eq!(accepted(&device), 3);
    copy_once(&device, &mut copy, 3);
    assert!(is_marked(&marks));
}

#[test]
fn a_bitmap_that_could_shrink_or_has_another_size_is_not_accepted() {
    let device = Device::welcomed("");
    let ram = SharedMemory::create("ram", 4 << 20).unwrap();
    let unsealed = tempfile::tempfile().unwrap();
    let good = Layout::new(PAGE, 4 << 20).unwrap();
    unsealed.set_len(good.file_size()).unwrap();
    let other = bitmap(1 << 30);
    for (sequence, fd) in [(1, unsealed.as_fd()), (2, other.as_fd())] {
        declare(&device, 1, sequence, ram.as_fd(), fd);
        match device.next() {
            DeviceMessage::Event(DeviceEvent::Failed(text)) => {
                assert!(text.contains("dirty bitmap"), "{text}");
            }
            other => panic!("expected Failed, got {other:?}"),
        }
    }
    declare(&device, 1, 3, ram.as_fd(), bitmap(4 << 20).as_fd());
    assert_eq!(accepted(&device), 3);
}
