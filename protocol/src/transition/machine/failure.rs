//! What is done about a participant or a hook that fails: fence, undo, hold.

use super::super::outcome::{FailureKind, HeldReason, Loss, Subject};
use super::super::plan::{
    HookMoment, Member, MemberKind, OnFailure, OnLoss, Operation, ParticipantId, Plan, Slot,
};
use super::super::undo::{UndoStep, undo_row};
use super::{
    Aim, Asked, Effect, Mode, Participant, Stage, Standing, Timer, Transition, budget_of, stopped,
};
use crate::message::{Abort, Phase};
use crate::migration::{Activity, MigrationState};
use crate::mutation::Mutation;

impl Transition {
    pub(super) fn refused(&mut self, index: usize, out: &mut Vec<Effect>) {
        let Participant { member, state, .. } = self.participants[index];
        self.note(Subject::Participant(member.id), FailureKind::Refused);
        match self.mode {
            Mode::Forward if self.broken.is(Mutation::GoesOnAfterARefusal) => {}
            // One that cannot be fenced cannot be gone on without, but there is a way back.
            Mode::Forward
                if self.goes_on_without(&member) && member.kind == MemberKind::Process =>
            {
                self.fence(index, Loss::Refused, out);
            }
            Mode::Forward => self.undo(out),
            Mode::Undo if self.broken.is(Mutation::UndoesAnUndo) => self.undo(out),
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

    pub(super) fn goes_on_without(&self, member: &Member) -> bool {
        self.plan.operation == Operation::TakeOver || member.on_loss == OnLoss::ContinueWithout
    }

    pub(super) fn lost(&mut self, who: ParticipantId, why: Loss, out: &mut Vec<Effect>) {
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

    /// A participant has left STOP by itself, as its lease had promised. It is neither lost nor
    /// stopped, so a stop that has not ended yet cannot end well any more.
    pub(super) fn lease_expired(
        &mut self,
        who: ParticipantId,
        state: MigrationState,
        out: &mut Vec<Effect>,
    ) {
        let stood =
            |p: &Participant| p.standing == Standing::Live && stopped(p.state) && p.state != state;
        let Some(index) = self.index(who).filter(|&index| stood(&self.participants[index])) else {
            self.history.strays += 1;
            return;
        };
        if self.broken.is(Mutation::TakesWhoLeftStopForStopped) {
            return;
        }
        let participant = &mut self.participants[index];
        participant.state = state;
        participant.moving = None;
        match self.mode {
            Mode::Forward => {}
            // There is no going back to a machine of which a part has left STOP.
            Mode::Undo if !self.undo_stops && !stopped(state) => {
                participant.original = state;
                return self.stop_instead(out);
            }
            Mode::Undo | Mode::Hold | Mode::Over => return,
        }
        let stops = matches!(self.plan.operation, Operation::Pause | Operation::SwitchOver);
        if !self.told || participant.awaited.is_some() {
            // It had left before it heard of this transition: every command ends a lease.
            participant.original = state;
        } else if stops && !stopped(state) {
            self.note(Subject::Participant(who), FailureKind::LeaseExpired);
            self.undo(out);
        }
    }

    /// Takes a participant out of the machine.
    pub(super) fn fence(&mut self, index: usize, why: Loss, out: &mut Vec<Effect>) {
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

    pub(super) fn fenced(&mut self, who: ParticipantId, out: &mut Vec<Effect>) {
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

    pub(super) fn fence_unproven(&mut self, who: ParticipantId, out: &mut Vec<Effect>) {
        let Some(index) = self.index(who) else { return };
        if let Standing::Fencing(why) = self.participants[index].standing {
            self.fencing -= 1;
            if self.broken.is(Mutation::TakesUnprovenForProven) {
                self.participants[index].standing = Standing::Fenced(why);
                return;
            }
            self.participants[index].standing = Standing::Unproven(why);
            self.note(Subject::Participant(who), FailureKind::FenceUnproven);
            self.hold(HeldReason::FenceUnproven(who), out);
        }
    }

    pub(super) fn expired(&mut self, timer: Timer, out: &mut Vec<Effect>) {
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
            Timer::Hook(id, _) => {
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
                // The proofs that are missing would not be all that is missing.
                let runs = |p: &Participant| p.standing == Standing::Live && !stopped(p.state);
                if self.participants.iter().any(runs) {
                    self.hold(HeldReason::UndoExpired, out);
                }
                self.finish(out);
            }
        }
    }

    /// Everybody who is late is lost before the failure is acted upon: one undo for all.
    pub(super) fn time_out(&mut self, late: Vec<ParticipantId>, out: &mut Vec<Effect>) {
        let mut fails = false;
        for who in late {
            let Some(index) = self.index(who) else { continue };
            if self.broken.is(Mutation::TakesSilenceForAnAck) {
                self.settle(index);
                continue;
            }
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
    pub(super) fn give_up(&mut self, out: &mut Vec<Effect>) {
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
        if self.mode == Mode::Forward {
            self.overtaken.clone_from(&self.running_hooks);
        }
        self.disarm(out, |timer| matches!(timer, Timer::Phase(..) | Timer::Query(_)));
    }

    pub(super) fn undo(&mut self, out: &mut Vec<Effect>) {
        self.give_up(out);
        self.mode = Mode::Undo;
        self.arm(Timer::Undo, self.plan.undo_ns, out);
        if self.broken.is(Mutation::UndoesNothing) {
            return;
        }
        let Plan { operation, on_failure, .. } = self.plan;
        let second_phase =
            self.second_phase && !self.broken.is(Mutation::UndoesTheSecondPhaseAsTheFirst);
        self.found_half = self.is_half() && !self.broken.is(Mutation::GoesBackToAHalf);
        let mut steps = match operation {
            Operation::Pause | Operation::SwitchOver if self.found_half => {
                undo_row(operation, OnFailure::StayStopped, second_phase)
            }
            // Some may write into others already.
            Operation::Resume if self.found_half => undo_row(operation, on_failure, true),
            Operation::Load if self.found_half && !self.told => {
                &[UndoStep::PrepareStop, UndoStep::Stop]
            }
            _ => undo_row(operation, on_failure, second_phase),
        };
        let nothing_to_undo = !self.told && on_failure == OnFailure::Rollback && !self.found_half;
        self.undo_stops = steps.contains(&UndoStep::Stop) && !nothing_to_undo;
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

    /// An undo that was to leave everybody where they are brings everybody to STOP.
    fn stop_instead(&mut self, out: &mut Vec<Effect>) {
        self.give_up(out);
        self.found_half = true;
        self.undo_stops = true;
        self.push_undo_epoch(
            &[UndoStep::PrepareStop, UndoStep::Stop],
            Some(HookMoment::Stop),
            false,
        );
    }

    pub(super) fn push_undo_epoch(
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
    pub(super) fn hold(&mut self, reason: HeldReason, out: &mut Vec<Effect>) {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
        if self.mode == Mode::Hold || self.mode == Mode::Over {
            return;
        }
        self.give_up(out);
        self.mode = Mode::Hold;
        self.disarm(out, |timer| timer == Timer::Undo);
        if self.broken.is(Mutation::HoldsWithoutStopping) {
            return;
        }
        self.arm(Timer::Hold, self.plan.undo_ns, out);
        self.push_undo_epoch(
            &[UndoStep::PrepareStop, UndoStep::Stop],
            Some(HookMoment::Stop),
            false,
        );
    }
}
