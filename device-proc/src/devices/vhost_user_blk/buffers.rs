//! Where the data of one request is, as the kernel takes it.
//!
//! With [`uring`](super::uring) this is all the unsafe code of the device: pointers to memory that is
//! kept here as long as they are.

#![expect(unsafe_code, reason = "the kernel is given pointers to guest memory")]

use super::request::Segment;
use super::{Memory, request::Refusal};
use libc::{c_int, iovec};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestMemoryBackend};

/// What a file wants of buffers for direct I/O, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses; a power of two.
    pub(super) address: usize,
    /// Of the length of each buffer.
    pub(super) length: usize,
}

/// Guest memory, or a bounce buffer in its place, in pieces. Empty until it is set.
///
/// What it points to is its own or is kept by it, so it can be given away for as long as the kernel
/// works on it.
#[derive(Default)]
pub(super) struct Buffers {
    /// Each points into a region of `memory`, or all into `bounce`.
    vectors: Vec<iovec>,
    /// How many of `vectors` are used up.
    used: usize,
    /// Bytes in the others.
    left: usize,
    /// Keeps the mappings.
    memory: Option<Arc<Memory>>,
    /// Not moved and not looked at between [`bounce`](Self::bounce) and the end of the I/O.
    bounce: Vec<u8>,
    /// Where in `bounce` the data begins.
    bounce_begin: usize,
}

