//! What a device author writes: the [`Device`] trait and its contract.
//!
//! A device does DMA, interrupts and memory of its own only through the handles that it is given
//! when it is built ([`Handles`]). The runtime owns the lifecycle, the gate that DMA passes, the
//! IOVA map and the interrupts, so a device cannot break the rules of a standstill, whatever its
//! hooks do or leave undone.
//!
//! Every method takes `&self`: accesses come from the transport's thread, hooks from the control
//! thread, and the device's own threads do DMA meanwhile. The runtime holds no lock while it
//! calls.

use crate::interrupt::{Interrupts, IrqCounts};
use crate::memory::Dma;
use standstill_protocol::message::{Evidence, PeerDma};
use standstill_protocol::migration::MigrationFlags;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;
use thiserror::Error;

/// What the runtime gives to a device when it is built.
#[derive(Clone, Debug)]
pub struct Handles {
    /// Access to guest RAM and to peers' memory by IOVA.
    pub dma: Dma,
    /// The device's interrupt lines.
    pub interrupts: Interrupts,
}

/// What a device looks like from outside; asked once, before it is served.
///
/// ```
/// use standstill_device_proc::device::{Bar, DeviceInfo, PciIdentity};
///
/// let info = DeviceInfo::new("timer", PciIdentity::new(0x1234, 0x0002))
///     .bar(0, Bar::registers(4096))
///     .msix_vectors(1)
///     .ram_only();
/// assert!(info.migration.p2p());
/// ```
#[derive(Debug)]
pub struct DeviceInfo {
    /// Kind of device, such as `copy-engine`; at most 64 bytes.
    pub kind: String,
    /// PCI identity.
    pub pci: PciIdentity,
    /// BARs 0 to 5, by index; absent ones are `None`.
    pub bars: [Option<Bar>; 6],
    /// Number of MSI-X vectors, 0 to 2048.
    pub msix_vectors: u16,
    /// Number of MSI vectors: 0, 1, 2, 4, 8, 16 or 32.
    pub msi_vectors: u16,
    /// Whether it has the interrupt pin INTA.
    pub intx: bool,
    /// Whether it is a PCI Express endpoint, and not a conventional PCI device.
    pub express: bool,
    /// Whether it has a power management capability; a PCI Express endpoint always has.
    pub power_management: bool,
    /// The migration states that it has. Devices under this runtime always have the P2P states:
    /// the gate gives them.
    pub migration: MigrationFlags,
    /// Version of what [`Device::save`] writes.
    pub state_version: StateVersion,
    /// Whether its DMA can reach peers, or they it.
    pub peer_dma: PeerDma,
    /// Files whose lock proves that a killed incarnation writes no more: each is locked
    /// (`flock`, exclusive) by the device process as long as it lives.
    pub backing_files: Vec<OwnedFd>,
}

impl DeviceInfo {
    /// A device of that kind (at most 64 bytes): conventional PCI, without BARs, with INTx, whose state can be
    /// saved and loaded, with P2P states and peers, without backing files.
    pub fn new(kind: impl Into<String>, pci: PciIdentity) -> Self {
        Self {
            kind: kind.into(),
            pci,
            bars: Default::default(),
            msix_vectors: 0,
            msi_vectors: 0,
            intx: true,
            express: false,
            power_management: false,
            migration: MigrationFlags::STOP_COPY_P2P,
            state_version: StateVersion::default(),
            peer_dma: PeerDma::Possible,
            backing_files: Vec::new(),
        }
    }

    /// Adds a BAR.
    ///
    /// # Panics
    ///
    /// If the index is not 0 to 5.
    #[must_use]
    pub fn bar(mut self, index: usize, bar: Bar) -> Self {
        self.bars[index] = Some(bar);
        self
    }

    /// Sets the number of MSI-X vectors, 0 to 2048.
    #[must_use]
    pub fn msix_vectors(mut self, vectors: u16) -> Self {
        self.msix_vectors = vectors;
        self
    }

    /// Its state can be saved while it runs (`PRE_COPY`): its memory BARs, and what
    /// [`Device::save_running`] writes.
    #[must_use]
    pub fn pre_copy(mut self) -> Self {
        self.migration = MigrationFlags::ALL;
        self
    }

    /// Sets the version of its state, which is 1.0 otherwise.
    #[must_use]
    pub fn state_version(mut self, major: u16, minor: u16) -> Self {
        self.state_version = StateVersion { major, minor };
        self
    }

