//! What must hold, seen from outside the coordinator: at what it sends, at what the devices do, and
//! at what it says.

use super::super::script::{Answer, packets::Ask};
use super::super::state::Standing;
use super::super::supervision::Recovery;
use super::inside::{HookEnd, LocalEnd};
use super::unit::Unit;
use super::world::{Current, World};
use crate::error::MachineError;
use crate::events::MachineEvent;
use crate::status::{DeviceStanding, DeviceStatus, Status};
use standstill_protocol::message::{Command, CoordinatorMessage, DeviceEvent, Epoch, Phase};
use standstill_protocol::migration::Activity;
use standstill_protocol::transition::{HeldReason, Loss, MachineState, Operation, Outcome};
use std::collections::BTreeSet;
use std::sync::Arc;

/// How many requests may wait in the coordinator.
const QUEUE: usize = 64;

/// What counts as reached when it is told.
fn name(event: &MachineEvent) -> Option<&'static str> {
    Some(match event {
        MachineEvent::DeviceExited { .. } => "DeviceExited",
        MachineEvent::DeviceFenced { .. } => "DeviceFenced",
        MachineEvent::DeviceHung { .. } => "DeviceHung",
        MachineEvent::DeviceJoined { .. } => "DeviceJoined",
        MachineEvent::DeviceLost { .. } => "DeviceLost",
        MachineEvent::DeviceNotRestarted { .. } => "DeviceNotRestarted",
        MachineEvent::DeviceNotStarted { .. } => "DeviceNotStarted",
        MachineEvent::DeviceRemoved { .. } => "DeviceRemoved",
        MachineEvent::DeviceRestarting { .. } => "DeviceRestarting",
        MachineEvent::DeviceRestartsExhausted { .. } => "DeviceRestartsExhausted",
        MachineEvent::FenceUnproven { .. } => "FenceUnproven",
        MachineEvent::HoldBegan { .. } => "HoldBegan",
        MachineEvent::HoldEnded { .. } => "HoldEnded",
        MachineEvent::Superseded { .. } => "Superseded",
        _ => return None,
    })
}

impl World {
    /// The coordinator has sent these, in one go.
    pub(super) fn told(&mut self, told: &[(usize, CoordinatorMessage)]) {
        let commands = told.iter().filter_map(|(i, message)| match message {
            CoordinatorMessage::Command(command) => Some((*i, *command)),
            _ => None,
        });
        let commands: Vec<(usize, Command)> = commands.collect();
        let aborts = told.iter().filter_map(|(i, message)| match message {
            CoordinatorMessage::Abort(abort) => Some((*i, abort.epoch)),
            _ => None,
        });
        let aborts: Vec<_> = aborts.collect();
        let release = |units: &mut Vec<Unit>, before: Option<Epoch>| {
            for &(i, epoch) in &aborts {
                let told = units[i].told.is_some_and(|(told, _)| told <= epoch);
                if told && before.is_none_or(|before| epoch < before) {
                    units[i].told = None;
                }
            }
        };
        let phases: BTreeSet<_> =
            commands.iter().map(|(_, command)| (command.epoch, command.phase)).collect();
        for (epoch, phase) in phases {
            let of_phase = commands.iter().filter(|(_, c)| (c.epoch, c.phase) == (epoch, phase));
            let to: Vec<usize> = of_phase.map(|(i, _)| *i).collect();
            release(&mut self.units, Some(epoch));
            if self.current.is_some() {
                self.check_phase(epoch.0, phase, &to);
            }
            for i in to {
                if self.units[i].heard.contains(&(epoch, phase)) {
                    self.is_wrong(|| format!("device {i} is told {phase} of epoch {epoch} twice"));
                }
                self.units[i].heard.push((epoch, phase));
                self.units[i].told = Some((epoch, phase));
                self.units[i].expired = false;
            }
        }
        release(&mut self.units, None);
        for (i, command) in commands {
            let unit = &self.units[i];
            if unit.was_pending {
                self.is_wrong(|| format!("device {i} is told {} and is lost", command.phase));
            }
        }
    }

