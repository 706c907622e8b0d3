//! Faults at a Hello: the first one, by the environment; later ones, by the channel.

use super::{SILENCE, arm, assert_lives};
use crate::child::{Device, PATIENCE, program, until, wait, welcome};
use standstill_device_proc::serve::EXIT_DEVICE;
use standstill_protocol::channel::{CoordinatorEnd, RecvError};
use standstill_protocol::fault::{Action, Armament, Fault, JournalLine, Packet, Point, VARIABLE};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, OrphanPolicy, Phase, Term, Welcome,
};
use standstill_protocol::migration::MigrationState as S;
use std::path::{Path, PathBuf};
use std::process::Child;
use tempfile::TempDir;

/// A process that was armed by its environment.
struct Started {
    process: Child,
    channel: CoordinatorEnd,
    folder: TempDir,
}

impl Started {
    fn with(faults: &[Fault]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let armament = Armament { journal: journal(&folder), faults: faults.to_vec() };
        Self::saying(folder, &serde_json::to_string(&armament).unwrap())
    }

    fn saying(folder: TempDir, variable: &str) -> Self {
        let (channel, stdin) = CoordinatorEnd::pair().unwrap();
        let socket = folder.path().join("data.sock");
        let process = program(&socket, "", stdin.into()).env(VARIABLE, variable).spawn().unwrap();
        Self { process, channel, folder }
    }

    /// Waits until the first fault has fired.
    fn fired(&self) {
        until("it has fired", || lines(&journal(&self.folder)).len() > 1);
        let lines = lines(&journal(&self.folder));
        assert_eq!(lines[0], JournalLine::Armed(1));
        assert!(matches!(lines[1], JournalLine::Fired { index: 0, occurrence: 1, .. }));
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn journal(folder: &TempDir) -> PathBuf {
    folder.path().join("journal")
}

fn lines(journal: &Path) -> Vec<JournalLine> {
    let text = std::fs::read_to_string(journal).unwrap_or_default();
    text.lines().filter_map(JournalLine::parse).collect()
}

fn is_hello(message: &DeviceMessage) -> bool {
    matches!(message, DeviceMessage::Hello(_))
}

#[test]
fn a_process_says_no_hello_or_two_or_something_else() {
    let started = Started::with(&[Fault::new(Point::Hello, Action::NoAck)]);
    started.fired();
    let silence = started.channel.recv(SILENCE);
    assert!(matches!(silence, Err(RecvError::TimedOut { .. })), "{silence:?}");

    let started = Started::with(&[Fault::new(Point::Hello, Action::TwoAcks)]);
    for _ in 0..2 {
        assert!(is_hello(&started.channel.recv(PATIENCE).unwrap().message));
    }
    started.fired();

    for packet in [Packet::Garbage, Packet::Empty, Packet::Truncated, Packet::Oversized] {
        let started = Started::with(&[Fault::new(Point::Hello, Action::Send(packet))]);
        let broken = started.channel.recv(PATIENCE);
        assert!(
            matches!(
                broken,
                Err(RecvError::Decode(_) | RecvError::Empty | RecvError::Oversized { .. })
            ),
            "{packet}: {broken:?}"
        );
        started.fired();
    }
}

#[test]
fn a_process_dies_or_falls_silent_before_its_hello() {
    let mut started = Started::with(&[Fault::new(Point::Hello, Action::Exit(9))]);
    assert_eq!(wait(&mut started.process).code(), Some(9));
    started.fired();
    assert!(matches!(started.channel.recv(PATIENCE), Err(RecvError::Disconnected)));

    let mut started = Started::with(&[Fault::new(Point::Hello, Action::Disconnect)]);
    assert!(matches!(started.channel.recv(PATIENCE), Err(RecvError::Disconnected)));
    started.fired();
    assert_lives(&mut started.process);
}

#[test]
fn the_environment_arms_for_what_comes_later_too() {
    let second = Fault::new(Point::BeforeAck(Phase::PrepareStop), Action::Exit(8));
    let mut started = Started::with(&[second]);
    assert!(is_hello(&started.channel.recv(PATIENCE).unwrap().message));
    let accept = CoordinatorMessage::Welcome(welcome(OrphanPolicy::Exit));
    started.channel.send(&accept, &[], PATIENCE).unwrap();
    started.channel.set_version(1);
    let command = crate::child::command(1, Phase::PrepareStop, S::RunningP2p);
    started.channel.send(&CoordinatorMessage::Command(command), &[], PATIENCE).unwrap();
    assert_eq!(wait(&mut started.process).code(), Some(8));
    started.fired();
}

#[test]
fn an_environment_that_says_nothing_sensible_ends_the_process() {
    let impossible =
        r#"{"journal":"/dev/null","faults":[{"point":"dma","nth":1,"action":"no-ack"}]}"#;
    let nowhere = r#"{"journal":"/nowhere/at/all","faults":[]}"#;
    for variable in ["", "no json", impossible, nowhere] {
        let mut started = Started::saying(tempfile::tempdir().unwrap(), variable);
        let status = wait(&mut started.process);
        assert_eq!(status.code(), Some(EXIT_DEVICE.into()), "{variable:?}");
    }
}

#[test]
fn a_later_coordinator_gets_no_hello_and_the_next_one_does() {
    let mut device = Device::kept("", None);
    let mut journal = arm(&device, &[Fault::new(Point::Hello, Action::Disconnect)]);
    let later = CoordinatorEnd::connect(&device.control_path()).unwrap();
    journal.fired(0, 1);
    assert!(matches!(later.recv(PATIENCE), Err(RecvError::Disconnected)));
    let (channel, hello) = device.connect();
    assert!(hello.capabilities.fault_injection);
    let message = Welcome { term: Term(2), ..welcome(OrphanPolicy::Keep) };
    channel.send(&CoordinatorMessage::Welcome(message), &[], PATIENCE).unwrap();
    channel.set_version(1);
    device.channel = channel;
    device.term = Term(2);
    // What an earlier coordinator armed stays armed.
    let mut journal = arm(&device, &[Fault::new(Point::Query, Action::TwoAcks)]);
    device.query(1);
    assert!(matches!(device.answer(), DeviceMessage::Status(_)));
    journal.fired(0, 1);
}
