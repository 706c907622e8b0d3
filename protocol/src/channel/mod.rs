//! One connection between a coordinator and a device process.
//!
//! A [`Channel`] is one connected `AF_UNIX` `SOCK_SEQPACKET` socket; a packet is a message, and
//! file descriptors travel with it (`SCM_RIGHTS`). [`CoordinatorEnd`] and [`DeviceEnd`] fix which
//! messages go which way.
//!
//! Three ways to use it, all on `&self`:
//! - the calls that never wait: [`Channel::try_send`], [`Channel::try_recv`],
//!   [`Channel::try_send_frame`] for one message to many;
//! - the blocking ones with a timeout: [`Channel::send`], [`Channel::recv`];
//! - under tokio: [`AsyncChannel`], or [`Readiness`] for a loop of one's own.
//!
//! A channel begins with the handshake, in which only `Hello`, `Welcome` and `Reject` pass; after
//! it both ends call [`Channel::set_version`].
//!
//! Any [`RecvError`] other than [`TimedOut`](RecvError::TimedOut) means that the peer is gone or
//! breaks the protocol: drop the channel. All fds of a refused packet are closed.
//!
//! ```
//! use standstill_protocol::channel::{CoordinatorEnd, DeviceEnd};
//! use standstill_protocol::message::{CoordinatorMessage, Epoch, Query, Term};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (coordinator, child_stdin) = CoordinatorEnd::pair()?;
//! let device = DeviceEnd::from_fd(child_stdin)?;
//! coordinator.set_version(1);
//! device.set_version(1);
//!
//! let query = CoordinatorMessage::Query(Query { term: Term(1), epoch: Epoch(7) });
//! coordinator.try_send(&query, &[])?;
//! assert_eq!(device.try_recv()?.map(|received| received.message), Some(query));
//! # Ok(())
//! # }
//! ```

mod asynchronous;
mod blocking;
mod error;
mod latency;
mod listener;
mod packet;
mod peer;
mod readiness;
mod rights;
#[cfg(test)]
mod tests;

pub use asynchronous::AsyncChannel;
pub use error::{FromFdError, RecvError, SendError};
pub use latency::prefer_short_waits;
pub use listener::{ControlListener, bind};
pub use readiness::{Readiness, ReadyGuard, StableFd};

use crate::codec::{self, EncodeError, HANDSHAKE_VERSION, MAX_PACKET, Message};
use crate::message::{CoordinatorMessage, DeviceMessage, MAX_FDS};
use nix::sys::socket::sockopt::PeerCredentials as PeerCred;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd, ioctl_fionread};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair, sockopt,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};

/// Closes an fd that came from a peer, without waiting for what a socket has still to send.
pub fn close_at_once(fd: OwnedFd) {
    // Fails for what is no socket, which does not linger.
    let _ = sockopt::set_socket_linger(&fd, None);
    drop(fd);
}

/// Room for the fds of one message.
const FD_ROOM: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// The coordinator's end of a control channel.
pub type CoordinatorEnd = Channel<CoordinatorMessage, DeviceMessage>;
/// The device process's end of a control channel.
pub type DeviceEnd = Channel<DeviceMessage, CoordinatorMessage>;

/// One connection that sends `Tx` and receives `Rx`.
///
/// Every call takes `&self`; a packet is sent and received whole, so threads may share a channel.
#[derive(Debug)]
pub struct Channel<Tx, Rx> {
    socket: OwnedFd,
    version: AtomicU16,
    directions: PhantomData<fn(Tx) -> Rx>,
}

/// A message and the file descriptors that came with it.
#[derive(Debug)]
pub struct Received<M> {
    /// The message, within all limits.
    pub message: M,
    /// Exactly as many as the message announces; close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Which process is at the other end of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Its process id; 0 if it cannot be seen from this pid namespace.
    pub pid: i32,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
}

/// A message as bytes, to be sent to many: it is encoded once.
#[derive(Clone, Debug)]
pub struct Frame<M> {
    packet: Vec<u8>,
    /// `None` for a handshake message, which goes with every version.
    version: Option<u16>,
    name: &'static str,
    fd_count: usize,
    message: PhantomData<fn(M)>,
}

impl<M: Message> Frame<M> {
    /// Encodes a message for channels of that protocol version (0: still in the handshake).
    ///
    /// # Errors
    ///
    /// As [`codec::encode`].
    pub fn new(message: &M, version: u16) -> Result<Self, EncodeError> {
        let packet = packet::with_buffer(|buffer| {
            let length = codec::encode(message, version, buffer)?;
            Ok::<_, EncodeError>(buffer[..length].to_vec())
        })?;
        Ok(Self {
            packet,
            version: (!message.is_handshake()).then_some(version),
            name: message.name(),
            fd_count: message.fd_count(),
            message: PhantomData,
        })
    }

