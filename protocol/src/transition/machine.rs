//! The state machine itself: events in, effects out.

use super::outcome::{Failure, FailureKind, HeldReason, Loss, MachineState, Outcome, Subject};
use super::plan::{
    Hook, HookId, HookMoment, Member, MemberKind, OnFailure, OnLoss, Operation, ParticipantId,
    Phases, Plan, PlanError, Row, Slot, row,
};
use super::undo::{UndoStep, undo_row};
use crate::message::{Abort, Command, Epoch, Phase, Query, Term};
use crate::migration::{Activity, MigrationState};
use std::collections::VecDeque;

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
    /// A hook's return.
    Hook(HookId),
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Live,
    Fencing(Loss),
    Fenced(Loss),
    Unproven(Loss),
}

#[derive(Clone, Debug, PartialEq, Eq)]
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Phase(Phase),
    Status,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    NewEpoch,
    Hooks(HookMoment, Slot),
    Phase(Phase, Aim),
    Query,
    /// Between the queries of a take-over and what follows from their answers.
    Decide,
}

/// How a participant's target in a phase is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    First,
    Second,
    Undo(UndoStep),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Forward,
    Undo,
    Hold,
    Over,
}

/// One transition of a machine; see the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    awaited: usize,
    fencing: usize,
    told: bool,
    second_phase: bool,
    armed: Vec<Timer>,
    reasons: Vec<HeldReason>,
    failures: Vec<Failure>,
    strays: u64,
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
            awaited: 0,
            fencing: 0,
            told: false,
            second_phase: false,
            armed: Vec::new(),
            reasons: Vec::new(),
            failures: Vec::new(),
            strays: 0,
            plan,
        })
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
        &self.failures
    }

    /// How many answers were stale, duplicate, foreign or out of order, and changed nothing.
    #[must_use]
    pub fn strays(&self) -> u64 {
        self.strays
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
        if self.mode == Mode::Over {
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
            if self.awaited > 0 || self.fencing > 0 || !self.running_hooks.is_empty() {
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

    fn plan_hooks(&mut self, moment: HookMoment, slot: Slot) {
        let rank = |hook: &Hook| match moment {
            HookMoment::Stop => hook.stop_rank,
            HookMoment::Start => hook.start_rank,
        };
        // Going back is for what this transition has done, not for what it found.
        let goes_back = self.mode == Mode::Undo
            && match self.plan.operation {
                Operation::Pause | Operation::SwitchOver => moment == HookMoment::Start,
                Operation::Resume => moment == HookMoment::Stop,
                Operation::Load | Operation::TakeOver => false,
            };
        let mut due: Vec<_> = self
            .hooks
            .iter()
            .filter(|hook| match moment {
                HookMoment::Stop => hook.stop == slot && !hook.stopped,
                HookMoment::Start => hook.start == slot && hook.stopped,
            })
            .filter(|hook| !self.hung.contains(&hook.id))
            .filter(|hook| !goes_back || self.was_called(hook))
            .collect();
        due.sort_by_key(|hook| rank(hook));
        self.batches = due
            .chunk_by(|one, other| rank(one) == rank(other))
            .map(|batch| batch.iter().map(|hook| (hook.id, moment)).collect())
            .collect();
    }

    /// True if this transition has left the hook otherwise than it found it.
    fn was_called(&self, hook: &Hook) -> bool {
        self.plan.hooks.iter().any(|found| found.id == hook.id && found.stopped != hook.stopped)
    }

    fn run_hooks(&mut self, batch: Vec<(HookId, HookMoment)>, out: &mut Vec<Effect>) {
        for &(id, moment) in &batch {
            let budget = self.hooks.iter().find(|hook| hook.id == id).map_or(0, |h| h.budget_ns);
            self.arm(Timer::Hook(id), budget, out);
            out.push(Effect::RunHook(id, moment));
        }
        self.running_hooks = batch;
    }

    fn send_phase(&mut self, phase: Phase, aim: Aim, out: &mut Vec<Effect>) {
        self.phase = Some(phase);
        self.told = true;
        self.second_phase |= aim == Aim::Second;
        let mut budgets = Vec::new();
        for index in 0..self.participants.len() {
            let participant = &self.participants[index];
            if participant.standing != Standing::Live {
                continue;
            }
            let Some(target) = self.target(participant, aim) else { continue };
            let Member { id, first_ns, second_ns, lease_ns, .. } = participant.member;
            let budget_ns = match phase {
                Phase::PrepareStop | Phase::PrepareStart => first_ns,
                _ => second_ns,
            };
            let forward = self.mode == Mode::Forward;
            let command = Command {
                term: self.plan.term,
                epoch: self.epoch,
                phase,
                target,
                budget_ns,
                lease_ns: if phase == Phase::Stop && forward { lease_ns } else { 0 },
            };
            self.await_answer(index, Asked::Phase(phase), target);
            if !budgets.contains(&budget_ns) {
                budgets.push(budget_ns);
            }
            out.push(Effect::Send(id, command));
        }
        for budget_ns in budgets {
            self.arm(Timer::Phase(self.epoch, phase, budget_ns), budget_ns, out);
        }
    }

    /// Where a participant is to go in a phase; `None` if it is not told that phase.
    fn target(&self, participant: &Participant, aim: Aim) -> Option<MigrationState> {
        use MigrationState as S;
        let Member { flags, kind, .. } = participant.member;
        let original = participant.original;
        let was_stopped = stopped(original);
        let stops = matches!(self.plan.operation, Operation::Pause | Operation::SwitchOver);
        let wanted = match aim {
            Aim::First | Aim::Second => match row(self.plan.operation, original) {
                Row::Take { first, .. } if aim == Aim::First => first,
                Row::Take { second, .. } => second,
                Row::Refuse(_) => return None,
            },
            // What ran before a resume, or stood before a stop, is left as it was by its undo. In
            // a hold and in a take-over everybody is meant.
            Aim::Undo(UndoStep::PrepareStop) => match (participant.state, participant.moving) {
                _ if self.ran_before_resume(original) => match original.activity() {
                    Activity::Full => return None,
                    Activity::NoPeer | Activity::Stopped => original,
                },
                // As quiet as can be, and no way leads out but a reset.
                (S::Error, _) => return None,
                (state, Some(to)) if stopped(state) && !stopped(to) => S::RunningP2p,
                (state, _) if stopped(state) => state,
                // It cannot be given up in between, so it is stopped when it hears of this.
                (_, Some(to)) if stopped(to) && kind == MemberKind::Local => to,
                (S::PreCopy | S::PreCopyP2p, _) => S::PreCopyP2p,
                _ => S::RunningP2p,
            },
            Aim::Undo(UndoStep::Stop) => match original {
                _ if self.ran_before_resume(original) => return None,
                S::StopCopy | S::Resuming if participant.state == original => original,
                _ => S::Stop,
            },
            Aim::Undo(UndoStep::PrepareStart) if was_stopped => return None,
            Aim::Undo(UndoStep::PrepareStart) => S::RunningP2p,
            Aim::Undo(UndoStep::Start) if stops && was_stopped => return None,
            Aim::Undo(UndoStep::Start) => match original {
                // A stream that was given up is not opened again.
                S::PreCopy if self.second_phase => S::Running,
                S::PreCopyP2p if self.second_phase => S::RunningP2p,
                S::RunningP2p if self.plan.operation == Operation::TakeOver => S::Running,
                S::PreCopyP2p if self.plan.operation == Operation::TakeOver => S::PreCopy,
                state => state,
            },
            Aim::Undo(UndoStep::Reset) => participant.state,
            Aim::Undo(UndoStep::NewEpoch) => return None,
        };
        // Without P2P states there is nothing to do in a first phase.
        flags.has(wanted).then_some(wanted)
    }

    /// True in the undo of a resume for a participant that was not stopped before. To stop it
    /// would be more than going back, and one of them may be writing into another.
    fn ran_before_resume(&self, original: MigrationState) -> bool {
        self.mode == Mode::Undo && self.plan.operation == Operation::Resume && !stopped(original)
    }

    fn send_queries(&mut self, out: &mut Vec<Effect>) {
        let query = Query { term: self.plan.term, epoch: self.epoch };
        let mut budget_ns = 0;
        for index in 0..self.participants.len() {
            let Participant { standing, member, state, .. } = self.participants[index];
            if standing == Standing::Live {
                self.await_answer(index, Asked::Status, state);
                budget_ns = budget_ns.max(member.first_ns);
                out.push(Effect::Query(member.id, query));
            }
        }
        self.arm(Timer::Query(self.epoch), budget_ns, out);
    }

    /// A take-over starts nothing by itself once anybody had reached STOP.
    fn decide_take_over(&mut self, out: &mut Vec<Effect>) {
        let live = || self.participants.iter().filter(|p| p.standing == Standing::Live);
        if live().any(|p| stopped(p.state) || p.moving.is_some_and(stopped)) {
            self.hold(HeldReason::TakenOverStopped, out);
        } else if live().any(|p| p.state.activity() != Activity::Full || p.moving.is_some()) {
            self.mode = Mode::Undo;
            self.arm(Timer::Undo, self.plan.undo_ns, out);
            self.push_undo_epoch(&[UndoStep::Start], Some(HookMoment::Start), false);
        }
    }

    fn await_answer(&mut self, index: usize, asked: Asked, target: MigrationState) {
        let awaited = &mut self.participants[index].awaited;
        if awaited.replace((asked, target)).is_none() {
            self.awaited += 1;
        }
    }

    fn settle(&mut self, index: usize) {
        if self.participants[index].awaited.take().is_some() {
            self.awaited -= 1;
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
            self.strays += 1;
            return;
        };
        let asked = match answer {
            Answer::Status { .. } => Asked::Status,
            Answer::Reached | Answer::Refused => Asked::Phase(phase),
        };
        let target = match self.participants[index].awaited {
            Some((expected, target))
                if expected == asked && term == self.plan.term && epoch == self.epoch =>
            {
                target
            }
            _ => {
                self.strays += 1;
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

    fn refused(&mut self, index: usize, out: &mut Vec<Effect>) {
        let Participant { member, state, .. } = self.participants[index];
        self.note(Subject::Participant(member.id), FailureKind::Refused);
        match self.mode {
            // One that cannot be fenced cannot be gone on without, but there is a way back.
            Mode::Forward if self.goes_on_without(&member) && member.kind == MemberKind::Process => {
                self.fence(index, Loss::Refused, out);
            }
            Mode::Forward => self.undo(out),
            // The start that follows takes it along from where it is.
            Mode::Undo
                if self.phase == Some(Phase::Stop)
                    && state.activity() == Activity::NoPeer
                    && self.stages.contains(&Stage::Phase(
                        Phase::PrepareStart,
                        Aim::Undo(UndoStep::PrepareStart),
                    )) => {}
            // A hold asks for no more than that.
            Mode::Hold if stopped(state) => {}
            Mode::Undo | Mode::Hold => self.fence(index, Loss::Refused, out),
            Mode::Over => {}
        }
    }

    fn goes_on_without(&self, member: &Member) -> bool {
        self.plan.operation == Operation::TakeOver || member.on_loss == OnLoss::ContinueWithout
    }

    fn lost(&mut self, who: ParticipantId, why: Loss, out: &mut Vec<Effect>) {
        let Some(index) = self.index(who) else { return };
        let Participant { member, standing, .. } = self.participants[index];
        if standing != Standing::Live {
            return;
        }
        self.note(Subject::Participant(who), FailureKind::Lost(why));
        self.fence(index, why, out);
        if self.mode == Mode::Forward && !self.goes_on_without(&member) {
            self.undo(out);
        }
    }

    /// Takes a participant out of the machine.
    fn fence(&mut self, index: usize, why: Loss, out: &mut Vec<Effect>) {
        self.settle(index);
        let Member { id, kind, .. } = self.participants[index].member;
        match kind {
            MemberKind::Process => {
                self.participants[index].standing = Standing::Fencing(why);
                self.fencing += 1;
                out.push(Effect::Fence(id, why));
                self.arm(Timer::Fence(id), self.plan.fence_ns, out);
            }
            MemberKind::Local => {
                self.participants[index].standing = Standing::Unproven(why);
                self.hold(HeldReason::LocalHung(id), out);
            }
        }
    }

    fn fenced(&mut self, who: ParticipantId, out: &mut Vec<Effect>) {
        let Some(index) = self.index(who) else { return };
        let Participant { member, standing, .. } = self.participants[index];
        match standing {
            Standing::Fencing(why) => {
                self.participants[index].standing = Standing::Fenced(why);
                self.fencing -= 1;
                self.disarm(out, |timer| timer == Timer::Fence(who));
            }
            // Too late for this transition, which is a hold by now; not too late to be reported.
            Standing::Unproven(why) if member.kind == MemberKind::Process => {
                self.participants[index].standing = Standing::Fenced(why);
            }
            Standing::Unproven(_) | Standing::Live | Standing::Fenced(_) => {}
        }
    }

    fn fence_unproven(&mut self, who: ParticipantId, out: &mut Vec<Effect>) {
        let Some(index) = self.index(who) else { return };
        if let Standing::Fencing(why) = self.participants[index].standing {
            self.participants[index].standing = Standing::Unproven(why);
            self.fencing -= 1;
            self.note(Subject::Participant(who), FailureKind::FenceUnproven);
            self.hold(HeldReason::FenceUnproven(who), out);
        }
    }

    /// Takes a returning hook off the list; false if nobody waits for it.
    fn hook_returned(&mut self, id: HookId, moment: HookMoment, out: &mut Vec<Effect>) -> bool {
        let before = self.running_hooks.len();
        self.running_hooks.retain(|&running| running != (id, moment));
        let waited = self.running_hooks.len() < before;
        if waited {
            self.disarm(out, |timer| timer == Timer::Hook(id));
        }
        waited
    }

    fn hook_done(&mut self, id: HookId, moment: HookMoment, out: &mut Vec<Effect>) {
        if self.hook_returned(id, moment, out) {
            self.hook_called(id, moment);
        }
    }

    fn hook_called(&mut self, id: HookId, moment: HookMoment) {
        if let Some(hook) = self.hooks.iter_mut().find(|hook| hook.id == id) {
            hook.stopped = moment == HookMoment::Stop;
        }
    }

    /// A hook does not return: it counts as called, and is not called again by this transition.
    fn hook_hung(&mut self, id: HookId) {
        if let Some(at) = self.running_hooks.iter().position(|&(running, _)| running == id) {
            let (_, moment) = self.running_hooks.swap_remove(at);
            self.hook_called(id, moment);
        }
        self.hung.push(id);
        self.note(Subject::Hook(id), FailureKind::Hung);
    }

    fn hook_failed(&mut self, id: HookId, moment: HookMoment, out: &mut Vec<Effect>) {
        if !self.hook_returned(id, moment, out) {
            return;
        }
        self.note(Subject::Hook(id), FailureKind::Refused);
        match self.mode {
            Mode::Forward => self.undo(out),
            _ => self.hold(HeldReason::HookFailed(id), out),
        }
    }

    fn expired(&mut self, timer: Timer, out: &mut Vec<Effect>) {
        let Some(position) = self.armed.iter().position(|&armed| armed == timer) else { return };
        self.armed.swap_remove(position);
        match timer {
            Timer::Phase(_, phase, budget_ns) => {
                let late: Vec<_> = self
                    .participants
                    .iter()
                    .filter(|p| p.awaited.is_some())
                    .filter(|p| budget_ns >= budget_of(&p.member, phase))
                    .map(|p| p.member.id)
                    .collect();
                self.time_out(late, out);
            }
            Timer::Query(_) => {
                let late: Vec<_> = self.awaited().collect();
                self.time_out(late, out);
            }
            Timer::Hook(id) => {
                self.hook_hung(id);
                self.hold(HeldReason::HookHung(id), out);
            }
            Timer::Fence(who) => self.fence_unproven(who, out),
            Timer::Undo => self.hold(HeldReason::UndoExpired, out),
            Timer::Hold => {
                // The end, proven or not.
                let late: Vec<_> = self.awaited().collect();
                self.time_out(late, out);
                for index in 0..self.participants.len() {
                    if let Standing::Fencing(_) = self.participants[index].standing {
                        let id = self.participants[index].member.id;
                        self.fence_unproven(id, out);
                    }
                }
                while let Some(&(id, _)) = self.running_hooks.last() {
                    self.hook_hung(id);
                    self.hold(HeldReason::HookHung(id), out);
                }
                self.finish(out);
            }
        }
    }

    /// Everybody who is late is lost before the failure is acted upon: one undo for all.
    fn time_out(&mut self, late: Vec<ParticipantId>, out: &mut Vec<Effect>) {
        let mut fails = false;
        for who in late {
            let Some(index) = self.index(who) else { continue };
            let member = self.participants[index].member;
            self.note(Subject::Participant(who), FailureKind::Lost(Loss::Timeout));
            fails |= !self.goes_on_without(&member);
            self.fence(index, Loss::Timeout, out);
        }
        if fails && self.mode == Mode::Forward {
            self.undo(out);
        }
    }

    /// Gives up what is under way: nobody is waited for any more except fences.
    fn give_up(&mut self, out: &mut Vec<Effect>) {
        let abort = Abort { term: self.plan.term, epoch: self.epoch };
        for index in 0..self.participants.len() {
            let Participant { member, awaited, .. } = self.participants[index];
            self.settle(index);
            if let Some((Asked::Phase(_), target)) = awaited {
                self.participants[index].moving = Some(target);
                out.push(Effect::Abort(member.id, abort));
            }
        }
        self.batches.clear();
        self.stages.clear();
        self.disarm(out, |timer| matches!(timer, Timer::Phase(..) | Timer::Query(_)));
    }

    fn undo(&mut self, out: &mut Vec<Effect>) {
        self.give_up(out);
        self.mode = Mode::Undo;
        self.arm(Timer::Undo, self.plan.undo_ns, out);
        let Plan { operation, on_failure, .. } = self.plan;
        let mut steps = undo_row(operation, on_failure, self.second_phase);
        let nothing_to_undo = !self.told && on_failure == OnFailure::Rollback;
        // Hooks go the way of the last epoch of the row.
        while let Some(at) = steps.iter().position(|&step| step == UndoStep::NewEpoch) {
            self.push_undo_epoch(&steps[..at], None, nothing_to_undo);
            steps = &steps[at + 1..];
        }
        let moment = match steps.last() {
            Some(UndoStep::Start) => Some(HookMoment::Start),
            Some(UndoStep::Stop) if operation != Operation::Load => Some(HookMoment::Stop),
            _ => None,
        };
        self.push_undo_epoch(steps, moment, nothing_to_undo);
    }

    fn push_undo_epoch(
        &mut self,
        steps: &[UndoStep],
        moment: Option<HookMoment>,
        hooks_only: bool,
    ) {
        let (last, first) = match steps {
            [first, last] => (Some(*last), Some(*first)),
            [last] => (Some(*last), None),
            _ => (None, None),
        };
        let phase = |step: Option<UndoStep>| {
            let step = step.filter(|_| !hooks_only)?;
            Some(Stage::Phase(step.phase()?, Aim::Undo(step)))
        };
        let hooks = |slot| moment.map(|moment| Stage::Hooks(moment, slot));
        let stages = [
            Some(Stage::NewEpoch),
            hooks(Slot::Before),
            phase(first),
            hooks(Slot::Between),
            phase(last),
            hooks(Slot::After),
        ];
        self.stages.extend(stages.into_iter().flatten());
    }

    /// Something cannot be proven: whatever can be goes to STOP, and nothing starts.
    fn hold(&mut self, reason: HeldReason, out: &mut Vec<Effect>) {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
        if self.mode == Mode::Hold || self.mode == Mode::Over {
            return;
        }
        self.give_up(out);
        self.mode = Mode::Hold;
        self.disarm(out, |timer| timer == Timer::Undo);
        self.arm(Timer::Hold, self.plan.undo_ns, out);
        self.push_undo_epoch(
            &[UndoStep::PrepareStop, UndoStep::Stop],
            Some(HookMoment::Stop),
            false,
        );
    }

    fn finish(&mut self, out: &mut Vec<Effect>) {
        let undone = self.mode == Mode::Undo;
        let taken_over = self.plan.operation == Operation::TakeOver;
        self.mode = Mode::Over;
        self.stages.clear();
        self.disarm(out, |_| true);
        let fenced: Vec<_> = self
            .participants
            .iter()
            .filter_map(|participant| match participant.standing {
                Standing::Fenced(why) => Some((participant.member.id, why)),
                _ => None,
            })
            .collect();
        let stays = self.plan.on_failure == OnFailure::StayStopped;
        let machine = match self.plan.operation {
            Operation::Pause | Operation::SwitchOver if undone && !stays && self.ran() => {
                MachineState::Running
            }
            Operation::Load if !self.told && self.ran() => MachineState::Running,
            Operation::Resume if !undone => MachineState::Running,
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
            && !taken_over
            && (stays || self.plan.operation == Operation::Load)
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

    fn note(&mut self, subject: Subject, kind: FailureKind) {
        let phase = self.phase;
        self.failures.push(Failure { subject, kind, epoch: self.epoch, phase });
    }

    fn arm(&mut self, timer: Timer, budget_ns: u64, out: &mut Vec<Effect>) {
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
