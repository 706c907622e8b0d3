//! Devices come and go.

use crate::fixture::{Place, gone, send, two_engines};
use rustix::process::Signal;
use std::time::Duration;

#[test]
fn a_device_is_added_from_a_file_or_by_options_and_removed() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    place.write("more.toml", "name = \"more\"\nkind = \"copy-engine\"\nsocket = \"more.sock\"\n");
    assert!(place.expect(0, &["add", "more.toml"]).contains("more is added"));
    let program = env!("CARGO_BIN_EXE_standstill");
    let add = [
        "add",
        "--name",
        "other",
        "--program",
        program,
        "--data-socket",
        "other.sock",
        "--arg",
        "device",
        "--arg",
        "copy-engine",
        "--arg",
        "--socket={socket}",
        "--set",
        "presence=optional",
    ];
    place.expect(0, &add);
    assert!(place.runtime().join("vm0/other.sock").exists());
    let status = place.json(&["status"]);
    assert_eq!(status["devices"].as_array().unwrap().len(), 4);
    assert_eq!(status["devices"][3]["state"], "RUNNING", "{status}");
    place.expect(0, &["pause"]);
    let said = place.expect(0, &["remove", "more"]);
    assert!(said.contains("more is removed, its process exited with status 0"), "{said}");
    place.expect(0, &["resume"]);
    let said = place.expect(1, &["remove", "more"]);
    assert!(
        said.contains("no device process \"more\"") && said.contains("standstill status"),
        "{said}"
    );
}

#[test]
fn a_device_that_does_not_fit_is_refused_with_the_place() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    place.write("bad.toml", "name = \"bad\"\nkind = \"copy-engin\"\nsocket = \"bad.sock\"\n");
    let said = place.expect(2, &["add", "bad.toml"]);
    assert!(said.starts_with("error: ") && said.contains("nothing was added"), "{said}");
    assert!(said.contains(":2:8") && said.contains("did you mean \"copy-engine\"?"), "{said}");
    let said = place.expect(2, &["add", "--name", "a", "--program", "/nowhere/nic"]);
    assert!(said.contains("/nowhere/nic cannot be executed"), "{said}");
    let said = place.expect(2, &["add", "nowhere.toml"]);
    assert!(said.contains("cannot read nowhere.toml"), "{said}");
    for socket in ["x.sock", "engine0.sock"] {
        let twice = ["add", "--name", "engine0", "--kind", "copy-engine", "--data-socket", socket];
        let said = place.expect(1, &twice);
        assert!(said.contains("there is one of that name"), "{said}");
    }
    let said = place.expect(1, &["add", "--name", "a", "--program", "false"]);
    assert!(said.contains("exited with status 1"), "{said}");
    assert_eq!(place.json(&["status"])["devices"].as_array().unwrap().len(), 2);
}

#[test]
fn a_lost_device_is_started_again() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let said = place.expect(1, &["restart", "engine0"]);
    assert!(said.contains("engine0"), "{said}");
    let device = place.device("engine0");
    send(&device, Signal::KILL);
    assert!(gone(&device, Duration::from_secs(20)));
    place.status_until("fenced", |status| status["devices"][0]["standing"] == "fenced");
    place.expect(0, &["pause"]);
    let said = place.expect(1, &["resume"]);
    assert!(
        said.contains("\"engine0\" is missing") && said.contains("standstill restart"),
        "{said}"
    );
    let said = place.expect(0, &["restart", "engine0"]);
    assert!(said.contains("is started again"), "{said}");
    place.expect(0, &["resume"]);
}
