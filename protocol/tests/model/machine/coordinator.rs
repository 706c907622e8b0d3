//! One coordinator: the real transition, its timers, and what it has told and heard.

use super::device::Message;
use super::oracle;
use super::rule::{Antecedent, Rule};
use super::scenario::{Scenario, device_of, participant};
use super::shared::hash_of;
use super::world::{Notes, World};
use standstill_protocol::message::{Command, Epoch, Phase, Term};
use standstill_protocol::migration::{Activity, MigrationState};
use standstill_protocol::transition::{
    Answer, Effect, Event, HeldReason, HookId, HookMoment, Operation, Outcome, Timer, Transition,
};

/// How far the fence of a device has come for a coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fence {
    None,
    Asked,
    Unproven,
    Proven,
}

/// What a device has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Heard {
    Reached,
    Refused { stopped: bool },
    Status,
}

/// What a coordinator and one device have to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Seat {
    pub(crate) member: bool,
    pub(crate) fence: Fence,
    /// Where the device was when the operation began.
    pub(crate) original: MigrationState,
    /// What it was told last and not released from by an abort; a query has no phase.
    pub(crate) told: Option<(Epoch, Option<Phase>)>,
    /// What it has answered to that.
    pub(crate) heard: Option<Heard>,
    /// It was lost while no operation was under way.
    pub(crate) lost: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Coordinator {
    pub(crate) number: usize,
    pub(crate) transition: Transition,
    pub(crate) operation: Operation,
    pub(crate) term: Term,
    pub(crate) first_epoch: Epoch,
    pub(crate) seats: Vec<Seat>,
    pub(crate) timers: Vec<Timer>,
    pub(crate) hooks: Vec<(HookId, HookMoment)>,
    pub(crate) last_told: Option<(Epoch, Phase)>,
    pub(crate) outcome: Option<Outcome>,
    /// How many operations of the scenario have begun.
    pub(crate) begun: usize,
    /// The present one has.
    pub(crate) started: bool,
    /// What the hook has done: when the operation began, and now.
    pub(crate) hook_found_stopped: bool,
    pub(crate) hook_stopped: bool,
    pub(crate) undone: bool,
    pub(crate) hold_expired: bool,
    pub(crate) second_phase: bool,
    pub(crate) superseded: bool,
}

impl Coordinator {
    /// A coordinator that is about to begin; `None` if the operation is not possible.
    pub(crate) fn new(
        scenario: &Scenario,
        transition: impl Fn(Transition) -> Transition,
        number: usize,
        (operation, epoch): (Operation, Epoch),
        members: &[(usize, MigrationState)],
        hooks_stopped: bool,
    ) -> Option<Self> {
        let term = Term(number as u64 + 1);
        let hooks = match operation {
            Operation::TakeOver => Vec::new(),
            _ => scenario.hooks(hooks_stopped),
        };
        let plan = scenario.plan(operation, term, epoch, members, hooks);
        let mut seats = vec![
            Seat {
                member: false,
                fence: Fence::None,
                original: MigrationState::Error,
                told: None,
                heard: None,
                lost: false,
            };
            scenario.devices
        ];
        for &(device, state) in members {
            seats[device].member = true;
            seats[device].original = state;
        }
        Some(Self {
            number,
            transition: transition(Transition::new(plan).ok()?),
            operation,
            term,
            first_epoch: epoch,
            seats,
            timers: Vec::new(),
            hooks: Vec::new(),
            last_told: None,
            outcome: None,
            begun: 1,
            started: false,
            hook_found_stopped: hooks_stopped,
            hook_stopped: hooks_stopped,
            undone: false,
            hold_expired: false,
            second_phase: false,
            superseded: false,
        })
    }

    /// Who takes part and is not to be fenced.
    pub(crate) fn standing(&self) -> impl Iterator<Item = (usize, &Seat)> {
        self.seats.iter().enumerate().filter(|(_, seat)| seat.member && seat.fence == Fence::None)
    }

