//! Faults in a register access and in a DMA, with a client; and the device that lies about its gate.

use super::{arm, armed, assert_lives};
use crate::child::{Device, command, until, wait};
use crate::client::Client;
use crate::copy::{HalfWay, IOVA};
use crate::probe::{COPY, COPY_SIZE, NUMBER};
use standstill_device_proc::memory::SharedMemory;
use standstill_protocol::fault::{Action, Fault, Point};
use standstill_protocol::message::{Command, CoordinatorMessage, Phase, RefusalKind};
use standstill_protocol::migration::MigrationState as S;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Enough for what ends, little for what does not.
const SHORT_NS: u64 = 200_000_000;

#[test]
fn a_process_dies_in_a_register_access() {
    let (mut device, mut journal) = armed(Point::Mmio, Action::Exit(3));
    let mut client = Client::connect(&device.socket());
    assert_eq!(client.read_u32(7, 0), Ok(0x0001_1af4), "configuration space is no register");
    client.send_region_write(0, NUMBER, &[1, 0, 0, 0]);
    journal.fired(0, 1);
    assert_eq!(wait(&mut device.process).code(), Some(3));
}

#[test]
fn a_register_access_is_late() {
    let device = Device::welcomed("");
    let late = Fault::new(Point::Mmio, Action::DelayMs(100)).nth(2);
    let mut journal = arm(&device, &[late]);
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 5).unwrap();
    let begin = Instant::now();
    assert_eq!(client.read_u32(0, NUMBER), Ok(5));
    assert!(begin.elapsed() >= Duration::from_millis(100));
    journal.fired(0, 2);
}

#[test]
fn a_register_access_that_hangs_keeps_the_device_from_stopping() {
    let (device, mut journal) = armed(Point::Mmio, Action::Spin);
    let mut client = Client::connect(&device.socket());
    client.send_region_write(0, NUMBER, &[1, 0, 0, 0]);
    journal.fired(0, 1);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    let short = Command { budget_ns: SHORT_NS, ..command(1, Phase::Stop, S::Stop) };
    device.send(&CoordinatorMessage::Command(short));
    let refused = device.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::RunningP2p, RefusalKind::Drain));
    assert!(refused.refusal.text.starts_with("1 register access"), "{}", refused.refusal.text);
}

/// A client of a device, and a window of it that is a peer's.
fn with_window(device: &Device) -> (Client, SharedMemory) {
    let memory = SharedMemory::create("window", 4096).unwrap();
    let mut client = Client::connect(&device.socket());
    client.dma_map(IOVA, 4096, memory.as_fd()).unwrap();
    (client, memory)
}

fn copy(client: &mut Client) {
    client.write_u32(0, COPY, u32::try_from(IOVA).unwrap()).unwrap();
}

fn byte(memory: &SharedMemory, offset: u64) -> u8 {
    let mut byte = [0];
    memory.read(offset, &mut byte).unwrap();
    byte[0]
}

#[test]
fn a_data_thread_dies_before_or_in_a_dma() {
    for point in [Point::Dma, Point::DmaInFlight] {
        let (mut device, mut journal) = armed(point, Action::Exit(4));
        let (mut client, memory) = with_window(&device);
        client.send_region_write(0, COPY, &u32::try_from(IOVA).unwrap().to_le_bytes());
        journal.fired(0, 1);
        assert_eq!(wait(&mut device.process).code(), Some(4), "{point}");
        assert_eq!(byte(&memory, 0), 0, "{point}");
    }
}

#[test]
fn a_data_thread_that_hangs_without_a_permit_holds_nothing_up() {
    let (mut device, mut journal) = armed(Point::Dma, Action::Spin);
    let (mut client, memory) = with_window(&device);
    copy(&mut client);
    journal.fired(0, 1);
    device.pause(1);
    assert_eq!(byte(&memory, 0), 0);
    assert_lives(&mut device.process);
}

#[test]
fn a_data_thread_that_hangs_with_a_permit_keeps_the_device_from_being_quiet() {
    let (device, mut journal) = armed(Point::DmaInFlight, Action::Spin);
    let (mut client, _memory) = with_window(&device);
    copy(&mut client);
    journal.fired(0, 1);
    let short = Command { budget_ns: SHORT_NS, ..command(1, Phase::PrepareStop, S::RunningP2p) };
    device.send(&CoordinatorMessage::Command(short));
    let refused = device.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::Running, RefusalKind::Drain));
}

#[test]
fn a_dma_that_is_late_is_waited_for() {
    let (device, mut journal) = armed(Point::DmaInFlight, Action::DelayMs(100));
    let (mut client, memory) = with_window(&device);
    memory.store_u64(COPY_SIZE, 1).unwrap();
    copy(&mut client);
    journal.fired(0, 1);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    assert_ne!(byte(&memory, COPY_SIZE - 1), 0, "the answer came before the copy had ended");
}

#[test]
fn a_liar_answers_in_the_middle_of_its_dma_until_it_is_started() {
    let device = Device::welcomed("");
    let ack = Point::BeforeAck(Phase::PrepareStop);
    let mut journal = arm(&device, &[Fault::new(ack, Action::KeepDma)]);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    journal.fired(0, 1);
    // Quiet as it says to be, it begins a copy to a peer.
    let mut half_way = HalfWay::begin(&device, false);
    let stopped = device.go(1, Phase::Stop, S::Stop);
    assert!(stopped.timings.drain_ns < 1_000_000_000);
    assert!(!half_way.is_whole(), "it has stopped with a copy in the middle");
    half_way.let_go();
    until("it writes although it has stopped", || half_way.is_whole());

    device.resume(2);
    device.go(3, Phase::PrepareStop, S::RunningP2p);
    half_way.memory.zero();
    half_way.ask_for_another();
    for epoch in 0..20 {
        device.query(10 + epoch);
        assert_eq!(byte(&half_way.memory, 0), 0, "it is honest again");
    }
    device.go(4, Phase::Start, S::Running);
    until("the copy that waited for the start", || byte(&half_way.memory, 0) != 0);
}

#[test]
fn a_liar_wakes_what_waits_at_its_gate() {
    let device = Device::welcomed("");
    let stopped = Fault::new(Point::AfterAck(Phase::Stop), Action::KeepDma);
    let mut journal = arm(&device, &[stopped]);
    let (mut client, memory) = with_window(&device);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    copy(&mut client);
    assert_eq!(device.query(1).state, S::RunningP2p);
    assert_eq!(byte(&memory, 0), 0, "it waits");
    device.go(1, Phase::Stop, S::Stop);
    journal.fired(0, 1);
    until("it writes although it has stopped", || byte(&memory, 0) != 0);
    assert_eq!(device.query(2).state, S::Stop);
}
