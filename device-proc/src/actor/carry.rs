//! Carrying out what the lifecycle says.

use super::arc::{ArcFailure, ArcOutcome, Spent, change_activity, reset};
use super::budget::Budget;
use super::job::{Job, moment_of_answer, moment_of_arrival};
use super::parts::Parts;
use super::stream::{self, Saver, Sink as _, StreamError};
use super::stream_fd::{Direction, StreamFd};
use super::{Message, State};
use crate::device::Device;
use crate::log;
use standstill_protocol::lifecycle::{Arc as LifecycleArc, Effect, Event, Master};
use standstill_protocol::message::{
    Command, DeviceEvent, DeviceMessage, Reached, Refusal, RefusalKind, Refused,
};
use standstill_protocol::migration::{Activity, MigrationState};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How long what the client or a lease wants may take: a VMM gives up 5 s after its request.
const CLIENT_BUDGET: Duration = Duration::from_secs(4);

impl<D: Device> State<D> {
    /// Carries out one effect. What was done at once gives its event back.
    pub(super) fn carry(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Begin(command) => self.begin(command),
            Effect::Arc(arc) => return self.take_arc(arc),
            Effect::Reached(command, state) => self.reached(command, state),
            effect => return self.carry_other(effect),
        }
        None
    }

    /// What a command of a usual pause or resume does not need. Apart, so that the code of such a
    /// command stays together.
    #[cold]
    fn carry_other(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            // Carried out before this is called.
            Effect::Begin(_) | Effect::Arc(_) | Effect::Reached(..) => {}
            Effect::Hurry => self.overtaken.fire(),
            Effect::WriteStream => return self.start_stream(Direction::Save),
            Effect::ReadStream => return self.start_stream(Direction::Load),
            Effect::Reset => self.start_reset(),
            Effect::Refused(command, state, refusal) => self.refused(command, state, refusal),
            Effect::Status(status) => self.send(DeviceMessage::Status(status)),
            Effect::ClientAnswer(answer) => {
                if let Some(reply) = self.client_reply.take() {
                    // The client may have stopped waiting.
                    let _ = reply.try_send(answer);
                }
            }
            Effect::ArmLease(nanoseconds, epoch) => {
                let after = Duration::from_nanos(nanoseconds);
                self.lease = Some(self.cast_after(after, Message::LeaseExpired(epoch)));
            }
            Effect::DisarmLease => {
                if let Some(lease) = self.lease.take() {
                    lease.abort();
                }
            }
            Effect::Notify(event @ DeviceEvent::LeaseExpired(_)) => {
                self.send(DeviceMessage::Event(event));
            }
            Effect::Notify(event) => self.tell(event),
            Effect::Exit(reason) => self.exit(reason),
            Effect::Dropped(why) => tracing::debug!(?why, "dropped"),
        }
        None
    }

    fn begin(&mut self, command: Command) {
        // Nobody has that of the last command any more, unless something of it is still going on.
        if self.overtaken.has_fired() || Arc::get_mut(&mut self.overtaken).is_none() {
            self.overtaken = Arc::default();
        }
        let arrival = self.arrival.take().filter(|arrival| arrival.command == command);
        // The lifecycle begins the latest command that it took, and that one is kept.
        let Some(arrival) = arrival else {
            tracing::error!(?command, "a command begins that has not arrived");
            return;
        };
        let mut job = Job::new(arrival, Arc::clone(&self.overtaken));
        if let Some(moment) = moment_of_arrival(&command, self.lifecycle.state().activity()) {
            job.collect(&self.parts.device, moment);
        }
        self.job = Some(job);
    }

    /// The deadline of what is being done.
    fn budget(&self) -> Budget {
        match &self.job {
            Some(job) => job.budget.clone(),
            None => Budget::new(Instant::now(), CLIENT_BUDGET, Arc::clone(&self.overtaken)),
        }
    }

    fn take_arc(&mut self, arc: LifecycleArc) -> Option<Event> {
        let commits = arc.master == Master::Client && arc.from == MigrationState::Resuming;
        if self.in_force == arc.after && !commits {
            return Some(Event::ArcDone);
        }
        let lease = self.job.as_ref().is_some_and(|job| job.lease);
        let budget = self.budget();
        let parts = Arc::clone(&self.parts);
        let change = change_activity(parts, self.in_force, arc.after, lease, budget.clone());
        let after = arc.after;
        let loaded = commits.then(|| Box::pin(commit(Arc::clone(&self.parts), budget)));
        let mut work = Box::pin(async move {
            if let Some(loaded) = loaded
                && let Err(refusal) = loaded.await
            {
                // Half a state is no state: unusable until it is reset.
                let result = Err(ArcFailure { refusal, restored: false });
                return (ArcOutcome { result, spent: Spent::default() }, after);
            }
            (change.await, after)
        });
        // Usually there is nothing to wait for. If there is, a task takes it over and looks again:
        // nobody is to be woken before that.
        let mut nobody = Context::from_waker(Waker::noop());
        if let Poll::Ready((outcome, after)) = work.as_mut().poll(&mut nobody) {
            return Some(self.arc_ended(outcome, after));
        }
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let (outcome, after) = work.await;
            // If the actor is gone, so is the process.
            let _ = myself.cast(Message::ArcFinished(outcome, after));
        });
        None
    }

    /// What was overtaken ends without an answer, as soon as what it is doing has ended.
    pub(super) fn forget_overtaken_job(&mut self) {
        if self.overtaken.has_fired() {
            self.job = None;
            self.overtaken = Arc::default();
        }
    }

    pub(super) fn arc_ended(&mut self, outcome: ArcOutcome, after: Activity) -> Event {
        self.forget_overtaken_job();
        if let Some(job) = &mut self.job {
            job.spent.add(outcome.spent);
        }
        match outcome.result {
            Ok(()) => {
                self.in_force = after;
                Event::ArcDone
            }
            Err(failure) => {
                if !failure.restored {
                    self.in_force = Activity::Stopped;
                }
                Event::ArcFailed { refusal: failure.refusal, restored: failure.restored }
            }
        }
    }

    fn start_reset(&mut self) {
        let is_saved = self.parts.client_stream.before_reset();
        // Where the lifecycle will be if it succeeds: nothing moves before it has ended.
        let mut then = self.lifecycle.clone();
        then.step(Event::ResetDone);
        let to = then.activity().max(self.in_force);
        let work = reset(Arc::clone(&self.parts), self.in_force, to, is_saved, self.budget());
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let (result, spent) = work.await;
            // If the actor is gone, so is the process.
            let _ = myself.cast(Message::ResetFinished(result.map(|()| to), spent));
        });
    }

    pub(super) fn reset_ended(&mut self, result: Result<Activity, Refusal>, spent: Spent) -> Event {
        self.forget_overtaken_job();
        if let Some(job) = &mut self.job {
            job.spent.add(spent);
        }
        match result {
            Ok(activity) => {
                self.in_force = activity;
                if let Some(saver) = &mut self.saver {
                    saver.start_over();
                }
                self.parts.client_stream.start_over();
                Event::ResetDone
            }
            Err(refusal) => {
                self.in_force = Activity::Stopped;
                Event::ResetFailed(refusal)
            }
        }
    }

    fn start_stream(&mut self, direction: Direction) -> Option<Event> {
        let budget = self.budget();
        let Some(fd) = self.job.as_mut().and_then(|job| job.fd.take()) else {
            return Some(Event::StreamFailed(stream_refusal("no fd came with the command")));
        };
        let fd = match StreamFd::new(fd, direction, budget) {
            Ok(fd) => fd,
            Err(error) => {
                let text = format!("the fd of the state stream: {error}");
                return Some(Event::StreamFailed(stream_refusal(text)));
            }
        };
        if matches!(direction, Direction::Load) {
            // Whoever has sent something to the device has sent it to what is replaced now.
            self.parts.edge.replaced();
        }
        let parts = Arc::clone(&self.parts);
        let myself = self.myself.clone();
        // What ends badly is not there any more: the next one begins a stream of its own.
        let saver = self.saver.take();
        let is_running = self.lifecycle.state() != MigrationState::StopCopy;
        // It may block: on a thread of its own.
        tokio::task::spawn_blocking(move || {
            let mut fd = fd;
            let turn = match direction {
                Direction::Save => parts.saving.take(|| fd.still_wanted().is_ok()),
                Direction::Load => parts.loading.take(|| fd.still_wanted().is_ok()),
            };
            let done = match direction {
                _ if turn.is_none() => Err(StreamError::HookHangs),
                Direction::Load => stream::load(&parts, fd).map(|()| None),
                Direction::Save => {
                    let mut saver = saver.unwrap_or_else(|| Box::new(Saver::new(&parts)));
                    if is_running {
                        saver.pre_copy(&parts, &mut fd).map(|()| Some(saver))
                    } else {
                        saver.finish(&parts, &mut fd).map(|()| None)
                    }
                }
            };
            drop(turn);
            let result = done.map_err(|error| stream_refusal(log::with_causes(&error)));
            // If the actor is gone, so is the process.
            let _ = myself.cast(Message::StreamFinished(result));
        });
        None
    }

    fn reached(&mut self, command: Command, state: MigrationState) {
        let Some(mut job) = self.job.take() else {
            return;
        };
        if let Some(moment) = moment_of_answer(&command) {
            job.collect(&self.parts.device, moment);
        }
        let (timings, evidence) = job.finish();
        let Command { term, epoch, phase, .. } = command;
        let reached = Reached { term, epoch, phase, state, timings, evidence };
        self.send(DeviceMessage::Reached(reached));
    }

    fn refused(&mut self, command: Command, state: MigrationState, refusal: Refusal) {
        tracing::warn!(phase = %command.phase, epoch = command.epoch.0, %state, %refusal, "refused");
        self.job = None;
        let Command { term, epoch, phase, .. } = command;
        self.send(DeviceMessage::Refused(Refused { term, epoch, phase, state, refusal }));
    }
}

/// The client's state stream ends: is it whole?
async fn commit<D: Device>(parts: Arc<Parts<D>>, budget: Budget) -> Result<(), Refusal> {
    let whole = budget.left();
    let Ok(ended) = budget.bound(parts.client_stream.commit()).await else {
        return Err(stream_refusal(format!("the device did not take it over within {whole:?}")));
    };
    ended
}

fn stream_refusal(text: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Stream, text: text.into() }
}