    /// Takes note of what is heard before the machine is told.
    fn hear(&mut self, event: Event, notes: &mut Notes<'_>) {
        match event {
            Event::Answer { from, epoch, phase, state, answer, .. } => {
                let seat = &mut self.seats[device_of(from)];
                let (asked, heard) = match answer {
                    Answer::Status { .. } => (None, Heard::Status),
                    Answer::Reached => (Some(phase), Heard::Reached),
                    Answer::Refused => {
                        notes.reached(Antecedent::Refusal);
                        if state == MigrationState::Error {
                            notes.reached(Antecedent::ErrorState);
                        }
                        (
                            Some(phase),
                            Heard::Refused { stopped: state.activity() == Activity::Stopped },
                        )
                    }
                };
                if heard == Heard::Status {
                    seat.original = state;
                }
                if seat.told == Some((epoch, asked)) && seat.heard.is_none() {
                    seat.heard = Some(heard);
                }
            }
            Event::Lost(who, _) if self.outcome.is_some() => {
                self.seats[device_of(who)].lost = true;
            }
            Event::Expired(timer) => {
                self.timers.retain(|&armed| armed != timer);
                self.hold_expired |= timer == Timer::Hold;
                if let Timer::Fence(who) = timer {
                    notes.reached(Antecedent::Unproven);
                    self.seats[device_of(who)].fence = Fence::Unproven;
                }
                if matches!(timer, Timer::Hook(..)) {
                    notes.reached(Antecedent::HookHung);
                }
            }
            Event::Fenced(who) => {
                let seat = &mut self.seats[device_of(who)];
                if seat.fence == Fence::Unproven {
                    notes.reached(Antecedent::LateProof);
                }
                seat.fence = Fence::Proven;
            }
            Event::Superseded => self.superseded = true,
            Event::Begin => self.started = true,
            Event::HookDone(_, moment) => self.hook_stopped = moment == HookMoment::Stop,
            Event::HookFailed(..) => notes.reached(Antecedent::HookFailed),
            _ => {}
        }
    }

    /// Who owes an answer that is due when this timer runs out.
    fn silent(&self, timer: Timer) -> Vec<usize> {
        let asked = match timer {
            Timer::Phase(epoch, phase, _) => (epoch, Some(phase)),
            Timer::Query(epoch) => (epoch, None),
            _ => return Vec::new(),
        };
        self.standing()
            .filter(|(_, seat)| seat.told == Some(asked) && seat.heard.is_none())
            .map(|(device, _)| device)
            .collect()
    }

    /// The phases that are told: to whom, in one step, and not before they may be.
    fn send_phase(&mut self, sent: &[Command], to: &[usize], notes: &mut Notes<'_>) {
        let Some(&Command { epoch, phase, .. }) = sent.first() else { return };
        let one = sent.iter().all(|command| (command.epoch, command.phase) == (epoch, phase));
        let forward = epoch == self.first_epoch && self.operation != Operation::TakeOver;
        let all = !forward || self.standing().all(|(device, _)| to.contains(&device));
        let new = self.last_told.is_none_or(|last| last < (epoch, phase));
        notes.check(Rule::ToldAtOnce, one && new && all);
        self.last_told = Some((epoch, phase));
        self.second_phase |= forward && matches!(phase, Phase::Stop | Phase::Start);

        let first = match phase {
            Phase::Stop => Phase::PrepareStop,
            Phase::Start => Phase::PrepareStart,
            _ => phase,
        };
        let starts = matches!(phase, Phase::PrepareStart | Phase::Start);
        let fenced = self.seats.iter().any(|seat| seat.fence == Fence::Proven);
        if first != phase {
            notes.reached(Antecedent::SecondPhase);
            if fenced {
                notes.reached(Antecedent::SecondPhaseWithoutAFenced);
            }
            let acked = |seat: &Seat| match seat.told {
                Some((told, Some(asked))) if (told, asked) == (epoch, first) => match seat.heard {
                    Some(Heard::Reached | Heard::Refused { stopped: true }) => true,
                    _ => matches!(seat.fence, Fence::Proven | Fence::Unproven),
                },
                // The last phase of an undo can stand alone; only the forward way needs both.
                _ => !forward || seat.fence == Fence::Proven,
            };
            let both = self.seats.iter().filter(|seat| seat.member).all(acked);
            notes.check(Rule::Barrier, both);
        }
        if starts {
            let open = |seat: &Seat| matches!(seat.fence, Fence::Asked | Fence::Unproven);
            notes.check(Rule::NoStartBesideAFence, !self.seats.iter().any(open));
            if fenced {
                notes.reached(Antecedent::StartAfterAFence);
            }
        }
        if !starts && self.operation == Operation::Resume {
            notes.reached(Antecedent::StartUndone);
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        // Fences that are still under way at the end of a hold are given up with it.
        if let Outcome::Held { reasons, .. } = &outcome
            && self.hold_expired
        {
            for (device, seat) in self.seats.iter_mut().enumerate() {
                let given_up = reasons.contains(&HeldReason::FenceUnproven(participant(device)));
                if seat.fence == Fence::Asked && given_up {
                    seat.fence = Fence::Unproven;
                }
            }
        }
        self.outcome = Some(outcome);
    }

    /// Whatever is waited for has a deadline.
    fn check_deadlines(&self, notes: &mut Notes<'_>) {
        if self.outcome.is_some() {
            notes.check(Rule::OneOutcome, self.timers.is_empty());
            return;
        }
        let armed = |which: &dyn Fn(&Timer) -> bool| self.timers.iter().any(which);
        let mut bounded = !self.timers.is_empty();
        for (device, seat) in self.seats.iter().enumerate().filter(|(_, seat)| seat.member) {
            bounded &= match (seat.fence, seat.told, seat.heard) {
                (Fence::Asked, ..) => armed(&|timer| *timer == Timer::Fence(participant(device))),
                (Fence::None, Some((epoch, Some(phase))), None) => armed(
                    &|timer| matches!(timer, Timer::Phase(e, p, _) if (*e, *p) == (epoch, phase)),
                ),
                (Fence::None, Some((epoch, None)), None) => {
                    armed(&|timer| *timer == Timer::Query(epoch))
                }
                _ => true,
            };
        }
        notes.check(Rule::Deadline, bounded);
        let epochs = self.transition.epoch().0 - self.first_epoch.0;
        notes.check(Rule::FourEpochs, epochs <= 3);
    }
}

impl World {
    /// Lets a coordinator's transition see an event, and carries out what it says.
    pub(super) fn feed(&mut self, number: usize, event: Event, again: bool, notes: &mut Notes<'_>) {
        let Some(shared) = &mut self.coordinators[number] else { return };
        let (effects, silent) = shared.edit(|coordinator| {
            let silent = match event {
                Event::Expired(timer) => coordinator.silent(timer),
                _ => Vec::new(),
            };
            let over = coordinator.outcome.is_some();
            coordinator.hear(event, notes);
            let stale = match event {
                Event::Answer { term, epoch, .. } => {
                    let now = (coordinator.term, coordinator.transition.epoch());
                    let other = (term, epoch) != now;
                    if other && !over {
                        notes.reached(Antecedent::OtherEpoch);
                    }
                    other.then_some(Rule::OtherEpoch).or(again.then_some(Rule::Repeated))
                }
                _ => None,
            };
            let before = stale.map(|_| hash_of(&coordinator.transition));
            let effects = coordinator.transition.step(event);
            if let (Some(rule), Some(before)) = (stale, before) {
                let same = before == hash_of(&coordinator.transition) && effects.is_empty();
                notes.check(rule, same);
            }
            if over {
                notes.check(Rule::OneOutcome, effects.is_empty());
            }
            (effects, silent)
        });
        if !silent.is_empty() {
            notes.reached(Antecedent::Silence);
        }
        let fenced = |device| {
            let asked = |effect: &Effect| matches!(effect, Effect::Fence(id, _) if *id == participant(device));
            effects.iter().any(asked)
        };
        notes.check(Rule::SilenceIsFenced, silent.iter().all(|&device| fenced(device)));
        self.carry_out(number, effects, notes);
    }

