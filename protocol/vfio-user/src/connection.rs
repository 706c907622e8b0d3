//! A Unix stream socket that carries messages and file descriptors, with deadlines.
//!
//! A [`Receiver`] and a [`Sender`] are the two halves; both may be used at the same time. A message
//! is sent with one system call. Received is as much at once as there is, and taken apart by a
//! [`Framer`], so that a short message takes one `recvmsg`, and many that wait take one as well.
//! Buffers are used again: with short messages without fds nothing is allocated.
//!
//! Each call returns by its [deadline](Deadline), also if the peer sends a message byte by byte; `None` is
//! as long as it takes. A socket that is non-blocking is waited for all the same. SIGPIPE is never raised. Received fds have CLOEXEC, and more of them
//! than agreed never reach this process, but for the one or two that the kernel's alignment lets in:
//! those are closed.
//!
//! ```
//! use standstill_vfio_user::Deadline;
//! use standstill_vfio_user::connection::connect;
//! use standstill_vfio_user::framing::FramingLimits;
//! use standstill_vfio_user::wire::{Command, Header};
//! use std::os::unix::net::UnixStream;
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (client, server) = UnixStream::pair()?;
//! let limits = FramingLimits { max_message: 4096, max_fds: 1 };
//! let (_, mut client) = connect(client, limits)?;
//! let (mut server, _) = connect(server, limits)?;
//! let deadline = Deadline::within(Duration::from_secs(1));
//! client.send(&Header::command(1, Command::Reset), &[], &[], deadline, |_body| ())?;
//! let message = server.receive(deadline)?;
//! assert_eq!(message.header.command, Command::Reset.number());
//! # Ok(())
//! # }
//! ```

#[cfg(test)]
pub(crate) mod tests;

use crate::deadline::Deadline;
use crate::framing::{Framer, FramingError, FramingLimits, Message};
use crate::wire::{Header, MAX_MSG_FDS};
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, send, sendmsg, shutdown,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// How long a receive with a deadline may block without looking at it. Whoever has more time than
/// that is received for with one system call; a message that comes later takes two more.
const BLOCK: Duration = Duration::from_millis(100);

/// Data up to this are sent with the header in one piece, in bytes.
const COPIED: usize = 256;

/// The kernel's limit, for the size of a buffer.
const MOST_FDS: usize = 253;
const _: () = assert!(MOST_FDS == MAX_MSG_FDS as usize);

/// Makes the two halves of a connection of a stream socket.
///
/// # Errors
///
/// If the socket takes no timeout: it is none.
pub fn connect(
    socket: impl Into<OwnedFd>,
    limits: FramingLimits,
) -> io::Result<(Receiver, Sender)> {
    let socket = Arc::new(socket.into());
    // It may have one; and without being a socket it takes none.
    set_socket_timeout(&socket, Timeout::Recv, None)?;
    let framer = Framer::new(limits);
    let receiver = Receiver { socket: Arc::clone(&socket), framer, wakes: false };
    Ok((receiver, Sender { socket, buffer: Vec::new(), broken: false }))
}

