//! Descriptors: what the engine is to copy, as it lies in the ring.

#![forbid(unsafe_code)]

use super::registers::MAX_COPY;
use thiserror::Error;

/// Size of a descriptor in bytes.
pub const DESCRIPTOR_SIZE: u64 = 64;

/// Flag: after the copy, store the descriptor's sequence number at `sequence_iova`.
pub const FLAG_SEQUENCE: u32 = 1;
/// Flag: overwrite the first 8 bytes of the copy with the sequence number, so that it differs
/// each time.
pub const FLAG_STAMP: u32 = 1 << 1;
/// Flag: raise the MSI-X vector at the end.
pub const FLAG_INTERRUPT: u32 = 1 << 2;

const ALL_FLAGS: u32 = FLAG_SEQUENCE | FLAG_STAMP | FLAG_INTERRUPT;

/// One copy. In the ring it has [`DESCRIPTOR_SIZE`] bytes, little endian:
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 8 | source IOVA |
/// | 8 | 8 | destination IOVA |
/// | 16 | 4 | length in bytes, 1 to [`MAX_COPY`] |
/// | 20 | 4 | flags |
/// | 24 | 8 | IOVA for the sequence number, a multiple of 8 |
/// | 32 | 4 | MSI-X vector |
/// | 36 | 28 | reserved, 0 |
///
/// The sequence number of a descriptor is how often it was executed, by its index in the ring; it
/// is 1 at the first time. Copy, stamp, sequence number and interrupt belong to one transaction:
/// a device that is stopped has done all of it or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Where to copy from.
    pub source: u64,
    /// Where to copy to.
    pub destination: u64,
    /// How many bytes.
    pub len: u32,
    /// [`FLAG_SEQUENCE`], [`FLAG_STAMP`], [`FLAG_INTERRUPT`].
    pub flags: u32,
    /// Where the sequence number goes.
    pub sequence_iova: u64,
    /// Which MSI-X vector to raise.
    pub vector: u32,
}

/// A descriptor that the engine does not execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum BadDescriptor {
    #[error("length {0} is not 1 to {MAX_COPY}")]
    Length(u32),
    #[error("unknown flags {0:#x}")]
    Flags(u32),
    #[error("a stamp needs 8 bytes, the copy has {0}")]
    Stamp(u32),
    #[error("place of the sequence number {0:#x} is no multiple of 8")]
    Alignment(u64),
    #[error("MSI-X vector {vector} of {vectors}")]
    Vector { vector: u32, vectors: u16 },
}

impl Descriptor {
    /// The bytes in the ring.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[0..8].copy_from_slice(&self.source.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.len.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.flags.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.sequence_iova.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.vector.to_le_bytes());
        bytes
    }

    /// The descriptor with these bytes; whether it makes sense shows when it is executed.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 64]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        Self {
            source: u64_at(0),
            destination: u64_at(8),
            len: u32_at(16),
            flags: u32_at(20),
            sequence_iova: u64_at(24),
            vector: u32_at(32),
        }
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    pub(super) fn check(&self, vectors: u16) -> Result<(), BadDescriptor> {
        if self.len == 0 || self.len > MAX_COPY {
            return Err(BadDescriptor::Length(self.len));
        }
        if self.flags & !ALL_FLAGS != 0 {
            return Err(BadDescriptor::Flags(self.flags));
        }
        if self.has(FLAG_STAMP) && self.len < 8 {
            return Err(BadDescriptor::Stamp(self.len));
        }
        if self.has(FLAG_SEQUENCE) && !self.sequence_iova.is_multiple_of(8) {
            return Err(BadDescriptor::Alignment(self.sequence_iova));
        }
        if self.has(FLAG_INTERRUPT) && self.vector >= u32::from(vectors) {
            return Err(BadDescriptor::Vector { vector: self.vector, vectors });
        }
        Ok(())
    }
}
