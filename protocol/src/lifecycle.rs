//! The device's side of the protocol: a state machine without sockets, clocks or threads.
//!
//! The runtime of a device process feeds it [`Event`]s (what the coordinator and the client want,
//! what became of an effect) and carries out the [`Effect`]s that it gives back.
//!
//! # Two masters
//!
//! A device has two masters: the coordinator, over the control channel, and the client, in band
//! over its data socket. Each moves a position of its own through the VFIO migration states and
//! sees only that one. What the device may do ([`Lifecycle::activity`]) is what the more cautious
//! of the two positions allows: it runs only if both want it to run. A state stream (PRE_COPY,
//! STOP_COPY, RESUMING) can be held by one master at a time; the other is refused meanwhile.
//!
//! # One arc at a time
//!
//! A command is walked arc by arc along [`next_state`](crate::migration::next_state). An arc that was begun
//! is always finished. A command of a later epoch overtakes an earlier one at the end of the arc
//! that is being taken; the earlier one is then not answered. So a device is always in a state
//! that has a name.
//!
//! # When the coordinator goes
//!
//! A device that is kept stays in the state that it has reached: an arc that was begun is finished,
//! the rest of the command is not begun. A coordinator that takes over overtakes what its
//! predecessor asked for in the same way. A lease is no command: it protects the client's data
//! socket, whoever coordinates, so it outlives its coordinator and ends with the first command of
//! the next one. A Stop that is overtaken by either and is finished all the same keeps its lease.

use crate::message::{
    Abort, Command, DeviceEvent, Epoch, OrphanPolicy, Phase, Query, Refusal, RefusalKind, Status,
    Term,
};
use crate::migration::{Activity, MigrationFlags, MigrationState};
use crate::mutation::{Broken, Mutation};

mod job;
#[cfg(test)]
mod tests;

/// Who wants something of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Master {
    /// The coordinator, over the control channel.
    Coordinator,
    /// The VMM, in band over the data socket.
    Client,
}

/// What the client wants, in band.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientRequest {
    /// vfio-user `MIG_DEVICE_STATE` SET.
    SetState(MigrationState),
    /// vfio-user `DEVICE_RESET`.
    Reset,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A coordinator accepted this device.
    Welcome {
        /// Its term; must be higher than every term before.
        term: Term,
        /// The last epoch that was used in it.
        epoch: Epoch,
        /// What to do when it goes away.
        orphan: OrphanPolicy,
    },
    /// The coordinator sent a command.
    Command(Command),
    /// The coordinator gave a transition up.
    Abort(Abort),
    /// The coordinator asked where the device is.
    Query(Query),
    /// The client wants something.
    Client(ClientRequest),
    /// [`Effect::Arc`] was carried out.
    ArcDone,
    /// [`Effect::Arc`] was not carried out.
    ArcFailed {
        /// Why.
        refusal: Refusal,
        /// True if the device is where the arc began; false if it is unusable (ERROR).
        restored: bool,
    },
    /// [`Effect::WriteStream`] or [`Effect::ReadStream`] ended.
    StreamDone,
    /// [`Effect::WriteStream`] or [`Effect::ReadStream`] failed.
    StreamFailed(Refusal),
    /// [`Effect::Reset`] was carried out.
    ResetDone,
    /// [`Effect::Reset`] failed; the device is unusable.
    ResetFailed(Refusal),
    /// The lease of [`Effect::ArmLease`] ran out.
    LeaseExpired(Epoch),
    /// The control channel is gone.
    Disconnected,
    /// The coordinator wants the process to end.
    Shutdown(Term),
}

/// One arc of the migration state machine, and what it means for the device's activity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arc {
    /// Whose position moves.
    pub master: Master,
    /// From where.
    pub from: MigrationState,
    /// To where.
    pub to: MigrationState,
    /// What the device may do before.
    pub before: Activity,
    /// What it may do after: the same where the other master holds it back.
    pub after: Activity,
}

