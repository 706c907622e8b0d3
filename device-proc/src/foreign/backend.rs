//! The backend behind its lock: what comes from the transport and what comes from the lifecycle.

use super::layout::Layout;
use super::raw::RawDevice;
use crate::device::{AccessError, Device, DeviceError};
use crate::interrupt::{
    ACTION_MASK, ACTION_TRIGGER, ACTION_UNMASK, DATA_EVENTFD, DATA_NONE, Interrupts, IrqOperation,
    IrqRequest, Selection, SetIrqs, validate,
};
use crate::memory::{Mapped, MemoryMap, WindowClass, WindowSpec};
use rustix::io::Errno;
use standstill_protocol::message::FileIdentity;
use standstill_vfio_user::wire::{
    IrqInfo, PCI_CONFIG_REGION, PCI_IRQS, REGION_READABLE, REGION_WRITABLE, RegionInfo,
};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend};

/// The hooks of [`Quiesce`](super::Quiesce), for those that have them.
pub(super) struct QuiesceHooks<B> {
    pub(super) quiesce: fn(&mut B) -> io::Result<()>,
    pub(super) resume: fn(&mut B) -> io::Result<()>,
}

/// The hooks of [`SaveState`](super::SaveState), for those that have them.
pub(super) struct StateHooks<B> {
    pub(super) save: fn(&mut B, &mut dyn Write) -> io::Result<()>,
    pub(super) load: fn(&mut B, &mut dyn Read) -> io::Result<()>,
}

/// A window that the client has mapped.
struct Window {
    spec: WindowSpec,
    file: Option<FileIdentity>,
    /// What the backend was not told of yet, since it is not RAM.
    withheld: Option<File>,
}

/// A backend and what it was told.
pub(super) struct Inner<B> {
    /// Whoever calls it has this lock: it acts in nobody's absence.
    backend: Mutex<B>,
    layout: Layout,
    ram_only: bool,
    /// By first IOVA. Locked before the backend.
    windows: Mutex<BTreeMap<u64, Window>>,
    /// Checks what the client maps, and knows what is RAM; nothing is reached through it.
    memory: MemoryMap,
    /// Checks what the client installs, and fires for it; the backend has eventfds of its own.
    interrupts: Interrupts,
    /// Interrupt indexes of which the backend was given eventfds, a bit for each.
    installed: AtomicU8,
}

impl<B> fmt::Debug for Inner<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// The number of an error of the backend.
fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(match error.kind() {
        ErrorKind::InvalidInput => Errno::INVAL,
        ErrorKind::Unsupported => Errno::OPNOTSUPP,
        _ => Errno::IO,
    })
}

/// Hands an error of the backend on.
fn told(result: io::Result<()>, what: &'static str) -> Result<(), Errno> {
    result.map_err(|error| {
        tracing::debug!(%error, what, "refused by the backend");
        errno(&error)
    })
}

/// An access to the configuration space in the pieces that a processor makes: 1, 2 or 4 bytes,
/// aligned. Backends may rely on that.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let (begin, left) = (offset + at as u64, length - at);
        let width = [4, 2, 1]
            .into_iter()
            .find(|width| *width <= left && begin.is_multiple_of(*width as u64))?;
        let range = at..at + width;
        at += width;
        Some((begin, range))
    })
}

impl<B: ServerBackend> Inner<B> {
    pub(super) fn new(
        backend: B,
        layout: Layout,
        memory: MemoryMap,
        interrupts: Interrupts,
        ram_only: bool,
    ) -> Self {
        // The backend maps what it is told of, too.
        memory.set_mappings_each(2);
        Self {
            backend: Mutex::new(backend),
            layout,
            ram_only,
            windows: Mutex::default(),
            memory,
            interrupts,
            installed: AtomicU8::new(0),
        }
    }

    /// A panic has ended the process.
    fn backend(&self) -> MutexGuard<'_, B> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn windows(&self) -> MutexGuard<'_, BTreeMap<u64, Window>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the backend of a window.
    fn give(&self, spec: &WindowSpec, file: Option<File>) -> io::Result<()> {
        let mut flags = DmaMapFlags::empty();
        flags.set(DmaMapFlags::READ, spec.readable);
        flags.set(DmaMapFlags::WRITE, spec.writable);
        self.backend().dma_map(flags, spec.offset, spec.iova, spec.size, file)
    }

    /// Has the backend give a window back that it was told of.
    fn take_back(&self, window: &Window) -> Result<(), Errno> {
        if window.withheld.is_some() {
            return Ok(());
        }
        let WindowSpec { iova, size, .. } = window.spec;
        told(self.backend().dma_unmap(DmaUnmapFlags::empty(), iova, size), "dma_unmap")
    }

    /// Takes a window out of the map; nobody uses it there.
    fn forget(&self, spec: &WindowSpec) {
        if let Err(error) = self.memory.unmap(spec.iova, spec.size, Duration::ZERO) {
            tracing::warn!(%error, "a window of the backend");
        }
    }

