//! The reference device: a PCI device that copies between any IOVAs, peers' memory included, at
//! memory speed.
//!
//! A driver puts [`Descriptor`]s into a ring in guest memory, sets [`registers`] in BAR 0, and the
//! engine executes them on a thread of its own. BAR 2 is plain memory that clients and peers can
//! map; its first [`MAILBOXES`] 64-bit numbers are mailboxes, where peers
//! leave their sequence numbers.
//!
//! It is made to test a standstill with: it **ignores every hook of the lifecycle** and goes on
//! trying to copy; only the gate stops it. What it shows as evidence lets an oracle outside
//! decide whether that worked:
//!
//! | at | counters | memory |
//! |---|---|---|
//! | `PrepareStopAck` | `Written`: by descriptor, the last sequence number it stored | |
//! | `Stop` arrives | `Received`: by mailbox, what is in it | |
//! | `StopAck` | `Written`; `Interrupts`: by vector | hash |
//! | the way out of STOP begins | `Received`; `Written`; `Interrupts` | |

#![forbid(unsafe_code)]

mod delay;
mod descriptor;
mod engine;
pub mod registers;
mod state;

pub use descriptor::{DESCRIPTOR_SIZE, Descriptor, FLAG_INTERRUPT, FLAG_SEQUENCE, FLAG_STAMP};

use crate::device::{
    AccessError, Bar, BarBacking, Device, DeviceError, DeviceInfo, Handles, Moment, PciIdentity,
    Progress,
};
use crate::memory::{SharedMemory, WindowClass};
use engine::{Engine, Ring, Shared};
use registers::*;
use standstill_protocol::message::{Counter, CounterKind, Evidence};
use state::{Shape, State};
use std::convert::Infallible;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// What [`DeviceInfo::kind`] says.
pub const KIND: &str = "copy-engine";

/// PCI identity. QEMU's list of PCI ids has 1af4:10f0 to 1af4:10ff for experimental use without
/// registration; Linux' virtio driver leaves them alone. Class: system peripheral, other.
pub const IDENTITY: PciIdentity = PciIdentity {
    vendor: 0x1af4,
    device: 0x10f0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x10f0,
    class: 0x08_80_00,
    revision: 1,
};

/// The most MSI-X vectors.
pub const MAX_VECTORS: u16 = 16;
/// The largest memory BAR in bytes: 4 GiB.
pub const MAX_MEMORY_SIZE: u64 = 1 << 32;
/// The most descriptors whose sequence numbers are shown as evidence, the first ones that have any.
pub const MAX_WRITTEN: usize = 32;

/// How a copy engine is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyEngineConfig {
    /// Size of the memory BAR in bytes: a power of two, 4096 to [`MAX_MEMORY_SIZE`].
    pub memory_size: u64,
    /// Number of MSI-X vectors, at most [`MAX_VECTORS`]. An engine with none has no interrupts.
    pub vectors: u16,
    /// How long the first step of a stop takes.
    pub slow_prepare: Duration,
    /// How long the second step of a stop takes.
    pub slow_stop: Duration,
    /// How long the first step of a start takes.
    pub slow_prepare_start: Duration,
    /// How long the second step of a start takes.
    pub slow_start: Duration,
    /// How long the engine rests each time that it begins its ring again, so that it does not take all of
    /// a CPU.
    pub rest: Duration,
}

impl Default for CopyEngineConfig {
    /// 1 MiB of memory, 4 vectors, no delays, no rest.
    fn default() -> Self {
        Self {
            memory_size: 1 << 20,
            vectors: 4,
            slow_prepare: Duration::ZERO,
            slow_stop: Duration::ZERO,
            slow_prepare_start: Duration::ZERO,
            slow_start: Duration::ZERO,
            rest: Duration::ZERO,
        }
    }
}

