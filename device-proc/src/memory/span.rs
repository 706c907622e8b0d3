//! What a DMA transaction names, and why it is refused.

#![forbid(unsafe_code)]

use super::message::MessageError;
use std::fmt;
use thiserror::Error;

/// The most spans in one transaction.
pub const MAX_SPANS: usize = 256;

/// What is done with a [`Span`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// The device reads it.
    Read,
    /// The device writes it.
    Write,
    /// Both.
    ReadWrite,
}

impl AccessKind {
    pub(super) fn reads(self) -> bool {
        self != Self::Write
    }

    pub(super) fn writes(self) -> bool {
        self != Self::Read
    }
}

impl fmt::Display for AccessKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::ReadWrite => "read and write",
        })
    }
}

/// A range of IOVAs that a transaction touches. It must lie in one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First IOVA.
    pub iova: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// What is done with it.
    pub kind: AccessKind,
}

impl Span {
    /// A range that is read.
    #[must_use]
    pub fn read(iova: u64, len: u64) -> Self {
        Self { iova, len, kind: AccessKind::Read }
    }

    /// A range that is written.
    #[must_use]
    pub fn write(iova: u64, len: u64) -> Self {
        Self { iova, len, kind: AccessKind::Write }
    }

    /// A range that is read and written.
    #[must_use]
    pub fn read_write(iova: u64, len: u64) -> Self {
        Self { iova, len, kind: AccessKind::ReadWrite }
    }
}

/// A DMA transaction could not be begun, or went outside what it had named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DmaError {
    /// The gate is closed for it; only [`try_access`](super::Dma::try_access) says so.
    #[error("DMA is closed")]
    Closed,
    /// No window begins there or before and reaches so far.
    #[error("no DMA window contains {len:#x} bytes at {iova:#x}")]
    Unmapped {
        /// First IOVA.
        iova: u64,
        /// Length, in bytes.
        len: u64,
    },
    /// The client does not allow it.
    #[error("the DMA window at {iova:#x} does not allow to {kind}")]
    Forbidden {
        /// First IOVA.
        iova: u64,
        /// What was to be done.
        kind: AccessKind,
    },
    /// The window has no memory that could be mapped, and no client is there to be asked.
    #[error("the DMA window at {iova:#x} has no file to map, and no client serves DMA by messages")]
    NoMemory {
        /// First IOVA.
        iova: u64,
    },
    /// The window has no memory that could be mapped, and this thread is answering an access of
    /// the client, which waits for the answer before it serves anything else.
    #[error(
        "the DMA window at {iova:#x} needs messages, which an access handler must not wait for"
    )]
    InHandler {
        /// First IOVA.
        iova: u64,
    },
    /// The client did not read or write what it was asked to. What came before may be done.
    #[error("DMA by messages, {len:#x} bytes at {iova:#x}")]
    Message {
        /// First IOVA of the message.
        iova: u64,
        /// Its length, in bytes.
        len: u64,
        /// Why.
        #[source]
        source: MessageError,
    },
    /// More than [`MAX_SPANS`] spans.
    #[error("{spans} spans in one transaction, at most {MAX_SPANS} are possible")]
    TooManySpans {
        /// How many.
        spans: usize,
    },
    /// The access goes outside its span, is not aligned, or is not what the span was named for.
    #[error(
        "{len} bytes at offset {offset:#x} of span {index}: outside, not aligned, or not of its kind"
    )]
    OutsideSpan {
        /// Which span.
        index: usize,
        /// Where in it, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
    },
}

/// An access outside a span, or not as it was named.
pub(super) fn outside(index: usize, offset: impl TryInto<u64>, len: impl TryInto<u64>) -> DmaError {
    let number = u64::MAX;
    DmaError::OutsideSpan {
        index,
        offset: offset.try_into().unwrap_or(number),
        len: len.try_into().unwrap_or(number),
    }
}