    /// Sets the number of MSI vectors: 0, 1, 2, 4, 8, 16 or 32. They are raised by
    /// [`Interrupts::raise_msi`].
    #[must_use]
    pub fn msi_vectors(mut self, vectors: u16) -> Self {
        self.msi_vectors = vectors;
        self
    }

    /// It has no interrupt pin.
    #[must_use]
    pub fn without_intx(mut self) -> Self {
        self.intx = false;
        self
    }

    /// It is a PCI Express endpoint: its configuration space has 4096 bytes and the capabilities PCI
    /// Express and power management, and its memory BARs take two indexes each.
    #[must_use]
    pub fn express(mut self) -> Self {
        self.express = true;
        self
    }

    /// It has a power management capability, with the states D0 and D3hot. The device is not told:
    /// it goes on in D3hot, and loses nothing there.
    #[must_use]
    pub fn power_management(mut self) -> Self {
        self.power_management = true;
        self
    }

    /// How many interrupts it has.
    #[must_use]
    pub fn irqs(&self) -> IrqCounts {
        let (msi, msix) = (self.msi_vectors, self.msix_vectors);
        IrqCounts { intx: self.intx.into(), msi, msix }
    }

    /// Its DMA reaches RAM alone, and no peer's DMA reaches it: it has no memory BAR.
    #[must_use]
    pub fn ram_only(mut self) -> Self {
        self.peer_dma = PeerDma::RamOnly;
        self
    }

    /// Adds a backing file; see [`backing_files`](field@Self::backing_files).
    #[must_use]
    pub fn backing_file(mut self, file: impl Into<OwnedFd>) -> Self {
        self.backing_files.push(file.into());
        self
    }
}

/// Version of what [`Device::save`] and [`Device::save_running`] write.
///
/// A state of another major version is refused before the device sees it. One of a newer minor
/// version may have something at the end of a section that [`Device::load`] does not read; one of
/// an older minor version may end earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateVersion {
    /// Grows when a device of before could not read the state any more.
    pub major: u16,
    /// Grows when something is added at the end.
    pub minor: u16,
}

impl Default for StateVersion {
    /// 1.0.
    fn default() -> Self {
        Self { major: 1, minor: 0 }
    }
}

/// PCI identity, as in the type 0 configuration header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Class code: base class, subclass, programming interface (24 bits).
    pub class: u32,
    /// Revision id.
    pub revision: u8,
}

impl PciIdentity {
    /// A device of that vendor, its own subsystem, of the class "other system peripheral" (08 80 00),
    /// revision 0.
    #[must_use]
    pub const fn new(vendor: u16, device: u16) -> Self {
        Self {
            vendor,
            device,
            subsystem_vendor: vendor,
            subsystem: device,
            class: 0x08_80_00,
            revision: 0,
        }
    }
}

/// One base address register and what is behind it.
#[derive(Debug)]
pub struct Bar {
    /// Size in bytes; a power of two, at least 4096.
    pub size: u64,
    /// What is behind it.
    pub backing: BarBacking,
}

impl Bar {
    /// Registers: each access is a call of the device. `size` in bytes as [`size`](field@Self::size).
    #[must_use]
    pub const fn registers(size: u64) -> Self {
        Self { size, backing: BarBacking::Registers }
    }

    /// Memory: a memfd of that size, which clients and peers can map.
    #[must_use]
    pub const fn memory(size: u64, memfd: OwnedFd) -> Self {
        Self { size, backing: BarBacking::Memory(memfd) }
    }
}

/// What is behind a BAR.
#[derive(Debug)]
pub enum BarBacking {
    /// Registers: each access is a call of [`Device::region_read`] or [`Device::region_write`].
    Registers,
    /// Memory: a memfd of the BAR's size that clients and peers can map. The runtime serves
    /// accesses over the socket from it; the device is not asked.
    Memory(OwnedFd),
}

/// A register that a guest can write without a message to the device process: an eventfd stands for
/// the write (`KVM_IOEVENTFD`). See [`Device::doorbells`].
///
/// ```
/// use standstill_device_proc::device::Doorbell;
///
/// let any = Doorbell::new(0, 0x40);
/// let only_7 = Doorbell::new(0, 0x48).width(4).of_value(7);
/// assert_eq!((any.width, only_7.value), (0, Some(7)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// The BAR: one of registers.
    pub bar: u32,
    /// Where in the BAR, in bytes.
    pub offset: u64,
    /// Width of the write in bytes, 1, 2, 4 or 8; 0 for any.
    pub width: u8,
    /// Only writes of this value count.
    pub value: Option<u64>,
}