    /// Invariants 1, 4 and 6: when a phase may be told, and to whom.
    fn check_phase(&mut self, epoch: u64, phase: Phase, to: &[usize]) {
        let Some(current) = &self.current else { return };
        let forward = epoch == current.first && current.operation != Operation::TakeOver;
        let starts = matches!(phase, Phase::PrepareStart | Phase::Start);
        let mut wrong = None;
        if epoch > current.first + 3 {
            wrong = Some(format!("epoch {epoch} of a transition that began at {}", current.first));
        }
        let stands = |unit: &Unit| unit.is_alive() && unit.counted && !unit.fence && unit.stands();
        let take_over = current.operation == Operation::TakeOver;
        if starts && take_over && self.units.iter().any(stands) {
            wrong = Some("a take-over starts what was stopped".to_owned());
        }
        for (i, unit) in self.units.iter().enumerate() {
            if let Some(told) = unit.told {
                let answer = unit.answer(told);
                let fenced = unit.proven || unit.fence && !forward;
                let well = answer.is_some_and(|answer| answer.reached || !forward);
                // One whose end was not read yet cannot be told that it is released.
                let released = told.0.0 < epoch && !(unit.is_alive() && unit.device.is_open());
                if !well && !fenced && !released && !unit.accepted {
                    wrong = Some(format!(
                        "{phase} of epoch {epoch} is told before device {i} has answered to {told:?}"
                    ));
                }
            }
            if starts && unit.was_pending && unit.counted && !unit.accepted {
                wrong =
                    Some(format!("{phase} is told while the fence of device {i} is not proven"));
            }
        }
        let waits = |calls: usize| forward && calls > 0;
        let calls = |hook: &HookEnd| !self.is_left_out(hook) && waits(hook.calls.waiting.len());
        if self.hooks.iter().any(calls) {
            wrong = Some(format!("{phase} is told while a hook has not returned"));
        }
        let second = matches!(phase, Phase::Stop | Phase::Start);
        // Local devices are told in the same go, so of theirs only the second phase shows something.
        let owes = |local: &LocalEnd| !local.calls.hung && local.calls.waiting.len() > 1;
        if second && forward && self.locals.iter().any(owes) {
            wrong = Some(format!("{phase} is told before a local device has answered"));
        }
        if let Some(state) = &self.actor.state
            && forward
        {
            let missed = |(i, unit): (usize, &Unit)| {
                let device = state.devices.get(unit.id?)?;
                let ready = unit.was_ready && device.standing == Standing::Ready;
                let counts = ready && !to.contains(&i);
                // One whose end was not read yet cannot be sent anything.
                (counts && unit.device.is_open() && unit.is_alive()).then_some(i)
            };
            let missed = self.units.iter().enumerate().find_map(missed);
            if let Some(i) = missed.filter(|_| !self.superseded) {
                wrong = Some(format!("device {i} is not told {phase} of epoch {epoch}"));
            }
        }
        if let Some(wrong) = wrong {
            self.is_wrong(|| wrong);
        }
    }

