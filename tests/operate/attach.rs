//! Machines that outlive their `standstill run`.

use crate::fixture::{Place, gone, last_of, send, two_engines};
use rustix::process::Signal;
use std::time::Duration;

/// Takes the machine over; returns it and what it said.
fn attach(place: &Place) -> (crate::fixture::Running, String) {
    let file = place.path("vm0.toml");
    let mut running = place.begin(&["--attach", file.to_str().unwrap()]);
    let said = running.is_up();
    (running, said)
}

#[test]
fn devices_outlive_a_run_that_is_killed_and_are_taken_over() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let pids = [place.pid_of("engine0"), place.pid_of("engine1")];
    running.kill();
    let said = place.expect(6, &["status"]);
    assert!(said.contains("standstill run --attach"), "{said}");
    let file = place.path("vm0.toml");
    let said = place.expect(1, &["run", file.to_str().unwrap()]);
    assert!(said.contains("was left behind") && said.contains("engine0, engine1"), "{said}");
    let (running, said) = attach(&place);
    assert!(said.contains("take-over: Done"), "{said}");
    assert_eq!(pids, [place.pid_of("engine0"), place.pid_of("engine1")]);
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    place.expect(0, &["shutdown"]);
    assert_eq!(running.ends().status.code(), Some(0));
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn of_several_that_take_a_machine_over_at_once_one_has_it_whole() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let pids = [place.pid_of("engine0"), place.pid_of("engine1")];
    running.kill();
    let file = place.path("vm0.toml");
    let mut rivals: Vec<_> =
        (0..4).map(|_| place.begin(&["--attach", file.to_str().unwrap()])).collect();
    // A test that fails kills what they have left by the last one.
    rivals.iter_mut().skip(1).for_each(crate::fixture::Running::gives_up_its_devices);
    let winner = last_of(&rivals);
    let mut winner = rivals.swap_remove(winner);
    winner.is_up();
    for rival in rivals {
        let ended = rival.ends();
        assert!(matches!(ended.status.code(), Some(1 | 7)), "{}: {}", ended.status, ended.stderr);
    }
    assert_eq!(pids, [place.pid_of("engine0"), place.pid_of("engine1")], "nobody was harmed");
    let said = place.expect(1, &["run", file.to_str().unwrap()]);
    assert!(said.contains("is run by another process"), "{said}");
    place.expect(0, &["pause"]);
    place.expect(0, &["shutdown"]);
    assert_eq!(winner.ends().status.code(), Some(0));
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn a_machine_that_stood_is_held_until_its_owner_decides() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    place.expect(0, &["pause"]);
    running.kill();
    let (_running, said) = attach(&place);
    assert!(said.contains("take-over: Held") && said.contains("\"vm0\" is held"), "{said}");
    let said = place.expect(0, &["status"]);
    assert!(said.contains("held: a device had reached STOP"), "{said}");
    let said = place.expect(1, &["resume"]);
    assert!(said.contains("the machine is held") && said.contains("accept-hold"), "{said}");
    assert!(place.expect(0, &["accept-hold"]).contains("accepted"));
    let said = place.expect(1, &["accept-hold"]);
    assert!(said.contains("not held"), "{said}");
    place.expect(0, &["resume"]);
    assert_eq!(place.json(&["status"])["machine"], "running");
}

#[test]
fn devices_are_left_for_a_later_run() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let pids = [place.pid_of("engine0"), place.pid_of("engine1")];
    let said = place.expect(0, &["shutdown", "--keep-devices"]);
    assert!(said.contains("standstill run --attach"), "{said}");
    let mut running = running;
    running.gives_up_its_devices();
    assert_eq!(running.ends().status.code(), Some(0));
    assert!(!place.runtime().join("vm0/operator.sock").exists());
    let (_running, _) = attach(&place);
    assert_eq!(pids, [place.pid_of("engine0"), place.pid_of("engine1")]);
}

#[test]
fn a_run_that_hangs_loses_its_machine_and_harms_nobody_when_it_wakes() {
    let place = Place::new();
    let mut hung = place.run(&two_engines(""));
    hung.signal(Signal::STOP);
    let said = place.expect(6, &["status"]);
    assert!(said.contains("hangs") && said.contains("--attach"), "{said}");
    let (_running, said) = attach(&place);
    assert!(said.contains("take-over: Done"), "{said}");
    hung.gives_up_its_devices();
    hung.signal(Signal::CONT);
    let ended = hung.ends();
    assert_eq!(ended.status.code(), Some(7), "{}", ended.stderr);
    assert!(ended.stderr.contains("has taken machine \"vm0\" over"), "{}", ended.stderr);
    // Neither the socket nor the machine went with it.
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
}

