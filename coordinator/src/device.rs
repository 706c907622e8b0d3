//! The actor of one device process: owns the process, sees its end, fences it, forwards its log.
//!
//! It is not on the way of any answer: those come to the coordinator actor directly. When it is
//! dropped for whatever reason, its process is killed.

use crate::coordinator::Message as CoordinatorMessage;
use crate::custody::Custody;
use crate::logs::{self, LogTail, Origin};
use crate::process::{BackingFile, DeviceProcess, Exit, Fence, FenceProgress};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use standstill_protocol::channel::Readiness;
use standstill_protocol::message::Term;
use standstill_protocol::transition::ParticipantId;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinHandle};

/// How soon the locks of a dead process's files, or its end, are tried again at first; twice as late each time …
const FIRST_RETRY: Duration = Duration::from_millis(2);
/// … but not later than this.
const LAST_RETRY: Duration = Duration::from_millis(64);
/// How long a dead process's last lines are waited for; a grandchild may keep the pipe open.
const LOG_GRACE: Duration = Duration::from_millis(200);

/// What the actor of a device process is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// These are the files that a fence must find unlocked.
    BackingFiles(Vec<BackingFile>),
    /// Of some files nobody can say whether they are unlocked: its end cannot be proven, for this
    /// reason.
    Unprovable(String),
    /// Kill the process and prove it.
    Fence,
    /// The process is to end by itself; kill it after this time.
    Expect(Duration),
    /// The time is over.
    Kill,
    /// The pidfd says that the process has ended, or has said so before and how was not to be learned.
    Exited,
    /// The process is to outlive this program from now on, as long as it is this program's.
    PlaceUnder(Arc<Custody>),
    /// Try the locks again.
    TryLocks,
    /// Its log was read to the end, or was waited for long enough.
    LogEnded,
    /// The machine has done with it: end when the last words are read.
    Retire,
}

/// What it tells the coordinator.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ProcessEvent {
    /// The process has ended.
    Exited(Exit),
    /// Nothing of it is left.
    Fenced {
        /// How it ended.
        exit: Exit,
        /// How many locks on its files were obtained.
        locks: usize,
    },
    /// It has ended and its last words were read.
    Gone,
    /// It was not killed: another coordinator has it, with that term.
    Superseded(Term),
}

pub(crate) struct DeviceActor;

pub(crate) struct Arguments {
    pub(crate) id: ParticipantId,
    pub(crate) origin: Origin,
    pub(crate) process: DeviceProcess,
    pub(crate) tail: LogTail,
    pub(crate) coordinator: ActorRef<CoordinatorMessage>,
}

pub(crate) struct State {
    id: ParticipantId,
    name: String,
    incarnation: u64,
    process: DeviceProcess,
    files: Vec<BackingFile>,
    unprovable: Option<String>,
    fence: Option<Fence>,
    /// The proof of the fence, once there is one.
    proven: Option<(Exit, usize)>,
    /// One try of the locks is due already.
    retrying: bool,
    retry_after: Duration,
    /// When an end is looked for again that could not be learned.
    look_after: Duration,
    coordinator: ActorRef<CoordinatorMessage>,
    tasks: Vec<AbortHandle>,
    log: Option<JoinHandle<()>>,
    /// Its last words were read.
    gone: bool,
    retired: bool,
}

impl State {
    /// Device and incarnation, for the log.
    fn who(&self) -> (&str, u64) {
        (&self.name, self.incarnation)
    }

    fn tell(&self, event: ProcessEvent) {
        // A coordinator that is gone needs to know nothing.
        let _ = self.coordinator.cast(CoordinatorMessage::Process(self.id, event));
    }

    /// True if the process is another coordinator's; that was told then.
    fn is_superseded(&mut self) -> bool {
        let term = self.process.custody().and_then(Custody::superseded);
        if let Some(term) = term {
            self.fence = None;
            self.tell(ProcessEvent::Superseded(term));
        }
        term.is_some()
    }

    fn poll_fence(&mut self, myself: &ActorRef<Message>) {
        let Some(fence) = &mut self.fence else { return };
        match fence.poll(&mut self.process) {
            // The pidfd will tell.
            FenceProgress::WaitingForExit => {
                if let Some(obstacle) = fence.obstacle() {
                    let (device, incarnation) = (&self.name, self.incarnation);
                    tracing::warn!(device, incarnation, error = %obstacle, "fence is obstructed");
                    if !self.is_superseded() {
                        self.retry(myself);
                    }
                }
            }
            FenceProgress::WaitingForLocks { held } => {
                tracing::trace!(
                    device = self.name,
                    incarnation = self.incarnation,
                    held,
                    "waiting for locks of backing files"
                );
                self.retry(myself);
            }
            FenceProgress::Proven(proof) => {
                let (exit, locks) = (proof.exit(), proof.locks());
                self.fence = None;
                if let Some(why) = &self.unprovable {
                    let (device, incarnation) = self.who();
                    tracing::error!(device, incarnation, %exit, why, "its end cannot be proven");
                    return;
                }
                self.proven = Some((exit, locks));
                self.tell(ProcessEvent::Fenced { exit, locks });
            }
        }
    }

