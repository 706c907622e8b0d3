//! The device process's actor: control messages to lifecycle to device.
//!
//! The actor owns the [`Lifecycle`] and the control channel. Everything that wants something of
//! the device comes to it as a `Message`: the control channel has packets, the client wants
//! something, an arc has ended, a lease has run out. It feeds the lifecycle and carries out, in
//! order, what that gives back.
//!
//! The way of a command from its packet to its answer is short: if the device's hooks and the
//! drains have nothing to wait for, all of it happens in one call of the actor, on its thread. If
//! they have, the rest of the arc becomes a task of its own and the actor goes on answering
//! queries and sending heartbeats.
//!
//! Its mailbox is bounded by those who cast: the control channel's watcher casts one message and
//! waits until it was handled, the client's thread waits for its answer, and each timer and each
//! arc casts once.

#![forbid(unsafe_code)]

pub(crate) mod parts;

mod arc;
mod budget;
mod carry;
mod job;
mod outbox;
#[cfg(test)]
mod scripted;
mod stream;
mod stream_fd;
mod watch;

pub use outbox::OutboxError;
pub use parts::InfoError;

use crate::device::Device;
use crate::log;
use arc::{ArcOutcome, Spent};
use budget::Overtaken;
use job::{Arrival, Job};
use outbox::Outbox;
use parts::Parts;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use standstill_protocol::channel::{DeviceEnd, Received, RecvError, SendError};
use standstill_protocol::lifecycle::{ClientRequest, Effect, Event, ExitReason, Lifecycle};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceEvent, DeviceMessage, Epoch, Heartbeat, MAX_TEXT, MemoryAccepted,
    MemoryDeclaration, Refusal, RefusalKind, Welcome,
};
use standstill_protocol::migration::{Activity, MigrationFlags, MigrationState};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use watch::Watch;

/// The most packets that are handled before others get their turn.
const MOST_PACKETS: usize = 64;

/// What the actor is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// The control channel has packets.
    Readable,
    /// An arc that could not be taken at once has ended; where it led to.
    ArcFinished(ArcOutcome, Activity),
    /// A reset has ended; what the device may do now.
    ResetFinished(Result<Activity, Refusal>, Spent),
    /// A state stream has ended.
    StreamFinished(Result<(), Refusal>),
    /// A message that had to wait cannot be sent.
    SendFailed(OutboxError),
    /// A stop's lease has run out.
    LeaseExpired(Epoch),
    /// It is time for a heartbeat.
    HeartbeatDue,
    /// The client wants something.
    Client(ClientRequest, ClientReply),
    /// A client came or went; answered when the coordinator was told.
    ClientPresent(bool, SyncSender<()>),
    /// The operator wants the process to end.
    Terminate,
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
    /// The control channel cannot be watched.
    #[error("the control channel cannot be watched")]
    Watch(#[source] std::io::Error),
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
    pub(crate) control: Option<(Arc<DeviceEnd>, Welcome)>,
    /// Told once, how it ended.
    pub(crate) ended: oneshot::Sender<Outcome>,
}

/// The device process's actor; see the [module](self).
#[derive(Debug)]
pub(crate) struct DeviceActor<D>(pub(crate) std::marker::PhantomData<fn() -> D>);

/// The connection to the coordinator.
#[derive(Debug)]
struct Control {
    channel: Arc<DeviceEnd>,
    outbox: Outbox,
    watch: Watch,
}

/// What the actor knows.
#[derive(Debug)]
pub(crate) struct State<D> {
    myself: ActorRef<Message>,
    parts: Arc<Parts<D>>,
    lifecycle: Lifecycle,
    control: Option<Control>,
    /// What gate, accesses and interrupts are set to.
    in_force: Activity,
    /// The latest command, until it begins.
    arrival: Option<Arrival>,
    /// The command that is being carried out.
    job: Option<Job>,
    /// Tells whoever works on what is being done that it was overtaken.
    overtaken: Arc<Overtaken>,
    client_reply: Option<ClientReply>,
    lease: Option<AbortHandle>,
    heartbeat: Option<Duration>,
    sequence: u64,
    shutdown_grace: Duration,
    /// `None` once the process is ending.
    ended: Option<oneshot::Sender<Outcome>>,
}

