//! Saving and loading.

use crate::child::{Device, command};
use crate::client::Client;
use crate::probe::{MEMORY_SIZE, NUMBER};
use standstill_protocol::message::{
    Command, CoordinatorMessage, DeviceMessage, Phase, RefusalKind, Refused,
};
use standstill_protocol::migration::MigrationState as S;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

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
    let text = refused.refusal.text;
    assert!(text.starts_with("damaged: memory of BAR 2 at 0x20000 has digest"), "{text}");
}

#[test]
fn the_state_of_another_device_is_refused() {
    let state = saved("");
    let (_, other_kind) = refused("kind:camera", &state);
    assert_eq!(other_kind.refusal.text, r#"the state of a "probe", this is a "camera""#);
    let refused = |script: &str| refused(script, &state).1.refusal.text;
    assert_eq!(
        refused("pci:2"),
        "the state of a device with device id 0x0001, this one has 0x0002"
    );
    let larger = Memory::new(2 * MEMORY_SIZE);
    assert_eq!(
        refused(&larger.word()),
        "the state of a device with a BAR 2 of 0x40000 bytes of memory, this one has 0x80000 bytes of memory"
    );
    assert_eq!(refused("version:2"), "the device's own state has version 1.0, expected 2.0");
}

#[test]
fn other_versions_of_the_stream_are_refused_and_the_source_goes_on() {
    let source = Device::welcomed("");
    let mut client = Client::connect(&source.socket());
    client.write_u32(0, NUMBER, 5).unwrap();
    source.go(1, Phase::PrepareStop, S::RunningP2p);
    source.go(1, Phase::Stop, S::StopCopy);
    let mut file = tempfile::tempfile().unwrap();
    save_into(&source, 2, &file);
    assert_eq!(source.reached().state, S::StopCopy);
    let mut state = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut state).unwrap();
    state[8] += 1;
    let (_, newer) = refused("", &state);
    assert_eq!(newer.refusal.text, "state stream of version 3.0, expected 2.0");
    source.resume(3);
    assert_eq!(client.read_u32(0, NUMBER), Ok(5));
    client.write_u32(0, NUMBER, 6).unwrap();
    assert_eq!(client.read_u32(0, NUMBER), Ok(6));
}

#[test]
fn a_running_device_is_saved_in_passes() {
    const SIZE: u64 = 8 << 20;
    let memory = Memory::new(SIZE);
    let source = Device::welcomed(&format!("pre-copy {}", memory.word()));
    let mut client = Client::connect(&source.socket());
    client.write_u32(0, NUMBER, 5).unwrap();
    memory.write(0, &[1; 100]);

    source.go(1, Phase::Start, S::PreCopy);
    let file = tempfile::tempfile().unwrap();
    let position = || (&file).stream_position().unwrap();
    let save = |epoch: u64, state: S| {
        let command = command(epoch, Phase::Save, state);
        source.send_with(&CoordinatorMessage::Command(command), &[file.as_fd()]);
        assert_eq!(source.reached().state, state);
        position()
    };
    let first = save(2, S::PreCopy);
    assert!(first > SIZE);
    // Nothing tells the device that its memory is written through a mapping.
    memory.write(3 << 16, &[2; 100]);
    client.write_u32(0, NUMBER, 6).unwrap();
    let second = save(3, S::PreCopy);
    assert!((65536..70_000).contains(&(second - first)), "{} bytes", second - first);
    memory.write(SIZE - 100, &[3; 100]);
    source.go(4, Phase::PrepareStop, S::PreCopyP2p);
    source.go(4, Phase::Stop, S::StopCopy);
    let third = save(5, S::StopCopy);
    assert!((65536..80_000).contains(&(third - second)), "{} bytes", third - second);

    let mut state = vec![0; usize::try_from(third).unwrap()];
    (&file).seek(SeekFrom::Start(0)).unwrap();
    (&file).read_exact(&mut state).unwrap();
    let (target, answer) = load(&Memory::new(SIZE).word(), &state);
    assert!(matches!(answer, DeviceMessage::Reached(_)), "{answer:?}");
    target.resume(3);
    let mut client = Client::connect(&target.socket());
    assert_eq!(client.read_u32(0, NUMBER), Ok(6));
    for (at, byte) in [(0, 1), (3 << 16, 2), (SIZE - 100, 3)] {
        assert_eq!(client.read(2, at, 100), Ok(vec![byte; 100]), "at {at:#x}");
    }
    assert_eq!(client.read(2, 100, 100), Ok(vec![0; 100]));
}

#[test]
fn a_pass_that_fails_voids_the_stream_and_the_next_save_begins_another() {
    let source = Device::welcomed("pre-copy");
    source.go(1, Phase::Start, S::PreCopy);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let save = command(2, Phase::Save, S::PreCopy);
    source.send_with(&CoordinatorMessage::Command(save), &[writer.as_fd()]);
    let refused = source.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::PreCopy, RefusalKind::Stream));
    source.go(3, Phase::PrepareStop, S::PreCopyP2p);
    source.go(3, Phase::Stop, S::StopCopy);
    let mut file = tempfile::tempfile().unwrap();
    save_into(&source, 4, &file);
    assert_eq!(source.reached().state, S::StopCopy);
    let mut state = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut state).unwrap();
    let (_, answer) = load("", &state);
    assert!(matches!(answer, DeviceMessage::Reached(_)), "{answer:?}");
}

/// The memory of a device, which is written behind its back.
pub(crate) struct Memory(File);

impl Memory {
    pub(crate) fn new(size: u64) -> Self {
        let file = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(size).unwrap();
        Self(file)
    }

    /// What tells a device that it has this one.
    pub(crate) fn word(&self) -> String {
        format!("memory:/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    pub(crate) fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

#[test]
fn a_gibibyte_of_memory_goes_through_a_pipe() {
    /// Longer than it takes.
    const LONG: Duration = Duration::from_secs(120);
    let (from, to) = (Memory::new(1 << 30), Memory::new(1 << 30));
    let (source, target) = (Device::welcomed(&from.word()), Device::welcomed(&to.word()));
    let pattern = |at: u64| [at.to_le_bytes(), (!at).to_le_bytes()].concat();
    let places: Vec<u64> = (0..1024).map(|n| n * (1 << 20) + n * 8).collect();
    for at in &places {
        from.write(*at, &pattern(*at));
    }
    source.go(1, Phase::PrepareStop, S::RunningP2p);
    source.go(1, Phase::Stop, S::StopCopy);
    target.pause(1);
    let (reader, writer) = std::io::pipe().unwrap();
    let budget_ns = u64::try_from(LONG.as_nanos()).unwrap();
    let long = |phase, target| Command { budget_ns, ..command(2, phase, target) };
    let save = CoordinatorMessage::Command(long(Phase::Save, S::StopCopy));
    source.send_with(&save, &[writer.as_fd()]);
    drop(writer);
    let load = CoordinatorMessage::Command(long(Phase::Load, S::Stop));
    target.send_with(&load, &[reader.as_fd()]);
    for (device, state) in [(&source, S::StopCopy), (&target, S::Stop)] {
        match device.answer_within(LONG) {
            DeviceMessage::Reached(reached) => assert_eq!(reached.state, state),
            other => panic!("expected Reached, got {other:?}"),
        }
    }
    for at in places {
        assert_eq!(to.read(at, 16), pattern(at), "at {at:#x}");
    }
}

#[test]
fn saving_into_a_pipe_that_nobody_reads_ends_with_the_budget() {
    // More than a pipe takes.
    let device = Device::welcomed(&Memory::new(4 << 20).word());
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
