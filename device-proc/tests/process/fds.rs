//! A client that takes all fds, or all mappings, that it gets.

use crate::child::{Device, command};
use crate::client::{Client, ErrorReply};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use standstill_protocol::message::{CoordinatorMessage, Phase};
use standstill_protocol::migration::MigrationState as S;
use std::os::fd::AsFd;

/// How many fds the process may have: more than it needs, and soon used up.
const MOST: u64 = 120;
/// EMFILE.
const TOO_MANY: ErrorReply = ErrorReply(24);
/// ENOSPC.
const NO_SPACE: ErrorReply = ErrorReply(28);

#[test]
fn a_client_cannot_take_the_fds_that_the_coordinator_needs() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    let pid = Pid::from_raw(i32::try_from(device.process.id()).unwrap()).unwrap();
    let limit = Rlimit { current: Some(MOST), ..getrlimit(Resource::Nofile) };
    prlimit(Some(pid), Resource::Nofile, limit).unwrap();
    let window = |number: u64| {
        let file = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 4096).unwrap();
        (number * 4096, file)
    };
    let mut mapped = 0;
    let refused = loop {
        let (iova, file) = window(mapped);
        match client.dma_map(iova, 4096, file.as_fd()) {
            Ok(()) => mapped += 1,
            Err(error) => break error,
        }
        assert!(mapped < MOST);
    };
    assert_eq!(refused, TOO_MANY);
    assert!(mapped > 10, "some it gets");
    stop_and_save(&device);
    device.shut_down();
}

/// Needs an fd, and a thread.
fn stop_and_save(device: &Device) {
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.go(1, Phase::Stop, S::StopCopy);
    let state = tempfile::tempfile().unwrap();
    let save = command(2, Phase::Save, S::StopCopy);
    device.send_with(&CoordinatorMessage::Command(save), &[state.as_fd()]);
    assert_eq!(device.reached().state, S::StopCopy);
    assert!(state.metadata().unwrap().len() > 0);
}

#[test]
fn a_client_cannot_take_the_mappings_that_the_process_needs() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    let file = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    // The same page at each address: one mapping does not become a part of another.
    let refused =
        (0..65_535).find_map(|window| client.dma_map(window * 4096, 4096, file.as_fd()).err());
    if let Some(refused) = refused {
        assert_eq!(refused, NO_SPACE);
    }
    client.reset().expect("it needs a thread");
    stop_and_save(&device);
    device.shut_down();
}