/// A configuration that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Not a power of two between 4096 and [`MAX_MEMORY_SIZE`].
    #[error("memory size {0:#x} is no power of two from 0x1000 to {MAX_MEMORY_SIZE:#x}")]
    MemorySize(u64),
    /// More than [`MAX_VECTORS`].
    #[error("{0} interrupt vectors are more than {MAX_VECTORS}")]
    Vectors(u16),
}

/// The device. Its thread ends soon after it is dropped.
#[derive(Debug)]
pub struct CopyEngine {
    config: CopyEngineConfig,
    memory: SharedMemory,
    shared: Arc<Shared>,
}

impl CopyEngine {
    /// Makes the device and starts its thread, which does nothing until a driver sets the
    /// registers.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], or that its memory or its thread cannot be made.
    pub fn build(
        config: CopyEngineConfig,
        handles: Handles,
    ) -> Result<(Self, DeviceInfo), DeviceError> {
        config.check().map_err(DeviceError::new)?;
        let memory = SharedMemory::create(KIND, config.memory_size).map_err(DeviceError::new)?;
        let info = config.info(&memory)?;
        let shared = Arc::new(Shared::new(handles, config.vectors));
        let engine = Engine::new(Arc::clone(&shared), config.rest);
        std::thread::Builder::new()
            .name(KIND.to_owned())
            .spawn(move || engine.run())
            .map_err(DeviceError::new)?;
        Ok((Self { config, memory, shared }, info))
    }

    fn shape(&self) -> Shape {
        Shape { memory_size: self.config.memory_size, vectors: self.config.vectors }
    }

    /// Value and width in bytes of the register that begins at this offset.
    fn register(&self, offset: u64) -> Option<(u64, usize)> {
        let raised = self.shared.handles.interrupts.raised();
        let current = self.shared.lock();
        let state = &current.state;
        let word = |value: u32| (u64::from(value), 4);
        Some(match offset {
            ID => word(ID_VALUE),
            VERSION => word(VERSION_VALUE),
            CONTROL => word(state.control()),
            STATUS => word(state.status()),
            RING_BASE => (state.ring_base, 8),
            RING_ENTRIES => word(state.ring_entries),
            DOORBELL => word(state.doorbell),
            HEAD => word(state.head),
            BYTES => (state.bytes, 8),
            DESCRIPTORS => (state.descriptors, 8),
            BUSY_NS => (state.busy_ns, 8),
            INTERRUPTS => (state.interrupts_before.wrapping_add(raised), 8),
            MEMORY_SIZE => (self.config.memory_size, 8),
            PROBE_IOVA => (state.probe_iova, 8),
            PROBE_LEN => (state.probe_len, 8),
            PROBE_RESULT => word(state.probe_result),
            _ => return None,
        })
    }

    /// What is behind a range, as [`PROBE_RESULT`] says it.
    fn probe(&self, iova: u64, len: u64) -> u32 {
        match self.shared.handles.dma.classify(iova, len) {
            None => PROBE_UNMAPPED,
            Some(WindowClass::Ram) => PROBE_RAM,
            Some(WindowClass::Peer) => PROBE_PEER,
        }
    }

    /// Writes a register that can be written; `None` if the value is not acceptable.
    fn set_register(&self, state: &mut State, offset: u64, value: u64) -> Option<Ring> {
        match offset {
            CONTROL => {
                let value = u32::try_from(value).ok()?;
                let run = value & CONTROL_RUN != 0;
                let known = value & !(CONTROL_RUN | CONTROL_LOOP) == 0;
                if !known || (run && (state.ring_entries == 0 || !state.ring_is_possible())) {
                    return None;
                }
                if run {
                    state.error = 0;
                }
                state.run = run;
                state.looping = value & CONTROL_LOOP != 0;
                return Some(Ring::Same);
            }
            DOORBELL => {
                state.doorbell =
                    u32::try_from(value).ok().filter(|index| *index < state.ring_entries)?;
                return Some(Ring::Same);
            }
            PROBE_IOVA => {
                state.probe_iova = value;
                return Some(Ring::Same);
            }
            PROBE_LEN => {
                state.probe_len = value;
                state.probe_result = self.probe(state.probe_iova, value);
                return Some(Ring::Same);
            }
            _ if state.run => return None,
            RING_BASE => {
                state.ring_base =
                    Some(value).filter(|base| base.is_multiple_of(DESCRIPTOR_SIZE))?;
            }
            RING_ENTRIES => {
                let entries = u32::try_from(value).ok();
                state.ring_entries = entries.filter(|entries| *entries <= MAX_ENTRIES)?;
            }
            _ => return None,
        }
        state.head = 0;
        state.doorbell = 0;
        Some(Ring::Another)
    }

