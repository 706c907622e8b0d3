//! State streams for the fuzz target `state_stream`: an honest one, changes to it, and a device that
//! reads what has come of them.

use super::apart::{Apart, Kept};
use super::format::{Header, PREAMBLE, Tag};
use super::{Saver, load};
use crate::actor::parts::Parts;
use crate::actor::scripted::{Scripted, info, put_together};
use crate::device::{Bar, Pass};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::sync::{Arc, Mutex};

/// Two pieces.
const MEMORY: u64 = 128 << 10;

fn device() -> Arc<Parts<Scripted>> {
    let memory = memfd_create("fuzzed", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, MEMORY).expect("a size");
    let device = Scripted { contents: Mutex::new(b"state".to_vec()), ..Scripted::default() };
    put_together(device, info().bar(2, Bar::memory(MEMORY, memory)).msix_vectors(2))
}

fn saved(parts: &Parts<Scripted>, passes: usize) -> Vec<u8> {
    let mut stream = Kept::default();
    let mut saver = Saver::new(parts);
    for _ in 0..passes {
        saver.pre_copy(parts, &mut stream).expect("a pass");
    }
    saver.finish(parts, &mut stream).expect("an end");
    stream.0
}

/// A stream of a device that was saved in two passes.
#[must_use]
pub fn honest() -> Vec<u8> {
    let parts = device();
    let passes = vec![(Pass::First, b"first".to_vec()), (Pass::Later, b"later".to_vec())];
    *parts.device.passes.lock().expect("no panic") = passes;
    saved(&parts, 2)
}

/// A change to a stream; afterwards all digests fit again.
#[derive(Clone, Debug)]
pub enum Change {
    /// Byte of the preamble, and what it is then.
    Preamble(u8, u8),
    /// A record more, before that one: tag, flags, where it belongs, contents.
    Insert(u8, u16, u16, u64, Vec<u8>),
    /// Another record in place of that one: tag, flags, where it belongs; the contents stay.
    Header(u8, u16, u16, u64),
    /// Other contents of that record.
    Contents(u8, Vec<u8>),
    /// Without that record.
    Remove(u8),
    /// That record twice.
    Double(u8),
}

/// What comes of an honest stream by these changes.
#[must_use]
pub fn changed(changes: &[Change]) -> Vec<u8> {
    let mut apart = Apart::of(&honest());
    for change in changes {
        let count = apart.records.len();
        let index = |at: u8| usize::from(at) % count.max(1);
        let header = |tag, flags, at| Header { tag: Tag(tag), flags, length: 0, at };
        match change.clone() {
            Change::Preamble(at, byte) => apart.preamble[usize::from(at) % PREAMBLE] = byte,
            Change::Insert(place, tag, flags, at, contents) => {
                apart.records.insert(index(place), (header(tag, flags, at), contents));
            }
            _ if count == 0 => {}
            Change::Header(place, tag, flags, at) => {
                apart.records[index(place)].0 = header(tag, flags, at);
            }
            Change::Contents(place, contents) => apart.records[index(place)].1 = contents,
            Change::Remove(place) => drop(apart.records.remove(index(place))),
            Change::Double(place) => {
                let record = apart.records[index(place)].clone();
                apart.records.insert(index(place), record);
            }
        }
    }
    apart.sealed()
}

/// Gives it to a device.
///
/// # Errors
///
/// What the device says.
///
/// # Panics
///
/// If the device takes it, and what it then saves is not taken by another one.
pub fn check(stream: &[u8]) -> Result<(), String> {
    let parts = device();
    load(&parts, stream).map_err(|error| crate::log::with_causes(&error))?;
    let again = saved(&parts, 0);
    let other = device();
    load(&other, again.as_slice()).expect("what a device saves is taken");
    assert!(saved(&other, 0) == again, "what was taken is saved as the same bytes");
    Ok(())
}
