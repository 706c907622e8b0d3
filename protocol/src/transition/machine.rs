//! The state machine itself: events in, effects out.

mod failure;
mod hooks;
mod renumber;
mod target;

use super::outcome::{Failure, FailureKind, HeldReason, Loss, MachineState, Outcome, Subject};
use super::plan::{
    Hook, HookId, HookMoment, Member, OnFailure, Operation, ParticipantId, Phases, Plan, PlanError,
    Slot,
};
use super::undo::UndoStep;
use crate::message::{Abort, Command, Epoch, Phase, Query, Term};
use crate::migration::{Activity, MigrationState};
use crate::mutation::{Broken, Mutation};
use std::collections::VecDeque;
use std::hash::{Hash, Hasher};

/// What a participant answered; texts and timings are the report's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The command was carried out.
    Reached,
    /// It was not; the participant stays where it says.
    Refused,
    /// Where it is (the answer to a query), and where it is on the way to.
    Status {
        /// Where it is on the way to.
        moving_to: Option<MigrationState>,
    },
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Begin.
    Begin,
    /// A participant answered.
    Answer {
        /// Who.
        from: ParticipantId,
        /// The term that it names.
        term: Term,
        /// The epoch that it names.
        epoch: Epoch,
        /// The phase that it names; not looked at for a status.
        phase: Phase,
        /// Where it says it is.
        state: MigrationState,
        /// What it says.
        answer: Answer,
    },
    /// A participant does not count any more.
    Lost(ParticipantId, Loss),
    /// A fence is proven.
    Fenced(ParticipantId),
    /// The lease of a participant's stop ran out: it has left STOP by itself, and is in that state.
    LeaseExpired(ParticipantId, MigrationState),
    /// A hook returned.
    HookDone(HookId, HookMoment),
    /// A hook returned an error: things are as before its call.
    HookFailed(HookId, HookMoment),
    /// A timer ran out.
    Expired(Timer),
    /// The owner gives the operation up.
    Cancel,
    /// Another coordinator with a higher term has the machine.
    Superseded,
}

/// A deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Timer {
    /// All answers of a phase that are due after this budget.
    Phase(Epoch, Phase, u64),
    /// All answers to a query.
    Query(Epoch),
    /// A hook's return from that call.
    Hook(HookId, HookMoment),
    /// A fence's proof.
    Fence(ParticipantId),
    /// The end of the undo.
    Undo,
    /// The end of the hold.
    Hold,
}

/// Something to do; in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send a command.
    Send(ParticipantId, Command),
    /// Send an abort.
    Abort(ParticipantId, Abort),
    /// Send a query.
    Query(ParticipantId, Query),
    /// Kill the process and prove that nothing of it is left; say [`Event::Fenced`] then.
    Fence(ParticipantId, Loss),
    /// Call a hook.
    RunHook(HookId, HookMoment),
    /// Say [`Event::Expired`] after this many nanoseconds.
    Arm(Timer, u64),
    /// Forget the timer.
    Disarm(Timer),
    /// It is over.
    Finish(Outcome),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Standing {
    Live,
    Fencing(Loss),
    Fenced(Loss),
    Unproven(Loss),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Participant {
    member: Member,
    /// Where it was when the transition began.
    original: MigrationState,
    /// Where it last proved to be.
    state: MigrationState,
    standing: Standing,
    /// What it is to answer, and the state that it is to be in then.
    awaited: Option<(Asked, MigrationState)>,
    /// Where it may be on the way to although it is not waited for: a status said so, or it was
    /// told to and then given up.
    moving: Option<MigrationState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Asked {
    Phase(Phase),
    Status,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    NewEpoch,
    Hooks(HookMoment, Slot),
    Phase(Phase, Aim),
    Query,
    /// Between the queries of a take-over and what follows from their answers.
    Decide,
}

/// How a participant's target in a phase is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Aim {
    First,
    Second,
    Undo(UndoStep),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Mode {
    Forward,
    Undo,
    Hold,
    Over,
}

/// One transition of a machine; see the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Transition {
    plan: Plan,
    participants: Vec<Participant>,
    hooks: Vec<Hook>,
    hung: Vec<HookId>,
    begun: bool,
    /// Who was lost before the beginning.
    early: Vec<(ParticipantId, Loss)>,
    mode: Mode,
    epoch: Epoch,
    stages: VecDeque<Stage>,
    phase: Option<Phase>,
    /// Batches of hooks that are still to run in the present stage.
    batches: VecDeque<Vec<(HookId, HookMoment)>>,
    running_hooks: Vec<(HookId, HookMoment)>,
    /// Those of them that were called before the transition was given up.
    overtaken: Vec<(HookId, HookMoment)>,
    awaited: usize,
    fencing: usize,
    told: bool,
    second_phase: bool,
    /// It is undone, and who was left by then had neither all run nor all been stopped at its
    /// beginning. There is no one state to go back to, so all go to STOP.
    found_half: bool,
    /// It is undone, and whoever was stopped at its beginning is told to stop by that.
    undo_stops: bool,
    armed: Vec<Timer>,
    reasons: Vec<HeldReason>,
    history: History,
    broken: Broken,
}

/// What is kept for the report only: no decision looks at it.
///
/// It counts for equality but not for the hash, so that two transitions that will do the same have
/// the same hash whatever they have seen: a model checker tells states apart by their hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct History {
    failures: Vec<Failure>,
    strays: u64,
}