impl<D: Device> Actor for DeviceActor<D> {
    type Msg = Message;
    type State = State<D>;
    type Arguments = Arguments<D>;

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        arguments: Arguments<D>,
    ) -> Result<State<D>, ActorProcessingErr> {
        let Arguments { parts, migration, control, ended } = arguments;
        let mut state = State {
            myself,
            parts,
            lifecycle: Lifecycle::new(migration),
            control: None,
            in_force: Activity::Full,
            arrival: None,
            job: None,
            overtaken: Arc::default(),
            client_reply: None,
            lease: None,
            heartbeat: None,
            sequence: 0,
            shutdown_grace: Duration::ZERO,
            ended: Some(ended),
        };
        if let Some((channel, welcome)) = control {
            state.join(channel, &welcome).await;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Message>,
        message: Message,
        state: &mut State<D>,
    ) -> Result<(), ActorProcessingErr> {
        if state.ended.is_some() {
            state.handle(message).await;
        }
        Ok(())
    }
}

impl<D: Device> State<D> {
    /// A coordinator has accepted this device.
    async fn join(&mut self, channel: Arc<DeviceEnd>, welcome: &Welcome) {
        let watch = match Watch::start(Arc::clone(&channel), self.myself.clone()) {
            Ok(watch) => watch,
            Err(error) => return self.end(Err(ActorError::Watch(error))),
        };
        let outbox = Outbox::new(Arc::clone(&channel));
        self.control = Some(Control { channel, outbox, watch });
        let Welcome { term, epoch, orphan, .. } = *welcome;
        self.feed(Event::Welcome { term, epoch, orphan }).await;
        if welcome.heartbeat_ns > 0 {
            self.heartbeat = Some(Duration::from_nanos(welcome.heartbeat_ns));
            self.heartbeat_due();
        }
    }

    async fn handle(&mut self, message: Message) {
        match message {
            Message::Readable => self.receive().await,
            Message::ArcFinished(outcome, after) => {
                let event = self.arc_ended(outcome, after);
                self.feed(event).await;
            }
            Message::ResetFinished(result, spent) => {
                let event = self.reset_ended(result, spent);
                self.feed(event).await;
            }
            Message::StreamFinished(result) => {
                self.forget_overtaken_job();
                self.feed(result.map_or_else(Event::StreamFailed, |()| Event::StreamDone)).await;
            }
            Message::SendFailed(error) => self.end(Err(error.into())),
            Message::LeaseExpired(epoch) => self.feed(Event::LeaseExpired(epoch)).await,
            Message::HeartbeatDue => self.heartbeat_due(),
            Message::Client(request, reply) => self.client(request, reply).await,
            Message::ClientPresent(present, told) => {
                let event = if present {
                    DeviceEvent::ClientConnected
                } else {
                    DeviceEvent::ClientDisconnected
                };
                self.send(DeviceMessage::Event(event));
                // The transport may have stopped waiting.
                let _ = told.try_send(());
            }
            Message::Terminate => self.end(Ok(Ended::Terminated)),
        }
    }

    async fn client(&mut self, request: ClientRequest, reply: ClientReply) {
        if self.client_reply.is_some() {
            let text = "an earlier request of the client is not answered yet".into();
            let _ = reply.try_send(Err(Refusal { kind: RefusalKind::Busy, text }));
            return;
        }
        self.client_reply = Some(reply);
        self.feed(Event::Client(request)).await;
    }

    /// Reads the control channel until it is empty.
    async fn receive(&mut self) {
        for _ in 0..MOST_PACKETS {
            let Some(control) = &self.control else { return };
            match control.channel.try_recv() {
                Ok(Some(received)) => self.received(received).await,
                Ok(None) => return control.watch.handled(true),
                Err(RecvError::Disconnected) => {
                    tracing::warn!("the coordinator has closed the control channel");
                    // Its watcher ends with it.
                    self.control = None;
                    return self.feed(Event::Disconnected).await;
                }
                Err(error) => return self.end(Err(ActorError::Protocol(error))),
            }
            if self.ended.is_none() {
                return;
            }
        }
        if let Some(control) = &self.control {
            control.watch.handled(false);
        }
    }

