//! Events become numbers, the page says what the documentation says, and clients that are no
//! scrapers harm nobody.

use super::*;
use standstill::coordinator::report::{Names, TransitionReport};
use standstill::coordinator::{
    DeviceStanding, DeviceStatus, DroppedLogs, LocalDevice, LocalError, MachineBuilder,
    MachineEvent, Operation, Outcome,
};
use standstill::protocol::message::{Command, Epoch, Term};
use standstill::protocol::migration::{MigrationFlags, MigrationState};
use standstill::protocol::transition::{Loss, MachineState};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Instant, SystemTime};
use tokio::task::spawn_blocking;

const QUOTED: &str = "a \"name\"\\";

fn device(name: &str, standing: DeviceStanding) -> DeviceStatus {
    DeviceStatus {
        name: name.into(),
        pid: Some(7),
        incarnation: 2,
        standing,
        kind: String::new(),
        state: Some(MigrationState::RunningP2p),
        lost: None,
        progress: 1234,
        dropped_logs: DroppedLogs { by_device: 3, by_coordinator: 4 },
    }
}

fn status() -> Status {
    Status {
        name: "vm".into(),
        machine: MachineState::Stopped,
        stands: true,
        operation: None,
        held: Vec::new(),
        devices: vec![
            device("nic0", DeviceStanding::Ready),
            device(QUOTED, DeviceStanding::Restarting),
        ],
    }
}

fn report() -> TransitionReport {
    TransitionReport {
        operation: Operation::Resume,
        outcome: Outcome::RolledBack,
        machine: MachineState::Stopped,
        term: Term(1),
        first_epoch: Epoch(1),
        last_epoch: Epoch(2),
        began: SystemTime::UNIX_EPOCH,
        total_ns: 3_000_000,
        downtime_ns: Some(500_000_000),
        participants: Vec::new(),
        hooks: Vec::new(),
        failures: Vec::new(),
        strays: 0,
        names: Names::default(),
    }
}

fn totals(events: &[MachineEvent]) -> Totals {
    let totals = Totals::new("vm");
    events.iter().for_each(|event| totals.count(event));
    totals
}

/// Something of every kind that is counted.
fn everything(device: &str) -> Vec<MachineEvent> {
    let device = || device.to_owned();
    let why = String::new;
    vec![
        MachineEvent::Transition(Arc::new(report())),
        MachineEvent::DeviceLost {
            device: device(),
            incarnation: 1,
            loss: Loss::Hung,
            detail: why(),
            during: None,
        },
        MachineEvent::FenceUnproven { device: device(), incarnation: 1 },
        MachineEvent::DeviceFenced {
            device: device(),
            incarnation: 1,
            exit: standstill::coordinator::process::Exit::Code(0),
            locks: 0,
        },
        MachineEvent::DeviceRestarting { device: device(), attempt: 1, after: Duration::ZERO },
        MachineEvent::DeviceNotRestarted { device: device(), why: why() },
        MachineEvent::DeviceRestartsExhausted { device: device(), restarts: 1 },
        MachineEvent::Missed { events: 9 },
    ]
}

/// The value of a sample, by its name and its labels but for the machine's.
fn sample(text: &str, name: &str) -> Option<f64> {
    let text = text.replace("machine=\"vm\",", "").replace("{machine=\"vm\"}", "");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.parse().ok()
}

#[track_caller]
fn assert_sample(text: &str, name: &str, value: f64) {
    assert_eq!(sample(text, name), Some(value), "{name} in\n{text}");
}