impl Hash for History {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl Transition {
    /// Prepares a transition; [`Event::Begin`] begins it.
    ///
    /// # Errors
    ///
    /// If the plan does not pass [`Plan::check`].
    pub fn new(plan: Plan) -> Result<Self, PlanError> {
        plan.check()?;
        let mut participants: Vec<_> = plan
            .members
            .iter()
            .map(|&member| Participant {
                member,
                original: member.state,
                state: member.state,
                standing: Standing::Live,
                awaited: None,
                moving: None,
            })
            .collect();
        participants.sort_unstable_by_key(|participant| participant.member.id);
        Ok(Self {
            participants,
            hooks: plan.hooks.clone(),
            hung: Vec::new(),
            begun: false,
            early: Vec::new(),
            mode: Mode::Forward,
            epoch: plan.epoch,
            stages: VecDeque::new(),
            phase: None,
            batches: VecDeque::new(),
            running_hooks: Vec::new(),
            overtaken: Vec::new(),
            awaited: 0,
            fencing: 0,
            told: false,
            second_phase: false,
            found_half: false,
            undo_stops: false,
            armed: Vec::new(),
            reasons: Vec::new(),
            history: History::default(),
            broken: Broken::default(),
            plan,
        })
    }

    /// This transition with one fault built in; for tests of the tests.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub fn with_mutation(self, mutation: Mutation) -> Self {
        Self { broken: Broken::by(mutation), ..self }
    }

