//! Disks under a real VMM: Linux in QEMU uses a vhost-user-blk device of this project, whose process is
//! stopped and started under its requests, and killed; and the guest moves.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod driver;
mod moves;
mod vm;

use vm::{Host, LONG, Vm};

/// How often the machine is stopped and started under I/O.
const PAUSES: usize = 200;

/// How often the device process is killed.
const KILLS: usize = 30;

/// How long each request takes longer than it has to, so that some are in flight at most times.
const DELAY: &str = "--delay=20ms";

/// Not a test: what runs in the guest.
#[test]
fn driver_in_the_guest() {
    if let Ok(disk) = std::env::var(driver::VARIABLE) {
        driver::drive(&disk);
    }
}

#[test]
fn a_file_system_is_made_and_its_files_are_what_they_were() {
    let Some(host) = Host::start(1, &[]) else { return };
    let script = "
        echo serial $(cat /sys/block/vda/serial)
        mkdir /mnt
        mke2fs -F /dev/vda >/dev/null && mount -t ext2 /dev/vda /mnt || exit
        for n in $(seq 24); do dd if=/dev/urandom of=/mnt/$n bs=64k count=$n 2>/dev/null; done
        rm -r /mnt/lost+found
        (cd /mnt && sha256sum * > /tmp/sums && mv /tmp/sums sums)
        umount /mnt && mount -t ext2 /dev/vda /mnt && fstrim /mnt
        (cd /mnt && sha256sum -c sums >/tmp/checked && echo files: $(grep -c OK /tmp/checked))
        umount /mnt && echo done";
    let guest = host.guest(script).start().unwrap();
    host.machine.declare_ram(guest.memory()).unwrap();
    guest.console().wait_for("serial disk0", LONG).unwrap();
    guest.console().wait_for("files: 24", LONG).unwrap();
    guest.console().wait_for("done", LONG).unwrap();
    assert!(guest.wait(LONG).unwrap().success());
    host.machine.shutdown().unwrap();
}

#[test]
fn a_disk_is_stopped_and_started_two_hundred_times_under_requests() {
    let Some(vm) = Vm::start(2, &[DELAY]) else { return };
    let mut with_requests = 0;
    for pause in 1..=PAUSES {
        let stopped = vm.machine.pause().unwrap();
        let in_flight = standstill_testkit::vhost_user::in_flight(stopped.report());
        println!("pause {pause}: {in_flight} requests were in flight");
        with_requests += usize::from(in_flight > 0);
        stopped.resume().unwrap();
        if pause % 20 == 0 {
            vm.goes_on();
        }
    }
    assert!(with_requests > PAUSES / 2, "{with_requests} of {PAUSES} pauses met requests");
    vm.end();
}

#[test]
fn stops_of_the_vm_and_of_the_device_come_in_every_order() {
    let Some(vm) = Vm::start(2, &[DELAY]) else { return };
    for round in 0..20 {
        match round % 4 {
            0 => {
                vm.guest.stop().unwrap();
                let stopped = vm.machine.pause().unwrap();
                stopped.resume().unwrap();
                vm.guest.go_on().unwrap();
            }
            1 => {
                let stopped = vm.machine.pause().unwrap();
                vm.guest.stop().unwrap();
                vm.guest.go_on().unwrap();
                stopped.resume().unwrap();
            }
            2 => {
                vm.guest.stop().unwrap();
                let stopped = vm.machine.pause().unwrap();
                vm.guest.go_on().unwrap();
                stopped.resume().unwrap();
            }
            _ => {
                let stopped = vm.machine.pause().unwrap();
                vm.guest.stop().unwrap();
                stopped.resume().unwrap();
                vm.guest.go_on().unwrap();
            }
        }
        vm.goes_on();
    }
    vm.end();
}

#[test]
fn a_disk_whose_process_is_killed_thirty_times_loses_nothing() {
    let Some(host) = Host::start_with(2, &[DELAY], vm::restarts()) else { return };
    let vm = Vm::boot(host);
    for kill in 1..=KILLS {
        if kill % 2 == 0 {
            vm.goes_on();
        }
        let joined = vm.kill();
        println!("kill {kill}: joined again after {joined:?}");
    }
    vm.end();
}

#[test]
fn a_stop_of_the_vm_waits_for_the_requests_of_a_slow_disk() {
    let Some(vm) = Vm::start(1, &["--delay=1s"]) else { return };
    for _ in 0..3 {
        vm.guest.stop().unwrap();
        vm.guest.go_on().unwrap();
        vm.machine.pause().unwrap().resume().unwrap();
    }
    vm.end();
}
