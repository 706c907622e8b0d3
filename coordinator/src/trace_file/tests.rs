//! A report of a pause in which much went wrong, and events, become records; the file is whole at
//! every moment.

use super::*;
use crate::report::tests::report;
use crate::status::{DeviceStanding, DeviceStatus, DroppedLogs};
use serde_json::Value;
use standstill_protocol::transition::{Loss, MachineState};
use std::sync::Arc;
use std::time::Duration;

fn parsed(bytes: &[u8], ended: bool) -> Vec<Value> {
    let mut text = String::from_utf8(bytes.to_vec()).unwrap();
    if !ended {
        text.push(']');
    }
    match serde_json::from_str(&text) {
        Ok(Value::Array(records)) => records,
        other => panic!("{other:?}: {text}"),
    }
}

fn lost(device: &str, incarnation: u64) -> MachineEvent {
    let (loss, detail, during) = (Loss::Exited, String::new(), None);
    MachineEvent::DeviceLost { device: device.into(), incarnation, loss, detail, during }
}

/// A trace with that report in it, which began a millisecond after the trace did.
fn traced() -> (TraceFile<Vec<u8>>, Vec<Value>) {
    let mut trace = TraceFile::begin(Vec::new(), "vm").unwrap();
    let mut report = report();
    report.began = trace.began + Duration::from_millis(1);
    trace.event(&MachineEvent::Transition(Arc::new(report)), SystemTime::now()).unwrap();
    let records = parsed(&trace.out, false);
    (trace, records)
}

/// `(pid, tid, from, to)` of the slices with that name, in microseconds.
fn slices(records: &[Value], name: &str) -> Vec<(u64, u64, f64, f64)> {
    let slice = |record: &&Value| record["ph"] == "X" && record["name"] == name;
    let times = |record: &Value| {
        let (from, length) = (record["ts"].as_f64().unwrap(), record["dur"].as_f64().unwrap());
        (record["pid"].as_u64().unwrap(), record["tid"].as_u64().unwrap(), from, from + length)
    };
    records.iter().filter(slice).map(times).collect()
}

fn assert_slices(records: &[Value], name: &str, expected: &[(u64, u64, f64, f64)]) {
    let found = slices(records, name);
    let near = |(a, b): (f64, f64)| (a - b).abs() < 0.001;
    let same = found.len() == expected.len()
        && found
            .iter()
            .zip(expected)
            .all(|(a, b)| (a.0, a.1) == (b.0, b.1) && near((a.2, b.2)) && near((a.3, b.3)));
    assert!(same, "{name}: {found:?} instead of {expected:?}");
}

#[test]
fn a_report_becomes_slices_on_the_tracks_of_those_who_took_part() {
    let (_, records) = traced();
    let own = u64::from(std::process::id());
    assert_slices(&records, "pause", &[(own, own, 1000.0, 1010.0)]);
    // Not all had answered when the undo began.
    assert_slices(&records, "PrepareStop", &[(own, own, 1000.0, 1009.0)]);
    assert_slices(&records, "undo: Start", &[(own, own, 1009.0, 1010.0)]);
    let prepare = "PrepareStop → RUNNING_P2P";
    let answered = |pid| (pid, pid, 1000.0, 1001.0);
    // Those who did not answer were waited for until they were fenced.
    let silent = |pid| (pid, pid, 1000.0, 1005.0);
    assert_slices(&records, prepare, &[answered(1000), answered(1001), silent(1002), silent(1003)]);
    assert_slices(&records, "undo: Start → RUNNING", &[(1000, 1000, 1009.0, 1010.0)]);
    assert_slices(&records, "fence", &[(1002, 1002, 1005.0, 1006.0)]);
    assert_slices(&records, "fence, not proven", &[(1003, 1003, 1005.0, 1010.0)]);
    // The hook has a track of the coordinator's; its last call never returned.
    assert_slices(&records, "stop", &[(own, 2, 1000.1, 1000.3), (own, 2, 1000.1, 1010.0)]);

    let pause = records.iter().find(|record| record["name"] == "pause").unwrap();
    assert_eq!((&pause["args"]["outcome"], &pause["args"]["term"]), (&"Held".into(), &2.into()));
    assert_eq!(pause["args"]["failures"].as_array().unwrap().len(), 5);
    let refused = records.iter().find(|record| record["name"] == "refused: not now").unwrap();
    assert_eq!((&refused["ph"], &refused["pid"]), (&"i".into(), &1001.into()));
}

