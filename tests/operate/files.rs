//! Machine files that are wrong, and what they speak of.

use crate::fixture::{Place, two_engines};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::net::UnixListener;

/// What `check` and `run` say about a file; both refuse it.
#[track_caller]
fn refused(place: &Place, text: &str) -> String {
    let file = place.write("vm0.toml", text);
    let file = file.to_str().unwrap();
    let said = place.expect(2, &["check", file]);
    assert_eq!(place.expect(2, &["run", file]).lines().next(), said.lines().next());
    assert!(!place.runtime().join("vm0/operator.sock").exists());
    said
}

fn with_program(program: &str) -> String {
    format!("name = \"vm0\"\n[[device]]\nname = \"nic0\"\nprogram = {program:?}\n")
}

#[test]
fn the_example_passes() {
    let place = Place::new();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/machine.toml");
    let said = place.expect(0, &["check", example]);
    assert!(said.contains("machine \"vm0\", 2 devices"), "{said}");
    let mut running = place.begin(&[example]);
    running.is_up();
    // Its sockets are in use by now, and nothing is wrong with that.
    let said = place.expect(0, &["check", example]);
    assert!(said.contains("machine \"vm0\", which runs"), "{said}");
    place.expect(0, &["pause"]);
}

#[test]
fn everything_that_is_wrong_is_told_at_once_with_its_place() {
    let place = Place::new();
    place.write("plain", "");
    let said = refused(
        &place,
        &format!(
            "name = \"vm0\"\nonn-loss = \"fail\"\n[[device]]\nname = \"a\"\nprogram = \"/nowhere/nic\"\n\
             socket = {:?}\n[[device]]\nname = \"a\"\nkind = \"toaster\"\nsocket = \"a.sock\"\n",
            place.path("plain")
        ),
    );
    for part in [
        "vm0.toml:2:1",
        "did you mean `on-loss`?",
        "program /nowhere/nic cannot be executed",
        "exists and is no socket",
        "two devices are named \"a\"",
        "`kind` cannot be \"toaster\"",
        "standstill: 5 problems; nothing was started",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let file = place.path("vm0.toml");
    let json = place.ask(&["check", "--json", file.to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 5, "{json}");
    assert_eq!((&json[0]["line"], &json[0]["column"]), (&2.into(), &1.into()));
    // Without a look at the world: what is in the text.
    let said = place.expect(2, &["check", "--text-only", file.to_str().unwrap()]);
    assert!(said.contains("3 problems"), "{said}");
}

#[test]
fn what_is_no_toml_or_no_file_is_told() {
    let place = Place::new();
    let said = refused(&place, "name = \"vm0\"\n[[device\nname = \"a\"\n");
    assert!(said.contains("vm0.toml:2:"), "{said}");
    let said = place.expect(2, &["check", "nowhere.toml"]);
    assert!(said.contains("cannot read nowhere.toml"), "{said}");
    let said = place.expect(2, &["run", "nowhere.toml"]);
    assert!(said.contains("No such file"), "{said}");
}

#[test]
fn a_socket_that_somebody_serves_is_left_alone_and_a_stale_one_is_replaced() {
    let place = Place::new();
    let socket = place.path("e.sock");
    let served = UnixListener::bind(&socket).unwrap();
    let text = two_engines("").replace("\"engine0.sock\"", &format!("{socket:?}"));
    let said = refused(&place, &text);
    assert!(said.contains("is served by another process"), "{said}");
    // Nobody listens any more, and the socket is still there.
    drop(served);
    assert!(socket.exists());
    let _running = place.run(&text);
    std::os::unix::net::UnixStream::connect(&socket).unwrap();
}

#[test]
fn a_socket_that_cannot_be_made_is_told() {
    let place = Place::new();
    let long = place.path(&"x".repeat(110));
    let said = refused(&place, &two_engines("").replace("\"engine0.sock\"", &format!("{long:?}")));
    assert!(said.contains("at most 107 are possible"), "{said}");
    let said = refused(&place, &two_engines("").replace("engine0.sock", "/nowhere/e.sock"));
    assert!(said.contains("folder /nowhere"), "{said}");
    let said = refused(&place, &two_engines("").replace("engine1.sock", "engine0.sock"));
    assert!(said.contains("two devices have the socket"), "{said}");
}

#[test]
fn a_program_that_cannot_be_executed_is_told() {
    let place = Place::new();
    let file = place.write("nic", "#!/bin/sh\n");
    for (program, part) in [
        (file.to_str().unwrap(), "not executable for this user"),
        ("/nowhere/nic", "No such file"),
        ("/tmp", "it is no file"),
        ("no-such-program-anywhere", "in no folder of PATH"),
    ] {
        let said = refused(&place, &with_program(program));
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn a_program_that_ends_at_once_is_told_with_its_last_words() {
    let place = Place::new();
    let text = with_program("sh").replace(
        "program = \"sh\"",
        "program = \"sh\"\nargs = [\"-c\", \"echo the firmware is missing >&2; exit 7\"]",
    );
    let file = place.write("vm0.toml", &text);
    let said = place.expect(1, &["run", file.to_str().unwrap()]);
    for part in ["device \"nic0\"", "exited with status 7", "the firmware is missing"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn a_program_that_is_no_device_is_told_and_nothing_of_the_others_is_left() {
    let place = Place::new();
    let text = two_engines("") + "[[device]]\nname = \"nic0\"\nprogram = \"true\"\n";
    let file = place.write("vm0.toml", &text);
    let said = place.expect(1, &["run", file.to_str().unwrap()]);
    assert!(said.contains("exited with status 0") && said.contains("Write a device"), "{said}");
    // The engines were killed, and their sockets went with them.
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn guest_ram_that_is_not_there_is_told() {
    let place = Place::new();
    let said = refused(&place, &two_engines("ram = [{ path = \"/nowhere/ram\" }]"));
    assert!(said.contains("cannot be declared as guest RAM"), "{said}");
}

#[test]
fn a_qmp_socket_need_not_be_there_and_must_not_be_something_else() {
    let place = Place::new();
    let text = |path: &str| two_engines(&format!("qmp = {:?}", place.path(path)));
    let file = place.write("vm0.toml", &text("nowhere"));
    place.expect(0, &["check", file.to_str().unwrap()]);
    place.write("plain", "");
    let said = refused(&place, &text("plain"));
    assert!(said.contains("plain is no socket") && said.contains("-qmp unix:PATH"), "{said}");
}

/// Each has a file beside its socket whose lock proves that it has ended: that of the image may be the
/// other one's.
#[test]
fn two_disks_of_one_image_are_fenced_one_by_one_and_leave_nothing_behind() {
    let place = Place::new();
    place.write("disk.img", &"0".repeat(64 << 10));
    let disk = |name: &str| {
        format!(
            "[[device]]\nname = \"{name}\"\nkind = \"vhost-user-blk\"\nsocket = \"{name}.sock\"\n\
             file = \"disk.img\"\nlock = \"rings\"\non-loss = \"restart\"\n"
        )
    };
    let running = place.run(&format!("name = \"vm0\"\n{}{}", disk("disk0"), disk("disk1")));
    let folder = place.runtime().join("vm0");
    assert!(folder.join("disk0.sock.lock").exists() && folder.join("disk1.sock.lock").exists());
    let lost = place.pid_of("disk1");
    // As if the other one had a ring started.
    let image = std::fs::File::open(place.path("disk.img")).unwrap();
    image.lock().unwrap();
    kill_process(Pid::from_raw(i32::try_from(lost).unwrap()).unwrap(), Signal::KILL).unwrap();
    place.status_until("ready again", |status| {
        let disk = &status["devices"][1];
        disk["standing"] == "ready" && disk["pid"] != lost
    });
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    place.expect(0, &["shutdown"]);
    assert!(running.ends().status.success());
    assert!(!folder.exists());
}
