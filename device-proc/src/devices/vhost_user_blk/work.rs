//! One request, from its beginning to its answer.

#![forbid(unsafe_code)]

use super::Memory;
use super::buffers::Buffers;
use super::image::{self, Image};
use super::request::{Operation, Pieces, Refusal, Request, Status, Unanswerable};
use super::uring::{Completion, Ring};
use super::window::Sequence;
use crate::vhost_user::Popped;
use rustix::fs::FallocateFlags;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::Bytes;

/// How the disk is to be worked on now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mode {
    /// What is written is stable before it is answered.
    pub(super) write_through: bool,
}

impl Mode {
    /// For a system call that reads or writes.
    fn flags(self, writes: bool) -> i32 {
        if self.write_through && writes { libc::RWF_DSYNC } else { 0 }
    }
}

/// How a piece of the data is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The best way.
    Any,
    /// A call that is waited for.
    Waiting,
}

/// What works on a request.
pub(super) struct Means<'a> {
    pub(super) image: &'a Image,
    /// Without one all I/O waits for its end.
    pub(super) ring: Option<&'a mut Ring>,
    /// What get-id requests are answered with.
    pub(super) serial: &'a [u8; SERIAL],
    pub(super) mode: Mode,
}

/// The longest bounce buffer in bytes, unless a block is longer: what is longer goes through it piece by
/// piece, so that a guest cannot make the device take memory as it likes.
const BOUNCE: usize = 256 << 10;

/// Length of a serial number in bytes.
pub(super) const SERIAL: usize = 20;

/// A request that was taken out of its ring.
pub(super) struct Work {
    /// The index of its first descriptor.
    pub(super) head: u16,
    /// Dropped when the guest was told.
    pub(super) popped: Popped,
    /// All of guest memory, as it was then.
    pub(super) memory: Arc<Memory>,
    pub(super) request: Result<Request, Unanswerable>,
    pub(super) pieces: Pieces,
    /// Where the data is; given away while the kernel works on them.
    pub(super) buffers: Buffers,
    /// What of the data is in them, in bytes; all of what is before was moved.
    pub(super) part: Range<usize>,
    pub(super) stage: Stage,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its delay is not over.
    New,
    /// Data is read or written.
    Data,
    /// The range with this number is discarded or zeroed.
    Range(usize),
    /// What it has written is made stable.
    Syncing,
}

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It goes on when the kernel is done with something.
    Goes,
    /// It is over.
    Over(Status),
}

impl Work {
    /// What the used ring is to say: how much was written.
    pub(super) fn used_len(&self) -> u32 {
        self.request.as_ref().map_or(0, |request| request.writable)
    }

    /// Begins what it asks for.
    pub(super) fn begin(&mut self, sequence: Sequence, means: &mut Means<'_>) -> Step {
        match self.try_begin(sequence, means) {
            Ok(step) => step,
            Err(error) => failed(&error),
        }
    }

    /// Goes on after the kernel has done something for it.
    pub(super) fn go_on(&mut self, completion: Completion, means: &mut Means<'_>) -> Step {
        let Completion { sequence, result, buffers } = completion;
        if self.stage == Stage::Data {
            self.buffers = buffers;
        }
        let next = match self.stage {
            // However the delay ended.
            Stage::New => self.try_begin(sequence, means),
            Stage::Data => match result {
                Ok(bytes) if bytes > 0 => {
                    self.buffers.advance(bytes);
                    self.transfer(sequence, means)
                }
                Err(error) if is_interrupted(&error) => self.transfer(sequence, means),
                failed => {
                    // A kernel that has no thread for it gives up what another call would have done: it is
                    // tried once more, and waited for. What fails then has failed.
                    tracing::warn!(?failed, "a request is tried once more, without io_uring");
                    self.go_on_moving(By::Waiting, sequence, means)
                }
            },
            Stage::Range(index) => match result {
                Ok(_) => self.range(index + 1, sequence, means),
                Err(error) if is_interrupted(&error) => self.range(index, sequence, means),
                Err(error) => self
                    .range_otherwise(index, error, means)
                    .and_then(|()| self.range(index + 1, sequence, means)),
            },
            Stage::Syncing => result.map(|_| Step::Over(Status::Ok)),
        };
        next.unwrap_or_else(|error| failed(&error))
    }

