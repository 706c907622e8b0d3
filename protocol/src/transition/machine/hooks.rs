//! Which hooks are due, and what becomes of their calls.

use super::super::outcome::{FailureKind, HeldReason, Subject};
use super::super::plan::{Hook, HookId, HookMoment, Operation, Slot};
use super::{Effect, Mode, Timer, Transition};
use crate::mutation::Mutation;

impl Transition {
    pub(super) fn plan_hooks(&mut self, moment: HookMoment, slot: Slot) {
        let rank = |hook: &Hook| match moment {
            HookMoment::Stop => hook.stop_rank,
            HookMoment::Start => hook.start_rank,
        };
        // Going back is for what this transition has done, not for what it found.
        let goes_back = self.mode == Mode::Undo
            && !self.found_half
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
    pub(super) fn was_called(&self, hook: &Hook) -> bool {
        self.plan.hooks.iter().any(|found| found.id == hook.id && found.stopped != hook.stopped)
    }

    pub(super) fn run_hooks(&mut self, batch: Vec<(HookId, HookMoment)>, out: &mut Vec<Effect>) {
        for &(id, moment) in &batch {
            let budget = self.hooks.iter().find(|hook| hook.id == id).map_or(0, |h| h.budget_ns);
            self.arm(Timer::Hook(id, moment), budget, out);
            out.push(Effect::RunHook(id, moment));
        }
        self.running_hooks = batch;
    }

    /// Takes a returning hook off the list; false if nobody waits for it.
    pub(super) fn hook_returned(
        &mut self,
        id: HookId,
        moment: HookMoment,
        out: &mut Vec<Effect>,
    ) -> bool {
        let before = self.running_hooks.len();
        self.running_hooks.retain(|&running| running != (id, moment));
        self.overtaken.retain(|&call| call != (id, moment));
        let waited = self.running_hooks.len() < before;
        if waited {
            self.disarm(out, |timer| timer == Timer::Hook(id, moment));
        }
        waited
    }

    pub(super) fn hook_done(&mut self, id: HookId, moment: HookMoment, out: &mut Vec<Effect>) {
        if self.hook_returned(id, moment, out) {
            self.hook_called(id, moment);
        }
    }

    pub(super) fn hook_called(&mut self, id: HookId, moment: HookMoment) {
        if let Some(hook) = self.hooks.iter_mut().find(|hook| hook.id == id) {
            hook.stopped = moment == HookMoment::Stop;
        }
    }

    /// A hook does not return: it counts as called, and is not called again by this transition.
    pub(super) fn hook_hung(&mut self, id: HookId) {
        if let Some(at) = self.running_hooks.iter().position(|&(running, _)| running == id) {
            let (_, moment) = self.running_hooks.swap_remove(at);
            self.hook_called(id, moment);
        }
        self.hung.push(id);
        self.note(Subject::Hook(id), FailureKind::Hung);
    }

    pub(super) fn hook_failed(&mut self, id: HookId, moment: HookMoment, out: &mut Vec<Effect>) {
        let overtaken = self.overtaken.contains(&(id, moment));
        if !self.hook_returned(id, moment, out) {
            return;
        }
        self.note(Subject::Hook(id), FailureKind::Refused);
        match self.mode {
            Mode::Forward if self.broken.is(Mutation::GoesOnAfterAFailedHook) => {}
            Mode::Forward => self.undo(out),
            // It is as it was, and what follows goes on from there: it calls the hook again if it has to.
            _ if overtaken => {}
            _ => self.hold(HeldReason::HookFailed(id), out),
        }
    }
}
