//! A device that was written for the server of the `vfio_user` crate, under a guest: the GPIO line of
//! `examples/foreign_backend.rs`, which is pulled every third time that it is looked at.

use crate::machine::{LONG, deadlines};
use standstill::coordinator::{DeviceSpec, MachineBuilder};
use standstill_testkit::qemu::{Guest, Qemu};
use std::path::PathBuf;

/// What runs in the guest: it looks at the line for ever.
const LOOK: &str = r#"
for device in /sys/bus/pci/devices/*; do
    [ "$(cat $device/vendor)" = 0x494f ] && gpio=$device
done
echo 1 > $gpio/enable
while :; do
    echo "gpio reads $(dd if=$gpio/resource2 bs=1 count=1 2>/dev/null | hexdump -v -e '1/1 "%d"')"
done
"#;

/// Where cargo has put the example.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/foreign_backend");
    assert!(program.is_file(), "{} is missing: `cargo test` builds it", program.display());
    program
}

/// Whether the line is pulled, the next times that the guest looks at it.
fn seen(guest: &Guest, times: usize) -> Vec<bool> {
    let look = |_| {
        let line = guest.console().wait_for("gpio reads ", LONG).unwrap();
        match line.trim().rsplit(' ').next().unwrap() {
            "0" => false,
            "1" => true,
            _ => panic!("the guest cannot look: {line}"),
        }
    };
    (0..times).map(look).collect()
}

#[test]
fn a_device_of_another_server_is_looked_at_by_a_guest_and_paused_between() {
    let Some(qemu) = Qemu::for_tests() else { return };
    let folder = tempfile::Builder::new().prefix("gpio-").tempdir().unwrap();
    let socket = folder.path().join("gpio");
    let gpio = DeviceSpec::new("gpio", program()).arg("device").arg(&socket);
    let builder = MachineBuilder::new("vm0").deadlines(deadlines());
    let machine = builder.devices([gpio]).start_blocking().unwrap();
    let guest = qemu.guest().vfio_user("gpio", &socket).init(LOOK).start().unwrap();
    machine.declare_ram(guest.memory()).unwrap();

    let mut all = seen(&guest, 7);
    for _ in 0..10 {
        guest.stop().unwrap();
        machine.pause().unwrap().resume().unwrap();
        guest.go_on().unwrap();
        // What was said before is in between.
        all.extend(seen(&guest, 7));
    }
    let third = all.iter().position(|pulled| *pulled).unwrap();
    for (look, pulled) in all.iter().enumerate() {
        assert_eq!(*pulled, look % 3 == third % 3, "look {look} of {all:?}");
    }
    guest.end().unwrap();
    machine.shutdown().unwrap();
}
