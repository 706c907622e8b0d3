//! How much of the heap a call takes, and how much of it it does not give back.
//!
//! A target that is to know this makes [`Counting`] its allocator. Leaks and hostile sizes are then
//! found in any build; no sanitizer is needed.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a count of the bytes that are in use.
pub struct Counting;

fn taken(size: usize) {
    let live = LIVE.fetch_add(size, Ordering::Relaxed) + size;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

fn given_back(size: usize) {
    LIVE.fetch_sub(size, Ordering::Relaxed);
}

// SAFETY: passes every call on to `System` unchanged; the counters are atomics and allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size);
        given_back(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        given_back(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes of the heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The most that was in use at a time, beyond what was in use before.
    pub peak: usize,
    /// What is in use afterwards, beyond what was in use before.
    pub left: usize,
}

/// Bytes of the heap that are in use now.
#[must_use]
pub fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// What a call takes of the heap. Counts all threads, and one call at a time.
pub fn used_by<R>(call: impl FnOnce() -> R) -> (R, Usage) {
    let before = live();
    PEAK.store(before, Ordering::Relaxed);
    let result = call();
    let peak = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    (result, Usage { peak, left: live().saturating_sub(before) })
}
