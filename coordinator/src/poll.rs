//! All control sockets behind one nested epoll fd, so that a burst of answers is one wake-up.
//!
//! The sockets are registered level-triggered in an epoll of their own; tokio watches only that
//! epoll's fd. A task waits for it and tells the coordinator actor, one message at a time: it goes
//! on waiting only when the actor says that it found nothing more to read. So the actor's mailbox
//! cannot be filled from outside.

use crate::coordinator::Message;
use crate::mailbox::Mailbox;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use standstill_protocol::channel::{CoordinatorEnd, Readiness};
use standstill_protocol::transition::ParticipantId;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// How many ready sockets one call of [`Poll::ready`] gives at most.
const BATCH: usize = 128;

/// The nested epoll and the task that watches it.
#[derive(Debug)]
pub(crate) struct Poll {
    epoll: Arc<OwnedFd>,
    drained: Arc<Notify>,
    /// `None` if a test does.
    watch: Option<JoinHandle<()>>,
}

impl Poll {
    /// Begins to watch; the actor gets [`Message::Readable`]. A test watches itself.
    pub(crate) fn new(actor: Mailbox) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let drained = Arc::new(Notify::new());
        #[cfg(any(test, fuzzing))]
        if matches!(actor, Mailbox::Script(_)) {
            return Ok(Self { epoll, drained, watch: None });
        }
        let readiness = Readiness::new(Arc::clone(&epoll))?;
        let actor_drained = Arc::clone(&drained);
        let watch = tokio::spawn(async move {
            while let Ok(guard) = readiness.readable().await {
                if actor.cast(Message::Readable).is_err() {
                    return;
                }
                actor_drained.notified().await;
                guard.clear();
            }
        });
        Ok(Self { epoll, drained, watch: Some(watch) })
    }

    /// Adds a participant's socket.
    pub(crate) fn add(&self, id: ParticipantId, socket: impl AsFd) -> io::Result<()> {
        let data = epoll::EventData::new_u64(u64::from(id.0));
        Ok(epoll::add(&self.epoll, socket, data, epoll::EventFlags::IN)?)
    }

    /// Takes a socket out; closing its last fd does the same.
    pub(crate) fn remove(&self, socket: impl AsFd) {
        // Fails only if it is not there, which is what is wanted.
        let _ = epoll::delete(&self.epoll, socket);
    }

    /// Whose sockets can be read now; empty if nobody's.
    pub(crate) fn ready(&self) -> Vec<ParticipantId> {
        let mut events = Vec::with_capacity(BATCH);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        // If it fails nothing was lost: the sockets are level-triggered.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&now));
        events
            .iter()
            .filter_map(|event| u32::try_from(event.data.u64()).ok())
            .map(ParticipantId)
            .collect()
    }

    /// Nothing more can be read: watch on.
    pub(crate) fn drained(&self) {
        self.drained.notify_one();
    }

    /// True once for each [`drained`](Self::drained): a test may watch on.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn was_drained(&self) -> bool {
        let mut drained = std::pin::pin!(self.drained.notified());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        drained.as_mut().poll(&mut context).is_ready()
    }

    /// Closes a socket on a thread of its own: in what nobody has read there may be fds, and the
    /// kernel waits for those that linger on the thread that closes the socket.
    ///
    /// Where a test watches, it is closed here and now.
    pub(crate) fn close_apart(&self, socket: CoordinatorEnd) {
        if self.watch.is_some() {
            close_apart(socket);
        }
    }
}

fn close_apart(socket: CoordinatorEnd) {
    let thread = std::thread::Builder::new().name("standstill-close".into());
    // Without a thread it is closed here and now.
    let _ = thread.spawn(move || drop(socket));
}

impl Drop for Poll {
    fn drop(&mut self) {
        self.watch.iter().for_each(JoinHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    #[test]
    fn nobody_waits_for_fds_that_linger_in_what_was_not_read() {
        let linger = Duration::from_secs(15);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _peer = listener.accept().unwrap();
        sockopt::set_socket_linger(&socket, Some(linger)).unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}

        let (ours, theirs) = CoordinatorEnd::pair().unwrap();
        let fds = [socket.as_fd()];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&theirs, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        drop((socket, theirs));
        let began = Instant::now();
        close_apart(ours);
        assert!(began.elapsed() < linger / 2, "{:?}", began.elapsed());
    }
}
