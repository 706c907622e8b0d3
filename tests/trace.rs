//! The trace of real runs: what is in it, and what is left of it when the run is killed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ENGINES: usize = 3;

fn demo(file: &Path, rounds: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_standstill"));
    command.args(["demo", "--devices", &ENGINES.to_string(), "--rounds", rounds, "--trace"]);
    command.arg(file).stdout(Stdio::null());
    command
}

/// A slice, in microseconds.
#[derive(Clone, Debug)]
struct Slice {
    name: String,
    track: (u64, u64),
    from: f64,
    to: f64,
}

impl Slice {
    fn has(&self, other: &Self) -> bool {
        // Times are rounded to nanoseconds.
        self.from <= other.from + 0.002 && other.to <= self.to + 0.002
    }
}

/// The slices of a trace; checks that each is in a process that has a name, and that those of one
/// track are inside or after each other.
fn slices(records: &[Value]) -> Vec<Slice> {
    let number = |record: &Value, key: &str| record[key].as_u64().unwrap();
    let named: Vec<_> = records
        .iter()
        .filter(|record| record["name"] == "process_name")
        .map(|record| number(record, "pid"))
        .collect();
    let mut slices = Vec::new();
    for record in records {
        assert!(named.contains(&number(record, "pid")), "{record}");
        assert!(record["ts"].as_f64().unwrap() >= 0.0, "{record}");
        if record["ph"] == "X" {
            let (from, length) = (record["ts"].as_f64().unwrap(), record["dur"].as_f64().unwrap());
            let name = record["name"].as_str().unwrap().to_owned();
            let track = (number(record, "pid"), number(record, "tid"));
            slices.push(Slice { name, track, from, to: from + length });
        }
    }
    let mut tracks: BTreeMap<_, Vec<&Slice>> = BTreeMap::new();
    slices.iter().for_each(|slice| tracks.entry(slice.track).or_default().push(slice));
    for slices in tracks.values_mut() {
        // The longer one of two that begin together is around the other.
        slices.sort_by(|a, b| a.from.total_cmp(&b.from).then(b.to.total_cmp(&a.to)));
        let mut around: Vec<&Slice> = Vec::new();
        for slice in slices {
            around.retain(|outer| slice.from < outer.to - 0.002);
            assert!(around.iter().all(|outer| outer.has(slice)), "{slice:?} overlaps {around:?}");
            around.push(slice);
        }
    }
    slices
}

fn named<'a>(slices: &'a [Slice], name: &str) -> Vec<&'a Slice> {
    slices.iter().filter(|slice| slice.name == name).collect()
}

#[test]
fn a_trace_shows_each_phase_in_each_process() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    assert!(demo(&file, "4").status().unwrap().success());
    let records: Vec<Value> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let names = records.iter().filter(|record| record["name"] == "process_name");
    let names: Vec<_> = names.map(|record| record["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["coordinator of the demonstration", "engine0", "engine1", "engine2"]);

    let slices = slices(&records);
    for (operation, phases) in [
        ("pause", [("PrepareStop", "RUNNING_P2P"), ("Stop", "STOP")]),
        ("resume", [("PrepareStart", "RUNNING_P2P"), ("Start", "RUNNING")]),
    ] {
        let transitions = named(&slices, operation);
        assert_eq!(transitions.len(), 4);
        for transition in transitions {
            let mut end = transition.from;
            for (phase, state) in phases {
                let inside = named(&slices, phase);
                let inside: Vec<_> = inside.iter().filter(|slice| transition.has(slice)).collect();
                assert_eq!(inside.len(), 1, "{phase} in {transition:?}");
                // One phase ends before the next one begins, in all processes.
                assert!(inside[0].from >= end - 0.002, "{phase}");
                end = inside[0].to;
                let commands = named(&slices, &format!("{phase} → {state}"));
                let commands: Vec<_> = commands.iter().filter(|one| inside[0].has(one)).collect();
                assert_eq!(commands.len(), ENGINES, "{phase} in {transition:?}");
                let last = commands.iter().map(|command| command.to).fold(0.0, f64::max);
                assert!((last - end).abs() < 0.002, "{phase} ends with its last answer");
                for command in commands {
                    let own = named(&slices, "in the device");
                    let own = own.iter().filter(|s| s.track == command.track && command.has(s));
                    assert_eq!(own.count(), 1, "{command:?}");
                }
            }
        }
    }
    // Each engine hashes its memory on the way to STOP, and the transition does not count that.
    assert!(!named(&slices, "evidence").is_empty());
    let transitions = named(&slices, "pause");
    let starts: Vec<_> = transitions.iter().map(|slice| slice.from).collect();
    assert!(starts.is_sorted(), "{starts:?}");
}

#[tokio::test]
async fn the_trace_of_a_run_that_is_killed_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let mut process = demo(&file, "1000000").spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let long = || std::fs::metadata(&file).is_ok_and(|file| file.len() > 100_000);
    while !long() {
        if Instant::now() > end {
            process.kill().unwrap();
            panic!("no trace is written");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    process.kill().unwrap();
    process.wait().unwrap();
    let mut text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.ends_with(']'), "it was killed");
    // What a viewer does with an array that does not end.
    text.push(']');
    let records: Vec<Value> = serde_json::from_str(&text).unwrap();
    let slices = slices(&records);
    assert!(named(&slices, "pause").len() > 2 && named(&slices, "resume").len() > 2);
}

#[test]
fn a_trace_that_cannot_be_written_is_told_before_anything_is_started() {
    let output = demo(Path::new("/nowhere/trace.json"), "1").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("cannot write the trace /nowhere/trace.json"), "{errors}");
    assert!(errors.contains("No such file"), "{errors}");
}