#[test]
fn everything_that_happens_is_counted() {
    let text = text(&totals(&everything("nic0")), &status(), 5).unwrap();
    for (name, value) in [
        ("standstill_transitions_total{operation=\"resume\",outcome=\"RolledBack\"}", 1.0),
        ("standstill_transitions_total{operation=\"pause\",outcome=\"Done\"}", 0.0),
        ("standstill_transition_duration_seconds_sum{operation=\"resume\"}", 0.003),
        ("standstill_transition_duration_seconds_count{operation=\"resume\"}", 1.0),
        ("standstill_downtime_seconds_sum", 0.5),
        ("standstill_device_losses_total{device=\"nic0\",reason=\"hung\"}", 1.0),
        ("standstill_device_fences_total{device=\"nic0\"}", 1.0),
        ("standstill_device_unproven_fences_total{device=\"nic0\"}", 1.0),
        ("standstill_device_restart_attempts_total{device=\"nic0\"}", 1.0),
        ("standstill_device_start_failures_total{device=\"nic0\"}", 1.0),
        ("standstill_device_restarts_exhausted_total{device=\"nic0\"}", 1.0),
        ("standstill_events_missed_total", 9.0),
        ("standstill_machine_state{state=\"stopped\"}", 1.0),
        ("standstill_machine_state{state=\"running\"}", 0.0),
        ("standstill_transition_under_way", 0.0),
        ("standstill_device_up{device=\"nic0\"}", 1.0),
        ("standstill_device_standing{device=\"nic0\",standing=\"ready\"}", 1.0),
        ("standstill_device_standing{device=\"nic0\",standing=\"lost\"}", 0.0),
        ("standstill_device_migration_state{device=\"nic0\"}", 5.0),
        ("standstill_device_incarnation{device=\"nic0\"}", 2.0),
        ("standstill_device_progress_total{device=\"nic0\"}", 1234.0),
        ("standstill_log_lines_dropped_total{source=\"device\",device=\"nic0\"}", 3.0),
        ("standstill_log_lines_dropped_total{source=\"coordinator\",device=\"nic0\"}", 4.0),
        ("standstill_log_lines_dropped_total{source=\"writer\",device=\"\"}", 5.0),
        // A name is what it is, and breaks no line.
        (r#"standstill_device_up{device="a \"name\"\\"}"#, 0.0),
    ] {
        assert_sample(&text, name, value);
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn a_device_that_was_removed_has_no_metrics() {
    let mut events = everything("gone");
    events.push(MachineEvent::DeviceRemoved { device: "gone".into(), exit: None });
    let text = text(&totals(&events), &status(), 0).unwrap();
    assert!(!text.contains("gone"), "{text}");
}

#[test]
fn the_documentation_names_every_metric_and_no_other() {
    let text = text(&totals(&everything("nic0")), &status(), 0).unwrap();
    let exported: BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| match line.split_once(' ') {
            Some((name, "counter")) => (format!("{name}_total"), "counter"),
            Some((name, "info")) => (format!("{name}_info"), "info"),
            Some((name, kind)) => (name.to_owned(), kind),
            None => panic!("{line}"),
        })
        .collect();
    let documentation = include_str!("../../docs/observability.md");
    let documented: BTreeSet<_> = documentation
        .lines()
        .filter_map(|line| line.strip_prefix("| `standstill_"))
        .map(|line| {
            let (name, rest) = line.split_once('`').unwrap();
            (format!("standstill_{name}"), rest.split('|').nth(1).unwrap().trim())
        })
        // Targets of log lines have colons.
        .filter(|(name, _)| !name.contains(':'))
        .collect();
    assert_eq!(documented, exported);
}

/// A device inside the VMM.
struct Local;

impl LocalDevice for Local {
    fn migration(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY_P2P
    }

    fn set_state(
        &mut self,
        _: MigrationState,
        _: &Command,
    ) -> Result<(), (LocalError, MigrationState)> {
        Ok(())
    }
}

/// A machine without processes and its endpoint.
async fn served() -> (Machine, Endpoint, SocketAddr) {
    let machine = MachineBuilder::new("vm").local_device("gpu", Local).start().await.unwrap();
    let bound = MetricsArgs { metrics: Some(([127, 0, 0, 1], 0).into()) }.bind().unwrap().unwrap();
    let address = bound.address;
    let log = tracing_appender::non_blocking(io::sink()).0.error_counter();
    let endpoint = bound.serve(machine.clone(), machine.events(), log).unwrap();
    (machine, endpoint, address)
}

/// Sends these bytes and reads until the server closes.
async fn says(address: SocketAddr, request: impl Into<Vec<u8>>) -> String {
    let request = request.into();
    spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // The server may have had enough before all is written, or closes with some unread.
        let _ = stream.write_all(&request);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    })
    .await
    .unwrap()
}

