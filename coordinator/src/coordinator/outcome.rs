//! What the end of a transition means: where the machine is now, what is still to be proven, and who is
//! told.

use super::slips::Slip;
use super::state::{Active, Local, Purpose, Standing, State};
use crate::clock;
use crate::events::MachineEvent;
use crate::report::nanos;
use standstill_protocol::migration::Activity;
use standstill_protocol::transition::{
    HeldReason, HookId, Loss, MachineState, Operation, Outcome, ParticipantId,
};
use std::sync::Arc;

impl State {
    pub(super) fn finish(&mut self, outcome: Outcome) {
        let Some(active) = self.active.take() else { return };
        self.unsettled = true;
        self.epoch = active.transition.epoch();
        for device in self.devices.iter_mut() {
            if let Some(state) = active.transition.state(device.id) {
                device.state = state;
            }
        }
        for local in &mut self.locals {
            if let Some(state) = active.transition.state(local.id) {
                local.state = state;
            }
        }
        if active.purpose.is_internal() {
            return self.finish_internal(active, &outcome);
        }
        for entry in &mut self.hooks {
            if let Some(hook) = active.transition.hooks().iter().find(|h| h.id == entry.hook.id) {
                entry.hook.stopped = hook.stopped;
            }
        }
        self.machine = match (&outcome, active.operation) {
            (Outcome::Done, Operation::Resume)
            | (Outcome::Done | Outcome::RolledBack, Operation::TakeOver) => MachineState::Running,
            (Outcome::Done | Outcome::Stopped, _) => MachineState::Stopped,
            (Outcome::RolledBack, _) => self.machine,
            (Outcome::Degraded { machine, .. }, _) => *machine,
            (Outcome::Held { .. }, _) => MachineState::Held,
        };
        self.held = match &outcome {
            Outcome::Held { reasons, fenced } => reasons
                .iter()
                .filter_map(|&reason| self.still_held(reason, fenced, &active))
                .collect(),
            // An attempt that was undone has proven nothing.
            Outcome::RolledBack => std::mem::take(&mut self.held),
            _ => Vec::new(),
        };
        if self.machine == MachineState::Held && self.held.is_empty() {
            self.machine = MachineState::Stopped;
        }
        let downtime_ns = self.downtime(&active);
        let unproven = self.held.iter().filter_map(|reason| match reason {
            HeldReason::FenceUnproven(id) => Some(*id),
            _ => None,
        });
        for id in unproven.collect::<Vec<_>>() {
            self.fence_expired(id);
        }
        let Active { transition, recorder, purpose, .. } = active;
        let report = Arc::new(recorder.finish(&transition, outcome, self.machine, downtime_ns));
        self.emit(MachineEvent::Transition(Arc::clone(&report)));
        if let Purpose::Owner(owner) = purpose
            && !self.slips.is(Slip::ForgetsTheOwner)
        {
            // Whoever asked may have given up; the machine is where it is all the same.
            let _ = owner.reply.send(Ok(report));
        }
    }

    /// A device was moved by itself: the machine is where it was.
    fn finish_internal(&mut self, active: Active, outcome: &Outcome) {
        let Active { operation, transition, recorder, purpose, .. } = active;
        let report = recorder.finish(&transition, outcome.clone(), self.machine, None);
        tracing::debug!(%report, "a device was moved by itself");
        let text = report.failure_lines().join("; ");
        if let Outcome::Held { reasons, .. } = outcome {
            let unproven = reasons.iter().copied().filter(|reason| match reason {
                HeldReason::FenceUnproven(id) => self
                    .devices
                    .get(*id)
                    .is_some_and(|device| matches!(device.standing, Standing::Lost(..))),
                _ => false,
            });
            let unproven: Vec<_> = unproven.collect();
            for reason in &unproven {
                if let HeldReason::FenceUnproven(id) = reason {
                    self.fence_expired(*id);
                }
            }
            // Something may run in a machine that is to stand.
            if self.machine != MachineState::Running && !unproven.is_empty() {
                let began = self.machine == MachineState::Stopped;
                self.machine = MachineState::Held;
                self.held.extend(unproven);
                if began && let Purpose::Join(id) | Purpose::Leave(id) = purpose {
                    let device = self.names.participant(id);
                    self.emit(MachineEvent::HoldBegan { device });
                }
            }
        }
        match purpose {
            Purpose::Join(id) if self.local(id).is_some() => self.local_moved(id, outcome, &text),
            Purpose::Join(id) => self.newcomer_moved(id, operation, outcome, &text),
            Purpose::Leave(id) => self.leaver_moved(id),
            Purpose::Owner(_) => {}
        }
    }

    /// A local device that was left out is where the machine is, and counts again; or it is not.
    fn local_moved(&mut self, id: ParticipantId, outcome: &Outcome, text: &str) {
        let Some(local) = self.local(id) else { return };
        local.returned = false;
        local.hung = *outcome != Outcome::Done;
        let (device, state) = (&local.name, local.state);
        match local.hung {
            false => tracing::info!(device, %state, "a local device that was left out is back"),
            true => tracing::warn!(device, text, "a local device stays left out"),
        }
    }

    /// What is left of a reason at the end of the hold: some of it may be proven by then.
    fn still_held(
        &mut self,
        reason: HeldReason,
        fenced: &[(ParticipantId, Loss)],
        active: &Active,
    ) -> Option<HeldReason> {
        match reason {
            HeldReason::FenceUnproven(id) => {
                (!fenced.iter().any(|&(who, _)| who == id)).then_some(reason)
            }
            HeldReason::LocalHung(id) => {
                let answered = active.recorder.has_answered(id);
                let stopped = |local: &mut Local| local.state.activity() == Activity::Stopped;
                (!answered || !self.local(id).is_some_and(stopped)).then_some(reason)
            }
            HeldReason::HookHung(id) => {
                let entry = self.hooks.iter_mut().find(|entry| entry.hook.id == id)?;
                match active.recorder.left_stopped(id) {
                    None => {
                        entry.hung = true;
                        Some(reason)
                    }
                    Some(stopped) => {
                        entry.hook.stopped = stopped;
                        (!stopped).then_some(HeldReason::HookFailed(id))
                    }
                }
            }
            _ => Some(reason),
        }
    }

    /// A hook that hung has returned, and what it stands for runs: that is no proof, but it can be
    /// called again.
    pub(super) fn returned_running(&mut self, id: HookId) {
        for reason in &mut self.held {
            if *reason == HeldReason::HookHung(id) {
                *reason = HeldReason::HookFailed(id);
            }
        }
    }

    /// The machine has stood from the beginning of the first pause to the end of this resume.
    fn downtime(&mut self, active: &Active) -> Option<u64> {
        match (active.operation, self.machine) {
            (_, MachineState::Running) => {
                let paused_at = self.paused_at.take()?;
                (active.operation == Operation::Resume).then(|| nanos(clock::since(paused_at)))
            }
            _ => {
                self.paused_at.get_or_insert(active.recorder.began());
                None
            }
        }
    }
}
