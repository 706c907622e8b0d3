//! What may happen next, as things are.

use super::super::super::script::packets::Ask;
use super::super::action::Action;
use super::super::unit::Unit;
use super::World;
use standstill_protocol::message::Term;

/// How many calls of the owner are under way at most.
const CALLS: usize = 6;
/// How many processes a schedule may have in all.
const PROCESSES: usize = 24;

impl World {
    /// Everything that may happen next, with its weight.
    pub(in super::super) fn actions(&self) -> Vec<(u32, Action)> {
        let faults = &self.case.faults;
        let mut actions = Vec::with_capacity(48);
        let mut may = |weight: u32, action: Action| {
            if weight > 0 {
                actions.push((weight, action));
            }
        };
        if self.script.mails() > 0 {
            may(24, Action::Handle);
        }
        if self.readable {
            may(16, Action::Watch);
        }
        for (i, unit) in self.units.iter().enumerate() {
            self.unit_actions(i, unit, &mut may);
        }
        for i in (0..self.hooks.len()).filter(|&i| self.hooks[i].calls.moves()) {
            may(6, Action::Hook(i, true));
            may(faults.fail, Action::Hook(i, false));
            may(faults.hang, Action::HangHook(i));
        }
        for i in (0..self.locals.len()).filter(|&i| self.locals[i].calls.moves()) {
            may(8, Action::Local(i, true));
            may(faults.fail, Action::Local(i, false));
            may(faults.hang, Action::HangLocal(i));
        }
        if !self.starts.is_empty() {
            may(5, Action::Spawn(true));
            may(faults.fail, Action::Spawn(false));
        }
        may(faults.time, Action::Tick);
        if self.case.kept && !self.superseded && self.machine.is_some() {
            may(faults.supersede, Action::Supersede);
        }
        if self.machine.is_some() && self.calls.len() < CALLS {
            may(4, Action::Ask(Ask::Pause));
            may(2, Action::Ask(Ask::PauseLeased));
            may(4, Action::Ask(Ask::Resume));
            if !self.case.plain {
                self.owner_actions(&mut may);
            }
        }
        actions
    }

    fn unit_actions(&self, i: usize, unit: &Unit, may: &mut impl FnMut(u32, Action)) {
        let faults = &self.case.faults;
        if unit.moves() {
            if !unit.greeted {
                may(6, Action::Greet(i));
            }
            if !unit.device.down.is_empty() {
                may(8, Action::Read(i));
            }
            if unit.device.arc.is_some() {
                may(8, Action::Arc(i));
                may(faults.fail, Action::Fail(i, true));
                may(faults.fail / 2, Action::Fail(i, false));
            }
            if self.superseded && !unit.welcomed_by_another {
                may(6, Action::Welcomed(i));
            }
            may(faults.hang, Action::Hang(i));
            may(2 * u32::from(unit.device.lease.is_some()), Action::Expire(i));
            if unit.device.is_open() && unit.device.lifecycle.term() > Term(0) {
                may(faults.stray, Action::Stray(i, 0));
                may(faults.garbage, Action::Garbage(i));
                may(faults.flood, Action::Flood(i));
                may(faults.close, Action::Close(i));
            }
            if !unit.device.read.is_empty() {
                may(faults.stray, Action::Again(i, 0));
            }
        }
        if unit.is_alive() {
            may(faults.crash, Action::Crash(i));
        } else if unit.id.is_some() {
            if !unit.exit_seen {
                may(6, Action::SeeExit(i));
            } else if !unit.gone_seen {
                may(4, Action::Gone(i));
            }
            if unit.is_pending() {
                may(if unit.unprovable { u32::from(unit.given_up) } else { 5 }, Action::Prove(i));
            }
        }
    }

    fn owner_actions(&self, may: &mut impl FnMut(u32, Action)) {
        may(1, Action::Ask(Ask::PauseInSteps));
        may(1, Action::Ask(Ask::ResumeInSteps));
        may(2, Action::Ask(Ask::GoOn));
        may(1, Action::Ask(Ask::GiveUp));
        may(1, Action::Ask(Ask::Cancel));
        may(1, Action::Ask(Ask::AcceptHold));
        may(1, Action::Ask(Ask::Status));
        may(1, Action::Ask(Ask::DeclareRam));
        let devices = u8::try_from(self.case.devices.len()).unwrap_or(u8::MAX);
        if self.units.len() < PROCESSES {
            may(1, Action::Ask(Ask::Add));
            for device in 0..=devices {
                may(1, Action::Ask(Ask::Restart(device)));
            }
        }
        may(1, Action::Ask(Ask::Remove(devices)));
    }

    /// Whether an action can be taken as things are; of a schedule that was made shorter, some
    /// cannot.
    pub(in super::super) fn is_possible(&self, action: Action) -> bool {
        match action {
            Action::Again(..) | Action::Stray(..) => {
                self.actions().iter().any(|(_, one)| match (*one, action) {
                    (Action::Again(i, _), Action::Again(j, _))
                    | (Action::Stray(i, _), Action::Stray(j, _)) => i == j,
                    _ => false,
                })
            }
            _ => self.actions().iter().any(|(_, one)| *one == action),
        }
    }
}
