//! Every fault that is possible can be armed, is done, and says so; what is not possible is not armed.

use super::stream::honest;
use super::{arm, assert_lives};
use crate::child::{Device, command, wait};
use crate::client::Client;
use crate::copy::IOVA;
use crate::probe::{COPY, NUMBER};
use standstill_device_proc::memory::SharedMemory;
use standstill_protocol::fault::{Action, Fault, Forgery, Packet, Point};
use standstill_protocol::message::{Command, CoordinatorMessage, Phase};
use standstill_protocol::migration::MigrationState as S;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::LazyLock;

const PHASES: [Phase; 7] = [
    Phase::PrepareStop,
    Phase::Stop,
    Phase::PrepareStart,
    Phase::Start,
    Phase::Save,
    Phase::Load,
    Phase::Reset,
];

/// All but the Hello, which is said before anything can be armed.
fn points() -> impl Iterator<Item = Point> {
    let phases = [Point::Receipt, Point::BeforeAck, Point::AfterAck].into_iter();
    let phases = phases.flat_map(|point| PHASES.map(point));
    let others = [Point::Query, Point::Memory, Point::Shutdown, Point::Saving, Point::Loading];
    phases.chain(others).chain([Point::Mmio, Point::Dma, Point::DmaInFlight])
}

/// What a device loads.
fn state() -> File {
    static STATE: LazyLock<Vec<u8>> = LazyLock::new(honest);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&STATE).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

fn send_with_file(device: &Device, command: Command, file: &File) {
    device.send_with(&CoordinatorMessage::Command(command), &[file.as_fd()]);
}

/// Brings a device, honest by then, to a command of that phase, and does not wait for the answer.
fn lead_to_phase(device: &Device, phase: Phase) {
    match phase {
        Phase::PrepareStop => device.command(1, phase, S::RunningP2p),
        Phase::Stop => {
            device.go(1, Phase::PrepareStop, S::RunningP2p);
            device.command(1, phase, S::Stop);
        }
        Phase::PrepareStart => {
            device.pause(1);
            device.command(2, phase, S::RunningP2p);
        }
        Phase::Start => {
            device.pause(1);
            device.go(2, Phase::PrepareStart, S::RunningP2p);
            device.command(2, phase, S::Running);
        }
        Phase::Save => {
            device.go(1, Phase::PrepareStop, S::RunningP2p);
            device.go(1, Phase::Stop, S::StopCopy);
            send_with_file(device, command(2, phase, S::StopCopy), &state());
        }
        Phase::Load => {
            device.pause(1);
            send_with_file(device, command(2, phase, S::Stop), &state());
        }
        Phase::Reset => device.command(1, phase, S::Running),
    }
}

/// Brings a device to a point; the client is there for as long as it is wanted.
fn lead_to(device: &Device, point: Point) -> Option<Client> {
    let client = match point {
        Point::Mmio => {
            let mut client = Client::connect(&device.socket());
            client.send_region_write(0, NUMBER, &[1, 0, 0, 0]);
            client
        }
        Point::Dma | Point::DmaInFlight => {
            let memory = SharedMemory::create("window", 4096).unwrap();
            let mut client = Client::connect(&device.socket());
            client.dma_map(IOVA, 4096, memory.as_fd()).unwrap();
            client.send_region_write(0, COPY, &u32::try_from(IOVA).unwrap().to_le_bytes());
            client
        }
        _ => {
            match point.phase() {
                Some(phase) => lead_to_phase(device, phase),
                None => super::lead_to(device, point),
            }
            return None;
        }
    };
    Some(client)
}

/// Each of these, at each point at which it is possible; how many that are.
fn each_fires(actions: &[Action]) -> usize {
    let mut count = 0;
    for point in points() {
        for &action in actions {
            let fault = Fault::new(point, action);
            if !fault.is_possible() {
                continue;
            }
            count += 1;
            let mut device = Device::welcomed("");
            let mut journal = arm(&device, &[fault]);
            let client = lead_to(&device, point);
            journal.fired(0, 1);
            match action {
                Action::Exit(status) => {
                    let ended = wait(&mut device.process);
                    assert_eq!(ended.code(), Some(status.into()), "{fault}");
                }
                Action::Abort => assert_eq!(wait(&mut device.process).signal(), Some(6), "{fault}"),
                Action::Segv => assert_eq!(wait(&mut device.process).signal(), Some(11), "{fault}"),
                // Whatever else it does wrong there, it ends then.
                _ if point == Point::Shutdown => {}
                _ => assert_lives(&mut device.process),
            }
            drop(client);
        }
    }
    count
}

#[test]
fn every_end_fires_everywhere() {
    assert_eq!(each_fires(&[Action::Exit(3), Action::Abort, Action::Segv]), 3 * 29);
}

#[test]
fn every_hang_fires_everywhere() {
    assert_eq!(each_fires(&[Action::Stop, Action::Spin, Action::DelayMs(1)]), 3 * 29);
}

#[test]
fn every_spoilt_answer_fires_where_there_is_one() {
    let forgeries = [
        Forgery::LowerTerm,
        Forgery::HigherTerm,
        Forgery::EarlierEpoch,
        Forgery::LaterEpoch,
        Forgery::State,
    ];
    assert_eq!(each_fires(&forgeries.map(Action::Forge)), 5 * 7);
    let others = [Forgery::Phase, Forgery::Declaration].map(Action::Forge);
    assert_eq!(each_fires(&others), 6 + 1, "a reset has no other phase");
    assert_eq!(each_fires(&[Action::NoAck, Action::TwoAcks]), (14 + 3) + (7 + 2));
    assert_eq!(each_fires(&[Action::Refuse(5), Action::KeepDma]), (7 + 2) + 4);
}

#[test]
fn every_spoilt_channel_fires_where_there_is_one() {
    let packets = [Packet::Garbage, Packet::Empty, Packet::Truncated, Packet::Oversized];
    assert_eq!(each_fires(&packets.map(Action::Send)), 4 * (21 + 3 + 1));
    let floods = [Action::FdFlood(2), Action::MessageFlood(5), Action::Disconnect];
    assert_eq!(each_fires(&floods), 3 * (21 + 3));
}