async fn scrape(address: SocketAddr) -> String {
    says(address, "GET /metrics HTTP/1.1\r\nHost: vm\r\n\r\n").await
}

/// Nobody listens there any more, soon.
fn assert_closed(address: SocketAddr) {
    let end = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(address).is_ok() {
        assert!(Instant::now() < end, "the endpoint is still there");
    }
}

#[tokio::test]
async fn a_scrape_says_what_has_happened() {
    let (machine, endpoint, address) = served().await;
    let text = scrape(address).await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(text.contains("content-type: application/openmetrics-text; version=1.0.0"), "{text}");
    assert_sample(&text, "standstill_machine_state{state=\"running\"}", 1.0);
    machine.pause().await.unwrap().resume().await.unwrap();
    let done = "standstill_transitions_total{operation=\"resume\",outcome=\"Done\"}";
    // Events are counted on another thread.
    let end = Instant::now() + Duration::from_secs(60);
    let text = loop {
        let text = scrape(address).await;
        if sample(&text, done) == Some(1.0) {
            break text;
        }
        assert!(Instant::now() < end, "{text}");
    };
    assert_sample(&text, "standstill_downtime_seconds_count", 1.0);
    assert_sample(&text, "standstill_phase_duration_seconds_count{phase=\"Stop\"}", 1.0);
    assert_sample(&text, "standstill_device_up{device=\"gpu\"}", 1.0);
    // The endpoint ends with the machine.
    machine.shutdown().await.unwrap();
    drop(machine);
    assert_closed(address);
    drop(endpoint);
}

#[tokio::test]
async fn clients_that_are_no_scrapers_get_an_error_or_nothing() {
    let (machine, endpoint, address) = served().await;
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(1000));
    for (request, answers) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], &["404"][..]),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", &["405"]),
        (b"POST /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff", &["405"]),
        (b"GET /metrics HTTP/9.9\r\n\r\n", &["400"]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", &["400"]),
        (b"\0\0\0\0\0\0\0\0", &["400"]),
        (b"", &[""]),
        (b"GET", &["", "400"]),
        // Whoever still writes when it is closed may not get to read why.
        (long.as_bytes(), &["", "431", "400"]),
        (many.as_bytes(), &["", "431", "400"]),
    ] {
        let answer = says(address, request).await;
        let status = answer.split(' ').nth(1).unwrap_or_default();
        let about = String::from_utf8_lossy(&request[..request.len().min(40)]).into_owned();
        assert!(answers.contains(&status), "{about:?}: {answer}");
    }
    let head = says(address, "HEAD /metrics HTTP/1.1\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    // Clients that say nothing have their places for a while, not for ever.
    let idle = || TcpStream::connect(address).unwrap();
    let silent: Vec<_> = (0..20).map(|_| idle()).collect();
    assert!(scrape(address).await.contains("# EOF"));
    drop(silent);
    // Meanwhile the machine does what it does.
    machine.pause().await.unwrap().resume().await.unwrap();
    drop(endpoint);
    assert_closed(address);
    machine.shutdown().await.unwrap();
}

#[test]
fn an_address_that_is_taken_is_told() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let error = MetricsArgs { metrics: Some(address) }.bind().unwrap_err();
    assert_eq!(error.to_string(), format!("cannot serve metrics at {address}"));
    assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
}
