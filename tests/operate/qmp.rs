//! A VM that stops before its devices: QEMU is played by the test.

mod failures;
mod played;

use crate::fixture::{PATIENCE, Place, Running, two_engines};
use played::{Manner, Played};
use serde_json::Value;
use std::time::Instant;

/// A machine whose QEMU serves QMP at `qmp.sock`, with these lines.
fn with_vm(place: &Place, lines: &str) -> String {
    let lines = match lines.contains("deadlines") {
        true => lines.to_owned(),
        // One that does not run out, whatever the machine has else to do.
        false => format!("{lines}\ndeadlines = {{ qmp = \"30s\" }}"),
    };
    two_engines(&format!("qmp = {:?}\n{lines}", place.path("qmp.sock")))
}

/// A machine that runs, with a VM that its `standstill run` knows.
fn machine(place: &Place, lines: &str) -> (Running, Played) {
    let vm = Played::begin(&place.path("qmp.sock"));
    let running = place.run(&with_vm(place, lines));
    vm_is(place, "running");
    (running, vm)
}

/// Waits until the status says that of the VM.
#[track_caller]
fn vm_is(place: &Place, state: &str) {
    place.status_until(state, |status| status["vm"]["state"] == state);
}

/// Waits until the machine is in that state.
#[track_caller]
fn machine_is(place: &Place, state: &str) {
    place.status_until(state, |status| status["machine"] == state);
}

fn nanos(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no time: {value}"))
}

#[test]
fn the_vm_stops_before_its_devices_and_goes_on_after_them() {
    let place = Place::new();
    let (_running, vm) = machine(&place, "");
    let report = place.json(&["pause"])["report"].clone();
    vm_is(&place, "paused");
    let stood = nanos(&report["hooks"][0]["returned_ns"]);
    assert_eq!(
        (&report["hooks"][0]["name"], report["hooks"].as_array().unwrap().len()),
        (&"qmp".into(), 1)
    );
    for participant in report["participants"].as_array().unwrap() {
        let told = nanos(&participant["commands"][0]["sent_ns"]);
        assert!(stood <= told, "{participant} was told at {told}, the VM stood at {stood}");
    }
    let report = place.json(&["resume"])["report"].clone();
    let went_on = nanos(&report["hooks"][0]["called_ns"]);
    for participant in report["participants"].as_array().unwrap() {
        let ran = nanos(&participant["commands"][1]["answered_ns"]);
        assert!(ran <= went_on, "{participant} ran at {ran}, the VM went on at {went_on}");
    }
    vm_is(&place, "running");
    assert_eq!(vm.commands(), ["stop", "cont"]);
    let said = place.expect(0, &["status"]);
    assert!(said.contains("VM: running, QEMU 11.1.0 at "), "{said}");
}

#[test]
fn it_is_paused_often_over_one_connection_whatever_comes_in_between() {
    let place = Place::new();
    let (_running, vm) = machine(&place, "");
    for _ in 0..20 {
        place.expect(0, &["pause"]);
        place.expect(0, &["resume"]);
    }
    assert_eq!(vm.commands().len(), 40);
    assert_eq!(vm.connections(), 1);
}

#[test]
fn a_vm_that_its_owner_has_stopped_stays_stopped() {
    let place = Place::new();
    let (_running, vm) = machine(&place, "");
    vm.set_state("paused");
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    assert_eq!(vm.commands(), [""; 0]);
    assert_eq!(vm.state(), "paused");
}

#[test]
fn a_pause_that_is_rolled_back_lets_the_vm_go_on_if_it_ran_before() {
    let place = Place::new();
    let hook = "hook = [{ name = \"disk\", slot = \"after\", stop = [\"false\"] }]";
    let (_running, vm) = machine(&place, hook);
    let said = place.expect(4, &["pause"]);
    assert!(said.contains("pause: RolledBack"), "{said}");
    assert_eq!(vm.commands(), ["stop", "cont"]);
    assert_eq!(vm.state(), "running");
    vm.set_state("paused");
    place.expect(4, &["pause"]);
    assert_eq!(vm.commands().len(), 2, "its owner had stopped it");
}

#[test]
fn a_vm_that_qemu_starts_by_itself_soon_is_not_taken_for_stopped() {
    let place = Place::new();
    let (_running, vm) = machine(&place, "");
    vm.set_state("inmigrate");
    let said = place.expect(4, &["pause"]);
    assert!(said.contains("QEMU is busy with the VM (inmigrate)"), "{said}");
    assert_eq!(place.json(&["status"])["machine"], "running");
}

#[test]
fn a_vm_that_has_ended_meanwhile_does_not_hold_its_devices_up() {
    let place = Place::new();
    let (_running, vm) = machine(&place, "");
    place.expect(0, &["pause"]);
    vm.set_state("shutdown");
    place.expect(0, &["resume"]);
    assert_eq!(vm.commands(), ["stop"]);
}

