//! Guests that move while they write: to another VMM, with another device process over the same image,
//! and into a file and out of it.

use crate::vm::{Host, LONG, NAME, Vm, restarts};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

/// For two device processes that have the image by turns. Some requests are in flight at most times.
const SHARED: [&str; 2] = ["--lock=rings", "--delay=2ms"];

/// In bytes for each second: the migration of a guest that writes has no end.
const FOR_EVER: u64 = 1 << 20;
const UNLIMITED: u64 = 1 << 40;

/// `SET_LOG_BASE`, as QEMU's trace has it.
const LOGS: &str = "req:6 ";

impl Vm {
    /// Where its QEMU writes down which messages it sends to the device.
    fn trace(host: &Host) -> PathBuf {
        host.folder.path().join("trace")
    }

    fn boot_traced(host: Host) -> Self {
        let trace = Self::trace(&host);
        let vm = Self::with(host, |guest| {
            guest.option("-trace", "vhost_user_write").option("-D", trace)
        });
        vm.goes_on();
        vm
    }

    /// A VMM that waits for a guest.
    fn destination(host: Host) -> Self {
        let trace = Self::trace(&host);
        Self::with(host, |guest| {
            guest.incoming().option("-trace", "vhost_user_write").option("-D", trace)
        })
    }

    /// Whether the device was told to log the pages that it writes.
    fn has_logged(&self) -> bool {
        fs::read_to_string(Self::trace(&self.host)).unwrap().contains(LOGS)
    }

    /// Ends all, after the guest has moved on.
    fn leave(self) {
        self.guest.end().unwrap();
        self.host.machine.shutdown().unwrap();
    }

    /// Waits until there are requests in the rings that the device has not used.
    fn requests_wait(&self) {
        let path = format!("/machine/peripheral/{NAME}/virtio-backend");
        let index = |ring: &serde_json::Value| {
            let mut index = [0; 2];
            self.guest.memory().read_exact_at(&mut index, ring.as_u64().unwrap() + 2).unwrap();
            u16::from_le_bytes(index)
        };
        let waits = |queue: u16| {
            let arguments = json!({ "path": path, "queue": queue });
            let status =
                self.guest.qmp().execute("x-query-virtio-queue-status", &arguments).unwrap();
            index(&status["vring-avail"]) != index(&status["vring-used"])
        };
        let end = Instant::now() + LONG;
        while !waits(0) && !waits(1) {
            assert!(Instant::now() < end, "no request waits");
        }
    }
}

#[test]
fn a_guest_that_writes_moves_to_another_vmm_and_on_to_a_third() {
    let Some(host) = Host::start(2, &SHARED) else { return };
    let mut vm = Vm::boot_traced(host);
    for _ in 0..2 {
        assert!(!vm.has_logged());
        let next = Vm::destination(vm.host.beside());
        let socket = next.folder.path().join("migration");
        vm.guest.move_to(&next.guest, &socket, LONG).unwrap();
        assert!(vm.has_logged());
        next.goes_on();
        vm.leave();
        vm = next;
        vm.machine.pause().unwrap().resume().unwrap();
        vm.all_is_right();
    }
    vm.end();
}

#[test]
fn a_device_that_is_killed_while_its_guest_moves_is_followed_and_nothing_is_lost() {
    let Some(host) = Host::start_with(2, &SHARED, restarts()) else { return };
    let vm = Vm::boot_traced(host);
    let next = Vm::destination(vm.host.beside());
    let uri = format!("unix:{}", next.folder.path().join("migration").display());
    next.guest.begin_to_receive(&uri).unwrap();
    vm.guest.limit_migration(FOR_EVER).unwrap();
    vm.guest.begin_to_send(&uri).unwrap();
    vm.guest.wait_for_migration("active", LONG).unwrap();
    vm.goes_on();
    let joined = vm.kill();
    println!("joined again after {joined:?}");
    vm.goes_on();
    assert!(vm.has_logged());
    vm.guest.limit_migration(UNLIMITED).unwrap();
    vm.guest.wait_for_migration("completed", LONG).unwrap();
    next.guest.goes_on_here(LONG).unwrap();
    next.all_is_right();
    vm.leave();
    next.end();
}

/// The second time the device is stopped out of band at that time, and requests wait in its rings.
#[test]
fn a_guest_is_saved_into_a_file_and_goes_on_in_another_vmm() {
    let Some(mut vm) = Vm::start(2, &["--delay=2ms"]) else { return };
    for is_stopped in [false, true] {
        let stopped = is_stopped.then(|| vm.machine.pause().unwrap());
        if is_stopped {
            vm.requests_wait();
        }
        let file = vm.folder.path().join("guest");
        let uri = format!("file:{}", file.display());
        vm.guest.begin_to_send(&uri).unwrap();
        vm.guest.wait_for_migration("completed", LONG).unwrap();
        if let Some(stopped) = stopped {
            stopped.resume().unwrap();
        }
        let Vm { guest, host } = vm;
        guest.end().unwrap();
        // Nobody has the image any more.
        host.machine.shutdown().unwrap();
        vm = Vm::destination(host.beside());
        vm.guest.begin_to_receive(&uri).unwrap();
        vm.guest.goes_on_here(LONG).unwrap();
        vm.goes_on();
        vm.all_is_right();
    }
    vm.end();
}