    /// The last epoch that this transition has used.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The phase that participants were last told, if any was.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        self.phase
    }

    /// True while what was done is being undone, or the machine is brought to a hold.
    #[must_use]
    pub fn is_undoing(&self) -> bool {
        matches!(self.mode, Mode::Undo | Mode::Hold)
    }

    /// True once [`Effect::Finish`] was given.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.mode == Mode::Over
    }

    /// Everything that went wrong so far, in order.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.history.failures
    }

    /// How many answers were stale, duplicate, foreign or out of order, and changed nothing.
    #[must_use]
    pub fn strays(&self) -> u64 {
        self.history.strays
    }

    /// Where a participant last proved to be; `None` for an unknown or fenced one.
    #[must_use]
    pub fn state(&self, id: ParticipantId) -> Option<MigrationState> {
        let participant = &self.participants[self.index(id)?];
        (participant.standing == Standing::Live).then_some(participant.state)
    }

    /// Who has still to answer.
    pub fn awaited(&self) -> impl Iterator<Item = ParticipantId> + '_ {
        self.participants
            .iter()
            .filter(|participant| participant.awaited.is_some())
            .map(|participant| participant.member.id)
    }

    /// The hooks, with what they were called for last.
    #[must_use]
    pub fn hooks(&self) -> &[Hook] {
        &self.hooks
    }

    fn index(&self, id: ParticipantId) -> Option<usize> {
        self.participants.binary_search_by_key(&id, |participant| participant.member.id).ok()
    }

    /// Takes an event and says what is to be done. After the end nothing is.
    ///
    /// Nothing is done before [`Event::Begin`] either. Whoever is lost by then is fenced first and
    /// told nothing; other events are not expected so early and change nothing.
    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        if self.mode == Mode::Over && !self.broken.is(Mutation::ActsAfterTheEnd) {
            return out;
        }
        if self.begun == (event == Event::Begin) {
            if let Event::Lost(who, why) = event
                && !self.early.iter().any(|&(earlier, _)| earlier == who)
                && self.index(who).is_some()
            {
                self.early.push((who, why));
            }
            return out;
        }
        match event {
            Event::Begin => {
                self.begun = true;
                self.begin();
                for (who, why) in std::mem::take(&mut self.early) {
                    self.lost(who, why, &mut out);
                }
            }
            Event::Answer { from, term, epoch, phase, state, answer } => {
                self.answer(from, (term, epoch), phase, state, answer, &mut out);
            }
            Event::Lost(who, why) => self.lost(who, why, &mut out),
            Event::Fenced(who) => self.fenced(who, &mut out),
            Event::LeaseExpired(who, state) => self.lease_expired(who, state, &mut out),
            Event::HookDone(id, moment) => self.hook_done(id, moment, &mut out),
            Event::HookFailed(id, moment) => self.hook_failed(id, moment, &mut out),
            Event::Expired(timer) => self.expired(timer, &mut out),
            // A take-over asks before it does anything; without the answers there is no way back.
            Event::Cancel => {
                if self.mode == Mode::Forward && self.plan.operation != Operation::TakeOver {
                    self.note(Subject::Owner, FailureKind::Cancelled);
                    self.undo(&mut out);
                }
            }
            Event::Superseded => {
                self.reasons.push(HeldReason::Superseded);
                self.finish(&mut out);
            }
        }
        self.advance(&mut out);
        out
    }

    fn begin(&mut self) {
        use HookMoment::{Start, Stop};
        let phase = |phase, aim| Stage::Phase(phase, aim);
        self.stages = match self.plan.operation {
            Operation::Pause | Operation::SwitchOver => {
                let mut stages = VecDeque::from([
                    Stage::Hooks(Stop, Slot::Before),
                    phase(Phase::PrepareStop, Aim::First),
                    Stage::Hooks(Stop, Slot::Between),
                    phase(Phase::Stop, Aim::Second),
                    Stage::Hooks(Stop, Slot::After),
                ]);
                if self.plan.phases == Phases::SecondOnly {
                    stages.remove(1);
                }
                stages
            }
            Operation::Resume => VecDeque::from([
                Stage::Hooks(Start, Slot::Before),
                phase(Phase::PrepareStart, Aim::First),
                Stage::Hooks(Start, Slot::Between),
                phase(Phase::Start, Aim::Second),
                Stage::Hooks(Start, Slot::After),
            ]),
            Operation::Load => VecDeque::from([phase(Phase::Load, Aim::Second)]),
            Operation::TakeOver => VecDeque::from([Stage::Query, Stage::Decide]),
        };
    }

    /// Begins stages until there is something to wait for, or the end is reached.
    fn advance(&mut self, out: &mut Vec<Effect>) {
        while self.mode != Mode::Over {
            let fences = self.fencing > 0 && !self.broken.is(Mutation::GoesOnBesideAFence);
            let enough = usize::from(self.broken.is(Mutation::CountsOneAnswerLess));
            if self.awaited > enough || fences || !self.running_hooks.is_empty() {
                return;
            }
            self.disarm(out, |timer| matches!(timer, Timer::Phase(..) | Timer::Query(_)));
            if let Some(batch) = self.batches.pop_front() {
                self.run_hooks(batch, out);
                continue;
            }
            match self.stages.pop_front() {
                Some(Stage::NewEpoch) => self.epoch = self.epoch.next(),
                Some(Stage::Hooks(moment, slot)) => self.plan_hooks(moment, slot),
                Some(Stage::Phase(phase, aim)) => self.send_phase(phase, aim, out),
                Some(Stage::Query) => self.send_queries(out),
                Some(Stage::Decide) => self.decide_take_over(out),
                None => self.finish(out),
            }
        }
    }

    fn answer(
        &mut self,
        from: ParticipantId,
        (term, epoch): (Term, Epoch),
        phase: Phase,
        state: MigrationState,
        answer: Answer,
        out: &mut Vec<Effect>,
    ) {
        let Some(index) = self.index(from) else {
            self.history.strays += 1;
            return;
        };
        let asked = match answer {
            Answer::Status { .. } => Asked::Status,
            Answer::Reached | Answer::Refused => Asked::Phase(phase),
        };
        let target = match self.participants[index].awaited {
            Some((expected, target))
                if expected == asked
                    && term == self.plan.term
                    && (epoch == self.epoch
                        || self.broken.is(Mutation::TakesAnswersOfOtherEpochs)) =>
            {
                target
            }
            _ => {
                self.history.strays += 1;
                return;
            }
        };
        match answer {
            Answer::Status { moving_to } => {
                self.settle(index);
                let participant = &mut self.participants[index];
                participant.state = state;
                participant.original = state;
                participant.moving = moving_to;
            }
            Answer::Reached if self.fits(phase, state, target) => {
                self.settle(index);
                self.participants[index].state = state;
                self.participants[index].moving = None;
            }
            // It says that it has done something else than what it was told.
            Answer::Reached => self.lost(from, Loss::Protocol, out),
            Answer::Refused => {
                self.settle(index);
                self.participants[index].state = state;
                self.participants[index].moving = None;
                self.refused(index, out);
            }
        }
    }

    /// Whether `state` is where a command for `target` leads.
    fn fits(&self, phase: Phase, state: MigrationState, target: MigrationState) -> bool {
        match phase {
            Phase::Reset => !matches!(state, MigrationState::Error | MigrationState::Resuming),
            // One that is stopped already is as quiet as can be.
            Phase::PrepareStop if stopped(state) => state != MigrationState::Error,
            _ => state == target,
        }
    }

    fn finish(&mut self, out: &mut Vec<Effect>) {
        let undone = self.mode == Mode::Undo && !self.broken.is(Mutation::CallsAnUndoDone);
        self.mode = Mode::Over;
        self.stages.clear();
        self.disarm(out, |_| true);
        let fenced: Vec<_> = self
            .participants
            .iter()
            .filter_map(|participant| match participant.standing {
                Standing::Fenced(_) if self.broken.is(Mutation::HidesWhoWasFenced) => None,
                Standing::Fenced(why) => Some((participant.member.id, why)),
                _ => None,
            })
            .collect();
        let stays = self.plan.on_failure == OnFailure::StayStopped;
        let machine = match self.plan.operation {
            _ if self.found_half => MachineState::Stopped,
            Operation::Pause | Operation::SwitchOver if undone && !stays && self.ran() => {
                MachineState::Running
            }
            Operation::Load if !self.told && self.ran() => MachineState::Running,
            // Whom a resume found running is left alone by its undo.
            Operation::Resume if !undone || self.all_ran() => MachineState::Running,
            Operation::TakeOver => MachineState::Running,
            _ => MachineState::Stopped,
        };
        let outcome = if !self.reasons.is_empty() {
            Outcome::Held { reasons: std::mem::take(&mut self.reasons), fenced }
        } else if !fenced.is_empty() {
            Outcome::Degraded { machine, fenced }
        } else if !undone {
            Outcome::Done
        } else if machine == MachineState::Stopped
            && (stays || self.found_half || self.plan.operation == Operation::Load)
        {
            Outcome::Stopped
        } else {
            Outcome::RolledBack
        };
        out.push(Effect::Finish(outcome));
    }

    /// True if anybody who is left ran when the transition began; if nobody is, anybody at all.
    fn ran(&self) -> bool {
        let (mut left, mut all) = (None, false);
        for participant in &self.participants {
            let ran = !stopped(participant.original);
            all |= ran;
            if participant.standing == Standing::Live {
                left = Some(left.unwrap_or(false) | ran);
            }
        }
        left.unwrap_or(all)
    }

    /// True if who is left neither all ran nor was all stopped when the transition began: a hold
    /// that ran out of its time may leave a machine so.
    fn is_half(&self) -> bool {
        let left = self.participants.iter().filter(|p| p.standing == Standing::Live);
        let mut activities = left.map(|participant| participant.original.activity());
        let Some(first) = activities.next() else { return false };
        first == Activity::NoPeer || activities.any(|other| other != first)
    }

    /// True if everybody who is left ran when the transition began; if nobody is, everybody.
    fn all_ran(&self) -> bool {
        let ran = |participant: &&Participant| !stopped(participant.original);
        let left = || self.participants.iter().filter(|p| p.standing == Standing::Live);
        match left().next() {
            Some(_) => left().all(|participant| ran(&participant)),
            None => self.participants.iter().all(|participant| ran(&participant)),
        }
    }

    fn note(&mut self, subject: Subject, kind: FailureKind) {
        let phase = self.phase;
        self.history.failures.push(Failure { subject, kind, epoch: self.epoch, phase });
    }

    fn arm(&mut self, timer: Timer, budget_ns: u64, out: &mut Vec<Effect>) {
        if matches!(timer, Timer::Phase(..)) && self.broken.is(Mutation::ArmsNoPhaseTimer) {
            return;
        }
        self.armed.push(timer);
        out.push(Effect::Arm(timer, budget_ns));
    }

    fn disarm(&mut self, out: &mut Vec<Effect>, which: impl Fn(Timer) -> bool) {
        self.armed.retain(|&timer| {
            let gone = which(timer);
            if gone {
                out.push(Effect::Disarm(timer));
            }
            !gone
        });
    }
}

fn stopped(state: MigrationState) -> bool {
    state.activity() == Activity::Stopped
}

/// What a participant has for the answer to a phase.
fn budget_of(member: &Member, phase: Phase) -> u64 {
    match phase {
        Phase::PrepareStop | Phase::PrepareStart => member.first_ns,
        _ => member.second_ns,
    }
}
