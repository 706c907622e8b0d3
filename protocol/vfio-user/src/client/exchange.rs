//! Requests and their answers, from many threads over one socket.
//!
//! # Who reads the socket
//!
//! The thread that calls. It sends its request itself and then, if nobody else does, *leads*: it
//! reads messages for all until its own answer has come. Answers to others it keeps for them and
//! wakes them; commands of the server it queues for the service thread. When it is done, it wakes
//! one of those that still wait to lead. So a call alone on its connection is one `send` and one
//! `recvmsg`, and no other thread has a part in it.
//!
//! While nobody calls, the *service* thread reads: the server may send commands at any time. But if
//! it waited at the socket all the time, the kernel would wake it for each answer. So:
//!
//! - It waits at the socket only when no request was made for a [`TICK`]. The first request after
//!   that gets it away from there, by an eventfd; requests that follow cost nothing.
//! - While requests are being made, it looks each tick whether there were any since the last one.
//! - If one request is without an answer for longer than a tick, its caller reads what comes, and the
//!   service sleeps until that is over.
//!
//! So a command of the server waits for a tick at most, and only in a gap between two calls.
//!
//! # Bounds
//!
//! The server's commands are queued up to [`QUEUE_BYTES`] and [`QUEUE_LENGTH`]. If there are more,
//! nobody reads until the service has caught up, not even a caller who waits for an answer: its
//! deadline holds.

use super::error::{ClientError, EndError};
use super::pending::{Answer, For, Pending, outcome};
use super::turn::Turn;
use crate::Deadline;
use crate::connection::{ReceiveError, Receiver, SendError, Sender};
use crate::framing::Message;
use crate::wire::{Command, Header, WireError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{Shutdown, shutdown};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long the service stays away from the socket after a request.
pub(super) const TICK: Duration = Duration::from_millis(1);
/// How many bytes of the server's commands may wait.
const QUEUE_BYTES: usize = 4 << 20;
/// How many of the server's commands may wait.
const QUEUE_LENGTH: usize = 256;
/// How many buffers are kept for answers that one thread receives for another.
const SPARE_BUFFERS: usize = 16;
/// Longer ones are not kept.
const SPARE_SIZE: usize = 64 << 10;

/// The shared part of a client.
#[derive(Debug)]
pub(super) struct Exchange {
    state: Mutex<State>,
    /// Locked by whoever leads, and by nobody else.
    receiver: Mutex<Receiver>,
    sender: Turn<Sender>,
    /// The same socket once more, to wait for it and to shut it down.
    socket: OwnedFd,
    /// Gets the service out of its sleep.
    service: Condvar,
    /// Gets the service away from the socket.
    away: OwnedFd,
}

#[derive(Debug)]
struct State {
    pending: Pending,
    /// How many callers wait for an answer.
    waiting: usize,
    /// Somebody reads.
    leading: bool,
    /// Nobody may read but the service, which has to catch up first.
    stalled: bool,
    /// How many requests there have been.
    requests: u64,
    service: Service,
    queue: VecDeque<Incoming>,
    queue_bytes: usize,
    spare: Vec<Vec<u8>>,
    ended: Option<Arc<EndError>>,
}

/// What the service thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// It works, or looks each tick.
    Active,
    /// It waits at the socket.
    AtSocket,
    /// It sleeps until the callers are done.
    Asleep,
}

/// A command of the server.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Its header.
    pub(super) header: Header,
    /// Its body.
    pub(super) body: Vec<u8>,
}

/// A request that was sent. Dropped without an answer, it is given up.
#[derive(Debug)]
pub(super) struct Ticket<'a> {
    exchange: &'a Exchange,
    id: u16,
    command: Command,
    over: bool,
}