    fn written(&self) -> Vec<Counter> {
        let current = self.shared.lock();
        let stored = (0..).zip(&current.state.sequences).filter(|(_, entry)| entry.stored > 0);
        stored
            .take(MAX_WRITTEN)
            .map(|(index, entry)| counter(CounterKind::Written, index, entry.stored))
            .collect()
    }

    fn received(&self) -> Vec<Counter> {
        (0..MAILBOXES)
            .filter_map(|mailbox| {
                let value = self.memory.load_u64(u64::from(mailbox) * 8).ok()?;
                (value != 0).then(|| counter(CounterKind::Received, mailbox, value))
            })
            .collect()
    }

    fn interrupts(&self) -> impl Iterator<Item = Counter> {
        let interrupts = &self.shared.handles.interrupts;
        (0..self.config.vectors).map(|vector| {
            counter(CounterKind::Interrupts, u32::from(vector), interrupts.raised_by(vector))
        })
    }
}

impl CopyEngineConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let size = self.memory_size;
        if !size.is_power_of_two() || !(4096..=MAX_MEMORY_SIZE).contains(&size) {
            return Err(ConfigError::MemorySize(size));
        }
        if self.vectors > MAX_VECTORS {
            return Err(ConfigError::Vectors(self.vectors));
        }
        Ok(())
    }

    fn info(&self, memory: &SharedMemory) -> Result<DeviceInfo, DeviceError> {
        let fd = memory.try_clone_fd().map_err(DeviceError::new)?;
        let registers = Bar { size: REGISTER_BAR_SIZE, backing: BarBacking::Registers };
        let memory = Bar { size: self.memory_size, backing: BarBacking::Memory(fd) };
        let info = DeviceInfo::new(KIND, IDENTITY).bar(0, registers).bar(2, memory);
        Ok(info.msix_vectors(self.vectors))
    }
}

impl Device for CopyEngine {
    fn region_read(&self, bar: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let width = data.len();
        let no_register = AccessError::NoRegister { offset, width };
        let place = Place::new(bar, offset, width).ok_or(no_register)?;
        let (value, size) = self.register(place.register).ok_or(no_register)?;
        if !place.fits(size) {
            return Err(no_register);
        }
        let bytes = (value >> place.shift()).to_le_bytes();
        data.copy_from_slice(bytes.get(..width).ok_or(no_register)?);
        Ok(())
    }

    fn region_write(&self, bar: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let width = data.len();
        let no_register = AccessError::NoRegister { offset, width };
        let place = Place::new(bar, offset, width).ok_or(no_register)?;
        let (old, size) = self.register(place.register).ok_or(no_register)?;
        if !place.fits(size) {
            return Err(no_register);
        }
        let mut bytes = [0; 8];
        bytes.get_mut(..width).ok_or(no_register)?.copy_from_slice(data);
        let written = u64::from_le_bytes(bytes);
        // The other half of a 64-bit register stays. Nobody but a driver changes those that can
        // be written, so it is still what was read above.
        let value = if size == 8 && width == 4 {
            (old & !(u64::from(u32::MAX) << place.shift())) | (written << place.shift())
        } else {
            written
        };
        self.shared.change(|state| {
            self.set_register(state, place.register, value)
                .ok_or(AccessError::BadValue { offset, value: written })
        })
    }

