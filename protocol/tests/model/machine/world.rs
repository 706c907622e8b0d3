//! The state of the whole system, and how each action changes it.

use super::action::Action;
use super::coordinator::{Coordinator, Fence};
use super::device::{Device, Life, Message};
use super::oracle;
use super::rule::{Antecedent, Rule};
use super::scenario::{Faults, Scenario, Successor, device_of, participant};
use super::shared::Shared;
use standstill_protocol::lifecycle::Lifecycle;
use standstill_protocol::message::Epoch;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{Event, Loss, Operation, Outcome, Timer, Transition};
use stateright::{Model, Property};
use std::sync::atomic::{AtomicU64, Ordering};

/// A message that may be delivered once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kept {
    Down(usize, Message),
    Up(usize, Event),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) coordinators: [Option<Shared<Coordinator>>; 2],
    pub(crate) devices: Vec<Shared<Device>>,
    pub(crate) faults: Faults,
    pub(crate) hooks: bool,
    pub(crate) kept: Option<Kept>,
    /// The rule that the last step has broken; nothing follows then.
    pub(crate) broken: Option<Rule>,
}

/// What a step has to say: rules that it breaks, antecedents that it reaches, and, for a trace,
/// what happens in it.
#[derive(Debug, Default)]
pub(crate) struct Notes<'a> {
    pub(crate) device: usize,
    broken: Option<Rule>,
    reached: u64,
    log: Option<&'a mut Vec<String>>,
}

impl Notes<'_> {
    pub(crate) fn check(&mut self, rule: Rule, holds: bool) {
        if !holds && self.broken.is_none() {
            self.broken = Some(rule);
        }
    }

    pub(crate) fn reached(&mut self, antecedent: Antecedent) {
        self.reached |= 1 << antecedent as u64;
    }

    pub(crate) fn say(&mut self, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(what());
        }
    }
}

impl World {
    fn seal(&mut self) {
        self.coordinators.iter_mut().flatten().for_each(Shared::seal);
        self.devices.iter_mut().for_each(Shared::seal);
    }

    pub(super) fn post(&mut self, from: usize, device: usize, message: Message) {
        if self.devices[device].life == Life::Alive {
            self.devices[device].edit(|device| device.links[from].down.push_back(message));
        }
    }

    fn keep(&mut self, message: Kept) {
        self.faults.spend(|faults| &mut faults.repeats);
        self.kept = Some(message);
    }

    /// The process dies; its coordinators see that behind its last answers.
    pub(super) fn kill(&mut self, number: usize) {
        if self.devices[number].life != Life::Alive {
            return;
        }
        self.devices[number].edit(|device| {
            device.life = Life::Dead;
            for link in &mut device.links {
                link.down.clear();
                if link.open {
                    link.up.push_back(Event::Lost(participant(number), Loss::Exited));
                }
            }
        });
    }
}

/// The model: a scenario and the faults that are built into its machines.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) scenario: Scenario,
    pub(crate) breaks: Breaks,
    /// Antecedents that some step has reached. (The state after that step may be a known one, at
    /// which a checker does not look again; so it is written down here.)
    reached: AtomicU64,
    /// Properties whose first discovery was reported: the first one is the shortest.
    shown: [AtomicU64; 2],
}

/// How a fault gets into the machines; nothing does in the shipped ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Breaks {
    pub(crate) transition: fn(Transition) -> Transition,
    pub(crate) lifecycle: fn(Lifecycle) -> Lifecycle,
}

impl Checked {
    pub(crate) fn new(scenario: Scenario) -> Self {
        let breaks = Breaks { transition: |shipped| shipped, lifecycle: |shipped| shipped };
        Self::broken(scenario, breaks)
    }

    pub(crate) fn broken(scenario: Scenario, breaks: Breaks) -> Self {
        Self { scenario, breaks, reached: AtomicU64::new(0), shown: Default::default() }
    }

    /// Takes a step; `log` hears what happens in it.
    pub(crate) fn take(
        &self,
        world: &World,
        action: Action,
        log: Option<&mut Vec<String>>,
    ) -> Option<World> {
        let mut next = world.clone();
        let mut notes = Notes { log, ..Notes::default() };
        self.act(&mut next, action, &mut notes)?;
        notes.check(Rule::NoWriterBesideAStopped, !oracle::mixed(&next));
        if next.devices.iter().all(|device| device.is_stopped()) {
            notes.reached(Antecedent::EverybodyStopped);
        }
        if notes.reached & !self.reached.load(Ordering::Relaxed) != 0 {
            self.reached.fetch_or(notes.reached, Ordering::Relaxed);
        }
        next.broken = notes.broken;
        next.seal();
        Some(next)
    }

