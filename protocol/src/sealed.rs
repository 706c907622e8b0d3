//! Memory that one process makes and another one maps: a memfd whose size never changes.
//!
//! It is sealed against shrinking and growing, so that touching its mapping cannot fault, whoever
//! else has it; and against further seals, so that nobody can make it read-only for the others.

#![forbid(unsafe_code)]

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use thiserror::Error;

/// Sealed memory could not be made, or what came is none.
#[derive(Debug, Error)]
pub enum SealedError {
    /// The file has another size.
    #[error("shared memory should have {expected:#x} bytes, its file has {actual:#x}")]
    WrongSize {
        /// What was expected, in bytes.
        expected: u64,
        /// The file's size, in bytes.
        actual: u64,
    },
    /// The file could shrink under its mapping.
    #[error("the file is not sealed against shrinking")]
    NotSealed,
    /// A system call failed.
    #[error("shared memory: {call} failed")]
    Io {
        /// Which one.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// New memory of `size` bytes, all zero. `name` is for people: it shows in `/proc/…/maps`.
///
/// # Errors
///
/// [`SealedError::Io`] if a system call fails.
pub fn create(name: &str, size: u64) -> Result<OwnedFd, SealedError> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|error| io_error("memfd_create", error))?;
    ftruncate(&fd, size).map_err(|error| io_error("ftruncate", error))?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|error| io_error("F_ADD_SEALS", error))?;
    Ok(fd)
}

/// Whether memory that somebody else has made has that size, in bytes, and keeps it.
///
/// # Errors
///
/// [`SealedError`]; among others if the file is not sealed against shrinking, since its owner could
/// then kill whoever maps it.
pub fn check(fd: impl AsFd, size: u64) -> Result<(), SealedError> {
    let stat = fstat(&fd).map_err(|error| io_error("fstat", error))?;
    let actual = u64::try_from(stat.st_size).unwrap_or(0);
    if actual != size {
        return Err(SealedError::WrongSize { expected: size, actual });
    }
    // Files that know no seals answer EINVAL.
    let seals = fcntl_get_seals(&fd).map_err(|_| SealedError::NotSealed)?;
    if seals.contains(SealFlags::SHRINK) { Ok(()) } else { Err(SealedError::NotSealed) }
}

fn io_error(call: &'static str, error: impl Into<io::Error>) -> SealedError {
    SealedError::Io { call, source: error.into() }
}
