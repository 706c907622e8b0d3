//! The IOVA map: which DMA windows the client has given to the device, and what is behind them.
//! All DMA passes here, and here passes the [gate](crate::gate).
//!
//! The runtime owns a [`MemoryMap`] and keeps it as the client says ([`MemoryMap::map`],
//! [`MemoryMap::unmap`]) and as the coordinator says ([`MemoryMap::declare_ram`],
//! [`MemoryMap::revoke`]). The device has a [`Dma`] and opens an [`Access`] for each transaction:
//!
//! ```
//! # use standstill_device_proc::memory::{Dma, DmaError, Span};
//! fn copy(dma: &Dma, from: u64, to: u64, len: u64) -> Result<(), DmaError> {
//!     let access = dma.access(&[Span::read(from, len), Span::write(to, len)])?;
//!     access.copy(0, 1)
//! }
//! ```
//!
//! **RAM or peer.** A window is RAM only if its file was declared to be RAM; all others count as
//! peers' memory, windows without a file included. A declaration after the mapping counts too.
//! No window ever becomes a peer's again.
//!
//! **Tracked writes.** A bitmap can be attached to a file ([`MemoryMap::track_ram`]); transactions
//! mark in it what they have written. The client, too, can have the pages logged that are written in
//! its windows ([`MemoryMap::start_log`]).
//!
//! **Windows without a file** are read and written by messages to the client, as long as it is
//! [connected](MemoryMap::connect), and never inside an access handler: see [`MessageDma`].
//!
//! The rules of `DMA_MAP` and `DMA_UNMAP` are those of the vfio-user specification; where it
//! leaves a choice (exact repeats, unmapping parts) those of libvfio-user.

#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "madvise is unsafe; this module does nothing else")]
mod advise;
mod dirty;
mod dma;
mod log;
mod message;
mod revoke;
mod share;
mod shared;
mod span;
mod window;

pub use dma::{Access, Dma};
pub use log::{
    LogError, LogRange, MAX_LOG_PAGE, MAX_LOG_PAGES, MAX_REPORT_PAGES, MIN_LOG_PAGE, Report,
    UnmapReportError,
};
pub use message::{Handling, MESSAGE_PATIENCE, MessageDma, MessageError, MessageLink, Patience};
pub use revoke::RevokeError;
pub use shared::{MAX_SHARED_MEMORY, SharedAccessError, SharedMemory, SharedMemoryError};
pub use span::{AccessKind, DmaError, MAX_SPANS, Span};
pub use standstill_protocol::message::MAX_RAM_FILES;
pub use window::WindowSpec;

use crate::gate::Gate;
use dirty::DirtyLogs;
use log::ClientLog;
use message::Messages;
use nix::libc;
use standstill_protocol::dirty::{DirtyBitmap, DirtyBitmapError, Layout, LayoutError};
use standstill_protocol::message::FileIdentity;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};
use std::time::{Duration, Instant};
use thiserror::Error;
use window::{FileFacts, Window};

/// Granularity of windows in bytes; what `pgsizes` of the vfio-user version exchange promises.
pub const PAGE: u64 = 4096;
/// The most windows at a time. With a file there may be fewer: [`MemoryMap::most_with_file`].
pub const MAX_WINDOWS: usize = 65_535;
/// The most bytes in all mapped windows together: 16 TiB. Windows without a file count not.
pub const MAX_MAPPED: u64 = 1 << 44;

/// What a window's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WindowClass {
    /// Guest RAM, declared by the coordinator.
    Ram,
    /// Everything else.
    Peer,
}

/// What a successful [`MemoryMap::map`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// There is a new window.
    New,
    /// The same window was there already; nothing has changed.
    Repeated,
}

