//! Guest memory with a chain of descriptors for a block device in it.
//!
//! The first two bytes say what the disk is like and where the chain begins; the others are memory
//! from address 0 on, where the table of descriptors is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_device_proc::devices::vhost_user_blk::fuzzing::{CHOSEN, Guest, check};
use standstill_fuzz::memory::{Counting, used_by};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a request may take of the heap: a list of as many pieces as one can have.
const HEAP: usize = 64 << 10;
/// No error says more than this about bytes that somebody else chose.
const LONGEST_ERROR: usize = 256;

fuzz_target!(|input: &[u8]| {
    // Memory that is no input finds nothing.
    let guest = Guest::from_bytes(input.get(..CHOSEN + 2).unwrap_or(input));
    let (text, usage) = used_by(|| check(&guest));
    assert!(text.len() <= LONGEST_ERROR, "{text}");
    assert!(usage.peak <= HEAP, "a request takes {} bytes of the heap", usage.peak);
});
