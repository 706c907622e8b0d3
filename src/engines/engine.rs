//! Drives one copy engine as a guest's driver would, over vfio-user.
//!
//! Each window that is mapped is looked up through the device's probe registers: that the device has
//! taken it does not say what it takes it for. Registers are only touched while the machine runs,
//! since a stopped device refuses that.

use super::layout::{Range, VECTOR};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::device_proc::memory::{SharedMemory, SharedMemoryError};
use standstill::vfio_user::client::{Client, ClientError, ConnectError};
use standstill::vfio_user::wire::{DMA_READABLE, DMA_WRITABLE, DmaMap, IrqIndex};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;
use thiserror::Error;

/// How long a device may take to answer: a machine of many engines may leave it no CPU for a while.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is behind a DMA window, as the device sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Guest RAM.
    Ram,
    /// A peer's memory.
    Peer,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ram => "guest RAM",
            Self::Peer => "a peer's memory",
        })
    }
}

/// A copy engine cannot be driven.
#[derive(Debug, Error)]
pub(crate) enum EngineError {
    /// The device does not serve this client.
    #[error("cannot connect to its data socket")]
    Connect(#[from] ConnectError),
    /// The conversation with the device failed.
    #[error("cannot {what}")]
    Client {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        source: ClientError,
    },
    /// The device is another.
    #[error("{what} is {found:#x}, expected {expected:#x}")]
    Unexpected {
        /// What was looked at.
        what: &'static str,
        /// What it should be.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// The device gives no fd of its memory BAR.
    #[error("BAR {MEMORY_BAR} cannot be mapped: the device sent no file descriptor for it")]
    NoMemory,
    /// Its memory BAR cannot be mapped.
    #[error("BAR {MEMORY_BAR} cannot be mapped")]
    Memory(#[from] SharedMemoryError),
    /// A DMA map did not do what it should.
    #[error(
        "the DMA window at {:#x} should be {expected}, the device says {}",
        range.iova,
        probe_name(*found)
    )]
    Map {
        /// Where the window should be.
        range: Range,
        /// What should be there.
        expected: Class,
        /// What the probe register says.
        found: u32,
    },
    /// A system call failed.
    #[error("{call} failed")]
    System {
        /// Which one.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn probe_name(value: u32) -> &'static str {
    match value {
        PROBE_UNMAPPED => "that nothing is mapped there",
        PROBE_RAM => "that it is guest RAM",
        PROBE_PEER => "that it is a peer's memory",
        _ => "something unknown",
    }
}

/// What an engine has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Bytes copied.
    pub(crate) bytes: u64,
    /// Descriptors executed: each is one write of a block and its sequence number.
    pub(crate) writes: u64,
    /// CPU time of the engine's thread, in nanoseconds.
    pub(crate) busy_ns: u64,
}

/// An access to a register that has yet to be made.
#[cfg(feature = "fault-injection")]
pub(crate) type Access = Box<dyn FnOnce() -> Result<(), EngineError> + Send>;

/// One copy engine and the VMM's connection to it.
pub(crate) struct Engine {
    client: Client,
    memory: SharedMemory,
    interrupts: OwnedFd,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Engine {
    /// Connects to the device at a data socket, checks that it is a copy engine with so much
    /// memory, maps that, and installs an eventfd for its interrupts.
    pub(crate) fn connect(socket: &Path, memory_size: u64) -> Result<Self, EngineError> {
        let client = Client::builder().timeout(PATIENCE).connect(socket)?;
        let region = client.region_info(MEMORY_BAR).map_err(failed("ask about its memory BAR"))?;
        let memory = SharedMemory::from_fd(region.fd.ok_or(EngineError::NoMemory)?, memory_size)?;
        let interrupts = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| system("eventfd")(errno.into()))?;
        let engine = Self { client, memory, interrupts };
        engine.expect_word("its ID register", ID, ID_VALUE)?;
        engine.expect_word("its VERSION register", VERSION, VERSION_VALUE)?;
        let size = engine.read_long(MEMORY_SIZE)?;
        if size != memory_size {
            let (what, expected) = ("its MEMORY_SIZE register", memory_size);
            return Err(EngineError::Unexpected { what, expected, found: size });
        }
        engine.install_interrupt()?;
        Ok(engine)
    }

    /// An access to a register, which may be made on another thread and hang there.
    #[cfg(feature = "fault-injection")]
    pub(crate) fn access(&self) -> Access {
        let client = self.client.clone();
        Box::new(move || {
            let mut bytes = [0; 4];
            client.region_read(REGISTER_BAR, ID, &mut bytes).map_err(failed("read a register"))
        })
    }

