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
use crate::interrupt::SetIrqs;
use crate::memory::{Handling, WindowSpec};
use crate::pci::BarUse;
use ractor::ActorRef;
use rustix::io::Errno;
use standstill_protocol::lifecycle::ClientRequest;
use standstill_protocol::message::Refusal;
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::os::fd::OwnedFd;
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
/// Number of regions of a PCI device.
pub(crate) const REGIONS: u32 = 9;

/// A device as its client sees it; see the [module](self).
#[derive(Debug)]
pub(crate) struct Endpoint<D> {
    parts: Arc<Parts<D>>,
    actor: ActorRef<Message>,
}

/// What answers an access.
#[derive(Clone, Copy)]
enum Region<'a> {
    Config,
    Registers(u32),
    Msix,
    Memory(&'a OwnedFd),
}

impl<D: Device> Endpoint<D> {
    pub(crate) fn new(parts: Arc<Parts<D>>, actor: ActorRef<Message>) -> Self {
        Self { parts, actor }
    }

    pub(crate) fn parts(&self) -> &Parts<D> {
        &self.parts
    }

    /// A client is there.
    pub(crate) fn connected(&self) {
        self.tell_present(true);
    }

    /// The client has gone: its DMA windows, its log and its eventfds go, the device stays as it is.
    pub(crate) fn disconnected(&self) {
        self.parts.memory.stop_log();
        if let Err(error) = self.parts.memory.unmap_all(LONGEST_WAIT) {
            warn!(%error, "unmapping the windows of the client that has gone");
        }
        self.parts.interrupts.release();
        self.tell_present(false);
    }

    /// Waits until the actor has taken it: clients that come and go cannot fill its mailbox.
    fn tell_present(&self, present: bool) {
        let (told, wait) = sync_channel(1);
        let cast = self.actor.cast(Message::ClientPresent(present, told));
        if cast.is_err() || wait.recv_timeout(LONGEST_WAIT).is_err() {
            debug!(present, "the control side did not take the client's coming or going");
        }
    }

