//! From a description to a running machine.

use super::incarnation::{self, Spawned, Starter};
use super::keep::Kept;
use super::roster::{Ids, Roster};
use super::slips::Slips;
use super::state::{Device, EndingReply, HookEntry, Local, Standing, Starting, State};
use super::take_over::Found;
use super::{CoordinatorActor, Message};
use crate::clock;
use crate::description::{Deadlines, HookSpec, MachineBuilder};
use crate::error::StartError;
use crate::events::{self, MachineEvent};
use crate::machine::Machine;
use crate::mailbox::Mailbox;
use crate::participant::{self, LocalAnswer};
use crate::policy::{Policies, Presence};
use crate::poll::Poll;
use crate::process::Spawner;
use crate::report::{Names, nanos};
use crate::watchdog::{Limits, Ticks};
use ractor::Actor;
use standstill_protocol::message::{Epoch, MAX_NAME, Term};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{Hook, HookId, MachineState, Operation};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use tokio::sync::{broadcast, oneshot};
use uuid::Uuid;

/// A machine whose processes run.
pub(crate) struct Prepared {
    pub(super) builder: MachineBuilder,
    pub(super) starter: Starter,
    pub(super) kept: Option<Kept>,
    pub(super) events: broadcast::Sender<MachineEvent>,
    pub(super) beginning: Beginning,
}

/// Where its processes come from; in the order of the description.
pub(super) enum Beginning {
    /// They were started and have not greeted yet.
    Started(Vec<Start>, oneshot::Sender<Result<Machine, StartError>>),
    /// Another coordinator has left them behind. There is nothing of an optional device that was
    /// never started.
    TakenOver(Vec<Option<Found>>),
}

/// Starts a machine: its processes, its actors, its threads; waits for the greetings.
pub(crate) async fn start(builder: MachineBuilder) -> Result<Machine, StartError> {
    check(&builder)?;
    let (builder, spawner, kept, processes) = spawn_processes(builder).await?;
    let events = builder.events.clone();
    let (reply, answer) = oneshot::channel();
    let beginning = Beginning::Started(processes, reply);
    let starter = Starter::Spawner(spawner);
    let prepared = Prepared { builder, starter, kept, events, beginning };
    let actor = Actor::spawn(None, CoordinatorActor, prepared).await;
    actor.map_err(|error| system("start the coordinator actor", io::Error::other(error)))?;
    answer.await.unwrap_or_else(|_| {
        Err(system("start the machine", io::Error::other("the coordinator actor has ended")))
    })
}

fn system(what: &'static str, source: io::Error) -> StartError {
    StartError::System { what, source }
}

/// Whether the names are usable and the policies possible.
pub(super) fn check(builder: &MachineBuilder) -> Result<(), StartError> {
    let devices = builder.devices.iter().map(|spec| &spec.name);
    let names = devices.chain(builder.locals.iter().map(|(name, _)| name));
    let mut seen = BTreeSet::new();
    for name in names {
        check_name(name, !seen.insert(name))?;
    }
    let policies = policies(builder);
    builder.devices.iter().try_for_each(|spec| policies.check(spec))
}

pub(super) fn policies(builder: &MachineBuilder) -> Policies {
    Policies { on_loss: builder.on_loss, presence: builder.presence }
}

/// Whether a device may have that name.
pub(super) fn check_name(name: &str, taken: bool) -> Result<(), StartError> {
    if name.is_empty() || name.len() > MAX_NAME {
        let text = format!("device name {name:?} must have 1 to {MAX_NAME} bytes");
        return Err(StartError::Description(text));
    }
    if taken {
        return Err(StartError::Description(format!("two devices are named {name:?}")));
    }
    Ok(())
}

/// What came of the start of a process; of an optional one it may be nothing.
pub(super) type Start = Result<Spawned, StartError>;

