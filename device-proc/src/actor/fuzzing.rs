//! The control side of a device process on one thread, for the fuzz target `device`: whatever a
//! coordinator sends is read when the target says so. And [state] streams, for `state_stream`.

#![forbid(unsafe_code)]

use super::control::{ConnectionId, Newcomer};
use super::introduction::Introduction;
use super::parts::Parts;
use super::scripted::{Deed, Scripted, parts};
use super::{Arguments, DeviceActor, Message, Outcome, Shared};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use standstill_protocol::channel::{DeviceEnd, RecvError};
use standstill_protocol::lifecycle::ClientRequest;
use standstill_protocol::message::{Capabilities, Epoch, PeerDma, Refusal, Term, Welcome};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub use super::stream::fuzzing as state;

/// The hooks of a device, in the order of [`Fate`]s.
const HOOKS: [&str; 4] = ["prepare_stop", "stop", "prepare_start", "start"];

/// Set by the first [`Session`]. That this is built with `cfg(fuzzing)` does not say it: whoever fuzzes
/// a program of their own that has a device process in it builds all of it so, and needs the threads.
static READS_IN_PLACE: AtomicBool = AtomicBool::new(false);

/// True if connections are read by a [`Session`], and by no thread.
pub(super) fn reads_in_place() -> bool {
    READS_IN_PLACE.load(Ordering::Relaxed)
}

/// What becomes of the next call of one hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It succeeds, as all later ones.
    Succeeds,
    /// It fails.
    Fails,
    /// It does not return.
    Hangs,
}

/// Where a device is, and who has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The highest term that it has seen.
    pub term: Term,
    /// The highest epoch in that term.
    pub epoch: Epoch,
    /// Where its coordinator has brought it.
    pub state: MigrationState,
    /// Nothing is being carried out or waited for.
    pub idle: bool,
    /// It has a coordinator.
    pub has_coordinator: bool,
}

/// The actor, whose state can be looked at.
struct Watched;

impl Actor for Watched {
    type Msg = Message;
    type State = Arc<Shared<Scripted>>;
    type Arguments = (Arguments<Scripted>, oneshot::Sender<Weak<Shared<Scripted>>>);

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        (arguments, tell): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let shared = DeviceActor(PhantomData).pre_start(myself, arguments).await?;
        // Whoever has started it waits.
        let _ = tell.send(Arc::downgrade(&shared));
        Ok(shared)
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        shared: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        DeviceActor(PhantomData).handle(myself, message, shared).await
    }
}

/// A device process that was welcomed.
#[derive(Debug)]
pub struct Session {
    parts: Weak<Parts<Scripted>>,
    shared: Weak<Shared<Scripted>>,
    actor: ActorRef<Message>,
    gone: JoinHandle<()>,
    ended: oneshot::Receiver<Outcome>,
    /// Second fds of the connections, the latest last.
    connections: Vec<(ConnectionId, Arc<DeviceEnd>)>,
}

impl Session {
    /// Begins with a Welcome and the fds that came with it. `fates` are those of the next calls of
    /// `prepare_stop`, `stop`, `prepare_start` and `start`.
    ///
    /// # Panics
    ///
    /// If it cannot: no fds are left, for example.
    pub async fn begin(
        migration: MigrationFlags,
        fates: [Fate; 4],
        channel: DeviceEnd,
        welcome: Welcome,
        fds: Vec<OwnedFd>,
    ) -> Self {
        READS_IN_PLACE.store(true, Ordering::Relaxed);
        let deeds = HOOKS.into_iter().zip(fates).filter_map(|(hook, fate)| match fate {
            Fate::Succeeds => None,
            Fate::Fails => Some((hook, Deed::Fails)),
            Fate::Hangs => Some((hook, Deed::Hangs)),
        });
        let parts = parts(&deeds.collect::<Vec<_>>());
        let weak = Arc::downgrade(&parts);
        let introduction = Arc::new(Introduction {
            kind: "scripted".into(),
            program_version: "0".into(),
            capabilities: Capabilities {
                migration,
                peer_dma: PeerDma::Possible,
                progress: false,
                dirty_tracking: true,
                fault_injection: false,
            },
            memory: Vec::new(),
            backing_files: Vec::new(),
        });
        let second = second(&channel);
        let newcomer = Newcomer { channel, welcome, fds };
        let (ended_at, ended) = oneshot::channel();
        let control = Some((newcomer, introduction));
        let arguments = Arguments { parts, migration, control, ended: ended_at };
        let (tell, told) = oneshot::channel();
        let (actor, gone) = Actor::spawn(None, Watched, (arguments, tell))
            .await
            .expect("the start of an actor cannot fail");
        let shared = told.await.expect("it has begun");
        let mut session = Self { parts: weak, shared, actor, gone, ended, connections: Vec::new() };
        session.notice(second);
        session
    }

