//! Saving and loading.

use crate::child::{Device, command};
use crate::client::Client;
use crate::probe::{MEMORY_SIZE, NUMBER};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, Phase, RefusalKind, Refused,
};
use standstill_protocol::migration::MigrationState as S;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

fn save_into(device: &Device, epoch: u64, to: &impl AsFd) {
    let save = command(epoch, Phase::Save, S::StopCopy);
    device.send_with(&CoordinatorMessage::Command(save), &[to.as_fd()]);
}

/// A device that was stopped with this number and memory, and its state.
fn saved(script: &str) -> Vec<u8> {
    let device = Device::welcomed(script);
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 77).unwrap();
    client.write(2, MEMORY_SIZE - 4, &[1, 2, 3, 4]).unwrap();
    client.write(7, 4, &[6, 0]).unwrap();
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.go(1, Phase::Stop, S::StopCopy);
    let mut file = tempfile::tempfile().unwrap();
    save_into(&device, 2, &file);
    assert_eq!(device.reached().state, S::StopCopy);
    let mut state = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut state).unwrap();
    device.shut_down();
    state
}

fn file_with(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

/// Stops a fresh device and makes it load.
fn load(script: &str, bytes: &[u8]) -> (Device, DeviceMessage) {
    let device = Device::welcomed(script);
    device.pause(1);
    let load = command(2, Phase::Load, S::Stop);
    device.send_with(&CoordinatorMessage::Command(load), &[file_with(bytes).as_fd()]);
    let answer = device.answer();
    (device, answer)
}

fn refused(script: &str, bytes: &[u8]) -> (Device, Refused) {
    match load(script, bytes) {
        (device, DeviceMessage::Refused(refused)) => {
            assert_eq!((refused.state, refused.refusal.kind), (S::Error, RefusalKind::Stream));
            (device, refused)
        }
        (_, other) => panic!("expected Refused, got {other:?}"),
    }
}

#[test]
fn a_saved_device_goes_on_in_another_process() {
    let state = saved("raise-when-stopped");
    let (device, answer) = load("", &state);
    match answer {
        DeviceMessage::Reached(reached) => assert_eq!(reached.state, S::Stop),
        other => panic!("expected Reached, got {other:?}"),
    }
    let mut client = Client::connect(&device.socket());
    let vector = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    client.install_msix(&[vector.as_fd()]).unwrap();
    device.resume(3);
    assert_eq!(client.read_u32(0, NUMBER), Ok(77));
    assert_eq!(client.read(2, MEMORY_SIZE - 4, 4), Ok(vec![1, 2, 3, 4]));
    assert_eq!(client.read(7, 4, 2), Ok(vec![6, 0]));
    let mut count = [0; 8];
    assert_eq!(rustix::io::read(&vector, &mut count), Ok(8), "the interrupt that waited");
}

#[test]
fn state_goes_through_a_pipe_too() {
    let source = Device::welcomed("");
    let mut client = Client::connect(&source.socket());
    client.write_u32(0, NUMBER, 5).unwrap();
    source.go(1, Phase::PrepareStop, S::RunningP2p);
    source.go(1, Phase::Stop, S::StopCopy);
    let target = Device::welcomed("");
    target.pause(1);
    let (reader, writer) = std::io::pipe().unwrap();
    save_into(&source, 2, &writer);
    drop(writer);
    let load = command(2, Phase::Load, S::Stop);
    target.send_with(&CoordinatorMessage::Command(load), &[reader.as_fd()]);
    assert_eq!(source.reached().state, S::StopCopy);
    assert_eq!(target.reached().state, S::Stop);
    target.resume(3);
    assert_eq!(Client::connect(&target.socket()).read_u32(0, NUMBER), Ok(5));
}

#[test]
fn a_truncated_state_is_refused_and_a_reset_makes_the_device_usable() {
    let state = saved("");
    for length in [0, 7, 20, state.len() / 2, state.len() - 1] {
        let (device, refused) = refused("", &state[..length]);
        assert_eq!(refused.refusal.text, "the state stream ends too early", "{length} bytes");
        device.go(3, Phase::Reset, S::Stop);
        device.resume(4);
        assert_eq!(Client::connect(&device.socket()).read_u32(0, NUMBER), Ok(0));
    }
}

#[test]
fn a_damaged_state_is_refused() {
    let mut state = saved("");
    let middle = state.len() / 2;
    state[middle] ^= 1;
    let (_, refused) = refused("", &state);
    assert!(refused.refusal.text.starts_with("damaged"), "{}", refused.refusal.text);
}

#[test]
fn the_state_of_another_device_is_refused() {
    let state = saved("");
    let (_, other_kind) = refused("kind:camera", &state);
    assert_eq!(other_kind.refusal.text, r#"the state of a "probe", this is a "camera""#);
    let (_, other_id) = refused("pci:2", &state);
    assert!(
        other_id.refusal.text.starts_with("configuration space differs at 0x2"),
        "{}",
        other_id.refusal.text
    );
}

#[test]
fn saving_into_a_pipe_that_nobody_reads_ends_with_the_budget() {
    let device = Device::welcomed("");
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.go(1, Phase::Stop, S::StopCopy);
    let (_reader, writer) = std::io::pipe().unwrap();
    let mut save = command(2, Phase::Save, S::StopCopy);
    save.budget_ns = 20_000_000;
    device.send_with(&CoordinatorMessage::Command(save), &[writer.as_fd()]);
    let refused = device.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::StopCopy, RefusalKind::Stream));
    assert!(refused.refusal.text.contains("timed out"), "{}", refused.refusal.text);
}

#[test]
fn saving_a_running_device_is_refused() {
    let device = Device::welcomed("");
    let file = tempfile::tempfile().unwrap();
    save_into(&device, 1, &file);
    let refused = device.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::Running, RefusalKind::NoWay));
}
