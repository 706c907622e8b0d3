//! Writing a state stream, in one go or in passes.

use super::format::{Chain, DIGEST, HEADER, Header, MORE, OPTIONAL, PIECE, Tag, digest, preamble};
use super::{StreamError, identity, memory_bars, memory_size};
use crate::actor::parts::Parts;
use crate::device::{Device, DeviceError, Pass};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where a state stream goes.
pub(crate) trait Sink: Write {
    /// Fails once nobody wants the stream any more, or its time is up.
    fn still_wanted(&self) -> io::Result<()>;

    /// True if a pass over the memory of a running device is to end early.
    fn ends_pass(&self) -> bool {
        false
    }

    /// True if whoever reads the stream would take it to have ended if nothing came soon.
    fn is_starving(&self) -> bool {
        false
    }
}

/// How much is left to be saved, for whoever asks meanwhile; an estimate.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    unsent: AtomicU64,
    changed: AtomicU64,
}

impl Progress {
    /// Bytes of memory that were not sent once yet.
    pub(crate) fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }

    /// Bytes of memory that had changed, as the last pass has found.
    pub(crate) fn changed(&self) -> u64 {
        self.changed.load(Ordering::Relaxed)
    }
}

/// What was sent of a device's state while it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Running {
    Nothing,
    Sent,
    /// Before a reset: nothing of that counts any more.
    Void,
}

/// A state stream that is being written. After an error it cannot go on: whoever wants the state
/// begins another one.
#[derive(Debug)]
pub(crate) struct Saver {
    /// `None` before the beginning.
    chain: Option<Chain>,
    /// The digests of what was sent of each memory BAR, piece by piece, 0 where nothing was; empty
    /// for a stream of one pass.
    sent: [Vec<u128>; 6],
    running: Running,
    progress: Arc<Progress>,
    /// The record that is being put together.
    record: Vec<u8>,
    /// What follows is not written, as if it were.
    #[cfg(feature = "fault-injection")]
    pub(super) is_cut: bool,
}

impl Saver {
    pub(crate) fn new<D>(parts: &Parts<D>) -> Self {
        let progress = Progress::default();
        let whole = memory_size(parts);
        progress.unsent.store(whole, Ordering::Relaxed);
        Self {
            chain: None,
            sent: Default::default(),
            running: Running::Nothing,
            progress: Arc::new(progress),
            record: Vec::with_capacity(HEADER + PIECE + DIGEST),
            #[cfg(feature = "fault-injection")]
            is_cut: false,
        }
    }

    pub(crate) fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// The device was reset: what it has sent of its own state so far counts no more. (Memory is
    /// compared with what was sent in any case.)
    pub(crate) fn start_over(&mut self) {
        if self.running == Running::Sent {
            self.running = Running::Void;
        }
    }

    /// One pass while the device runs: what was not sent yet, and what has changed since.
    pub(crate) fn pre_copy<D: Device>(
        &mut self,
        parts: &Parts<D>,
        to: &mut impl Sink,
    ) -> Result<(), StreamError> {
        self.begin(parts, to)?;
        self.device_while_running(parts, to)?;
        let mut changed = 0;
        for (bar, memory, size) in memory_bars(parts) {
            let pieces = usize::try_from(size.div_ceil(PIECE as u64)).unwrap_or(usize::MAX);
            self.sent[usize::from(bar)].resize(pieces, 0);
            let Some(some) = self.memory(bar, memory, size, true, to)? else { break };
            changed += some;
        }
        self.progress.changed.store(changed, Ordering::Relaxed);
        to.flush().map_err(StreamError::Write)
    }