/// Something to do. Effects are carried out in order; those marked *one answer* come back as an
/// event, and no second one of them is asked for before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A command is being carried out from now on.
    Begin(Command),
    /// Take an arc. One answer: [`Event::ArcDone`] or [`Event::ArcFailed`].
    Arc(Arc),
    /// What is being done was overtaken: end it soon if that is possible. No answer of its own.
    Hurry,
    /// Write the device's state to the command's fd. One answer.
    WriteStream,
    /// Read the device's state from the command's fd. One answer.
    ReadStream,
    /// Bring the device's contents to power-on state. One answer.
    Reset,
    /// Answer the command: it was carried out.
    Reached(Command, MigrationState),
    /// Answer the command: it was not.
    Refused(Command, MigrationState, Refusal),
    /// Answer a query.
    Status(Status),
    /// Answer the client: its position now, and why it did not get what it wanted.
    ClientAnswer(Result<MigrationState, Refusal>),
    /// Report [`Event::LeaseExpired`] after this many nanoseconds.
    ArmLease(u64, Epoch),
    /// Forget the lease.
    DisarmLease,
    /// Tell the coordinator.
    Notify(DeviceEvent),
    /// End the process.
    Exit(ExitReason),
    /// The event was stale, a duplicate or foreign: nothing was done.
    Dropped(Stale),
}

/// Why a device process ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitReason {
    /// The coordinator asked for it.
    Shutdown,
    /// The coordinator is gone and the policy says `exit`.
    Orphaned,
    /// The lease ran out after the device's state was handed over: it lives elsewhere now.
    HandedOver,
}

/// Why an event was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stale {
    /// It belongs to another term.
    Term,
    /// It belongs to an earlier or given-up epoch, repeats a phase or comes out of order.
    Epoch,
    /// Nothing was asked that it could be the answer to.
    Unasked,
}

/// What is being carried out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Job {
    task: Task,
    /// Overtaken or given up: end at the end of the present arc, without an answer.
    overtaken: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Task {
    Command(Command, Stage),
    Client(ClientRequest),
    Lease,
}

/// How far a command of several steps has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Walk,
    Stream,
    Commit,
}

/// The device's side of the protocol; see the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lifecycle {
    flags: MigrationFlags,
    coordinator: MigrationState,
    client: MigrationState,
    term: Term,
    epoch: Epoch,
    last_phase: Option<Phase>,
    given_up: Epoch,
    orphan: OrphanPolicy,
    job: Option<Job>,
    next_command: Option<Command>,
    next_client: Option<ClientRequest>,
    lease: Option<Epoch>,
    /// The lease ran out while something was being carried out.
    lease_due: bool,
    handed_over: bool,
    broken: Broken,
}

impl Lifecycle {
    /// A device in power-on state: RUNNING, without a coordinator.
    #[must_use]
    pub fn new(flags: MigrationFlags) -> Self {
        Self {
            flags,
            coordinator: MigrationState::Running,
            client: MigrationState::Running,
            term: Term(0),
            epoch: Epoch(0),
            last_phase: None,
            given_up: Epoch(0),
            orphan: OrphanPolicy::Exit,
            job: None,
            next_command: None,
            next_client: None,
            lease: None,
            lease_due: false,
            handed_over: false,
            broken: Broken::default(),
        }
    }