#[test]
fn there_must_be_something_to_attach_to() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines(""));
    let file = file.to_str().unwrap();
    let said = place.expect(6, &["run", "--attach", file]);
    assert!(said.contains("nothing of machine \"vm0\" to take over"), "{said}");
    // A service starts it or takes it over, whichever is right.
    let mut first = place.begin(&["--attach=if-left", file]);
    first.is_up();
    let pid = place.pid_of("engine0");
    let said = place.expect(1, &["run", "--attach=if-left", file]);
    assert!(said.contains("is run by another process"), "{said}");
    first.kill();
    let mut second = place.begin(&["--attach=if-left", file]);
    second.is_up();
    assert_eq!(place.pid_of("engine0"), pid);
}

#[test]
fn devices_that_were_added_or_removed_are_known_to_the_next_run() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let add =
        ["add", "--name", "engine2", "--kind", "copy-engine", "--data-socket", "engine2.sock"];
    place.expect(0, &add);
    place.expect(0, &["remove", "engine0"]);
    let pid = place.pid_of("engine2");
    running.kill();
    let (running, _) = attach(&place);
    assert_eq!(place.pid_of("engine2"), pid);
    let status = place.json(&["status"]);
    assert_eq!(status["devices"].as_array().unwrap().len(), 2, "{status}");
    // One that nobody can describe is not taken over without its description.
    running.kill();
    std::fs::remove_dir_all(place.runtime().join("vm0/added")).unwrap();
    let file = place.path("vm0.toml");
    let said = place.expect(1, &["run", "--attach", file.to_str().unwrap()]);
    assert!(said.contains("\"engine2\"") && said.contains("machine file"), "{said}");
    let more =
        "\n[[device]]\nname = \"engine2\"\nkind = \"copy-engine\"\nsocket = \"engine2.sock\"\n";
    place.write("vm0.toml", &(two_engines("") + more));
    let (_running, _) = attach(&place);
    assert_eq!(place.pid_of("engine2"), pid);
}

#[test]
fn a_device_that_died_meanwhile_is_seen_to_be_gone() {
    let place = Place::new();
    let running = place.run(&two_engines("presence = \"optional\""));
    let device = place.device("engine0");
    running.kill();
    send(&device, Signal::KILL);
    assert!(gone(&device, Duration::from_secs(20)));
    let (_running, said) = attach(&place);
    assert!(said.contains("take-over: Degraded"), "{said}");
    let status = place.json(&["status"]);
    assert_eq!(status["devices"][0]["standing"], "fenced", "{status}");
    place.expect(0, &["restart", "engine0"]);
    assert_eq!(place.json(&["status"])["devices"][0]["standing"], "ready");
}

#[test]
fn nothing_is_taken_from_a_run_for_a_machine_that_cannot_be_had() {
    let place = Place::new();
    let running = place.run(&two_engines("orphan = \"exit\""));
    let file = place.path("vm0.toml");
    let said = place.expect(6, &["run", "--attach", file.to_str().unwrap()]);
    assert!(said.contains("nothing of machine \"vm0\" to take over"), "{said}");
    // It is still the one that has the machine.
    let said = place.expect(1, &["run", file.to_str().unwrap()]);
    assert!(said.contains("is run by another process"), "{said}");
    place.expect(0, &["shutdown"]);
    assert!(running.ends().status.success());
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn guest_ram_that_has_gone_does_not_end_what_was_taken_over() {
    let place = Place::new();
    let ram = place.write("ram", "guest memory");
    let running = place.run(&two_engines(&format!("ram = [{{ path = {ram:?} }}]")));
    let pid = place.pid_of("engine0");
    running.kill();
    std::fs::remove_file(&ram).unwrap();
    let file = place.path("vm0.toml");
    let said = place.expect(2, &["run", "--attach", file.to_str().unwrap()]);
    assert!(said.contains("cannot be declared as guest RAM"), "{said}");
    place.write("ram", "guest memory");
    let (_running, _) = attach(&place);
    assert_eq!(place.pid_of("engine0"), pid);
}