    fn reads_have_side_effects(&self) -> bool {
        false
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let raised = self.shared.handles.interrupts.raised();
        let fresh = State { interrupts_before: raised.wrapping_neg(), ..State::default() };
        self.replace(fresh);
        self.memory.zero();
        Ok(())
    }

    async fn prepare_stop(&self, _budget: Duration) -> Result<(), DeviceError> {
        delay::delay(self.config.slow_prepare).await
    }

    async fn stop(&self, _budget: Duration) -> Result<(), DeviceError> {
        delay::delay(self.config.slow_stop).await
    }

    async fn prepare_start(&self, _budget: Duration) -> Result<(), DeviceError> {
        delay::delay(self.config.slow_prepare_start).await
    }

    async fn start(&self, _budget: Duration) -> Result<(), DeviceError> {
        delay::delay(self.config.slow_start).await
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        let raised = self.shared.handles.interrupts.raised();
        let mut state = self.shared.lock().state.clone();
        state.interrupts_before = state.interrupts_before.wrapping_add(raised);
        state::save(self.shape(), &state, to).map_err(DeviceError::new)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        let mut state = state::load(self.shape(), from).map_err(DeviceError::new)?;
        let raised = self.shared.handles.interrupts.raised();
        state.interrupts_before = state.interrupts_before.wrapping_sub(raised);
        self.replace(state);
        Ok(())
    }

    fn evidence(&self, moment: Moment) -> Evidence {
        match moment {
            Moment::PrepareStopped => Evidence { memory_hash: None, counters: self.written() },
            Moment::StopArrived => Evidence { memory_hash: None, counters: self.received() },
            Moment::StartArrived => {
                let mut counters = self.received();
                counters.extend(self.written());
                counters.extend(self.interrupts());
                Evidence { memory_hash: None, counters }
            }
            Moment::Stopped => {
                let mut counters = self.written();
                counters.extend(self.interrupts());
                Evidence { memory_hash: Some(self.memory.hash()), counters }
            }
        }
    }

    fn progress(&self) -> Option<Progress> {
        // At the gate it is not the engine that takes its time.
        let open = self.shared.handles.dma.is_open();
        let current = self.shared.lock();
        let state = &current.state;
        Some(Progress { done: state.descriptors, pending: open && state.has_work() })
    }
}

impl CopyEngine {
    fn replace(&self, state: State) {
        let replaced: Result<(), Infallible> = self.shared.change(|current| {
            *current = state;
            Ok(Ring::Another)
        });
        let Ok(()) = replaced;
    }
}

impl Drop for CopyEngine {
    fn drop(&mut self) {
        // Not joined: it may wait at a closed gate.
        self.shared.end();
    }
}

/// Where an access goes.
#[derive(Clone, Copy)]
struct Place {
    /// Where the register begins.
    register: u64,
    /// Whether it is the upper half of a 64-bit register.
    upper: bool,
    width: usize,
}

impl Place {
    /// `None` if no register can be accessed like that.
    fn new(bar: u32, offset: u64, width: usize) -> Option<Self> {
        let possible =
            bar == REGISTER_BAR && matches!(width, 4 | 8) && offset.is_multiple_of(width as u64);
        possible.then_some(Self { register: offset & !7, upper: offset & 4 != 0, width })
    }

    /// Whether it is a possible access to a register of that many bytes.
    fn fits(self, size: usize) -> bool {
        (self.width == size && !self.upper) || (self.width == 4 && size == 8)
    }

    fn shift(self) -> u32 {
        if self.upper { 32 } else { 0 }
    }
}

fn counter(kind: CounterKind, index: u32, value: u64) -> Counter {
    Counter { kind, index, value }
}

#[cfg(test)]
mod tests;