    /// Keeps the second fd of a connection if the device has taken it.
    fn notice(&mut self, second: Arc<DeviceEnd>) {
        let Some(shared) = self.shared.upgrade() else { return };
        let present = shared.lock().control.as_ref().map(|control| control.id);
        if let Some(id) = present
            && self.connections.last().is_none_or(|(last, _)| *last != id)
        {
            self.connections.push((id, second));
        }
    }

    /// Another coordinator has welcomed the device.
    pub async fn take_over(&mut self, channel: DeviceEnd, welcome: Welcome) {
        let second = second(&channel);
        let newcomer = Box::new(Newcomer { channel, welcome, fds: Vec::new() });
        let (done, is_done) = oneshot::channel();
        if self.actor.cast(Message::TakeOver(newcomer, done)).is_ok() && is_done.await.is_ok() {
            self.notice(second);
        }
    }

    /// Reads one packet of each connection, as its thread would; false if there was none. What is
    /// left in a connection that counts no more is thrown away.
    pub fn read(&mut self) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        let mut some = false;
        self.connections.retain(|(id, channel)| {
            let received = match channel.try_recv() {
                Ok(None) => return true,
                Ok(Some(received)) => Ok(received),
                Err(error) => Err(error),
            };
            some = true;
            let end = matches!(received, Err(RecvError::Disconnected));
            shared.lock().take(*id, received) && !end
        });
        some
    }

    /// The client wants something; the answer comes to the receiver.
    pub fn client(&self, request: ClientRequest) -> Receiver<Result<MigrationState, Refusal>> {
        let (reply, answer) = sync_channel(1);
        // An actor that has ended drops the request, and the receiver sees that.
        let _ = self.actor.cast(Message::Client(request, reply));
        answer
    }

    /// Where the device is; `None` once it has ended.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        let shared = self.shared.upgrade()?;
        let state = shared.lock();
        state.ended.as_ref()?;
        let facts = state.facts();
        Some(Standing {
            term: facts.term,
            epoch: facts.epoch,
            state: facts.state,
            idle: !state.lifecycle.is_busy() && state.memory_waits == 0,
            has_coordinator: state.control.is_some(),
        })
    }

    /// True if gate, accesses and interrupts are set to what the lifecycle allows, or are on the
    /// way there.
    #[must_use]
    pub fn keeps_its_word(&self) -> bool {
        self.shared.upgrade().is_none_or(|shared| {
            let state = shared.lock();
            state.lifecycle.is_busy()
                || state.ended.is_none()
                || state.parts.is_at(state.lifecycle.activity())
        })
    }

    /// How it has ended, if it has, with the error's text.
    pub fn outcome(&mut self) -> Option<Result<(), String>> {
        let outcome = self.ended.try_recv().ok()?;
        Some(outcome.map(drop).map_err(|error| crate::log::with_causes(&error)))
    }

    /// Ends everything and waits until nothing of it is left.
    pub async fn end(self) {
        let Self { parts, shared, actor, gone, ended, connections } = self;
        drop((ended, connections));
        if let Some(shared) = shared.upgrade() {
            // Whoever works on what is being done need not go on.
            shared.lock().overtaken.fire();
        }
        actor.stop(None);
        // An actor of this kind does not fail.
        let _ = gone.await;
        while parts.strong_count() > 0 {
            // A hook that hangs is given time to be cut off.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn second(channel: &DeviceEnd) -> Arc<DeviceEnd> {
    let fd = channel.as_fd().try_clone_to_owned().expect("an fd is left");
    let second = DeviceEnd::from_fd(fd).expect("the same socket");
    second.set_version(channel.version());
    Arc::new(second)
}
