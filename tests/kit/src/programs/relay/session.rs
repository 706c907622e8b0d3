//! One coordinator's connection, passed on to the device process.

use super::Error;
use super::lane::{Fate, Lane};
use super::packet::{Packet, Seen};
use crate::plan::Moment;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use standstill_protocol::channel::DeviceEnd;
use standstill_protocol::codec::HANDSHAKE_VERSION;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long a coordinator that was sent SIGSTOP may take to stand.
const STANDS: Duration = Duration::from_secs(5);

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    ToDevice,
    ToCoordinator,
}

/// A coordinator's process.
#[derive(Debug)]
pub(super) struct Coordinator {
    pid: i32,
    pidfd: OwnedFd,
}

impl Coordinator {
    /// Its process number.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<(), Error> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// SIGSTOP, and waits until it stands; one that does not is let go on.
    #[expect(clippy::disallowed_methods, reason = "nothing tells whoever is not its parent")]
    pub(super) fn stop(&self) -> Result<(), Error> {
        self.signal(Signal::STOP)?;
        let stat = format!("/proc/{}/stat", self.pid);
        let end = Instant::now() + STANDS;
        while !crate::process::stands(&std::fs::read_to_string(&stat)?) {
            if Instant::now() >= end {
                self.signal(Signal::CONT)?;
                return Err("the coordinator does not stand".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The two ends of the relay in one connection, and what is under way between them.
pub(super) struct Session {
    pub(super) coordinator: Rc<Coordinator>,
    /// The protocol version that was agreed on; 0 before.
    pub(super) version: u16,
    /// `None` once it is closed.
    to_coordinator: Option<OwnedFd>,
    to_device: Option<OwnedFd>,
    down: Lane,
    up: Lane,
}

impl Session {
    /// Between a coordinator's channel and one to the device process.
    pub(super) fn new(channel: DeviceEnd, device: OwnedFd) -> Result<Self, Error> {
        let (pid, pidfd) = (channel.peer_credentials()?.pid, channel.peer_pidfd()?);
        Ok(Self {
            coordinator: Rc::new(Coordinator { pid, pidfd }),
            version: HANDSHAKE_VERSION,
            to_coordinator: Some(channel.into_fd()),
            to_device: Some(device),
            down: Lane::default(),
            up: Lane::default(),
        })
    }

    /// True once both ends are closed, and everything is delivered that the device process has said.
    pub(super) fn is_over(&self) -> bool {
        self.to_coordinator.is_none() && self.to_device.is_none()
    }

    /// Reads one packet that goes this way, if there is room for it and it has come.
    pub(super) fn read(&mut self, way: Way, child_ended: bool) -> Result<Option<Packet>, Error> {
        let (end, lane) = match way {
            Way::ToDevice => (&self.to_coordinator, &mut self.down),
            Way::ToCoordinator => (&self.to_device, &mut self.up),
        };
        let Some(end) = end.as_ref().filter(|_| lane.has_room()) else { return Ok(None) };
        match Packet::receive(end.as_fd())? {
            Seen::Packet(packet) => return Ok(Some(packet)),
            Seen::Nothing if way == Way::ToDevice || !child_ended => {}
            // A child of the device's own may have the socket still.
            Seen::Nothing | Seen::End => lane.ended = true,
        }
        Ok(None)
    }

    /// Takes a packet in, to be delivered.
    pub(super) fn push(
        &mut self,
        way: Way,
        packet: Packet,
        fate: Fate,
        delay: Duration,
        held_by: Option<usize>,
    ) -> Result<(), Error> {
        match way {
            Way::ToDevice => self.down.push(packet, fate, delay, held_by),
            Way::ToCoordinator => self.up.push(packet, fate, delay, held_by),
        }
    }

    /// Lets packets go that this order holds back.
    pub(super) fn let_go(&mut self, order: usize) {
        self.down.let_go(order);
        self.up.let_go(order);
    }

    /// Delivers what is due, and closes what nothing more comes through.
    pub(super) fn deliver(&mut self) -> Result<(), Error> {
        // The end of one way may be that of the other.
        while self.deliver_once()? {}
        Ok(())
    }

    /// True if an end was closed.
    fn deliver_once(&mut self) -> Result<bool, Error> {
        let mut closed = false;
        match &self.to_device {
            Some(end) => {
                if !self.down.deliver(end.as_fd())? {
                    // What it has sent before it went counts.
                    self.down.discard();
                }
                // As if the coordinator had closed its channel: it has.
                if self.down.is_done() {
                    self.to_device = None;
                    self.up.ended = true;
                    closed = true;
                }
            }
            None => self.down.discard(),
        }
        match &self.to_coordinator {
            Some(end) => {
                let receives = self.up.deliver(end.as_fd())?;
                if !receives {
                    self.up.discard();
                }
                if !receives || self.up.is_done() {
                    self.to_coordinator = None;
                    self.down.ended = true;
                    closed = true;
                }
            }
            None => self.up.discard(),
        }
        Ok(closed)
    }

    /// Closes both ends.
    pub(super) fn cut(&mut self) {
        self.to_coordinator = None;
        self.to_device = None;
        self.down.give_up();
        self.up.give_up();
    }

    /// What to poll, and for what. (A hang-up is told whatever is asked for, again and again.)
    pub(super) fn polled(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let now = Instant::now();
        let flags = |reads: &Lane, writes: &Lane| {
            let read = if reads.has_room() { PollFlags::IN } else { PollFlags::empty() };
            let blocked = writes.due().is_some_and(|due| due <= now);
            if blocked { read | PollFlags::OUT } else { read }
        };
        let coordinator = flags(&self.down, &self.up);
        let device = flags(&self.up, &self.down);
        let ends = [(&self.to_coordinator, coordinator), (&self.to_device, device)];
        let open = ends.into_iter().filter_map(|(end, flags)| Some((end.as_ref()?.as_fd(), flags)));
        open.filter(|(_, flags)| !flags.is_empty())
    }

    /// When something will be due that is not yet.
    pub(super) fn dues(&self) -> impl Iterator<Item = Instant> {
        let now = Instant::now();
        [self.down.due(), self.up.due()].into_iter().flatten().filter(move |due| *due > now)
    }
}

/// Which moment it is when this packet is under way, with the message if it is one to look at.
pub(super) fn moment<M>(message: Option<&(M, Option<Moment>)>) -> Option<Moment> {
    message.and_then(|(_, moment)| *moment)
}
