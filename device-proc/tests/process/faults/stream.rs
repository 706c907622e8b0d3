//! Faults while the state is saved or loaded.

use super::{Journal, arm};
use crate::child::{Device, PATIENCE, command, wait};
use crate::client::Client;
use crate::probe::NUMBER;
use standstill_protocol::fault::{Action, Fault, Packet, Point};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, Phase, Reached, RefusalKind,
};
use standstill_protocol::migration::MigrationState as S;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// `ENOSPC`.
const NO_SPACE: i32 = 28;

/// A device in STOP_COPY that does this wrong at that piece of its stream, and what it saves.
fn saving(nth: u32, action: Action) -> (Device, Journal, File) {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 77).unwrap();
    let journal = arm(&device, &[Fault::new(Point::Saving, action).nth(nth)]);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.go(1, Phase::Stop, S::StopCopy);
    let file = tempfile::tempfile().unwrap();
    let save = command(2, Phase::Save, S::StopCopy);
    device.send_with(&CoordinatorMessage::Command(save), &[file.as_fd()]);
    (device, journal, file)
}

fn contents(mut file: File) -> Vec<u8> {
    let mut state = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut state).unwrap();
    state
}

/// What an honest device saves.
pub(crate) fn honest() -> Vec<u8> {
    let (device, _journal, file) = saving(u32::MAX, Action::Exit(1));
    assert_eq!(device.reached().state, S::StopCopy);
    contents(file)
}

/// Stops a device and makes it load.
fn loading(faults: &[Fault], state: &[u8]) -> (Device, Option<Journal>) {
    let device = Device::welcomed("");
    let journal = (!faults.is_empty()).then(|| arm(&device, faults));
    device.pause(1);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(state).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let load = command(2, Phase::Load, S::Stop);
    device.send_with(&CoordinatorMessage::Command(load), &[file.as_fd()]);
    (device, journal)
}

fn reached(device: &Device) -> Reached {
    match device.answer() {
        DeviceMessage::Reached(reached) => reached,
        other => panic!("expected Reached, got {other:?}"),
    }
}

#[test]
fn a_state_that_was_saved_wrongly_is_found_where_it_is_loaded() {
    let whole = honest();
    for (nth, packet, found) in [
        (1, Packet::Truncated, "the state stream ends too early"),
        // Four pieces of memory, configuration, MSI-X table, interrupts, and the device's own.
        (5, Packet::Truncated, "the state stream ends too early"),
        (8, Packet::Truncated, "the state stream ends too early"),
        (8, Packet::Garbage, "damaged: device's state at 0x0 has digest"),
        (3, Packet::Garbage, "damaged: memory of BAR 2 at 0x20000 has digest"),
        (3, Packet::Empty, "memory of BAR 2: nothing was saved of the 65536 bytes at 0x20000"),
        (7, Packet::Empty, "device's state where interrupts that wait was expected"),
        (3, Packet::Oversized, "memory of BAR 2: a record of 4294967295 bytes"),
    ] {
        let (device, mut journal, file) = saving(nth, Action::Send(packet));
        assert_eq!(reached(&device).state, S::StopCopy, "it says that all is well");
        journal.fired(0, nth);
        let state = contents(file);
        assert_ne!(state, whole);
        let (target, _) = loading(&[], &state);
        let refused = target.refused();
        assert_eq!((refused.state, refused.refusal.kind), (S::Error, RefusalKind::Stream));
        let text = refused.refusal.text;
        assert!(text.starts_with(found), "{packet} at {nth}: {text}");
    }
}

#[test]
fn a_disk_that_is_full_in_the_middle_of_a_save_is_told() {
    for nth in [2, 8] {
        let (device, mut journal, _) = saving(nth, Action::Refuse(NO_SPACE));
        let refused = device.refused();
        assert_eq!((refused.state, refused.refusal.kind), (S::StopCopy, RefusalKind::Stream));
        let text = &refused.refusal.text;
        assert!(text.contains("No space left on device"), "{text}");
        journal.fired(0, nth);
        // It can be tried again.
        let file = tempfile::tempfile().unwrap();
        let save = command(3, Phase::Save, S::StopCopy);
        device.send_with(&CoordinatorMessage::Command(save), &[file.as_fd()]);
        assert_eq!(device.reached().state, S::StopCopy);
        assert_eq!(contents(file), honest());
    }
}

#[test]
fn a_process_dies_in_the_middle_of_a_save() {
    let (mut device, mut journal, file) = saving(6, Action::Exit(5));
    journal.fired(0, 6);
    assert_eq!(wait(&mut device.process).code(), Some(5));
    let (state, whole) = (contents(file), honest());
    assert!(!state.is_empty() && whole.starts_with(&state) && state.len() < whole.len());
}

#[test]
fn a_save_takes_as_long_as_it_is_told_to_and_the_device_answers_meanwhile() {
    let begin = Instant::now();
    let (device, mut journal, file) = saving(3, Action::DelayMs(150));
    journal.fired(0, 3);
    assert_eq!(device.query(2).state, S::StopCopy);
    assert_eq!(device.reached().state, S::StopCopy);
    assert!(begin.elapsed() >= Duration::from_millis(150));
    assert_eq!(contents(file), honest());
}

#[test]
fn a_state_that_cannot_be_read_leaves_the_device_in_error_until_it_is_reset() {
    let refuse = Fault::new(Point::Loading, Action::Refuse(5)).nth(4);
    let (device, journal) = loading(&[refuse], &honest());
    let refused = device.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::Error, RefusalKind::Stream));
    assert!(refused.refusal.text.contains("Input/output error"), "{}", refused.refusal.text);
    journal.unwrap().fired(0, 4);
    device.go(3, Phase::Reset, S::Stop);
    device.resume(4);
}

#[test]
fn a_process_dies_or_is_late_in_the_middle_of_a_load() {
    let dies = Fault::new(Point::Loading, Action::Abort).nth(5);
    let (mut device, journal) = loading(&[dies], &honest());
    journal.unwrap().fired(0, 5);
    assert_eq!(wait(&mut device.process).code(), None);
    assert!(device.channel.recv(PATIENCE).is_err(), "no answer");

    let late = Fault::new(Point::Loading, Action::DelayMs(150)).nth(5);
    let begin = Instant::now();
    let (device, journal) = loading(&[late], &honest());
    assert_eq!(device.reached().state, S::Stop);
    assert!(begin.elapsed() >= Duration::from_millis(150));
    journal.unwrap().fired(0, 5);
    device.resume(3);
    assert_eq!(Client::connect(&device.socket()).read_u32(0, NUMBER), Ok(77));
}
