//! A device that was written for the `vhost-user-backend` crate, under a guest: the entropy source of
//! `examples/vhost_user_backend.rs`, which gives each number once.

use crate::machine::{LONG, deadlines};
use serde_json::json;
use standstill::coordinator::{DeviceSpec, MachineBuilder};
use standstill_testkit::qemu::{Guest, Qemu};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// What runs in the guest: it reads random numbers for ever.
const READ: &str = "
while :; do
    echo numbers: $(dd if=/dev/hwrng bs=32 count=1 2>/dev/null | hexdump -v -e '1/4 \"%u \"')
done
";

/// Where cargo has put the example.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/vhost_user_backend");
    assert!(program.is_file(), "{} is missing: `cargo test` builds it", program.display());
    program
}

/// Puts the numbers of some more lines to those that were seen; none may come twice. The largest of them.
fn read(guest: &Guest, seen: &mut BTreeSet<u32>) -> u32 {
    for _ in 0..5 {
        let line = guest.console().wait_for("numbers: ", LONG).unwrap();
        let (_, numbers) = line.split_once("numbers: ").unwrap();
        let numbers: Vec<u32> =
            numbers.split_whitespace().map(|number| number.parse().unwrap()).collect();
        assert_eq!(numbers.len(), 8, "{line}");
        for number in numbers {
            assert!(seen.insert(number), "{number} comes twice");
        }
    }
    *seen.last().unwrap()
}

#[test]
fn a_backend_of_the_crate_serves_a_guest_and_is_paused_between() {
    let Some(qemu) = Qemu::for_tests() else { return };
    let folder = tempfile::Builder::new().prefix("numbers-").tempdir().unwrap();
    let socket = folder.path().join("numbers");
    let device = DeviceSpec::new("numbers", program()).arg("device").arg(&socket);
    let builder = MachineBuilder::new("vm0").deadlines(deadlines());
    let machine = builder.devices([device]).start_blocking().unwrap();
    let guest = qemu
        .guest()
        .module("virtio_pci")
        .module("virtio_rng")
        .option("-chardev", format!("socket,id=numbers,path={}", socket.display()))
        .device(&json!({ "driver": "vhost-user-rng-pci", "chardev": "numbers" }))
        .init(READ)
        .start()
        .unwrap();
    machine.declare_ram(guest.memory()).unwrap();
    let mut seen = BTreeSet::new();
    let mut last = read(&guest, &mut seen);
    for pause in 0..20 {
        let stopped = machine.pause().unwrap();
        // In band while it stands out of band, and the other way round.
        if pause % 2 == 0 {
            guest.stop().unwrap();
            stopped.resume().unwrap();
            guest.go_on().unwrap();
        } else {
            stopped.resume().unwrap();
        }
        let next = read(&guest, &mut seen);
        assert!(next > last, "it begins again: {last}, {next}");
        last = next;
    }
    guest.end().unwrap();
    machine.shutdown().unwrap();
}
