//! Who is told what: the targets of every phase, forward, back and in a hold.

use super::super::outcome::HeldReason;
use super::super::plan::{HookMoment, Member, MemberKind, Operation, Row, row};
use super::super::undo::UndoStep;
use super::{
    Aim, Asked, Effect, Mode, Participant, Standing, Timer, Transition, budget_of, stopped,
};
use crate::message::{Command, Phase, Query};
use crate::migration::{Activity, MigrationState};
use crate::mutation::Mutation;

impl Transition {
    pub(super) fn send_phase(&mut self, phase: Phase, aim: Aim, out: &mut Vec<Effect>) {
        self.phase = Some(phase);
        self.told = true;
        self.second_phase |= aim == Aim::Second;
        let mut budgets = Vec::new();
        for index in 0..self.participants.len() {
            let participant = &self.participants[index];
            if participant.standing != Standing::Live || self.forgets(index) {
                continue;
            }
            let Some(target) = self.target(participant, aim) else { continue };
            let Member { id, lease_ns, .. } = participant.member;
            let budget_ns = budget_of(&participant.member, phase);
            // A state that is half loaded is not to run, whoever waits for the device.
            let leased = phase == Phase::Stop
                && self.mode == Mode::Forward
                && target != MigrationState::Resuming;
            let command = Command {
                term: self.plan.term,
                epoch: self.epoch,
                phase,
                target,
                budget_ns,
                lease_ns: if leased { lease_ns } else { 0 },
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

    /// Whether a fault is switched on that leaves this participant out.
    fn forgets(&self, index: usize) -> bool {
        let mutation = match self.mode {
            Mode::Forward => Mutation::ForgetsTheLast,
            _ => Mutation::UndoForgetsTheLast,
        };
        self.broken.is(mutation) && index + 1 == self.participants.len()
    }

    /// Where a participant is to go in a phase; `None` if it is not told that phase.
    pub(super) fn target(&self, participant: &Participant, aim: Aim) -> Option<MigrationState> {
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
    pub(super) fn ran_before_resume(&self, original: MigrationState) -> bool {
        self.mode == Mode::Undo
            && self.plan.operation == Operation::Resume
            && !self.found_half
            && !stopped(original)
    }

    pub(super) fn send_queries(&mut self, out: &mut Vec<Effect>) {
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
    pub(super) fn decide_take_over(&mut self, out: &mut Vec<Effect>) {
        let live = || self.participants.iter().filter(|p| p.standing == Standing::Live);
        let blind = self.broken.is(Mutation::StartsWhatWasStopped);
        if !blind && live().any(|p| stopped(p.state) || p.moving.is_some_and(stopped)) {
            self.hold(HeldReason::TakenOverStopped, out);
        } else if live().any(|p| p.state.activity() != Activity::Full || p.moving.is_some()) {
            self.mode = Mode::Undo;
            self.arm(Timer::Undo, self.plan.undo_ns, out);
            self.push_undo_epoch(&[UndoStep::Start], Some(HookMoment::Start), false);
        }
    }

    pub(super) fn await_answer(&mut self, index: usize, asked: Asked, target: MigrationState) {
        let awaited = &mut self.participants[index].awaited;
        if awaited.replace((asked, target)).is_none() {
            self.awaited += 1;
        }
    }

    pub(super) fn settle(&mut self, index: usize) {
        if self.participants[index].awaited.take().is_some() {
            self.awaited -= 1;
        }
    }
}
