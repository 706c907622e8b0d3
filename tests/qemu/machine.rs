//! A machine of copy engines, and a guest that drives them.

use crate::driver::Role;
use crate::watched;
use standstill::coordinator::blocking::Machine;
use standstill::coordinator::{Deadlines, DeviceSpec, MachineBuilder};
use standstill_testkit::deadlines_of;
use standstill_testkit::qemu::{Guest, GuestBuilder, Qemu};
use std::ops::Deref;
use std::time::Duration;
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
        watched::driven(self.qemu.guest(), self.engines, self.folder.path(), role)
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
        watched::driver_begins(&self.guest, self.engines)
    }

    /// Stops the guest's processors and then all engines, and lets all go on.
    pub(crate) fn pause_and_resume(&self) {
        self.guest.stop().unwrap();
        self.machine.pause().unwrap().resume().unwrap();
        self.guest.go_on().unwrap();
    }

    /// Waits for a round that the driver begins after now.
    pub(crate) fn rounds_go_on(&self) {
        watched::rounds_go_on(&self.guest);
    }

    /// Waits until the engine with that page, which goes round and round, writes.
    pub(crate) fn engine_writes(&self, page: u64) {
        watched::engine_writes(&self.guest, page);
    }

    /// All that the engines can write into RAM.
    pub(crate) fn pages(&self, pages: &[u64]) -> Vec<Vec<u8>> {
        watched::pages(&self.guest, pages)
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
