//! Under a service manager.

use crate::fixture::{Place, two_engines};
use rustix::process::Signal;
use std::os::unix::net::UnixDatagram;

#[test]
fn the_service_manager_is_told_and_devices_do_not_inherit_its_socket() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines(""));
    let notify = UnixDatagram::bind(place.path("notify")).unwrap();
    notify.set_read_timeout(Some(crate::fixture::PATIENCE)).unwrap();
    let mut command = place.command(&["run", file.to_str().unwrap()]);
    command.env("NOTIFY_SOCKET", place.path("notify")).env("WATCHDOG_USEC", "400000");
    let mut running = place.spawn(command);
    running.is_up();
    let told = |wanted: &str| {
        let mut all = String::new();
        let mut bytes = [0; 4096];
        while !all.contains(wanted) {
            let length = notify.recv(&mut bytes).unwrap();
            all.push_str(&String::from_utf8_lossy(&bytes[..length]));
            all.push('\n');
        }
        all
    };
    let first = told("READY=1");
    assert!(first.contains("STATUS=running"), "{first}");
    told("WATCHDOG=1");
    let environment = std::fs::read(format!("/proc/{}/environ", place.pid_of("engine0"))).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    assert!(environment.contains("RUST_LOG="), "{environment}");
    assert!(!environment.contains("NOTIFY_SOCKET") && !environment.contains("WATCHDOG_USEC"));
    place.expect(0, &["pause"]);
    told("STATUS=stopped, 2 devices");
    running.signal(Signal::TERM);
    told("STOPPING=1");
    assert_eq!(running.ends().status.code(), Some(0));
}

#[test]
fn the_unit_of_the_examples_names_commands_that_are_there() {
    let unit = include_str!("../../examples/systemd/standstill@.service");
    let place = Place::new();
    for line in unit.lines().filter(|line| line.starts_with("Exec")) {
        let mut words = line.split_whitespace().filter(|word| !word.contains("/etc/"));
        assert!(words.next().unwrap().ends_with("/standstill"), "{line}");
        let words: Vec<_> = words.chain(["--help"]).collect();
        place.expect(0, &words);
    }
    assert!(unit.contains("Type=notify"));
}

#[test]
fn a_service_manager_that_does_not_read_holds_nothing_up() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines(""));
    let path = place.path("notify");
    let _notify = UnixDatagram::bind(&path).unwrap();
    let full = UnixDatagram::unbound().unwrap();
    full.set_nonblocking(true).unwrap();
    while full.send_to(b"STATUS=full", &path).is_ok() {}
    let mut command = place.command(&["run", file.to_str().unwrap()]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "20000");
    let mut running = place.spawn(command);
    running.is_up();
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    place.expect(0, &["shutdown"]);
    assert_eq!(running.ends().status.code(), Some(0));
}