    fn check(&self, region: u32, wanted: u32) -> Result<(), Errno> {
        let (flags, _) = self.layout.flags_and_size(region);
        if flags & wanted == 0 { Err(Errno::INVAL) } else { Ok(()) }
    }

    fn irqs(
        &self,
        index: u32,
        flags: u32,
        range: &Range<u32>,
        fds: Vec<File>,
    ) -> Result<(), Errno> {
        let count = range.end - range.start;
        told(self.backend().set_irqs(index, flags, range.start, count, fds), "set_irqs")
    }

    /// Mask or unmask: a request that names some of a range by its data becomes one for each.
    fn irqs_selected(
        &self,
        index: u32,
        action: u32,
        range: &Range<u32>,
        selected: Selection,
        data: &[u8],
    ) -> Result<(), Errno> {
        if selected == Selection::All {
            return self.irqs(index, DATA_NONE | action, range, Vec::new());
        }
        let named = range.clone().zip(data).filter(|(_, byte)| **byte != 0);
        named
            .map(|(at, _)| at)
            .try_for_each(|at| self.irqs(index, DATA_NONE | action, &(at..at + 1), Vec::new()))
    }

    fn disable(&self, index: u32) -> Result<(), Errno> {
        self.installed.fetch_and(!(1 << index), Ordering::Relaxed);
        self.irqs(index, DATA_NONE | ACTION_TRIGGER, &(0..0), Vec::new())
    }
}

impl<B: ServerBackend + Send> RawDevice for Inner<B> {
    fn region(&self, index: u32) -> RegionInfo {
        self.layout.region(index)
    }

    fn region_size(&self, index: u32) -> u64 {
        self.layout.flags_and_size(index).1
    }

    fn region_memory(&self, index: u32) -> Option<BorrowedFd<'_>> {
        self.layout.region_memory(index)
    }

    fn memory_files(&self) -> Vec<FileIdentity> {
        self.layout.memory_files()
    }

    fn irq(&self, index: u32) -> IrqInfo {
        self.layout.irq(index)
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.check(region, REGION_READABLE)?;
        let mut backend = self.backend();
        if region != PCI_CONFIG_REGION {
            return told(backend.region_read(region, offset, data), "region_read");
        }
        pieces(offset, data.len()).try_for_each(|(at, range)| {
            let data = data.get_mut(range).unwrap_or_default();
            told(backend.region_read(region, at, data), "region_read")
        })
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check(region, REGION_WRITABLE)?;
        let mut backend = self.backend();
        if region != PCI_CONFIG_REGION {
            return told(backend.region_write(region, offset, data), "region_write");
        }
        pieces(offset, data.len()).try_for_each(|(at, range)| {
            let data = data.get(range).unwrap_or_default();
            told(backend.region_write(region, at, data), "region_write")
        })
    }

    fn map(&self, spec: WindowSpec, fd: Option<OwnedFd>) -> Result<(), Errno> {
        let copy = fd.as_ref().map(OwnedFd::try_clone).transpose();
        let copy = copy.map_err(|error| errno(&error))?.map(File::from);
        let mut windows = self.windows();
        match self.memory.map(spec, fd) {
            Ok(Mapped::New) => {}
            Ok(Mapped::Repeated) => return Ok(()),
            Err(error) => {
                tracing::warn!(%error, "DMA_MAP refused");
                return Err(Errno::from_raw_os_error(error.errno()));
            }
        }
        let (file, class) = self.memory.behind(spec.iova).unwrap_or((None, WindowClass::Peer));
        let mut window = Window { spec, file, withheld: None };
        if self.ram_only && file.is_some() && class == WindowClass::Peer {
            tracing::debug!(?spec, "a window that is not known to be RAM is kept from the backend");
            window.withheld = copy;
        } else if let Err(errno) = told(self.give(&spec, copy), "dma_map") {
            self.forget(&spec);
            return Err(errno);
        }
        windows.insert(spec.iova, window);
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) -> Result<(), Errno> {
        let mut windows = self.windows();
        let window = windows.get(&iova).filter(|window| window.spec.size == size);
        let window = window.ok_or(Errno::NOENT)?;
        self.take_back(window)?;
        self.forget(&window.spec);
        windows.remove(&iova);
        Ok(())
    }

    fn unmap_all(&self) -> Result<(), Errno> {
        let mut result = Ok(());
        for (_, window) in std::mem::take(&mut *self.windows()) {
            let taken = self.take_back(&window);
            self.forget(&window.spec);
            result = result.and(taken);
        }
        result
    }

    fn set_irqs(&self, request: &SetIrqs, data: &[u8], fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let validated = validate(request, data.len(), fds.len(), self.layout.counts());
        let IrqRequest { index, range, operation } = validated.map_err(|error| {
            tracing::debug!(%error, "SET_IRQS refused");
            Errno::from_raw_os_error(error.errno().raw_os_error())
        })?;
        let available = self.layout.irq(request.index).count;
        if range.end > available || available == 0 {
            // Such as the error interrupt of a backend that has none.
            return Err(Errno::INVAL);
        }
        let copies = fds.iter().map(|fd| Ok(File::from(fd.try_clone()?)));
        let copies = copies.collect::<io::Result<Vec<_>>>().map_err(|error| errno(&error))?;
        // That they are eventfds is looked at there.
        self.interrupts.set_irqs(request, data, fds).map_err(|error| {
            tracing::debug!(%error, "SET_IRQS refused");
            Errno::from_raw_os_error(error.errno())
        })?;
        let (number, flags) = (index as u32, DATA_EVENTFD | ACTION_TRIGGER);
        match operation {
            // Done: fired, or latched while the device is stopped.
            IrqOperation::Fire(_) => Ok(()),
            IrqOperation::Install => {
                self.installed.fetch_or(1 << number, Ordering::Relaxed);
                self.irqs(number, flags, &range, copies)
            }
            // The plainest form of it, which every backend knows.
            IrqOperation::Remove if range.len() == available as usize => self.disable(number),
            IrqOperation::Remove => self.irqs(number, flags, &range, Vec::new()),
            IrqOperation::Disable => self.disable(number),
            IrqOperation::Mask(selected) => {
                self.irqs_selected(number, ACTION_MASK, &range, selected, data)
            }
            IrqOperation::Unmask(selected) => {
                self.irqs_selected(number, ACTION_UNMASK, &range, selected, data)
            }
        }
    }

    fn release_irqs(&self) {
        let installed = self.installed.load(Ordering::Relaxed);
        for index in (0..PCI_IRQS).filter(|index| installed & (1 << index) != 0) {
            // It was told; what it makes of it is its own business.
            let _ = self.disable(index);
        }
    }

    fn ram_declared(&self) {
        for (iova, window) in self.windows().iter_mut() {
            let is_ram = matches!(self.memory.behind(*iova), Some((_, WindowClass::Ram)));
            if !is_ram || window.withheld.is_none() {
                continue;
            }
            let file = window.withheld.as_ref().map(File::try_clone).transpose();
            match file.and_then(|file| self.give(&window.spec, file)) {
                Ok(()) => window.withheld = None,
                Err(error) => tracing::error!(%error, spec = ?window.spec, "dma_map"),
            }
        }
    }

    fn revoke(&self, files: &[FileIdentity]) {
        self.windows().retain(|iova, window| {
            let is_meant = window.file.is_some_and(|file| files.contains(&file))
                && matches!(self.memory.behind(*iova), Some((_, WindowClass::Peer)));
            if is_meant && let Err(error) = self.take_back(window) {
                tracing::error!(%error, spec = ?window.spec, "a window that is revoked");
            }
            !is_meant
        });
    }
}