    /// Writes the answer to guest memory. The used ring is not touched.
    pub(super) fn conclude(&mut self, status: Status) {
        let Ok(request) = &self.request else { return };
        if matches!(request.what, Ok(Operation::Read { .. })) && self.stage == Stage::Data {
            // Also of a read that failed half-way: nobody knows what is in memory then.
            self.buffers.pour(&self.pieces.data, self.part.clone());
        }
        // It was there when the request was parsed, and is kept since.
        let _ = self.memory.write_obj(status.byte(), request.status);
    }

    fn try_begin(&mut self, sequence: Sequence, means: &mut Means<'_>) -> io::Result<Step> {
        let what = match &self.request {
            Ok(request) => request.what,
            Err(_) => return Ok(Step::Over(Status::IoError)),
        };
        match what {
            Err(refusal) => Ok(Step::Over(refusal.status())),
            Ok(Operation::Read { len, .. } | Operation::Write { len, .. }) => {
                self.take_buffers(0..len as usize, means).map_err(io::Error::other)?;
                self.stage = Stage::Data;
                self.transfer(sequence, means)
            }
            Ok(Operation::Flush) => self.sync(sequence, means),
            Ok(Operation::GetId) => {
                self.tell_serial(means.serial).map_err(io::Error::other)?;
                Ok(Step::Over(Status::Ok))
            }
            Ok(Operation::Discard | Operation::WriteZeroes) => self.range(0, sequence, means),
        }
    }

    /// Guest memory itself, or a bounce buffer where that cannot be: for this part of the data, or the
    /// beginning of it.
    fn take_buffers(&mut self, mut part: Range<usize>, means: &Means<'_>) -> Result<(), Refusal> {
        let data = &self.pieces.data;
        self.buffers.set(&self.memory, data, part.clone())?;
        if let Some(alignment) = means.image.direct
            && !self.buffers.are_aligned(alignment)
        {
            let blocks = (BOUNCE / alignment.length).max(1);
            part.end = part.end.min(part.start + blocks * alignment.length);
            self.buffers.set(&self.memory, data, part.clone())?;
            self.buffers.bounce(alignment);
            if matches!(self.operation(), Some(Operation::Write { .. })) {
                self.buffers.fill(&self.pieces.data, part.clone())?;
            }
        }
        self.part = part;
        Ok(())
    }

    /// What was behind the part that is moved; false if nothing was.
    fn take_next(&mut self, len: usize, reads: bool, means: &Means<'_>) -> Result<bool, Refusal> {
        let begin = self.part.end;
        if begin >= len {
            return Ok(false);
        }
        if reads {
            self.buffers.pour(&self.pieces.data, self.part.clone());
        }
        self.take_buffers(begin..len, means)?;
        Ok(true)
    }

    fn operation(&self) -> Option<Operation> {
        self.request.as_ref().ok()?.what.ok()
    }

    /// Reads or writes what is left to be.
    fn transfer(&mut self, sequence: Sequence, means: &mut Means<'_>) -> io::Result<Step> {
        self.go_on_moving(By::Any, sequence, means)
    }

