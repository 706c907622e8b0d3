//! Devices of a real machine that are told to do wrong: at rest, in the middle of a transition, by a
//! program without async; those that cannot be told; and those whose lie only an oracle finds.

#![expect(clippy::panic, reason = "a test fails by panicking")]

use standstill::coordinator::error::MachineError;
use standstill::coordinator::fault::{ArmError, Journal, JournalError};
use standstill::coordinator::{DeviceSpec, MachineBuilder, Outcome};
use standstill::protocol::channel::{DeviceEnd, SendError};
use standstill::protocol::fault::{
    Action, Armament, Fault, JournalLine, MAX_FAULTS, Point, VARIABLE,
};
use standstill::protocol::message::{
    Capabilities, DeviceMessage, Epoch, Hello, PeerDma, Phase, Term, VERSIONS,
};
use standstill::protocol::migration::{MigrationFlags, MigrationState};
use standstill::protocol::transition::MachineState;
use std::io;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// `d0` and `d1`.
fn two(folder: &TempDir) -> MachineBuilder {
    let engine = |name: &str| {
        let socket = folder.path().join(name);
        let program = env!("CARGO_BIN_EXE_standstill");
        DeviceSpec::new(name, program).args(["device", "copy-engine", "--socket"]).arg(socket)
    };
    MachineBuilder::new("vm").devices(["d0", "d1"].map(engine))
}

fn assert_fired(line: JournalLine, fault: u32, nth: u32) {
    let JournalLine::Fired { index, occurrence, at_ns } = line else { panic!("{line}") };
    assert_eq!((index, occurrence), (fault, nth));
    assert!(at_ns > 0);
}

/// Who of `d0` and `d1` the machine goes on without.
fn lost(error: &MachineError) -> Vec<String> {
    let MachineError::Transition(report) = error else { panic!("{error}") };
    assert_eq!(report.machine, MachineState::Running, "{report}");
    let Outcome::Degraded { fenced, .. } = &report.outcome else { panic!("{report}") };
    fenced.iter().map(|(id, _)| report.names.participant(*id)).collect()
}

#[tokio::test]
async fn a_device_does_what_it_was_told_and_says_so_before() {
    let folder = tempfile::tempdir().unwrap();
    let machine = two(&folder).start().await.unwrap();
    let late = Fault::new(Point::BeforeAck(Phase::PrepareStop), Action::DelayMs(1)).nth(0);
    let dies = Fault::new(Point::BeforeAck(Phase::Stop), Action::Exit(3)).nth(2);
    let mut journal = machine.arm("d1", &[late, dies]).await.unwrap();
    assert_eq!(journal.faults(), [late, dies]);
    assert_eq!(journal.next().await.unwrap(), JournalLine::Armed(2));

    machine.pause().await.unwrap().resume().await.unwrap();
    assert_fired(journal.next().await.unwrap(), 0, 1);
    assert_eq!(lost(&machine.pause().await.unwrap_err()), ["d1"]);
    assert_fired(journal.next().await.unwrap(), 0, 2);
    assert_fired(journal.next().await.unwrap(), 1, 2);
    assert!(matches!(journal.next().await, Err(JournalError::Ended)), "the process is gone");

    let gone = machine.arm("d1", &[late]).await.unwrap_err();
    assert!(matches!(&gone, ArmError::OutOfReach { device } if device == "d1"), "{gone}");
    // The next process is a new one: it does nothing wrong.
    machine.restart_device("d1").await.unwrap();
    for _ in 0..3 {
        let report = machine.pause().await.unwrap().resume().await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
    }
    machine.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_device_is_armed_in_the_middle_of_a_transition() {
    let folder = tempfile::tempdir().unwrap();
    let machine = two(&folder).start().await.unwrap();
    let quiet = machine.launch_prepare_stop(PATIENCE).unwrap().join().await.unwrap();
    let refuses = Fault::new(Point::Receipt(Phase::Stop), Action::Refuse(5));
    let mut journal = machine.arm("d0", &[refuses]).await.unwrap();
    let error = quiet.launch_stop().join().await.unwrap_err();
    let MachineError::Transition(report) = &error else { panic!("{error}") };
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    assert!(error.to_string().contains("Input/output error"), "{error}");
    assert_eq!(journal.next().await.unwrap(), JournalLine::Armed(1));
    assert_fired(journal.next().await.unwrap(), 0, 1);
    machine.shutdown().await.unwrap();
}

#[test]
fn a_program_without_async_does_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let machine = two(&folder).start_blocking().unwrap();
    let dies = Fault::new(Point::AfterAck(Phase::PrepareStop), Action::Abort);
    let mut journal: Journal = machine.arm("d0", &[dies]).unwrap();
    assert_eq!(journal.next_within(PATIENCE).unwrap(), JournalLine::Armed(1));
    assert!(journal.try_next().unwrap().is_none());
    assert_eq!(lost(&machine.pause().unwrap_err()), ["d0"]);
    assert_fired(journal.next_within(PATIENCE).unwrap(), 0, 1);
    machine.shutdown().unwrap();
    let error = machine.arm("d1", &[dies]).unwrap_err();
    assert!(matches!(error, ArmError::Machine(MachineError::Gone)), "{error}");
}