impl Doorbell {
    /// A doorbell for writes of any width and value.
    #[must_use]
    pub const fn new(bar: u32, offset: u64) -> Self {
        Self { bar, offset, width: 0, value: None }
    }

    /// Only writes of that many bytes count: 1, 2, 4 or 8.
    #[must_use]
    pub const fn width(self, width: u8) -> Self {
        Self { width, ..self }
    }

    /// Only writes of this value count; such a doorbell has a width.
    #[must_use]
    pub const fn of_value(self, value: u64) -> Self {
        Self { value: Some(value), ..self }
    }
}

/// An access to a register that a device does not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AccessError {
    /// There is no such register, or not with that width. Answered with EINVAL.
    #[error("no register at offset {offset:#x} with width {width}")]
    NoRegister {
        /// Offset in the BAR, in bytes.
        offset: u64,
        /// Width of the access, in bytes.
        width: usize,
    },
    /// The value is not acceptable. Answered with EINVAL.
    #[error("value {value:#x} is not acceptable at offset {offset:#x}")]
    BadValue {
        /// Offset in the BAR, in bytes.
        offset: u64,
        /// What was written.
        value: u64,
    },
}

/// Why a hook of a device failed; travels to the coordinator as text.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct DeviceError(#[source] Box<dyn std::error::Error + Send + Sync>);

impl DeviceError {
    /// Wraps any error, or a text.
    pub fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(error.into())
    }
}

/// When evidence is collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moment {
    /// A `PrepareStop` was carried out, its answer is about to go.
    PrepareStopped,
    /// A `Stop` has arrived, nothing was done about it yet.
    StopArrived,
    /// A `Stop` was carried out, its answer is about to go.
    Stopped,
    /// The command that leads out of STOP has arrived, nothing was done about it yet.
    StartArrived,
}

/// What a device's data threads are at; travels with each heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Grows while the data threads work, for example by one with each request served; in a unit of
    /// the device's own. It may wrap.
    pub done: u64,
    /// True if the device itself has something to do that must not take longer than the
    /// coordinator's patience, such as a doorbell that was rung and is not served. False if it only
    /// waits for the world (a receive queue without packets, a disk that takes its time) or is not
    /// allowed to work: a device that says true and makes no progress is restarted.
    pub pending: bool,
}

/// Which of the device's passes over its own state while it runs; see [`Device::save_running`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// All of it. Whatever a pass before has saved or loaded counts no more.
    First,
    /// What has changed since the pass before.
    Later,
}

/// How many bytes a device has to save; see [`Device::state_size`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateSize {
    /// What [`Device::save_running`] would write now, in bytes.
    pub running: u64,
    /// What [`Device::save`] would write now, in bytes.
    pub stopped: u64,
}

