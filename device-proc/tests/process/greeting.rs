//! From start to welcome, and every way to end.

use crate::child::{Device, PATIENCE, program, spawn, wait, welcome};
use crate::client::Client;
use crate::probe::{DOORBELL, NUMBER};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use standstill_device_proc::serve::{
    EXIT_DEVICE, EXIT_ORPHANED, EXIT_PROTOCOL, EXIT_REJECTED, EXIT_SOCKET,
};
use standstill_protocol::channel::CoordinatorEnd;
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, Epoch, OrphanPolicy, Reject, Term, VERSIONS, VersionRange,
    Welcome,
};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::process::Stdio;

fn exit_code(device: &mut Device) -> Option<i32> {
    wait(&mut device.process).code()
}

#[test]
fn the_greeting_says_what_the_device_is() {
    let (mut device, hello) = Device::start("kind:camera");
    assert_eq!((hello.versions, hello.kind.as_str()), (VERSIONS, "camera"));
    assert_eq!(hello.capabilities.migration, MigrationFlags::STOP_COPY_P2P, "the gate gives P2P");
    assert!(hello.capabilities.progress);
    assert_eq!((hello.machine, hello.term, hello.epoch), (None, Term(0), Epoch(0)));
    assert_eq!((hello.state, hello.backing_files), (MigrationState::Running, 1));
    assert_eq!(hello.memory.len(), 1, "one memory BAR");
    device.process.kill().unwrap();
}

#[test]
fn the_backing_files_lock_can_be_had_only_when_the_process_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (channel, stdin) = CoordinatorEnd::pair().unwrap();
    let mut process = spawn(&folder.path().join("data.sock"), "", stdin.into());
    let mut hello = channel.recv(PATIENCE).unwrap();
    assert!(matches!(hello.message, DeviceMessage::Hello(_)));
    let file = hello.fds.pop().unwrap();
    let try_lock = || flock(&file, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(try_lock(), Err(Errno::WOULDBLOCK));
    process.kill().unwrap();
    process.wait().unwrap();
    assert_eq!(try_lock(), Ok(()));
}

#[test]
fn a_rejected_device_ends() {
    let (mut device, _) = Device::start("");
    let versions = VersionRange { min: 8, max: 9 };
    device.send(&CoordinatorMessage::Reject(Reject { versions, reason: "too old".into() }));
    assert_eq!(exit_code(&mut device), Some(EXIT_REJECTED.into()));
    assert!(!device.socket().exists());
}

#[test]
fn a_version_that_was_not_offered_ends_the_device() {
    let (mut device, _) = Device::start("");
    let version = VERSIONS.max + 1;
    device.send(&CoordinatorMessage::Welcome(Welcome { version, ..welcome(OrphanPolicy::Exit) }));
    assert_eq!(exit_code(&mut device), Some(EXIT_PROTOCOL.into()));
}

#[test]
fn a_coordinator_that_goes_before_the_welcome_ends_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let (channel, stdin) = CoordinatorEnd::pair().unwrap();
    let mut process = spawn(&folder.path().join("data.sock"), "", stdin.into());
    channel.recv(PATIENCE).unwrap();
    drop(channel);
    assert_eq!(wait(&mut process).code(), Some(EXIT_ORPHANED.into()));
}

#[test]
fn a_coordinator_that_goes_before_the_greeting_ends_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let (channel, stdin) = CoordinatorEnd::pair().unwrap();
    drop(channel);
    let mut process = spawn(&folder.path().join("data.sock"), "", stdin.into());
    assert_eq!(wait(&mut process).code(), Some(EXIT_ORPHANED.into()));
}

#[test]
fn the_end_of_the_coordinator_ends_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("data.sock");
    let (channel, stdin) = CoordinatorEnd::pair().unwrap();
    let mut process = spawn(&socket, "hold:prepare_stop", stdin.into());
    channel.recv(PATIENCE).unwrap();
    let accept = CoordinatorMessage::Welcome(welcome(OrphanPolicy::Exit));
    channel.send(&accept, &[], PATIENCE).unwrap();
    drop(channel);
    assert_eq!(wait(&mut process).code(), Some(EXIT_ORPHANED.into()));
    assert!(!socket.exists());
}

#[test]
fn a_device_that_is_to_be_kept_outlives_its_coordinator() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("data.sock");
    let (channel, stdin) = CoordinatorEnd::pair().unwrap();
    let mut process = spawn(&socket, "", stdin.into());
    channel.recv(PATIENCE).unwrap();
    let accept = CoordinatorMessage::Welcome(welcome(OrphanPolicy::Keep));
    channel.send(&accept, &[], PATIENCE).unwrap();
    drop(channel);
    let mut client = Client::connect(&socket);
    client.write_u32(0, 0, 5).unwrap();
    assert_eq!(client.read_u32(0, 0), Ok(5));
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(wait(&mut process).code(), Some(0));
}

#[test]
fn bytes_that_are_no_message_end_the_device() {
    let device = Device::welcomed("");
    let mut device = device;
    rustix::net::send(&device.channel, b"hello there", rustix::net::SendFlags::NOSIGNAL).unwrap();
    assert_eq!(exit_code(&mut device), Some(EXIT_PROTOCOL.into()));
}

#[test]
fn a_second_welcome_ends_the_device() {
    let mut device = Device::welcomed("");
    device.send(&CoordinatorMessage::Welcome(welcome(OrphanPolicy::Exit)));
    assert_eq!(exit_code(&mut device), Some(EXIT_PROTOCOL.into()));
}

#[test]
fn without_a_coordinator_a_device_runs_until_it_is_told_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("data.sock");
    let mut process = spawn(&socket, "", Stdio::null());
    crate::child::until("the data socket is there", || {
        std::os::unix::net::UnixStream::connect(&socket).is_ok()
    });
    let mut client = Client::connect(&socket);
    client.write_u32(0, 0, 5).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(wait(&mut process).code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn a_device_that_cannot_be_built_ends() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = spawn(&folder.path().join("data.sock"), "fail:build", Stdio::null());
    assert_eq!(wait(&mut process).code(), Some(EXIT_DEVICE.into()));
}

#[test]
fn a_data_socket_that_is_in_use_ends_the_second_device_which_says_so() {
    let device = Device::welcomed("");
    let mut second = program(&device.socket(), "", Stdio::null());
    let mut second = second.stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(wait(&mut second).code(), Some(EXIT_SOCKET.into()));
    assert!(device.socket().exists());
    let log = std::io::read_to_string(second.stderr.take().unwrap()).unwrap();
    let socket = device.socket().display().to_string();
    assert!(log.contains("the device process ends") && log.contains(&socket), "{log:?}");
}

#[test]
fn heartbeats_carry_the_progress() {
    let (device, _) = Device::start("");
    let beating = Welcome { heartbeat_ns: 1_000_000, ..welcome(OrphanPolicy::Exit) };
    device.send(&CoordinatorMessage::Welcome(beating));
    device.channel.set_version(1);
    for expected in 0..3 {
        match device.next() {
            DeviceMessage::Heartbeat(beat) => {
                assert_eq!((beat.sequence, beat.progress, beat.pending), (expected, 0, false));
            }
            other => panic!("expected a heartbeat, got {other:?}"),
        }
    }
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 5).unwrap();
    client.write_u32(0, DOORBELL, 1).unwrap();
    crate::child::until("the progress is told", || match device.next() {
        DeviceMessage::Heartbeat(beat) => (beat.progress, beat.pending) == (5, true),
        _ => false,
    });
}
