//! Copy engines under a real VMM: Linux in QEMU finds them and drives them from user space, while they
//! are stopped and started, the guest is reset, and one is unplugged.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod driver;
mod foreign;
mod machine;
mod numbers;
mod operated;
mod watched;

use driver::Role;
use machine::{LONG, Vm, name};
use serde_json::json;
use standstill::coordinator::MachineEvent;
use standstill::protocol::message::DeviceEvent;
use standstill::protocol::migration::MigrationState;
use std::time::{Duration, Instant};

/// How often the machine is stopped and started.
const PAUSES: usize = 50;

/// Less than QEMU waits for the answer to an access of its guest, which is 5 s.
const LEASE: Duration = Duration::from_secs(4);

/// Not a test: what runs in the guest.
#[test]
fn driver_in_the_guest() {
    if let Some(role) = Role::of_guest() {
        driver::drive(role);
    }
}

#[test]
fn a_guest_drives_engines_that_are_paused_fifty_times_while_it_stands() {
    let Some(vm) = Vm::start(2) else { return };
    let pages = vm.driver_begins();
    let runner = *pages.last().unwrap();
    for pause in 1..=PAUSES {
        vm.rounds_go_on();
        vm.guest.stop().unwrap();
        // Its processors stand, its devices do not.
        vm.engine_writes(runner);
        let stopped = vm.machine.pause().unwrap();
        let seen = vm.pages(&pages);
        assert_eq!(vm.guest.qmp().execute("query-status", &json!({})).unwrap()["status"], "paused");
        assert!(vm.pages(&pages) == seen, "pause {pause}: RAM changes while all stands");
        stopped.resume().unwrap();
        vm.engine_writes(runner);
        vm.guest.go_on().unwrap();
    }
    vm.rounds_go_on();
    vm.end();
}

#[test]
fn a_guest_that_runs_loses_nothing_while_its_engines_are_stopped_on_lease_fifty_times() {
    let Some(vm) = Vm::start(2) else { return };
    let pages = vm.driver_begins();
    // The driver itself writes into the other pages.
    let (_, runner) = pages.split_at(1);
    let mut in_time = 0;
    for pause in 1..=PAUSES {
        vm.guest.console().wait_for(" is checked", LONG).unwrap();
        vm.engine_writes(runner[0]);
        let begun = Instant::now();
        let stopped = vm.machine.pause_leased(LEASE).unwrap();
        let seen = vm.pages(runner);
        vm.machine.status().unwrap();
        let stands = vm.pages(runner) == seen;
        // On a machine with much else to do this may have taken longer than a lease.
        if begun.elapsed() < LEASE {
            in_time += 1;
            assert!(stands, "pause {pause}: a stopped engine writes");
        }
        stopped.resume().unwrap();
        vm.engine_writes(runner[0]);
    }
    assert!(in_time > PAUSES / 2, "{in_time} of {PAUSES} pauses were within a lease");
    vm.rounds_go_on();
    vm.end();
}

#[test]
fn a_guest_whose_engines_are_not_started_again_is_served_when_their_lease_has_run_out() {
    let Some(vm) = Vm::start(2) else { return };
    vm.driver_begins();
    let mut events = vm.machine.events();
    let stopped = vm.machine.pause_leased(Duration::from_millis(500)).unwrap();
    let expiry = DeviceEvent::LeaseExpired(MigrationState::RunningP2p);
    for _ in 0..2 {
        while !matches!(
            events.recv_timeout(LONG).unwrap(),
            MachineEvent::Device { event, .. } if event == expiry
        ) {}
    }
    // Guest RAM is no peer: they may copy.
    vm.rounds_go_on();
    stopped.resume().unwrap();
    vm.rounds_go_on();
    vm.end();
}

#[test]
fn a_guest_that_is_reset_finds_its_engine_at_rest_and_drives_it_again() {
    let Some(vm) = Vm::start(2) else { return };
    let pages = vm.driver_begins();
    vm.rounds_go_on();
    vm.engine_writes(pages[1]);
    // While its processors stand nobody writes but engines.
    vm.guest.stop().unwrap();
    vm.engine_writes(pages[1]);
    vm.guest.reset().unwrap();
    vm.guest.qmp().wait_for("RESET", LONG).unwrap();
    let seen = vm.pages(&pages);
    vm.machine.status().unwrap();
    assert!(vm.pages(&pages) == seen, "an engine writes after its reset");
    vm.guest.go_on().unwrap();
    let pages = vm.driver_begins();
    vm.engine_writes(pages[1]);
    vm.pause_and_resume();
    vm.rounds_go_on();
    vm.end();
}

#[test]
fn an_engine_that_is_unplugged_stays_in_the_machine_and_the_guest_goes_on() {
    // Without MSI-X: QEMU 11.1 aborts when a vfio-user device that has it is unplugged (it removes the
    // table of pending bits from a BAR that is gone already).
    let Some(vm) = Vm::start_with(2, &["--vectors=0"]) else { return };
    vm.driver_begins();
    vm.rounds_go_on();
    vm.guest.unplug(&name(1), LONG).unwrap();
    vm.rounds_go_on();
    vm.pause_and_resume();
    vm.rounds_go_on();
    let status = vm.machine.status().unwrap();
    assert!(status.devices.iter().all(|device| device.pid.is_some()), "{status:?}");
    vm.end();
}

#[test]
fn device_processes_outlive_their_qemu_and_serve_the_next_one() {
    let Some(vm) = Vm::start(1) else { return };
    vm.driver_begins();
    vm.rounds_go_on();
    let vm = vm.replace_guest();
    vm.driver_begins();
    vm.rounds_go_on();
    vm.pause_and_resume();
    vm.rounds_go_on();
    vm.end();
}

#[test]
fn a_guest_whose_memory_only_qemu_has_is_served_by_messages() {
    let Some(vm) = Vm::start_by_messages(Role::Rounds) else { return };
    vm.driver_begins();
    vm.rounds_go_on();
    for _ in 0..10 {
        // Its processors stand, and QEMU goes on answering.
        vm.pause_and_resume();
        vm.rounds_go_on();
    }
    vm.end();
}

#[test]
fn an_engine_that_may_do_no_dma_halts_and_does_it_when_it_may() {
    let Some(vm) = Vm::start_by_messages(Role::BusMaster) else { return };
    vm.driver_begins();
    vm.rounds_go_on();
    vm.pause_and_resume();
    vm.rounds_go_on();
    vm.end();
}
