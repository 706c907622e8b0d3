//! What a program takes and does depends on the feature `fault-injection`, and without it there is
//! nothing of it. Passes in both builds, and CI runs both; so everything here is bytes.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use standstill::device_proc::serve::{EXIT_DEVICE, EXIT_PROTOCOL};
use standstill::protocol::channel::CoordinatorEnd;
use standstill::protocol::fault::VARIABLE;
use standstill::protocol::message::{
    CoordinatorMessage, DeviceMessage, Epoch, Hello, OrphanPolicy, Query, Term, Welcome,
};
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_standstill");
const BUILT_FOR_IT: bool = cfg!(feature = "fault-injection");
const PATIENCE: Duration = Duration::from_secs(30);

/// `standstill device copy-engine` and the coordinator's end of its control channel.
struct Engine {
    process: Child,
    channel: CoordinatorEnd,
    _folder: TempDir,
}

impl Engine {
    fn start(environment: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (channel, stdin) = CoordinatorEnd::pair().unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["device", "copy-engine", "--socket"]).arg(folder.path().join("data.sock"));
        command.env_remove(VARIABLE).envs(environment.map(|value| (VARIABLE, value)));
        command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped());
        Self { process: command.spawn().unwrap(), channel, _folder: folder }
    }

    fn hello(&self) -> Hello {
        match self.channel.recv(PATIENCE).unwrap().message {
            DeviceMessage::Hello(hello) => hello,
            other => panic!("expected Hello, got {other:?}"),
        }
    }

    fn welcomed() -> Self {
        let engine = Self::start(None);
        engine.hello();
        let welcome = CoordinatorMessage::Welcome(Welcome {
            version: 1,
            machine: Default::default(),
            name: "d0".into(),
            incarnation: 1,
            term: Term(1),
            epoch: Epoch(0),
            heartbeat_ns: 0,
            orphan: OrphanPolicy::Exit,
            listener: false,
            log: false,
        });
        engine.channel.send(&welcome, &[], PATIENCE).unwrap();
        engine.channel.set_version(1);
        engine
    }

    fn query(&self) {
        let query = CoordinatorMessage::Query(Query { term: Term(1), epoch: Epoch(0) });
        self.channel.send(&query, &[], PATIENCE).unwrap();
    }

    /// How it ended, and what it wrote to its log. It has something to end for.
    fn end(mut self) -> (Option<i32>, String) {
        let mut log = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.process.wait().unwrap().code(), log)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An Arm, as `docs/protocol.md` has it: exit with status 7 at the next query.
fn arm(channel: &CoordinatorEnd) -> io::PipeReader {
    let mut packet = Vec::from(*b"STST\x01\x00\x00\x00\x09\x00\x00\x00");
    packet.extend(1_u64.to_le_bytes());
    packet.extend(1_u64.to_le_bytes());
    for field in [4_u32, 1, 0] {
        packet.extend(field.to_le_bytes());
    }
    packet.push(7);
    let (reader, journal) = io::pipe().unwrap();
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    let fds = [journal.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(channel, &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL).unwrap();
    reader
}

#[test]
fn a_program_says_in_its_hello_whether_it_can_be_told_to_do_wrong() {
    assert_eq!(Engine::start(None).hello().capabilities.fault_injection, BUILT_FOR_IT);
}

#[test]
fn a_program_that_was_not_built_for_it_refuses_to_be_armed() {
    let engine = Engine::welcomed();
    let mut journal = arm(&engine.channel);
    if BUILT_FOR_IT {
        engine.query();
    }
    let (code, log) = engine.end();
    let mut lines = String::new();
    journal.read_to_string(&mut lines).unwrap();
    if BUILT_FOR_IT {
        assert_eq!(code, Some(7), "{log}");
        assert!(lines.starts_with("armed 1\nfired 0 1 "), "{lines:?}");
    } else {
        assert_eq!(code, Some(EXIT_PROTOCOL.into()), "{log}");
        assert_eq!(lines, "");
        let tag = "undecodable at byte 12 of 41: invalid value: integer `9`";
        assert!(log.contains(tag), "{log}");
    }
}

#[test]
fn a_program_that_was_not_built_for_it_does_not_read_the_variable() {
    let engine = Engine::start(Some("nothing that could be armed"));
    if BUILT_FOR_IT {
        let (code, log) = engine.end();
        assert_eq!(code, Some(EXIT_DEVICE.into()), "{log}");
        assert!(log.contains("the faults of the environment"), "{log}");
    } else {
        engine.hello();
    }
}

#[test]
fn a_program_that_was_not_built_for_it_has_no_trace_of_it() {
    let program = std::fs::read(PROGRAM).unwrap();
    let program = String::from_utf8_lossy(&program);
    for text in [VARIABLE, "fault injected"] {
        assert_eq!(program.contains(text), BUILT_FOR_IT, "{text}");
    }
}

#[test]
fn a_program_that_was_not_built_for_it_says_how_to_build_one_for_chaos() {
    let mut command = Command::new(PROGRAM);
    let output = command.args(["chaos", "--rounds", "1", "--seed", "1"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let code = if BUILT_FOR_IT { 0 } else { 3 };
    let result = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(code), "{errors}\n{result}");
    assert_eq!(errors.contains("--features fault-injection"), !BUILT_FOR_IT, "{errors}");
}