    /// All that is left; the device is stopped.
    pub(crate) fn finish<D: Device>(
        mut self,
        parts: &Parts<D>,
        to: &mut impl Sink,
    ) -> Result<(), StreamError> {
        self.begin(parts, to)?;
        // A device with passes saves no more at the end than what its last one has left.
        let passes = parts.migration.pre_copy();
        if self.running == Running::Void || (passes && self.running == Running::Nothing) {
            self.device_while_running(parts, to)?;
        }
        for (bar, memory, size) in memory_bars(parts) {
            self.memory(bar, memory, size, false, to)?;
        }
        let config = parts.config().bytes().to_vec();
        self.small(Tag::CONFIG, &config, to)?;
        if parts.layout.msix.is_some() {
            let msix = parts.msix().clone();
            self.small(Tag::MSIX, &msix, to)?;
        }
        let latched = standstill_protocol::codec::encode_state(&parts.interrupts.latched())
            .map_err(|error| StreamError::Interrupts(error.to_string()))?;
        self.small(Tag::INTERRUPTS, &latched, to)?;
        self.section(Tag::DEVICE, true, to, |section| parts.device.save(section))?;
        let Some(chain) = self.chain else { return Ok(()) };
        self.gather(&chain.to_bytes());
        self.put(Tag::END, 0, 0, to).map_err(StreamError::Write)?;
        to.flush().map_err(StreamError::Write)
    }

    fn begin<D: Device>(
        &mut self,
        parts: &Parts<D>,
        to: &mut impl Sink,
    ) -> Result<(), StreamError> {
        if self.chain.is_some() {
            return Ok(());
        }
        let preamble = preamble();
        to.write_all(&preamble).map_err(StreamError::Write)?;
        self.chain = Some(Chain::new(&preamble));
        let identity = identity(parts);
        self.gather(&identity.to_bytes());
        self.put(Tag::IDENTITY, 0, 0, to).map_err(StreamError::Write)
    }

    /// What the device itself can save while it runs.
    fn device_while_running<D: Device>(
        &mut self,
        parts: &Parts<D>,
        to: &mut impl Sink,
    ) -> Result<(), StreamError> {
        let (pass, tag) = match self.running {
            Running::Sent => (Pass::Later, Tag::RUNNING_LATER),
            Running::Nothing | Running::Void => (Pass::First, Tag::RUNNING_FIRST),
        };
        // If it was to make something void, it is said even if there is nothing new.
        let even_empty = self.running == Running::Void;
        let some =
            self.section(tag, even_empty, to, |section| parts.device.save_running(pass, section))?;
        if some {
            self.running = Running::Sent;
        }
        Ok(())
    }

    /// A BAR's memory, as far as it was not sent as it is now. How many bytes of it had been sent
    /// and have changed; `None` if the pass is to end.
    fn memory(
        &mut self,
        bar: u8,
        memory: &OwnedFd,
        size: u64,
        is_pass: bool,
        to: &mut impl Sink,
    ) -> Result<Option<u64>, StreamError> {
        let failed = |source| StreamError::Memory { bar, source };
        let index = usize::from(bar);
        let mut changed = 0;
        for (piece, at) in (0..size).step_by(PIECE).enumerate() {
            to.still_wanted().map_err(StreamError::Write)?;
            if is_pass && to.ends_pass() {
                return Ok(None);
            }
            let length = usize::try_from(size - at).map_or(PIECE, |rest| rest.min(PIECE));
            self.record.resize(HEADER + length, 0);
            read_all(memory, &mut self.record[HEADER..], at).map_err(failed)?;
            let sum = self.seal(Tag::memory(bar), 0, at);
            let before = self.sent[index].get_mut(piece).map(|sent| std::mem::replace(sent, sum));
            if before == Some(sum) {
                // Where little has changed in a large memory, long nothing is written.
                while !is_pass && to.is_starving() {
                    self.gather(&[0; PIECE]);
                    self.put(Tag::PADDING, OPTIONAL, 0, to).map_err(StreamError::Write)?;
                }
                continue;
            }
            if before.is_some_and(|sum| sum != 0) {
                changed += length as u64;
            } else {
                self.progress.unsent.fetch_sub(length as u64, Ordering::Relaxed);
            }
            self.put_sealed(sum, to).map_err(StreamError::Write)?;
        }
        Ok(Some(changed))
    }

