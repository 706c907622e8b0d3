//! One client's connection: bytes in and whole messages out, replies in and bytes out.
//!
//! Costs one `recvmsg` for as many messages as have come, and one `send` for each reply. Nothing
//! waits longer than it is told to.

use crate::edge::Station;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, send, sendmsg, shutdown,
};
use standstill_vfio_user::framing::{Framer, FramingLimits};
use standstill_vfio_user::wire::MAX_MSG_FDS;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The most fds that can come with one message.
pub(super) const MAX_FDS: usize = 16;

/// The most fds that can go with one: the kernel's limit, which no client's is above.
const MOST_FDS: usize = MAX_MSG_FDS as usize;

/// How long a client that reads nothing is waited for, since it last read something: it waits no longer
/// for its replies itself.
const SEND_PATIENCE: Duration = Duration::from_millis(4500);

/// A connection has ended, or is of no more use.
#[derive(Debug, Error)]
pub(super) enum LinkError {
    /// The client has closed it.
    #[error("the client has gone")]
    Gone,
    /// It was cut within a message, or with more fds than the system passes on.
    #[error("fds of the client were lost: there is no room for so many in one message")]
    FdsLost,
    /// The client does not read.
    #[error("the client has not read its replies for {0:?}")]
    Stuck(Duration),
    /// Whoever sends has no more time.
    #[error("the client did not read in time")]
    Late,
    /// A system call failed.
    #[error("{call}")]
    System {
        /// Which.
        call: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
}

fn failed(call: &'static str) -> impl FnOnce(Errno) -> LinkError {
    move |source| LinkError::System { call, source }
}

/// What came of looking for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// Something.
    Some,
    /// Nothing, in that time.
    Nothing,
}

/// How long to look for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Not at all.
    No,
    /// As long as [`Incoming::new`] was told.
    Short,
}

/// What comes from a client.
#[derive(Debug)]
pub(super) struct Incoming {
    socket: Arc<OwnedFd>,
    pub(super) framer: Framer,
}

impl Incoming {
    /// `short` is the time of [`Wait::Short`].
    pub(super) fn new(
        socket: Arc<OwnedFd>,
        limits: FramingLimits,
        short: Duration,
    ) -> Result<Self, LinkError> {
        set_socket_timeout(&socket, Timeout::Recv, Some(short))
            .map_err(failed("setting the timeout of a client's socket"))?;
        Ok(Self { socket, framer: Framer::new(limits) })
    }

    /// Takes what has come out of the socket, into the framer.
    pub(super) fn receive(&mut self, wait: Wait) -> Result<Came, LinkError> {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let flags = match wait {
            Wait::No => RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
            Wait::Short => RecvFlags::CMSG_CLOEXEC,
        };
        let space = &mut [IoSliceMut::new(self.framer.space())];
        let received = match recvmsg(&self.socket, space, &mut control, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Came::Nothing),
            Err(Errno::CONNRESET) => return Err(LinkError::Gone),
            Err(error) => return Err(failed("receiving from a client")(error)),
        };
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fds = fds.flatten();
        if received.flags.contains(ReturnFlags::CTRUNC) {
            fds.for_each(drop);
            return Err(LinkError::FdsLost);
        }
        if received.bytes == 0 {
            return Err(LinkError::Gone);
        }
        self.framer.received(received.bytes, fds);
        Ok(Came::Some)
    }

    /// How many bytes have come that are not taken yet, by the framer or out of the socket.
    pub(super) fn snapshot(&self) -> u64 {
        let in_socket = rustix::io::ioctl_fionread(&self.socket).unwrap_or(0);
        in_socket.saturating_add(self.framer.pending() as u64)
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// For how long a client has read nothing of what waits for room.
#[derive(Debug, Default)]
struct Stall {
    /// When it had read as much as it has read now.
    since: Option<Instant>,
}

impl Stall {
    /// It has read something.
    fn ended(&mut self) {
        self.since = None;
    }

    /// What is left of the patience with it, if it has read nothing since the last call.
    fn rest(&mut self, patience: Duration, now: Instant) -> Duration {
        patience.saturating_sub(now - *self.since.get_or_insert(now))
    }
}

/// What goes to a client; several threads may send.
#[derive(Debug)]
pub(super) struct Outgoing {
    socket: Arc<OwnedFd>,
    /// How long a client that reads nothing is waited for.
    patience: Duration,
    /// Where a stop asks for the transport.
    station: Arc<Station>,
    turn: Turn,
}

/// Lets one send at a time, for the length of one message.
#[derive(Debug, Default)]
struct Turn {
    state: Mutex<TurnState>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct TurnState {
    taken: bool,
    /// How many sleep until it is free: to wake nobody costs a system call, too.
    sleepers: usize,
}

/// Over when it is dropped.
struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits for its turn; `None` if that has not come by the deadline.
    fn take(&self, deadline: Option<Instant>) -> Option<Taken<'_>> {
        let mut state = self.lock();
        while state.taken {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            state.sleepers += 1;
            state = match left {
                None => self.freed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.freed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.sleepers -= 1;
        }
        state.taken = true;
        Some(Taken(self))
    }

    fn lock(&self) -> MutexGuard<'_, TurnState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.taken = false;
        let somebody_sleeps = state.sleepers > 0;
        drop(state);
        if somebody_sleeps {
            self.0.freed.notify_one();
        }
    }
}

