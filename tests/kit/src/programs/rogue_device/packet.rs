//! Packets as bytes, right and wrong.

use super::Error;
use crate::{DROPPED_LOGS, Forgery, Packet, Pulse};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg};
use standstill_protocol::channel::Frame;
use standstill_protocol::codec::MAX_PACKET;
use standstill_protocol::message::{
    Capabilities, Command, Counter, CounterKind, DeviceEvent, DeviceMessage, Epoch, Evidence,
    Heartbeat, Hello, MAX_COUNTERS, MAX_TEXT, PeerDma, Phase, Reached, Term, Timings, VERSIONS,
};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

/// More file descriptors than a message can have.
const MANY: usize = 20;

/// Sends a packet that should not be sent. `command` is what it is an answer to, if it is one.
pub(super) fn send_packet(
    socket: impl AsFd,
    packet: Packet,
    command: Option<&Command>,
) -> Result<(), Error> {
    let reached = |forgery| {
        let command = command.ok_or("only an answer to a command can be forged")?;
        bytes(&DeviceMessage::Reached(forge(command, forgery)))
    };
    let packet = match packet {
        Packet::Garbage => vec![0xA5; 64],
        Packet::Empty => Vec::new(),
        Packet::Oversized => vec![0; MAX_PACKET + 1],
        Packet::Truncated => {
            let mut whole = reached(Forgery::Nothing)?;
            whole.pop();
            whole
        }
        Packet::Complaint => {
            bytes(&DeviceMessage::Event(DeviceEvent::Failed("\u{1b}".repeat(MAX_TEXT))))?
        }
        Packet::HugeHello => {
            let mut hello = bytes(&DeviceMessage::Hello(hello()))?;
            let list = hello.len() - 8;
            hello[list..].copy_from_slice(&(1_u64 << 60).to_le_bytes());
            hello
        }
        Packet::FullAck => {
            let command = command.ok_or("only a command can be answered")?;
            let mut reached = forge(command, Forgery::Nothing);
            let counter = Counter { kind: CounterKind::Written, index: 1, value: u64::MAX };
            reached.evidence.counters = vec![counter; MAX_COUNTERS];
            bytes(&DeviceMessage::Reached(reached))?
        }
        Packet::Superseded => bytes(&DeviceMessage::Event(DeviceEvent::Superseded(Term(99))))?,
        Packet::ManyFds => return send_many_fds(socket),
        Packet::Forged(forgery) => reached(forgery)?,
    };
    send_bytes(socket, &packet)
}

/// Sends what is a message.
pub(super) fn send_message(socket: impl AsFd, message: &DeviceMessage) -> Result<(), Error> {
    send_bytes(socket, &bytes(message)?)
}

pub(super) fn heartbeat(sequence: u64, pulse: Pulse) -> DeviceMessage {
    let (progress, pending) = match pulse {
        Pulse::Idle => (0, false),
        Pulse::Working => (sequence, true),
        Pulse::Hanging => (0, true),
    };
    let dropped_logs = DROPPED_LOGS;
    DeviceMessage::Heartbeat(Heartbeat { sequence, progress, pending, dropped_logs })
}

fn bytes(message: &DeviceMessage) -> Result<Vec<u8>, Error> {
    Ok(Frame::new(message, VERSIONS.max)?.as_bytes().to_vec())
}

/// Waits while the coordinator does not read. One that is gone is no error: its end is seen where
/// the channel is read.
fn send_bytes(socket: impl AsFd, packet: &[u8]) -> Result<(), Error> {
    loop {
        match send(&socket, packet, SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn send_many_fds(socket: impl AsFd) -> Result<(), Error> {
    let packet = bytes(&heartbeat(1, Pulse::Idle))?;
    let stdin = std::io::stdin();
    let fds: [BorrowedFd<'_>; MANY] = [stdin.as_fd(); MANY];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err("no room for the file descriptors".into());
    }
    let slices = [IoSlice::new(&packet)];
    sendmsg(socket, &slices, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn forge(command: &Command, forgery: Forgery) -> Reached {
    let mut reached = Reached {
        term: command.term,
        epoch: command.epoch,
        phase: command.phase,
        state: command.target,
        timings: Timings::default(),
        evidence: Evidence::default(),
    };
    match forgery {
        Forgery::Nothing => {}
        Forgery::EarlierEpoch => reached.epoch = Epoch(command.epoch.0.saturating_sub(1)),
        Forgery::LaterEpoch => reached.epoch = Epoch(command.epoch.0 + 1),
        Forgery::LowerTerm => reached.term = Term(command.term.0.saturating_sub(1)),
        Forgery::HigherTerm => reached.term = Term(command.term.0 + 1),
        Forgery::Phase => reached.phase = other_phase(command.phase),
        Forgery::State => reached.state = state_before(command.phase),
    }
    reached
}

/// Of a device that has nothing to say of itself.
fn hello() -> Hello {
    Hello {
        versions: VERSIONS,
        kind: "rogue".into(),
        program_version: String::new(),
        capabilities: Capabilities {
            migration: MigrationFlags::STOP_COPY_P2P,
            peer_dma: PeerDma::Possible,
            progress: false,
            dirty_tracking: false,
            fault_injection: false,
        },
        machine: None,
        term: Term(0),
        epoch: Epoch(0),
        state: MigrationState::Running,
        backing_files: 0,
        memory: Vec::new(),
    }
}

fn other_phase(phase: Phase) -> Phase {
    match phase {
        Phase::PrepareStop => Phase::Stop,
        Phase::Stop => Phase::PrepareStop,
        Phase::PrepareStart => Phase::Start,
        _ => Phase::PrepareStart,
    }
}

fn state_before(phase: Phase) -> MigrationState {
    match phase {
        Phase::PrepareStop => MigrationState::Running,
        Phase::PrepareStart => MigrationState::Stop,
        _ => MigrationState::RunningP2p,
    }
}