/// A window could not be mapped.
#[derive(Debug, Error)]
pub enum MapError {
    /// Size 0, an address that is not a multiple of [`PAGE`], or an end beyond 64 bits.
    #[error("DMA window {spec:x?}: not aligned to {PAGE:#x}, empty, or beyond the address space")]
    BadRange {
        /// What was asked for.
        spec: WindowSpec,
    },
    /// It overlaps a window without being the same.
    #[error("DMA window {spec:x?} overlaps {present:x?}")]
    Overlap {
        /// What was asked for.
        spec: WindowSpec,
        /// What is there.
        present: WindowSpec,
    },
    /// The file ends before the window does.
    #[error("DMA window {spec:x?} ends beyond its file of {file_size:#x} bytes")]
    BeyondFile {
        /// What was asked for.
        spec: WindowSpec,
        /// The file's size, in bytes.
        file_size: u64,
    },
    /// The fd is no regular file or memfd, so that nobody knows where it ends.
    #[error("DMA window {spec:x?}: its fd is no regular file")]
    NotRegular {
        /// What was asked for.
        spec: WindowSpec,
    },
    /// There are [`MAX_WINDOWS`] windows, or [`MAX_MAPPED`] bytes in those with a file, or as many of
    /// those as there may be.
    #[error(
        "DMA window {spec:x?}: more than {MAX_WINDOWS} windows, or {most_with_file} with a file, \
        or {MAX_MAPPED:#x} bytes in those"
    )]
    TooMany {
        /// What was asked for.
        spec: WindowSpec,
        /// The most windows with a file.
        most_with_file: usize,
    },
    /// The client logs what is written, and this window cannot be logged.
    #[error("DMA window {spec:x?} cannot be logged")]
    Log {
        /// What was asked for.
        spec: WindowSpec,
        /// Why.
        #[source]
        source: LogError,
    },
    /// The file could not be mapped.
    #[error("DMA window {spec:x?} could not be mapped")]
    Io {
        /// What was asked for.
        spec: WindowSpec,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl MapError {
    /// What to answer the client.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::BadRange { .. } | Self::BeyondFile { .. } | Self::NotRegular { .. } => {
                libc::EINVAL
            }
            Self::Overlap { .. } => libc::EEXIST,
            Self::TooMany { .. } => libc::ENOSPC,
            Self::Log { source, .. } => source.errno(),
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// A window could not be unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UnmapError {
    /// No window has exactly that range.
    #[error("no DMA window at {iova:#x} with {size:#x} bytes")]
    Unknown {
        /// First IOVA.
        iova: u64,
        /// Size, in bytes.
        size: u64,
    },
    /// It was still in use at the end.
    #[error("{accesses} accesses still use the DMA window at {iova:#x} after {waited:?}")]
    Busy {
        /// First IOVA.
        iova: u64,
        /// How many.
        accesses: u64,
        /// How long was waited.
        waited: Duration,
    },
}

impl UnmapError {
    /// What to answer the client.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Unknown { .. } => libc::ENOENT,
            Self::Busy { .. } => libc::EBUSY,
        }
    }
}

