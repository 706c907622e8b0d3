//! What the control side and the data side of a device process have in common.

use super::session::ClientStream;
use super::turn::Turn;
use crate::device::{Bar, BarBacking, Device, DeviceInfo, Doorbell, StateVersion};
use crate::edge::Edge;
use crate::foreign::RawDevice;
use crate::gate::{Gate, InFlight};
use crate::interrupt::Interrupts;
use crate::memory::MemoryMap;
use crate::pci::{BarUse, ConfigSpace, PciError, PciLayout};
use standstill_protocol::message::FileIdentity;
use standstill_protocol::migration::{Activity, MigrationFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;

/// A device and all that the runtime keeps for it.
#[derive(Debug)]
pub(crate) struct Parts<D> {
    pub(crate) device: D,
    /// What all DMA passes.
    pub(crate) gate: Arc<Gate>,
    /// What all accesses to BARs pass.
    pub(crate) accesses: InFlight,
    /// Who takes what comes from outside, and how far they are with it.
    pub(crate) edge: Edge,
    pub(crate) memory: MemoryMap,
    pub(crate) interrupts: Interrupts,
    pub(crate) kind: String,
    pub(crate) state_version: StateVersion,
    /// The migration states that it has.
    pub(crate) migration: MigrationFlags,
    pub(crate) layout: PciLayout,
    /// The client's state stream.
    pub(crate) client_stream: ClientStream,
    /// Whose turn it is to call the hooks that save.
    pub(crate) saving: Turn,
    /// Whose turn it is to call the hooks that load or reset.
    pub(crate) loading: Turn,
    config: Mutex<ConfigSpace>,
    /// What the client wrote into the MSI-X table and pending bits.
    msix: Mutex<Vec<u8>>,
    /// The memory behind each [`BarUse::Memory`] BAR.
    pub(crate) bar_memory: [Option<OwnedFd>; 6],
    /// The files behind them, each once.
    pub(crate) memory_files: Vec<FileIdentity>,
    /// What the device says of its doorbells.
    pub(crate) doorbells: Vec<Doorbell>,
    /// Answers for regions, windows and interrupts, if the device does so itself.
    pub(crate) raw: Option<Arc<dyn RawDevice>>,
}

/// A device cannot be served as it describes itself.
#[derive(Debug, Error)]
pub enum InfoError {
    /// As a PCI device.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Its name.
    #[error("a device's kind has 1 to 64 bytes, {0:?} has not")]
    Kind(String),
    /// Too many backing files.
    #[error("{0} backing files, at most 16 are possible")]
    BackingFiles(usize),
    /// Too many doorbells.
    #[error("{0} doorbells, at most 64 are possible")]
    Doorbells(usize),
    /// A doorbell that cannot be.
    #[error("{0:x?} is not in a BAR of registers, or has no width that can be written")]
    Doorbell(Doorbell),
    /// The memory behind a BAR cannot be looked at.
    #[error("the memory of BAR {bar} cannot be examined")]
    Memory {
        /// Its index.
        bar: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The memory behind a BAR does not fill it.
    #[error("the memory of BAR {bar} has {actual:#x} bytes, the BAR has {expected:#x}")]
    MemorySize {
        /// Its index.
        bar: usize,
        /// The BAR's size in bytes.
        expected: u64,
        /// The memory's size in bytes.
        actual: u64,
    },
}

impl<D: Device> Parts<D> {
    /// Puts a device together; its backing files are the caller's business.
    pub(crate) fn new(
        device: D,
        info: DeviceInfo,
        memory: MemoryMap,
        interrupts: Interrupts,
    ) -> Result<Self, InfoError> {
        if info.kind.is_empty() || info.kind.len() > standstill_protocol::message::MAX_NAME {
            return Err(InfoError::Kind(info.kind));
        }
        let doorbells = device.doorbells();
        check_doorbells(&doorbells, &info.bars)?;
        let layout = PciLayout::new(&info)?;
        let config = ConfigSpace::new(&info, &layout)?;
        let mut bar_memory = [const { None }; 6];
        let mut memory_files = Vec::new();
        for (index, bar) in info.bars.into_iter().enumerate() {
            if let Some(Bar { size, backing: BarBacking::Memory(fd) }) = bar {
                let file = check_size(index, size, &fd)?;
                if !memory_files.contains(&file) {
                    memory_files.push(file);
                }
                bar_memory[index] = Some(fd);
            }
        }
        let msix_size = layout.bars.iter().find(|bar| bar.usage == BarUse::Msix);
        // At most 64 KiB: 2048 vectors.
        let msix_size = msix_size.map_or(0, |bar| usize::try_from(bar.size).unwrap_or(0));
        Ok(Self {
            device,
            gate: Arc::clone(memory.gate()),
            accesses: InFlight::new(),
            edge: Edge::default(),
            memory,
            interrupts,
            kind: info.kind,
            state_version: info.state_version,
            migration: info.migration,
            layout,
            client_stream: ClientStream::default(),
            saving: Turn::default(),
            loading: Turn::default(),
            config: Mutex::new(config),
            msix: Mutex::new(vec![0; msix_size]),
            bar_memory,
            memory_files,
            doorbells,
            raw: None,
        })
    }

    /// The device answers for its regions, windows and interrupts itself.
    pub(crate) fn with_raw(self, raw: Arc<dyn RawDevice>) -> Self {
        Self { memory_files: raw.memory_files(), raw: Some(raw), ..self }
    }

    pub(crate) fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn msix(&self) -> MutexGuard<'_, Vec<u8>> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes everything at once, without waiting for what is in flight: the device is unusable.
    pub(crate) fn force_stop(&self) {
        self.accesses.close();
        self.gate.ram().close();
        self.gate.peer().close();
        self.interrupts.close();
    }

    /// What is open now; for tests and assertions.
    pub(crate) fn is_at(&self, activity: Activity) -> bool {
        let open = (!self.gate.ram().is_closed(), !self.gate.peer().is_closed());
        let accesses = !self.accesses.is_closed();
        match activity {
            Activity::Stopped => open == (false, false) && !accesses,
            Activity::NoPeer => open == (true, false) && accesses,
            Activity::Full => open == (true, true) && accesses,
        }
    }
}

/// The most doorbells of a device.
const MOST_DOORBELLS: usize = 64;

/// Refuses doorbells that cannot be.
fn check_doorbells(doorbells: &[Doorbell], bars: &[Option<Bar>; 6]) -> Result<(), InfoError> {
    if doorbells.len() > MOST_DOORBELLS {
        return Err(InfoError::Doorbells(doorbells.len()));
    }
    let is_possible = |doorbell: &Doorbell| {
        let bar = usize::try_from(doorbell.bar).ok().and_then(|bar| bars.get(bar)?.as_ref());
        let Some(Bar { size, backing: BarBacking::Registers }) = bar else { return false };
        let width = u64::from(doorbell.width);
        let fits = doorbell.offset.checked_add(width.max(1)).is_some_and(|end| end <= *size);
        // What is compared with a value has a width.
        fits && (matches!(width, 1 | 2 | 4 | 8) || (width == 0 && doorbell.value.is_none()))
    };
    match doorbells.iter().find(|doorbell| !is_possible(doorbell)) {
        Some(doorbell) => Err(InfoError::Doorbell(*doorbell)),
        None => Ok(()),
    }
}

/// Which file it is, if it is large enough.
fn check_size(bar: usize, expected: u64, fd: &OwnedFd) -> Result<FileIdentity, InfoError> {
    let facts =
        rustix::fs::fstat(fd).map_err(|errno| InfoError::Memory { bar, source: errno.into() })?;
    let actual = u64::try_from(facts.st_size).unwrap_or(0);
    if actual < expected {
        return Err(InfoError::MemorySize { bar, expected, actual });
    }
    Ok(FileIdentity { device: facts.st_dev, inode: facts.st_ino })
}