    /// Reads from a region.
    pub(crate) fn region_read(
        &self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), Errno> {
        let (target, offset) = self.find(region, offset, data.len())?;
        if let Region::Config = target {
            return self.parts.config().read(offset, data).map_err(|_| Errno::INVAL);
        }
        let permit = self.parts.accesses.try_enter();
        if permit.is_none() && self.parts.device.reads_have_side_effects() {
            debug!(region, offset, "read refused: the device is stopped");
            return Err(Errno::INVAL);
        }
        match target {
            Region::Config => Ok(()),
            Region::Registers(bar) => {
                check_width(data.len())?;
                #[cfg(feature = "fault-injection")]
                crate::fault::reach(standstill_protocol::fault::Point::Mmio);
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
        }
    }

    /// Writes to a region.
    pub(crate) fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let (target, offset) = self.find(region, offset, data.len())?;
        if let Region::Config = target {
            return self.parts.config().write(offset, data).map_err(|_| Errno::INVAL);
        }
        let Some(_permit) = self.parts.accesses.try_enter() else {
            debug!(region, offset, "write refused: the device is stopped");
            return Err(Errno::INVAL);
        };
        match target {
            Region::Config => Ok(()),
            Region::Registers(bar) => {
                check_width(data.len())?;
                #[cfg(feature = "fault-injection")]
                crate::fault::reach(standstill_protocol::fault::Point::Mmio);
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
        }
    }

    /// What answers an access, if all of it lies inside.
    fn find(&self, region: u32, offset: u64, length: usize) -> Result<(Region<'_>, u64), Errno> {
        let size = self.region_size(region);
        let end = offset.saturating_add(length as u64);
        if length > LONGEST_ACCESS || end > size {
            debug!(region, offset, length, size, "access outside its region");
            return Err(Errno::INVAL);
        }
        if region == CONFIG_REGION {
            return Ok((Region::Config, offset));
        }
        let bar = usize::try_from(region).map_err(|_| Errno::INVAL)?;
        let layout = self.parts.layout.bars.get(bar).ok_or(Errno::INVAL)?;
        let target = match layout.usage {
            BarUse::Absent => return Err(Errno::INVAL),
            BarUse::Registers => Region::Registers(region),
            BarUse::Msix => Region::Msix,
            BarUse::Memory => {
                Region::Memory(self.parts.bar_memory[bar].as_ref().ok_or(Errno::INVAL)?)
            }
        };
        Ok((target, offset))
    }

    /// Size of a region in bytes; 0 if it is absent.
    pub(crate) fn region_size(&self, region: u32) -> u64 {
        if region == CONFIG_REGION {
            return self.parts.config().bytes().len() as u64;
        }
        let bar = usize::try_from(region).ok();
        bar.and_then(|bar| self.parts.layout.bars.get(bar)).map_or(0, |bar| bar.size)
    }

    /// Adds a DMA window.
    pub(crate) fn dma_map(&self, window: WindowSpec, fd: Option<OwnedFd>) -> Result<(), Errno> {
        self.parts.memory.map(window, fd).map(|_| ()).map_err(|error| {
            warn!(%error, "DMA_MAP refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Removes a DMA window when nothing uses it any more.
    pub(crate) fn dma_unmap(&self, iova: u64, size: u64) -> Result<(), Errno> {
        self.parts.memory.unmap(iova, size, LONGEST_WAIT).map_err(|error| {
            warn!(%error, "DMA_UNMAP refused");
            Errno::from_raw_os_error(error.errno())
        })
    }

    /// Removes all DMA windows when nothing uses them any more.
    pub(crate) fn dma_unmap_all(&self) -> Result<(), Errno> {
        self.parts.memory.unmap_all(LONGEST_WAIT).map_err(|error| {
            warn!(%error, "DMA_UNMAP of everything");
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
                Err(Errno::INVAL)
            }
        }
    }

    /// Moves the client's position in the migration states and says where it is then.
    #[cfg_attr(not(test), expect(dead_code, reason = "the present transport has no such command"))]
    pub(crate) fn set_state(
        &self,
        state: MigrationState,
    ) -> Result<Result<MigrationState, Refusal>, Errno> {
        self.request(ClientRequest::SetState(state))
    }

    /// Where the client has brought the device.
    #[cfg_attr(not(test), expect(dead_code, reason = "as above"))]
    pub(crate) fn state(&self) -> Result<MigrationState, Errno> {
        let (reply, answer) = sync_channel(1);
        self.actor.cast(Message::ClientState(reply)).map_err(|_| Errno::IO)?;
        answer.recv_timeout(LONGEST_WAIT).map_err(|_| Errno::TIMEDOUT)
    }

    /// The migration states that the device has.
    #[cfg_attr(not(test), expect(dead_code, reason = "as above"))]
    pub(crate) fn migration_flags(&self) -> MigrationFlags {
        self.parts.migration
    }

    /// Reads the state stream, in PRE_COPY, PRE_COPY_P2P and STOP_COPY. Less than `data.len()` bytes:
    /// nothing is left now (in STOP_COPY: that was all). EINVAL in any other state, EIO if the state
    /// cannot be saved, ETIMEDOUT if the device gives nothing in time: nothing was read then.
    #[cfg_attr(not(test), expect(dead_code, reason = "as above"))]
    pub(crate) fn migration_read(&self, data: &mut [u8]) -> Result<usize, Errno> {
        self.parts.client_stream.read(&self.parts, data, LONGEST_WAIT)
    }

    /// Writes all of `data` to the state stream, in RESUMING. EINVAL in any other state, or if the
    /// stream is bad: the device goes to ERROR when the client ends RESUMING. ETIMEDOUT if the device
    /// does not take it in time: nothing was written then.
    #[cfg_attr(not(test), expect(dead_code, reason = "as above"))]
    pub(crate) fn migration_write(&self, data: &[u8]) -> Result<(), Errno> {
        self.parts.client_stream.write(&self.parts, data, LONGEST_WAIT)
    }

    /// How much there is to be saved, about; in every state.
    #[cfg_attr(not(test), expect(dead_code, reason = "as above"))]
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
