//! Which pages of guest RAM a device process has written to: a bitmap that it shares with its
//! coordinator.
//!
//! While a VMM copies RAM to another place and its devices run, it has to know what they write
//! meanwhile. For each file of RAM each device process gets a [`DirtyBitmap`] of its own: the device
//! [marks](DirtyBitmap::mark), the coordinator [takes](DirtyBitmap::take) what is marked, without a
//! message. A device that does not do as it should spoils nobody's marks but its own.
//!
//! # Why no write is missed
//!
//! The device marks *after* it has written, the coordinator reads the page *after* it has taken the
//! mark. All accesses to the bitmap are sequentially consistent read-modify-writes, so a mark is
//! either taken, and then what was written before it is seen; or it is still there the next time.
//!
//! # Layout
//!
//! A sealed memfd of [`Layout::file_size`] bytes. First the *summary*: one bit for each 4096 bytes of
//! what follows; then the *marks*: one bit for each page of RAM. Both are words of 64 bits in the
//! machine's byte order, the lowest bit first, and both are padded to a multiple of 4096 bytes. A
//! writer sets the marks first and then the summary, a reader clears the summary first and then the
//! marks: so it reads only what was written to, and memory is used only for that.

#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use crate::sealed::{self, SealedError};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// The smallest page that can be told apart, in bytes.
pub const MIN_PAGE_SIZE: u64 = 4096;
/// The largest page, in bytes.
pub const MAX_PAGE_SIZE: u64 = 1 << 30;
/// The largest file of RAM whose pages can be tracked, in bytes: 16 TiB.
pub const MAX_TRACKED: u64 = 1 << 44;

/// One bit of the summary is for so many bytes of marks; also what both are padded to.
const CHUNK: u64 = 4096;
/// Words in a chunk.
const CHUNK_WORDS: u64 = CHUNK / 8;
/// Pages in a chunk.
const CHUNK_PAGES: u64 = CHUNK * 8;

/// Which pages a [`DirtyBitmap`] is about, and where their marks are in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    page_size: u64,
    pages: u64,
}

/// Such pages, or so much RAM, cannot be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// No power of two, or out of range.
    #[error(
        "pages of {0:#x} bytes cannot be tracked: a power of two from {MIN_PAGE_SIZE:#x} to {MAX_PAGE_SIZE:#x} is expected"
    )]
    PageSize(u64),
    /// The file is empty or too large.
    #[error("RAM of {0:#x} bytes cannot be tracked: 1 to {MAX_TRACKED:#x} are possible")]
    Size(u64),
}

impl Layout {
    /// For a file of `size` bytes of RAM in pages of `page_size` bytes. The last page may be
    /// incomplete.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if one of them is out of range.
    pub fn new(page_size: u64, size: u64) -> Result<Self, LayoutError> {
        check_page_size(page_size)?;
        if size == 0 || size > MAX_TRACKED {
            return Err(LayoutError::Size(size));
        }
        Ok(Self { page_size, pages: size.div_ceil(page_size) })
    }