/// A file could not be declared RAM.
#[derive(Debug, Error)]
pub enum DeclareError {
    /// There are [`MAX_RAM_FILES`] already.
    #[error("more than {MAX_RAM_FILES} files declared RAM")]
    TooMany,
    /// The file says nothing about itself.
    #[error("the identity of a file declared RAM cannot be read")]
    Io(#[source] io::Error),
    /// Its pages cannot be tracked.
    #[error("a file declared RAM cannot be tracked: {0}")]
    Layout(#[from] LayoutError),
    /// What came to mark them in cannot be used.
    #[error(transparent)]
    Bitmap(#[from] DirtyBitmapError),
}

/// A file of RAM whose writes are tracked, and where they are marked.
#[derive(Clone, Debug)]
pub struct Tracked {
    /// The file.
    pub file: FileIdentity,
    /// The marks.
    pub bitmap: Arc<DirtyBitmap>,
}

/// The IOVA map of one device. Clones are the same map.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    shared: Arc<Shared>,
}

/// What the map and the device's handles have in common.
#[derive(Debug)]
struct Shared {
    gate: Arc<Gate>,
    /// By IOVA, without overlap. Held for the length of a look-up or of the insertion of one
    /// element, never across a system call: so a look-up waits only while the map changes.
    windows: RwLock<Vec<Arc<Window>>>,
    /// Serialises changes; taken before `windows`.
    changes: Mutex<Changes>,
    /// Where transactions mark what they have written.
    dirty: DirtyLogs,
    /// Whom to ask for what lies in windows without a file.
    messages: Messages,
    /// The most windows with a file.
    most_with_file: AtomicUsize,
}

#[derive(Debug, Default)]
struct Changes {
    /// Kept open, so that a file's identity cannot be given to another.
    ram: Vec<(FileIdentity, OwnedFd)>,
    /// Open files behind windows, so that many windows of one file need one fd.
    files: HashMap<(FileIdentity, bool), Weak<File>>,
    /// Windows with a file, and the bytes in them.
    with_file: usize,
    mapped: u64,
    /// A window that the device could write is gone, and its file was not RAM then.
    lost_sight: bool,
    /// There while the client logs.
    log: Option<ClientLog>,
}

impl MemoryMap {
    /// An empty map whose accesses pass this gate.
    #[must_use]
    pub fn new(gate: Arc<Gate>) -> Self {
        let shared = Shared {
            gate,
            windows: RwLock::default(),
            changes: Mutex::default(),
            dirty: DirtyLogs::default(),
            messages: Messages::default(),
            most_with_file: AtomicUsize::new(share::most_with_file(1)),
        };
        Self { shared: Arc::new(shared) }
    }

    /// What a device gets.
    #[must_use]
    pub fn dma(&self) -> Dma {
        Dma::new(Arc::clone(&self.shared))
    }

    /// The gate that accesses pass.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.shared.gate
    }

    /// Adds a window, with the file behind it if there is one. An exact repeat (same range, same
    /// rights, same file) is accepted and changes nothing.
    ///
    /// A regular file that its owner shrinks afterwards kills this process at the next access, as
    /// it does any program that maps it; sealed memfds cannot shrink.
    ///
    /// # Errors
    ///
    /// [`MapError`]; nothing has changed then.
    pub fn map(&self, spec: WindowSpec, file: Option<OwnedFd>) -> Result<Mapped, MapError> {
        check_range(&spec)?;
        let io_error = |source| MapError::Io { spec, source };
        let facts = match &file {
            Some(fd) => {
                let facts = FileFacts::of(fd).map_err(io_error)?;
                check_file(&spec, &facts)?;
                Some(facts)
            }
            None if spec.offset != 0 => return Err(MapError::BadRange { spec }),
            None => None,
        };

        let mut changes = self.shared.changes();
        let place = match self.place_for(&spec) {
            Ok(place) => place,
            Err(present) => {
                let same = present.spec == spec
                    && present.file == facts.map(|facts| facts.id)
                    && !present.users.is_closed();
                return if same {
                    Ok(Mapped::Repeated)
                } else {
                    Err(MapError::Overlap { spec, present: present.spec })
                };
            }
        };
        let (count, size) = if facts.is_some() { (1, spec.size) } else { (0, 0) };
        let (with_file, mapped) = (changes.with_file + count, changes.mapped.saturating_add(size));
        let most_with_file = self.most_with_file();
        let windows = self.shared.windows().len();
        if mapped > MAX_MAPPED
            || windows >= MAX_WINDOWS
            || (count > 0 && with_file > most_with_file)
        {
            return Err(MapError::TooMany { spec, most_with_file });
        }
        let window = match (file, facts) {
            (Some(fd), Some(facts)) => {
                let ram = changes.is_ram(facts.id);
                let file = changes.file(facts.id, spec.writable, fd);
                let made = Window::of_file(spec, file, facts.id, ram);
                made.inspect_err(|_| changes.forget_files()).map_err(io_error)?
            }
            _ => Window::without_file(spec),
        };
        if let Some(log) = &mut changes.log {
            let added = log.add(&window);
            if let Err(source) = added {
                drop(window);
                changes.forget_files();
                return Err(MapError::Log { spec, source });
            }
        }
        (changes.with_file, changes.mapped) = (with_file, mapped);
        // Nobody else changes the windows while this holds `changes`, so the place still holds.
        self.shared.windows_mut().insert(place, Arc::new(window));
        Ok(Mapped::New)
    }

    /// Removes the window with exactly this range, when nobody uses it any more. Blocks the
    /// calling OS thread until then, at most that long; no new access to it begins meanwhile.
    ///
    /// # Errors
    ///
    /// [`UnmapError`]; the window is there and can be used as before.
    pub fn unmap(&self, iova: u64, size: u64, timeout: Duration) -> Result<(), UnmapError> {
        let window = self.drain(iova, size, timeout)?;
        self.remove(&[window]);
        Ok(())
    }

    /// Closes the window with exactly this range and waits until nobody uses it any more.
    fn drain(&self, iova: u64, size: u64, timeout: Duration) -> Result<Arc<Window>, UnmapError> {
        let unknown = UnmapError::Unknown { iova, size };
        let window = self
            .shared
            .window_at(iova)
            .filter(|window| window.spec.iova == iova && window.spec.size == size)
            .ok_or(unknown)?;
        // Who closes it, removes it: of two that unmap the same window one finds it closed.
        if !window.users.close() {
            return Err(unknown);
        }
        self.shared.messages.look_again();
        // It stays in the table meanwhile, so that nothing else can be mapped over it.
        if !window.users.drained_within(timeout) {
            let accesses = window.users.in_flight();
            window.users.open();
            return Err(UnmapError::Busy { iova, accesses, waited: timeout });
        }
        Ok(window)
    }

    /// Removes all windows: the client has gone. Blocks the calling OS thread until nobody uses
    /// them any more, at most that long. Declarations of RAM stay.
    ///
    /// # Errors
    ///
    /// [`UnmapError::Busy`] for the first one that was still in use at the end. It is removed
    /// all the same; its memory stays mapped until that use ends.
    pub fn unmap_all(&self, timeout: Duration) -> Result<(), UnmapError> {
        let all = self.shared.windows().clone();
        let (_, result) = self.shared.close_all(&all, timeout);
        self.remove(&all);
        result
    }

    /// Removes all windows, or none: the client wants it, and may go on using them if it cannot be.
    /// Blocks as [`unmap_all`](Self::unmap_all) does.
    ///
    /// # Errors
    ///
    /// [`UnmapError::Busy`] for the first one that was still in use at the end; all are open then.
    pub fn unmap_all_or_none(&self, timeout: Duration) -> Result<(), UnmapError> {
        let all = self.shared.windows().clone();
        let (closed, result) = self.shared.close_all(&all, timeout);
        match result {
            Ok(()) => self.remove(&all),
            Err(_) => {
                for window in closed {
                    // Nobody else opens what is closed here.
                    let _ = window.users.open();
                }
            }
        }
        result
    }

    /// Declares a file to be guest RAM. Windows that it is behind are RAM from now on, those to
    /// come too. The fd is kept open. A repeat changes nothing.
    ///
    /// # Errors
    ///
    /// [`DeclareError`]; nothing has changed then.
    pub fn declare_ram(&self, file: OwnedFd) -> Result<(), DeclareError> {
        let id = FileFacts::of(&file).map_err(DeclareError::Io)?.id;
        self.add_ram(&mut self.shared.changes(), id, file).map(|_| ())
    }

    /// Declares a file to be guest RAM as [`declare_ram`](Self::declare_ram) does, and has every
    /// later write to it marked, in pages of `page_size` bytes, in the bitmap that is behind the
    /// second fd. If the file was not RAM before, whatever may have been written to it is marked at
    /// once.
    ///
    /// A transaction that is in flight now may end without a mark: wait until those have
    /// [passed](Gate::passed).
    ///
    /// # Errors
    ///
    /// [`DeclareError`]; nothing has changed then.
    pub fn track_ram(
        &self,
        file: OwnedFd,
        bitmap: OwnedFd,
        page_size: u64,
    ) -> Result<Tracked, DeclareError> {
        let facts = FileFacts::of(&file).map_err(DeclareError::Io)?;
        let layout = Layout::new(page_size, facts.size)?;
        let bitmap = Arc::new(DirtyBitmap::from_fd(bitmap, layout)?);
        let mut changes = self.shared.changes();
        let is_new = self.add_ram(&mut changes, facts.id, file)?;
        self.shared.dirty.attach(facts.id, Arc::clone(&bitmap));
        if is_new {
            let may_have_written =
                |window: &&Arc<Window>| window.file == Some(facts.id) && window.spec.writable;
            for window in self.shared.windows().iter().filter(may_have_written) {
                bitmap.mark(window.spec.offset, window.spec.size);
            }
            if changes.lost_sight {
                bitmap.mark_all();
            }
        }
        Ok(Tracked { file: facts.id, bitmap })
    }

    /// Ends the tracking of a file in this bitmap. The file stays RAM.
    pub fn untrack(&self, tracked: &Tracked) {
        self.shared.dirty.detach(&tracked.bitmap);
    }

    /// Adds a file to the RAM; whether it is new there.
    fn add_ram(
        &self,
        changes: &mut Changes,
        id: FileIdentity,
        file: OwnedFd,
    ) -> Result<bool, DeclareError> {
        if changes.is_ram(id) {
            return Ok(false);
        }
        if changes.ram.len() >= MAX_RAM_FILES {
            return Err(DeclareError::TooMany);
        }
        changes.ram.push((id, file));
        for window in self.shared.windows().iter().filter(|window| window.file == Some(id)) {
            window.declare_ram();
        }
        Ok(true)
    }

    /// Whether a file was declared RAM.
    pub(crate) fn is_declared(&self, file: FileIdentity) -> bool {
        self.shared.changes().is_ram(file)
    }

    /// The file behind the window that contains this address, if it has one, and what it is.
    pub(crate) fn behind(&self, iova: u64) -> Option<(Option<FileIdentity>, WindowClass)> {
        let window = self.shared.window_at(iova)?;
        Some((window.file, window.class()))
    }

    /// The most windows with a file at a time: as many as leave enough of the process's mappings
    /// (`vm.max_map_count`) for everything else. What `max_dma_maps` promises.
    #[must_use]
    pub fn most_with_file(&self) -> usize {
        self.shared.most_with_file.load(Ordering::Relaxed)
    }

    /// Each window with a file takes so many mappings of this process, not one alone.
    pub(crate) fn set_mappings_each(&self, mappings: usize) {
        self.shared.most_with_file.store(share::most_with_file(mappings), Ordering::Relaxed);
    }

    /// Fewer than there may be, so that a test reaches them.
    #[cfg(test)]
    pub(crate) fn set_most_with_file(&self, most: usize) {
        self.shared.most_with_file.store(most, Ordering::Relaxed);
    }

    /// How many windows there are.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.shared.windows().len()
    }

