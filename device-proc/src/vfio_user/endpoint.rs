//! What a client may do with a device, whatever transport it comes over.
//!
//! All calls come from the transport's thread, one at a time. They may block it for a bounded
//! time (at most [`LONGEST_WAIT`]: a VMM gives up 5 s after its request), but never the control
//! side. An error is the errno for the client.
//!
//! While the device is stopped (its accesses are closed) the BARs are out of reach: writes get
//! EINVAL, reads too unless the device says that they change nothing. Configuration space and
//! interrupts can be used in every state.

use crate::actor::Message;
use crate::actor::parts::Parts;
use crate::actor::session::MigrationSize;
use crate::device::{AccessError, Device};
use crate::foreign::RawDevice;
use crate::gate::Permit;
use crate::interrupt::SetIrqs;
use crate::memory::{Handling, LogRange, Report, UnmapError, WindowSpec};
use crate::pci::BarUse;
use ractor::ActorRef;
use rustix::io::Errno;
use standstill_protocol::lifecycle::ClientRequest;
use standstill_protocol::message::{Refusal, RefusalKind};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_vfio_user::wire::{LoggingReport, LoggingStart};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;
use tracing::{debug, warn};

/// The longest time that a client waits here.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_millis(4500);

/// The most bytes of one access; what `max_data_xfer_size` promises.
pub(crate) const LONGEST_ACCESS: usize = 1 << 20;

/// The region of the configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub(crate) const CONFIG_REGION: u32 = 7;

/// A device as its client sees it; see the [module](self).
#[derive(Debug)]
pub(crate) struct Endpoint<D> {
    parts: Arc<Parts<D>>,
    actor: ActorRef<Message>,
}

// For any device, which need not be one that can be cloned.
impl<D> Clone for Endpoint<D> {
    fn clone(&self) -> Self {
        Self { parts: Arc::clone(&self.parts), actor: self.actor.clone() }
    }
}

