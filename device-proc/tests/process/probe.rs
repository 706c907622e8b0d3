//! The device of these tests: a few registers, some memory, and hooks that do what a script says.
//!
//! | register of BAR 0 | |
//! |---|---|
//! | 0x00 | a number that is kept and saved |
//! | 0x08 | written: raises that MSI-X vector |
//! | 0x10 | written: lets a hook end that the script holds |
//! | 0x20 | written: rings a doorbell that is never served |
//! | 0x18 | written: begins a write of [`COPY_SIZE`] bytes by DMA to that IOVA, on a thread of its own |
//!
//! That write stops half-way, in the middle of its transaction, until the client writes something
//! to the last 8 bytes of the window with its own hands.
//!
//! The script is words: `hold:HOOK` makes the hook wait for register 0x10, `fail:HOOK` makes it
//! fail, `kind:NAME` gives the device another kind, `raise-when-stopped` raises vector 0 right
//! after the stop, `pci:NUMBER` gives it another device id, `version:NUMBER` its state another major
//! version, `memory:PATH` another file of memory, `pre-copy` the PRE_COPY states.

use crate::{foreign, vhost};
use standstill_device_proc::device::{
    AccessError, Bar, BarBacking, Device, DeviceError, DeviceInfo, Handles, Moment, PciIdentity,
    Progress, StateVersion,
};
use standstill_device_proc::interrupt::Interrupts;
use standstill_device_proc::memory::{AccessKind, Dma, Span};
use standstill_device_proc::{ServeOptions, serve};
use standstill_protocol::message::{Counter, CounterKind, Evidence};
use standstill_protocol::migration::MigrationFlags;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

pub(crate) const SCRIPT_VARIABLE: &str = "STANDSTILL_TEST_DEVICE_SCRIPT";

pub(crate) const NUMBER: u64 = 0x00;
pub(crate) const RAISE: u64 = 0x08;
pub(crate) const LET_GO: u64 = 0x10;
pub(crate) const COPY: u64 = 0x18;
pub(crate) const DOORBELL: u64 = 0x20;
/// What a half-way copy writes, in bytes; 8 more bytes behind it let it go on.
pub(crate) const COPY_SIZE: u64 = 4088;
pub(crate) const MEMORY_SIZE: u64 = 256 << 10;

struct Probe {
    script: Vec<String>,
    interrupts: Interrupts,
    dma: Dma,
    number: AtomicU32,
    let_go: Notify,
    rung: AtomicBool,
}

/// Runs as a device process; does not return.
pub(crate) fn run(socket: &str) -> ! {
    let script = std::env::var(SCRIPT_VARIABLE).unwrap_or_default();
    if let Some(script) = script.strip_prefix(foreign::SCRIPT) {
        let served = foreign::run(socket, &script.split_whitespace().collect::<Vec<_>>());
        std::process::exit(served.map_or_else(|error| error.exit_code().into(), |()| 0));
    }
    if let Some(script) = script.strip_prefix(vhost::SCRIPT) {
        let served = vhost::run(socket, &script.split_whitespace().collect::<Vec<_>>());
        std::process::exit(served.map_or_else(|error| error.exit_code().into(), |()| 0));
    }
    if let Some(script) = script.strip_prefix(vhost::disk::SCRIPT) {
        let served = vhost::disk::run(socket, &script.split_whitespace().collect::<Vec<_>>());
        std::process::exit(served.map_or_else(|error| error.exit_code().into(), |()| 0));
    }
    let script: Vec<_> = script.split_whitespace().map(String::from).collect();
    let served = serve(ServeOptions::new(socket), |handles| build(handles, script));
    std::process::exit(served.map_or_else(|error| error.exit_code().into(), |()| 0));
}