/// Starts all device processes, on a thread that may block.
async fn spawn_processes(
    builder: MachineBuilder,
) -> Result<(MachineBuilder, Spawner, Option<Kept>, Vec<Start>), StartError> {
    let specs: Vec<_> = builder.devices.clone();
    let (name, directory) = (builder.name.clone(), builder.control_directory.clone());
    let policies = policies(&builder);
    let task = tokio::task::spawn_blocking(move || {
        let spawner = Spawner::new().map_err(|source| StartError::Spawn {
            device: specs.first().map_or_else(String::new, |spec| spec.name.clone()),
            source,
        })?;
        let kept = directory.map(|path| Kept::claim(&path, &name, &specs)).transpose()?;
        let custody = kept.as_ref().map(|kept| &kept.custody);
        let processes = specs.iter().map(|spec| {
            let spawned = incarnation::spawn(&spawner, spec, custody);
            match policies.resolve(spec).1 {
                Presence::Optional => Ok(spawned),
                Presence::Required => spawned.map(Ok),
            }
        });
        let processes = processes.collect::<Result<Vec<_>, _>>();
        let Some(mut kept) = kept else { return Ok((spawner, None, processes?)) };
        let written = processes.and_then(|processes| {
            kept.add_processes(&specs, &processes)?;
            Ok(processes)
        });
        match written {
            Ok(processes) => Ok((spawner, Some(kept), processes)),
            Err(error) => {
                kept.leave();
                Err(error)
            }
        }
    });
    let spawned: Result<_, StartError> =
        task.await.map_err(|error| system("start processes", io::Error::other(error)))?;
    let (spawner, kept, processes) = spawned?;
    Ok((builder, spawner, kept, processes))
}

impl Prepared {
    pub(super) async fn into_state(self, myself: Mailbox) -> io::Result<State> {
        let Self { builder, starter, kept, events: listeners, beginning } = self;
        let poll = Poll::new(myself.clone())?;
        let (uuid, term) = match &kept {
            Some(kept) => (kept.record.uuid, kept.record.term()),
            None => (Uuid::new_v4(), Term(1)),
        };
        let mut names = Names::default();
        let mut ids = Ids::default();
        let mut fresh = || ids.next().ok_or_else(|| io::Error::other("too many participants"));
        let mut devices = Roster::default();
        let mut waits = None;
        let mut all_found = Vec::new();
        let specs = builder.devices.into_iter();
        match beginning {
            Beginning::Started(processes, reply) => {
                waits = Some(reply);
                for (spec, process) in specs.zip(processes) {
                    let id = fresh()?;
                    names.participants.insert(id, spec.name.clone());
                    devices.push(match process {
                        Ok(process) => {
                            poll.add(id, &process.0)?;
                            incarnation::device(&myself, id, spec, 1, process).await?
                        }
                        Err(error) => {
                            let (device, why) = (spec.name.clone(), error.to_string());
                            let event = MachineEvent::DeviceNotStarted { device, why: why.clone() };
                            events::log(&event, term, Epoch(0));
                            let _ = listeners.send(event);
                            Device::without_process(id, spec, why)
                        }
                    });
                }
            }
            Beginning::TakenOver(found) => {
                for (spec, found) in specs.zip(found) {
                    let id = fresh()?;
                    names.participants.insert(id, spec.name.clone());
                    let Some(Found { process, incarnation, contact, files, unprovable }) = found
                    else {
                        let why = "it was never started".to_owned();
                        devices.push(Device::without_process(id, spec, why));
                        continue;
                    };
                    let device =
                        incarnation::without_channel(&myself, id, spec, incarnation, process);
                    devices.push(device.await?);
                    all_found.push((id, contact, files, unprovable));
                }
            }
        }
        let mut locals = Vec::with_capacity(builder.locals.len());
        for (name, local) in builder.locals {
            let id = fresh()?;
            names.participants.insert(id, name.clone());
            let (flags, peer_dma) = (local.migration(), local.peer_dma());
            let thread = participant::local_device(id, &name, local, answer(&myself))?;
            let state = MigrationState::Running;
            let (hung, returned) = (false, false);
            locals.push(Local { id, name, flags, peer_dma, state, hung, returned, thread });
        }
        let mut hooks = Vec::with_capacity(builder.hooks.len());
        for ((spec, hook), number) in builder.hooks.into_iter().zip(0..) {
            let id = HookId(number);
            names.hooks.insert(id, spec.name.clone());
            let thread = participant::hook(id, &spec.name, hook, answer(&myself))?;
            let hook = hook_of(id, &spec);
            hooks.push(HookEntry { hook, hung: false, thread });
        }
        let policies = Policies { on_loss: builder.on_loss, presence: builder.presence };
        let Deadlines { hello, stall, silence, .. } = builder.deadlines;
        let limits = Limits::new(stall, silence, builder.heartbeat);
        let ticks = limits.interval().map(|interval| Ticks::new(interval, clock::now()));
        let starting = waits.map(|reply| {
            let deadline = myself.cast_after(hello, || Message::HelloExpired);
            Starting { reply, deadline, settling: None }
        });
        // Of a machine that is taken over nobody knows yet.
        let machine = if starting.is_some() { MachineState::Running } else { MachineState::Held };
        let mut state = State {
            myself,
            name: builder.name,
            uuid,
            term,
            epoch: Epoch(0),
            machine,
            held: Vec::new(),
            deadlines: builder.deadlines,
            on_failure: builder.on_failure,
            orphan: builder.orphan,
            kept,
            superseded: None,
            heartbeat_ns: nanos(builder.heartbeat),
            phases: builder.phases,
            poll,
            starter,
            devices,
            locals,
            ids,
            policies,
            unsettled: false,
            queue: VecDeque::new(),
            spawning: 0,
            limits,
            ticks,
            ram: Vec::new(),
            tracking: None,
            hooks,
            names,
            active: None,
            transitions: 0,
            starting,
            ending: None,
            over: false,
            declarations: BTreeMap::new(),
            next_declaration: 1,
            events: listeners,
            paused_at: None,
            slips: Slips::default(),
        };
        for (id, contact, files, unprovable) in all_found {
            state.found_files(id, files, unprovable);
            match contact {
                Ok(contact) => state.welcome_found(id, contact),
                Err(why) => state.not_found(id, why),
            }
        }
        // A machine without device processes has nobody to wait for.
        state.watch();
        state.maybe_started();
        state.settle();
        Ok(state)
    }
}