    async fn received(&mut self, received: Received<CoordinatorMessage>) {
        let Received { message, fds } = received;
        match message {
            CoordinatorMessage::Command(command) => {
                let arrival = Arrival { command, at: Instant::now(), fd: fds.into_iter().next() };
                let effects = self.lifecycle.step(Event::Command(command));
                if !matches!(effects.as_slice(), [Effect::Dropped(_)]) {
                    self.arrival = Some(arrival);
                }
                self.carry_out(effects).await;
            }
            CoordinatorMessage::Abort(abort) => self.feed(Event::Abort(abort)).await,
            CoordinatorMessage::Query(query) => self.feed(Event::Query(query)).await,
            CoordinatorMessage::Memory(declaration) => self.declare(declaration, fds),
            // Not answered: a coordinator that revokes learns that it was not done.
            CoordinatorMessage::Revoke(_) => tracing::warn!("revocations are not supported"),
            CoordinatorMessage::Shutdown(shutdown) => {
                self.shutdown_grace = Duration::from_nanos(shutdown.grace_ns);
                self.feed(Event::Shutdown(shutdown.term)).await;
            }
            CoordinatorMessage::Welcome(_) => {
                self.end(Err(ActorError::UnexpectedMessage("Welcome")));
            }
            CoordinatorMessage::Reject(_) => {
                self.end(Err(ActorError::UnexpectedMessage("Reject")));
            }
        }
    }

    fn declare(&mut self, declaration: MemoryDeclaration, fds: Vec<OwnedFd>) {
        if declaration.term != self.lifecycle.term() {
            tracing::debug!(term = declaration.term.0, "memory declaration of another term");
            return;
        }
        for fd in fds {
            if let Err(error) = self.parts.memory.declare_ram(fd) {
                // Not accepted, so not answered; what it is behind counts as a peer's.
                tracing::error!(%error, sequence = declaration.sequence, "memory declaration");
                self.send(DeviceMessage::Event(DeviceEvent::Failed(error.to_string())));
                return;
            }
        }
        let accepted = MemoryAccepted { sequence: declaration.sequence };
        self.send(DeviceMessage::MemoryAccepted(accepted));
    }

    /// Tells the lifecycle, and carries out what it says, and so on.
    async fn feed(&mut self, event: Event) {
        let effects = self.lifecycle.step(event);
        self.carry_out(effects).await;
    }

    async fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            // What was done at once has an event of its own, after all that was asked for before.
            if let Some(event) = self.carry(effect).await {
                effects.extend(self.lifecycle.step(event));
            }
            if self.ended.is_none() {
                return;
            }
        }
        debug_assert!(
            self.lifecycle.is_busy()
                || (self.in_force == self.lifecycle.activity() && self.parts.is_at(self.in_force)),
            "the lifecycle allows {}, in force is {}",
            self.lifecycle.activity(),
            self.in_force
        );
    }

    /// Sends to the coordinator, if there is one; never lost, never waited for.
    fn send(&mut self, message: DeviceMessage) {
        let Some(control) = &mut self.control else {
            return;
        };
        let myself = self.myself.clone();
        let failed = move |error| {
            // If the actor is gone, so is the process.
            let _ = myself.cast(Message::SendFailed(error));
        };
        match control.outbox.send(clipped(message), failed) {
            Ok(()) => {}
            // What it had sent before is still to be read; the end comes after it.
            Err(OutboxError::Send(SendError::Disconnected)) => {
                tracing::debug!("nobody is there to be told");
            }
            Err(error) => self.end(Err(error.into())),
        }
    }

    fn heartbeat_due(&mut self) {
        let (Some(interval), Some(control)) = (self.heartbeat, &self.control) else {
            return;
        };
        let beat = Heartbeat {
            sequence: self.sequence,
            progress: self.parts.device.progress().unwrap_or(0),
            pending: false,
            dropped_logs: log::dropped(),
        };
        match control.outbox.try_send(&DeviceMessage::Heartbeat(beat)) {
            // One that is dropped leaves a gap in the sequence.
            Ok(_) => self.sequence += 1,
            Err(error) => tracing::debug!(%error, "heartbeat"),
        }
        self.cast_after(interval, Message::HeartbeatDue);
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

/// The message with its texts cut to what may travel.
fn clipped(mut message: DeviceMessage) -> DeviceMessage {
    match &mut message {
        DeviceMessage::Refused(refused) => clip(&mut refused.refusal.text),
        DeviceMessage::Event(DeviceEvent::Failed(text)) => clip(text),
        _ => {}
    }
    message
}

fn clip(text: &mut String) {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|&end| text.is_char_boundary(end));
        text.truncate(end.unwrap_or(0));
    }
}

#[cfg(test)]
mod tests;