    /// A section of one record.
    fn small(&mut self, tag: Tag, contents: &[u8], to: &mut impl Sink) -> Result<(), StreamError> {
        self.gather(contents);
        self.put(tag, 0, 0, to).map_err(StreamError::Write)
    }

    /// A section that the device writes; false if it is empty and left out therefore.
    fn section(
        &mut self,
        tag: Tag,
        even_empty: bool,
        to: &mut impl Sink,
        fill: impl FnOnce(&mut dyn Write) -> Result<(), DeviceError>,
    ) -> Result<bool, StreamError> {
        self.gather(&[]);
        let mut section = Section { saver: self, to, tag, at: 0, failed: None };
        let filled = fill(&mut section);
        // If the stream failed, that is what went wrong, whatever the device says.
        if let Some(error) = section.failed.take() {
            return Err(StreamError::Write(error));
        }
        filled.map_err(StreamError::Device)?;
        let at = section.at;
        let some = at > 0 || self.record.len() > HEADER || even_empty;
        if some {
            self.put(tag, 0, at, to).map_err(StreamError::Write)?;
        }
        Ok(some)
    }

    /// Begins a record with these contents.
    fn gather(&mut self, contents: &[u8]) {
        self.record.clear();
        self.record.resize(HEADER, 0);
        self.record.extend_from_slice(contents);
    }

    /// Puts its header before the gathered contents; their digest.
    fn seal(&mut self, tag: Tag, flags: u16, at: u64) -> u128 {
        // At most `PIECE` bytes are gathered.
        let length = u32::try_from(self.record.len() - HEADER).unwrap_or(u32::MAX);
        let header = Header { tag, flags, length, at };
        self.record[..HEADER].copy_from_slice(&header.to_bytes());
        digest(&self.record)
    }

    fn put(&mut self, tag: Tag, flags: u16, at: u64, to: &mut impl Sink) -> io::Result<()> {
        let sum = self.seal(tag, flags, at);
        self.put_sealed(sum, to)
    }

    fn put_sealed(&mut self, sum: u128, to: &mut impl Sink) -> io::Result<()> {
        if let Some(chain) = &mut self.chain {
            chain.add(sum);
        }
        self.record.extend_from_slice(&sum.to_le_bytes());
        #[cfg(feature = "fault-injection")]
        if let Some(spoilt) = self.spoil_record(to) {
            return spoilt;
        }
        to.write_all(&self.record)
    }

    #[cfg(feature = "fault-injection")]
    pub(super) fn record(&mut self) -> &mut Vec<u8> {
        &mut self.record
    }
}

/// Gathers what a device writes into records.
struct Section<'a, S> {
    saver: &'a mut Saver,
    to: &'a mut S,
    tag: Tag,
    at: u64,
    failed: Option<io::Error>,
}

impl<S: Sink> Write for Section<'_, S> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if let Some(error) = &self.failed {
            return Err(io::Error::new(error.kind(), error.to_string()));
        }
        let gathered = self.saver.record.len() - HEADER;
        if gathered == PIECE && !data.is_empty() {
            if let Err(error) = self.saver.put(self.tag, MORE, self.at, self.to) {
                let seen = io::Error::new(error.kind(), error.to_string());
                self.failed = Some(error);
                return Err(seen);
            }
            self.at += PIECE as u64;
            self.saver.gather(&[]);
        }
        let length = data.len().min(PIECE + HEADER - self.saver.record.len());
        self.saver.record.extend_from_slice(&data[..length]);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read_all(memory: &OwnedFd, mut data: &mut [u8], mut at: u64) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::pread(memory, &mut *data, at) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                data = &mut data[length..];
                at += length as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
