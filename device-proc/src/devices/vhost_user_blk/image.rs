//! The file behind the disk.

#![forbid(unsafe_code)]

use super::SECTOR;
use super::buffers::Alignment;
use super::request::{Disk, Range};
use rustix::fs::{
    AtFlags, FallocateFlags, FlockOperation, StatxFlags, fallocate, fdatasync, flock, statx,
};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Alignment of direct I/O where the kernel does not say what it needs (before 6.1): what is enough
/// for every disk.
const PAGE: u32 = 4096;

/// An image that cannot be a disk.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It cannot be opened, or asked.
    #[error("{path}: cannot {what}")]
    File {
        /// Where it is.
        path: PathBuf,
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// Its size is no number of blocks.
    #[error("{path}: {size} bytes are not a number of blocks of {block} bytes")]
    Size {
        /// Where it is.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Size of a block in bytes.
        block: u32,
    },
}

/// An open image.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: Arc<File>,
    pub(super) disk: Disk,
    /// Whether the page cache is passed by, and what buffers must be like then.
    pub(super) direct: Option<Alignment>,
    /// Whether the file can be read, or written, with the demand not to wait for the disk.
    pub(super) reads_without_waiting: AtomicBool,
    pub(super) writes_without_waiting: AtomicBool,
}

impl Image {
    pub(super) fn open(path: &Path, read_only: bool, direct: bool) -> Result<Self, ImageError> {
        let failed = |what| {
            move |source: io::Error| ImageError::File { path: path.to_owned(), what, source }
        };
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(flags);
        let file = options.open(path).map_err(failed("open it"))?;
        // Block devices have no length, but an end.
        let size = (&file).seek(SeekFrom::End(0)).map_err(failed("find its end"))?;
        let (direct, block) = if direct {
            let (alignment, block) = alignment(&file).map_err(failed("ask how it is aligned"))?;
            (Some(alignment), block)
        } else {
            (None, SECTOR)
        };
        if size == 0 || !size.is_multiple_of(u64::from(block)) {
            return Err(ImageError::Size { path: path.to_owned(), size, block });
        }
        if read_only && direct.is_none() {
            // Others may read it too, but nobody may write it.
            flock(&file, FlockOperation::NonBlockingLockShared)
                .map_err(|error| failed("lock it")(error.into()))?;
        }
        Ok(Self {
            file: Arc::new(file),
            disk: Disk { size, block, read_only },
            direct,
            reads_without_waiting: AtomicBool::new(true),
            writes_without_waiting: AtomicBool::new(true),
        })
    }

    /// Whether one process at a time may work on it, and a lock has to prove that a killed one has ended.
    ///
    /// That is so for every disk that can be written. What can only be read has nothing to write to
    /// the disk; but its reads go on writing to guest memory, after their process has ended, if they
    /// are direct.
    pub(super) fn is_exclusive(&self) -> bool {
        !self.disk.read_only || self.direct.is_some()
    }

    /// Makes stable what was written.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// `fallocate`.
    pub(super) fn allocate(&self, mode: FallocateFlags, range: Range) -> io::Result<()> {
        Ok(fallocate(&self.file, mode, range.offset, range.len)?)
    }

    /// Writes zeros, where `fallocate` has no better way.
    pub(super) fn write_zeros(&self, range: Range) -> io::Result<()> {
        #[repr(align(4096))]
        struct Zeros([u8; 64 << 10]);
        static ZEROS: Zeros = Zeros([0; 64 << 10]);
        let (mut offset, mut left) = (range.offset, range.len);
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.0.len());
            let zeros = ZEROS.0.get(..len).unwrap_or_default();
            match self.file.write_at(zeros, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    left -= written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether to demand of a read or a write that it does not wait for the disk.
pub(super) fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

/// That demand was not understood.
pub(super) fn clear(flag: &AtomicBool) {
    flag.store(false, Ordering::Relaxed);
}

/// What direct I/O needs of buffers, and of places in the file.
fn alignment(file: &File) -> io::Result<(Alignment, u32)> {
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    let (address, block) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    if !known {
        return Ok((Alignment { address: PAGE as usize, length: SECTOR as usize }, SECTOR));
    }
    if address == 0 || block == 0 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "it has no direct I/O"));
    }
    let block = block.max(SECTOR);
    let address = usize::try_from(address).unwrap_or(usize::MAX).max(1);
    Ok((Alignment { address, length: block as usize }, block))
}