    fn act(&self, world: &mut World, action: Action, notes: &mut Notes<'_>) -> Option<()> {
        match action {
            Action::Begin => world.feed(0, Event::Begin, false, notes),
            Action::Read { device, from, kept } => {
                notes.device = device;
                let message = world.devices[device].edit(|device| {
                    let message = device.links[from].down.pop_front()?;
                    device.read(message, false, notes);
                    Some(message)
                })?;
                if kept {
                    world.keep(Kept::Down(device, message));
                }
            }
            Action::ArcDone { device } => {
                notes.device = device;
                world.devices[device].edit(|device| device.end_arc(None, notes));
            }
            Action::ArcFails { device, restored } => {
                notes.device = device;
                match restored {
                    true => world.faults.spend(|faults| &mut faults.refusals),
                    false => world.faults.spend(|faults| &mut faults.errors),
                }
                world.devices[device].edit(|device| device.end_arc(Some(restored), notes));
            }
            Action::Hear { coordinator, device, kept } => {
                let event = world.devices[device]
                    .edit(|device| device.links[coordinator].up.pop_front())?;
                if kept {
                    world.keep(Kept::Up(coordinator, event));
                }
                notes.say(|| format!("coordinator {coordinator} hears {}", describe(event)));
                world.feed(coordinator, event, false, notes);
            }
            Action::Expire { coordinator, timer } => {
                match timer {
                    Timer::Fence(_) => world.faults.spend(|faults| &mut faults.unproven),
                    _ => world.faults.spend(|faults| &mut faults.timeouts),
                }
                world.feed(coordinator, Event::Expired(timer), false, notes);
            }
            Action::Prove { coordinator, device } => {
                world.devices[device].edit(|device| device.life = Life::Gone);
                world.feed(coordinator, Event::Fenced(participant(device)), false, notes);
            }
            Action::HookReturns { coordinator, hook, moment, well } => {
                if let Some(shared) = &mut world.coordinators[coordinator] {
                    shared.edit(|c| c.hooks.retain(|running| *running != (hook, moment)));
                }
                let event = match well {
                    true => Event::HookDone(hook, moment),
                    false => {
                        world.faults.spend(|faults| &mut faults.refusals);
                        Event::HookFailed(hook, moment)
                    }
                };
                world.feed(coordinator, event, false, notes);
            }
            Action::Crash { device } => {
                world.faults.spend(|faults| &mut faults.crashes);
                world.kill(device);
            }
            Action::TakeOver => self.take_over(world, notes)?,
            Action::Supersede => world.feed(0, Event::Superseded, false, notes),
            Action::Next => self.next_operation(world, notes)?,
            Action::Again => match world.kept.take()? {
                Kept::Down(number, message) => {
                    notes.device = number;
                    notes.say(|| format!("device {number} reads {message:?} again"));
                    world.devices[number].edit(|device| device.read(message, true, notes));
                }
                Kept::Up(coordinator, event) => {
                    notes.reached(Antecedent::RepeatedAnswer);
                    notes.say(|| {
                        format!("coordinator {coordinator} hears {} again", describe(event))
                    });
                    world.feed(coordinator, event, true, notes);
                }
            },
        }
        Some(())
    }

    /// A second coordinator connects to everybody who is left, and asks.
    fn take_over(&self, world: &mut World, notes: &mut Notes<'_>) -> Option<()> {
        let first = world.coordinators[0].clone()?;
        let left: Vec<_> = (0..world.devices.len())
            .filter(|&device| first.seats[device].fence != Fence::Proven)
            // It asks before it does anything: what it believes until then makes no difference.
            .map(|device| (device, MigrationState::Running))
            .collect();
        let operation = (Operation::TakeOver, Epoch(1));
        let second =
            Coordinator::new(&self.scenario, self.breaks.transition, 1, operation, &left, false)?;
        let term = second.term;
        for &(number, _) in &left {
            world.devices[number].edit(|device| {
                device.links[1].open = true;
                if device.life == Life::Alive {
                    device.links[1].down.push_back(Message::Welcome(term));
                } else {
                    let lost = Event::Lost(participant(number), Loss::Disconnected);
                    device.links[1].up.push_back(lost);
                }
                if self.scenario.successor == Successor::AfterDeath {
                    device.ghost = first.seats[number].fence == Fence::Unproven;
                    device.links[0].open = false;
                    device.links[0].up.clear();
                }
            });
        }
        if self.scenario.successor == Successor::AfterDeath {
            world.coordinators[0] = None;
        }
        world.coordinators[1] = Some(Shared::new(second));
        world.feed(1, Event::Begin, false, notes);
        Some(())
    }