/// What answers an access.
#[derive(Clone, Copy)]
enum Region<'a> {
    Config,
    Registers(u32),
    Msix,
    Memory(&'a OwnedFd),
    Raw(&'a dyn RawDevice),
}

impl<D: Device> Endpoint<D> {
    pub(crate) fn new(parts: Arc<Parts<D>>, actor: ActorRef<Message>) -> Self {
        Self { parts, actor }
    }

    pub(crate) fn parts(&self) -> &Parts<D> {
        &self.parts
    }

    /// The device itself, if it answers for its regions, windows and interrupts.
    pub(crate) fn raw(&self) -> Option<&dyn RawDevice> {
        self.parts.raw.as_deref()
    }

    /// A client is there.
    pub(crate) fn connected(&self) {
        self.tell_present(true);
    }

    /// The client has gone: its DMA windows, its log and its eventfds go, the device stays as it is.
    pub(crate) fn disconnected(&self) {
        if let Some(raw) = self.raw() {
            if let Err(error) = raw.unmap_all() {
                warn!(%error, "a window of the client that has gone");
            }
            raw.release_irqs();
        }
        self.parts.memory.stop_log();
        if let Err(error) = self.parts.memory.unmap_all(LONGEST_WAIT) {
            warn!(%error, "unmapping the windows of the client that has gone");
        }
        self.parts.memory.stop_log();
        self.parts.interrupts.release();
        self.tell_present(false);
    }

    fn tell_present(&self, present: bool) {
        Message::tell_present(&self.actor, present, LONGEST_WAIT);
    }

    /// Leave to touch the BARs, unless the device is stopped. Never waits.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Permit<'_>> {
        self.parts.accesses.try_enter()
    }

    /// Whether a region cannot be written to while the device is stopped. The MSI-X table is no
    /// concern of the device's, as configuration space is not.
    pub(crate) fn is_gated(&self, region: u32) -> bool {
        if self.raw().is_some() {
            return region != CONFIG_REGION;
        }
        let bar = usize::try_from(region).unwrap_or(usize::MAX);
        let layout = self.parts.layout.bars.get(bar);
        layout.is_some_and(|bar| matches!(bar.usage, BarUse::Registers | BarUse::Memory))
    }

    /// Reads from a region, with what [`enter`](Self::enter) has given.
    #[inline]
    pub(crate) fn region_read(
        &self,
        permit: Option<&Permit<'_>>,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), Errno> {
        match self.find(region, offset, data.len())? {
            Region::Config => self.parts.config().read(offset, data).map_err(|_| Errno::INVAL),
            Region::Registers(bar) => {
                self.check_read(permit, region, offset)?;
                check_width(data.len())?;
                #[cfg(feature = "fault-injection")]
                crate::fault::pass(standstill_protocol::fault::Point::Mmio);
                let _handling = Handling::begin();
                self.parts.device.region_read(bar, offset, data).map_err(|error| refused(&error))
            }
            Region::Msix => {
                let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
                let table = self.parts.msix();
                data.copy_from_slice(table.get(at..at + data.len()).ok_or(Errno::INVAL)?);
                Ok(())
            }
            Region::Memory(memory) => read_memory(memory, offset, data),
            Region::Raw(raw) if region == CONFIG_REGION => raw.read(region, offset, data),
            Region::Raw(raw) => {
                self.check_read(permit, region, offset)?;
                #[cfg(feature = "fault-injection")]
                crate::fault::pass(standstill_protocol::fault::Point::Mmio);
                raw.read(region, offset, data)
            }
        }
    }

    /// Whether the device may be asked now, or is stopped and could change by it.
    #[inline]
    fn check_read(
        &self,
        permit: Option<&Permit<'_>>,
        region: u32,
        offset: u64,
    ) -> Result<(), Errno> {
        if permit.is_none() && self.parts.device.reads_have_side_effects() {
            debug!(region, offset, "read refused: the device is stopped");
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// Writes to a region, with what [`enter`](Self::enter) has given.
    pub(crate) fn region_write(
        &self,
        permit: Option<&Permit<'_>>,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Errno> {
        let target = self.find(region, offset, data.len())?;
        if permit.is_none() && self.is_gated(region) {
            debug!(region, offset, "write refused: the device is stopped");
            return Err(Errno::INVAL);
        }
        match target {
            Region::Config => self.parts.config().write(offset, data).map_err(|_| Errno::INVAL),
            Region::Registers(bar) => {
                check_width(data.len())?;
                #[cfg(feature = "fault-injection")]
                crate::fault::pass(standstill_protocol::fault::Point::Mmio);
                let _handling = Handling::begin();
                self.parts.device.region_write(bar, offset, data).map_err(|error| refused(&error))
            }
            Region::Msix => {
                let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
                let mut table = self.parts.msix();
                table.get_mut(at..at + data.len()).ok_or(Errno::INVAL)?.copy_from_slice(data);
                Ok(())
            }
            Region::Memory(memory) => write_memory(memory, offset, data),
            Region::Raw(raw) if region == CONFIG_REGION => raw.write(region, offset, data),
            Region::Raw(raw) => {
                #[cfg(feature = "fault-injection")]
                crate::fault::pass(standstill_protocol::fault::Point::Mmio);
                raw.write(region, offset, data)
            }
        }
    }

    /// Whether an access lies inside a region that there is, and is not too long.
    pub(crate) fn check_range(&self, region: u32, offset: u64, length: usize) -> Result<(), Errno> {
        self.find(region, offset, length).map(|_| ())
    }

    /// What answers an access, if all of it lies inside.
    #[inline]
    fn find(&self, region: u32, offset: u64, length: usize) -> Result<Region<'_>, Errno> {
        let size = self.region_size(region);
        let end = offset.saturating_add(length as u64);
        if length > LONGEST_ACCESS || end > size {
            debug!(region, offset, length, size, "access outside its region");
            return Err(Errno::INVAL);
        }
        if let Some(raw) = self.raw() {
            return Ok(Region::Raw(raw));
        }
        if region == CONFIG_REGION {
            return Ok(Region::Config);
        }
        let bar = usize::try_from(region).map_err(|_| Errno::INVAL)?;
        let layout = self.parts.layout.bars.get(bar).ok_or(Errno::INVAL)?;
        Ok(match layout.usage {
            BarUse::Absent => return Err(Errno::INVAL),
            BarUse::Registers => Region::Registers(region),
            BarUse::Msix => Region::Msix,
            BarUse::Memory => {
                Region::Memory(self.parts.bar_memory[bar].as_ref().ok_or(Errno::INVAL)?)
            }
        })
    }

    /// The memory behind a region that clients can map.
    pub(crate) fn region_memory(&self, region: u32) -> Option<BorrowedFd<'_>> {
        if let Some(raw) = self.raw() {
            return raw.region_memory(region);
        }
        let bar = usize::try_from(region).ok()?;
        let layout = self.parts.layout.bars.get(bar)?;
        let memory = self.parts.bar_memory.get(bar)?.as_ref()?;
        (layout.usage == BarUse::Memory).then(|| memory.as_fd())
    }

    /// Size of a region in bytes; 0 if it is absent.
    pub(crate) fn region_size(&self, region: u32) -> u64 {
        if let Some(raw) = self.raw() {
            return raw.region_size(region);
        }
        if region == CONFIG_REGION {
            return self.parts.config().bytes().len() as u64;
        }
        let bar = usize::try_from(region).ok();
        bar.and_then(|bar| self.parts.layout.bars.get(bar)).map_or(0, |bar| bar.size)
    }

    /// Adds a DMA window.
    pub(crate) fn dma_map(&self, window: WindowSpec, fd: Option<OwnedFd>) -> Result<(), Errno> {
        if let Some(raw) = self.raw() {
            return raw.map(window, fd);
        }
        self.parts.memory.map(window, fd).map(|_| ()).map_err(|error| {
            warn!(%error, "DMA_MAP refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Removes a DMA window when nothing uses it any more.
    pub(crate) fn dma_unmap(&self, iova: u64, size: u64) -> Result<(), Errno> {
        if let Some(raw) = self.raw() {
            return raw.unmap(iova, size);
        }
        self.parts.memory.unmap(iova, size, LONGEST_WAIT).map_err(|error| {
            warn!(%error, "DMA_UNMAP refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Removes a DMA window if nothing uses it now; whether that was so.
    pub(crate) fn dma_unmap_at_once(&self, iova: u64, size: u64) -> Result<bool, Errno> {
        if self.raw().is_some() {
            // It may have to wait for the device.
            return Ok(false);
        }
        match self.parts.memory.unmap(iova, size, Duration::ZERO) {
            Ok(()) => Ok(true),
            Err(UnmapError::Busy { .. }) => Ok(false),
            Err(error) => {
                debug!(%error, "DMA_UNMAP refused");
                Err(Errno::from_raw_os_error(error.errno()))
            }
        }
    }

    /// Removes all DMA windows when nothing uses them any more.
    pub(crate) fn dma_unmap_all(&self) -> Result<(), Errno> {
        if let Some(raw) = self.raw() {
            return raw.unmap_all();
        }
        self.parts.memory.unmap_all_or_none(LONGEST_WAIT).map_err(|error| {
            warn!(%error, "DMA_UNMAP of everything");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Removes a DMA window when nothing uses it any more, and says which of its pages were written.
    pub(crate) fn dma_unmap_reported(
        &self,
        iova: u64,
        size: u64,
        page_size: u64,
    ) -> Result<Vec<u64>, Errno> {
        self.check_logging()?;
        let unmapped = self.parts.memory.unmap_reported(iova, size, page_size, LONGEST_WAIT);
        unmapped.map_err(|error| {
            warn!(%error, "DMA_UNMAP with a bitmap refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Whether it can be logged which pages the device writes.
    pub(crate) fn check_logging(&self) -> Result<(), Errno> {
        if self.raw().is_some() { Err(Errno::OPNOTSUPP) } else { Ok(()) }
    }

    /// Whether the device's state can be saved and loaded.
    pub(crate) fn check_migration(&self) -> Result<(), Errno> {
        if self.parts.migration.stop_copy() { Ok(()) } else { Err(Errno::OPNOTSUPP) }
    }

    /// Logs which pages the device writes from now on.
    pub(crate) fn start_log(&self, start: &LoggingStart) -> Result<(), Errno> {
        self.check_logging()?;
        let ranges = start.ranges.iter().map(|(iova, length)| {
            let (iova, length) = (*iova, *length);
            LogRange { iova, length }
        });
        let ranges: Vec<_> = ranges.collect();
        self.parts.memory.start_log(start.page_size, &ranges, LONGEST_WAIT).map_err(|error| {
            warn!(%error, "DMA_LOGGING_START refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Which pages were written since the last time.
    pub(crate) fn report(&self, report: &LoggingReport) -> Result<Vec<u64>, Errno> {
        let LoggingReport { iova, length, page_size } = *report;
        let reported = Report::new(iova, length, page_size)
            .and_then(|report| self.parts.memory.report(&report));
        reported.map_err(|error| {
            debug!(%error, "DMA_LOGGING_REPORT refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Installs, removes, masks or fires interrupts.
    pub(crate) fn set_irqs(
        &self,
        request: &SetIrqs,
        data: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        if let Some(raw) = self.raw() {
            return raw.set_irqs(request, data, fds);
        }
        self.parts.interrupts.set_irqs(request, data, fds).map_err(|error| {
            warn!(%error, "SET_IRQS refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Brings the device's contents to power-on state.
    pub(crate) fn reset(&self) -> Result<(), Errno> {
        match self.request(ClientRequest::Reset)? {
            Ok(_) => Ok(()),
            Err(refusal) => {
                warn!(%refusal, "DEVICE_RESET refused");
                // Out of place, whoever holds the device where it is.
                Err(match refusal.kind {
                    RefusalKind::Busy => Errno::INVAL,
                    _ => refusal_errno(&refusal),
                })
            }
        }
    }

    /// Moves the client's position in the migration states and says where it is then.
    pub(crate) fn set_state(
        &self,
        state: MigrationState,
    ) -> Result<Result<MigrationState, Refusal>, Errno> {
        self.request(ClientRequest::SetState(state))
    }

    /// Where the client has brought the device.
    pub(crate) fn state(&self) -> Result<MigrationState, Errno> {
        let (reply, answer) = sync_channel(1);
        self.actor.cast(Message::ClientState(reply)).map_err(|_| Errno::IO)?;
        answer.recv_timeout(LONGEST_WAIT).map_err(|_| Errno::TIMEDOUT)
    }

    /// The migration states that the device has.
    pub(crate) fn migration_flags(&self) -> MigrationFlags {
        self.parts.migration
    }

    /// Reads the state stream, in PRE_COPY, PRE_COPY_P2P and STOP_COPY. Less than `data.len()` bytes:
    /// nothing is left now (in STOP_COPY: that was all). EINVAL in any other state, EIO if the state
    /// cannot be saved, ETIMEDOUT if the device gives nothing in time: nothing was read then.
    pub(crate) fn migration_read(&self, data: &mut [u8]) -> Result<usize, Errno> {
        self.parts.client_stream.read(&self.parts, data, LONGEST_WAIT)
    }

    /// Writes all of `data` to the state stream, in RESUMING. EINVAL in any other state, or if the
    /// stream is bad: the device goes to ERROR when the client ends RESUMING. ETIMEDOUT if the device
    /// does not take it in time: nothing was written then.
    pub(crate) fn migration_write(&self, data: &[u8]) -> Result<(), Errno> {
        self.parts.client_stream.write(&self.parts, data, LONGEST_WAIT)
    }

    /// How much there is to be saved, about; in every state.
    pub(crate) fn migration_size(&self) -> MigrationSize {
        self.parts.client_stream.size(&self.parts)
    }

    /// Asks the actor and waits for its answer. ETIMEDOUT if none comes in time; the request may
    /// be carried out all the same.
    fn request(&self, request: ClientRequest) -> Result<Result<MigrationState, Refusal>, Errno> {
        let (reply, answer) = sync_channel(1);
        self.actor.cast(Message::Client(request, reply)).map_err(|_| Errno::IO)?;
        answer.recv_timeout(LONGEST_WAIT).map_err(|error| {
            warn!(?request, %error, "no answer from the control side");
            Errno::TIMEDOUT
        })
    }
}

/// What a refusal of the control side is for the client.
pub(crate) fn refusal_errno(refusal: &Refusal) -> Errno {
    match refusal.kind {
        RefusalKind::NoWay => Errno::INVAL,
        RefusalKind::Busy => Errno::BUSY,
        _ => Errno::IO,
    }
}

/// Registers are accessed with the widths that a processor has.
fn check_width(length: usize) -> Result<(), Errno> {
    if matches!(length, 1 | 2 | 4 | 8) { Ok(()) } else { Err(Errno::INVAL) }
}

fn refused(error: &AccessError) -> Errno {
    debug!(%error, "access refused by the device");
    Errno::INVAL
}

fn read_memory(memory: &OwnedFd, mut offset: u64, mut data: &mut [u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::pread(memory, &mut *data, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(length) => {
                data = &mut data[length..];
                offset += length as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_memory(memory: &OwnedFd, mut offset: u64, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::pwrite(memory, data, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(length) => {
                data = &data[length..];
                offset += length as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
