//! A machine of which a test decides what happens next.

mod possible;

use super::super::Message;
use super::super::script::packets::Ask;
use super::super::script::{Asked, Call, Down, Script, ScriptedActor, Started, process};
use super::super::slips::Slips;
use super::super::state::{HookEntry, Local};
use super::action::{Action, Case};
use super::inside::{Calls, HookEnd, LocalEnd};
use super::unit::Unit;
use crate::description::{DeviceSpec, MachineBuilder};
use crate::device::{Message as ToProcess, ProcessEvent};
use crate::error::StartError;
use crate::events::MachineEvent;
use crate::machine::Machine;
use crate::participant::LocalThread;
use crate::policy::{LossPolicy, RestartPolicy};
use crate::process::Exit;
use crate::report::TransitionReport;
use standstill_protocol::message::{
    CoordinatorMessage, DeviceEvent, DeviceMessage, Epoch, PeerDma, Phase, Term,
};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_protocol::transition::{Hook, HookId, OnFailure, Operation, ParticipantId, Timer};
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::broadcast;

/// How many messages a device that floods sends at a time.
const FLOOD: usize = 250;
/// What a hook has for each of its calls.
pub(super) const HOOK_BUDGET: Duration = Duration::from_secs(5);

pub(super) const KILLED: Exit = Exit::Signal { signal: 9, core_dumped: false };

/// A transition of the owner that is under way.
pub(super) struct Current {
    pub(super) operation: Operation,
    pub(super) first: u64,
    /// The machine was held when it began.
    pub(super) held: bool,
    /// When it began, and how long the coordinator had been late by then.
    pub(super) began: (Duration, Duration),
    /// Where everybody who counts was, by the number of the process.
    pub(super) originals: Vec<(usize, MigrationState)>,
    /// Whether each hook was called for a stop; `None` of one that hung, and was left out.
    pub(super) hooks_were_stopped: Vec<Option<bool>>,
    /// Where each local device was.
    pub(super) locals_were: Vec<MigrationState>,
    /// Local devices that hang, and that the owner has taken as they are.
    pub(super) left_out: BTreeSet<ParticipantId>,
    /// Whom it has lost.
    pub(super) lost: BTreeSet<usize>,
    /// Whose lease has run out since it began, or a little before.
    pub(super) expired: BTreeSet<usize>,
    pub(super) hold_expired: bool,
}

pub(super) struct World {
    pub(super) actor: ScriptedActor,
    pub(super) script: Script,
    pub(super) case: Case,
    started: Option<Started>,
    pub(super) machine: Option<Machine>,
    events: broadcast::Receiver<MachineEvent>,
    pub(super) units: Vec<Unit>,
    pub(super) locals: Vec<LocalEnd>,
    pub(super) hooks: Vec<HookEnd>,
    pub(super) calls: Vec<Call>,
    starts: VecDeque<(ParticipantId, ParticipantId, String)>,
    /// Reports of the owner's transitions that nobody has got yet.
    pub(super) reports: Vec<Arc<TransitionReport>>,
    pub(super) current: Option<Current>,
    /// How much time has passed while the coordinator had something to do.
    pub(super) lag: Duration,
    /// Another coordinator has written itself down.
    pub(super) superseded: bool,
    directory: Option<TempDir>,
    slips: Slips,
    pub(super) floods: bool,
    /// There is something to read, and the coordinator does not know.
    readable: bool,
    /// The answers whose deadline has just passed.
    pub(super) expired: Option<(Epoch, Phase)>,
    /// A hold has run out of its time: not everybody who should stand does.
    pub(super) given_up: bool,
    /// What was found wrong; the first thing counts.
    pub(super) wrong: Option<String>,
    /// Ends and stages that were reached.
    pub(super) reached: BTreeSet<String>,
    /// What has happened, for a person; `None` if nobody reads it.
    pub(super) trace: Option<Vec<String>>,
}

fn spec(name: String, kind: super::action::Kind) -> DeviceSpec {
    let spec = DeviceSpec::new(name, "scripted").on_loss(match kind.on_loss {
        0 => LossPolicy::Fail,
        1 => LossPolicy::ContinueWithout,
        _ => LossPolicy::Restart(RestartPolicy { budget: 2, ..RestartPolicy::default() }),
    });
    if kind.optional { spec.optional() } else { spec }
}

