//! Bytes that claim to be the state of a device.
//!
//! The first byte says what the others are: 0 a stream, otherwise changes to an honest one whose
//! digests are made to fit again. A change is a byte for its kind, a byte for its record, and what it
//! needs.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_device_proc::actor::fuzzing::state::{Change, changed, check};
use standstill_fuzz::memory::Counting;
use standstill_fuzz::session::checked;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a stream may take of the heap, the target's copies of it included: most of it is for the
/// contents of the few records that an input can have.
const HEAP: usize = 4 << 20;
/// No error says more than this about bytes that somebody else chose.
const LONGEST_ERROR: usize = 1024;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    // Not counted: a stream can be made many times as long as the input that says how.
    let stream = if kind == 0 { bytes.to_vec() } else { changed(&changes(bytes)) };
    checked(HEAP, || {
        if let Err(text) = check(&stream) {
            assert!(text.len() <= LONGEST_ERROR, "{text}");
        }
    });
});

fn changes(mut bytes: &[u8]) -> Vec<Change> {
    let mut changes = Vec::new();
    while let Some((&[kind, place], rest)) = bytes.split_first_chunk() {
        bytes = rest;
        let mut number = |length: usize| {
            let (first, rest) = bytes.split_at(length.min(bytes.len()));
            bytes = rest;
            first.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let change = match kind % 8 {
            0 => Change::Preamble(place, low(number(1))),
            1 => Change::Remove(place),
            2 => Change::Double(place),
            3 | 4 => Change::Header(place, tag(number(1)), low(number(1)).into(), number(3)),
            5 => {
                let length = usize::from(low(number(1)));
                Change::Contents(place, contents(&mut bytes, length))
            }
            _ => {
                let (tag, flags, at) = (tag(number(1)), low(number(1)).into(), number(3));
                let length = usize::from(low(number(1)));
                // A whole piece cannot be in a small input.
                let contents = match length {
                    255 => vec![7; 65536],
                    length => contents(&mut bytes, length),
                };
                Change::Insert(place, tag, flags, at, contents)
            }
        };
        changes.push(change);
        if changes.len() == 16 {
            break;
        }
    }
    changes
}

fn low(number: u64) -> u8 {
    number.to_le_bytes()[0]
}

/// The end's is far from all others.
fn tag(number: u64) -> u16 {
    if number == 0xff { 0xffff } else { u16::from(low(number)) }
}

fn contents(bytes: &mut &[u8], length: usize) -> Vec<u8> {
    let (first, rest) = bytes.split_at(length.min(bytes.len()));
    *bytes = rest;
    first.to_vec()
}
