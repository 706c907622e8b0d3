//! Requests to the kernel that finish some time later, by `io_uring`.
//!
//! A [`Ring`] owns the buffers of what is in flight and gives them back with the result, so the
//! kernel never works on memory that somebody else has. Its fd can be polled: it is readable as long
//! as there are results.

#![expect(unsafe_code, reason = "the kernel is given pointers to buffers")]

use super::buffers::{Buffers, MAX_VECTORS};
use super::request::Range;
use super::window::Sequence;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Requests that are handed over at once.
const ENTRIES: u32 = 256;
/// Results that the kernel keeps without effort: as many as a ring of the largest size has requests.
const RESULTS: u32 = 1024;

/// What has finished.
pub(super) struct Completion {
    /// What the request was given with.
    pub(super) sequence: Sequence,
    /// What the system call of that kind returns.
    pub(super) result: io::Result<usize>,
    /// What the request was given; empty if that was none.
    pub(super) buffers: Buffers,
}

/// A pair of rings shared with the kernel, for one file.
pub(super) struct Ring {
    ring: IoUring,
    file: Arc<File>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// How long [`wait`](Self::wait) takes; the kernel reads it from here.
    delay: Box<types::Timespec>,
    /// Requests that the kernel was not told of yet.
    queued: bool,
}

#[derive(Default)]
struct Slot {
    sequence: Sequence,
    buffers: Buffers,
    in_flight: bool,
}

impl Ring {
    /// Makes one for a file. `delay` is how long a [`wait`](Self::wait) takes. The kernel has `proof`
    /// open as long as a request is in flight, also after the process has ended.
    ///
    /// # Errors
    ///
    /// If the kernel gives none (ENOSYS, EPERM), or none that has all that is needed.
    pub(super) fn new(file: Arc<File>, delay: Duration, proof: Option<&File>) -> io::Result<Self> {
        // Results come while this thread is in the kernel anyway, not by an interruption.
        let build = |cooperative| {
            let mut builder = IoUring::builder();
            builder.dontfork().setup_clamp().setup_cqsize(RESULTS);
            if cooperative {
                builder.setup_coop_taskrun();
            }
            builder.build(ENTRIES)
        };
        let ring = match build(true) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => build(false),
            built => built,
        }?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::Timeout::CODE,
        ];
        if !ring.params().is_feature_nodrop()
            || !needed.iter().all(|code| probe.is_supported(*code))
        {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is too old",
            ));
        }
        if let Some(proof) = proof {
            ring.submitter().register_files(&[proof.as_raw_fd()])?;
        }
        let delay = types::Timespec::new().sec(delay.as_secs()).nsec(delay.subsec_nanos());
        Ok(Self {
            ring,
            file,
            slots: Vec::new(),
            free: Vec::new(),
            delay: Box::new(delay),
            queued: false,
        })
    }

    /// Fills buffers from a place of the file.
    ///
    /// # Errors
    ///
    /// As for all of these: if the kernel takes no request now. The buffers are lost then.
    pub(super) fn read(
        &mut self,
        sequence: Sequence,
        offset: u64,
        buffers: Buffers,
    ) -> io::Result<()> {
        let file = types::Fd(self.file.as_raw_fd());
        self.push(sequence, buffers, |buffers| {
            let vectors = buffers.vectors();
            opcode::Readv::new(file, vectors.as_ptr(), count(vectors.len())).offset(offset).build()
        })
    }

    /// Writes buffers to a place of the file; with `stable`, so that they outlive a loss of power.
    pub(super) fn write(
        &mut self,
        sequence: Sequence,
        offset: u64,
        stable: bool,
        buffers: Buffers,
    ) -> io::Result<()> {
        let file = types::Fd(self.file.as_raw_fd());
        let flags = if stable { libc::RWF_DSYNC } else { 0 };
        self.push(sequence, buffers, |buffers| {
            let vectors = buffers.vectors();
            let write = opcode::Writev::new(file, vectors.as_ptr(), count(vectors.len()));
            write.offset(offset).rw_flags(flags).build()
        })
    }

    /// Makes stable what was written.
    pub(super) fn sync(&mut self, sequence: Sequence) -> io::Result<()> {
        let file = types::Fd(self.file.as_raw_fd());
        let flags = types::FsyncFlags::DATASYNC;
        self.push(sequence, Buffers::default(), |_| opcode::Fsync::new(file).flags(flags).build())
    }

    /// `fallocate`.
    pub(super) fn allocate(
        &mut self,
        sequence: Sequence,
        mode: i32,
        range: Range,
    ) -> io::Result<()> {
        let file = types::Fd(self.file.as_raw_fd());
        self.push(sequence, Buffers::default(), |_| {
            opcode::Fallocate::new(file, range.len).offset(range.offset).mode(mode).build()
        })
    }

    /// Does nothing for as long as was said at the beginning.
    pub(super) fn wait(&mut self, sequence: Sequence) -> io::Result<()> {
        let delay: *const types::Timespec = &*self.delay;
        self.push(sequence, Buffers::default(), |_| opcode::Timeout::new(delay).build())
    }

    /// Tells the kernel of what was put in.
    ///
    /// # Errors
    ///
    /// If the kernel does not take all of it now: it has no memory, or too many results that were
    /// not looked at. What it did not take stays, and can be submitted again.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.queued {
            match self.ring.submit() {
                Ok(_) => self.queued = !self.ring.submission().is_empty(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next result, if there is one now.
    pub(super) fn next_completion(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        let index = usize::try_from(entry.user_data()).ok()?;
        let slot = self.slots.get_mut(index).filter(|slot| slot.in_flight)?;
        slot.in_flight = false;
        self.free.push(index);
        let result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
        Some(Completion {
            sequence: slot.sequence,
            result,
            buffers: std::mem::take(&mut slot.buffers),
        })
    }

    fn push(
        &mut self,
        sequence: Sequence,
        buffers: Buffers,
        entry: impl FnOnce(&Buffers) -> squeue::Entry,
    ) -> io::Result<()> {
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let entry = entry(&buffers).user_data(index as u64);
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        *slot = Slot { sequence, buffers, in_flight: true };
        // SAFETY: what the entry points to is the slot's buffers, whose memory does not move with
        // them, or `delay`. Neither is changed or freed before the result is there: `next_completion`
        // gives them back, and `drop` leaks what is in flight. The file is open as long as the ring.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            slot.in_flight = false;
            self.free.push(index);
            return Err(io::Error::other("the submission queue is full"));
        }
        self.queued = true;
        Ok(())
    }
}

fn count(vectors: usize) -> u32 {
    u32::try_from(vectors.min(MAX_VECTORS)).unwrap_or(u32::MAX)
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as the ring, which is borrowed as long as this is used.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Ring {
    /// The kernel may still work on the buffers of what is in flight: they are given up to it.
    fn drop(&mut self) {
        let in_flight = self.slots.drain(..).filter(|slot| slot.in_flight);
        let mut delayed = false;
        for slot in in_flight {
            std::mem::forget(slot.buffers);
            delayed = true;
        }
        if delayed {
            std::mem::forget(std::mem::replace(&mut self.delay, Box::new(types::Timespec::new())));
        }
    }
}