    /// The owner goes on with whom is left.
    fn next_operation(&self, world: &mut World, notes: &mut Notes<'_>) -> Option<()> {
        let next = self.next_of(world.coordinators[0].as_ref()?)?;
        let old = world.coordinators[0].replace(Shared::new(next))?;
        for (number, seat) in old.seats.iter().enumerate() {
            let Some(coordinator) = &mut world.coordinators[0] else { continue };
            coordinator.edit(|c| {
                if !c.seats[number].member {
                    c.seats[number].fence = seat.fence;
                }
            });
            if seat.lost {
                notes.reached(Antecedent::LossBetween);
                world.feed(0, Event::Lost(participant(number), Loss::Exited), false, notes);
            }
        }
        world.feed(0, Event::Begin, false, notes);
        Some(())
    }

    fn next_of(&self, coordinator: &Coordinator) -> Option<Coordinator> {
        let operation = *self.scenario.operations.get(coordinator.begun)?;
        match coordinator.outcome {
            None | Some(Outcome::Held { .. }) => return None,
            Some(_) => {}
        }
        let members: Vec<_> = (0..coordinator.seats.len())
            .filter_map(|device| Some((device, coordinator.transition.state(participant(device))?)))
            .collect();
        let stopped = coordinator.transition.hooks().iter().any(|hook| hook.stopped);
        let operation = (operation, coordinator.transition.epoch().next());
        let next = Coordinator::new(
            &self.scenario,
            self.breaks.transition,
            0,
            operation,
            &members,
            stopped,
        )?;
        (!members.is_empty()).then_some(Coordinator { begun: coordinator.begun + 1, ..next })
    }

    fn was_reached(&self, antecedent: Antecedent) -> bool {
        self.reached.load(Ordering::Relaxed) & (1 << antecedent as u64) != 0
    }

    pub(crate) fn reached(&self) -> Vec<Antecedent> {
        Antecedent::ALL.iter().copied().filter(|a| self.was_reached(*a)).collect()
    }

    /// True the first time only.
    fn first(&self, kind: usize, number: u64) -> bool {
        self.shown[kind].fetch_or(1 << number, Ordering::Relaxed) & (1 << number) == 0
    }

    fn actions_of_device(world: &World, number: usize, actions: &mut Vec<Action>) {
        let device = &world.devices[number];
        let faults = world.faults;
        for (coordinator, link) in device.links.iter().enumerate() {
            let keeps = faults.repeats > 0 && world.kept.is_none();
            if device.life == Life::Alive && !link.down.is_empty() {
                let read = |kept| Action::Read { device: number, from: coordinator, kept };
                actions.push(read(false));
                actions.extend(keeps.then(|| read(true)));
            }
            if let Some(event) = link.up.front() {
                let hear = |kept| Action::Hear { coordinator, device: number, kept };
                actions.push(hear(false));
                let answers = matches!(event, Event::Answer { .. });
                actions.extend((keeps && answers).then(|| hear(true)));
            }
        }
        if device.life != Life::Alive {
            return;
        }
        if device.arc.is_some() {
            actions.push(Action::ArcDone { device: number });
            if faults.refusals > 0 {
                actions.push(Action::ArcFails { device: number, restored: true });
            }
            if faults.errors > 0 {
                actions.push(Action::ArcFails { device: number, restored: false });
            }
        }
        if faults.crashes > 0 {
            actions.push(Action::Crash { device: number });
        }
    }

