//! The engine's state: registers and counters, and how they are saved.

#![forbid(unsafe_code)]

use super::registers::*;
use serde::{Deserialize, Serialize};
use standstill_protocol::codec::{DecodeError, EncodeError, decode_state, encode_state};
use std::io::{self, Read, Write};
use thiserror::Error;
use twox_hash::XxHash3_64;

/// First bytes of a saved state.
const MAGIC: [u8; 4] = *b"SSCE";
/// Layout of a saved state.
const FORMAT: u32 = 1;
/// Longest state that is read, in bytes; the longest that is written has about 17 KiB.
const MAX_SAVED: u32 = 64 << 10;
/// Where rings must begin: a multiple of a descriptor's size.
const RING_ALIGNMENT: u64 = super::DESCRIPTOR_SIZE;

/// All that a driver can see, and what belongs to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) run: bool,
    pub(super) looping: bool,
    /// Error code, 0 for none.
    pub(super) error: u8,
    pub(super) ring_base: u64,
    pub(super) ring_entries: u32,
    pub(super) doorbell: u32,
    pub(super) head: u32,
    pub(super) bytes: u64,
    pub(super) descriptors: u64,
    pub(super) busy_ns: u64,
    /// What is added to the interrupts that this process has raised.
    pub(super) interrupts_before: u64,
    pub(super) probe_iova: u64,
    pub(super) probe_len: u64,
    pub(super) probe_result: u32,
    /// By index in the ring; as long as the longest ring that ran.
    pub(super) sequences: Vec<Sequence>,
}

/// How often a descriptor was executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sequence {
    pub(super) executed: u64,
    /// The last number that it stored somewhere; 0 for none.
    pub(super) stored: u64,
}

impl State {
    /// Whether there is a descriptor to execute.
    pub(super) fn has_work(&self) -> bool {
        self.run && self.ring_entries > 0 && (self.looping || self.head != self.doorbell)
    }

    pub(super) fn control(&self) -> u32 {
        let run = if self.run { CONTROL_RUN } else { 0 };
        let looping = if self.looping { CONTROL_LOOP } else { 0 };
        run | looping
    }

    pub(super) fn status(&self) -> u32 {
        let busy = if self.has_work() { STATUS_BUSY } else { 0 };
        let halted = if self.error != 0 { STATUS_HALTED } else { 0 };
        busy | halted | (u32::from(self.error) << STATUS_ERROR_SHIFT)
    }

    /// IOVA of the descriptor at `head`.
    pub(super) fn descriptor_iova(&self) -> u64 {
        self.ring_base.wrapping_add(u64::from(self.head) * super::DESCRIPTOR_SIZE)
    }

    /// Whether the ring can be where it is said to be.
    pub(super) fn ring_is_possible(&self) -> bool {
        let size = u64::from(self.ring_entries) * super::DESCRIPTOR_SIZE;
        self.ring_base.is_multiple_of(RING_ALIGNMENT)
            && self.ring_entries <= MAX_ENTRIES
            && self.ring_base.checked_add(size).is_some()
    }

    fn is_possible(&self) -> bool {
        let index_limit = self.ring_entries.max(1);
        self.ring_is_possible()
            && self.head < index_limit
            && self.doorbell < index_limit
            && (self.error == 0 || (ErrorCode::from_value(self.error).is_some() && !self.run))
            && self.probe_result <= PROBE_PEER
            && self.sequences.len() <= MAX_ENTRIES as usize
            && self.sequences.iter().all(|sequence| sequence.stored <= sequence.executed)
    }
}

/// A state that cannot be saved.
#[derive(Debug, Error)]
pub(super) enum SaveError {
    #[error("the state cannot be encoded")]
    Encode(#[from] EncodeError),
    #[error("the state cannot be written")]
    Write(#[from] io::Error),
}

/// A saved state that is not accepted.
#[derive(Debug, Error)]
pub(super) enum LoadError {
    #[error("the saved state ends early or cannot be read")]
    Read(#[from] io::Error),
    #[error("not the saved state of a copy engine")]
    Magic,
    #[error("the saved state has format {found}, this program reads {FORMAT}")]
    Format { found: u32 },
    #[error("the saved state says that it has {size} bytes, at most {MAX_SAVED} are possible")]
    Size { size: u32 },
    #[error("the saved state is damaged: checksum {found:#x} instead of {expected:#x}")]
    Checksum { found: u64, expected: u64 },
    #[error("the saved state cannot be decoded")]
    Decode(#[from] DecodeError),
    #[error("the saved state has {found:#x} bytes of memory, this device {expected:#x}")]
    Memory { found: u64, expected: u64 },
    #[error("the saved state has {found} interrupt vectors, this device {expected}")]
    Vectors { found: u16, expected: u16 },
    #[error("the saved state contradicts itself")]
    Impossible,
}

/// What a saved state must agree with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) memory_size: u64,
    pub(super) vectors: u16,
}

/// Writes a state: magic, format, size, content, XXH3 of all before it; little endian.
pub(super) fn save(shape: Shape, state: &State, to: &mut dyn Write) -> Result<(), SaveError> {
    let content = encode_state(&(shape, state))?;
    let size = u32::try_from(content.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(content.len() + 20);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(&content);
    bytes.extend_from_slice(&XxHash3_64::oneshot(&bytes).to_le_bytes());
    to.write_all(&bytes)?;
    Ok(())
}

/// Reads what [`save`] wrote, exactly that much, and checks all of it.
pub(super) fn load(shape: Shape, from: &mut dyn Read) -> Result<State, LoadError> {
    let mut bytes = vec![0; 12];
    from.read_exact(&mut bytes)?;
    let word = |at: usize| -> [u8; 4] { std::array::from_fn(|byte| bytes[at + byte]) };
    if word(0) != MAGIC {
        return Err(LoadError::Magic);
    }
    let found = u32::from_le_bytes(word(4));
    if found != FORMAT {
        return Err(LoadError::Format { found });
    }
    let size = u32::from_le_bytes(word(8));
    if size > MAX_SAVED {
        return Err(LoadError::Size { size });
    }
    let start = bytes.len();
    bytes.resize(start + size as usize, 0);
    from.read_exact(&mut bytes[start..])?;
    let mut sum = [0; 8];
    from.read_exact(&mut sum)?;
    let (found, expected) = (u64::from_le_bytes(sum), XxHash3_64::oneshot(&bytes));
    if found != expected {
        return Err(LoadError::Checksum { found, expected });
    }
    let (saved, state): (Shape, State) = decode_state(&bytes[start..])?;
    if saved.memory_size != shape.memory_size {
        let (found, expected) = (saved.memory_size, shape.memory_size);
        return Err(LoadError::Memory { found, expected });
    }
    if saved.vectors != shape.vectors {
        return Err(LoadError::Vectors { found: saved.vectors, expected: shape.vectors });
    }
    if state.is_possible() { Ok(state) } else { Err(LoadError::Impossible) }
}
