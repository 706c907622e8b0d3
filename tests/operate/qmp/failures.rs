//! A QEMU that hangs, breaks off, lies or raves: the machine comes to an outcome in time, and nothing is
//! guessed.

use super::{Manner, machine, machine_is, vm_is};
use crate::fixture::Place;

/// Shorter than the ordinary one for what runs out here, and long for what must not.
const DEADLINES: &str = "deadlines = { qmp = \"4s\", undo = \"30s\" }";

/// Tries again until a transition succeeds: the machine is as before when it does not.
#[track_caller]
fn until_done(place: &Place, what: &str) {
    let deadline = std::time::Instant::now() + crate::fixture::PATIENCE;
    loop {
        let output = place.ask(&[what]);
        if output.status.success() {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{what}: {output:?}");
    }
}

#[test]
fn a_qemu_that_does_not_say_where_its_vm_is_leaves_all_as_it_was() {
    let place = Place::new();
    let (_running, vm) = machine(&place, DEADLINES);
    for manner in [Manner::Ignores("query-status"), Manner::Silent] {
        vm.set_manner(manner);
        let said = place.expect(4, &["pause"]);
        assert!(said.contains("pause: RolledBack"), "{manner:?}: {said}");
        assert_eq!(place.json(&["status"])["machine"], "running");
    }
    assert_eq!(vm.commands(), [""; 0]);
    // Another connection is made by itself.
    vm.set_manner(Manner::Good);
    until_done(&place, "pause");
    place.expect(0, &["resume"]);
}

#[test]
fn a_stop_without_an_answer_holds_the_machine_until_qemu_says_where_the_vm_is() {
    for manner in [Manner::DoesNotAnswer("stop"), Manner::Ignores("stop")] {
        let place = Place::new();
        let (_running, vm) = machine(&place, DEADLINES);
        vm.set_manner(manner);
        let said = place.expect(5, &["pause"]);
        assert!(said.contains("pause: Held"), "{manner:?}: {said}");
        assert!(said.contains("hook \"qmp\" has not returned"), "{manner:?}: {said}");
        let said = place.expect(1, &["resume"]);
        assert!(said.contains("the machine is held"), "{said}");
        vm.set_manner(Manner::Good);
        machine_is(&place, "stopped");
        assert_eq!(vm.state(), "paused", "{manner:?}");
        place.expect(0, &["resume"]);
        assert_eq!(vm.state(), "running", "{manner:?}");
        place.expect(0, &["pause"]);
        place.expect(0, &["resume"]);
    }
}

#[test]
fn a_connection_that_ends_in_a_stop_is_made_again_and_tells_the_truth() {
    let place = Place::new();
    let (_running, vm) = machine(&place, "");
    vm.set_manner(Manner::Closes("stop"));
    place.expect(0, &["pause"]);
    assert_eq!(vm.state(), "paused");
    vm.set_manner(Manner::Closes("cont"));
    place.expect(0, &["resume"]);
    assert_eq!(vm.state(), "running");
}

#[test]
fn a_vm_that_is_not_stopped_when_qemu_says_so_is_not_taken_for_stopped() {
    let place = Place::new();
    let (_running, vm) = machine(&place, DEADLINES);
    vm.set_manner(Manner::Lies("stop"));
    let said = place.expect(4, &["pause"]);
    assert!(said.contains("the VM is running still"), "{said}");
    vm.set_manner(Manner::Refuses("stop"));
    let said = place.expect(4, &["pause"]);
    assert!(said.contains("QEMU refuses stop: GenericError: not today"), "{said}");
    vm.set_manner(Manner::Good);
    place.expect(0, &["pause"]);
    vm.set_manner(Manner::Refuses("cont"));
    let said = place.expect(4, &["resume"]);
    assert!(said.contains("QEMU refuses cont: GenericError: not today"), "{said}");
    assert_eq!(place.json(&["status"])["machine"], "stopped");
    vm.set_manner(Manner::Good);
    place.expect(0, &["resume"]);
    assert_eq!(vm.state(), "running");
}

#[test]
fn a_vm_that_is_let_go_on_too_late_does_not_run_over_devices_that_stand() {
    for manner in [Manner::DoesNotAnswer("cont"), Manner::Ignores("cont")] {
        let place = Place::new();
        let (_running, vm) = machine(&place, DEADLINES);
        place.expect(0, &["pause"]);
        vm.set_manner(manner);
        let said = place.expect(5, &["resume"]);
        assert!(said.contains("resume: Held"), "{manner:?}: {said}");
        vm.set_manner(Manner::Good);
        machine_is(&place, "stopped");
        assert_eq!(vm.state(), "paused", "{manner:?}");
        place.expect(0, &["resume"]);
        assert_eq!(vm.state(), "running", "{manner:?}");
    }
}

#[test]
fn a_hold_that_the_owner_accepts_gives_the_call_up_and_no_late_stop_follows() {
    let place = Place::new();
    let (_running, vm) = machine(&place, DEADLINES);
    vm.set_manner(Manner::Ignores("stop"));
    place.expect(5, &["pause"]);
    place.expect(0, &["accept-hold"]);
    place.expect(0, &["resume"]);
    let commands = vm.commands().len();
    vm.set_manner(Manner::Good);
    // The hook takes part again when its call has returned.
    loop {
        assert_eq!(vm.commands().len(), commands, "the VM was stopped out of turn");
        let report = place.json(&["pause"])["report"].clone();
        if !report["hooks"].as_array().unwrap().is_empty() {
            break;
        }
        place.expect(0, &["resume"]);
    }
    assert_eq!(vm.commands().len(), commands + 1);
    assert_eq!(vm.state(), "paused");
    place.expect(0, &["resume"]);
    assert_eq!(vm.state(), "running");
}

#[test]
fn what_is_no_qmp_costs_its_connection_and_no_more() {
    let place = Place::new();
    let (_running, vm) = machine(&place, DEADLINES);
    let hostile = [
        (Manner::Says("query-status", b"HTTP/1.1 400 Bad Request\r\n"), "it sends no QMP"),
        (Manner::Says("query-status", b"\xff\xfe\x00\n"), "it sends no QMP"),
        (
            Manner::Says("query-status", b"{\"return\": {}, \"id\": 18446744073709551615}\n"),
            "not asked",
        ),
        (Manner::Says("query-status", b"{\"return\": {}}\n"), "does not understand us"),
        (Manner::Says("query-status", b"{\"QMP\": {}}\n"), "greets twice"),
        (Manner::Endless("query-status", 8 << 20), "a line of more than"),
        (Manner::Lies("query-status"), "answers query-status with something else"),
    ];
    for (manner, text) in hostile {
        vm.set_manner(manner);
        // A look of its own may be what meets it first, and then there is no connection at once.
        let said = place.expect(4, &["pause"]);
        let missing = place.json(&["status"])["vm"]["missing"].to_string();
        let all = format!("{said}{missing}");
        assert!(all.contains(text) || all.contains("knows no state"), "{manner:?}: {all}");
        vm.set_manner(Manner::Good);
        until_done(&place, "pause");
        place.expect(0, &["resume"]);
        vm_is(&place, "running");
    }
}
