//! A device's state as bytes: a stream of records, described to the byte in
//! `docs/state-format.md`.
//!
//! A [`Saver`] writes the stream, [`load`] reads it; neither knows whether it goes through a
//! file, a pipe or the client's messages, so the bytes are the same in all cases. A stream is
//! written in one go ([`Saver::finish`] alone), or while the device runs in any number of passes
//! ([`Saver::pre_copy`]) that `finish` completes.
//!
//! **Memory that changes meanwhile.** The memory of a BAR is a file that vCPUs and peers map and
//! write without asking, so no write to it can be trapped or marked (what the kernel offers for
//! that, soft-dirty bits and userfaultfd, marks the writes through a mapping of one's own). So each
//! piece is copied once, and what was sent is the copy; its digest, which the stream needs anyway,
//! is kept, and a piece whose digest is still the same is not sent again. That costs one pass over
//! the memory while the device is stopped, 16 bytes for each 64 KiB, and that two different
//! contents have the same 128 bits of XXH3 once in 2^128.
//!
//! **What is read comes from another process**: everything is checked, nothing is believed. A
//! reader needs no more memory than one record. Every record is checked before its contents are
//! used, and the whole before the device may leave RESUMING. A device whose load failed is in
//! ERROR, so what was taken over before the damage was found does no harm.

use super::parts::Parts;
use crate::device::Device;
use crate::pci::BarUse;
use format::Identity;
use std::os::fd::OwnedFd;

#[cfg(any(test, fuzzing))]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
#[cfg_attr(fuzzing, expect(dead_code, reason = "a fuzz target needs a part of it"))]
pub(super) mod apart;
mod error;
#[cfg(feature = "fault-injection")]
mod faults;
mod format;
#[cfg(fuzzing)]
pub mod fuzzing;
mod load;
mod save;
#[cfg(test)]
mod tests;

pub(crate) use error::StreamError;
pub(crate) use load::load;
pub(crate) use save::{Progress, Saver, Sink};

/// The memory BARs with their sizes.
fn memory_bars<D>(parts: &Parts<D>) -> impl Iterator<Item = (u8, &OwnedFd, u64)> {
    let bars = parts.layout.bars.iter().zip(&parts.bar_memory).zip(0_u8..);
    bars.filter(|((bar, _), _)| bar.usage == BarUse::Memory)
        .filter_map(|((bar, memory), index)| Some((index, memory.as_ref()?, bar.size)))
}

/// How many bytes of memory there are.
pub(crate) fn memory_size<D>(parts: &Parts<D>) -> u64 {
    memory_bars(parts).map(|(_, _, size)| size).fold(0, u64::saturating_add)
}

fn identity<D: Device>(parts: &Parts<D>) -> Identity {
    let config = parts.config();
    let config = config.bytes();
    let word = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    let (bar_sizes, bar_uses) = Identity::bars(&parts.layout.bars);
    let (low, high) = (u32::from(word(0x08)), u32::from(word(0x0a)));
    Identity {
        kind: parts.kind.as_bytes().to_vec(),
        ids: [word(0x00), word(0x02), word(0x2c), word(0x2e)],
        class_revision: low | high << 16,
        state: [parts.state_version.major, parts.state_version.minor],
        msix_vectors: parts.layout.msix.map_or(0, |msix| msix.vectors),
        bar_sizes,
        bar_uses,
    }
}
