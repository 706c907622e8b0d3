//! What must hold of the end of a transition: how long it took, and whether what it says of everybody is
//! true.

use super::super::Message;
use super::super::state::Standing;
use super::world::{Current, HOOK_BUDGET, World};
use crate::description::Deadlines;
use crate::report::{CommandAnswer, TransitionReport};
use standstill_protocol::message::Command;
use standstill_protocol::migration::{Activity, MigrationState};
use standstill_protocol::transition::{HeldReason, Loss, MachineState, Operation, Outcome};
use std::time::Duration;

impl World {
    /// Invariants 5, 6 and 8: a transition has ended, and says where everybody is.
    pub(super) fn ended(&mut self, report: &TransitionReport) {
        let Some(current) = &self.current else {
            return self.is_wrong(|| "a transition ends that has not begun".to_owned());
        };
        self.reached.insert(format!("{} {}", current.operation, report.outcome.name()));
        let problem = self.problem(current, report);
        if let Some(problem) = problem {
            self.is_wrong(|| {
                format!("{} ends in {:?}: {problem}", report.operation, report.outcome)
            });
        }
    }

    fn problem(&self, current: &Current, report: &TransitionReport) -> Option<String> {
        let took = self.script.now() - current.began.0;
        let late = self.lag - current.began.1;
        let longest = self.longest() + late;
        if took > longest {
            return Some(format!("it took {took:?}, more than {longest:?}"));
        }
        if let Some(state) = &self.actor.state
            && state.active.is_none()
        {
            let left = self.script.alarms(|message| matches!(message, Message::Expired(..)));
            if left > 0 {
                return Some(format!("{left} of its deadlines are still armed"));
            }
        }
        if current.held && report.machine == MachineState::Running {
            return Some("a machine that was held runs".to_owned());
        }
        if report.last_epoch.0 > current.first + 3 {
            return Some("it has more than four epochs".to_owned());
        }
        if report.participants.iter().any(|one| current.left_out.contains(&one.id)) {
            return Some("one takes part that was left out".to_owned());
        }
        for participant in &report.participants {
            let mut units = self.units.iter();
            let Some(unit) = units.find(|unit| unit.id == Some(participant.id)) else { continue };
            let Some(command) = participant.commands.last() else { continue };
            let exited = participant.fence.as_ref().is_some_and(|fence| fence.why == Loss::Exited);
            let answered = unit.answer((command.epoch, command.phase)).is_some();
            if exited && answered && command.answer == CommandAnswer::None && !self.floods {
                return Some(format!("the last answer of {} is not in it", participant.name));
            }
        }
        // What one believes that has lost its machine is not compared with it.
        let superseded = |reason: &HeldReason| *reason == HeldReason::Superseded;
        if self.superseded
            || matches!(&report.outcome, Outcome::Held { reasons, .. } if reasons.iter().any(superseded))
        {
            return None;
        }
        self.fences_are_told(current, report).or_else(|| self.everybody_is_there(current, report))
    }

    /// The longest that a transition may take; see `docs/transitions.md`.
    fn longest(&self) -> Duration {
        let Deadlines { first_phase, second_phase, undo, fence, .. } = self.case.deadlines();
        let many = |count: usize, time: Duration| time * u32::try_from(count).unwrap_or(u32::MAX);
        let hooks = many(self.hooks.len(), HOOK_BUDGET) + super::super::script::GAP;
        hooks + first_phase + second_phase + many(self.units.len(), fence) + undo * 2
    }

    fn fences_are_told(&self, current: &Current, report: &TransitionReport) -> Option<String> {
        let fenced = match &report.outcome {
            Outcome::Degraded { fenced, .. } | Outcome::Held { fenced, .. } => fenced.as_slice(),
            Outcome::Done | Outcome::RolledBack | Outcome::Stopped => &[],
        };
        let held = matches!(report.outcome, Outcome::Held { .. });
        for &i in &current.lost {
            let unit = &self.units[i];
            let named = fenced.iter().any(|(id, _)| Some(*id) == unit.id);
            let member = report.participants.iter().any(|one| Some(one.id) == unit.id);
            if member && !named && !held {
                return Some(format!("device {i} was fenced, and it does not say so"));
            }
        }
        let proven = |id| self.units.iter().any(|unit| unit.id == Some(id) && unit.proven);
        let unproven = fenced.iter().find(|(id, _)| !proven(*id));
        unproven.map(|(id, _)| format!("{id:?} is said to be fenced, and is not"))
    }