// SAFETY: the pointers are to shared memory, which is valid in every thread, or to the heap memory of
// `bounce`; both live as long as this and are reached through it alone.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Forgets what it was; keeps the memory of the list for the next time.
    pub(super) fn clear(&mut self) {
        self.vectors.clear();
        self.used = 0;
        self.left = 0;
        self.bounce = Vec::new();
        self.memory = None;
    }

    /// Makes them guest memory, which they keep from now on: this part of the segments.
    ///
    /// # Errors
    ///
    /// If there is no memory at one of the segments.
    pub(super) fn set(
        &mut self,
        memory: &Arc<Memory>,
        data: &[Segment],
        part: Range<usize>,
    ) -> Result<(), Refusal> {
        self.clear();
        for segment in pieces(data, part) {
            for slice in
                GuestMemoryBackend::get_slices(&**memory, segment.addr, segment.len as usize)
            {
                let slice = slice.map_err(|_| Refusal::Memory(segment.addr.0))?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                self.vectors.push(iovec { iov_base, iov_len: slice.len() });
                self.left += slice.len();
            }
        }
        self.memory = Some(Arc::clone(memory));
        Ok(())
    }

    /// Bytes that are not used up.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Takes so many bytes, or what there is, for used up.
    pub(super) fn advance(&mut self, bytes: usize) {
        let mut rest = bytes.min(self.left);
        self.left -= rest;
        while let Some(vector) = self.vectors.get_mut(self.used).filter(|_| rest > 0) {
            if rest < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(rest);
                vector.iov_len -= rest;
                return;
            }
            rest -= vector.iov_len;
            self.used += 1;
        }
    }

    /// Whether all of them are as a file wants them.
    pub(super) fn are_aligned(&self, to: Alignment) -> bool {
        self.vectors().iter().all(|vector| {
            vector.iov_base.addr().is_multiple_of(to.address)
                && vector.iov_len.is_multiple_of(to.length)
        })
    }

    /// Puts one buffer in their place that is as a file wants it, and is all zeros.
    pub(super) fn bounce(&mut self, alignment: Alignment) {
        let len = self.left;
        self.bounce = vec![0; len + alignment.address];
        self.bounce_begin = self.bounce.as_ptr().align_offset(alignment.address);
        self.vectors.clear();
        self.used = 0;
        if let Some(data) = self.bounce.get_mut(self.bounce_begin..self.bounce_begin + len) {
            self.vectors.push(iovec { iov_base: data.as_mut_ptr().cast(), iov_len: len });
        }
    }

    /// Whether [`bounce`](Self::bounce) has put a buffer in their place.
    pub(super) fn is_bounce(&self) -> bool {
        !self.bounce.is_empty()
    }

    /// Copies the part of the segments that these are into the bounce buffer, before the I/O.
    ///
    /// # Errors
    ///
    /// If there is no memory at one of the segments.
    pub(super) fn fill(&mut self, data: &[Segment], part: Range<usize>) -> Result<(), Refusal> {
        let (Some(memory), mut rest) =
            (&self.memory, self.bounce.get_mut(self.bounce_begin..).unwrap_or_default())
        else {
            return Ok(());
        };
        for segment in pieces(data, part) {
            let (now, later) = rest.split_at_mut(rest.len().min(segment.len as usize));
            memory.read_slice(now, segment.addr).map_err(|_| Refusal::Memory(segment.addr.0))?;
            rest = later;
        }
        // The pointer was made before: one of this borrow takes its place.
        let data = self.bounce.get_mut(self.bounce_begin..).unwrap_or_default();
        if let [vector] = self.vectors.as_mut_slice() {
            vector.iov_base = data.as_mut_ptr().cast();
        }
        Ok(())
    }

    /// After the I/O, tells the part of the segments that these are what is in it: copies it from a
    /// bounce buffer, and marks the pages in the log of dirty ones in any case.
    pub(super) fn pour(&self, data: &[Segment], part: Range<usize>) {
        let Some(memory) = &self.memory else { return };
        let bounced = self.is_bounce();
        let mut from = self.bounce.get(self.bounce_begin..).unwrap_or_default();
        for segment in pieces(data, part) {
            let len = segment.len as usize;
            if bounced {
                let (now, later) = from.split_at(from.len().min(len));
                // Checked before; it marks what it writes.
                let _ = memory.write_slice(now, segment.addr);
                from = later;
            } else {
                for slice in GuestMemoryBackend::get_slices(&**memory, segment.addr, len).flatten()
                {
                    slice.bitmap().mark_dirty(0, slice.len());
                }
            }
        }
    }

    /// Fills them from this place of the file, once; how many bytes.
    ///
    /// # Errors
    ///
    /// What `preadv2` says.
    pub(super) fn read(&mut self, file: &File, offset: u64, flags: c_int) -> io::Result<usize> {
        let (from, count) = self.for_system_call();
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: `from` points to `count` vectors, whose memory this keeps and nobody holds
        // references into; the kernel is done with them when the call returns.
        let read = unsafe { libc::preadv2(file.as_raw_fd(), from, count, offset, flags) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes them to this place of the file, once; how many bytes.
    ///
    /// # Errors
    ///
    /// What `pwritev2` says.
    pub(super) fn write(&self, file: &File, offset: u64, flags: c_int) -> io::Result<usize> {
        let (from, count) = self.for_system_call();
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: as for `read`; this only reads the memory.
        let written = unsafe { libc::pwritev2(file.as_raw_fd(), from, count, offset, flags) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Those that are not used up.
    pub(super) fn vectors(&self) -> &[iovec] {
        self.vectors.get(self.used..).unwrap_or_default()
    }

    /// As many as one system call takes.
    fn for_system_call(&self) -> (*const iovec, c_int) {
        let vectors = self.vectors();
        let count = vectors.len().min(MAX_VECTORS);
        (vectors.as_ptr(), c_int::try_from(count).unwrap_or(c_int::MAX))
    }
}

/// What of the segments is in that part of all their bytes.
fn pieces(data: &[Segment], part: Range<usize>) -> impl Iterator<Item = Segment> {
    let (mut skip, mut rest) = (part.start, part.len());
    data.iter().filter_map(move |segment| {
        let before = skip.min(segment.len as usize);
        skip -= before;
        let len = rest.min(segment.len as usize - before);
        rest -= len;
        let addr = segment.addr.checked_add(before as u64)?;
        // No more than the segment has.
        u32::try_from(len).ok().filter(|len| *len > 0).map(|len| Segment { addr, len })
    })
}

/// The most vectors of one system call: `UIO_MAXIOV`.
pub(super) const MAX_VECTORS: usize = 1024;