    fn last_words_read(&mut self, myself: &ActorRef<Message>) {
        self.gone = true;
        self.tell(ProcessEvent::Gone);
        if self.retired {
            myself.stop(None);
        }
    }

    /// The process has ended, and nobody can say yet how.
    fn look_again(&mut self, myself: &ActorRef<Message>) {
        if self.look_after == FIRST_RETRY {
            let (device, incarnation) = self.who();
            tracing::warn!(device, incarnation, "its end is kept back by whoever traces it");
        }
        myself.send_after(self.look_after, || Message::Exited);
        self.look_after = (self.look_after * 2).min(LAST_RETRY);
    }

    fn retry(&mut self, myself: &ActorRef<Message>) {
        if !std::mem::replace(&mut self.retrying, true) {
            myself.send_after(self.retry_after, || Message::TryLocks);
            self.retry_after = (self.retry_after * 2).min(LAST_RETRY);
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Actor for DeviceActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        arguments: Arguments,
    ) -> Result<State, ActorProcessingErr> {
        let Arguments { id, origin, mut process, tail, coordinator } = arguments;
        let (name, incarnation) = (origin.device.clone(), origin.incarnation);
        let pidfd = Readiness::new(process.pidfd().try_clone_to_owned()?)?;
        let exit = {
            let myself = myself.clone();
            tokio::spawn(async move {
                if pidfd.readable().await.is_ok() {
                    let _ = myself.cast(Message::Exited);
                }
            })
        };
        let log = process.take_stderr().map(|stderr| {
            let device = name.clone();
            tokio::spawn(async move {
                if let Err(error) = logs::forward(stderr, origin, tail).await {
                    tracing::warn!(device, incarnation, %error, "the device's log cannot be read");
                }
            })
        });
        let tasks = [Some(exit.abort_handle()), log.as_ref().map(JoinHandle::abort_handle)];
        let tasks = tasks.into_iter().flatten().collect();
        Ok(State {
            id,
            name,
            incarnation,
            process,
            files: Vec::new(),
            unprovable: None,
            fence: None,
            proven: None,
            retrying: false,
            retry_after: FIRST_RETRY,
            look_after: FIRST_RETRY,
            coordinator,
            tasks,
            log,
            gone: false,
            retired: false,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::BackingFiles(files) => state.files = files,
            Message::PlaceUnder(custody) => state.process.place_under(custody),
            Message::Unprovable(why) => state.unprovable = Some(why),
            Message::Fence => match state.proven {
                Some((exit, locks)) => state.tell(ProcessEvent::Fenced { exit, locks }),
                None => {
                    if state.fence.is_none() {
                        let files = std::mem::take(&mut state.files);
                        state.fence = Some(Fence::begin(&state.process, files));
                    }
                    state.poll_fence(&myself);
                }
            },
            Message::Expect(grace) => {
                myself.send_after(grace, || Message::Kill);
            }
            Message::Kill => {
                if let Err(error) = state.process.kill() {
                    let (device, incarnation) = state.who();
                    tracing::warn!(device, incarnation, %error, "cannot be killed");
                    state.is_superseded();
                }
            }
            Message::Exited => {
                match state.process.try_reap() {
                    Ok(Some(exit)) => {
                        let (device, incarnation) = state.who();
                        tracing::debug!(device, incarnation, %exit, "process ended");
                        state.tell(ProcessEvent::Exited(exit));
                    }
                    // Whoever traces it from another process learns of its end first, and its parent
                    // when that one has let go of it. The pidfd does not tell of that.
                    Ok(None) => {
                        state.look_again(&myself);
                        return Ok(());
                    }
                    Err(error) => {
                        let (device, incarnation) = state.who();
                        tracing::warn!(device, incarnation, %error, "cannot be reaped");
                    }
                }
                state.poll_fence(&myself);
                if let Some(log) = state.log.take() {
                    let rest = tokio::spawn(async move {
                        let reading = log.abort_handle();
                        if tokio::time::timeout(LOG_GRACE, log).await.is_err() {
                            // A grandchild has the pipe; what it says is nobody's log.
                            reading.abort();
                        }
                        let _ = myself.cast(Message::LogEnded);
                    });
                    state.tasks.push(rest.abort_handle());
                } else {
                    state.last_words_read(&myself);
                }
            }
            Message::TryLocks => {
                state.retrying = false;
                state.poll_fence(&myself);
            }
            Message::LogEnded => state.last_words_read(&myself),
            Message::Retire => {
                state.retired = true;
                if state.gone || state.process.exit().is_none() {
                    myself.stop(None);
                }
            }
        }
        Ok(())
    }
}