fn build(handles: Handles, script: Vec<String>) -> Result<(Probe, DeviceInfo), DeviceError> {
    if script.iter().any(|word| word == "fail:build") {
        return Err(DeviceError::new("as the script says"));
    }
    let word = |key: &str| script.iter().find_map(|word| word.strip_prefix(key));
    let kind = word("kind:").unwrap_or("probe").to_owned();
    let device = word("pci:").map_or(1, |number| number.parse().unwrap());
    let memory = match word("memory:") {
        Some(path) => {
            File::options().read(true).write(true).open(path).map_err(DeviceError::new)?
        }
        None => {
            let memory = tempfile::tempfile().map_err(DeviceError::new)?;
            memory.set_len(MEMORY_SIZE).map_err(DeviceError::new)?;
            memory
        }
    };
    let memory_size = memory.metadata().map_err(DeviceError::new)?.len();
    let major = word("version:").map_or(1, |number| number.parse().unwrap());
    let can_pre_copy = script.iter().any(|word| word == "pre-copy");
    let backing: File = tempfile::tempfile().map_err(DeviceError::new)?;
    let pci = PciIdentity {
        vendor: 0x1af4,
        device,
        subsystem_vendor: 0,
        subsystem: 0,
        class: 0x088000,
        revision: 0,
    };
    let info = DeviceInfo {
        bars: [
            Some(Bar { size: 4096, backing: BarBacking::Registers }),
            None,
            Some(Bar { size: memory_size, backing: BarBacking::Memory(memory.into()) }),
            None,
            None,
            None,
        ],
        msix_vectors: 2,
        migration: if can_pre_copy { MigrationFlags::ALL } else { MigrationFlags::STOP_COPY },
        state_version: StateVersion { major, minor: 0 },
        backing_files: vec![backing.into()],
        ..DeviceInfo::new(kind, pci)
    };
    let probe = Probe {
        script,
        interrupts: handles.interrupts,
        dma: handles.dma,
        number: AtomicU32::new(0),
        let_go: Notify::new(),
        rung: AtomicBool::new(false),
    };
    Ok((probe, info))
}

/// One transaction that stops in its middle.
fn copy_half_way(dma: &Dma, iova: u64) {
    let half = vec![0xc0; usize::try_from(COPY_SIZE / 2).unwrap()];
    let span = Span { iova, len: COPY_SIZE + 8, kind: AccessKind::ReadWrite };
    let access = dma.access(&[span]).unwrap();
    access.write(0, 0, &half).unwrap();
    while access.load_u64(0, COPY_SIZE).unwrap() == 0 {
        std::thread::yield_now();
    }
    access.write(0, COPY_SIZE / 2, &half).unwrap();
}

impl Probe {
    fn says(&self, what: &str, hook: &str) -> bool {
        self.script.iter().any(|word| word.split_once(':') == Some((what, hook)))
    }

    async fn hook(&self, name: &str) -> Result<(), DeviceError> {
        if self.says("hold", name) {
            self.let_go.notified().await;
        }
        if self.says("fail", name) {
            return Err(DeviceError::new("as the script says"));
        }
        Ok(())
    }
}

impl Device for Probe {
    fn region_read(&self, _bar: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if offset != NUMBER || data.len() != 4 {
            return Err(AccessError::NoRegister { offset, width: data.len() });
        }
        data.copy_from_slice(&self.number.load(Ordering::SeqCst).to_le_bytes());
        Ok(())
    }

    fn region_write(&self, _bar: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let no_register = AccessError::NoRegister { offset, width: data.len() };
        let value = u32::from_le_bytes(data.try_into().map_err(|_| no_register)?);
        match offset {
            NUMBER => self.number.store(value, Ordering::SeqCst),
            RAISE => {
                let bad = AccessError::BadValue { offset, value: value.into() };
                self.interrupts.raise(value.try_into().map_err(|_| bad)?);
            }
            LET_GO => self.let_go.notify_one(),
            DOORBELL => self.rung.store(true, Ordering::SeqCst),
            COPY => {
                let dma = self.dma.clone();
                std::thread::spawn(move || copy_half_way(&dma, value.into()));
            }
            _ => return Err(no_register),
        }
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.number.store(0, Ordering::SeqCst);
        Ok(())
    }

    async fn prepare_stop(&self, _budget: Duration) -> Result<(), DeviceError> {
        self.hook("prepare_stop").await
    }

    async fn stop(&self, _budget: Duration) -> Result<(), DeviceError> {
        self.hook("stop").await
    }

    async fn prepare_start(&self, _budget: Duration) -> Result<(), DeviceError> {
        self.hook("prepare_start").await
    }

    async fn start(&self, _budget: Duration) -> Result<(), DeviceError> {
        self.hook("start").await
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        let number = self.number.load(Ordering::SeqCst);
        to.write_all(&number.to_le_bytes()).map_err(DeviceError::new)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        let mut number = [0; 4];
        from.read_exact(&mut number).map_err(DeviceError::new)?;
        self.number.store(u32::from_le_bytes(number), Ordering::SeqCst);
        Ok(())
    }

    fn evidence(&self, moment: Moment) -> Evidence {
        if moment == Moment::Stopped && self.script.iter().any(|word| word == "raise-when-stopped")
        {
            self.interrupts.raise(0);
        }
        let index = moment as u32;
        let counter =
            Counter { kind: CounterKind::Interrupts, index, value: self.interrupts.raised() };
        Evidence { memory_hash: None, counters: vec![counter] }
    }

    fn progress(&self) -> Option<Progress> {
        let done = u64::from(self.number.load(Ordering::SeqCst));
        Some(Progress { done, pending: self.rung.load(Ordering::SeqCst) })
    }
}
