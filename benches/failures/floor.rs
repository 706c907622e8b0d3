//! The floor: a two-phase round over bare processes, with nothing of a coordinator or a device in
//! it. One thread with epoll on this side, blocking receives and sends on the other, 32 bytes.

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The argument that makes this program a child of the floor.
pub(crate) const CHILD: &str = "floor-child";

const FRAME: [u8; 32] = [0x5a; 32];

/// Answers every frame on standard input until its end.
pub(crate) fn child() -> io::Result<()> {
    let stdin = io::stdin();
    let mut buffer = [0; 64];
    loop {
        let (length, _) = rustix::net::recv(&stdin, &mut buffer, RecvFlags::empty())?;
        if length == 0 {
            return Ok(());
        }
        rustix::net::send(&stdin, &buffer[..length], SendFlags::NOSIGNAL)?;
    }
}

/// Bare processes that answer.
pub(crate) struct Floor {
    children: Vec<(OwnedFd, Child)>,
    epoll: OwnedFd,
}

impl Floor {
    pub(crate) fn new(devices: usize) -> io::Result<Self> {
        let program = std::env::current_exe()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut children = Vec::with_capacity(devices);
        for number in 0..devices {
            let (ours, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            let child = Command::new(&program).arg(CHILD).stdin(Stdio::from(theirs)).spawn()?;
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&epoll, &ours, data, epoll::EventFlags::IN)?;
            children.push((ours, child));
        }
        let mut floor = Self { children, epoll };
        // The children's first time counts not.
        floor.round()?;
        Ok(floor)
    }

    /// One round: all are told, all answer, and once more.
    pub(crate) fn round(&mut self) -> io::Result<Duration> {
        let began = Instant::now();
        let mut events = Vec::with_capacity(self.children.len());
        let mut buffer = [0; 64];
        for _phase in 0..2 {
            for (socket, _) in &self.children {
                rustix::net::send(socket, &FRAME, SendFlags::NOSIGNAL)?;
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