#[test]
fn every_track_has_a_name_and_every_arrow_two_ends() {
    let (_, records) = traced();
    let names = |what: &str, pid: u64| {
        let named = records.iter().filter(|record| record["name"] == what && record["pid"] == pid);
        named.map(|record| record["args"]["name"].as_str().unwrap()).collect::<Vec<_>>()
    };
    let own = u64::from(std::process::id());
    assert_eq!(names("process_name", own), ["coordinator of vm"]);
    assert_eq!(names("thread_name", own), ["transitions", "events", "hook vcpus"]);
    assert_eq!(names("process_name", 1002), ["silent"]);
    assert_eq!(names("thread_name", 1002), ["commands"]);
    let ends = |ph: &str| {
        let ends = records.iter().filter(|record| record["ph"] == ph);
        ends.map(|record| (record["id"].clone(), record["ts"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(ends("s").len(), 5);
    assert_eq!(ends("s"), ends("f"));
}

#[test]
fn what_a_device_measured_is_inside_its_command() {
    use standstill_protocol::message::Timings;
    let timings = Timings { total_ns: 600, hook_ns: 100, drain_ns: 200, evidence_ns: 50 };
    let inside = |to: u64| {
        let records = records::inside(&timings, (7, 7), (1000, to));
        let values: Vec<_> = records.iter().map(|r| serde_json::to_value(r).unwrap()).collect();
        values
    };
    let records = inside(2000);
    assert_slices(&records, "in the device", &[(7, 7, 1.2, 1.8)]);
    assert_slices(&records, "drain", &[(7, 7, 1.2, 1.4)]);
    assert_slices(&records, "hook", &[(7, 7, 1.4, 1.5)]);
    assert_slices(&records, "evidence", &[(7, 7, 1.5, 1.55)]);
    // A device that claims more than it had is cut.
    let records = inside(1250);
    assert_slices(&records, "in the device", &[(7, 7, 1.0, 1.25)]);
    assert_slices(&records, "hook", &[(7, 7, 1.2, 1.25)]);
    assert!(slices(&records, "evidence").is_empty());
}

#[test]
fn a_mark_is_on_the_track_of_the_process_if_that_is_known() {
    let mut trace = TraceFile::begin(Vec::new(), "vm").unwrap();
    let device = DeviceStatus {
        name: "nic0".into(),
        pid: Some(77),
        incarnation: 1,
        standing: DeviceStanding::Ready,
        kind: String::new(),
        state: None,
        lost: None,
        progress: 0,
        dropped_logs: DroppedLogs::default(),
    };
    let status = Status {
        name: "vm".into(),
        machine: MachineState::Running,
        stands: false,
        operation: None,
        held: Vec::new(),
        devices: vec![device],
    };
    trace.know(&status).unwrap();
    let at = trace.began + Duration::from_micros(5);
    let joined = MachineEvent::DeviceJoined {
        device: "nic0".into(),
        incarnation: 2,
        pid: Some(78),
        state: standstill_protocol::migration::MigrationState::Running,
        took: Duration::ZERO,
    };
    for event in [lost("nic0", 1), joined, lost("nic0", 2), lost("nic0", 3)] {
        trace.event(&event, at).unwrap();
    }
    // A clock that was set back puts nothing before the beginning.
    let back = trace.began - Duration::from_secs(1);
    trace.event(&MachineEvent::HoldEnded { by_owner: true }, back).unwrap();
    let records = parsed(&trace.end().unwrap(), true);
    let marks: Vec<_> = records.iter().filter(|record| record["ph"] == "i").collect();
    let own = u64::from(std::process::id());
    let tracks: Vec<_> = marks.iter().map(|mark| mark["pid"].as_u64().unwrap()).collect();
    assert_eq!(tracks, [77, 78, 78, own, own]);
    assert_eq!((&marks[0]["ts"], &marks[4]["ts"]), (&5.0.into(), &0.0.into()));
    assert_eq!(marks[2]["args"]["incarnation"], 2);
    let names = records.iter().filter(|record| record["name"] == "process_name");
    let names: Vec<_> = names.map(|record| record["args"]["name"].clone()).collect();
    assert_eq!(names, ["coordinator of vm", "nic0", "nic0 (2)"]);
}

#[test]
fn a_trace_has_a_limit_and_says_when_it_is_reached() {
    let limit = 4096;
    let mut trace = TraceFile::begin(Vec::new(), "vm").unwrap().limited_to(limit);
    for incarnation in 1..100 {
        trace.event(&lost("nic0", incarnation), SystemTime::now()).unwrap();
    }
    let records = parsed(&trace.out, false);
    assert!((trace.out.len() as u64) < limit + 256, "{}", trace.out.len());
    assert_eq!(records.last().unwrap()["name"], "the trace is full");
    let full = records.iter().filter(|record| record["name"] == "the trace is full");
    assert_eq!(full.count(), 1);
}