    fn actions_of_coordinator(&self, world: &World, number: usize, actions: &mut Vec<Action>) {
        let Some(coordinator) = &world.coordinators[number] else { return };
        let faults = world.faults;
        for &timer in &coordinator.timers {
            let budget = match timer {
                Timer::Fence(_) => faults.unproven,
                _ => faults.timeouts,
            };
            if budget > 0 {
                actions.push(Action::Expire { coordinator: number, timer });
            }
        }
        for (device, seat) in coordinator.seats.iter().enumerate() {
            if matches!(seat.fence, Fence::Asked | Fence::Unproven) {
                actions.push(Action::Prove { coordinator: number, device });
            }
        }
        for &(hook, moment) in &coordinator.hooks {
            for well in [true, false] {
                if well || faults.refusals > 0 {
                    let coordinator = number;
                    actions.push(Action::HookReturns { coordinator, hook, moment, well });
                }
            }
        }
    }
}

impl Model for Checked {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let scenario = &self.scenario;
        let members: Vec<_> =
            (0..scenario.devices).map(|number| (number, scenario.from(number))).collect();
        let device = |&(_, from): &(usize, MigrationState)| {
            Shared::new(Device::new((self.breaks.lifecycle)(Device::power_on()), from))
        };
        let operation = (scenario.operations[0], Epoch(2));
        let first =
            Coordinator::new(scenario, self.breaks.transition, 0, operation, &members, false);
        let mut world = World {
            coordinators: [first.map(Shared::new), None],
            devices: members.iter().map(device).collect(),
            faults: scenario.faults,
            hooks: scenario.hook,
            kept: None,
            broken: None,
        };
        world.seal();
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.broken.is_some() {
            return;
        }
        for device in 0..world.devices.len() {
            Self::actions_of_device(world, device, actions);
        }
        for coordinator in 0..2 {
            self.actions_of_coordinator(world, coordinator, actions);
        }
        let second = world.coordinators[1].is_some();
        if let Some(first) = &world.coordinators[0] {
            if !first.started {
                actions.push(Action::Begin);
                return;
            }
            if self.scenario.successor != Successor::None && !second {
                actions.push(Action::TakeOver);
            }
            if second && first.outcome.is_none() {
                actions.push(Action::Supersede);
            }
            if self.next_of(first).is_some() {
                actions.push(Action::Next);
            }
        }
        let alive = match world.kept {
            Some(Kept::Down(device, _)) => world.devices[device].life == Life::Alive,
            kept => kept.is_some(),
        };
        if alive {
            actions.push(Action::Again);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        self.take(world, action, None)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let rules = Rule::ALL.iter().zip(ALWAYS);
        let always = rules.map(|(rule, holds)| Property::always(rule.name(), holds));
        let reached = Antecedent::ALL.iter().zip(SOMETIMES);
        let sometimes = reached
            .filter(|(antecedent, _)| self.scenario.reaches.contains(antecedent))
            .map(|(antecedent, reached)| Property::sometimes(antecedent.name(), reached));
        always.chain(sometimes).collect()
    }
}

type Condition = fn(&Checked, &World) -> bool;

fn holds<const RULE: usize>(model: &Checked, world: &World) -> bool {
    world.broken != Some(Rule::ALL[RULE]) || !model.first(0, RULE as u64)
}

fn sometimes<const WHAT: usize>(model: &Checked, _: &World) -> bool {
    model.was_reached(Antecedent::ALL[WHAT]) && model.first(1, WHAT as u64)
}

macro_rules! conditions {
    ($condition:ident: $($number:literal)+) => { [$($condition::<$number> as Condition,)+] };
}

const ALWAYS: [Condition; Rule::ALL.len()] =
    conditions!(holds: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16);
const SOMETIMES: [Condition; Antecedent::ALL.len()] = conditions!(
    sometimes: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30
);

fn describe(event: Event) -> String {
    match event {
        Event::Answer { from, term, epoch, phase, state, answer } => {
            match phase_of(answer, phase) {
                Some(phase) => format!(
                    "{answer:?} of device {} to {phase} of term {term}, epoch {epoch}: it is in {state}",
                    device_of(from)
                ),
                None => format!("that device {} is in {state}", device_of(from)),
            }
        }
        Event::Lost(who, why) => format!("that device {} is lost: {why}", device_of(who)),
        other => format!("{other:?}"),
    }
}

fn phase_of(
    answer: standstill_protocol::transition::Answer,
    phase: standstill_protocol::message::Phase,
) -> Option<standstill_protocol::message::Phase> {
    use standstill_protocol::transition::Answer;
    (!matches!(answer, Answer::Status { .. })).then_some(phase)
}
