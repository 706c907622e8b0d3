//! A machine of copy engines, and a guest that drives them.

use crate::driver::{self, Role};
use standstill::coordinator::blocking::Machine;
use standstill::coordinator::{Deadlines, DeviceSpec, MachineBuilder};
use standstill_testkit::deadlines_of;
use standstill_testkit::qemu::{Guest, GuestBuilder, Qemu};
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// Device processes under a coordinator, and a guest whose QEMU is their client.
///
/// If a test fails, the guest's drop says what the guest and QEMU have said.
pub(crate) struct Vm {
    // First: QEMU must not see its devices die.
    pub(crate) guest: Guest,
    host: Host,
}

/// All but the guest.
pub(crate) struct Host {
    pub(crate) machine: Machine,
    qemu: Qemu,
    engines: usize,
    /// With the sockets; removed at the end.
    folder: TempDir,
}

// Most of what a test does with it is done with the machine.
impl Deref for Vm {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Host {
    /// This many engines. `None` if tests with QEMU are left out.
    fn start(engines: usize, arguments: &[&str]) -> Option<Self> {
        let qemu = Qemu::for_tests()?;
        let folder = tempfile::Builder::new().prefix("vm-").tempdir().unwrap();
        let device = |number| {
            DeviceSpec::new(name(number), env!("CARGO_BIN_EXE_standstill"))
                .args(["device", "copy-engine", "--memory=64KiB", "--socket"])
                .arg(folder.path().join(name(number)))
                .args(arguments)
        };
        let builder = MachineBuilder::new("vm0").deadlines(deadlines());
        let machine = builder.devices((0..engines).map(device)).start_blocking().unwrap();
        Some(Self { machine, qemu, engines, folder })
    }

    /// A guest that drives the engines.
    fn guest(&self, role: Role) -> GuestBuilder<'_> {
        let mut guest = self.qemu.guest();
        for number in 0..self.engines {
            guest = guest.vfio_user(&name(number), &self.folder.path().join(name(number)));
        }
        guest.program("/bin/driver", std::env::current_exe().unwrap()).init(&format!(
            "echo 4 > /proc/sys/vm/nr_hugepages
             {}={} RUST_BACKTRACE=0 driver --exact driver_in_the_guest --nocapture",
            driver::VARIABLE,
            role.word()
        ))
    }

    /// A guest that drives the engines, which reach its RAM.
    fn boot(&self) -> Guest {
        let guest = self.guest(Role::Rounds).start().unwrap();
        self.machine.declare_ram(guest.memory()).unwrap();
        guest
    }
}

impl Vm {
    /// A guest that drives this many engines. `None` if tests with QEMU are left out.
    pub(crate) fn start(engines: usize) -> Option<Self> {
        Self::start_with(engines, &[])
    }

    /// The same with these arguments for each engine.
    pub(crate) fn start_with(engines: usize, arguments: &[&str]) -> Option<Self> {
        let host = Host::start(engines, arguments)?;
        let guest = host.boot();
        Some(Self { guest, host })
    }

    /// One engine, and a guest whose RAM the engine reaches only by asking QEMU for it.
    pub(crate) fn start_by_messages(role: Role) -> Option<Self> {
        let host = Host::start(1, &[])?;
        let guest = host.guest(role).anonymous_memory().start().unwrap();
        Some(Self { guest, host })
    }

    /// Kills QEMU, and boots another guest over the same device processes.
    pub(crate) fn replace_guest(self) -> Self {
        let Self { guest, host } = self;
        drop(guest);
        let guest = host.boot();
        Self { guest, host }
    }

    /// Waits until the driver in the guest has found all engines; gives the physical address of each
    /// one's page.
    pub(crate) fn driver_begins(&self) -> Vec<u64> {
        let page = |_| {
            let line = self.guest.console().wait_for(" has RAM at ", LONG).unwrap();
            let address = line.split("at 0x").nth(1).unwrap().split(' ').next().unwrap();
            u64::from_str_radix(address, 16).unwrap()
        };
        let pages = (0..self.engines).map(page).collect();
        self.guest.console().wait_for(&format!("engines: {}", self.engines), LONG).unwrap();
        pages
    }

    /// Stops the guest's processors and then all engines, and lets all go on.
    pub(crate) fn pause_and_resume(&self) {
        self.guest.stop().unwrap();
        self.machine.pause().unwrap().resume().unwrap();
        self.guest.go_on().unwrap();
    }

    /// Waits for a round that the driver begins after now.
    pub(crate) fn rounds_go_on(&self) {
        self.guest.console().catch_up();
        // The first one may have begun before.
        for _ in 0..2 {
            self.guest.console().wait_for(" is checked", LONG).unwrap();
        }
    }

    /// How often the engine that goes round and round has done so.
    pub(crate) fn sequence(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        let at = page + driver::SEQUENCE;
        self.guest.memory().read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Waits until that engine writes.
    pub(crate) fn engine_writes(&self, page: u64) {
        let before = self.sequence(page);
        let end = Instant::now() + LONG;
        while self.sequence(page) == before {
            assert!(Instant::now() < end, "the engine does not write: {before}");
            std::thread::yield_now();
        }
    }

    /// All that the engines can write into RAM.
    pub(crate) fn pages(&self, pages: &[u64]) -> Vec<Vec<u8>> {
        let page = |&address: &u64| {
            let mut bytes = vec![0; driver::HUGE_PAGE];
            self.guest.memory().read_exact_at(&mut bytes, address).unwrap();
            bytes
        };
        pages.iter().map(page).collect()
    }

    /// Ends all, in good order.
    pub(crate) fn end(self) {
        self.guest.end().unwrap();
        self.host.machine.shutdown().unwrap();
    }
}

/// The name of an engine, for the coordinator and for QEMU.
pub(crate) fn name(engine: usize) -> String {
    format!("engine{engine}")
}

/// Deadlines that never run out.
pub(crate) fn deadlines() -> Deadlines {
    deadlines_of(LONG)
}