    /// The same; `next` is how the next piece is moved.
    fn go_on_moving(
        &mut self,
        mut next: By,
        sequence: Sequence,
        means: &mut Means<'_>,
    ) -> io::Result<Step> {
        let (begin, len, writes) = match self.operation() {
            Some(Operation::Read { offset, len }) => (offset, len, false),
            Some(Operation::Write { offset, len }) => (offset, len, true),
            _ => return Ok(Step::Over(Status::IoError)),
        };
        loop {
            if self.buffers.left() == 0
                && !self.take_next(len as usize, !writes, means).map_err(io::Error::other)?
            {
                return Ok(Step::Over(Status::Ok));
            }
            let done = self.part.end.saturating_sub(self.buffers.left());
            let offset = begin + done as u64;
            let moved = match std::mem::replace(&mut next, By::Any) {
                By::Any => self.at_once(offset, writes, means),
                By::Waiting => {
                    Some(self.move_data(offset, writes, means.mode.flags(writes), means.image))
                }
            };
            let moved = match moved {
                Some(moved) => moved,
                None => {
                    let Some(ring) = means.ring.as_deref_mut() else {
                        return Err(io::ErrorKind::Unsupported.into());
                    };
                    let buffers = std::mem::take(&mut self.buffers);
                    let stable = means.mode.write_through;
                    if writes {
                        ring.write(sequence, offset, stable, buffers)?;
                    } else {
                        ring.read(sequence, offset, buffers)?;
                    }
                    return Ok(Step::Goes);
                }
            };
            match moved {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => self.buffers.advance(bytes),
                Err(error) if is_interrupted(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads or writes now and here, if that is the best way; `None` if not.
    ///
    /// From and to the page cache it is: to hand a request to the kernel takes longer than to copy
    /// what is there. Where data is not in the page cache the ring waits for it.
    fn at_once(
        &mut self,
        offset: u64,
        writes: bool,
        means: &Means<'_>,
    ) -> Option<io::Result<usize>> {
        let image = means.image;
        let stable = means.mode.flags(writes);
        if means.ring.is_none() {
            return Some(self.move_data(offset, writes, stable, image));
        }
        if image.direct.is_some() || stable != 0 {
            return None;
        }
        let without_waiting =
            if writes { &image.writes_without_waiting } else { &image.reads_without_waiting };
        if image::is_set(without_waiting) {
            match self.move_data(offset, writes, libc::RWF_NOWAIT, image) {
                // The end of the file is not where anything is asked for.
                Ok(0) => return None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    image::clear(without_waiting);
                }
                result => return Some(result),
            }
        }
        // A file system that cannot promise not to wait. Its reads go to the ring. Its writes seldom
        // wait, but would go to a thread of the kernel each.
        writes.then(|| self.move_data(offset, writes, 0, image))
    }

    fn move_data(
        &mut self,
        offset: u64,
        writes: bool,
        flags: i32,
        image: &Image,
    ) -> io::Result<usize> {
        if writes {
            self.buffers.write(&image.file, offset, flags)
        } else {
            self.buffers.read(&image.file, offset, flags)
        }
    }

    /// Discards or zeroes the ranges from this one on.
    fn range(
        &mut self,
        mut index: usize,
        sequence: Sequence,
        means: &mut Means<'_>,
    ) -> io::Result<Step> {
        while let Some(range) = self.pieces.ranges.get(index).copied() {
            self.stage = Stage::Range(index);
            let mode = self.allocation(range.unmap);
            if let Some(ring) = means.ring.as_deref_mut() {
                ring.allocate(sequence, mode.bits().cast_signed(), range)?;
                return Ok(Step::Goes);
            }
            match means.image.allocate(mode, range) {
                Err(error) if is_interrupted(&error) => continue,
                Err(error) => self.range_otherwise(index, error, means)?,
                Ok(()) => {}
            }
            index += 1;
        }
        if means.mode.write_through && self.operation() == Some(Operation::WriteZeroes) {
            return self.sync(sequence, means);
        }
        Ok(Step::Over(Status::Ok))
    }

    fn allocation(&self, unmap: bool) -> FallocateFlags {
        let discards = unmap || self.operation() == Some(Operation::Discard);
        let how = if discards { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        how | FallocateFlags::KEEP_SIZE
    }

    /// Does with a range what `fallocate` has failed to do. That a file system cannot give blocks back
    /// is no reason to fail: a discard is a hint. EINVAL says so of a block device, if its blocks are
    /// larger than what a range was cut to.
    fn range_otherwise(&self, index: usize, error: io::Error, means: &Means<'_>) -> io::Result<()> {
        if !matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) {
            return Err(error);
        }
        match (self.operation(), self.pieces.ranges.get(index)) {
            (Some(Operation::WriteZeroes), Some(range)) => means.image.write_zeros(*range),
            _ => Ok(()),
        }
    }

    fn sync(&mut self, sequence: Sequence, means: &mut Means<'_>) -> io::Result<Step> {
        self.stage = Stage::Syncing;
        if let Some(ring) = means.ring.as_deref_mut() {
            ring.sync(sequence)?;
            return Ok(Step::Goes);
        }
        means.image.sync()?;
        Ok(Step::Over(Status::Ok))
    }

    fn tell_serial(&self, serial: &[u8; SERIAL]) -> Result<(), Refusal> {
        let mut rest = &serial[..];
        for segment in &self.pieces.data {
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            self.memory
                .write_slice(now, segment.addr)
                .map_err(|_| Refusal::Memory(segment.addr.0))?;
            rest = later;
        }
        Ok(())
    }
}

fn is_interrupted(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
}

fn failed(error: &io::Error) -> Step {
    tracing::warn!(%error, "a request has failed");
    Step::Over(Status::IoError)
}
