//! The floor: a two-phase round over bare processes, with nothing of a coordinator or a device in
//! it. One thread with epoll on this side, blocking receives and sends on the other, packets as
//! long as the protocol's. Shared by the benchmarks that compare with it.

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use standstill::protocol::codec::{self, MAX_PACKET};
use standstill::protocol::message::{
    Command as ControlCommand, CoordinatorMessage, DeviceMessage, Epoch, Evidence, Phase, Reached,
    Term, Timings,
};
use standstill::protocol::migration::MigrationState;
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The argument that makes this program a child of the floor; the length of its answers follows.
pub(crate) const CHILD: &str = "floor-child";

/// Answers every packet on standard input until its end, with that many bytes.
pub(crate) fn child(answer: usize) -> io::Result<()> {
    let stdin = io::stdin();
    let mut buffer = [0; MAX_PACKET];
    let answer = [0x5a; MAX_PACKET].get(..answer).map(<[u8]>::to_vec).unwrap_or_default();
    loop {
        let (length, _) = rustix::net::recv(&stdin, &mut buffer, RecvFlags::empty())?;
        if length == 0 {
            return Ok(());
        }
        rustix::net::send(&stdin, &answer, SendFlags::NOSIGNAL)?;
    }
}

/// Bare processes that answer.
pub(crate) struct Floor {
    pub(crate) children: Vec<(OwnedFd, Child)>,
    epoll: OwnedFd,
    /// What each is sent: a packet as long as a command.
    frame: Vec<u8>,
}

impl Floor {
    pub(crate) fn new(devices: usize) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let program = std::env::current_exe()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (frame, answer) = packets()?;
        let mut children = Vec::with_capacity(devices);
        for number in 0..devices {
            let (ours, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            let child = Command::new(&program)
                .args([CHILD, &answer.to_string()])
                .stdin(Stdio::from(theirs))
                .spawn()?;
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&epoll, &ours, data, epoll::EventFlags::IN)?;
            children.push((ours, child));
        }
        let mut floor = Self { children, epoll, frame };
        // The children's first time counts not.
        floor.round()?;
        Ok(floor)
    }

    /// One round: all are told, all answer, and once more.
    pub(crate) fn round(&mut self) -> io::Result<Duration> {
        let began = Instant::now();
        let mut events = Vec::with_capacity(self.children.len());
        let mut buffer = [0; MAX_PACKET];
        for _phase in 0..2 {
            for (socket, _) in &self.children {
                rustix::net::send(socket, &self.frame, SendFlags::NOSIGNAL)?;
            }
            let mut left = self.children.len();
            while left > 0 {
                events.clear();
                epoll::wait(&self.epoll, spare_capacity(&mut events), None)?;
                for event in &events {
                    let number = usize::try_from(event.data.u64()).map_err(io::Error::other)?;
                    rustix::net::recv(&self.children[number].0, &mut buffer, RecvFlags::empty())?;
                    left -= 1;
                }
            }
        }
        Ok(began.elapsed())
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        for (socket, mut child) in self.children.drain(..) {
            drop(socket);
            // Its standard input has ended, and so does it.
            let _ = child.wait();
        }
    }
}

/// A command's packet, and the length of the shortest answer to it.
pub(crate) fn packets() -> Result<(Vec<u8>, usize), Box<dyn Error + Send + Sync>> {
    let (term, epoch, phase) = (Term(1), Epoch(1), Phase::PrepareStop);
    let state = MigrationState::RunningP2p;
    let command = ControlCommand { term, epoch, phase, target: state, budget_ns: 1, lease_ns: 0 };
    let (timings, evidence) = (Timings::default(), Evidence::default());
    let reached = Reached { term, epoch, phase, state, timings, evidence };
    let mut buffer = [0; MAX_PACKET];
    let answer = codec::encode(&DeviceMessage::Reached(reached), 1, &mut buffer)?;
    let length = codec::encode(&CoordinatorMessage::Command(command), 1, &mut buffer)?;
    Ok((buffer[..length].to_vec(), answer))
}