    /// The packet, header included.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.packet
    }
}

impl CoordinatorEnd {
    /// Makes a channel; the second half is for a child's standard input.
    ///
    /// Both are close-on-exec, as `Command::stdin` expects.
    ///
    /// # Errors
    ///
    /// Those of socketpair(2).
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self::over(ours), theirs))
    }
}

impl<Tx, Rx> Channel<Tx, Rx> {
    fn over(socket: OwnedFd) -> Self {
        let version = AtomicU16::new(HANDSHAKE_VERSION);
        Self { socket, version, directions: PhantomData }
    }

    /// A channel over a connected socket, which becomes close-on-exec. It begins with the
    /// handshake.
    ///
    /// # Errors
    ///
    /// [`FromFdError`] if the fd is no Unix `SOCK_SEQPACKET` socket; it is closed then.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, FromFdError> {
        let kind = sockopt::socket_type(&fd).map_err(FromFdError::not_a_socket)?;
        let family = sockopt::socket_domain(&fd).map_err(FromFdError::not_a_socket)?;
        if family != AddressFamily::UNIX || kind != SocketType::SEQPACKET {
            return Err(FromFdError::WrongSocket { family: family.as_raw(), kind: kind.as_raw() });
        }
        let flags = fcntl_getfd(&fd).map_err(FromFdError::io)?;
        fcntl_setfd(&fd, flags | FdFlags::CLOEXEC).map_err(FromFdError::io)?;
        Ok(Self::over(fd))
    }

    /// The socket itself; the protocol version is forgotten.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// The protocol version that was agreed on; 0 during the handshake.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.version.load(Ordering::Acquire)
    }

    /// The handshake is over: from now on messages of this version pass. 0 goes back to it.
    pub fn set_version(&self, version: u16) {
        self.version.store(version, Ordering::Release);
    }

    /// Who made the other end.
    ///
    /// For a socketpair that is the process that called socketpair, at both ends: a device process
    /// learns its coordinator, a coordinator learns itself. For an accepted connection it is the
    /// process that connected.
    ///
    /// # Errors
    ///
    /// Those of getsockopt(2).
    pub fn peer_credentials(&self) -> io::Result<PeerCredentials> {
        let found = nix::sys::socket::getsockopt(&self.socket, PeerCred)?;
        Ok(PeerCredentials { pid: found.pid(), uid: found.uid(), gid: found.gid() })
    }

    /// A pidfd of the process that [`peer_credentials`](Self::peer_credentials) tells of: unlike
    /// its number it can never mean another process. Close-on-exec. (Linux 6.5 and later.)
    ///
    /// # Errors
    ///
    /// Those of getsockopt(2): ENOPROTOOPT from older kernels, ESRCH (EINVAL before 6.17) if the
    /// process was reaped.
    pub fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        peer::pidfd(self.socket.as_fd())
    }

    /// True if the peer has closed its end; messages of it may still be queued.
    fn hung_up(&self) -> Result<bool, Errno> {
        let mut polled = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP))
    }
}

impl<Tx, Rx> AsFd for Channel<Tx, Rx> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<Tx: Message, Rx> Channel<Tx, Rx> {
    /// Sends a message without waiting: one sendmsg.
    ///
    /// The fds are duplicated into the packet and stay the caller's.
    ///
    /// # Errors
    ///
    /// [`SendError::WouldBlock`] if the peer reads too slowly; otherwise see [`SendError`].
    pub fn try_send(&self, message: &Tx, fds: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        packet::with_buffer(|buffer| {
            let length = codec::encode(message, self.version(), buffer)?;
            self.send_packet(&buffer[..length], message.name(), message.fd_count(), fds)
        })
    }

    /// Sends what was encoded before, without waiting: for one message to many peers.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Self::try_send), and [`SendError::FrameVersion`] if the frame was made for
    /// another version than this channel's.
    pub fn try_send_frame(
        &self,
        frame: &Frame<Tx>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        if let Some(version) = frame.version
            && version != self.version()
        {
            return Err(SendError::FrameVersion { frame: version, channel: self.version() });
        }
        self.send_packet(&frame.packet, frame.name, frame.fd_count, fds)
    }

