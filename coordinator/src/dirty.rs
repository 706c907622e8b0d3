//! Which pages of guest RAM the device processes write, for a VMM that copies RAM while they run.
//!
//! ```no_run
//! # async fn example(machine: standstill_coordinator::Machine, ram: std::fs::File)
//! #     -> Result<(), Box<dyn std::error::Error>> {
//! use standstill_coordinator::dirty::DirtyOptions;
//!
//! machine.declare_ram(&ram).await?;
//! let mut tracking = machine.start_dirty_tracking(DirtyOptions::new(4096)).await?;
//! // Copy all of RAM; then, over and over, what was written meanwhile:
//! for file in tracking.collect()?.files {
//!     for range in file.ranges() {
//!         // … copy these bytes of the file
//!     }
//! }
//! let stopped = machine.pause().await?;
//! // Nothing is written any more: this is the rest.
//! let rest = tracking.collect()?;
//! # drop((stopped, rest));
//! # Ok(())
//! # }
//! ```
//!
//! `docs/memory.md` has the whole contract. In short: from the return of
//! [`start_dirty_tracking`](crate::Machine::start_dirty_tracking) on every write of a device process
//! to declared RAM is in the next [`collect`](DirtyTracking::collect) after its end, or already in
//! the present one. A device that was lost may have written what it did not mark any more: all RAM
//! counts as written then, until its end is proven and told once. Writes of the VMM itself (vCPUs,
//! local devices) are its own affair.

use crate::coordinator::{Message, Request};
use crate::error::MachineError;
use crate::mailbox::Mailbox;
use rustix::fs::fstat;
use standstill_protocol::dirty::{DirtyBitmap, DirtyBitmapError, Layout, LayoutError};
use standstill_protocol::message::{FileIdentity, Term};
use standstill_protocol::transition::ParticipantId;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;
use tokio::sync::oneshot;

#[cfg(test)]
mod tests;

/// How the pages that are written are to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyOptions {
    pub(crate) page_size: u64,
    pub(crate) untracked: Untracked,
}

/// What to do about a device that cannot tell what it writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Untracked {
    /// Tracking is not started, with an error that names it; nor is such a device let in later.
    #[default]
    Refuse,
    /// All RAM counts as written, each time, as long as it is there.
    AllDirty,
}

impl DirtyOptions {
    /// For pages of that size in bytes: a power of two from 4 KiB to 1 GiB.
    #[must_use]
    pub fn new(page_size: u64) -> Self {
        Self { page_size, untracked: Untracked::default() }
    }

    /// What to do about a device that cannot tell what it writes; refused by default.
    #[must_use]
    pub fn untracked(mut self, untracked: Untracked) -> Self {
        self.untracked = untracked;
        self
    }
}

/// Why writes are not tracked, or not told.
#[derive(Debug, Error)]
pub enum DirtyError {
    /// They are tracked already.
    #[error("writes to RAM are tracked already")]
    AlreadyOn,
    /// Such pages, or such RAM, cannot be tracked.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A bitmap cannot be made.
    #[error(transparent)]
    Bitmap(#[from] DirtyBitmapError),
    /// These devices cannot tell what they write.
    #[error("{} cannot tell which pages of RAM they write", names(.0))]
    Untracked(Vec<String>),
    /// A file of RAM has another size than when its tracking began.
    #[error("a file of RAM had {expected:#x} bytes when its tracking began and has {found:#x} now")]
    Resized {
        /// Its size then, in bytes.
        expected: u64,
        /// Its size now, in bytes.
        found: u64,
    },
    /// The size of a file of RAM cannot be read.
    #[error("the size of a file of RAM cannot be read")]
    Io(#[source] io::Error),
    /// Another coordinator has the machine: what its devices write is not told here any more, and
    /// what was collected so far is not the whole.
    #[error(
        "another coordinator with the higher term {0} has the machine, writes are not tracked any more"
    )]
    Superseded(Term),
    /// The machine was shut down, its tracking was stopped, or this is a fork of the process that has
    /// it.
    #[error("writes to RAM are not tracked any more")]
    Ended,
}