    /// Something that the machine tells whoever listens.
    pub(super) fn event(&mut self, event: MachineEvent) {
        if let Some(name) = name(&event) {
            self.reached.insert(name.to_owned());
        }
        match event {
            MachineEvent::TransitionBegan { operation, epoch } => {
                self.units.iter_mut().for_each(|unit| unit.told = None);
                let counts =
                    |unit: &Unit| unit.was_ready && self.standing(unit) == Some(Standing::Ready);
                let units = self.units.iter().enumerate().filter(|(_, unit)| counts(unit));
                let originals = units.map(|(i, unit)| (i, unit.device.known())).collect();
                let expired = self.units.iter().enumerate().filter(|(_, unit)| {
                    // The coordinator does not know yet.
                    unit.device.stood.is_some()
                });
                let expired = expired.map(|(i, _)| i).collect();
                let locals = self.actor.state.iter().flat_map(|state| &state.locals);
                let left_out = locals.filter(|local| local.hung).map(|local| local.id).collect();
                self.current = Some(Current {
                    operation,
                    first: epoch.0,
                    held: self.is_held(),
                    began: (self.script.now(), self.lag),
                    originals,
                    hooks_were_stopped: self.hooks_stopped(),
                    locals_were: self.locals.iter().map(|local| local.state).collect(),
                    left_out,
                    lost: BTreeSet::new(),
                    expired,
                    hold_expired: false,
                });
            }
            MachineEvent::Transition(report) => {
                self.ended(&report);
                let current = self.current.take();
                let given_up = current.is_some_and(|current| current.hold_expired);
                match report.outcome {
                    Outcome::Held { .. } => self.given_up |= given_up,
                    Outcome::Done | Outcome::Degraded { .. } => self.given_up = false,
                    Outcome::RolledBack | Outcome::Stopped => {}
                }
                self.units.iter_mut().for_each(|unit| unit.told = None);
                self.reports.push(report);
            }
            MachineEvent::DeviceLost { device, loss, detail, during: Some(_), .. } => {
                let lost = self.units.iter().rposition(|unit| unit.device.name == device);
                if let (Some(current), Some(lost)) = (&mut self.current, lost) {
                    current.lost.insert(lost);
                }
                let expired = self.expired;
                let answered = |unit: &Unit| {
                    let answer = expired.and_then(|asked| unit.answer(asked));
                    unit.device.name == device && unit.is_pending() && answer.is_some()
                };
                let silence = loss == Loss::Timeout && detail == loss.to_string();
                if silence && self.units.iter().any(answered) && !self.floods {
                    self.is_wrong(|| format!("{device} has answered and is lost for its silence"));
                }
            }
            MachineEvent::HoldEnded { by_owner: false } => {
                let ready = |unit: &&Unit| self.standing(unit) == Some(Standing::Ready);
                let mut ready = self.units.iter().filter(ready);
                let moves = |unit: &&Unit| {
                    let moves = unit.device.may_do() != Activity::Stopped;
                    unit.is_alive() && moves && !unit.expired && unit.device.stood.is_none()
                };
                if let Some(unit) = ready.find(moves) {
                    let (name, is) = (unit.device.name.clone(), unit.device.lifecycle.state());
                    self.is_wrong(|| format!("a hold has ended, and {name} is in {is}"));
                }
            }
            MachineEvent::Device { device, event: DeviceEvent::LeaseExpired(state) } => {
                self.reached.insert("LeaseExpired".to_owned());
                let mut units = self.units.iter_mut().rev();
                let unit = units.find(|unit| unit.device.name == device);
                if let Some(unit) = unit.filter(|unit| unit.device.stood.is_some()) {
                    unit.device.stood = None;
                    // What it was told and has not read yet moves it from there.
                    let obeys = unit.told.is_some_and(|told| unit.answer(told).is_none());
                    unit.expired = !obeys && unit.device.lifecycle.state() == state;
                }
            }
            MachineEvent::DeviceFenced { device, .. } => {
                let mut units = self.units.iter();
                if !units.any(|unit| unit.device.name == device && unit.proven) {
                    self.is_wrong(|| format!("{device} is said to be fenced, and is not"));
                }
            }
            MachineEvent::DeviceExited { device, .. } => {
                let mut units = self.units.iter();
                if !units.any(|unit| unit.device.name == device && !unit.is_alive()) {
                    self.is_wrong(|| format!("{device} is said to have ended, and has not"));
                }
            }
            _ => {}
        }
    }

    pub(super) fn standing(&self, unit: &Unit) -> Option<Standing> {
        let state = self.actor.state.as_ref()?;
        Some(state.devices.get(unit.id?)?.standing.clone())
    }

    fn hooks_stopped(&self) -> Vec<Option<bool>> {
        let stopped = |hook: &HookEnd| (!self.is_left_out(hook)).then_some(hook.stopped);
        self.hooks.iter().map(stopped).collect()
    }

