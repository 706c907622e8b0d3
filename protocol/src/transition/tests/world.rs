//! A simulated machine: real [`Lifecycle`]s, FIFO queues, a discrete clock, and every kind of
//! fault. After each step it checks what must always hold; see [`World::check`] and its callees.

use super::super::*;
use crate::lifecycle::{self, ClientRequest, Effect as Work};
use crate::message::{Abort, Command, Epoch, OrphanPolicy, Phase, Query, Term};
use crate::migration::{Activity, MigrationState};
use node::{Device, Fence, Life, Node};
use std::collections::{BTreeMap, BTreeSet};

mod node;
mod oracle;

/// How likely each fault is, against a weight of 40 or so for everything that goes well.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub(super) crash: u32,
    pub(super) hang: u32,
    pub(super) fail: u32,
    pub(super) time: u32,
    pub(super) stray: u32,
    pub(super) cancel: u32,
    pub(super) supersede: u32,
    pub(super) client: u32,
    pub(super) lease: u32,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    /// The device reads its next message.
    Read(usize),
    /// The device carries out what it is at, and fails at it: restored or not.
    Work(usize),
    Fail(usize, bool),
    /// The coordinator reads its next message.
    Hear(usize),
    Prove(usize),
    HookReturns(usize, bool),
    /// The next deadline passes.
    Tick,
    Crash(usize),
    Hang(usize),
    /// Its lease runs out.
    Lease(usize),
    Client(usize),
    StrayAnswer,
    StrayCommand(usize),
    Cancel,
    Supersede,
}

pub(super) struct World {
    pub(super) transition: Transition,
    pub(super) plan: Plan,
    pub(super) nodes: Vec<Node>,
    pub(super) now: u64,
    pub(super) outcome: Option<Outcome>,
    /// What was found wrong by the physical oracle; the others panic at once.
    pub(super) broken: Option<String>,
    timers: BTreeMap<Timer, u64>,
    hooks_running: Vec<(HookId, HookMoment)>,
    /// Pairs of a stopped and a fully active participant that were there before.
    found: BTreeSet<(ParticipantId, ParticipantId)>,
    /// Nobody promised a barrier: a load, or the first phase is left out.
    no_barrier: bool,
    /// Whose fence an earlier coordinator could not prove.
    ghosts: BTreeSet<ParticipantId>,
    told: BTreeMap<(Epoch, Phase), Vec<ParticipantId>>,
    acks: BTreeSet<(ParticipantId, Epoch, Phase)>,
    refused_stopped: BTreeSet<(ParticipantId, Epoch, Phase)>,
    unproven: BTreeSet<ParticipantId>,
    heard: Vec<Event>,
    asked: BTreeMap<ParticipantId, Command>,
    undone: bool,
    hold_expired: bool,
}

impl World {
    /// A machine whose members are where the plan says; `unprovable` ones cannot be fenced in time.
    pub(super) fn new(plan: Plan, unprovable: &[bool]) -> Self {
        let nodes: Vec<_> = plan
            .members
            .iter()
            .zip(unprovable)
            .map(|(member, unprovable)| Node::new(*member, plan.term, !unprovable))
            .collect();
        let transition = Transition::new(plan.clone()).expect("the plan is sound");
        let mut world = Self {
            transition,
            nodes,
            now: 0,
            outcome: None,
            broken: None,
            timers: BTreeMap::new(),
            hooks_running: Vec::new(),
            found: BTreeSet::new(),
            no_barrier: plan.operation == Operation::Load,
            ghosts: BTreeSet::new(),
            plan,
            told: BTreeMap::new(),
            acks: BTreeSet::new(),
            refused_stopped: BTreeSet::new(),
            unproven: BTreeSet::new(),
            heard: Vec::new(),
            asked: BTreeMap::new(),
            undone: false,
            hold_expired: false,
        };
        world.found = world.mixed();
        world
    }