/// The backend as the lifecycle sees it.
pub(crate) struct ForeignDevice<B> {
    inner: Arc<Inner<B>>,
    quiesce: Option<QuiesceHooks<B>>,
    state: Option<StateHooks<B>>,
}

impl<B: ServerBackend + Send + 'static> ForeignDevice<B> {
    pub(super) fn new(
        inner: Arc<Inner<B>>,
        quiesce: Option<QuiesceHooks<B>>,
        state: Option<StateHooks<B>>,
    ) -> Self {
        Self { inner, quiesce, state }
    }

    /// Calls the backend on a thread that may block.
    async fn call(&self, hook: fn(&mut B) -> io::Result<()>) -> Result<(), DeviceError> {
        let inner = Arc::clone(&self.inner);
        let called = tokio::task::spawn_blocking(move || hook(&mut inner.backend())).await;
        called.map_err(DeviceError::new)?.map_err(DeviceError::new)
    }

    fn no_state() -> DeviceError {
        DeviceError::new("this backend's state can neither be saved nor loaded")
    }
}

impl<B: ServerBackend + Send + 'static> Device for ForeignDevice<B> {
    /// The transport asks the backend itself.
    fn region_read(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn region_write(&self, _: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.inner.backend().reset().map_err(DeviceError::new)
    }

    async fn prepare_stop(&self, _: Duration) -> Result<(), DeviceError> {
        match &self.quiesce {
            Some(hooks) => self.call(hooks.quiesce).await,
            None => Ok(()),
        }
    }

    /// Accesses have drained; a call that tells the backend something may be in progress.
    async fn stop(&self, _: Duration) -> Result<(), DeviceError> {
        if self.inner.backend.try_lock().is_ok() {
            return Ok(());
        }
        self.call(|_| Ok(())).await
    }

    async fn start(&self, _: Duration) -> Result<(), DeviceError> {
        match &self.quiesce {
            Some(hooks) => self.call(hooks.resume).await,
            None => Ok(()),
        }
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        let hooks = self.state.as_ref().ok_or_else(Self::no_state)?;
        (hooks.save)(&mut self.inner.backend(), to).map_err(DeviceError::new)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        let hooks = self.state.as_ref().ok_or_else(Self::no_state)?;
        (hooks.load)(&mut self.inner.backend(), from).map_err(DeviceError::new)
    }
}
