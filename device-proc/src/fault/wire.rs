//! What a process that does wrong puts on its control channel: bytes, beside all types and limits.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg, shutdown,
};
use standstill_protocol::channel::DeviceEnd;
use standstill_protocol::codec::{HEADER, MAX_PACKET, encode};
use standstill_protocol::fault::{Action, Forgery, Packet, Point};
use standstill_protocol::message::{
    DeviceMessage, Epoch, Heartbeat, MemoryAccepted, Phase, Reached, Refused, Term, VERSIONS,
};
use standstill_protocol::migration::MigrationState;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

/// The most file descriptors that the kernel takes with one packet (`SCM_MAX_FD`).
const MOST_FDS: usize = 253;

/// Spoils the channel as an action says that needs nothing else. `answer` is what it would send.
///
/// What cannot be sent, because the coordinator is gone or takes no fds, is not sent.
pub(crate) fn spoil(channel: &DeviceEnd, action: Action, answer: Option<&DeviceMessage>) {
    let spoilt = match action {
        Action::Send(packet) => send(channel, &bytes(channel, packet, answer), &[]),
        Action::FdFlood(count) => fd_flood(channel, count),
        Action::MessageFlood(count) => message_flood(channel, count),
        Action::Disconnect => shutdown(channel, Shutdown::Both).map_err(io::Error::from),
        _ => Ok(()),
    };
    if let Err(error) = spoilt {
        tracing::debug!(%error, "the fault is not done to its end");
    }
}

/// How often a Hello is to be said, after all else that is done wrong there. A process that has cut
/// its `first` channel lives on, but it has nothing to do any more.
pub(crate) fn greet(channel: &DeviceEnd, hello: &DeviceMessage, first: bool) -> usize {
    let mut times = 1;
    for action in super::reach(Point::Hello) {
        match action {
            Action::NoAck => times = 0,
            Action::TwoAcks => times *= 2,
            action => spoil(channel, action, Some(hello)),
        }
        match action {
            Action::Send(_) => times = 0,
            Action::Disconnect if first => loop {
                std::thread::park();
            },
            Action::Disconnect => times = 0,
            _ => {}
        }
    }
    times
}

/// The answer, but wrong.
pub(crate) fn forge(answer: DeviceMessage, forgery: Forgery) -> DeviceMessage {
    match answer {
        DeviceMessage::Reached(Reached { term, epoch, phase, state, timings, evidence }) => {
            let (term, epoch, phase, state) = forge_answer((term, epoch, phase, state), forgery);
            DeviceMessage::Reached(Reached { term, epoch, phase, state, timings, evidence })
        }
        DeviceMessage::Refused(Refused { term, epoch, phase, state, refusal }) => {
            let (term, epoch, phase, state) = forge_answer((term, epoch, phase, state), forgery);
            DeviceMessage::Refused(Refused { term, epoch, phase, state, refusal })
        }
        DeviceMessage::MemoryAccepted(MemoryAccepted { sequence }) => {
            // Declarations are numbered for the whole machine.
            let sequence = sequence.wrapping_add(1);
            DeviceMessage::MemoryAccepted(MemoryAccepted { sequence })
        }
        other => other,
    }
}

type Answer = (Term, Epoch, Phase, MigrationState);

fn forge_answer((term, epoch, phase, state): Answer, forgery: Forgery) -> Answer {
    match forgery {
        Forgery::LowerTerm => (Term(term.0.saturating_sub(1)), epoch, phase, state),
        Forgery::HigherTerm => (Term(term.0.saturating_add(1)), epoch, phase, state),
        Forgery::EarlierEpoch => (term, Epoch(epoch.0.saturating_sub(1)), phase, state),
        Forgery::LaterEpoch => (term, epoch.next(), phase, state),
        Forgery::Phase => (term, epoch, other_phase(phase), state),
        Forgery::State => (term, epoch, phase, state_before(phase)),
        Forgery::Declaration => (term, epoch, phase, state),
    }
}

fn other_phase(phase: Phase) -> Phase {
    match phase {
        Phase::PrepareStop => Phase::Stop,
        Phase::Stop => Phase::PrepareStop,
        Phase::PrepareStart => Phase::Start,
        Phase::Start => Phase::PrepareStart,
        Phase::Save => Phase::Load,
        Phase::Load => Phase::Save,
        Phase::Reset => Phase::Reset,
    }
}

/// Where a device usually is when it gets a command.
fn state_before(phase: Phase) -> MigrationState {
    match phase {
        Phase::PrepareStop | Phase::Save => MigrationState::Running,
        Phase::Stop | Phase::Start => MigrationState::RunningP2p,
        Phase::PrepareStart => MigrationState::Stop,
        Phase::Load => MigrationState::Resuming,
        Phase::Reset => MigrationState::Error,
    }
}