    /// This device with one fault built in; for tests of the tests.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub fn with_mutation(self, mutation: Mutation) -> Self {
        Self { broken: Broken::by(mutation), ..self }
    }

    /// Where the coordinator has brought the device.
    #[must_use]
    pub fn state(&self) -> MigrationState {
        self.position(Master::Coordinator)
    }

    /// Where the client has brought the device: what `MIG_DEVICE_STATE` GET answers.
    #[must_use]
    pub fn client_state(&self) -> MigrationState {
        self.position(Master::Client)
    }

    /// The highest term seen.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// The highest epoch seen in that term.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What the device may do: what the more cautious master allows.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.coordinator.activity().min(self.client.activity())
    }

    /// Whether this master has stopped the device itself: it does not run before that one wants it to.
    #[must_use]
    pub fn is_stopped_by(&self, master: Master) -> bool {
        let own = match master {
            Master::Coordinator => self.coordinator,
            Master::Client => self.client,
        };
        own.activity() == Activity::Stopped
    }

    /// True while something is being carried out.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.job.is_some()
    }

    /// True while a lease protects the client's data socket.
    #[must_use]
    pub fn has_lease(&self) -> bool {
        self.lease.is_some()
    }

    /// ERROR is the device's, whoever brought it there.
    fn position(&self, master: Master) -> MigrationState {
        let (own, other) = match master {
            Master::Coordinator => (self.coordinator, self.client),
            Master::Client => (self.client, self.coordinator),
        };
        if other == MigrationState::Error { MigrationState::Error } else { own }
    }

    fn set_position(&mut self, master: Master, state: MigrationState) {
        match master {
            Master::Coordinator => self.coordinator = state,
            Master::Client => self.client = state,
        }
    }

    /// Takes an event and says what is to be done.
    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::with_capacity(4);
        self.step_into(event, &mut out);
        out
    }

    /// As [`step`](Self::step), with the effects added to `out`.
    pub fn step_into(&mut self, event: Event, out: &mut Vec<Effect>) {
        match event {
            Event::Welcome { term, epoch, orphan } => self.welcome(term, epoch, orphan, out),
            Event::Command(command) => self.command(command, out),
            Event::Abort(abort) => self.abort(abort, out),
            Event::Query(query) => self.query(query, out),
            Event::Client(request) => self.client(request, out),
            Event::ArcDone => self.arc_ended(Ok(()), out),
            Event::ArcFailed { refusal, restored } => {
                self.arc_ended(Err((refusal, restored)), out);
            }
            Event::StreamDone => self.stream_ended(Ok(()), out),
            Event::StreamFailed(refusal) => self.stream_ended(Err(refusal), out),
            Event::ResetDone => self.reset_ended(Ok(()), out),
            Event::ResetFailed(refusal) => self.reset_ended(Err(refusal), out),
            Event::LeaseExpired(epoch) => self.lease_expired(epoch, out),
            Event::Disconnected => match self.orphan {
                OrphanPolicy::Exit => out.push(Effect::Exit(ExitReason::Orphaned)),
                OrphanPolicy::Keep => self.overtake_command(out),
            },
            Event::Shutdown(term) if term == self.term => {
                out.push(Effect::Exit(ExitReason::Shutdown));
            }
            Event::Shutdown(_) => out.push(Effect::Dropped(Stale::Term)),
        }
    }

    fn welcome(&mut self, term: Term, epoch: Epoch, orphan: OrphanPolicy, out: &mut Vec<Effect>) {
        if term <= self.term && !self.broken.is(Mutation::WelcomesEveryTerm) {
            out.push(Effect::Dropped(Stale::Term));
            return;
        }
        self.term = term;
        self.epoch = epoch;
        self.given_up = epoch;
        self.last_phase = None;
        self.orphan = orphan;
        // The lease stays: see the module's documentation.
        if self.broken.is(Mutation::KeepsTheOldCommand) {
            return;
        }
        self.overtake_command(out);
    }

    /// Nobody wants what was commanded any more: it ends with the present arc, unanswered.
    fn overtake_command(&mut self, out: &mut Vec<Effect>) {
        self.next_command = None;
        if let Some(job) = &mut self.job
            && matches!(job.task, Task::Command(..))
            && !job.overtaken
        {
            job.overtaken = true;
            out.push(Effect::Hurry);
        }
    }

    fn command(&mut self, command: Command, out: &mut Vec<Effect>) {
        let foreign = command.term != self.term && !self.broken.is(Mutation::ObeysEveryTerm);
        if foreign || self.term == Term(0) {
            out.push(Effect::Dropped(Stale::Term));
            return;
        }
        let in_order = match command.epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Less => false,
            // The second phase follows the first once that was answered; nothing else follows.
            // (A request of the client may have begun in between: the command waits for it.)
            std::cmp::Ordering::Equal => {
                !matches!(self.job, Some(Job { task: Task::Command(..), .. }))
                    && self.next_command.is_none()
                    && matches!(
                        (self.last_phase, command.phase),
                        (Some(Phase::PrepareStop), Phase::Stop)
                            | (Some(Phase::PrepareStart), Phase::Start)
                    )
            }
            std::cmp::Ordering::Greater => true,
        };
        let late = !in_order || command.epoch <= self.given_up;
        if late && !self.broken.is(Mutation::ObeysEveryEpoch) {
            out.push(Effect::Dropped(Stale::Epoch));
            return;
        }
        self.epoch = command.epoch;
        self.last_phase = Some(command.phase);
        // Saving is what a lease is for; everything else ends it.
        if command.phase != Phase::Save && self.lease.take().is_some() {
            self.lease_due = false;
            out.push(Effect::DisarmLease);
        }
        self.next_command = Some(command);
        match &mut self.job {
            None => self.take_next(out),
            Some(job) => {
                let waits = match job.task {
                    Task::Client(_) => true,
                    // What the lease promised is kept, whatever there is to save.
                    Task::Lease => command.phase == Phase::Save,
                    Task::Command(..) => false,
                };
                if !waits {
                    job.overtaken = true;
                    out.push(Effect::Hurry);
                }
            }
        }
    }

    fn abort(&mut self, abort: Abort, out: &mut Vec<Effect>) {
        if abort.term != self.term || self.term == Term(0) {
            out.push(Effect::Dropped(Stale::Term));
            return;
        }
        if abort.epoch < self.epoch {
            out.push(Effect::Dropped(Stale::Epoch));
            return;
        }
        // An epoch that this device has not heard of yet can be given up too.
        self.epoch = abort.epoch;
        self.given_up = abort.epoch;
        if self.broken.is(Mutation::LeavesStopOnAbort) && self.job.is_none() {
            self.job = Some(Job { task: Task::Lease, overtaken: false });
            self.walk(Master::Coordinator, self.lease_target(), out);
        }
        self.overtake_command(out);
    }

    fn query(&mut self, query: Query, out: &mut Vec<Effect>) {
        if query.term != self.term || self.term == Term(0) {
            out.push(Effect::Dropped(Stale::Term));
            return;
        }
        // The coordinator's position alone: where the client goes is no half-done transition.
        let moving_to = match (self.next_command, &self.job) {
            (Some(command), _) => Some(command.target),
            (None, Some(Job { task: Task::Command(command, _), .. })) => Some(command.target),
            (None, Some(Job { task: Task::Lease, .. })) => Some(self.lease_target()),
            (None, Some(Job { task: Task::Client(_), .. }) | None) => None,
        };
        out.push(Effect::Status(Status {
            term: query.term,
            epoch: query.epoch,
            state: self.state(),
            client_state: self.client_state(),
            moving_to,
        }));
    }

    fn client(&mut self, request: ClientRequest, out: &mut Vec<Effect>) {
        let client_busy = matches!(&self.job, Some(Job { task: Task::Client(_), .. }));
        if client_busy || self.next_client.is_some() {
            let refusal = Refusal {
                kind: RefusalKind::Busy,
                text: "an earlier request of the client is not answered yet".into(),
            };
            out.push(Effect::ClientAnswer(Err(refusal)));
            return;
        }
        self.next_client = Some(request);
        if self.job.is_none() {
            self.take_next(out);
        }
    }
}

/// True where a state stream is open: one master at a time may hold one.
fn holds_stream(state: MigrationState) -> bool {
    state.is_saving() || state == MigrationState::Resuming
}