    /// Size of a page, in bytes.
    #[must_use]
    pub fn page_size(self) -> u64 {
        self.page_size
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(self) -> u64 {
        self.pages
    }

    /// How many words of 64 bits hold a bit for each page.
    #[must_use]
    pub fn words(self) -> usize {
        usize::try_from(self.pages.div_ceil(64)).unwrap_or(usize::MAX)
    }

    /// Size of the bitmap's file, in bytes.
    #[must_use]
    pub fn file_size(self) -> u64 {
        self.marks_at() + self.chunks() * CHUNK
    }

    fn chunks(self) -> u64 {
        self.pages.div_ceil(CHUNK_PAGES)
    }

    /// Where the marks begin, in bytes: behind the summary.
    fn marks_at(self) -> u64 {
        self.chunks().div_ceil(CHUNK_PAGES) * CHUNK
    }

    /// The bits of the last word that belong to a page.
    fn last_mask(self) -> u64 {
        match self.pages % 64 {
            0 => u64::MAX,
            some => (1 << some) - 1,
        }
    }
}

/// Whether pages of that size, in bytes, can be tracked.
///
/// # Errors
///
/// [`LayoutError::PageSize`] if not.
pub fn check_page_size(page_size: u64) -> Result<(), LayoutError> {
    if page_size.is_power_of_two() && (MIN_PAGE_SIZE..=MAX_PAGE_SIZE).contains(&page_size) {
        Ok(())
    } else {
        Err(LayoutError::PageSize(page_size))
    }
}

/// A bitmap could not be made, or what came is none.
#[derive(Debug, Error)]
pub enum DirtyBitmapError {
    /// Its file is not as it should be.
    #[error("dirty bitmap: {0}")]
    File(#[from] SealedError),
    /// It cannot be mapped.
    #[error("a dirty bitmap cannot be mapped")]
    Map(#[source] io::Error),
}

/// Marks for the pages of one file of RAM, in memory that two processes share.
///
/// The other process may change the contents at any time, and so tell lies about its own writes;
/// nothing else can come of it.
#[derive(Debug)]
pub struct DirtyBitmap {
    layout: Layout,
    file: Arc<File>,
    region: MmapRegion,
}

impl DirtyBitmap {
    /// A new one, nothing marked.
    ///
    /// # Errors
    ///
    /// [`DirtyBitmapError`] if a system call fails.
    pub fn create(layout: Layout) -> Result<Self, DirtyBitmapError> {
        Self::map(layout, sealed::create("standstill-dirty", layout.file_size())?)
    }

    /// One that another process has made, for the same layout.
    ///
    /// # Errors
    ///
    /// [`DirtyBitmapError`] if its file has another size or could shrink, or cannot be mapped.
    pub fn from_fd(fd: OwnedFd, layout: Layout) -> Result<Self, DirtyBitmapError> {
        sealed::check(&fd, layout.file_size())?;
        Self::map(layout, fd)
    }

    fn map(layout: Layout, fd: OwnedFd) -> Result<Self, DirtyBitmapError> {
        use libc::{MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE};
        let failed = |error| DirtyBitmapError::Map(io::Error::other(error));
        let file = Arc::new(File::from(fd));
        let size = usize::try_from(layout.file_size())
            .map_err(|_| DirtyBitmapError::Map(io::ErrorKind::OutOfMemory.into()))?;
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let (protection, flags) = (PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE);
        let region = MmapRegion::build(Some(offset), size, protection, flags).map_err(failed)?;
        Ok(Self { layout, file, region })
    }

    /// Which pages it is about.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Marks the pages of `len` bytes from `offset` in the file of RAM: they *have been* written.
    /// What lies behind the last page is left out.
    pub fn mark(&self, offset: u64, len: u64) {
        let Some(more) = len.checked_sub(1) else { return };
        let last = offset.saturating_add(more) / self.layout.page_size;
        let (first, last) = (offset / self.layout.page_size, last.min(self.layout.pages - 1));
        if first > last {
            return;
        }
        for chunk in first / CHUNK_PAGES..=last / CHUNK_PAGES {
            let from = first.max(chunk * CHUNK_PAGES);
            let to = last.min(chunk * CHUNK_PAGES + (CHUNK_PAGES - 1));
            for word in from / 64..=to / 64 {
                let low = from.saturating_sub(word * 64);
                let high = (to - word * 64).min(63);
                let bits = (u64::MAX << low) & (u64::MAX >> (63 - high));
                self.marks(word).fetch_or(bits, Ordering::SeqCst);
            }
            let (summary, bit) = (self.summary(chunk / 64), 1 << (chunk % 64));
            // Found set, a reader has yet to clear it, and clears the marks after that.
            if summary.load(Ordering::SeqCst) & bit == 0 {
                summary.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    /// Marks everything.
    pub fn mark_all(&self) {
        self.mark(0, u64::MAX);
    }

    /// Takes all marks away and adds them to `bits`: bit `n % 64` of word `n / 64` is for page `n`.
    /// Words that are not there are left out, so it should have [`Layout::words`].
    pub fn take(&self, bits: &mut [u64]) {
        let (chunks, words) = (self.layout.chunks(), self.layout.pages.div_ceil(64));
        for group in 0..chunks.div_ceil(64) {
            let summary = self.summary(group);
            if summary.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut left = summary.swap(0, Ordering::SeqCst);
            while left != 0 {
                let chunk = group * 64 + u64::from(left.trailing_zeros());
                left &= left - 1;
                for word in chunk * CHUNK_WORDS..((chunk + 1) * CHUNK_WORDS).min(words) {
                    let marks = self.marks(word);
                    if marks.load(Ordering::SeqCst) == 0 {
                        continue;
                    }
                    let mut marked = marks.swap(0, Ordering::SeqCst);
                    if word + 1 == words {
                        marked &= self.layout.last_mask();
                    }
                    if let Some(bits) = usize::try_from(word).ok().and_then(|at| bits.get_mut(at)) {
                        *bits |= marked;
                    }
                }
            }
        }
    }

    fn summary(&self, word: u64) -> &AtomicU64 {
        self.word(word * 8)
    }

    fn marks(&self, word: u64) -> &AtomicU64 {
        self.word(self.layout.marks_at() + word * 8)
    }

    /// The word at an offset in bytes, a multiple of 8 below the file's size.
    fn word(&self, offset: u64) -> &AtomicU64 {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        self.region.get_atomic_ref(offset).expect("callers stay within the layout")
    }
}

impl AsFd for DirtyBitmap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
