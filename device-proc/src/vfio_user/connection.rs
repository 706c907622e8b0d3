//! Serving one client: how the transport's thread waits, and what it does at the edge of a stop.
//!
//! # Waiting without cost
//!
//! A register access should cost the client no more than the bytes on their way: one receive, one
//! send, nothing before or between. So as long as messages keep coming the thread waits in the
//! receive itself (*hot*), with a time-out of [`HOT`]. When that runs out it waits in poll(2)
//! (*idle*), which takes nothing out of the socket: then the control thread can see without waking
//! anybody that nothing is under way (see the [edge](crate::edge)), and can wake this thread if it
//! has to. From the first step of a stop on the thread is idle whenever it waits.
//!
//! # Requests of this end
//!
//! The device's threads may wait for the client's replies to what they have asked it, and what they
//! have in flight may be what a command of the client waits for. So while the thread carries out a
//! command that waits for others, it goes on reading: replies go to whom they are for, commands wait
//! for their turn.
//!
//! # The edge
//!
//! Between two messages the thread looks whether the control side waits for it. If so it executes
//! what has come until then: one snapshot of what it has read and what is in the socket. While a
//! lease holds the socket it reads nothing, and a request that only the control side can answer is put
//! off until the start, with all that is behind it. A reply for which the client makes no room keeps
//! no stop waiting.
//!
//! # Beyond the bound
//!
//! Posted writes that come while the device is stopped are [kept](super::kept), up to a bound. What is
//! done about the first one beyond it depends on who could start the device:
//!
//! | the device is stopped by | |
//! |---|---|
//! | the client itself, in band | its connection ends. To wait would be for ever: what starts the device again can only be behind that write, in the same socket |
//! | the coordinator alone | it is put off until the start, with all that is behind it, as long as the client is there |
//!
//! While it is put off the thread waits for the client's end, too: somebody may wait to come after it.
//! What a client has left that has gone cannot become more; it is read to its end and kept beyond the
//! bound, but not without another one: such clients may come again and again. What was kept is never
//! touched by any of that. Whatever is no posted write is served all the time.
//!
//! # The end
//!
//! A client that has gone reads no replies, but what it had sent before that counts.

use super::backlog::{Backlog, Waiting, refused_size};
use super::doorbells::Doorbells;
use super::endpoint::{Endpoint, LONGEST_WAIT};
use super::kept::{Kept, LEFT, MOST};
use super::link::{Came, Incoming, LinkError, Outgoing, Wait};
use super::requests::Requests;
use super::session::{Later, Next, Reply, Session, Work, limits};
use crate::device::Device;
use crate::edge::Station;
use crate::memory::MessageLink;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use standstill_vfio_user::framing::FramingError;
use standstill_vfio_user::wire::Kind;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long the thread waits in the receive itself for the next message. The kernel's clock may
/// make it a few milliseconds more.
const HOT: Duration = Duration::from_millis(1);