    fn carry_out(&mut self, number: usize, effects: Vec<Effect>, notes: &mut Notes<'_>) {
        if effects.is_empty() {
            return;
        }
        let commands: Vec<_> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send(id, command) => Some((device_of(*id), *command)),
                _ => None,
            })
            .collect();
        if !commands.is_empty() {
            let (to, sent): (Vec<_>, Vec<_>) = commands.into_iter().unzip();
            self.check_take_over(number, &sent, notes);
            if let Some(coordinator) = &mut self.coordinators[number] {
                coordinator.edit(|coordinator| coordinator.send_phase(&sent, &to, notes));
            }
            if number == 0 && self.coordinators[1].is_some() {
                notes.reached(Antecedent::FirstActsLater);
            }
        }
        for effect in effects {
            self.carry_out_one(number, effect, notes);
        }
        if let Some(coordinator) = &self.coordinators[number] {
            coordinator.check_deadlines(notes);
        }
    }

    fn carry_out_one(&mut self, number: usize, effect: Effect, notes: &mut Notes<'_>) {
        let Some(shared) = &mut self.coordinators[number] else { return };
        if shared.outcome.is_some() {
            notes.check(Rule::OneOutcome, false);
            return;
        }
        let tell = |seat: &mut Seat, what| {
            seat.told = Some(what);
            seat.heard = None;
        };
        match effect {
            Effect::Send(id, command) => {
                let Command { epoch, phase, target, .. } = command;
                notes.say(|| {
                    format!(
                        "coordinator {number} to device {}: {phase} to {target}, epoch {epoch}",
                        id.0
                    )
                });
                let device = device_of(id);
                shared.edit(|c| tell(&mut c.seats[device], (epoch, Some(phase))));
                self.post(number, device, Message::Command(command));
            }
            Effect::Query(id, query) => {
                notes.say(|| format!("coordinator {number} to device {}: where are you?", id.0));
                let device = device_of(id);
                shared.edit(|c| tell(&mut c.seats[device], (query.epoch, None)));
                self.post(number, device, Message::Query(query));
            }
            Effect::Abort(id, abort) => {
                notes.say(|| {
                    format!(
                        "coordinator {number} to device {}: abort of epoch {}",
                        id.0, abort.epoch
                    )
                });
                let device = device_of(id);
                shared.edit(|c| c.seats[device].told = None);
                self.post(number, device, Message::Abort(abort));
            }
            Effect::Fence(id, why) => {
                notes.say(|| format!("coordinator {number} fences device {}: {why}", id.0));
                let device = device_of(id);
                let twice = shared.edit(|c| {
                    let seat = &mut c.seats[device];
                    seat.told = None;
                    std::mem::replace(&mut seat.fence, Fence::Asked) != Fence::None
                });
                notes.check(Rule::OneOutcome, !twice);
                self.kill(device);
            }
            Effect::RunHook(id, moment) => {
                notes.say(|| format!("coordinator {number} calls hook {} for {moment:?}", id.0));
                shared.edit(|c| c.hooks.push((id, moment)));
            }
            Effect::Arm(timer, _) => shared.edit(|c| {
                c.undone |= timer == Timer::Undo;
                c.timers.push(timer);
                c.timers.sort_unstable();
            }),
            Effect::Disarm(timer) => shared.edit(|c| c.timers.retain(|armed| *armed != timer)),
            Effect::Finish(outcome) => {
                notes.say(|| format!("coordinator {number} is done: {outcome:?}"));
                shared.edit(|c| c.finish(outcome));
                self.check_end(number, notes);
            }
        }
    }

    /// A take-over starts nothing once anybody had reached STOP or was on the way there.
    fn check_take_over(&self, number: usize, sent: &[Command], notes: &mut Notes<'_>) {
        let Some(coordinator) = &self.coordinators[number] else { return };
        let starts = |c: &Command| matches!(c.phase, Phase::PrepareStart | Phase::Start);
        if coordinator.operation != Operation::TakeOver || !sent.iter().any(starts) {
            return;
        }
        let none = coordinator.standing().all(|(device, _)| {
            let device = &self.devices[device];
            let stopping = device.arc.is_some_and(|arc| arc.after == Activity::Stopped);
            // ERROR is not STOP: who fails after it was asked is found out by its answer.
            let state = device.lifecycle.state();
            let stopped = state.activity() == Activity::Stopped && state != MigrationState::Error;
            !stopping && !stopped
        });
        notes.check(Rule::StoppedIsNotStarted, none);
    }

    /// What the end says is compared with where everybody really is.
    fn check_end(&self, number: usize, notes: &mut Notes<'_>) {
        let Some(coordinator) = &self.coordinators[number] else { return };
        let Some(outcome) = &coordinator.outcome else { return };
        use Antecedent as A;
        match outcome {
            Outcome::Done if coordinator.operation == Operation::TakeOver => {
                notes.reached(A::TakeOverDone);
            }
            Outcome::Done if coordinator.begun > 1 => notes.reached(A::SecondOperation),
            Outcome::Done => notes.reached(A::Done),
            Outcome::RolledBack if coordinator.operation == Operation::TakeOver => {
                notes.reached(A::TakeOverRolledBack);
            }
            Outcome::RolledBack => notes.reached(A::RolledBack),
            Outcome::Stopped => notes.reached(A::Stopped),
            Outcome::Degraded { .. } => notes.reached(A::Degraded),
            Outcome::Held { reasons, .. } => {
                notes.reached(A::Held);
                if coordinator.hold_expired {
                    notes.reached(A::HeldWhileStopping);
                }
                for reason in reasons {
                    match reason {
                        HeldReason::TakenOverStopped => notes.reached(A::TakeOverHeld),
                        HeldReason::Superseded => notes.reached(A::Superseded),
                        _ => {}
                    }
                }
            }
        }
        if coordinator.transition.epoch().0 == coordinator.first_epoch.0 + 2 {
            notes.reached(A::TwoUndoEpochs);
        }
        // What the first one believes when there is a second one is not the machine's state.
        if number == 0 && self.coordinators[1].is_some() {
            return;
        }
        let held = matches!(outcome, Outcome::Held { .. });
        let owed = |seat: &Seat| seat.told.is_some() && seat.heard.is_none();
        let nothing_owed = coordinator.standing().all(|(_, seat)| !owed(seat));
        notes.check(Rule::EverybodyAnswered, held || nothing_owed);
        let given_up = coordinator.hold_expired || coordinator.superseded;
        let idle = coordinator.standing().all(|(device, _)| {
            let device = &self.devices[device];
            // What was given up and leads nowhere may still be on its way.
            let state = device.lifecycle.state();
            let leads_on = |message: &Message| match message {
                Message::Command(command) => command.target != state,
                _ => false,
            };
            device.arc.is_none() && !device.links[number].down.iter().any(leads_on)
        });
        notes.check(Rule::NothingRunsHalf, given_up || idle);
        notes.check(Rule::OutcomeIsTrue, oracle::is_true(self, coordinator, outcome));
    }
}
