//! Why a state stream is not written or not taken over.

use super::format::{MAJOR, MINOR, PIECE, Tag};
use crate::device::DeviceError;
use crate::pci::ForeignConfig;
use std::io;
use thiserror::Error;

/// A state stream was not written or not taken over.
#[derive(Debug, Error)]
pub(crate) enum StreamError {
    #[error("the state stream cannot be written")]
    Write(#[source] io::Error),
    #[error("the state stream cannot be read")]
    Read(#[source] io::Error),
    #[error("the state stream ends too early")]
    Short,
    #[error("the state stream goes on after its end")]
    Long,
    #[error("the device was reset while its state was saved")]
    Reset,
    #[error("this is no state stream: it begins with {0:02x?}")]
    Magic([u8; 8]),
    #[error("state stream of version {major}.{minor}, expected {MAJOR}.{MINOR}")]
    Version { major: u16, minor: u16 },
    #[error("the state of a {found:?}, this is a {expected:?}")]
    Kind { found: String, expected: String },
    #[error("the state of a device with {what} {found}, this one has {expected}")]
    Identity { what: String, found: String, expected: String },
    #[error(
        "the device's own state has version {}.{}, expected {}.{}",
        found[0], found[1], expected[0], expected[1]
    )]
    DeviceVersion { found: [u16; 2], expected: [u16; 2] },
    #[error("{found} where {expected} was expected")]
    Section { found: Tag, expected: Tag },
    #[error("{section}: {length} bytes are not what belongs there")]
    Malformed { section: Tag, length: usize },
    #[error("{section}: a record of {length} bytes, at most {PIECE} are possible")]
    Piece { section: Tag, length: u32 },
    #[error(
        "{section}: {length} bytes at {at:#x} where {expected} were expected at {expected_at:#x}"
    )]
    Place { section: Tag, length: u64, at: u64, expected: u64, expected_at: u64 },
    #[error("{section} has more than the expected {expected} bytes")]
    TooLong { section: Tag, expected: u64 },
    #[error("{section} has {actual} bytes, expected {expected}")]
    TooShort { section: Tag, actual: u64, expected: u64 },
    #[error("{section} is not known here, and may not be skipped")]
    Unknown { section: Tag },
    #[error("{section}: nothing was saved of the {missing} bytes at {at:#x}")]
    Missing { section: Tag, at: u64, missing: u64 },
    #[error(
        "damaged: {section} at {at:#x} has digest {found:#034x}, the contents give {actual:#034x}"
    )]
    Damaged { section: Tag, at: u64, found: u128, actual: u128 },
    #[error("damaged: the stream's last record does not fit those before it")]
    Chain,
    #[error(transparent)]
    Config(#[from] ForeignConfig),
    #[error("interrupts that wait: {0}")]
    Interrupts(String),
    #[error("memory of BAR {bar} cannot be accessed")]
    Memory {
        bar: u8,
        #[source]
        source: io::Error,
    },
    #[error("a hook of an earlier state stream has not returned")]
    HookHangs,
    #[error("the device: {0}")]
    Device(#[source] DeviceError),
}