/// Nothing could be received.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The peer has closed, or one of the two halves here was shut down.
    #[error("the peer has closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("nothing came in time")]
    Deadline,
    /// What came is no message that can be taken.
    #[error(transparent)]
    Framing(#[from] FramingError),
    /// Fds were lost: more than agreed, or more than this process may have.
    #[error("fds were lost: more than agreed, or more than this process may have")]
    FdsLost,
    /// The socket failed.
    #[error("receiving failed")]
    Io(#[source] io::Error),
}

impl ReceiveError {
    /// Whether the connection can go on.
    #[must_use]
    pub fn is_in_step(&self) -> bool {
        match self {
            Self::Deadline => true,
            Self::Framing(error) => error.is_in_step(),
            Self::Closed | Self::FdsLost | Self::Io(_) => false,
        }
    }
}

/// A message could not be sent.
#[derive(Debug, Error)]
pub enum SendError {
    /// The peer does not read. None of the message was sent.
    #[error("the peer takes nothing")]
    Deadline,
    /// The peer reads too slowly, or an earlier message was not sent whole: the stream is out of
    /// step, and nothing more is sent.
    #[error("the peer has taken only a part of a message")]
    Partial,
    /// The peer has closed.
    #[error("the peer has closed the connection")]
    Closed,
    /// The socket failed.
    #[error("sending failed")]
    Io(#[source] io::Error),
}

impl SendError {
    /// Whether the connection can go on.
    #[must_use]
    pub fn is_in_step(&self) -> bool {
        matches!(self, Self::Deadline)
    }
}

/// The half that receives.
#[derive(Debug)]
pub struct Receiver {
    socket: Arc<OwnedFd>,
    framer: Framer,
    /// The socket ends a receive that blocks for [`BLOCK`]. It costs a timer, so it is not set
    /// before there is a deadline.
    wakes: bool,
}

impl Receiver {
    /// Other limits, from the next message that has not come whole.
    pub fn set_limits(&mut self, limits: FramingLimits) {
        self.framer.set_limits(limits);
    }

    /// The next message; waits for it until the deadline.
    ///
    /// # Errors
    ///
    /// [`ReceiveError`], which knows whether the next call can have another message.
    #[inline]
    pub fn receive(&mut self, deadline: impl Into<Deadline>) -> Result<Message<'_>, ReceiveError> {
        self.receive_by(&mut deadline.into())
    }

    /// The same for a call that has more to wait for.
    #[inline]
    pub(crate) fn receive_by(
        &mut self,
        deadline: &mut Deadline,
    ) -> Result<Message<'_>, ReceiveError> {
        while !self.framer.is_ready() {
            self.read_by(deadline)?;
            // A peer that always sends a little more does not keep the caller: only a message that
            // comes whole needs no look at the clock.
            if !self.framer.is_ready() && deadline.is_over() {
                return Err(ReceiveError::Deadline);
            }
        }
        // It is ready, so there is a message or an error.
        self.framer.next_message()?.ok_or(ReceiveError::Deadline)
    }

    /// The next message if it has come. Never waits.
    ///
    /// # Errors
    ///
    /// [`ReceiveError`], but for the deadline.
    pub fn try_receive(&mut self) -> Result<Option<Message<'_>>, ReceiveError> {
        while !self.framer.is_ready() {
            match self.read(RecvFlags::DONTWAIT) {
                Ok(()) => {}
                Err(ReceiveError::Deadline) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(self.framer.next_message()?)
    }

    /// The next message if it has been read with an earlier one. Makes no system call.
    ///
    /// # Errors
    ///
    /// [`FramingError`].
    pub fn read_ahead(&mut self) -> Result<Option<Message<'_>>, FramingError> {
        self.framer.next_message()
    }

    /// Reads what has come, and waits for something to come if nothing has.
    fn read_by(&mut self, deadline: &mut Deadline) -> Result<(), ReceiveError> {
        let block = deadline.has(BLOCK);
        if block && self.wakes != deadline.is_finite() {
            let timeout = deadline.is_finite().then_some(BLOCK);
            set_socket_timeout(&self.socket, Timeout::Recv, timeout)
                .map_err(|error| ReceiveError::Io(error.into()))?;
            self.wakes = deadline.is_finite();
        }
        let flags = if block { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        match self.read(flags) {
            Err(ReceiveError::Deadline) => {}
            done => return done,
        }
        self.read_late(block, deadline)
    }

    /// Nothing has come for a while, or the socket does not block.
    #[cold]
    fn read_late(&mut self, blocked: bool, deadline: &mut Deadline) -> Result<(), ReceiveError> {
        if blocked {
            deadline.has_waited(BLOCK);
        }
        wait(&self.socket, PollFlags::IN, deadline).map_err(ReceiveError::Io)?;
        match self.read(RecvFlags::DONTWAIT) {
            Err(ReceiveError::Deadline) if !deadline.is_over() => Ok(()),
            done => done,
        }
    }

    /// One `recvmsg`. "Deadline": there was nothing.
    fn read(&mut self, flags: RecvFlags) -> Result<(), ReceiveError> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FDS))];
        let fds = self.framer.limits().max_fds.min(MOST_FDS);
        let room = cmsg_space!(ScmRights(fds));
        let mut control = RecvAncillaryBuffer::new(space.get_mut(..room).unwrap_or_default());
        let mut iov = [IoSliceMut::new(self.framer.space())];
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let came = match recvmsg(&self.socket, &mut iov, &mut control, flags) {
            Ok(came) => came,
            // The deadline is looked at before the next one.
            Err(Errno::INTR) => return Ok(()),
            Err(Errno::AGAIN) => return Err(ReceiveError::Deadline),
            Err(Errno::CONNRESET) => return Err(self.ended()),
            Err(error) => return Err(ReceiveError::Io(error.into())),
        };
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        self.framer.received(came.bytes, fds.flatten());
        if came.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ReceiveError::FdsLost);
        }
        if came.bytes == 0 {
            return Err(self.ended());
        }
        Ok(())
    }

    fn ended(&self) -> ReceiveError {
        self.framer.finish().map_or_else(ReceiveError::Framing, |()| ReceiveError::Closed)
    }
}