    fn everybody_is_there(&self, current: &Current, report: &TransitionReport) -> Option<String> {
        let state = self.actor.state.as_ref()?;
        let original = |i: usize| {
            let mut originals = current.originals.iter();
            originals.find(|(number, _)| *number == i).map(|(_, state)| *state)
        };
        let stops = match (&report.outcome, current.operation) {
            (Outcome::RolledBack, Operation::TakeOver) => Some(false),
            (Outcome::RolledBack, _) => None,
            (Outcome::Done, Operation::Pause) | (Outcome::Stopped, _) => Some(true),
            (Outcome::Done, _) => Some(false),
            (Outcome::Degraded { machine, .. }, _) => Some(*machine == MachineState::Stopped),
            (Outcome::Held { .. }, _) if current.hold_expired => return None,
            (Outcome::Held { .. }, _) => Some(true),
        };
        let found = |activity| current.originals.iter().any(|(_, s)| s.activity() == activity);
        let half = found(Activity::NoPeer) || found(Activity::Full) && found(Activity::Stopped);
        if stops.is_none() && half && current.expired.is_empty() {
            return Some("they were neither all running nor all stopped before".to_owned());
        }
        for (i, unit) in self.units.iter().enumerate() {
            let Some(device) = unit.id.and_then(|id| state.devices.get(id)) else { continue };
            let (is, does) = (unit.device.known(), unit.device.may_do());
            if device.standing != Standing::Ready || original(i).is_none() {
                continue;
            }
            // It may have been heard in one go that it has stopped, and that it has left again.
            let heard = device.state == is || device.state == unit.device.lifecycle.state();
            // Nor is it heard of a lease that has run out as soon as it has.
            let leaves = stops.is_none() && current.expired.contains(&i);
            if !heard && !leaves {
                return Some(format!("device {i} is in {is}, and said to be in {}", device.state));
            }
            let fits = match stops {
                // Nobody can know yet, or that was what it had come back to.
                Some(true) if unit.device.stood.is_some() => true,
                None if current.expired.contains(&i) => true,
                Some(true) => does == Activity::Stopped,
                Some(false) => does == Activity::Full,
                None => {
                    original(i) == Some(is)
                        && (does == is.activity() || is == MigrationState::Error)
                }
            };
            if !fits {
                return Some(format!("device {i} is in {is} and does {does:?}"));
            }
        }
        self.the_vmm_is_there(current, report, stops)
    }

    fn the_vmm_is_there(
        &self,
        current: &Current,
        report: &TransitionReport,
        stops: Option<bool>,
    ) -> Option<String> {
        let held = matches!(report.outcome, Outcome::Held { .. });
        if held || current.operation == Operation::TakeOver {
            return None;
        }
        let hung = |id| {
            let state = self.actor.state.as_ref();
            state.is_none_or(|state| state.locals.iter().any(|local| local.id == id && local.hung))
        };
        // One that the owner has taken as it is, hanging, may be brought back later.
        let takes_part = |id| report.participants.iter().any(|one| one.id == id);
        let locals = self.locals.iter().zip(&current.locals_were);
        for (local, &was) in locals.filter(|(local, _)| takes_part(local.id) && !hung(local.id)) {
            let stopped = local.state.activity() == Activity::Stopped;
            let fits = stops.map_or(local.state == was, |stops| stops == stopped);
            // Calls of the next transition, which may have begun, do not count, nor do those that
            // leave it where it is.
            let owes = |(_, command): &(_, Command)| {
                command.epoch <= report.last_epoch && command.target != local.state
            };
            if !fits || local.calls.waiting.iter().any(owes) {
                return Some(format!("a local device is in {}, and was in {was}", local.state));
            }
        }
        let hooks = self.hooks.iter().zip(&current.hooks_were_stopped);
        for (hook, &was) in hooks.filter(|(hook, _)| !self.is_left_out(hook)) {
            let expected = match report.outcome {
                Outcome::Done => was.and(stops),
                Outcome::RolledBack => was,
                _ => None,
            };
            if expected.is_some_and(|expected| expected != hook.stopped) {
                return Some(format!("hook {} stands: {}", hook.id.0, hook.stopped));
            }
        }
        None
    }
}
