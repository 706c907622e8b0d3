//! Packets as they are, messages or not, and which message one is.

use crate::plan::{Moment, PacketKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use standstill_protocol::codec::{Message, decode};
use standstill_protocol::message::{CoordinatorMessage, DeviceMessage};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Far more than a packet has that somebody sends to be refused.
const LONGEST: usize = 256 << 10;
/// The most fds that the kernel lets through with one packet.
const MANY_FDS: usize = 253;

/// One packet, and the file descriptors that came with it.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What there is to read.
pub(super) enum Seen {
    Packet(Packet),
    Nothing,
    /// Its sender has closed its end, and all that it had sent was read.
    End,
}

/// What became of a packet that was to be sent.
pub(super) enum Sent {
    Whole,
    /// The system lets its fds through to nobody: it is lost on the way.
    Lost,
    /// The receiver's queue is full.
    Later,
    /// There is no receiver any more.
    Gone,
}

impl Packet {
    /// Reads one without waiting.
    pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Seen> {
        let mut bytes = vec![0; LONGEST];
        let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut reset_seen = false;
        let received = loop {
            match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(received) => break received,
                Err(Errno::AGAIN) => return Ok(Seen::Nothing),
                Err(Errno::INTR) => {}
                // Comes once, ahead of the last packets of one that has ended.
                Err(Errno::CONNRESET) if !reset_seen => reset_seen = true,
                Err(Errno::CONNRESET) => return Ok(Seen::End),
                Err(error) => return Err(error.into()),
            }
        };
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = part {
                fds.extend(some);
            }
        }
        if received.bytes == 0 && has_ended(socket)? {
            return Ok(Seen::End);
        }
        bytes.truncate(received.bytes);
        Ok(Seen::Packet(Self { bytes, fds }))
    }

    /// Sends it without waiting.
    pub(super) fn send(&self, socket: BorrowedFd<'_>) -> io::Result<Sent> {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("more file descriptors than one packet can have"));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match sendmsg(socket, &[IoSlice::new(&self.bytes)], &mut control, flags) {
                Ok(_) => return Ok(Sent::Whole),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Sent::Later),
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(Sent::Gone),
                // The receiver takes no fds, or too many are on their way.
                Err(Errno::PERM | Errno::TOOMANYREFS) => return Ok(Sent::Lost),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let fds = self.fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        Ok(Self { bytes: self.bytes.clone(), fds })
    }

    /// The first half, with all fds, and the second.
    pub(super) fn split(mut self) -> [Self; 2] {
        let rest = self.bytes.split_off(self.bytes.len() / 2);
        [self, Self { bytes: rest, fds: Vec::new() }]
    }

    /// This one and that one as one packet.
    pub(super) fn merged(mut self, mut next: Self) -> Self {
        self.bytes.append(&mut next.bytes);
        self.fds.append(&mut next.fds);
        self
    }

    /// Inverts the bits of one byte; of the last one if there is none at that offset.
    pub(super) fn corrupt(&mut self, offset: usize) {
        let last = self.bytes.len().saturating_sub(1);
        if let Some(byte) = self.bytes.get_mut(offset.min(last)) {
            *byte = !*byte;
        }
    }
}

/// An empty packet looks like the end.
fn has_ended(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    let hung_up = polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP);
    Ok(hung_up && ioctl_fionread(socket)? == 0)
}

/// A message to the device, and which moment it is; `None` if it is no message.
pub(super) fn command(bytes: &[u8], version: u16) -> Option<(CoordinatorMessage, Option<Moment>)> {
    let message = decode::<CoordinatorMessage>(bytes, version).ok()?;
    let moment = match &message {
        CoordinatorMessage::Command(command) => Some(Moment::Command(command.phase)),
        other => named(other.name()),
    };
    Some((message, moment))
}

/// A message from the device, and which moment it is; `None` if it is no message.
pub(super) fn answer(bytes: &[u8], version: u16) -> Option<(DeviceMessage, Option<Moment>)> {
    let message = decode::<DeviceMessage>(bytes, version).ok()?;
    let moment = match &message {
        DeviceMessage::Reached(reached) => Some(Moment::Answer(reached.phase)),
        DeviceMessage::Refused(refused) => Some(Moment::Answer(refused.phase)),
        other => named(other.name()),
    };
    Some((message, moment))
}

fn named(name: &str) -> Option<Moment> {
    Some(Moment::Packet(match name {
        "Hello" => PacketKind::Hello,
        "Welcome" => PacketKind::Welcome,
        "Memory" => PacketKind::Memory,
        "MemoryAccepted" => PacketKind::MemoryAccepted,
        "Revoke" => PacketKind::Revoke,
        "Query" => PacketKind::Query,
        "Status" => PacketKind::Status,
        "Abort" => PacketKind::Abort,
        "Heartbeat" => PacketKind::Heartbeat,
        "Event" => PacketKind::Event,
        "Shutdown" => PacketKind::Shutdown,
        _ => return None,
    }))
}