    /// Where a window with this range belongs, or a window that it would overlap.
    fn place_for(&self, spec: &WindowSpec) -> Result<usize, Arc<Window>> {
        let windows = self.shared.windows();
        let place = windows.partition_point(|window| window.spec.last() < spec.iova);
        match windows.get(place) {
            Some(next) if next.spec.iova <= spec.last() => Err(Arc::clone(next)),
            _ => Ok(place),
        }
    }

    /// Takes windows out of the table; `gone` is sorted by IOVA, as the table is.
    fn remove(&self, gone: &[Arc<Window>]) {
        let is_gone = |window: &Arc<Window>| {
            gone.binary_search_by_key(&window.spec.iova, |gone| gone.spec.iova)
                .is_ok_and(|at| gone.get(at).is_some_and(|gone| Arc::ptr_eq(gone, window)))
        };
        let mut changes = self.shared.changes();
        if let Some(log) = &mut changes.log {
            gone.iter().for_each(|window| log.remove(window));
        }
        let (mut with_file, mut bytes, mut lost_sight) = (0, 0, false);
        self.shared.windows_mut().retain(|window| {
            let gone = is_gone(window);
            if gone && window.file.is_some() {
                with_file += 1;
                bytes += window.spec.size;
                lost_sight |= window.spec.writable && window.class() == WindowClass::Peer;
            }
            !gone
        });
        changes.lost_sight |= lost_sight;
        changes.with_file = changes.with_file.saturating_sub(with_file);
        changes.mapped = changes.mapped.saturating_sub(bytes);
        changes.forget_files();
    }
}