/// To wait for it together with others: something can be received when it is readable, or when
/// [`Receiver::read_ahead`] has a message.
impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The half that sends.
#[derive(Debug)]
pub struct Sender {
    socket: Arc<OwnedFd>,
    /// Header and body of the message that is being sent; kept for the next one.
    buffer: Vec<u8>,
    /// A message was sent in part.
    broken: bool,
}

impl Sender {
    /// Sends a message: the header, with its size corrected; what `body` appends; and `data`, which
    /// is not copied if it is long. The `fds` go with the first byte.
    ///
    /// # Errors
    ///
    /// [`SendError`], which knows whether another message can be sent.
    pub fn send(
        &mut self,
        header: &Header,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: impl Into<Deadline>,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), SendError> {
        self.send_by(header, data, fds, &mut deadline.into(), body)
    }

    /// The same for a call that has more to wait for.
    pub(crate) fn send_by(
        &mut self,
        header: &Header,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: &mut Deadline,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), SendError> {
        if self.broken {
            return Err(SendError::Partial);
        }
        self.buffer.clear();
        // A few bytes are copied faster than the kernel takes a second piece.
        let (copied, data) = if data.len() <= COPIED { (data, &[][..]) } else { (&[][..], data) };
        header.encode_message(&mut self.buffer, data.len(), |out| {
            body(out);
            out.extend_from_slice(copied);
        });
        let whole = self.buffer.len().saturating_add(data.len());
        let mut sent = 0;
        while sent < whole {
            match self.write(sent, data, if sent == 0 { fds } else { &[] }) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let free = wait(&self.socket, PollFlags::OUT, deadline).map_err(|error| {
                        self.broken |= sent > 0;
                        SendError::Io(error)
                    })?;
                    if !free {
                        self.broken |= sent > 0;
                        return Err(if sent > 0 {
                            SendError::Partial
                        } else {
                            SendError::Deadline
                        });
                    }
                }
                Err(error) => {
                    self.broken = true;
                    return Err(match error {
                        Errno::PIPE | Errno::CONNRESET => SendError::Closed,
                        error => SendError::Io(error.into()),
                    });
                }
            }
        }
        Ok(())
    }

    /// One `sendmsg` of what is left after `sent` bytes.
    fn write(&self, sent: usize, data: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let head = self.buffer.get(sent..).unwrap_or_default();
        let tail = data.get(sent.saturating_sub(self.buffer.len())..).unwrap_or_default();
        let both = [IoSlice::new(head), IoSlice::new(tail)];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let iov = match (head.is_empty(), tail.is_empty()) {
            // One piece and no fds: the kernel has less to take apart.
            (_, true) if fds.is_empty() => return send(&self.socket, head, flags),
            (true, false) if fds.is_empty() => return send(&self.socket, tail, flags),
            (_, true) => &both[..1],
            (true, false) => &both[1..],
            (false, false) => &both[..],
        };
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOMANYREFS);
        }
        sendmsg(&self.socket, iov, &mut control, flags)
    }

    /// Ends both directions, for all that use this socket: whoever waits is woken.
    pub fn shutdown(&self) {
        // The peer has closed already.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

/// Waits until the socket is ready or the deadline has passed; false in that case.
fn wait(socket: &OwnedFd, ready: PollFlags, deadline: &mut Deadline) -> io::Result<bool> {
    loop {
        let timeout = deadline.left().map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut fds = [PollFd::new(socket, ready)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
