//! The device process's actor: control messages to lifecycle to device.
//!
//! One `State` has the [`Lifecycle`] and the control channel. Two come to it, in turns: the
//! thread that reads the control channel (`reader.rs`) with each packet, and the actor with all
//! else, as a `Message`: the client wants something, an arc has ended, a lease has run out.
//! Whichever it is, the lifecycle is fed and what that gives back is carried out, in order, before
//! the other one has its turn.
//!
//! The coordinator may change while all that goes on. Whoever takes over gets the device as it is;
//! the old connection ends unread, and what is still under way from it carries its id.
//!
//! The way of a command from its packet to its answer is short: if the device's hooks and the
//! drains have nothing to wait for, all of it happens on the reading thread, between one receive
//! and the next. If they have, the rest of the arc becomes a task of its own, and the device goes
//! on answering queries and sending heartbeats.
//!
//! The actor's mailbox is bounded by those who cast: the client's thread waits for its answer,
//! whoever listens for later coordinators waits for its own, and each timer, each arc, each
//! revocation and each declaration of RAM to be tracked casts once. A device that tells that it does
//! not work any more does so once, or once for each time that its client starts a ring.

#![forbid(unsafe_code)]

pub(crate) mod control;
pub(crate) mod introduction;
pub(crate) mod parts;
pub(crate) mod session;

mod arc;
mod budget;
mod carry;
#[cfg(feature = "fault-injection")]
mod faults;
#[cfg(fuzzing)]
pub mod fuzzing;
mod job;
mod news;
mod outbox;
mod reader;
#[cfg(any(test, fuzzing))]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod scripted;
mod stream;
mod stream_fd;
mod takeover;
pub(crate) mod transfer;
mod turn;
mod windows;

pub use outbox::OutboxError;
pub use parts::InfoError;

use crate::device::Device;
use crate::log;
use crate::memory::{RevokeError, Tracked};
use arc::{ArcOutcome, Spent};
use budget::Overtaken;
use control::{ConnectionId, Control, Newcomer};
use introduction::{Facts, Introduction};
use job::{Arrival, Job};
use news::News;
use parts::Parts;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use standstill_protocol::channel::{Received, RecvError};
use standstill_protocol::codec::Message as _;
use standstill_protocol::lifecycle::{ClientRequest, Effect, Event, ExitReason, Lifecycle, Master};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceEvent, Epoch, OrphanPolicy, Refusal, RefusalKind,
};
use standstill_protocol::migration::{Activity, MigrationFlags, MigrationState};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use stream::Saver;
use takeover::Listening;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use uuid::Uuid;

/// What the actor is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// An arc that could not be taken at once has ended; where it led to.
    ArcFinished(ArcOutcome, Activity),
    /// A reset has ended; what the device may do now.
    ResetFinished(Result<Activity, Refusal>, Spent),
    /// A state stream has ended, or a pass of one that goes on.
    StreamFinished(Result<Option<Box<Saver>>, Refusal>),
    /// A message that had to wait cannot be sent.
    SendFailed(ConnectionId, OutboxError),
    /// A revocation has ended: its number, and how many windows it has taken away.
    Revoked(ConnectionId, u64, Result<usize, RevokeError>),
    /// Every write that was begun before the declaration of that number has ended, or has not in
    /// time.
    Passed(ConnectionId, u64, bool),
    /// Somebody wants to take over: what is there to tell.
    Facts(oneshot::Sender<Facts>),
    /// Another coordinator has welcomed the device; answered when that was decided.
    TakeOver(Box<Newcomer>, oneshot::Sender<()>),
    /// A stop's lease has run out.
    LeaseExpired(Epoch),
    /// It is time for a heartbeat.
    HeartbeatDue(ConnectionId),
    /// The client wants something.
    Client(ClientRequest, ClientReply),
    /// The client asks where it has brought the device.
    ClientState(SyncSender<MigrationState>),
    /// A client came or went; answered when the coordinator was told.
    ClientPresent(bool, SyncSender<()>),
    /// The device, or a part of it, does not work any more, for this reason.
    DeviceFailed(String),
    /// Something of what a client has caused may be told now.
    NewsDue,
    /// The operator wants the process to end.
    Terminate,
}

impl Message {
    /// Tells the actor that a client has come or gone, and waits until it has taken it, at most that
    /// long: clients that come and go cannot fill its mailbox.
    pub(crate) fn tell_present(actor: &ActorRef<Self>, present: bool, patience: Duration) {
        let (told, wait) = sync_channel(1);
        let cast = actor.cast(Self::ClientPresent(present, told));
        if cast.is_err() || wait.recv_timeout(patience).is_err() {
            tracing::debug!(present, "the control side did not take the client's coming or going");
        }
    }
}

