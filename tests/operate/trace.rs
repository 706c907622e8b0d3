//! The trace of a `standstill run`.

use crate::fixture::{Place, send, two_engines};
use rustix::process::Signal;
use serde_json::Value;

/// The records of the file that have this kind and a name that begins like that.
fn records<'a>(all: &'a [Value], ph: &str, name: &str) -> Vec<&'a Value> {
    let fits = |record: &&Value| {
        record["ph"] == ph && record["name"].as_str().is_some_and(|text| text.starts_with(name))
    };
    all.iter().filter(fits).collect()
}

#[test]
fn a_trace_follows_a_device_from_one_process_to_the_next() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines("on-loss = \"restart\""));
    let trace = place.path("trace.json");
    let mut running = place.begin(&[file.to_str().unwrap(), "--trace", trace.to_str().unwrap()]);
    running.is_up();
    let first = place.pid_of("engine1");
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    send(&place.device("engine1"), Signal::KILL);
    place.status_until("restarted", |status| {
        let device = &status["devices"][1];
        device["incarnation"] == 2 && device["standing"] == "ready"
    });
    let second = place.pid_of("engine1");
    place.expect(0, &["pause"]);
    // A run that leaves its devices behind finishes its trace, too.
    place.expect(0, &["shutdown", "--keep-devices"]);
    let said = running.ends();
    assert_eq!(said.status.code(), Some(0), "{}", said.stderr);

    let all: Vec<Value> = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    assert_eq!(records(&all, "X", "pause").len(), 2);
    let stops = records(&all, "X", "Stop → STOP");
    let pids: Vec<_> = stops.iter().map(|record| record["pid"].as_u64().unwrap()).collect();
    assert_eq!(pids.len(), 4);
    assert!(pids.contains(&first) && pids.contains(&second), "{pids:?}");
    let names = records(&all, "M", "process_name");
    let names: Vec<_> = names.iter().map(|record| record["args"]["name"].clone()).collect();
    assert_eq!(names, ["coordinator of vm0", "engine0", "engine1", "engine1 (2)"]);
    for (mark, pid) in [
        ("engine1 (1) is lost", first),
        ("engine1 (1) is fenced", first),
        ("engine1 (2) has joined", second),
    ] {
        let marks = records(&all, "i", mark);
        assert_eq!(marks.len(), 1, "{mark}");
        assert_eq!(marks[0]["pid"], pid, "{mark}");
    }
    // What is left is ended by the next one.
    let mut next = place.begin(&[file.to_str().unwrap(), "--attach"]);
    next.is_up();
    place.expect(0, &["shutdown"]);
    assert_eq!(next.ends().status.code(), Some(0));
}