    fn send_packet(
        &self,
        packet: &[u8],
        message: &'static str,
        fd_count: usize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        if fds.len() != fd_count {
            return Err(SendError::Fds { message, announced: fd_count, given: fds.len() });
        }
        let mut room = [MaybeUninit::uninit(); FD_ROOM];
        let mut control = SendAncillaryBuffer::new(&mut room);
        // Announced counts are within MAX_FDS, so there is room.
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(SendError::Fds { message, announced: fd_count, given: fds.len() });
        }
        loop {
            // The packet goes whole or not at all.
            match sendmsg(
                &self.socket,
                &[IoSlice::new(packet)],
                &mut control,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(SendError::WouldBlock),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(SendError::Disconnected),
                Err(error) => {
                    return Err(SendError::Io { message, source: error.into() });
                }
            }
        }
    }
}

impl<Tx, Rx: Message> Channel<Tx, Rx> {
    /// Receives a message without waiting: one recvmsg. `None` if there is none yet.
    ///
    /// What a dead peer had sent is still received, in order, before
    /// [`RecvError::Disconnected`].
    ///
    /// # Errors
    ///
    /// See [`RecvError`]; the refused packet is gone and its fds are closed.
    pub fn try_recv(&self) -> Result<Option<Received<Rx>>, RecvError> {
        self.receive(RecvFlags::DONTWAIT)
    }

    /// One receive, which waits if `wait` and the socket say so.
    fn receive(&self, wait: RecvFlags) -> Result<Option<Received<Rx>>, RecvError> {
        packet::with_buffer(|buffer| self.receive_into(buffer, wait))
    }

    fn receive_into(
        &self,
        buffer: &mut [u8; MAX_PACKET],
        wait: RecvFlags,
    ) -> Result<Option<Received<Rx>>, RecvError> {
        let mut room = [MaybeUninit::uninit(); FD_ROOM];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        // A peer that dies with unread messages of ours gives one ECONNRESET, ahead of the last
        // messages of its own: those still count.
        let mut reset_seen = false;
        let received = loop {
            match recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(buffer)],
                &mut control,
                wait | RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC,
            ) {
                Ok(received) => break received,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) if !reset_seen => reset_seen = true,
                Err(Errno::CONNRESET) => return Err(RecvError::Disconnected),
                Err(error) => {
                    return Err(RecvError::Io { source: error.into() });
                }
            }
        };
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = part {
                fds.extend(some);
            }
        }
        let (length, flags) = (received.bytes, received.flags);
        let message = self.message_of(length, flags, buffer, fds.len());
        match message {
            Ok(message) => Ok(Some(Received { message, fds })),
            Err(error) => {
                fds.into_iter().for_each(close_at_once);
                Err(error)
            }
        }
    }

    /// The message in a packet that came with that many fds.
    fn message_of(
        &self,
        length: usize,
        flags: ReturnFlags,
        buffer: &[u8; MAX_PACKET],
        fds: usize,
    ) -> Result<Rx, RecvError> {
        if length == 0 {
            return Err(self.empty_or_end());
        }
        if flags.contains(ReturnFlags::TRUNC) || length > MAX_PACKET {
            return Err(RecvError::Oversized { length });
        }
        if flags.contains(ReturnFlags::CTRUNC) || fds > MAX_FDS {
            return Err(RecvError::FdsTruncated { received: fds });
        }
        let message: Rx = codec::decode(&buffer[..length], self.version())?;
        if fds != message.fd_count() {
            return Err(RecvError::Fds {
                message: message.name(),
                announced: message.fd_count(),
                received: fds,
            });
        }
        Ok(message)
    }

    /// Lets no more fds come in: a peer that tries gets EPERM. (Linux 6.16 and later.)
    ///
    /// The last reference to a file can take its time to close, and that would be ours: a hostile
    /// peer passes a socket that lingers, or a file of a file system of its own.
    ///
    /// # Errors
    ///
    /// ENOPROTOOPT from older kernels; nothing has changed then.
    pub fn refuse_fds(&self) -> io::Result<()> {
        rights::refuse(self.socket.as_fd())
    }

    /// A receive of no bytes is an empty packet, which is an error of the peer's, or the end.
    fn empty_or_end(&self) -> RecvError {
        let end = self.hung_up().and_then(|hung_up| {
            // The end comes only after everything that is queued.
            Ok(hung_up && ioctl_fionread(&self.socket)? == 0)
        });
        match end {
            Ok(true) => RecvError::Disconnected,
            Ok(false) => RecvError::Empty,
            Err(error) => RecvError::Io { source: error.into() },
        }
    }
}