impl World {
    /// The machine of a case, whose processes were just started or just found.
    pub(super) fn new(case: &Case, slips: Slips, tells: bool) -> std::io::Result<Self> {
        let heartbeat = if case.heartbeats { Duration::from_secs(1) } else { Duration::ZERO };
        let named = case.devices.iter().enumerate();
        let specs: Vec<_> = named.map(|(at, kind)| spec(format!("d{at}"), *kind)).collect();
        let builder = MachineBuilder::new("vm")
            .devices(specs.clone())
            .deadlines(case.deadlines())
            .heartbeat(heartbeat)
            .on_failure(if case.stay_stopped {
                OnFailure::StayStopped
            } else {
                OnFailure::Rollback
            });
        let events = builder.events.subscribe();
        let script = Script::new();
        let directory = case.kept.then(super::kept::directory).transpose()?;
        let kept = |term| directory.as_ref().map(|folder| super::kept::kept(folder, &specs, term));
        let (actor, units, started) = if case.taken_over {
            let kept = kept(Term(2)).transpose()?;
            let (actor, units) = super::kept::taken_over(case, builder, kept, &script, slips)?;
            (actor, units, None)
        } else {
            let kept = kept(Term(1)).transpose()?;
            let (actor, devices, started) = ScriptedActor::start(builder, kept, &script)?;
            let kinds = case.devices.iter();
            let units = devices.into_iter().zip(kinds).map(|(mut device, kind)| {
                device.lifecycle = slips.lifecycle(device.lifecycle);
                Unit::new(device, kind.unprovable)
            });
            (actor, units.collect(), Some(started))
        };
        let machine = case.taken_over.then(|| super::kept::machine(&actor)).flatten();
        let mut world = Self {
            actor,
            script,
            case: case.clone(),
            started,
            machine,
            events,
            units,
            locals: Vec::new(),
            hooks: Vec::new(),
            calls: Vec::new(),
            starts: VecDeque::new(),
            reports: Vec::new(),
            current: None,
            lag: Duration::ZERO,
            superseded: false,
            directory,
            slips,
            floods: false,
            readable: false,
            expired: None,
            given_up: false,
            wrong: None,
            reached: BTreeSet::new(),
            trace: tells.then(Vec::new),
        };
        world.furnish();
        if let Some(machine) = world.machine.clone().filter(|_| case.taken_over) {
            world.calls.push(Call::take_over(&machine));
        }
        world.observe();
        Ok(world)
    }

    /// Local devices and hooks; their threads are this test.
    fn furnish(&mut self) {
        let Some(state) = &mut self.actor.state else { return };
        state.slips = self.slips;
        // Of a machine that is taken over nobody knows what is in its VMM.
        if self.case.taken_over {
            return;
        }
        for at in 0..self.case.locals {
            let Some(id) = state.ids.next() else { return };
            let (thread, calls) = LocalThread::scripted();
            let name = format!("local{at}");
            state.names.participants.insert(id, name.clone());
            let (flags, peer_dma) = (MigrationFlags::ALL, PeerDma::Possible);
            let running = MigrationState::Running;
            let (hung, returned) = (false, false);
            let local = Local { id, name, flags, peer_dma, state: running, hung, returned, thread };
            state.locals.push(local);
            self.locals.push(LocalEnd { id, calls: Calls::new(calls), state: running });
        }
        for (&(stop, start), number) in self.case.hooks.iter().zip(0..) {
            let id = HookId(number);
            let (thread, calls) = LocalThread::scripted();
            state.names.hooks.insert(id, format!("hook{number}"));
            let budget_ns = crate::report::nanos(HOOK_BUDGET);
            let (stop_rank, start_rank) = (0, 0);
            let hook = Hook { id, stop, start, stop_rank, start_rank, budget_ns, stopped: false };
            state.hooks.push(HookEntry { hook, hung: false, thread });
            self.hooks.push(HookEnd { id, calls: Calls::new(calls), stopped: false });
        }
    }