    /// The coordinator dies; another one finds what is left and asks.
    pub(super) fn taken_over(mut self) -> Self {
        let load = self.plan.operation == Operation::Load;
        let term = Term(self.plan.term.0 + 1);
        self.nodes.retain(|node| node.fence != Fence::Proven);
        for node in &mut self.nodes {
            node.up.clear();
            node.stood = None;
            node.member.state = node.state();
            node.member.on_loss = OnLoss::Fail;
            let orphan = OrphanPolicy::Keep;
            node.down.push_back(lifecycle::Event::Disconnected);
            node.down.push_back(lifecycle::Event::Welcome { term, epoch: Epoch(0), orphan });
            if node.life == Life::Dead {
                node.fence = Fence::None;
                node.up.push_back(Event::Lost(node.member.id, Loss::Disconnected));
            }
        }
        self.plan.operation = Operation::TakeOver;
        self.plan.term = term;
        self.plan.epoch = Epoch(1);
        self.plan.phases = Phases::Two;
        self.plan.members = self.nodes.iter().map(|node| node.member).collect();
        self.plan.hooks.clear();
        self.transition = Transition::new(self.plan.clone()).expect("the plan is sound");
        // What the dead coordinator could not prove is not this one's doing.
        self.found.extend(self.mixed());
        self.ghosts.extend(self.unproven);
        Self {
            now: 0,
            outcome: None,
            timers: BTreeMap::new(),
            hooks_running: Vec::new(),
            no_barrier: load || self.no_barrier,
            told: BTreeMap::new(),
            acks: BTreeSet::new(),
            refused_stopped: BTreeSet::new(),
            unproven: BTreeSet::new(),
            heard: Vec::new(),
            asked: BTreeMap::new(),
            undone: false,
            hold_expired: false,
            ..self
        }
    }

    pub(super) fn lose_early(&mut self, index: usize) {
        let index = index % self.nodes.len();
        if self.nodes[index].member.kind == MemberKind::Process {
            self.nodes[index].life = Life::Dead;
            self.feed(Event::Lost(self.nodes[index].member.id, Loss::Exited));
        }
    }

    pub(super) fn begin(&mut self) {
        self.feed(Event::Begin);
        self.check();
    }

    /// Takes one random action.
    pub(super) fn act(&mut self, choice: u32, faults: &Faults) {
        let actions = self.actions(faults);
        let total: u32 = actions.iter().map(|(weight, _)| weight).sum();
        if total == 0 {
            return;
        }
        let mut left = choice % total;
        for (weight, action) in actions {
            if left < weight {
                self.take(action, choice);
                break;
            }
            left -= weight;
        }
        self.check();
    }

    /// Lets everything that still moves come to its end, and then the deadlines pass.
    pub(super) fn drain(&mut self) {
        for _ in 0..20_000 {
            if self.outcome.is_some() {
                return;
            }
            let actions = self.actions(&Faults { time: 1, ..Faults::default() });
            let next = actions.iter().find(|(_, action)| !matches!(action, Action::Tick));
            let Some(&(_, action)) = next.or_else(|| actions.last()) else {
                panic!("stuck: nothing moves and no timer is armed: {:?}", self.transition);
            };
            self.take(action, 0);
            self.check();
        }
        panic!("it does not end: {:?}", self.transition);
    }

    fn actions(&self, faults: &Faults) -> Vec<(u32, Action)> {
        let mut actions = Vec::with_capacity(32);
        for (i, node) in self.nodes.iter().enumerate() {
            let process = node.member.kind == MemberKind::Process;
            if node.moves() {
                if !node.down.is_empty() {
                    actions.push((6, Action::Read(i)));
                }
                if node.has_work() {
                    actions.push((6, Action::Work(i)));
                    actions.push((faults.fail, Action::Fail(i, true)));
                    actions.push((faults.fail / 2, Action::Fail(i, false)));
                }
                if process {
                    actions.push((faults.crash, Action::Crash(i)));
                    actions.push((faults.client, Action::Client(i)));
                    if node.lease.is_some() {
                        actions.push((faults.lease, Action::Lease(i)));
                    }
                    if !node.read.is_empty() {
                        actions.push((faults.stray, Action::StrayCommand(i)));
                    }
                }
                actions.push((faults.hang, Action::Hang(i)));
            }
            if !node.up.is_empty() {
                actions.push((6, Action::Hear(i)));
            }
            if node.fence == Fence::Asked && node.provable {
                actions.push((3, Action::Prove(i)));
            }
        }
        for i in 0..self.hooks_running.len() {
            actions.push((4, Action::HookReturns(i, true)));
            actions.push((faults.fail, Action::HookReturns(i, false)));
        }
        actions.push((faults.stray, Action::StrayAnswer));
        actions.push((faults.cancel, Action::Cancel));
        actions.push((faults.supersede, Action::Supersede));
        if !self.timers.is_empty() {
            actions.push((faults.time, Action::Tick));
        }
        actions.retain(|(weight, _)| *weight > 0);
        actions
    }