    fn install_interrupt(&self) -> Result<(), EngineError> {
        self.client
            .irq_install(IrqIndex::Msix as u32, VECTOR, &[self.interrupts.as_fd()])
            .map_err(failed("install an eventfd for its interrupts"))
    }

    /// The VMM's own mapping of the device's memory BAR.
    pub(crate) fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The eventfd that counts the device's interrupts.
    pub(crate) fn interrupts(&self) -> BorrowedFd<'_> {
        self.interrupts.as_fd()
    }

    /// How many interrupts have come since this was last called.
    pub(crate) fn take_interrupts(&self) -> Result<u64, EngineError> {
        let mut count = [0; 8];
        match rustix::io::read(&self.interrupts, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(errno) => Err(system("read of an eventfd")(errno.into())),
        }
    }

    /// Maps memory into the device's IOVA space and makes sure that it is there.
    pub(crate) fn map(
        &self,
        range: Range,
        memory: &SharedMemory,
        class: Class,
    ) -> Result<(), EngineError> {
        let Range { iova, size } = range;
        let map = DmaMap { flags: DMA_READABLE | DMA_WRITABLE, offset: 0, iova, size };
        self.client
            .dma_map(&map, Some(memory.as_fd()))
            .map_err(failed("map memory for its DMA"))?;
        self.write_long(PROBE_IOVA, range.iova)?;
        self.write_long(PROBE_LEN, range.size)?;
        let found = self.read_word(PROBE_RESULT)?;
        let wanted = match class {
            Class::Ram => PROBE_RAM,
            Class::Peer => PROBE_PEER,
        };
        if found != wanted {
            return Err(EngineError::Map { range, expected: class, found });
        }
        Ok(())
    }

    /// Starts the engine on a ring, which it goes round for ever.
    pub(crate) fn start(&self, ring: u64, entries: u32) -> Result<(), EngineError> {
        self.write_long(RING_BASE, ring)?;
        self.write_word(RING_ENTRIES, entries)?;
        self.write_word(CONTROL, CONTROL_RUN | CONTROL_LOOP)
    }

    /// Lets the engine go on round its ring, if it has halted.
    #[cfg(feature = "fault-injection")]
    pub(crate) fn go_on(&self) -> Result<(), EngineError> {
        self.write_word(CONTROL, CONTROL_RUN | CONTROL_LOOP)
    }

    /// What the engine has done so far; an error if it has halted.
    pub(crate) fn work(&self) -> Result<Work, EngineError> {
        let status = self.read_word(STATUS)?;
        if status != STATUS_BUSY {
            let (what, expected) = ("its STATUS register", u64::from(STATUS_BUSY));
            return Err(EngineError::Unexpected { what, expected, found: status.into() });
        }
        Ok(Work {
            bytes: self.read_long(BYTES)?,
            writes: self.read_long(DESCRIPTORS)?,
            busy_ns: self.read_long(BUSY_NS)?,
        })
    }

    fn expect_word(
        &self,
        what: &'static str,
        register: u64,
        expected: u32,
    ) -> Result<(), EngineError> {
        let found = self.read_word(register)?;
        if found != expected {
            let (expected, found) = (expected.into(), found.into());
            return Err(EngineError::Unexpected { what, expected, found });
        }
        Ok(())
    }

    fn read_word(&self, register: u64) -> Result<u32, EngineError> {
        let mut bytes = [0; 4];
        self.client
            .region_read(REGISTER_BAR, register, &mut bytes)
            .map_err(failed("read a register"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read_long(&self, register: u64) -> Result<u64, EngineError> {
        let mut bytes = [0; 8];
        self.client
            .region_read(REGISTER_BAR, register, &mut bytes)
            .map_err(failed("read a register"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write_word(&self, register: u64, value: u32) -> Result<(), EngineError> {
        self.client
            .region_write(REGISTER_BAR, register, &value.to_le_bytes())
            .map_err(failed("write a register"))
    }

    fn write_long(&self, register: u64, value: u64) -> Result<(), EngineError> {
        self.client
            .region_write(REGISTER_BAR, register, &value.to_le_bytes())
            .map_err(failed("write a register"))
    }
}

fn failed(what: &'static str) -> impl FnOnce(ClientError) -> EngineError {
    move |source| EngineError::Client { what, source }
}

fn system(call: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    move |source| EngineError::System { call, source }
}