    fn is_held(&self) -> bool {
        self.actor.state.as_ref().is_some_and(|state| {
            // One that is taken over is called so until it is known what it is.
            state.machine == MachineState::Held && !state.held.is_empty()
        })
    }

    /// Every call of the owner is answered once, with what has happened.
    pub(super) fn answers(&mut self) {
        let mut answered = Vec::new();
        self.calls.retain_mut(|call| match call.answer() {
            Some(answer) => {
                answered.push((call.ask, answer));
                false
            }
            None => true,
        });
        for (ask, answer) in answered {
            self.say(|| match &answer {
                Answer::Transition(Ok(report)) => format!("  {ask:?} ends in {:?}", report.outcome),
                answer => format!("  {ask:?} is answered: {:?}", answer.error()),
            });
            let ended = self.is_ended() || self.script.is_stopped();
            if let Some(MachineError::Gone) = answer.error()
                && !ended
                && !self.shuts_down()
            {
                self.is_wrong(|| format!("{ask:?} is never answered"));
            }
            match answer {
                Answer::Transition(Ok(report)) => {
                    let at = self.reports.iter().position(|told| Arc::ptr_eq(told, &report));
                    match at {
                        Some(at) => drop(self.reports.remove(at)),
                        None => self.is_wrong(|| format!("{ask:?} has a report that nobody told")),
                    }
                }
                Answer::Status(Ok(status)) => self.status_is_true(&status),
                Answer::Other(Ok(())) if ask == Ask::AcceptHold => {
                    let pending = self.units.iter_mut().filter(|unit| unit.is_pending());
                    pending.for_each(|unit| unit.accepted = true);
                }
                _ => {}
            }
        }
    }

    fn shuts_down(&self) -> bool {
        self.actor.state.as_ref().is_none_or(|state| state.ending.is_some() || state.over)
    }

    fn status_is_true(&mut self, status: &Status) {
        let mut wrong = None;
        for device in &status.devices {
            let mut units = self.units.iter().rev();
            let Some(unit) = units.find(|unit| unit.device.name == device.name) else { continue };
            let is = unit.device.known();
            let lies = match (device.standing, device.state) {
                (DeviceStanding::Ready, Some(state)) => status.operation.is_none() && state != is,
                (DeviceStanding::Fenced | DeviceStanding::Restarting, _) => {
                    unit.id.is_some() && !unit.proven && !unit.accepted
                }
                _ => false,
            };
            if lies && !self.superseded {
                wrong = Some(format!("{device:?} is not true: it is in {is}"));
            }
        }
        let stands = |device: &&DeviceStatus| {
            device.state.is_none_or(|state| state.activity() == Activity::Stopped)
        };
        if status.machine == MachineState::Stopped
            && status.operation.is_none()
            && let Some(device) = status.devices.iter().find(|device| !stands(device))
        {
            wrong = Some(format!("the machine is stopped, and {device:?}"));
        }
        let ready = |unit: &&Unit| self.standing(unit) == Some(Standing::Ready);
        let runs = self.units.iter().filter(ready).find(|unit| unit.expired);
        if let Some(unit) = runs.filter(|_| !self.superseded && status.operation.is_none()) {
            let says = status.machine;
            if says == MachineState::Stopped || status.stands {
                wrong = Some(format!("the lease of {} is over: {says}", unit.device.name));
            }
        }
        if let Some(wrong) = wrong {
            self.is_wrong(|| wrong);
        }
    }

    /// A hook that hangs, and that the owner has taken as it is.
    pub(super) fn is_left_out(&self, hook: &HookEnd) -> bool {
        let state = self.actor.state.as_ref();
        state.is_none_or(|state| state.hooks.iter().any(|e| e.hook.id == hook.id && e.hung))
    }

    /// What is known of each device before it is looked at what the coordinator has done.
    pub(super) fn know(&mut self) {
        let Some(state) = &self.actor.state else { return };
        for unit in &mut self.units {
            unit.was_pending = unit.is_pending();
            let device = unit.id.and_then(|id| state.devices.get(id));
            unit.counted |= device.is_some_and(|device| device.standing == Standing::Ready);
            let recovery = device.map(|device| &device.care.recovery);
            unit.accepted |= matches!(recovery, Some(Recovery::Unproven));
        }
    }