/// Why a client is served no longer.
#[derive(Debug, Error)]
pub(super) enum Ended {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Framing(#[from] FramingError),
    /// It was told so.
    #[error("no version was agreed on")]
    NoVersion,
    /// What it has posted to a stopped device is more than is kept.
    #[error("its device is stopped, and it has posted more writes to it than are kept: {MOST}")]
    TooManyPosted,
    /// It has gone, and what it had posted to a stopped device is more than is kept.
    #[error("it has left more posted writes to a stopped device than are kept: {LEFT}")]
    TooManyLeft,
}

/// What is to be done before anything else, as soon as that is possible.
enum PutOff {
    /// When no lease holds the socket.
    Later(Later),
    /// A posted write, when there is room for it, or the device runs.
    Write(Waiting),
}

/// How long the thread rests where it cannot wait.
const REST: Duration = Duration::from_millis(100);

/// How long is worked on what a client had sent before it went: others wait for this thread.
const LAST_PATIENCE: Duration = LONGEST_WAIT;

/// poll(2) fails where the process may have fewer fds than are polled, and does so at once.
pub(super) fn rest_after_error() {
    std::thread::park_timeout(REST);
}

/// One client that is served.
pub(super) struct Connection<'a, D> {
    endpoint: &'a Endpoint<D>,
    station: &'a Station,
    kept: &'a mut Kept,
    session: Session<'a, D>,
    incoming: Incoming,
    outgoing: Arc<Outgoing>,
    /// What the device asks of the client, once the versions are agreed on.
    requests: Option<(Arc<Requests>, MessageLink)>,
    /// What was read while another command was carried out.
    backlog: Backlog,
    put_off: Option<PutOff>,
    /// Something was put off when the client was seen to have gone: it sends nothing more.
    has_left: bool,
    /// Since when it is known that the client has gone and reads no replies.
    gone_since: Option<Instant>,
    reply: Reply<'a>,
    /// How many bytes of messages were taken.
    taken: u64,
}

impl<'a, D: Device> Connection<'a, D> {
    pub(super) fn new(
        endpoint: &'a Endpoint<D>,
        station: &'a Arc<Station>,
        doorbells: Option<&'a Doorbells>,
        kept: &'a mut Kept,
        client: Arc<OwnedFd>,
    ) -> Result<Self, Ended> {
        Ok(Self {
            endpoint,
            station,
            kept,
            session: Session::new(endpoint, doorbells),
            incoming: Incoming::new(Arc::clone(&client), limits(), HOT)?,
            outgoing: Arc::new(Outgoing::new(client, Arc::clone(station))),
            requests: None,
            backlog: Backlog::default(),
            put_off: None,
            has_left: false,
            gone_since: None,
            reply: Reply::default(),
            taken: 0,
        })
    }

    /// Serves it until it goes, or has to.
    pub(super) fn run(&mut self) -> Result<(), Ended> {
        let mut hot = true;
        loop {
            self.attend()?;
            if self.take_one()? {
                continue;
            }
            if hot && !self.endpoint.parts().gate.peer().is_closed() {
                if self.receive(Wait::Short)? == Came::Some {
                    continue;
                }
                // The control side may have asked meanwhile.
                hot = false;
                continue;
            }
            // What is found in the socket is taken out when it is certain that it may be.
            hot = self.wait_idle() && !self.is_held_back() && self.receive(Wait::No)? == Came::Some;
        }
    }

    /// Waits in poll. True if something is in the socket.
    fn wait_idle(&mut self) -> bool {
        if self.kept.is_empty() {
            self.station.idle();
        } else {
            self.station.keep();
            if !self.endpoint.parts().accesses.is_closed() {
                return false;
            }
        }
        let readable = self.poll(Some(PollFlags::IN));
        self.station.busy();
        readable
    }