fn names(devices: &[String]) -> String {
    let quoted: Vec<_> = devices.iter().map(|device| format!("{device:?}")).collect();
    quoted.join(", ")
}

/// What was written since the last [`collect`](DirtyTracking::collect).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyReport {
    /// Every tracked file of RAM, in the order in which they were declared.
    pub files: Vec<DirtyFile>,
    /// The devices because of which all RAM counts as written: they were lost, are just joining, or
    /// cannot tell.
    pub presumed: Vec<String>,
}

impl DirtyReport {
    /// How many pages of all files are dirty.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.files.iter().map(DirtyFile::dirty_pages).sum()
    }

    /// The part that is about the file behind this fd; `None` if it is not tracked.
    ///
    /// # Errors
    ///
    /// What `fstat` says.
    pub fn of(&self, ram: impl AsFd) -> io::Result<Option<&DirtyFile>> {
        let (file, _) = identity(ram)?;
        Ok(self.files.iter().find(|dirty| dirty.file == file))
    }
}

/// Which pages of one file of RAM were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyFile {
    /// The file.
    pub file: FileIdentity,
    /// Size of a page, in bytes.
    pub page_size: u64,
    /// The file's size, in bytes.
    pub size: u64,
    /// Bit `n % 64` of word `n / 64` is set if page `n` was written.
    pub bitmap: Vec<u64>,
}

impl DirtyFile {
    /// Whether that page was written.
    #[must_use]
    pub fn is_dirty(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|word| self.bitmap.get(word));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// How many pages were written.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// What was written, as ranges of bytes of the file: in order, apart from each other, and ending
    /// where the file does.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let end = self.size.div_ceil(self.page_size);
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next(at, end, true)?;
            at = self.next(first, end, false).unwrap_or(end);
            Some(first * self.page_size..(at * self.page_size).min(self.size))
        })
    }

    /// The first page from there on that is dirty, or is not.
    fn next(&self, mut page: u64, end: u64, dirty: bool) -> Option<u64> {
        while page < end {
            let word = self.bitmap.get(usize::try_from(page / 64).ok()?)?;
            let word = if dirty { *word } else { !word };
            match word >> (page % 64) {
                0 => page = (page / 64 + 1) * 64,
                rest => {
                    page += u64::from(rest.trailing_zeros());
                    return (page < end).then_some(page);
                }
            }
        }
        None
    }
}

/// Writes to RAM are tracked as long as this lives; see the [module](self).
#[derive(Debug)]
#[must_use = "tracking ends when it is dropped"]
pub struct DirtyTracking {
    actor: Mailbox,
    registry: Arc<Registry>,
    stopped: bool,
}

impl DirtyTracking {
    pub(crate) fn new(actor: Mailbox, registry: Arc<Registry>) -> Self {
        Self { actor, registry, stopped: false }
    }

    /// What was written since the last call, or since tracking began. Each mark is told once. Asks
    /// no device: it reads memory that they share with this process, and can be called from any
    /// thread, also while a transition is under way. After a [`pause`](crate::Machine::pause) that
    /// has succeeded it is complete: nothing more is written until the machine is resumed.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Resized`] and [`DirtyError::Io`], no mark was taken then;
    /// [`DirtyError::Superseded`] and [`DirtyError::Ended`]: tracking is over, and a copy of RAM that
    /// depends on it has to begin anew.
    pub fn collect(&mut self) -> Result<DirtyReport, DirtyError> {
        self.registry.collect()
    }

    /// Ends the tracking; returns when the devices have been told.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] or [`MachineError::Superseded`]: it had ended already.
    pub async fn stop(mut self) -> Result<(), MachineError> {
        self.stopped = true;
        let (reply, answer) = oneshot::channel();
        let request = Request::StopDirtyTracking(Arc::clone(&self.registry), Some(reply));
        self.actor.cast(Message::Request(request)).map_err(|_| MachineError::Gone)?;
        answer.await.map_err(|_| MachineError::Gone)?
    }
}