impl Outgoing {
    pub(super) fn new(socket: Arc<OwnedFd>, station: Arc<Station>) -> Self {
        Self { socket, patience: SEND_PATIENCE, station, turn: Turn::default() }
    }

    /// Sends a whole message, from the transport's thread. A client that does not read loses its
    /// connection; a stop does not wait for it.
    #[inline]
    pub(super) fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        self.send_by(message, fds, None)
    }

    /// The same for another thread, which has a deadline of its own.
    pub(super) fn send_by(
        &self,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<(), LinkError> {
        let _turn = self.turn.take(deadline).ok_or(LinkError::Late)?;
        let mut rest = message;
        let mut fds = fds;
        let mut stall = Stall::default();
        while !rest.is_empty() {
            match self.try_send(rest, fds) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    fds = &[];
                    stall.ended();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(error) = self.wait_for_room(&mut stall, deadline) {
                        // Half a message leaves nothing to go on with.
                        let is_whole = rest.len() == message.len();
                        if !(is_whole && matches!(error, LinkError::Late)) {
                            self.close();
                        }
                        return Err(error);
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LinkError::Gone),
                Err(error) => {
                    self.close();
                    return Err(failed("sending to a client")(error));
                }
            }
        }
        Ok(())
    }

    fn try_send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if fds.is_empty() {
            return send(&self.socket, bytes, flags);
        }
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags)
    }

    #[cold]
    fn wait_for_room(&self, stall: &mut Stall, deadline: Option<Instant>) -> Result<(), LinkError> {
        let now = Instant::now();
        let mut rest = stall.rest(self.patience, now);
        if rest.is_zero() {
            return Err(LinkError::Stuck(self.patience));
        }
        if let Some(deadline) = deadline {
            rest = rest.min(deadline.saturating_duration_since(now));
            if rest.is_zero() {
                return Err(LinkError::Late);
            }
        }
        let rest = Timespec::try_from(rest).map_err(|_| failed("the clock")(Errno::INVAL))?;
        let is_transport = deadline.is_none();
        if is_transport {
            // What was answered is done, and what comes behind it is not begun before this ends.
            self.station.waiting();
        }
        let polled = poll(&mut [PollFd::new(&*self.socket, PollFlags::OUT)], Some(&rest));
        if is_transport {
            self.station.busy();
        }
        match polled {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(failed("waiting for a client")(error)),
        }
    }

    /// Ends the connection: whoever waits in it sees that.
    pub(super) fn close(&self) {
        if let Err(error) = shutdown(&self.socket, Shutdown::Both) {
            tracing::debug!(%error, "the end of a client's connection");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_client_is_waited_for_since_it_last_read_something() {
        let (patience, begin) = (SEND_PATIENCE, Instant::now());
        let after = |part: u32| begin + patience * part / 4;
        let mut stall = Stall::default();
        assert_eq!(stall.rest(patience, after(0)), patience);
        assert_eq!(stall.rest(patience, after(3)), patience / 4);
        stall.ended();
        // However long it takes all in all.
        assert_eq!(stall.rest(patience, after(100)), patience);
        assert_eq!(stall.rest(patience, after(102)), patience / 2);
        assert_eq!(stall.rest(patience, after(104)), Duration::ZERO);
        assert_eq!(stall.rest(patience, after(105)), Duration::ZERO);
    }

    #[test]
    fn one_that_reads_nothing_loses_its_connection() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let patience = Duration::from_millis(20);
        let outgoing = Outgoing::new(Arc::new(ours.into()), Station::new().unwrap());
        let outgoing = Outgoing { patience, ..outgoing };
        // More than fits into the socket.
        let error = outgoing.send(&[1; 4 << 20], &[]).unwrap_err();
        assert!(matches!(error, LinkError::Stuck(stuck) if stuck == patience), "{error}");
        let mut all = Vec::new();
        let length = theirs.read_to_end(&mut all).expect("what had come, and the end");
        assert!(length > 0 && length < 4 << 20);
        let error = outgoing.send(&[1], &[]).unwrap_err();
        assert!(matches!(error, LinkError::Gone), "{error}");
    }
}