    pub(super) fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(text());
        }
    }

    /// Takes an action and looks at what comes of it.
    pub(super) fn take(&mut self, action: Action) {
        self.say(|| format!("{action:?}"));
        match action {
            Action::Handle => self.handle(),
            Action::Watch => self.actor.watch(),
            Action::Greet(i) => {
                self.units[i].greeted = true;
                self.units[i].device.greet(u64::try_from(i).unwrap_or_default());
            }
            Action::Read(i) => self.read(i),
            Action::Arc(i) => self.units[i].device.end_arc(None),
            Action::Fail(i, restored) => self.units[i].device.end_arc(Some(restored)),
            Action::Crash(i) => {
                self.units[i].ends(Exit::Signal { signal: 11, core_dumped: false });
            }
            Action::Close(i) => self.units[i].device.close(),
            Action::Hang(i) => self.units[i].hung = true,
            Action::Expire(i) => {
                self.units[i].device.lease_expires();
                if let Some(current) = &mut self.current {
                    current.expired.insert(i);
                }
            }
            Action::SeeExit(i) => {
                self.units[i].exit_seen = true;
                let exit = self.units[i].exit.unwrap_or(Exit::Unknown);
                self.tell(i, ProcessEvent::Exited(exit));
            }
            Action::Prove(i) => {
                self.units[i].proven = true;
                let exit = self.units[i].exit.unwrap_or(Exit::Unknown);
                self.tell(i, ProcessEvent::Fenced { exit, locks: 0 });
            }
            Action::Gone(i) => {
                self.units[i].gone_seen = true;
                self.tell(i, ProcessEvent::Gone);
            }
            Action::Tick => self.tick(),
            Action::Hook(i, well) => {
                let answer = self.hooks[i].answer(well);
                self.local(answer);
            }
            Action::HangHook(i) => self.hooks[i].calls.hung = true,
            Action::Local(i, well) => {
                let answer = self.locals[i].answer(well);
                self.local(answer);
            }
            Action::HangLocal(i) => self.locals[i].calls.hung = true,
            Action::Spawn(well) => self.spawn(well),
            Action::Ask(ask) => self.ask(ask),
            Action::Again(i, which) => self.units[i].device.read_again(which),
            Action::Stray(i, what) => self.stray(i, what),
            Action::Garbage(i) => {
                let machine = None;
                let hello = self.units[i].device.hello(machine);
                self.units[i].device.send(&DeviceMessage::Hello(hello));
            }
            Action::Flood(i) => {
                self.floods = true;
                (0..FLOOD).for_each(|_| self.units[i].device.heartbeat());
            }
            Action::Supersede => self.supersede(),
            Action::Welcomed(i) => {
                let term = Term(if self.case.taken_over { 3 } else { 2 });
                self.units[i].welcomed_by_another = true;
                self.units[i].device.welcome(term);
                let event = DeviceEvent::Superseded(term);
                self.units[i].device.send(&DeviceMessage::Event(event));
            }
        }
        self.observe();
    }

    fn handle(&mut self) {
        let tells = self.trace.is_some();
        let mut text = String::new();
        let (mut hold, mut fence, mut expired) = (false, None, None);
        self.actor.handle(|message| {
            if tells {
                text = format!("{message:?}");
            }
            match message {
                Message::Expired(_, Timer::Hold) => hold = true,
                Message::Expired(_, Timer::Phase(epoch, phase, _)) => {
                    expired = Some((*epoch, *phase));
                }
                Message::Expired(_, Timer::Fence(id)) | Message::FenceExpired(id) => {
                    fence = Some(*id);
                }
                _ => {}
            }
        });
        self.say(|| format!("  {}", text.chars().take(300).collect::<String>()));
        self.expired = expired;
        if let Some(current) = &mut self.current {
            current.hold_expired |= hold;
        }
        for unit in &mut self.units {
            unit.given_up |= unit.is_pending() && (hold || unit.id == fence && fence.is_some());
        }
    }

    fn read(&mut self, i: usize) {
        let unit = &mut self.units[i];
        let read = unit.device.read();
        if unit.device.ended {
            unit.ends(Exit::Code(0));
        }
        self.say(|| match read {
            Some(Down::Message(message)) => format!("  {message:?}"),
            _ => "  there is nobody any more".to_owned(),
        });
    }

    /// The actor of a process says something to the coordinator.
    fn tell(&self, i: usize, event: ProcessEvent) {
        if let Some(id) = self.units[i].id {
            // A coordinator that has ended needs to know nothing.
            let _ = self.script.cast(Message::Process(id, event));
        }
    }

    fn local(&self, answer: Option<crate::participant::LocalAnswer>) {
        if let Some(answer) = answer {
            let _ = self.script.cast(Message::Local(answer));
        }
    }

    fn tick(&mut self) {
        if self.case.heartbeats {
            let alive = self.units.iter_mut().filter(|unit| unit.moves());
            alive
                .filter(|unit| unit.device.lifecycle.term() > Term(0))
                .for_each(|unit| unit.device.heartbeat());
        }
        let before = self.script.now();
        let late = self.script.mails() > 0 || self.readable;
        self.script.go_off();
        if late {
            self.lag += self.script.now() - before;
        }
    }

    fn spawn(&mut self, well: bool) {
        let Some((id, next, name)) = self.starts.pop_front() else { return };
        let spawned = if well {
            let number = self.units.len();
            process(&self.script, number, &name).map(|(spawned, mut device)| {
                device.lifecycle = self.slips.lifecycle(device.lifecycle);
                self.units.push(Unit::new(device, false));
                spawned
            })
        } else {
            Err(std::io::Error::other("as the test wants"))
        };
        let spawned = spawned
            .map_err(|source| Box::new(StartError::System { what: "start a process", source }));
        let _ = self.script.cast(Message::Spawned(id, next, spawned));
    }

    fn ask(&mut self, ask: Ask) {
        let Some(machine) = &self.machine else { return };
        if matches!(ask, Ask::GoOn | Ask::GiveUp) {
            return self.calls.iter().for_each(|call| call.decide(ask == Ask::GoOn));
        }
        let name = match ask {
            Ask::Restart(device) | Ask::Remove(device) => format!("d{device}"),
            _ => format!("d{}", self.case.devices.len()),
        };
        self.calls.push(Call::new(machine, ask, name));
    }

    fn supersede(&mut self) {
        self.superseded = true;
        if let Some(folder) = &self.directory
            && let Err(error) = super::kept::raise(folder)
        {
            self.is_wrong(|| format!("the test cannot write the record: {error}"));
        }
    }

    /// What the coordinator has asked for since the last time.
    fn serve(&mut self) {
        for asked in self.script.asked() {
            match asked {
                Asked::Begun(number, id) => {
                    if let Some(unit) = self.units.get_mut(number) {
                        unit.id = Some(id);
                    }
                }
                Asked::Told(number, ToProcess::Fence) => {
                    self.end(number);
                    if !self.superseded {
                        self.units[number].fence = true;
                        if self.units[number].proven {
                            let exit = self.units[number].exit.unwrap_or(Exit::Unknown);
                            self.tell(number, ProcessEvent::Fenced { exit, locks: 0 });
                        }
                    }
                }
                Asked::Told(number, ToProcess::Kill) => self.end(number),
                Asked::Killed(number) => {
                    // One that was never welcomed could not be found by anybody.
                    if self.superseded && self.units[number].counted {
                        self.is_wrong(|| {
                            format!("device {number} is another one's, and is killed")
                        });
                    }
                    self.end(number);
                }
                // Whoever owned it has let go of it, and so ended it, unless it is to live on.
                Asked::LetGo(number) if !self.case.kept || self.units[number].id.is_none() => {
                    self.end(number);
                }
                Asked::Told(number, ToProcess::Expect(grace)) => {
                    self.script.kill_after(grace, number);
                }
                Asked::Told(..) | Asked::LetGo(_) => {}
                Asked::Start(id, next, name) => self.starts.push_back((id, next, name)),
            }
        }
    }

    /// A process is killed by its actor, which looks into the record first.
    fn end(&mut self, number: usize) {
        if self.superseded && self.units[number].counted {
            let term = Term(if self.case.taken_over { 3 } else { 2 });
            self.tell(number, ProcessEvent::Superseded(term));
        } else if let Some(unit) = self.units.get_mut(number) {
            unit.ends(KILLED);
        }
    }

    /// Looks at what has come of an action.
    pub(super) fn observe(&mut self) {
        if let Some(started) = &mut self.started
            && let Ok(machine) = started.try_recv()
        {
            self.started = None;
            self.machine = machine.ok();
        }
        self.know();
        self.serve();
        self.locals.iter_mut().for_each(|local| local.calls.collect());
        self.hooks.iter_mut().for_each(|hook| hook.calls.collect());
        let mut told = Vec::new();
        for (i, unit) in self.units.iter_mut().enumerate() {
            let new = unit.device.collect();
            let len = unit.device.down.len();
            told.extend(unit.device.down.range(len - new..).filter_map(|down| match down {
                Down::Message(message) => Some((i, message.clone())),
                Down::End => None,
            }));
        }
        self.readable = self.actor.is_readable();
        let mut events = Vec::new();
        loop {
            match self.events.try_recv() {
                Ok(event) => events.push(event),
                Err(broadcast::error::TryRecvError::Lagged(_)) => {}
                Err(_) => break,
            }
        }
        self.follow(told, events);
        self.answers();
        self.check();
        self.remember();
    }

    /// Events and messages, in the order in which they belong together.
    fn follow(&mut self, mut told: Vec<(usize, CoordinatorMessage)>, events: Vec<MachineEvent>) {
        for event in events {
            self.say(|| match &event {
                MachineEvent::Transition(report) => {
                    format!("  event: {} ends: {:?}", report.operation, report.outcome)
                }
                event => format!("  event: {event:?}"),
            });
            if let MachineEvent::Transition(report) = &event {
                let last = report.last_epoch;
                let later = |message: &CoordinatorMessage| match message {
                    CoordinatorMessage::Command(command) => command.epoch > last,
                    _ => false,
                };
                let (rest, before): (Vec<_>, Vec<_>) =
                    told.into_iter().partition(|(_, message)| later(message));
                self.told(&before);
                told = rest;
            }
            self.event(event);
        }
        self.told(&told);
    }

    pub(super) fn is_wrong(&mut self, what: impl FnOnce() -> String) {
        if self.wrong.is_none() {
            self.wrong = Some(what());
        }
    }

    /// The coordinator has ended.
    pub(super) fn is_ended(&self) -> bool {
        self.actor.state.is_none()
    }
}
