//! A machine with disks, and a guest that has them.

use crate::driver;
use rustix::process::{Pid, Signal};
use standstill::coordinator::blocking::Machine;
use standstill::coordinator::{
    DeviceSpec, LossPolicy, MachineBuilder, MachineEvent, RestartPolicy,
};
use standstill_testkit::qemu::{Guest, GuestBuilder, Qemu};
use standstill_testkit::{deadlines_of, log};
use std::fs::File;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// Size of a disk in bytes.
const DISK: u64 = 64 << 20;

/// A disk, for the coordinator and for QEMU.
pub(crate) const NAME: &str = "disk0";

/// A device process under a coordinator, and a guest whose QEMU is its frontend.
///
/// If a test fails, the guest's drop says what the guest and QEMU have said, and the host's what was
/// logged.
pub(crate) struct Vm {
    // First: QEMU must not see its devices die.
    pub(crate) guest: Guest,
    pub(crate) host: Host,
}

/// All but the guest.
pub(crate) struct Host {
    pub(crate) machine: Machine,
    pub(crate) qemu: Qemu,
    /// With the socket; removed at the end.
    pub(crate) folder: TempDir,
    /// With the image.
    images: Arc<TempDir>,
    queues: u16,
    arguments: Vec<String>,
}

// Most of what a test does with it is done with the machine.
impl Deref for Vm {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Host {
    /// One disk, whose device process gets these arguments, too. `None` if tests with QEMU are left out.
    pub(crate) fn start(queues: u16, arguments: &[&str]) -> Option<Self> {
        Self::start_with(queues, arguments, LossPolicy::Fail)
    }

    /// The same, with what is done when the device is lost.
    pub(crate) fn start_with(queues: u16, arguments: &[&str], on_loss: LossPolicy) -> Option<Self> {
        // Not in memory, for what goes past the page cache.
        let images =
            tempfile::Builder::new().prefix("disk-").tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        let images = Arc::new(images.unwrap());
        File::create(images.path().join("image")).unwrap().set_len(DISK).unwrap();
        let arguments = arguments.iter().copied().map(str::to_owned).collect();
        Self::over(images, queues, arguments, on_loss)
    }

    /// Another machine, with a disk of the same image.
    pub(crate) fn beside(&self) -> Self {
        let (images, arguments) = (Arc::clone(&self.images), self.arguments.clone());
        Self::over(images, self.queues, arguments, LossPolicy::Fail).unwrap()
    }

    fn over(
        images: Arc<TempDir>,
        queues: u16,
        arguments: Vec<String>,
        on_loss: LossPolicy,
    ) -> Option<Self> {
        let qemu = Qemu::for_tests()?;
        log::keep();
        let folder = tempfile::Builder::new().prefix("vm-").tempdir().unwrap();
        let device = DeviceSpec::new(NAME, env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "vhost-user-blk", "--serial=disk0", "--file"])
            .arg(images.path().join("image"))
            .arg("--socket")
            .arg(folder.path().join(NAME))
            .arg(format!("--queues={queues}"))
            .args(&arguments);
        let builder = MachineBuilder::new("vm0").deadlines(deadlines_of(LONG));
        let machine = builder.devices([device.on_loss(on_loss)]).start_blocking().unwrap();
        Some(Self { machine, qemu, folder, images, queues, arguments })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join(NAME)
    }

    /// A guest that has the disk.
    pub(crate) fn guest(&self, script: &str) -> GuestBuilder<'_> {
        self.qemu
            .guest()
            .processors(u32::from(self.queues))
            .vhost_user_blk(NAME, &self.socket(), self.queues)
            .program("/bin/driver", std::env::current_exe().unwrap())
            .init(script)
    }
}

impl Drop for Host {
    #[expect(clippy::print_stderr, reason = "a test that fails says what it knows")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("what was logged, by the devices of other tests, too:\n{}", log::text());
        }
    }
}

impl Vm {
    /// A guest that writes and reads its disk for ever.
    pub(crate) fn start(queues: u16, arguments: &[&str]) -> Option<Self> {
        Some(Self::boot(Host::start(queues, arguments)?))
    }

    pub(crate) fn boot(host: Host) -> Self {
        let vm = Self::with(host, |guest| guest);
        vm.goes_on();
        vm
    }

    /// A guest that is described further; what it writes is not waited for.
    pub(crate) fn with(
        host: Host,
        more: impl FnOnce(GuestBuilder<'_>) -> GuestBuilder<'_>,
    ) -> Self {
        let guest = more(host.guest(&writes())).start().unwrap();
        host.machine.declare_ram(guest.memory()).unwrap();
        Self { guest, host }
    }

    /// Waits for what is written, read and found right after now.
    pub(crate) fn goes_on(&self) {
        self.guest.console().catch_up();
        // The first one may have been said before.
        for _ in 0..2 {
            self.guest.console().wait_for(" writes are checked", LONG).unwrap();
        }
    }

    /// Has the guest read all that it has written, and find it right.
    pub(crate) fn all_is_right(&self) {
        self.guest.console().write("check").unwrap();
        self.guest.console().wait_for("all blocks are right", LONG).unwrap();
    }

    /// Kills the device process, and waits for the one that follows it. Returns how long that took to join.
    pub(crate) fn kill(&self) -> Duration {
        let mut events = self.machine.events();
        let status = self.machine.status().unwrap();
        let pid = status.devices[0].pid.and_then(|pid| Pid::from_raw(pid.cast_signed())).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        loop {
            match events.recv_timeout(LONG).unwrap() {
                MachineEvent::DeviceJoined { device, took, .. } if device == NAME => return took,
                _ => {}
            }
        }
    }

    /// Ends all, in good order.
    pub(crate) fn end(self) {
        self.goes_on();
        self.guest.end().unwrap();
        self.host.machine.shutdown().unwrap();
    }
}

/// A device that is lost is started again, however often.
pub(crate) fn restarts() -> LossPolicy {
    LossPolicy::Restart(RestartPolicy {
        budget: u32::MAX,
        window: Duration::from_secs(3600),
        first_backoff: Duration::from_millis(10),
        longest_backoff: Duration::from_millis(10),
    })
}

/// The script of a guest that writes and reads its disk for ever.
pub(crate) fn writes() -> String {
    // If it ends, the guest does, and nobody waits for it any more.
    format!(
        "{}=/dev/vda RUST_BACKTRACE=0 driver --exact driver_in_the_guest --nocapture",
        driver::VARIABLE
    )
}