    fn take(&mut self, action: Action, choice: u32) {
        match action {
            Action::Read(i) => {
                let node = &mut self.nodes[i];
                if let Some(event) = node.down.pop_front() {
                    if let lifecycle::Event::Command(command) = &event {
                        node.read.push(*command);
                    }
                    node.step(event);
                }
            }
            Action::Work(i) => self.nodes[i].work(None),
            Action::Fail(i, restored) => self.nodes[i].work(Some(restored)),
            Action::Hear(i) => {
                if let Some(event) = self.nodes[i].up.pop_front() {
                    self.hear(event);
                }
            }
            Action::Prove(i) => {
                self.nodes[i].fence = Fence::Proven;
                self.feed(Event::Fenced(self.nodes[i].member.id));
            }
            Action::HookReturns(i, well) => {
                let (id, moment) = self.hooks_running.remove(i);
                self.feed(match well {
                    true => Event::HookDone(id, moment),
                    false => Event::HookFailed(id, moment),
                });
            }
            Action::Tick => self.tick(),
            Action::Crash(i) => {
                self.nodes[i].life = Life::Dead;
                let lost = Event::Lost(self.nodes[i].member.id, Loss::Exited);
                // Seen behind its last answers, or at once.
                match choice % 2 {
                    0 => self.nodes[i].up.push_back(lost),
                    _ => self.feed(lost),
                }
            }
            Action::Hang(i) => self.nodes[i].life = Life::Hung,
            Action::Lease(i) => self.nodes[i].lease_expires(),
            Action::Client(i) => {
                let states = MigrationState::ALL;
                let request = match choice / 7 % 9 {
                    8 => ClientRequest::Reset,
                    state => ClientRequest::SetState(states[state as usize]),
                };
                self.nodes[i].step(lifecycle::Event::Client(request));
            }
            Action::StrayAnswer => self.stray_answer(choice / 7),
            Action::StrayCommand(i) => {
                let node = &mut self.nodes[i];
                let again = node.read[choice as usize / 7 % node.read.len()];
                let Device::Process { lifecycle, .. } = &mut node.device else {
                    return;
                };
                let before = lifecycle.clone();
                let effects = lifecycle.step(lifecycle::Event::Command(again));
                assert!(matches!(effects[..], [Work::Dropped(_)]), "{again:?}: {effects:?}");
                assert_eq!(before, *lifecycle);
            }
            Action::Cancel => self.feed(Event::Cancel),
            Action::Supersede => self.feed(Event::Superseded),
        }
    }

    fn tick(&mut self) {
        let Some((&timer, &at)) = self.timers.iter().min_by_key(|(_, at)| **at) else {
            return;
        };
        self.timers.remove(&timer);
        self.now = self.now.max(at);
        match timer {
            Timer::Fence(id) => drop(self.unproven.insert(id)),
            Timer::Hold => self.hold_expired = true,
            _ => {}
        }
        self.feed(Event::Expired(timer));
    }

    fn hear(&mut self, event: Event) {
        if let Event::Answer { from, epoch, phase, state, answer, .. } = event {
            match answer {
                Answer::Reached => drop(self.acks.insert((from, epoch, phase))),
                Answer::Refused if state.activity() == Activity::Stopped => {
                    self.refused_stopped.insert((from, epoch, phase));
                }
                Answer::Refused | Answer::Status { .. } => {}
            }
            self.heard.push(event);
        }
        if let Event::LeaseExpired(id, state) = event
            && self.outcome.is_none()
        {
            let asked = self.transition.awaited().any(|awaited| awaited == id);
            let (early, undone) = (self.told.is_empty() || asked, self.undone);
            let node = self.node(id);
            // An undo that is under way goes back to what was known when it began.
            if !undone {
                node.stood = None;
            }
            if !undone && early {
                // It had left before it heard of this transition.
                node.member.state = state;
                self.plan.members = self.nodes.iter().map(|node| node.member).collect();
            }
        }
        self.feed(event);
    }

