//! The state of a device on its way to another process.

use super::failure;
use super::guest::{Guest, Memory};
use crate::child::{Device, command};
use standstill_protocol::message::{CoordinatorMessage, Phase, RefusalKind};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S};
use standstill_testkit::vhost_user::VhostUserError;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as When,
};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

fn save(device: &Device, epoch: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    let save = CoordinatorMessage::Command(command(epoch, Phase::Save, S::StopCopy));
    device.send_with(&save, &[file.as_fd()]);
    assert_eq!(device.reached().state, S::StopCopy);
    file
}

/// Has a device that is stopped load a state.
fn load(device: &Device, mut file: &File) {
    file.seek(SeekFrom::Start(0)).unwrap();
    let load = CoordinatorMessage::Command(command(102, Phase::Load, S::Stop));
    device.send_with(&load, &[file.as_fd()]);
}

/// Stops a device that has done three requests, and with a fourth in its ring.
fn stopped(device: &Device) -> Guest {
    let mut guest = Guest::start(&device.socket(), 1);
    (0..3).for_each(|_| guest.push(0));
    guest.wait_used(0, 3);
    guest.set_config(0, b"saved").unwrap();
    device.go(101, Phase::PrepareStop, S::RunningP2p);
    guest.push(0);
    guest.settle(0);
    device.go(101, Phase::Stop, S::StopCopy);
    guest
}

/// Its state, and a copy of the guest's memory.
fn saved() -> (File, Memory) {
    let device = Device::welcomed("vhost");
    let mut guest = stopped(&device);
    let by_coordinator_first = save(&device, 102);
    assert_eq!(guest.stop_ring(0), 3);
    let file = save(&device, 103);
    assert_eq!(bytes(&file), bytes(&by_coordinator_first), "whoever stops first");
    (file, guest.disconnect().copy())
}