impl Shared {
    fn windows(&self) -> RwLockReadGuard<'_, Vec<Arc<Window>>> {
        self.windows.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn windows_mut(&self) -> RwLockWriteGuard<'_, Vec<Arc<Window>>> {
        self.windows.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes windows and waits for their users; says which ones nobody else had closed.
    fn close_all<'a>(
        &self,
        all: &'a [Arc<Window>],
        timeout: Duration,
    ) -> (Vec<&'a Arc<Window>>, Result<(), UnmapError>) {
        let begin = Instant::now();
        let closed = all.iter().filter(|window| window.users.close()).collect();
        self.messages.look_again();
        let mut result = Ok(());
        for window in all {
            let rest = timeout.saturating_sub(begin.elapsed());
            if !window.users.drained_within(rest) && result.is_ok() {
                let (iova, accesses) = (window.spec.iova, window.users.in_flight());
                result = Err(UnmapError::Busy { iova, accesses, waited: timeout });
            }
        }
        (closed, result)
    }

    /// The windows that have an address in this range.
    fn windows_in(&self, first: u64, last: u64) -> Vec<Arc<Window>> {
        let windows = self.windows();
        let place = windows.partition_point(|window| window.spec.last() < first);
        let from = windows.get(place..).unwrap_or_default();
        from.iter().take_while(|window| window.spec.iova <= last).cloned().collect()
    }

    /// The window that contains this address.
    fn window_at(&self, iova: u64) -> Option<Arc<Window>> {
        let windows = self.windows();
        let place = windows.partition_point(|window| window.spec.last() < iova);
        windows.get(place).filter(|window| window.spec.iova <= iova).cloned()
    }
}