/// A device, written once, served over any transport.
///
/// Hooks are `async`: while one waits, the process goes on answering queries. A hook that blocks
/// its thread instead makes the process look hung; use `tokio::task::spawn_blocking` for what
/// must block. A hook that fails leaves the device as it was before the hook.
pub trait Device: Send + Sync + 'static {
    /// Reads a register of a [`BarBacking::Registers`] BAR. `data` has 1, 2, 4 or 8 bytes, lies
    /// inside the BAR, and is little endian. Never called while the device is stopped unless
    /// [`reads_have_side_effects`](Self::reads_have_side_effects) says that it is harmless.
    ///
    /// DMA from here may only be tried, never waited for (see [`Dma::try_access`]), and reaches no
    /// memory that needs messages to the client, which waits for this access
    /// ([`DmaError::InHandler`](crate::memory::DmaError::InHandler)).
    ///
    /// # Errors
    ///
    /// [`AccessError`] if there is nothing to read; the client gets EINVAL.
    fn region_read(&self, bar: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError>;

    /// Writes a register of a [`BarBacking::Registers`] BAR; otherwise as
    /// [`region_read`](Self::region_read). Never called while the device is stopped.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if the write is not acceptable; the client gets EINVAL.
    fn region_write(&self, bar: u32, offset: u64, data: &[u8]) -> Result<(), AccessError>;

    /// Registers that a client can have written through an eventfd instead of a message, at most
    /// 64; asked once, before the device is served. A client need not: then these writes come to
    /// [`region_write`](Self::region_write) as all others.
    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }

    /// The doorbell with this number was rung, once or more often. Called on a thread of its own,
    /// beside accesses to registers; never called while the device is stopped: what is rung then is
    /// told after the start.
    ///
    /// DMA from here may only be tried, never waited for (see [`Dma::try_access`]).
    fn doorbell(&self, _index: usize) {}

    /// Whether reading registers changes anything. If not, they can be read while stopped.
    fn reads_have_side_effects(&self) -> bool {
        true
    }

    /// Brings the device's contents to power-on state. DMA is drained and closed meanwhile.
    ///
    /// # Errors
    ///
    /// The device goes to ERROR.
    fn reset(&self) -> Result<(), DeviceError>;

    /// First step of a stop: the device should begin no new peer-to-peer DMA. Called before the
    /// gate closes for peers, so what it still has to do can be done here. It need not do
    /// anything: the gate refuses peer DMA when this has returned, and waits for what is in
    /// flight.
    ///
    /// # Errors
    ///
    /// The device stays RUNNING and the coordinator is told.
    fn prepare_stop(
        &self,
        _budget: Duration,
    ) -> impl Future<Output = Result<(), DeviceError>> + Send {
        async { Ok(()) }
    }

    /// Second step of a stop: the device comes to rest. Called before the gate closes for all
    /// DMA and before interrupts are latched; register accesses are refused already.
    ///
    /// # Errors
    ///
    /// The device stays in RUNNING_P2P and the coordinator is told.
    fn stop(&self, _budget: Duration) -> impl Future<Output = Result<(), DeviceError>> + Send {
        async { Ok(()) }
    }

    /// First step of a start: called after the gate has opened for RAM and before the answer.
    ///
    /// # Errors
    ///
    /// The device stays in STOP and the coordinator is told.
    fn prepare_start(
        &self,
        _budget: Duration,
    ) -> impl Future<Output = Result<(), DeviceError>> + Send {
        async { Ok(()) }
    }

    /// Second step of a start: called after the gate has opened for peers.
    ///
    /// # Errors
    ///
    /// The device stays in RUNNING_P2P and the coordinator is told.
    fn start(&self, _budget: Duration) -> impl Future<Output = Result<(), DeviceError>> + Send {
        async { Ok(()) }
    }

    /// Writes the device's state; memory BARs are saved by the runtime. Called in a saving state, on
    /// a thread of its own. The device is stopped; what it has saved while it ran it need not save
    /// again.
    ///
    /// # Errors
    ///
    /// The `Save` is refused.
    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError>;

    /// Reads what [`save`](Self::save) wrote, and checks it: it comes from another process. The
    /// device is in RESUMING; what was read takes effect only when this returns Ok.
    ///
    /// # Errors
    ///
    /// The `Load` is refused and the device is in ERROR until it is reset.
    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError>;

    /// Writes what the device can save while it runs, so that [`save`](Self::save) has less to
    /// write. Only for devices with PRE_COPY; memory BARs are none of its business. Called once for
    /// each pass, on a thread of its own; it may still be writing when the device is stopped.
    ///
    /// Every stream has a [`Pass::First`]: it is called in STOP_COPY, before `save`, if there was no
    /// pass before, or the device was reset after the last one. So `save` can rely on it, whatever
    /// became of streams before this one.
    ///
    /// # Errors
    ///
    /// The state stream ends.
    fn save_running(&self, _pass: Pass, _to: &mut dyn Write) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Reads what one call of [`save_running`](Self::save_running) wrote, and checks it, as
    /// [`load`](Self::load), which follows and makes it take effect.
    ///
    /// # Errors
    ///
    /// As for [`load`](Self::load).
    fn load_running(&self, _pass: Pass, _from: &mut dyn Read) -> Result<(), DeviceError> {
        Ok(())
    }

    /// How much there is to be saved, about; memory BARs do not count. Should take microseconds.
    fn state_size(&self) -> StateSize {
        StateSize::default()
    }

    /// What the device can show for an answer; should take microseconds.
    fn evidence(&self, _moment: Moment) -> Evidence {
        Evidence::default()
    }

    /// What the device's data threads are at; `None` if the device has none, or cannot tell. Asked
    /// for each heartbeat; should take microseconds. A device whose threads have work and make no
    /// progress for longer than the coordinator's patience, while it runs, is treated as hung.
    fn progress(&self) -> Option<Progress> {
        None
    }
}