impl Drop for DirtyTracking {
    fn drop(&mut self) {
        if !self.stopped {
            let request = Request::StopDirtyTracking(Arc::clone(&self.registry), None);
            // A coordinator that is gone tracks nothing.
            let _ = self.actor.cast(Message::Request(request));
        }
    }
}

/// How far the marks of a device process can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marks {
    /// Not at all: it cannot make any.
    Never,
    /// Not yet: it has not begun to.
    NotYet,
    /// It makes them.
    All,
    /// It was lost, and may still write.
    Lost,
    /// It was lost and is gone; what it wrote last may have no marks.
    Gone,
    /// It has left in STOP: its marks are complete, and no more will come.
    Complete,
}

/// Where the marks of all devices are. The coordinator says who is there, whoever collects asks no
/// one.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) options: DirtyOptions,
    /// The process that it is for. A fork of it would take away marks that are meant for this one.
    process: u32,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    files: Vec<TrackedFile>,
    devices: Vec<TrackedDevice>,
    /// Why nothing is told any more.
    ended: Option<Ended>,
}

#[derive(Clone, Copy, Debug)]
enum Ended {
    Stopped,
    Superseded(Term),
}

#[derive(Debug)]
struct TrackedFile {
    file: FileIdentity,
    size: u64,
    layout: Layout,
    /// Kept, to look at its size.
    ram: OwnedFd,
}

#[derive(Debug)]
struct TrackedDevice {
    id: ParticipantId,
    name: String,
    marks: Marks,
    bitmaps: Vec<(FileIdentity, Arc<DirtyBitmap>)>,
}

/// Which file an fd is open on, and its size in bytes.
pub(crate) fn identity(file: impl AsFd) -> io::Result<(FileIdentity, u64)> {
    let stat = fstat(file)?;
    let identity = FileIdentity { device: stat.st_dev, inode: stat.st_ino };
    Ok((identity, u64::try_from(stat.st_size).unwrap_or(0)))
}