#[tokio::test]
async fn what_cannot_be_armed_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let foreign = DeviceSpec::new("foreign", std::env::current_exe().unwrap())
        .args(["--exact", "foreign_device", "--nocapture"])
        .env(FOREIGN, "1");
    let machine = two(&folder).device(foreign).start().await.unwrap();
    let fault = Fault::new(Point::Query, Action::Exit(1));

    let error = machine.arm("d7", &[fault]).await.unwrap_err();
    let ArmError::Machine(MachineError::NoDevice { device }) = error else { panic!("{error}") };
    assert_eq!(device, "d7");
    let error = machine.arm("foreign", &[fault]).await.unwrap_err();
    assert!(matches!(&error, ArmError::NotBuiltForIt { device } if device == "foreign"), "{error}");
    let impossible = Fault::new(Point::Dma, Action::TwoAcks);
    for faults in [&[][..], &[impossible], &[fault; MAX_FAULTS + 1]] {
        let error = machine.arm("d0", faults).await.unwrap_err();
        let ArmError::Send { device, source: SendError::Encode(_) } = &error else {
            panic!("{error}")
        };
        assert_eq!(device, "d0");
    }
    machine.shutdown_within(Duration::ZERO).await.unwrap();
}

/// The oracle of the demonstration is outside the devices, and these say that all is well.
#[test]
fn the_oracle_fails_with_devices_that_go_on_with_their_dma_after_the_ack() {
    let folder = tempfile::tempdir().unwrap();
    // The others have the time in which one device is slow.
    for (phase, slow) in [(Phase::PrepareStop, "--slow-prepare"), (Phase::Stop, "--slow-stop")] {
        let liar = Fault::new(Point::BeforeAck(phase), Action::KeepDma).nth(0);
        let journal = folder.path().join(phase.to_string());
        let armament = Armament { journal: journal.clone(), faults: vec![liar] };
        let output = Command::new(env!("CARGO_BIN_EXE_standstill"))
            .args(["demo", "--json", "--devices", "3", "--rounds", "5", slow, "engine2=200ms"])
            .env(VARIABLE, serde_json::to_string(&armament).unwrap())
            .output()
            .unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        let last = stdout.lines().last().unwrap_or_else(|| panic!("no output"));
        let summary: serde_json::Value = serde_json::from_str(last).unwrap();
        let rounds = summary["rounds_with_late_writes"].as_u64().unwrap();
        assert!(rounds >= 4, "{phase}: late writes in {rounds} rounds only");
        assert!(!output.status.success(), "{phase}");

        let lines = std::fs::read_to_string(&journal).unwrap();
        let lines: Vec<_> = lines.lines().map(|line| JournalLine::parse(line).unwrap()).collect();
        let fired = lines.iter().filter(|line| matches!(line, JournalLine::Fired { .. })).count();
        assert_eq!((lines.len(), fired), (3 + 3 * 5, 3 * 5), "{phase}: each device, each round");
    }
}

const FOREIGN: &str = "STANDSTILL_TEST_FOREIGN_DEVICE";

/// Not a test: what a device process of somebody else does that was not built to do wrong. Without
/// its variable it is empty.
#[test]
fn foreign_device() {
    if std::env::var_os(FOREIGN).is_none() {
        return;
    }
    let channel = DeviceEnd::from_fd(io::stdin().as_fd().try_clone_to_owned().unwrap()).unwrap();
    let hello = Hello {
        versions: VERSIONS,
        kind: "foreign".into(),
        program_version: "1".into(),
        capabilities: Capabilities {
            migration: MigrationFlags::STOP_COPY_P2P,
            peer_dma: PeerDma::Possible,
            progress: false,
            dirty_tracking: false,
            fault_injection: false,
        },
        machine: None,
        term: Term(0),
        epoch: Epoch(0),
        state: MigrationState::Running,
        backing_files: 0,
        memory: Vec::new(),
    };
    channel.send(&DeviceMessage::Hello(hello), &[], PATIENCE).unwrap();
    // Whatever comes, until the coordinator is gone.
    while channel.recv(PATIENCE).is_ok() {
        channel.set_version(1);
    }
}
