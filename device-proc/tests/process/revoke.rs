//! Windows onto the memory of a process that is gone.

use crate::child::Device;
use crate::client::Client;
use crate::copy::{HalfWay, IOVA};
use standstill_device_proc::memory::SharedMemory;
use standstill_protocol::message::{
    CoordinatorMessage, DeviceEvent, DeviceMessage, FileIdentity, MemoryDeclaration, Revocation,
    Term,
};
use std::os::fd::AsFd;

fn identity(file: &impl AsFd) -> FileIdentity {
    let found = rustix::fs::fstat(file).unwrap();
    FileIdentity { device: found.st_dev, inode: found.st_ino }
}

fn revoke(device: &Device, term: u64, sequence: u64, files: Vec<FileIdentity>) {
    let revocation = Revocation { term: Term(term), sequence, files };
    device.send(&CoordinatorMessage::Revoke(revocation));
}

fn accepted(device: &Device) -> u64 {
    match device.answer() {
        DeviceMessage::MemoryAccepted(accepted) => accepted.sequence,
        other => panic!("expected MemoryAccepted, got {other:?}"),
    }
}

#[test]
fn a_revoked_window_is_gone_and_the_others_are_not() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    let memories: Vec<_> = (0..3).map(|_| SharedMemory::create("window", 4096).unwrap()).collect();
    for (memory, iova) in memories.iter().zip([0x1000, 0x2000, 0x3000]) {
        client.dma_map(iova, 4096, memory.as_fd()).unwrap();
    }
    let declaration =
        MemoryDeclaration { term: Term(1), sequence: 1, ram_fds: 1, dirty_page_size: 0 };
    device.send_with(&CoordinatorMessage::Memory(declaration), &[memories[0].as_fd()]);
    assert_eq!(accepted(&device), 1);

    // One of an earlier coordinator is dropped without an answer.
    revoke(&device, 0, 2, vec![identity(&memories[2])]);
    revoke(&device, 1, 3, vec![identity(&memories[0]), identity(&memories[1])]);
    assert_eq!(accepted(&device), 3);
    let other = SharedMemory::create("other", 4096).unwrap();
    client.dma_map(0x1000, 4096, other.as_fd()).expect_err("RAM stays");
    client.dma_map(0x2000, 4096, other.as_fd()).expect("there is room now");
    client.dma_map(0x3000, 4096, other.as_fd()).expect_err("not this coordinator's");
}

#[test]
fn a_copy_that_is_half_way_holds_a_revocation_up_but_nothing_else() {
    let device = Device::welcomed("");
    let copy = HalfWay::begin(&device, false);
    revoke(&device, 1, 7, vec![identity(&copy.memory)]);
    for epoch in 0..20 {
        // It would come before the answer to a query.
        device.query(epoch);
    }
    copy.let_go();
    assert_eq!(accepted(&device), 7);
    assert!(copy.is_whole(), "the answer came before the copy had ended");
}

#[test]
fn a_revocation_that_cannot_be_carried_out_is_not_answered() {
    let device = Device::welcomed("");
    let copy = HalfWay::begin(&device, false);
    revoke(&device, 1, 7, vec![identity(&copy.memory)]);
    let text = loop {
        match device.next() {
            DeviceMessage::Event(DeviceEvent::ClientConnected) => {}
            DeviceMessage::Event(DeviceEvent::Failed(text)) => break text,
            other => panic!("expected Failed, got {other:?}"),
        }
    };
    assert!(text.contains(&format!("{IOVA:#x}")), "{text}");
    copy.let_go();
    crate::child::until("the copy is whole", || copy.is_whole());
    revoke(&device, 1, 8, vec![identity(&copy.memory)]);
    assert_eq!(accepted(&device), 8);
}

#[test]
fn the_next_coordinator_is_not_answered_what_the_last_one_asked() {
    let mut device = Device::kept("", None);
    let copy = HalfWay::begin(&device, false);
    revoke(&device, 1, 7, vec![identity(&copy.memory)]);
    device.query(1);
    device.take_over(2);
    revoke(&device, 2, 8, vec![identity(&copy.memory)]);
    device.query(1);
    copy.let_go();
    assert_eq!(accepted(&device), 8);
}

#[test]
fn the_greeting_names_the_file_that_clients_map() {
    let (device, hello) = Device::start("");
    device.send(&CoordinatorMessage::Welcome(crate::child::welcome(
        standstill_protocol::message::OrphanPolicy::Exit,
    )));
    let client = vfio_user::Client::new(&device.socket()).unwrap();
    let region = client.region(2).unwrap();
    let file = region.file_offset.as_ref().expect("the fd came").file();
    assert_eq!(hello.memory, [identity(file)]);
}