impl Registry {
    pub(crate) fn new(options: DirtyOptions) -> Self {
        Self { options, process: std::process::id(), inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another file of RAM, unless it is there already.
    pub(crate) fn add_file(&self, ram: impl AsFd) -> Result<(), DirtyError> {
        let (file, size) = identity(&ram).map_err(DirtyError::Io)?;
        let layout = Layout::new(self.options.page_size, size)?;
        let ram = ram.as_fd().try_clone_to_owned().map_err(DirtyError::Io)?;
        let mut inner = self.inner();
        if !inner.files.iter().any(|known| known.file == file) {
            inner.files.push(TrackedFile { file, size, layout, ram });
        }
        Ok(())
    }

    /// Another device process. If it can mark what it writes at all, nothing is known of that until
    /// it [can be relied on](Self::relied_on).
    pub(crate) fn add_device(&self, id: ParticipantId, name: &str, marks: bool) {
        let name = name.to_owned();
        let marks = if marks { Marks::NotYet } else { Marks::Never };
        let device = TrackedDevice { id, name, marks, bitmaps: Vec::new() };
        self.inner().devices.push(device);
    }

    /// The bitmap of that device for that file; a file that is declared again has the same one.
    pub(crate) fn add_bitmap(
        &self,
        id: ParticipantId,
        file: FileIdentity,
    ) -> Result<Arc<DirtyBitmap>, DirtyError> {
        let mut inner = self.inner();
        let Inner { files, devices, .. } = &mut *inner;
        let mut device = devices.iter_mut().find(|device| device.id == id);
        let known = device.as_ref().and_then(|device| {
            device.bitmaps.iter().find(|(of, _)| *of == file).map(|(_, bitmap)| bitmap)
        });
        if let Some(bitmap) = known {
            return Ok(Arc::clone(bitmap));
        }
        let layout = files.iter().find(|known| known.file == file).map(|file| file.layout);
        let bitmap = Arc::new(DirtyBitmap::create(layout.ok_or(DirtyError::Ended)?)?);
        if let Some(device) = &mut device {
            device.bitmaps.push((file, Arc::clone(&bitmap)));
        }
        Ok(bitmap)
    }

    /// From now on a device marks whatever it writes.
    pub(crate) fn relied_on(&self, id: ParticipantId) {
        self.change(id, |marks| match marks {
            Marks::NotYet => Marks::All,
            other => other,
        });
    }

    /// A device is lost. `stood` if it is known to have stood still.
    pub(crate) fn lost(&self, id: ParticipantId, stood: bool) {
        self.change(id, |marks| match marks {
            Marks::All if stood => Marks::Complete,
            Marks::Never | Marks::NotYet | Marks::All => Marks::Lost,
            other => other,
        });
    }

    /// A device's process is proven gone.
    pub(crate) fn gone(&self, id: ParticipantId, stood: bool) {
        self.change(id, |marks| match marks {
            Marks::All if stood => Marks::Complete,
            Marks::Never | Marks::NotYet | Marks::All | Marks::Lost => Marks::Gone,
            other => other,
        });
    }

    fn change(&self, id: ParticipantId, to: impl Fn(Marks) -> Marks) {
        let mut inner = self.inner();
        if let Some(device) = inner.devices.iter_mut().find(|device| device.id == id) {
            device.marks = to(device.marks);
        }
    }

    pub(crate) fn end(&self) {
        self.inner().ended.get_or_insert(Ended::Stopped);
    }

    pub(crate) fn superseded(&self, term: Term) {
        self.inner().ended.get_or_insert(Ended::Superseded(term));
    }

    fn collect(&self) -> Result<DirtyReport, DirtyError> {
        if self.process != std::process::id() {
            return Err(DirtyError::Ended);
        }
        let mut inner = self.inner();
        match inner.ended {
            Some(Ended::Stopped) => return Err(DirtyError::Ended),
            Some(Ended::Superseded(term)) => return Err(DirtyError::Superseded(term)),
            None => {}
        }
        for file in &inner.files {
            let (_, found) = identity(&file.ram).map_err(DirtyError::Io)?;
            if found != file.size {
                return Err(DirtyError::Resized { expected: file.size, found });
            }
        }
        let mut presumed = Vec::new();
        let mut bitmaps = Vec::new();
        inner.devices.retain(|device| {
            if !matches!(device.marks, Marks::All | Marks::Complete) {
                presumed.push(device.name.clone());
            }
            bitmaps.extend(device.bitmaps.iter().cloned());
            // What is told of these is told now.
            !matches!(device.marks, Marks::Gone | Marks::Complete)
        });
        let mut files: Vec<_> = inner
            .files
            .iter()
            .map(|&TrackedFile { file, size, layout, .. }| {
                let page_size = layout.page_size();
                (layout, DirtyFile { file, page_size, size, bitmap: vec![0; layout.words()] })
            })
            .collect();
        // The coordinator does not wait for what may take a while.
        drop(inner);
        for (of, bitmap) in &bitmaps {
            if let Some((_, file)) = files.iter_mut().find(|(_, file)| file.file == *of) {
                bitmap.take(&mut file.bitmap);
            }
        }
        if !presumed.is_empty() {
            for (layout, file) in &mut files {
                fill(*layout, &mut file.bitmap);
            }
        }
        let files = files.into_iter().map(|(_, file)| file).collect();
        Ok(DirtyReport { files, presumed })
    }
}

/// Sets the bits of all pages.
fn fill(layout: Layout, bitmap: &mut [u64]) {
    bitmap.fill(u64::MAX);
    let odd = layout.pages() % 64;
    if let Some(last) = bitmap.last_mut().filter(|_| odd != 0) {
        *last = (1 << odd) - 1;
    }
}