fn answer(myself: &Mailbox) -> impl Fn(LocalAnswer) + Send + 'static {
    let myself = myself.clone();
    move |answer| {
        // A coordinator that is gone waits for nobody.
        let _ = myself.cast(Message::Local(answer));
    }
}

fn hook_of(id: HookId, spec: &HookSpec) -> Hook {
    Hook {
        id,
        stop: spec.stop,
        start: spec.start,
        stop_rank: spec.stop_rank,
        start_rank: spec.start_rank,
        budget_ns: nanos(spec.deadline),
        stopped: false,
    }
}

impl State {
    /// The machine runs when everybody has greeted and the whole is possible.
    pub(super) fn maybe_started(&mut self) {
        if self.devices.iter().any(|device| device.standing == Standing::Greeting) {
            return;
        }
        if !self.have_settled() {
            return;
        }
        let Some(Starting { reply, deadline, .. }) = self.starting.take() else { return };
        deadline.abort();
        match self.plan(Operation::Pause).check() {
            Ok(()) => {
                self.unsettled = true;
                let (devices, term) = (self.devices.iter().count(), self.term.0);
                tracing::info!(target: events::TARGET, machine = self.name, devices, term, "the machine has started");
                let machine = Machine::new(self.myself.clone(), &self.events);
                let custody = self.custody().cloned();
                // From here on the owner has it, and with it the decision.
                custody.iter().for_each(|custody| custody.keep());
                // Whoever has given up waiting drops the machine, and so ends it.
                if let Err(unheard) = reply.send(Ok(machine)) {
                    custody.iter().for_each(|custody| custody.give_up());
                    drop(unheard);
                }
            }
            Err(source) => {
                let error = StartError::Plan { device: self.in_the_way(&source), source };
                self.end_after(EndingReply::Planner(reply, error));
            }
        }
    }
}
