//! One submission queue of direct writes. The only unsafe code of this program: the kernel reads
//! the buffers while it carries the writes out.

#![expect(unsafe_code, reason = "the kernel is given pointers to buffers")]

use io_uring::{IoUring, opcode, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What direct I/O wants: aligned to, and a multiple of, the largest sector size in use.
const PAGE: usize = 4096;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

struct Block {
    pages: Vec<Page>,
    /// The kernel reads the pages.
    in_flight: bool,
}

/// Writes to a file of blocks of equal length, at most one to each block at a time.
pub(crate) struct DirectWrites {
    ring: IoUring,
    file: File,
    blocks: Vec<Block>,
    /// Of each block.
    bytes: u32,
}

impl DirectWrites {
    /// Nothing is in flight yet. The file must have been opened with `O_DIRECT`, and `bytes` must
    /// be a multiple of the page size. `proof` is registered with the ring.
    ///
    /// # Errors
    ///
    /// If the kernel gives no ring, or the length does not fit.
    pub(crate) fn new(
        file: File,
        proof: Option<&File>,
        blocks: u32,
        bytes: u32,
    ) -> io::Result<Self> {
        let pages = bytes as usize / PAGE;
        if pages == 0 || pages * PAGE != bytes as usize {
            return Err(invalid(format!("a block of {bytes} bytes is not a number of pages")));
        }
        let ring = IoUring::new(blocks)?;
        if let Some(proof) = proof {
            ring.submitter().register_files(&[proof.as_raw_fd()])?;
        }
        let block = || Block { pages: vec![Page([0; PAGE]); pages], in_flight: false };
        let blocks = (0..blocks).map(|_| block()).collect();
        Ok(Self { ring, file, blocks, bytes })
    }

    /// Puts the stamp at the beginning of each page of the block, and queues a write of it.
    ///
    /// # Errors
    ///
    /// If there is no such block, or one of its writes is in flight.
    pub(crate) fn push(&mut self, number: u32, stamp: u64) -> io::Result<()> {
        let block = self.blocks.get_mut(number as usize);
        let Some(block) = block.filter(|block| !block.in_flight) else {
            return Err(invalid(format!("block {number} cannot be written now")));
        };
        for page in &mut block.pages {
            page.0[..8].copy_from_slice(&stamp.to_le_bytes());
        }
        let from = block.pages.as_ptr().cast::<u8>();
        let entry = opcode::Write::new(types::Fd(self.file.as_raw_fd()), from, self.bytes)
            .offset(u64::from(number) * u64::from(self.bytes))
            .build()
            .user_data(u64::from(number));
        block.in_flight = true;
        // SAFETY: `from` points to `bytes` bytes (`new` sees to it). They are neither changed nor
        // freed while the write is in flight: `in_flight` is reset by its completion only, and
        // `Drop` leaks what is in flight. The fd is open until the ring is gone.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::Error::other("the submission queue is full"))?;
        Ok(())
    }

    /// Hands everything that was queued to the kernel.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub(crate) fn submit(&self) -> io::Result<()> {
        self.ring.submit().map(drop)
    }

    /// As [`submit`](Self::submit), and waits until at least one write is done; the blocks of
    /// those that are.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, or a write failed or was short.
    pub(crate) fn wait(&mut self) -> io::Result<Vec<u32>> {
        self.ring.submit_and_wait(1)?;
        let mut done = Vec::new();
        for completion in self.ring.completion() {
            let written = completion.result();
            if written < 0 {
                return Err(io::Error::from_raw_os_error(-written));
            }
            if u32::try_from(written) != Ok(self.bytes) {
                return Err(io::Error::other(format!("{written} of {} bytes", self.bytes)));
            }
            let number = u32::try_from(completion.user_data()).unwrap_or(u32::MAX);
            if let Some(block) = self.blocks.get_mut(number as usize) {
                block.in_flight = false;
                done.push(number);
            }
        }
        Ok(done)
    }
}

impl Drop for DirectWrites {
    /// The kernel may still read the buffers of writes in flight: they are given up to it.
    fn drop(&mut self) {
        for block in self.blocks.drain(..).filter(|block| block.in_flight) {
            std::mem::forget(block.pages);
        }
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}