impl Exchange {
    pub(super) fn new(receiver: Receiver, sender: Sender) -> io::Result<Self> {
        let state = State {
            pending: Pending::default(),
            waiting: 0,
            leading: false,
            // Commands may have come together with the answer to VERSION.
            stalled: true,
            requests: 0,
            service: Service::Active,
            queue: VecDeque::new(),
            queue_bytes: 0,
            spare: Vec::new(),
            ended: None,
        };
        let socket = receiver.as_fd().try_clone_to_owned()?;
        Ok(Self {
            state: Mutex::new(state),
            socket,
            receiver: Mutex::new(receiver),
            sender: Turn::new(sender),
            service: Condvar::new(),
            away: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request: what `body` appends, then `data`.
    pub(super) fn start(
        &self,
        command: Command,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: &mut Deadline,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Ticket<'_>, ClientError> {
        let mut state = self.lock();
        if let Some(end) = &state.ended {
            return Err(ClientError::Ended(Arc::clone(end)));
        }
        let id = state.pending.begin(command)?;
        state.requests = state.requests.wrapping_add(1);
        self.call_away(state);
        let mut ticket = Ticket { exchange: self, id, command, over: false };
        let header = Header::command(id, command);
        if let Err(error) = self.send(&header, command, data, fds, deadline, body) {
            self.lock().pending.remove(id);
            ticket.over = true;
            return Err(error);
        }
        Ok(ticket)
    }

    /// Sends a message; a failure that leaves the stream out of step ends the connection.
    pub(super) fn send(
        &self,
        header: &Header,
        command: Command,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: &mut Deadline,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), ClientError> {
        let send = |sender: &mut Sender, deadline: &mut Deadline| {
            sender.send_by(header, data, fds, deadline, body)
        };
        match self.sender.with(deadline, send) {
            Some(Ok(())) => Ok(()),
            None | Some(Err(SendError::Deadline)) => Err(ClientError::Deadline { command }),
            Some(Err(error)) => Err(ClientError::Ended(self.end(EndError::Send(error)))),
        }
    }

    /// Sends a command that wants no answer.
    pub(super) fn post(
        &self,
        command: Command,
        data: &[u8],
        deadline: &mut Deadline,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), ClientError> {
        if let Some(end) = &self.lock().ended {
            return Err(ClientError::Ended(Arc::clone(end)));
        }
        // Nobody waits for it, so its id does not matter.
        self.send(&Header::posted(0, command), command, data, &[], deadline, body)
    }

    /// Ends the connection for all, unless it has ended; returns the first reason.
    pub(super) fn end(&self, reason: EndError) -> Arc<EndError> {
        let mut state = self.lock();
        if let Some(first) = &state.ended {
            return Arc::clone(first);
        }
        let reason = Arc::new(reason);
        state.ended = Some(Arc::clone(&reason));
        state.pending.sleepers().for_each(thread::Thread::unpark);
        state.queue.clear();
        self.wake_service(state);
        // Whoever reads is woken; a peer that has closed already needs no telling.
        let _ = shutdown(&self.socket, Shutdown::Both);
        reason
    }

    /// Gets the service away from the socket, if it is there.
    fn call_away(&self, mut state: MutexGuard<'_, State>) {
        if state.service == Service::AtSocket {
            state.service = Service::Active;
            drop(state);
            // A counter that is full calls, too.
            let _ = rustix::io::write(&self.away, &1_u64.to_ne_bytes());
        }
    }

    /// Has the service look at what there is to do, wherever it is. It may be at the socket also
    /// while a caller reads: one that took longer than a tick from sending to reading.
    fn wake_service(&self, state: MutexGuard<'_, State>) {
        self.service.notify_all();
        self.call_away(state);
    }

    /// Hands a message over to whom it is for.
    fn dispatch(&self, message: Message<'_>) -> Result<(), EndError> {
        let Message { header, kind, body, fds } = message;
        let mut state = self.lock();
        let Some(outcome) = outcome(kind) else {
            let mut buffer = state.spare.pop().unwrap_or_default();
            buffer.extend_from_slice(body);
            state.queue_bytes = state.queue_bytes.saturating_add(body.len());
            state.queue.push_back(Incoming { header, body: buffer });
            state.stalled |= state.queue.len() >= QUEUE_LENGTH || state.queue_bytes >= QUEUE_BYTES;
            self.wake_service(state);
            return Ok(());
        };
        match state.pending.look_up(&header)? {
            For::GivenUp => {}
            For::Wanted => {
                let mut buffer = state.spare.pop().unwrap_or_default();
                buffer.extend_from_slice(body);
                let answer = Answer { outcome, body: buffer, fds };
                let sleeper = state.pending.answer(header.id, answer);
                drop(state);
                if let Some(thread) = sleeper {
                    thread.unpark();
                }
            }
        }
        Ok(())
    }

    /// Keeps a buffer for another answer.
    pub(super) fn recycle(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() <= SPARE_SIZE {
            buffer.clear();
            let mut state = self.lock();
            if state.spare.len() < SPARE_BUFFERS {
                state.spare.push(buffer);
            }
        }
    }

    fn is_stalled(&self) -> bool {
        self.lock().stalled
    }

    /// Hands over what has been read already. Not to be called but by whoever leads.
    fn dispatch_read_ahead(&self, receiver: &mut Receiver) -> Result<(), EndError> {
        while let Some(message) =
            receiver.read_ahead().map_err(|error| EndError::Receive(error.into()))?
        {
            self.dispatch(message)?;
            if self.is_stalled() {
                break;
            }
        }
        Ok(())
    }

    /// Somebody has stopped to read or to wait: wakes whoever goes on with it.
    fn hand_over(&self, state: MutexGuard<'_, State>) {
        let free = !state.leading && !state.stalled;
        let next = if free && state.waiting > 0 { state.pending.sleeper() } else { None };
        let asleep = state.service == Service::Asleep;
        let service = asleep && state.waiting == 0 || state.stalled && !state.leading;
        if service {
            self.wake_service(state);
        } else {
            drop(state);
        }
        if let Some(thread) = next {
            thread.unpark();
        }
    }

    /// What the service has to do next; `None` at the end. Reads the socket meanwhile if nobody else
    /// does.
    pub(super) fn next_command(&self, seen: &mut u64) -> Option<Incoming> {
        loop {
            let mut state = self.lock();
            if state.ended.is_some() {
                return None;
            }
            if let Some(incoming) = state.queue.pop_front() {
                state.queue_bytes = state.queue_bytes.saturating_sub(incoming.body.len());
                return Some(incoming);
            }
            let nobody_reads = !state.leading;
            if state.stalled && nobody_reads {
                // Caught up: what was read ahead comes first, and then whoever waits may read again.
                state.stalled = false;
                self.read_for_all(state);
            } else if *seen != state.requests {
                *seen = state.requests;
                let _ = self.service.wait_timeout(state, TICK);
            } else if state.waiting > 0 || !nobody_reads {
                state.service = Service::Asleep;
                let woken = self.service.wait(state);
                woken.unwrap_or_else(PoisonError::into_inner).service = Service::Active;
            } else {
                state.service = Service::AtSocket;
                drop(state);
                let readable = self.wait_at_socket();
                state = self.lock();
                state.service = Service::Active;
                if readable && !state.leading && !state.stalled && state.waiting == 0 {
                    self.read_for_all(state);
                }
            }
        }
    }

    /// Waits until something can be read or a request is made; whether it is the first.
    fn wait_at_socket(&self) -> bool {
        let mut fds =
            [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.away, PollFlags::IN)];
        // An interruption is like a request: it is looked at again.
        let _ = poll(&mut fds, None);
        if !fds[1].revents().is_empty() {
            let _ = rustix::io::read(&self.away, &mut [0; 8]);
        }
        !fds[0].revents().is_empty()
    }

    #[cfg(test)]
    pub(super) fn service_is_at_socket(&self) -> bool {
        self.lock().service == Service::AtSocket
    }

    /// Reads what there is, without waiting.
    fn read_for_all(&self, mut state: MutexGuard<'_, State>) {
        state.leading = true;
        drop(state);
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = loop {
            match receiver.try_receive() {
                Ok(Some(message)) => {
                    if let Err(error) = self.dispatch(message) {
                        break Err(error);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(EndError::Receive(error)),
            }
            if self.is_stalled() {
                break Ok(());
            }
        };
        drop(receiver);
        if let Err(error) = outcome {
            self.end(error);
        }
        let mut state = self.lock();
        state.leading = false;
        self.hand_over(state);
    }
}

impl Ticket<'_> {
    /// Waits for the answer, and takes it apart.
    pub(super) fn finish<R>(
        mut self,
        deadline: &mut Deadline,
        parse: impl FnOnce(&[u8], Vec<OwnedFd>) -> Result<R, WireError>,
    ) -> Result<R, ClientError> {
        let (exchange, command) = (self.exchange, self.command);
        let mut parse = Some(parse);
        let mut parse = |body: &[u8], fds: Vec<OwnedFd>| {
            let parse = parse.take();
            parse.map(|parse| parse(body, fds))
        };
        let mut state = exchange.lock();
        state.waiting += 1;
        let result = loop {
            if let Some(answer) = state.pending.take(self.id) {
                self.over = true;
                drop(state);
                let result = match answer.outcome {
                    Ok(()) => Ok(parse(&answer.body, answer.fds)),
                    Err(errno) => Err(errno),
                };
                exchange.recycle(answer.body);
                state = exchange.lock();
                break result;
            }
            if let Some(end) = &state.ended {
                let end = ClientError::Ended(Arc::clone(end));
                return self.leave(state, end);
            }
            if !state.leading && !state.stalled {
                state.leading = true;
                drop(state);
                let led = self.lead(deadline, &mut parse);
                state = exchange.lock();
                state.leading = false;
                match led {
                    Led::Answered(result) => {
                        self.over = true;
                        state.pending.remove(self.id);
                        break result;
                    }
                    Led::Stalled => exchange.service.notify_all(),
                    Led::Deadline => return self.leave(state, ClientError::Deadline { command }),
                    // The next round finds why.
                    Led::Ended => {}
                }
                continue;
            }
            let left = deadline.left();
            if left.is_some_and(|left| left.is_zero()) {
                return self.leave(state, ClientError::Deadline { command });
            }
            state.pending.set_sleeper(self.id, Some(thread::current()));
            drop(state);
            match left {
                Some(left) => thread::park_timeout(left),
                None => thread::park(),
            }
            state = exchange.lock();
            state.pending.set_sleeper(self.id, None);
        };
        state.waiting -= 1;
        exchange.hand_over(state);
        match result {
            Err(errno) => Err(ClientError::Refused { command, errno }),
            Ok(Some(Ok(result))) => Ok(result),
            Ok(Some(Err(source))) => Err(ClientError::Reply { command, source }),
            // An answer is taken apart once.
            Ok(None) => Err(ClientError::Deadline { command }),
        }
    }

    /// Waits no longer.
    fn leave<R>(
        mut self,
        mut state: MutexGuard<'_, State>,
        error: ClientError,
    ) -> Result<R, ClientError> {
        self.over = true;
        state.pending.give_up(self.id);
        state.waiting -= 1;
        self.exchange.hand_over(state);
        Err(error)
    }

    /// Reads for all, until the answer to this request has come.
    fn lead<R>(
        &self,
        deadline: &mut Deadline,
        parse: &mut impl FnMut(&[u8], Vec<OwnedFd>) -> Option<Result<R, WireError>>,
    ) -> Led<R> {
        let exchange = self.exchange;
        let mut receiver = exchange.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let message = match receiver.receive_by(deadline) {
                Ok(message) => message,
                Err(ReceiveError::Deadline) => return Led::Deadline,
                Err(error) => {
                    exchange.end(EndError::Receive(error));
                    return Led::Ended;
                }
            };
            let header = message.header;
            let mine = header.id == self.id && header.command == self.command.number();
            match (outcome(message.kind), mine) {
                (Some(outcome), true) => {
                    let result = outcome.map(|()| parse(message.body, message.fds));
                    // What came with it belongs to others.
                    if let Err(error) = exchange.dispatch_read_ahead(&mut receiver) {
                        exchange.end(error);
                    }
                    return Led::Answered(result);
                }
                _ => {
                    if let Err(error) = exchange.dispatch(message) {
                        exchange.end(error);
                        return Led::Ended;
                    }
                    if exchange.is_stalled() {
                        return Led::Stalled;
                    }
                    // A server that always has something else to say does not keep the caller.
                    if deadline.is_over() {
                        return Led::Deadline;
                    }
                }
            }
        }
    }
}

/// What came of reading.
enum Led<R> {
    /// The answer.
    Answered(Result<Option<Result<R, WireError>>, crate::wire::Errno>),
    /// The service has to catch up first.
    Stalled,
    Deadline,
    Ended,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.exchange.lock().pending.give_up(self.id);
        }
    }
}