fn bytes(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Has a frontend transfer the state of a device through a pipe.
fn in_band(guest: &mut Guest, direction: Direction, end: OwnedFd) -> Result<(), VhostUserError> {
    guest.ask(|frontend| {
        let channel = frontend.set_device_state_fd(direction, When::STOPPED, end)?;
        assert!(channel.is_none());
        Ok(())
    })
}

fn check(guest: &mut Guest) -> Result<(), VhostUserError> {
    guest.ask(|frontend| frontend.check_device_state())
}

#[test]
fn a_device_goes_on_in_another_process() {
    let (file, memory) = saved();
    let device = Device::welcomed("vhost");
    device.pause(1);
    load(&device, &file);
    assert_eq!(device.reached().state, S::Stop);
    assert_eq!(bytes(&file), {
        device.go(103, Phase::Stop, S::StopCopy);
        bytes(&save(&device, 104))
    });
    device.go(105, Phase::Stop, S::Stop);
    let mut guest = Guest::connect(&device.socket(), memory);
    guest.start_ring(0, 3);
    guest.settle(0);
    assert_eq!(guest.memory.used(0), 3);
    device.resume(106);
    guest.wait_used(0, 4);
    assert_eq!(guest.memory.number(0, 3), 3, "the backend's own state");
    assert_eq!(guest.config(), b"saved567");
}

#[test]
fn a_frontend_that_starts_a_ring_elsewhere_is_refused_and_told_why() {
    let (file, memory) = saved();
    let device = Device::welcomed("vhost");
    device.pause(1);
    load(&device, &file);
    assert_eq!(device.reached().state, S::Stop);
    let mut guest = Guest::connect(&device.socket(), memory);
    guest.start_ring(0, 2);
    let why = failure(&device);
    assert!(why.starts_with("queue 0: the frontend starts its ring at index 2"), "{why}");
    assert!(why.ends_with("says 3"), "{why}");
    device.resume(103);
    guest.push(0);
    guest.settle(0);
    assert_eq!(guest.memory.used(0), 3);
    assert_eq!(guest.stop_ring(0), 2, "nothing was pushed ahead of the frontend");
    guest.start_ring(0, 3);
    guest.wait_used(0, 5);
}

#[test]
fn a_state_of_another_device_is_refused_and_it_is_said_what_differs() {
    let (file, _) = saved();
    for (script, why) in [
        ("vhost queues:2", "saved was a device with 1 queues, this one has 2"),
        ("vhost kind:gpu", "gpu"),
        ("vhost old", "0x100000000 are missing"),
    ] {
        let device = Device::welcomed(script);
        device.pause(1);
        load(&device, &file);
        let refused = device.refused();
        assert_eq!((refused.state, refused.refusal.kind), (S::Error, RefusalKind::Stream));
        assert!(refused.refusal.text.contains(why), "{script}: {refused:?}");
    }
}

#[test]
fn a_ring_that_runs_already_is_compared_too() {
    let (file, memory) = saved();
    for base in [3, 1] {
        let device = Device::welcomed("vhost");
        device.pause(1);
        let mut guest = Guest::connect(&device.socket(), memory.copy());
        guest.memory.set_used(0, base);
        guest.start_ring(0, base);
        guest.settle(0);
        load(&device, &file);
        if base == 3 {
            assert_eq!(device.reached().state, S::Stop);
        } else {
            let text = device.refused().refusal.text;
            assert!(text.contains("queue 0: the frontend starts its ring at index 1"), "{text}");
        }
    }
}

#[test]
fn one_transfer_at_a_time_goes_on() {
    let device = Device::welcomed("vhost");
    let mut guest = stopped(&device);
    guest.stop_ring(0);
    device.go(103, Phase::Stop, S::Stop);
    device.resume(104);
    // It waits for a state that does not come.
    let (reader, writer) = std::io::pipe().unwrap();
    in_band(&mut guest, Direction::LOAD, reader.try_clone().unwrap().into()).unwrap();
    in_band(&mut guest, Direction::LOAD, reader.into()).unwrap_err();
    drop(writer);
    check(&mut guest).unwrap_err();
    let (mut reader, writer) = std::io::pipe().unwrap();
    in_band(&mut guest, Direction::SAVE, writer.into()).unwrap();
    assert!(reader.read_to_end(&mut Vec::new()).unwrap() > 0);
    check(&mut guest).unwrap();
}

#[test]
fn a_frontend_carries_the_same_bytes() {
    let device = Device::welcomed("vhost");
    let mut guest = stopped(&device);
    let file = save(&device, 102);
    let (_, writer) = std::io::pipe().unwrap();
    in_band(&mut guest, Direction::SAVE, writer.into()).unwrap_err();

    // Stopped in band alone.
    assert_eq!(guest.stop_ring(0), 3);
    device.go(103, Phase::Stop, S::Stop);
    device.resume(104);
    let (mut reader, writer) = std::io::pipe().unwrap();
    in_band(&mut guest, Direction::SAVE, writer.into()).unwrap();
    let mut carried = Vec::new();
    reader.read_to_end(&mut carried).unwrap();
    check(&mut guest).unwrap();
    assert_eq!(carried, bytes(&file));
    let memory = guest.disconnect().copy();
    drop(device);

    let device = Device::welcomed("vhost");
    let mut guest = Guest::connect(&device.socket(), memory);
    let (reader, mut writer) = std::io::pipe().unwrap();
    in_band(&mut guest, Direction::LOAD, reader.into()).unwrap();
    writer.write_all(&carried).unwrap();
    drop(writer);
    check(&mut guest).unwrap();
    guest.start_ring(0, 3);
    guest.wait_used(0, 4);
    assert_eq!(guest.memory.number(0, 3), 3);
    assert_eq!(guest.config(), b"saved567");
}

#[test]
fn what_a_frontend_brings_is_checked() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::connect(&device.socket(), Memory::new(1));
    check(&mut guest).unwrap_err();
    let (reader, mut writer) = std::io::pipe().unwrap();
    in_band(&mut guest, Direction::LOAD, reader.into()).unwrap();
    writer.write_all(b"nonsense and more of it").unwrap();
    drop(writer);
    check(&mut guest).unwrap_err();
    assert_eq!(failure(&device), "no transfer was begun");
    let why = failure(&device);
    assert!(why.contains("no state stream"), "{why}");
    guest.start_ring(0, 0);
    guest.push(0);
    guest.wait_used(0, 1);
}

#[test]
fn a_backend_without_a_state_says_so() {
    let (device, hello) = Device::start("vhost no-state");
    assert_eq!(hello.capabilities.migration, MigrationFlags::NO_STATE_P2P);
    drop(device);
    let device = Device::welcomed("vhost no-state");
    let mut guest = Guest::connect(&device.socket(), Memory::new(1));
    assert!(!guest.offered().1.contains(Protocol::DEVICE_STATE));
    device.pause(1);
    let file = tempfile::tempfile().unwrap();
    let save = CoordinatorMessage::Command(command(2, Phase::Save, S::StopCopy));
    device.send_with(&save, &[file.as_fd()]);
    assert_eq!(device.refused().refusal.kind, RefusalKind::Unsupported);

    let (_, hello) = Device::start("vhost stateless");
    assert_eq!(hello.capabilities.migration, MigrationFlags::STOP_COPY_P2P);
}