#[test]
fn qemu_need_not_be_there_yet_and_status_says_so() {
    let place = Place::new();
    let _running = place.run(&with_vm(&place, ""));
    let missing = |status: &Value| status["vm"]["missing"].as_str().unwrap_or_default().to_owned();
    let status =
        place.status_until("looked for", |status| missing(status).contains("no such socket"));
    assert_eq!(status["vm"]["state"], Value::Null);
    let said = place.expect(0, &["status"]);
    assert!(said.contains("VM: cannot be stopped, no QMP at "), "{said}");
    let said = place.expect(4, &["pause"]);
    assert!(said.contains("hook \"qmp\" refused") && said.contains("no such socket"), "{said}");
    let vm = Played::begin(&place.path("qmp.sock"));
    // At once: nobody waits for the next look.
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    vm_is(&place, "running");
    drop(vm);
    let status = place.status_until("lost", |status| status["vm"]["state"] == Value::Null);
    assert!(!missing(&status).is_empty(), "{status}");
    let vm = Played::begin(&place.path("qmp.sock"));
    place.expect(0, &["pause"]);
    assert_eq!(vm.commands(), ["stop"]);
}

#[test]
fn what_happens_to_the_vm_is_in_the_log() {
    let place = Place::new();
    let (running, vm) = machine(&place, "");
    vm.tells("STOP", "paused");
    vm_is(&place, "paused");
    vm.tells("RESUME", "running");
    vm_is(&place, "running");
    place.expect(0, &["pause"]);
    vm_is(&place, "paused");
    vm.tells("RESUME", "running");
    vm_is(&place, "running");
    vm.tells("GUEST_PANICKED", "guest-panicked");
    vm_is(&place, "guest-panicked");
    running.signal(rustix::process::Signal::TERM);
    let log = running.ends().stderr;
    for part in [
        "connected to QEMU 11.1.0, whose VM is running",
        "somebody else has stopped the VM",
        "somebody else lets the VM go on event",
        "ERROR",
        "somebody else lets the VM go on while its devices stand",
        "the guest has panicked",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn a_flood_of_events_holds_nobody_up_and_does_not_fill_the_log() {
    let place = Place::new();
    let (running, vm) = machine(&place, "");
    for _ in 0..20_000 {
        vm.tells("RESET", "running");
    }
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    place.expect(0, &["shutdown"]);
    let log = running.ends().stderr;
    let lines = log.matches("the VM is reset").count();
    // Twenty in a second; how long it takes is the machine's business.
    assert!((1..5000).contains(&lines), "{lines} lines");
}

#[test]
fn a_vm_goes_on_also_if_the_run_that_has_paused_it_is_gone() {
    let place = Place::new();
    let (running, vm) = machine(&place, "");
    place.expect(0, &["pause"]);
    running.kill();
    let file = place.path("vm0.toml");
    let mut running = place.begin(&["--attach", file.to_str().unwrap()]);
    let said = running.is_up();
    assert!(said.contains("take-over: Held"), "{said}");
    place.expect(0, &["accept-hold"]);
    place.expect(0, &["resume"]);
    assert_eq!(vm.commands(), ["stop", "cont"]);
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    assert_eq!(vm.commands().len(), 4);
}

#[test]
fn a_vm_goes_on_if_the_run_that_has_stopped_it_is_killed_before_it_has_stopped_anything_else() {
    let place = Place::new();
    // The next hook never returns: no device is told anything.
    let hook = "hook = [{ name = \"slow\", slot = \"before\", rank = 1, stop = [\"sleep\", \"1000\"], \
                deadline = \"1000s\" }]";
    let (running, vm) = machine(&place, hook);
    let mut pausing = place.connect();
    pausing.send(1, "pause", &serde_json::json!({}));
    vm_is(&place, "paused");
    let asleep = place.json(&["status"])["pid"].as_u64().unwrap();
    let sleeper = child_of(asleep, "sleep");
    running.kill();
    rustix::process::kill_process(sleeper, rustix::process::Signal::KILL).unwrap();
    let file = place.path("vm0.toml");
    let mut running = place.begin(&["--attach", file.to_str().unwrap()]);
    let said = running.is_up();
    assert!(said.contains("take-over: Done"), "{said}");
    vm_is(&place, "running");
    assert_eq!(vm.commands(), ["stop", "cont"]);
}

/// Waits for a child of a process that runs this program.
fn child_of(parent: u64, program: &str) -> rustix::process::Pid {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).unwrap();
        for task in tasks.filter_map(Result::ok) {
            let children =
                std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                let name =
                    std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
                if name.trim() == program {
                    return rustix::process::Pid::from_raw(child.parse().unwrap()).unwrap();
                }
            }
        }
        assert!(Instant::now() < deadline, "{program} is not there");
    }
}