    /// Who counts after this step.
    pub(super) fn remember(&mut self) {
        let Some(state) = &self.actor.state else { return };
        for unit in &mut self.units {
            let device = unit.id.and_then(|id| state.devices.get(id));
            unit.was_ready = device.is_some_and(|device| device.standing == Standing::Ready);
        }
    }

    /// What must hold after each action.
    pub(super) fn check(&mut self) {
        if let Some(state) = &self.actor.state {
            let (queue, declarations) = (state.queue.len(), state.declarations.len());
            if queue > QUEUE || declarations > self.calls.len() + self.units.len() {
                self.is_wrong(|| format!("{queue} requests and {declarations} declarations wait"));
            }
        }
        if let Some(state) = &self.actor.state
            && state.active.is_none()
            && state.machine == MachineState::Running
            && !self.superseded
        {
            let hangs = |id| state.locals.iter().any(|local| local.id == id && local.hung);
            let elsewhere =
                |local: &&LocalEnd| !hangs(local.id) && local.state.activity() != Activity::Full;
            if let Some(local) = self.locals.iter().find(elsewhere) {
                let (id, is) = (local.id, local.state);
                self.is_wrong(|| format!("the machine runs, and local device {} is in {is}", id.0));
            }
        }
        let mut units = self.units.iter().enumerate();
        let wrong = units.find_map(|(i, unit)| Some((i, unit.device.wrong.clone()?)));
        if let Some((i, wrong)) = wrong {
            self.is_wrong(|| format!("device {i}: {wrong}"));
        }
        if self.actor.is_forgotten() {
            self.is_wrong(|| "there is something to read, and nobody says so any more".to_owned());
        }
        if let Some((writer, stopped)) = self.mixed() {
            self.is_wrong(|| format!("{writer} may write into {stopped}, which is stopped"));
        }
    }

    /// One that may write into one that stands.
    fn mixed(&self) -> Option<(String, String)> {
        let state = self.actor.state.as_ref()?;
        if self.superseded || self.given_up {
            return None;
        }
        let device = |unit: &Unit| unit.id.and_then(|id| state.devices.get(id));
        let leaves = |unit: &Unit| {
            let leaves = |device: &super::super::state::Device| {
                device.care.leaving.is_some() || device.standing == Standing::Leaving
            };
            device(unit).is_none_or(leaves)
        };
        let counts = |unit: &&Unit| unit.counted && !leaves(unit);
        let writes =
            |unit: &&Unit| !unit.proven && !unit.given_up && !unit.accepted && unit.may_write();
        let hung = |id| state.locals.iter().any(|local| local.id == id && local.hung);
        let locals = || {
            let given_up = |id| {
                hung(id)
                    || state.held.contains(&HeldReason::LocalHung(id))
                    || state.active.as_ref().is_some_and(|a| a.transition.state(id).is_none())
            };
            self.locals.iter().filter(move |local| !given_up(local.id))
        };
        let named = |unit: &Unit| unit.device.name.clone();
        let writer = self.units.iter().filter(counts).find(writes).map(named).or_else(|| {
            let mut locals = locals();
            let local = locals.find(|local| local.state.activity() == Activity::Full)?;
            Some(format!("local device {}", local.id.0))
        })?;
        let ready =
            |unit: &&Unit| device(unit).is_some_and(|device| device.standing == Standing::Ready);
        let mut units = self.units.iter().filter(counts).filter(ready);
        let stands = units.find(|unit| unit.is_alive() && unit.stands()).map(named);
        let stands = stands.or_else(|| {
            let mut locals = locals();
            let local = locals.find(|local| local.state.activity() == Activity::Stopped)?;
            Some(format!("local device {}", local.id.0))
        })?;
        Some((writer, stands))
    }
}