/// Where the answer to a client goes. It has room for one, and the client may have stopped
/// waiting.
pub(crate) type ClientReply = SyncSender<Result<MigrationState, Refusal>>;

/// Why a device process ends although nobody asked it to.
#[derive(Debug, Error)]
pub enum ActorError {
    /// The coordinator is gone and the policy says `exit`.
    #[error("the coordinator is gone")]
    Orphaned,
    /// The coordinator breaks the protocol.
    #[error("the coordinator breaks the protocol")]
    Protocol(#[source] RecvError),
    /// The coordinator sent what belongs to the greeting only.
    #[error("{0} after the greeting")]
    UnexpectedMessage(&'static str),
    /// Nothing reaches the coordinator any more.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// The control channel cannot be read, for want of a thread.
    #[error("no thread can be made that reads the control channel")]
    Reader(#[source] std::io::Error),
}

/// Why a device process ends in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Because the coordinator said so; it is killed after that long.
    Shutdown(Duration),
    /// Its state was handed over and its lease has run out.
    HandedOver,
    /// A signal asked for it.
    Terminated,
}

/// How it ended.
pub(crate) type Outcome = Result<Ended, ActorError>;

/// What the actor begins with.
#[derive(Debug)]
pub(crate) struct Arguments<D> {
    pub(crate) parts: Arc<Parts<D>>,
    pub(crate) migration: MigrationFlags,
    /// `None`: standalone.
    pub(crate) control: Option<(Newcomer, Arc<Introduction>)>,
    /// Told once, how it ended.
    pub(crate) ended: oneshot::Sender<Outcome>,
}

/// The device process's actor; see the [module](self).
#[derive(Debug)]
pub(crate) struct DeviceActor<D>(pub(crate) std::marker::PhantomData<fn() -> D>);

/// What is known, and who may touch it now: the actor, or the thread that reads the control
/// channel.
#[derive(Debug)]
pub(crate) struct Shared<D>(Mutex<State<D>>);

impl<D> Shared<D> {
    fn lock(&self) -> MutexGuard<'_, State<D>> {
        // A panic has aborted the process, but for tests.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of the device, its coordinator and what goes on between them.
#[derive(Debug)]
pub(crate) struct State<D> {
    /// Where this is kept, for the thread that reads the control channel.
    shared: Weak<Shared<D>>,
    myself: ActorRef<Message>,
    parts: Arc<Parts<D>>,
    lifecycle: Lifecycle,
    control: Option<Control>,
    /// The id of the latest connection.
    connections: ConnectionId,
    /// What later coordinators are told; `None` if there was none at first.
    introduction: Option<Arc<Introduction>>,
    listening: Option<Listening>,
    /// The machine of the first `Welcome`.
    machine: Option<Uuid>,
    orphan: OrphanPolicy,
    /// How many revocations, and declarations of RAM to be tracked, are under way.
    memory_waits: usize,
    /// The RAM whose writes are marked for the coordinator, while there is one.
    tracked: Vec<Tracked>,
    /// What gate, accesses and interrupts are set to.
    in_force: Activity,
    /// Room for what the lifecycle says, which nearly always is little; empty between two events.
    effects: Vec<Effect>,
    /// The latest command, until it begins.
    arrival: Option<Arrival>,
    /// The command that is being carried out.
    job: Option<Job>,
    /// Tells whoever works on what is being done that it was overtaken.
    overtaken: Arc<Overtaken>,
    client_reply: Option<ClientReply>,
    /// The coordinator's state stream, between two passes.
    saver: Option<Box<Saver>>,
    lease: Option<AbortHandle>,
    /// What a client has caused, on the way to the coordinator.
    news: News,
    shutdown_grace: Duration,
    /// `None` once the process is ending.
    ended: Option<oneshot::Sender<Outcome>>,
}

impl<D: Device> Actor for DeviceActor<D> {
    type Msg = Message;
    type State = Arc<Shared<D>>;
    type Arguments = Arguments<D>;

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        arguments: Arguments<D>,
    ) -> Result<Arc<Shared<D>>, ActorProcessingErr> {
        let Arguments { parts, migration, control, ended } = arguments;
        let state = |shared: &Weak<Shared<D>>| State {
            shared: Weak::clone(shared),
            myself,
            parts,
            lifecycle: Lifecycle::new(migration),
            control: None,
            connections: ConnectionId::default(),
            introduction: None,
            listening: None,
            machine: None,
            orphan: OrphanPolicy::Exit,
            memory_waits: 0,
            tracked: Vec::new(),
            in_force: Activity::Full,
            effects: Vec::new(),
            arrival: None,
            job: None,
            overtaken: Arc::default(),
            client_reply: None,
            saver: None,
            lease: None,
            news: News::new(Instant::now()),
            shutdown_grace: Duration::ZERO,
            ended: Some(ended),
        };
        let shared = Arc::new_cyclic(|shared| Shared(Mutex::new(state(shared))));
        if let Some((newcomer, introduction)) = control {
            let mut state = shared.lock();
            state.introduction = Some(introduction);
            if let Err(error) = state.join(newcomer) {
                state.end(Err(error));
            }
        }
        Ok(shared)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Message>,
        message: Message,
        shared: &mut Arc<Shared<D>>,
    ) -> Result<(), ActorProcessingErr> {
        let mut state = shared.lock();
        if state.ended.is_some() {
            state.handle(message);
        }
        Ok(())
    }
}

impl<D: Device> State<D> {
    fn handle(&mut self, message: Message) {
        match message {
            Message::ArcFinished(outcome, after) => {
                let event = self.arc_ended(outcome, after);
                self.feed(event);
            }
            Message::ResetFinished(result, spent) => {
                let event = self.reset_ended(result, spent);
                self.feed(event);
            }
            Message::StreamFinished(result) => {
                self.forget_overtaken_job();
                let result = result.map(|saver| self.saver = saver);
                self.feed(result.map_or_else(Event::StreamFailed, |()| Event::StreamDone));
            }
            Message::SendFailed(id, error) if self.is_present(id) => self.lose(error.into()),
            Message::SendFailed(_, error) => tracing::debug!(%error, "to a coordinator of before"),
            Message::Revoked(id, sequence, result) => self.revoked(id, sequence, result),
            Message::Passed(id, sequence, in_time) => self.passed(id, sequence, in_time),
            Message::Facts(asked) => {
                // Who asked may have been given up.
                let _ = asked.send(self.facts());
            }
            Message::TakeOver(newcomer, done) => {
                self.take_over(*newcomer);
                // As above.
                let _ = done.send(());
            }
            Message::LeaseExpired(epoch) => self.feed(Event::LeaseExpired(epoch)),
            Message::HeartbeatDue(id) => {
                if let Some(interval) = self.heartbeat_interval(id) {
                    self.heartbeat_due(id, interval);
                }
            }
            Message::Client(request, reply) => self.client(request, reply),
            Message::ClientState(reply) => {
                // The client may have stopped waiting.
                let _ = reply.try_send(self.lifecycle.client_state());
            }
            Message::ClientPresent(present, told) => {
                let event = if present {
                    DeviceEvent::ClientConnected
                } else {
                    DeviceEvent::ClientDisconnected
                };
                self.tell(event);
                // The transport may have stopped waiting.
                let _ = told.try_send(());
            }
            Message::DeviceFailed(why) => self.tell(DeviceEvent::Failed(why)),
            Message::NewsDue => self.news_due(),
            Message::Terminate => self.end(Ok(Ended::Terminated)),
        }
    }

    fn client(&mut self, request: ClientRequest, reply: ClientReply) {
        if self.client_reply.is_some() {
            let text = "an earlier request of the client is not answered yet".into();
            let _ = reply.try_send(Err(Refusal { kind: RefusalKind::Busy, text }));
            return;
        }
        self.client_reply = Some(reply);
        self.feed(Event::Client(request));
    }

    fn received(&mut self, id: ConnectionId, received: Received<CoordinatorMessage>) {
        let Received { message, fds } = received;
        match message {
            CoordinatorMessage::Command(command) => {
                #[cfg(feature = "fault-injection")]
                if self.at_receipt(&command) == faults::Taken::Not {
                    return;
                }
                let arrival = Arrival { command, at: Instant::now(), fd: fds.into_iter().next() };
                let mut effects = std::mem::take(&mut self.effects);
                self.step(Event::Command(command), &mut effects);
                if !matches!(effects.as_slice(), [Effect::Dropped(_)]) {
                    self.arrival = Some(arrival);
                }
                self.carry_out(effects);
            }
            message => self.received_other(id, message, fds),
        }
    }

    /// Takes what is no command. Apart, so that the code of a command stays together.
    #[cold]
    fn received_other(&mut self, id: ConnectionId, message: CoordinatorMessage, fds: Vec<OwnedFd>) {
        match message {
            // Taken before this is called.
            CoordinatorMessage::Command(_) => {}
            CoordinatorMessage::Abort(abort) => self.feed(Event::Abort(abort)),
            CoordinatorMessage::Query(query) => {
                #[cfg(feature = "fault-injection")]
                if self.at_query(query) == faults::Taken::Not {
                    return;
                }
                self.feed(Event::Query(query));
            }
            CoordinatorMessage::Memory(declaration) => self.declare(id, declaration, fds),
            CoordinatorMessage::Revoke(revocation) => self.revoke(id, revocation),
            CoordinatorMessage::Untrack(untrack) if untrack.term == self.lifecycle.term() => {
                self.untrack();
            }
            CoordinatorMessage::Untrack(untrack) => {
                tracing::debug!(term = untrack.term.0, "end of tracking of another term");
            }
            CoordinatorMessage::Shutdown(shutdown) => {
                #[cfg(feature = "fault-injection")]
                if self.at_shutdown(&shutdown) == faults::Taken::Not {
                    return;
                }
                self.shutdown_grace = Duration::from_nanos(shutdown.grace_ns);
                self.feed(Event::Shutdown(shutdown.term));
            }
            #[cfg(feature = "fault-injection")]
            CoordinatorMessage::Arm(arm) => self.arm(&arm, fds),
            // Of the greeting, or one that this device has not said that it takes.
            other => self.lose(ActorError::UnexpectedMessage(other.name())),
        }
    }

    /// Tells the lifecycle, and carries out what it says, and so on.
    fn feed(&mut self, event: Event) {
        let mut effects = std::mem::take(&mut self.effects);
        self.step(event, &mut effects);
        self.carry_out(effects);
    }

    /// Tells the lifecycle, and the state streams what that means for them.
    fn step(&mut self, event: Event, effects: &mut Vec<Effect>) {
        let before = (self.lifecycle.state(), self.lifecycle.client_state());
        self.lifecycle.step_into(event, effects);
        let (state, client) = (self.lifecycle.state(), self.lifecycle.client_state());
        if before.0 != state && !state.is_saving() {
            self.saver = None;
        }
        if before.1 != client && self.parts.client_stream.moved(client) {
            // Whoever has sent something to the device has sent it to what is replaced now.
            self.parts.edge.replaced();
        }
        self.parts.edge.set_stopped_by_client(self.lifecycle.is_stopped_by(Master::Client));
    }

    fn carry_out(&mut self, mut effects: Vec<Effect>) {
        // All that the lifecycle is told passes here.
        log::knows(self.lifecycle.term(), self.lifecycle.epoch());
        let mut next = 0;
        while let Some(effect) = effects.get_mut(next) {
            next += 1;
            // Whatever stays in its place is not looked at again.
            let effect = std::mem::replace(effect, Effect::Hurry);
            // What was done at once has an event of its own, after all that was asked for before.
            if let Some(event) = self.carry(effect) {
                self.step(event, &mut effects);
            }
            if self.ended.is_none() {
                return;
            }
        }
        effects.clear();
        self.effects = effects;
        if !self.lifecycle.has_lease() && !self.lifecycle.is_busy() {
            // Nobody promises any more that the client's wait will end.
            self.parts.edge.let_go();
        }
        debug_assert!(
            self.lifecycle.is_busy()
                || (self.in_force == self.lifecycle.activity() && self.parts.is_at(self.in_force)),
            "the lifecycle allows {}, in force is {}",
            self.lifecycle.activity(),
            self.in_force
        );
    }

    fn cast_after(&self, after: Duration, message: Message) -> AbortHandle {
        let myself = self.myself.clone();
        let task = tokio::spawn(async move {
            tokio::time::sleep(after).await;
            // If the actor is gone, so is the process.
            let _ = myself.cast(message);
        });
        task.abort_handle()
    }

    /// Ends the process; whatever else was to be done is not.
    fn end(&mut self, outcome: Outcome) {
        if let Some(ended) = self.ended.take() {
            // If nobody waits for it, the process is ending already.
            let _ = ended.send(outcome);
        }
    }

    fn exit(&mut self, reason: ExitReason) {
        self.end(match reason {
            ExitReason::Shutdown => Ok(Ended::Shutdown(self.shutdown_grace)),
            ExitReason::HandedOver => Ok(Ended::HandedOver),
            ExitReason::Orphaned => Err(ActorError::Orphaned),
        });
    }
}

#[cfg(test)]
mod tests;
