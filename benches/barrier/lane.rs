//! What a lane of shared memory beside the control channel would give: a bound, not a transport.
//!
//! A device is told by an eventfd of its own, and answers by a number that it stores in a page of
//! its own and by an eventfd that all share. So one that lies can wake the coordinator for nothing
//! and can lie about itself, but touches nobody else's answer: the coordinator looks at every page
//! that it waits for. With *frames* an answer of the usual length follows after the second phase,
//! which a coordinator needs anyway: it has the state that was reached, the times and the evidence.
//!
//! The children are bare, as the floor's are.

use crate::floor::packets;
use crate::program::Failure;
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg,
};
use rustix::process::{Signal, set_parent_process_death_signal};
use standstill::device_proc::memory::SharedMemory;
use standstill::protocol::codec::MAX_PACKET;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The argument that makes this program a child of the lane; the length of its frames follows, 0
/// for none.
pub(crate) const CHILD: &str = "lane-child";

const PAGE: u64 = 4096;

/// Answers until its parent ends it. Standard input is a socket, output the page, and error what
/// wakes the parent.
pub(crate) fn child(frame: usize) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let socket = io::stdin();
    let kick = receive_fd(&socket)?;
    let memory = SharedMemory::from_fd(io::stdout().as_fd().try_clone_to_owned()?, PAGE)?;
    let answered = io::stderr().as_fd().try_clone_to_owned()?;
    let frame = vec![0x5a; frame];
    for phase in 1_u64.. {
        read(&kick, &mut [0; 8])?;
        memory.store_u64(0, phase)?;
        write(&answered, &1_u64.to_ne_bytes())?;
        if !frame.is_empty() && phase.is_multiple_of(2) {
            rustix::net::send(&socket, &frame, SendFlags::NOSIGNAL)?;
        }
    }
    Ok(())
}

fn receive_fd(socket: &impl AsFd) -> Result<OwnedFd, Failure> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    recvmsg(socket, &mut [IoSliceMut::new(&mut [0; 8])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fd = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fd.ok_or("no fd came")?)
}

/// Bare processes with a lane each.
pub(crate) struct Lane {
    children: Vec<One>,
    answered: OwnedFd,
    frames: bool,
    phase: u64,
}

struct One {
    child: Child,
    socket: OwnedFd,
    kick: OwnedFd,
    memory: SharedMemory,
}

impl Lane {
    pub(crate) fn new(devices: usize, frames: bool) -> Result<Self, Failure> {
        let program = std::env::current_exe()?;
        let answered = eventfd(0, EventfdFlags::CLOEXEC)?;
        let frame = if frames { packets()?.1 } else { 0 };
        let mut children = Vec::with_capacity(devices);
        for _ in 0..devices {
            let (socket, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            let memory = SharedMemory::create("lane", PAGE)?;
            let child = Command::new(&program)
                .args([CHILD, &frame.to_string()])
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::from(memory.try_clone_fd()?))
                .stderr(Stdio::from(answered.try_clone()?))
                .spawn()?;
            let kick = eventfd(0, EventfdFlags::CLOEXEC)?;
            let fds = [kick.as_fd()];
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            sendmsg(&socket, &[IoSlice::new(b"kick")], &mut control, SendFlags::NOSIGNAL)?;
            children.push(One { child, socket, kick, memory });
        }
        let mut lane = Self { children, answered, frames, phase: 0 };
        // The children's first time counts not.
        lane.round()?;
        Ok(lane)
    }

    /// One round of two phases, and with frames the frames.
    pub(crate) fn round(&mut self) -> Result<Duration, Failure> {
        let began = Instant::now();
        let mut waiting: Vec<usize> = Vec::with_capacity(self.children.len());
        for _ in 0..2 {
            self.phase += 1;
            for one in &self.children {
                write(&one.kick, &1_u64.to_ne_bytes())?;
            }
            waiting.extend(0..self.children.len());
            while !waiting.is_empty() {
                read(&self.answered, &mut [0; 8])?;
                let phase = self.phase;
                // Nobody but the device itself writes there.
                let answered = |at: usize| self.children[at].memory.load_u64(0) == Ok(phase);
                waiting.retain(|at| !answered(*at));
            }
        }
        if self.frames {
            let mut buffer = Vec::with_capacity(MAX_PACKET);
            for one in &self.children {
                buffer.clear();
                rustix::net::recv(&one.socket, spare_capacity(&mut buffer), RecvFlags::empty())?;
            }
        }
        Ok(began.elapsed())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        for one in &mut self.children {
            // Fails if it is gone.
            let _ = one.child.kill();
            let _ = one.child.wait();
        }
    }
}