fn bytes(channel: &DeviceEnd, packet: Packet, answer: Option<&DeviceMessage>) -> Vec<u8> {
    match packet {
        Packet::Garbage => vec![0xa5; 64],
        Packet::Empty => Vec::new(),
        Packet::Truncated => match answer {
            Some(answer) => {
                let mut whole = encoded(channel, answer);
                whole.pop();
                whole
            }
            None => {
                let mut whole = encoded(channel, &sign_of_life(0));
                whole.truncate(HEADER + (whole.len() - HEADER) / 2);
                whole
            }
        },
        Packet::Oversized => {
            let mut whole = encoded(channel, &sign_of_life(0));
            whole.resize(MAX_PACKET + 1, 0);
            whole
        }
    }
}

fn sign_of_life(sequence: u64) -> DeviceMessage {
    DeviceMessage::Heartbeat(Heartbeat { sequence, progress: 0, pending: false, dropped_logs: 0 })
}

/// A packet; before the welcome, one of the newest version.
fn encoded(channel: &DeviceEnd, message: &DeviceMessage) -> Vec<u8> {
    let version = match channel.version() {
        0 => VERSIONS.max,
        agreed => agreed,
    };
    let mut buffer = [0; MAX_PACKET];
    // What would be sent rightly can be encoded.
    let length = encode(message, version, &mut buffer).unwrap_or(0);
    buffer[..length].to_vec()
}

fn fd_flood(channel: &DeviceEnd, count: u32) -> io::Result<()> {
    let null = open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let fds = [null.as_fd(); MOST_FDS];
    let packet = encoded(channel, &sign_of_life(0));
    (0..count).try_for_each(|_| send(channel, &packet, &fds))
}

fn message_flood(channel: &DeviceEnd, count: u32) -> io::Result<()> {
    (0..count).try_for_each(|sequence| {
        send(channel, &encoded(channel, &sign_of_life(sequence.into())), &[])
    })
}

/// Sends a packet; waits for room.
fn send(channel: &DeviceEnd, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(channel, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(channel, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_protocol::channel::{CoordinatorEnd, RecvError};
    use standstill_protocol::message::{Evidence, Timings};
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn answer() -> DeviceMessage {
        DeviceMessage::Reached(Reached {
            term: Term(3),
            epoch: Epoch(7),
            phase: Phase::Stop,
            state: MigrationState::Stop,
            timings: Timings::default(),
            evidence: Evidence::default(),
        })
    }

    #[test]
    fn each_forgery_changes_one_field() {
        let rightly = (3, 7, Phase::Stop, MigrationState::Stop);
        let (term, epoch, phase, state) = rightly;
        for (forgery, expected) in [
            (Forgery::LowerTerm, (2, epoch, phase, state)),
            (Forgery::HigherTerm, (4, epoch, phase, state)),
            (Forgery::EarlierEpoch, (term, 6, phase, state)),
            (Forgery::LaterEpoch, (term, 8, phase, state)),
            (Forgery::Phase, (term, epoch, Phase::PrepareStop, state)),
            (Forgery::State, (term, epoch, phase, MigrationState::RunningP2p)),
        ] {
            let DeviceMessage::Reached(forged) = forge(answer(), forgery) else {
                panic!("Reached")
            };
            let found = (forged.term.0, forged.epoch.0, forged.phase, forged.state);
            assert_eq!(found, expected, "{forgery}");
        }
        let accepted = DeviceMessage::MemoryAccepted(MemoryAccepted { sequence: 4 });
        let forged = DeviceMessage::MemoryAccepted(MemoryAccepted { sequence: 5 });
        assert_eq!(forge(accepted, Forgery::Declaration), forged);
    }

    #[test]
    fn what_is_no_message_is_refused_for_what_it_is() {
        for (packet, expected) in [
            (Packet::Garbage, "packet begins with"),
            (Packet::Empty, "empty packet"),
            (Packet::Truncated, "undecodable"),
            (Packet::Oversized, "longer than"),
        ] {
            for answer in [Some(answer()), None] {
                let (coordinator, device) = CoordinatorEnd::pair().unwrap();
                let device = DeviceEnd::from_fd(device).unwrap();
                coordinator.set_version(1);
                device.set_version(1);
                spoil(&device, Action::Send(packet), answer.as_ref());
                let error = coordinator.recv(PATIENCE).unwrap_err();
                let text = crate::log::with_causes(&error);
                assert!(text.contains(expected), "{packet}: {text}");
            }
        }
    }

    #[test]
    fn a_flood_and_a_cut_are_what_they_are_called() {
        let (coordinator, device) = CoordinatorEnd::pair().unwrap();
        let device = DeviceEnd::from_fd(device).unwrap();
        coordinator.set_version(1);
        device.set_version(1);
        spoil(&device, Action::FdFlood(1), None);
        let error = coordinator.recv(PATIENCE).unwrap_err();
        assert!(matches!(error, RecvError::FdsTruncated { .. }), "{error}");

        let flood = std::thread::spawn(move || {
            spoil(&device, Action::MessageFlood(5000), None);
            spoil(&device, Action::Disconnect, None);
            device
        });
        for sequence in 0..5000 {
            assert_eq!(coordinator.recv(PATIENCE).unwrap().message, sign_of_life(sequence));
        }
        assert!(matches!(coordinator.recv(PATIENCE), Err(RecvError::Disconnected)));
        drop(flood.join().unwrap());
    }
}
