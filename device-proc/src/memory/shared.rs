//! Memory that a process makes itself and shares: a BAR, or the RAM of a test machine.

#![forbid(unsafe_code)]

use super::PAGE;
use super::window::{Protection, map_shared};
use standstill_protocol::sealed::{self, SealedError};
use std::fs::File;
use std::hash::Hasher;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use thiserror::Error;
use twox_hash::xxhash3_64::{RawHasher, SecretBuffer};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// The largest memory that is made or mapped, in bytes: 1 TiB.
pub const MAX_SHARED_MEMORY: u64 = 1 << 40;

/// How much is hashed at a time; stays in the first-level cache.
const CHUNK: usize = 4096;

/// A memfd of fixed size, mapped for reading and writing.
///
/// It is sealed: its size never changes again, so touching it cannot fault, whoever else has it.
/// Others may change its contents at any time; all access is volatile.
#[derive(Debug)]
pub struct SharedMemory {
    file: Arc<File>,
    region: MmapRegion,
}

/// Shared memory could not be made or mapped.
#[derive(Debug, Error)]
pub enum SharedMemoryError {
    /// The size is 0, not a multiple of the page size, or too large.
    #[error(
        "shared memory of {size:#x} bytes: the size must be a multiple of {PAGE:#x} and at most {MAX_SHARED_MEMORY:#x}"
    )]
    BadSize {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// Its file cannot be made, has another size, or could shrink under the mapping.
    #[error(transparent)]
    File(#[from] SealedError),
    /// It cannot be mapped.
    #[error("shared memory cannot be mapped")]
    Map(#[source] io::Error),
}

/// An access to shared memory lies outside it or is not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "{len} bytes at offset {offset:#x} of shared memory of {size:#x} bytes: outside or not aligned"
)]
pub struct SharedAccessError {
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: usize,
    /// The memory's size, in bytes.
    pub size: u64,
}

impl SharedMemory {
    /// New memory, all zero. `name` is for people (it shows in `/proc/…/maps`); `size` is in
    /// bytes, a multiple of [`PAGE`].
    ///
    /// # Errors
    ///
    /// [`SharedMemoryError::BadSize`], or the others if a system call fails.
    pub fn create(name: &str, size: u64) -> Result<Self, SharedMemoryError> {
        let len = checked_len(size)?;
        Self::map(sealed::create(name, size)?, len)
    }

    /// Maps memory that somebody else has made. `size` is in bytes and must be the file's.
    ///
    /// # Errors
    ///
    /// [`SharedMemoryError`]; among others if the file is not sealed against shrinking, since its
    /// owner could then kill this process by shrinking it.
    pub fn from_fd(fd: OwnedFd, size: u64) -> Result<Self, SharedMemoryError> {
        let len = checked_len(size)?;
        sealed::check(&fd, size)?;
        Self::map(fd, len)
    }

    fn map(fd: OwnedFd, len: usize) -> Result<Self, SharedMemoryError> {
        let file = Arc::new(File::from(fd));
        let protection = Protection { readable: true, writable: true };
        let region = map_shared(FileOffset::from_arc(Arc::clone(&file), 0), len, protection)
            .map_err(SharedMemoryError::Map)?;
        Ok(Self { file, region })
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// A second fd of the same memory, for somebody else to map.
    ///
    /// # Errors
    ///
    /// What `dup` says.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Copies out of the memory.
    ///
    /// # Errors
    ///
    /// [`SharedAccessError`] if it does not lie inside.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), SharedAccessError> {
        let error = self.error(offset, to.len());
        self.slice(offset, to.len()).ok_or(error)?.copy_to(to);
        Ok(())
    }

    /// Copies into the memory.
    ///
    /// # Errors
    ///
    /// [`SharedAccessError`] if it does not lie inside.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), SharedAccessError> {
        let error = self.error(offset, from.len());
        self.slice(offset, from.len()).ok_or(error)?.copy_from(from);
        Ok(())
    }

    /// Loads a little-endian number, atomically, with acquire ordering.
    ///
    /// # Errors
    ///
    /// [`SharedAccessError`] if it does not lie inside or `offset` is no multiple of 8.
    pub fn load_u64(&self, offset: u64) -> Result<u64, SharedAccessError> {
        let error = self.error(offset, 8);
        let slice = self.slice(offset, 8).ok_or(error)?;
        slice.load(0, Ordering::Acquire).map(u64::from_le).map_err(|_| error)
    }

    /// Stores a number in little endian, atomically, with release ordering.
    ///
    /// # Errors
    ///
    /// [`SharedAccessError`] if it does not lie inside or `offset` is no multiple of 8.
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), SharedAccessError> {
        let error = self.error(offset, 8);
        let slice = self.slice(offset, 8).ok_or(error)?;
        slice.store(value.to_le(), 0, Ordering::Release).map_err(|_| error)
    }

    /// Sets every byte to 0.
    pub fn zero(&self) {
        let zeros = [0; CHUNK];
        self.chunks().for_each(|chunk| {
            chunk.copy_from(&zeros);
        });
    }

    /// XXH3 (64 bits, no seed) of the whole contents, as they are found while it runs.
    #[must_use]
    #[inline(never)] // Its buffer is not to be in the frame of whoever answers a command.
    pub fn hash(&self) -> u64 {
        let mut hasher = RawHasher::new(SecretBuffer::default());
        let mut buffer = [0; CHUNK];
        for chunk in self.chunks() {
            let len = chunk.copy_to(&mut buffer);
            hasher.write(buffer.get(..len).unwrap_or_default());
        }
        hasher.finish()
    }

    fn chunks(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        let size = self.region.size();
        (0..size)
            .step_by(CHUNK)
            .filter_map(move |at| self.region.get_slice(at, CHUNK.min(size - at)).ok())
    }

    fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.region.get_slice(usize::try_from(offset).ok()?, len).ok()
    }

    fn error(&self, offset: u64, len: usize) -> SharedAccessError {
        SharedAccessError { offset, len, size: self.size() }
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn checked_len(size: u64) -> Result<usize, SharedMemoryError> {
    let bad = SharedMemoryError::BadSize { size };
    if size == 0 || !size.is_multiple_of(PAGE) || size > MAX_SHARED_MEMORY {
        return Err(bad);
    }
    usize::try_from(size).map_err(|_| bad)
}
