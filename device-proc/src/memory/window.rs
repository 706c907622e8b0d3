//! One DMA window: a range of IOVAs, what may be done with it, and the memory behind it.

#![forbid(unsafe_code)]

use super::WindowClass;
use super::advise::exclude_from_core_dump;
use super::log::PageLog;
use crate::gate::InFlight;
use rustix::fs::{FileType, Stat, fstat};
use standstill_protocol::message::FileIdentity;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// What `fstat` says about a file that is to be mapped.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileFacts {
    pub(super) id: FileIdentity,
    pub(super) size: u64,
    /// Other files have no size that a mapping could be checked against.
    pub(super) is_regular: bool,
}

impl FileFacts {
    pub(super) fn of(fd: impl AsFd) -> io::Result<Self> {
        let stat: Stat = fstat(fd)?;
        Ok(Self {
            id: FileIdentity { device: stat.st_dev, inode: stat.st_ino },
            size: u64::try_from(stat.st_size).unwrap_or(0),
            is_regular: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
        })
    }
}

/// Where a window lies and what the client allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSpec {
    /// First IOVA; a multiple of [`PAGE`](super::PAGE).
    pub iova: u64,
    /// Size in bytes; a multiple of [`PAGE`](super::PAGE), not 0.
    pub size: u64,
    /// Where in the file it begins; a multiple of [`PAGE`](super::PAGE), 0 without a file.
    pub offset: u64,
    /// Whether the device may read it.
    pub readable: bool,
    /// Whether the device may write it.
    pub writable: bool,
}

impl WindowSpec {
    /// The last IOVA; the map has checked that it exists.
    pub(super) fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }
}

/// A mapped window. It stays mapped as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) spec: WindowSpec,
    /// The file behind it; `None` for a window without fd.
    pub(super) file: Option<FileIdentity>,
    region: Option<MmapRegion>,
    /// Where the window begins in the region, in bytes: huge pages are mapped as a whole.
    begin: usize,
    /// Set when its file was declared RAM, never cleared.
    ram: AtomicBool,
    /// Who uses it; closed while it is being unmapped.
    pub(super) users: InFlight,
    /// Which pages were written; there while the client logs them.
    log: RwLock<Option<PageLog>>,
}

impl Window {
    /// A window without memory: only messages reach it.
    pub(super) fn without_file(spec: WindowSpec) -> Self {
        Self {
            spec,
            file: None,
            region: None,
            begin: 0,
            ram: AtomicBool::new(false),
            users: InFlight::new(),
            log: RwLock::default(),
        }
    }

    /// Maps the file. The caller has checked the spec against the file's size.
    pub(super) fn of_file(
        spec: WindowSpec,
        file: Arc<File>,
        id: FileIdentity,
        ram: bool,
    ) -> io::Result<Self> {
        let page = page_size(&file)?;
        let before = spec.offset % page;
        let size =
            spec.size.checked_add(before).and_then(|size| size.checked_next_multiple_of(page));
        let size = size.and_then(|size| usize::try_from(size).ok());
        let size = size.ok_or(io::ErrorKind::InvalidInput)?;
        // Less than a page.
        let begin = usize::try_from(before).map_err(|_| io::ErrorKind::InvalidInput)?;
        let protection = Protection { readable: spec.readable, writable: spec.writable };
        let place = FileOffset::from_arc(file, spec.offset - before);
        let region = map_shared(place, size, protection)?;
        Ok(Self {
            spec,
            file: Some(id),
            region: Some(region),
            begin,
            ram: AtomicBool::new(ram),
            users: InFlight::new(),
            log: RwLock::default(),
        })
    }

    pub(super) fn class(&self) -> WindowClass {
        if self.ram.load(Ordering::Acquire) { WindowClass::Ram } else { WindowClass::Peer }
    }

    pub(super) fn declare_ram(&self) {
        self.ram.store(true, Ordering::Release);
    }

    pub(super) fn log(&self) -> RwLockReadGuard<'_, Option<PageLog>> {
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn log_mut(&self) -> RwLockWriteGuard<'_, Option<PageLog>> {
        self.log.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks what was written, if the client logs it: offset in the window and length, in bytes.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        if let Some(log) = &*self.log() {
            log.mark(self.spec.iova + offset, len);
        }
    }

    /// Whether its memory is mapped, and not asked for by messages.
    pub(super) fn is_mapped(&self) -> bool {
        self.region.is_some()
    }

    /// Memory of the window, from `offset` on, which is inside; `None` if it is not mapped.
    pub(super) fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.region.as_ref()?.get_slice(self.begin.checked_add(offset)?, len).ok()
    }
}

/// The unit in which a file is mapped, in bytes: the page, or the huge page of a file in hugetlbfs. There
/// the kernel refuses an offset that is no multiple of it, and maps no less.
fn page_size(file: &File) -> io::Result<u64> {
    /// `HUGETLBFS_MAGIC` of `linux/magic.h`.
    const HUGETLBFS: i64 = 0x9584_58f6;
    let system = rustix::fs::fstatfs(file)?;
    let page = u64::try_from(system.f_bsize).ok().filter(|page| page.is_power_of_two());
    Ok(page.filter(|_| system.f_type == HUGETLBFS).unwrap_or(super::PAGE))
}

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protection {
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// Maps a file shared, and keeps it out of core dumps.
pub(super) fn map_shared(
    file: FileOffset,
    size: usize,
    protection: Protection,
) -> io::Result<MmapRegion> {
    use nix::libc::{MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE};

    let read = if protection.readable { PROT_READ } else { 0 };
    let write = if protection.writable { PROT_WRITE } else { 0 };
    let region = MmapRegion::build(Some(file), size, read | write, MAP_SHARED | MAP_NORESERVE)
        .map_err(|error| match error {
            vm_memory::mmap::MmapRegionError::Mmap(error) => error,
            other => io::Error::other(other),
        })?;
    exclude_from_core_dump(&region)?;
    Ok(region)
}