    /// Waits for the alarm, and for the socket too if something there counts. True if that is so.
    fn poll(&self, of_socket: Option<PollFlags>) -> bool {
        let (alarm, socket) = (self.station.alarm(), self.incoming.socket());
        let flags = of_socket.unwrap_or(PollFlags::empty());
        let mut both = [PollFd::new(&alarm, PollFlags::IN), PollFd::new(&socket, flags)];
        let polled = if of_socket.is_some() { &mut both[..] } else { &mut both[..1] };
        match poll(polled, None::<&Timespec>) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(%error, "waiting for a client's message");
                rest_after_error();
                // A look for what can be read finds out; nothing else is certain.
                return of_socket == Some(PollFlags::IN);
            }
        }
        let [alarm, socket] = both.map(|fd| !fd.revents().is_empty());
        if alarm {
            self.station.looked_up();
        }
        socket
    }

    /// Whether nothing may be read now.
    fn is_held_back(&self) -> bool {
        self.endpoint.parts().edge.is_held() || self.is_full()
    }

    /// Whether a posted write waits for the start.
    fn is_full(&self) -> bool {
        let waits = matches!(self.put_off, Some(PutOff::Write(_))) && !self.has_left;
        waits && self.endpoint.parts().accesses.is_closed()
    }

    /// Does what the control side waits for, and waits while it says so.
    #[inline]
    fn attend(&mut self) -> Result<(), Ended> {
        while self.station.request().is_some() || self.is_held_back() || !self.kept.is_empty() {
            if !self.attend_slowly()? {
                break;
            }
        }
        Ok(())
    }

    /// False if there is nothing to be done now but to go on.
    #[cold]
    fn attend_slowly(&mut self) -> Result<bool, Ended> {
        if !self.kept.is_empty()
            && let Some(permit) = self.endpoint.enter()
        {
            self.kept.carry_out(self.endpoint, &permit);
        }
        if let Some(request) = self.station.request() {
            self.drain(request)?;
            self.station.done(request);
            return Ok(true);
        }
        if !self.is_held_back() {
            return Ok(false);
        }
        self.station.keep();
        if self.is_held_back() && self.station.request().is_none() {
            // A lease ends soon, and until then nothing is taken out of the socket whoever has gone.
            let is_leased = self.endpoint.parts().edge.is_held();
            self.has_left |= self.poll((!is_leased).then_some(PollFlags::RDHUP));
            if let Some(since) = &mut self.gone_since {
                // Nobody can be served meanwhile anyway.
                *since = Instant::now();
            }
        }
        Ok(true)
    }

    /// Executes what has come until now, or until nobody waits for that any more.
    fn drain(&mut self, request: u64) -> Result<(), Ended> {
        let there = self.incoming.snapshot().saturating_add(self.backlog.bytes());
        let end = self.taken.saturating_add(there);
        while (self.taken < end || self.put_off.is_some()) && !self.station.is_done(request) {
            // The rest of a message that is not whole yet comes after this.
            if !self.take_one()? && self.receive(Wait::No)? == Came::Nothing {
                break;
            }
            if self.put_off.is_some() {
                break;
            }
        }
        Ok(())
    }

    fn receive(&mut self, wait: Wait) -> Result<Came, Ended> {
        match self.incoming.receive(wait) {
            Err(LinkError::Gone) => {
                self.incoming.framer.finish()?;
                Err(LinkError::Gone.into())
            }
            received => Ok(received?),
        }
    }

    /// Takes one whole message, if there is one, and answers it.
    #[inline]
    fn take_one(&mut self) -> Result<bool, Ended> {
        if self.put_off.is_some() {
            self.take_put_off()?;
            return Ok(true);
        }
        if self.gone_since.is_some_and(|since| since.elapsed() >= LAST_PATIENCE) {
            return Err(LinkError::Gone.into());
        }
        if !self.backlog.is_empty() {
            return self.take_from_backlog();
        }
        let next = match self.incoming.framer.next_message() {
            Ok(None) => return Ok(false),
            Ok(Some(message)) => {
                self.taken += u64::from(message.header.size);
                if let Some((requests, _)) = &self.requests
                    && matches!(message.kind, Kind::Done | Kind::Refused(_))
                {
                    requests.answer(&message.header, message.kind, message.body);
                    return Ok(true);
                }
                if self.kept.is_full() {
                    let waiting = Waiting::new(message);
                    self.take_waiting(waiting)?;
                    return Ok(true);
                }
                self.session.take(message, self.kept, &mut self.reply)
            }
            Err(error) => {
                self.refuse(error)?;
                return Ok(true);
            }
        };
        self.go_on(next)?;
        Ok(true)
    }

    #[cold]
    fn take_put_off(&mut self) -> Result<(), Ended> {
        match self.put_off.take() {
            None => Ok(()),
            Some(PutOff::Later(later)) => self.do_later(later),
            Some(PutOff::Write(write)) => self.take_waiting(write),
        }
    }

    #[cold]
    fn take_from_backlog(&mut self) -> Result<bool, Ended> {
        match self.backlog.pop() {
            None => return Ok(false),
            Some(Err(error)) => self.refuse(error)?,
            Some(Ok(waiting)) => {
                self.taken += waiting.size();
                self.take_waiting(waiting)?;
            }
        }
        Ok(true)
    }

    /// Takes a message, unless it is a posted write for which there is no room.
    #[cold]
    fn take_waiting(&mut self, mut waiting: Waiting) -> Result<(), Ended> {
        if waiting.is_posted_write() && !self.has_room()? {
            self.put_off = Some(PutOff::Write(waiting));
            return Ok(());
        }
        let next = self.session.take(waiting.message(), self.kept, &mut self.reply);
        self.go_on(next)
    }

    /// Whether posted writes can be taken: kept or carried out. An error if waiting does not help.
    fn has_room(&mut self) -> Result<bool, Ended> {
        let parts = self.endpoint.parts();
        // Whoever stops the device again waits for this thread before.
        if !parts.accesses.is_closed() {
            return Ok(true);
        }
        let bound = if self.has_left { LEFT } else { MOST };
        if self.kept.has_room(bound, parts.edge.contents()) {
            return Ok(true);
        }
        match (self.has_left, parts.edge.is_stopped_by_client()) {
            (true, _) => Err(Ended::TooManyLeft),
            (false, true) => Err(Ended::TooManyPosted),
            (false, false) => Ok(false),
        }
    }

    #[inline]
    fn go_on(&mut self, next: Next) -> Result<(), Ended> {
        match next {
            Next::Reply => self.send()?,
            Next::Agreed(limit) => {
                self.send()?;
                let requests = Arc::new(Requests::new(Arc::clone(&self.outgoing), limit));
                let client = Arc::clone(&requests);
                let link = self.endpoint.parts().memory.connect(client);
                self.requests = Some((requests, link));
            }
            Next::Close => {
                self.send()?;
                return Err(Ended::NoVersion);
            }
            Next::Later(later) => self.do_later(later)?,
            // Nothing was asked.
            Next::Answer => tracing::debug!("a reply that nobody waits for"),
        }
        Ok(())
    }

    /// Answers a message that is none.
    #[cold]
    fn refuse(&mut self, error: FramingError) -> Result<(), Ended> {
        if let Some(header) = error.answer() {
            let mut bytes = Vec::new();
            header.encode(&mut bytes);
            let sent = match self.gone_since {
                None => self.outgoing.send(&bytes, &[]),
                Some(_) => Ok(()),
            };
            self.after_sending(sent)?;
        }
        if !error.is_in_step() {
            return Err(error.into());
        }
        tracing::debug!(%error, "a client's message");
        self.taken += refused_size(&error);
        Ok(())
    }

    #[inline]
    fn send(&mut self) -> Result<(), Ended> {
        if self.reply.bytes().is_empty() || self.gone_since.is_some() {
            return Ok(());
        }
        let sent = self.outgoing.send(self.reply.bytes(), &self.reply.fds());
        self.after_sending(sent)
    }

    #[inline]
    fn after_sending(&mut self, sent: Result<(), LinkError>) -> Result<(), Ended> {
        match sent {
            Err(LinkError::Gone) => {
                // What it had sent before still counts, and is followed by the end of the stream.
                self.gone_since = Some(Instant::now());
                Ok(())
            }
            sent => Ok(sent?),
        }
    }

    fn do_later(&mut self, later: Later) -> Result<(), Ended> {
        let edge = &self.endpoint.parts().edge;
        let holds = edge.holds();
        if later.work.asks() {
            // It waits for the control side, which must not wait for it.
            self.station.waiting();
            if edge.is_held() {
                self.station.busy();
                self.put_off = Some(PutOff::Later(later));
                return Ok(());
            }
        }
        let resets = matches!(later.work, Work::Reset);
        if resets {
            self.set_resetting(true);
        }
        let done = if self.session.has_windows_without_file {
            self.carry_out_and_listen(&later.work)
        } else {
            Ok(Session::carry_out(self.endpoint, &later.work))
        };
        self.station.busy();
        if resets {
            self.set_resetting(false);
        }
        let done = done?;
        if resets && done == Err(Errno::INVAL) && edge.holds() != holds {
            // A stop with a lease was there before it, and nothing has changed.
            self.put_off = Some(PutOff::Later(later));
            return Ok(());
        }
        self.session.finish(&later, done, &mut self.reply);
        self.send()
    }

    fn set_resetting(&self, resetting: bool) {
        if let Some((requests, _)) = &self.requests
            && self.session.has_windows_without_file
        {
            requests.set_resetting(resetting);
        }
    }

    /// Has a thread do it, and goes on reading meanwhile.
    fn carry_out_and_listen(&mut self, work: &Work) -> Result<Result<Vec<u64>, Errno>, Ended> {
        let endpoint = self.endpoint;
        let Ok(end) = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK) else {
            // Without fds nobody listens; whoever waits for a reply gives up in time.
            return Ok(Session::carry_out(endpoint, work));
        };
        std::thread::scope(|scope| {
            let worker = Builder::new().name("vfio-user work".into()).spawn_scoped(scope, || {
                let done = Session::carry_out(endpoint, work);
                // One write always fits.
                let _ = rustix::io::write(&end, &1_u64.to_ne_bytes());
                done
            });
            let Ok(worker) = worker else {
                return Ok(Session::carry_out(endpoint, work));
            };
            let listened = self.listen_until(&end);
            if let (Err(_), Some((requests, _))) = (&listened, &self.requests) {
                requests.gone();
            }
            // A panic has ended the process.
            let done = worker.join().unwrap_or(Err(Errno::IO));
            listened.map(|()| done)
        })
    }

    /// Reads until something has ended, or the client has gone. Replies go to whom they are for,
    /// commands to the backlog.
    fn listen_until(&mut self, end: &OwnedFd) -> Result<(), Ended> {
        // What was read together with the command.
        self.sort();
        let mut is_gone = false;
        loop {
            let socket = self.incoming.socket();
            let mut both = [PollFd::new(end, PollFlags::IN), PollFd::new(&socket, PollFlags::IN)];
            let only_end = is_gone || self.backlog.is_full();
            let polled = if only_end { &mut both[..1] } else { &mut both[..] };
            match poll(polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "listening to a client");
                    rest_after_error();
                }
            }
            let [ended, readable] = both.map(|fd| !fd.revents().is_empty());
            if ended {
                return Ok(());
            }
            if !readable {
                continue;
            }
            match self.incoming.receive(Wait::No) {
                Ok(Came::Some) => self.sort(),
                Ok(Came::Nothing) => {}
                Err(LinkError::Gone) => {
                    // Found again when what has come before it is done.
                    is_gone = true;
                    if let Some((requests, _)) = &self.requests {
                        requests.gone();
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn sort(&mut self) {
        while !self.backlog.is_full() {
            match self.incoming.framer.next_message() {
                Ok(None) => return,
                Ok(Some(message)) => match (&self.requests, message.kind) {
                    (Some((requests, _)), Kind::Done | Kind::Refused(_)) => {
                        self.taken += u64::from(message.header.size);
                        requests.answer(&message.header, message.kind, message.body);
                    }
                    _ => self.backlog.push(Ok(Waiting::new(message))),
                },
                Err(error) => self.backlog.push(Err(error)),
            }
        }
    }
}

impl<D> Drop for Connection<'_, D> {
    fn drop(&mut self) {
        if let Some((requests, _)) = &self.requests {
            requests.gone();
        }
    }
}