impl Changes {
    fn is_ram(&self, id: FileIdentity) -> bool {
        self.ram.iter().any(|(ram, _)| *ram == id)
    }

    /// The open file to map: one that other windows use already, or this one.
    fn file(&mut self, id: FileIdentity, writable: bool, fd: OwnedFd) -> Arc<File> {
        if let Some(file) = self.files.get(&(id, writable)).and_then(Weak::upgrade) {
            return file;
        }
        let file = Arc::new(File::from(fd));
        self.files.insert((id, writable), Arc::downgrade(&file));
        file
    }

    /// Forgets files that no window uses.
    fn forget_files(&mut self) {
        self.files.retain(|_, file| file.strong_count() > 0);
    }
}

fn check_range(spec: &WindowSpec) -> Result<(), MapError> {
    let aligned = [spec.iova, spec.size, spec.offset].iter().all(|at| at.is_multiple_of(PAGE));
    let has_end = spec.size != 0 && spec.iova.checked_add(spec.size - 1).is_some();
    if aligned && has_end { Ok(()) } else { Err(MapError::BadRange { spec: *spec }) }
}

fn check_file(spec: &WindowSpec, facts: &FileFacts) -> Result<(), MapError> {
    if !facts.is_regular {
        return Err(MapError::NotRegular { spec: *spec });
    }
    match spec.offset.checked_add(spec.size) {
        Some(end) if end <= facts.size => Ok(()),
        _ => Err(MapError::BeyondFile { spec: *spec, file_size: facts.size }),
    }
}

#[cfg(test)]
mod tests;