    /// An answer that was heard before, or nearly the one that is waited for: of another term,
    /// epoch or phase, or from nobody.
    fn stray_answer(&mut self, choice: u32) {
        let pick = choice as usize / 8;
        let awaited: Vec<_> = self.transition.awaited().collect();
        let asked = awaited.get(pick % awaited.len().max(1));
        let (mut from, mut term, mut epoch, mut phase, state, answer) =
            match (asked.and_then(|id| self.asked.get(id)), choice % 8) {
                (Some(command), 0..6) => (
                    awaited[pick % awaited.len()],
                    command.term,
                    command.epoch,
                    command.phase,
                    command.target,
                    Answer::Reached,
                ),
                _ => match self.heard.get(pick % self.heard.len().max(1)) {
                    Some(&Event::Answer { from, term, epoch, phase, state, answer }) => {
                        (from, term, epoch, phase, state, answer)
                    }
                    _ => return,
                },
            };
        match choice % 8 {
            0 => term = Term(term.0 - 1),
            1 => term = Term(term.0 + 1),
            2 => from = ParticipantId(99),
            3 => epoch = Epoch(self.transition.epoch().0 + 1),
            4 => epoch = Epoch(self.transition.epoch().0 - 1),
            5 => phase = Phase::Save,
            _ => {}
        }
        let mut before = self.transition.clone();
        self.feed(Event::Answer { from, term, epoch, phase, state, answer });
        if self.outcome.is_none() {
            // Another answer from nobody, so that both have counted one more.
            let from = ParticipantId(99);
            before.step(Event::Answer { from, term, epoch, phase, state, answer });
            assert_eq!(before, self.transition, "a stray answer changed something");
        }
    }

    /// Feeds the transition, carries out what it says, and checks that.
    fn feed(&mut self, event: Event) {
        let effects = self.transition.step(event);
        if self.outcome.is_some() {
            assert_eq!(effects, [], "effects after the end");
            return;
        }
        let mut phases: Vec<_> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send(_, command) => Some((command.epoch, command.phase)),
                _ => None,
            })
            .collect();
        phases.dedup();
        assert!(phases.len() <= 1, "two phases in one step: {effects:?}");
        for phase in phases {
            let again = self.told.insert(phase, Vec::new());
            assert!(again.is_none(), "{phase:?} is sent in two steps");
            self.check_barrier(phase);
        }
        let last = effects.len().saturating_sub(1);
        for (at, effect) in effects.into_iter().enumerate() {
            match effect {
                Effect::Send(id, command) => self.send(id, command),
                Effect::Abort(id, Abort { term, epoch }) => {
                    let abort = lifecycle::Event::Abort(Abort { term, epoch });
                    self.node(id).down.push_back(abort);
                }
                Effect::Query(id, Query { term, epoch }) => {
                    let query = lifecycle::Event::Query(Query { term, epoch });
                    self.node(id).down.push_back(query);
                }
                Effect::Fence(id, _) => {
                    let node = self.node(id);
                    assert_eq!(node.member.kind, MemberKind::Process);
                    assert_eq!(node.fence, Fence::None, "fenced twice");
                    node.fence = Fence::Asked;
                    node.life = Life::Dead;
                }
                Effect::RunHook(id, moment) => {
                    let running = self.hooks_running.iter().any(|&(running, _)| running == id);
                    assert!(!running, "hook {id:?} is called while it runs");
                    self.hooks_running.push((id, moment));
                }
                Effect::Arm(timer, budget_ns) => {
                    self.undone |= timer == Timer::Undo;
                    let twice = self.timers.insert(timer, self.now + budget_ns);
                    assert_eq!(twice, None, "{timer:?} is armed twice");
                }
                Effect::Disarm(timer) => {
                    assert!(self.timers.remove(&timer).is_some(), "{timer:?} was not armed");
                }
                Effect::Finish(outcome) => {
                    assert_eq!(at, last, "something after the end");
                    assert!(self.timers.is_empty(), "timers are left: {:?}", self.timers);
                    assert!(self.outcome.replace(outcome).is_none());
                }
            }
        }
    }

    fn node(&mut self, id: ParticipantId) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.member.id == id).expect("a participant")
    }

    fn send(&mut self, id: ParticipantId, command: Command) {
        // Only a reset names where the participant is, not where it is to go.
        let usable = command.target != MigrationState::Error;
        assert!(usable || command.phase == Phase::Reset, "{command:?}");
        assert_eq!(command.term, self.plan.term);
        self.asked.insert(id, command);
        if let Some(told) = self.told.get_mut(&(command.epoch, command.phase)) {
            told.push(id);
        }
        let node = self.node(id);
        assert_eq!(node.fence, Fence::None, "a fenced participant is told something");
        match &mut node.device {
            Device::Process { .. } => node.down.push_back(lifecycle::Event::Command(command)),
            Device::Local { calls, .. } => calls.push_back(command),
        }
    }
}
