//! Brings a new process of a device to the machine's present state, before it counts.
//!
//! ```text
//! spawned ─ Hello ─┤no transition is under way├─ Welcome ─ STOP ─ RAM declared ─┐
//!                                     ┌──────────────────────────────────────────┘
//!                                     ├─ machine runs: RUNNING ─► counts
//!                                     └─ machine stands: ───────► counts
//! ```
//!
//! A device that was not welcomed serves nothing, so it does no DMA: it may wait.

use super::Reply;
use super::slips::Slip;
use super::state::{Declared, Device, Purpose, Standing, State, Waiting};
use crate::clock;
use crate::control_directory::ControlDirectoryError;
use crate::description::DeviceSpec;
use crate::dirty::Untracked;
use crate::error::{GreetingError, MachineError, StartError, with_sources};
use crate::events::MachineEvent;
use crate::mailbox::Alarm;
use crate::process::BackingFile;
use standstill_protocol::message::Hello;
use standstill_protocol::transition::{
    Loss, MachineState, Operation, Outcome, ParticipantId, PlanError,
};
use std::time::Instant;

/// A new incarnation on its way in.
#[derive(Debug)]
pub(super) struct Join {
    pub(super) stage: Stage,
    /// When its process was started.
    pub(super) began: Instant,
}

/// How far it is.
#[derive(Debug)]
pub(super) enum Stage {
    /// Its Hello is waited for.
    Greeting(Alarm),
    /// It waits for its Welcome: a transition is under way.
    Greeted(Box<Hello>, Vec<BackingFile>),
    /// It is brought to STOP.
    Stopping,
    /// It is to accept what is declared to be RAM.
    Memory,
    /// It is in STOP and knows the RAM.
    Stopped,
    /// It is brought to RUNNING.
    Starting,
    /// It will not come in.
    Failed,
}

/// Why it did not come in.
#[derive(Debug)]
pub(super) enum Failure {
    Start(Box<StartError>),
    Greeting(GreetingError),
    /// It cannot mark what it writes to RAM, and all devices have to.
    Untracked,
    /// With it the machine would not be possible; the name is that of the device in the way.
    Plan(String, PlanError),
}

impl State {
    /// The owner wants another device.
    pub(super) fn add_device(&mut self, spec: DeviceSpec, reply: Reply<()>) {
        let refused = |error| Err(MachineError::NotStarted(Box::new(error)));
        if self.machine == MachineState::Held {
            let why = "the machine is held".to_owned();
            let error = MachineError::Device { what: "adding", device: spec.name, why };
            return drop(reply.send(Err(error)));
        }
        let devices = self.devices.iter().map(|device| device.spec.name.as_str());
        let mut names = devices.chain(self.locals.iter().map(|local| local.name.as_str()));
        if let Err(error) = super::start::check_name(&spec.name, names.any(|n| n == spec.name)) {
            return drop(reply.send(refused(error)));
        }
        if let Err(error) = self.policies.check(&spec) {
            return drop(reply.send(refused(error)));
        }
        let path = self.custody().map(|custody| custody.directory().socket_path(&spec.name));
        if let Some(Err(error)) = path {
            return drop(reply.send(refused(ControlDirectoryError::from(error).into())));
        }
        self.place(spec, reply);
    }

    /// The owner wants a lost device back.
    pub(super) fn restart_device(&mut self, name: &str, reply: Reply<()>) {
        use super::supervision::Recovery;
        let Some(device) = self.devices.iter_mut().find(|device| device.spec.name == name) else {
            let device = name.to_owned();
            return drop(reply.send(Err(MachineError::NoDevice { device })));
        };
        let under_way = device.care.owner.is_some()
            || device.care.leaving.is_some()
            || device.care.join.is_some()
            || !matches!(
                device.care.recovery,
                Recovery::Undecided | Recovery::GivenUp | Recovery::Unproven | Recovery::Waiting(_)
            );
        let why = match (&device.spec.no_reconnect, &device.standing) {
            (Some(reason), _) => Some(reason.clone()),
            (None, Standing::Fenced(_)) if under_way => Some("it is under way already".to_owned()),
            (None, Standing::Fenced(_)) => match device.care.recovery {
                Recovery::Unproven => Some("nothing proves that it is gone".to_owned()),
                _ => None,
            },
            (None, Standing::Lost(..)) => Some("it is not proven gone yet".to_owned()),
            (None, _) => Some("it is not lost".to_owned()),
        };
        if let Some(why) = why {
            let device = name.to_owned();
            let error = MachineError::Device { what: "restarting", device, why };
            return drop(reply.send(Err(error)));
        }
        if let Recovery::Waiting(timer) = &device.care.recovery {
            timer.abort();
        }
        device.care.restarts.forgive();
        device.care.recovery = Recovery::Due;
        device.care.owner = Some(reply);
        self.unsettled = true;
    }

    /// A new incarnation said Hello. It is welcomed when its turn comes.
    pub(super) fn newcomer_greeted(
        &mut self,
        id: ParticipantId,
        hello: Hello,
        files: Vec<BackingFile>,
    ) {
        let Some(join) = self.device(id).and_then(|device| device.care.join.as_mut()) else {
            return;
        };
        let stage = Stage::Greeted(Box::new(hello), files);
        if let Stage::Greeting(deadline) = std::mem::replace(&mut join.stage, stage) {
            deadline.abort();
        }
        self.unsettled = true;
    }

    pub(super) fn join_expired(&mut self, id: ParticipantId) {
        let time = self.deadlines.hello;
        let stage = self.device(id).and_then(|device| device.care.join.as_ref());
        if matches!(stage, Some(Join { stage: Stage::Greeting(_), .. })) {
            self.join_failed(id, Failure::Greeting(GreetingError::Silent(time)));
        }
    }

    /// A new incarnation that was not welcomed will not come in.
    pub(super) fn join_failed(&mut self, id: ParticipantId, failure: Failure) {
        self.close(id);
        let waits = self.active.is_some();
        let Some(device) = self.device(id) else { return };
        let Some(join) = &mut device.care.join else { return };
        match std::mem::replace(&mut join.stage, Stage::Failed) {
            Stage::Greeting(deadline) => deadline.abort(),
            // It was made to wait, and would not. One that nobody made wait ended by itself, so
            // soon that its end was read together with its Hello.
            Stage::Greeted(..) => {
                let ended = matches!(
                    failure,
                    Failure::Greeting(GreetingError::Disconnected | GreetingError::Exited(_))
                );
                device.care.uncharged = waits && ended;
            }
            _ => {}
        }
        let (loss, text) = match &failure {
            Failure::Greeting(error) => {
                let loss = match error {
                    GreetingError::Silent(_) => Loss::Timeout,
                    GreetingError::Exited(_) => Loss::Exited,
                    GreetingError::Disconnected
                    | GreetingError::Lost(_)
                    | GreetingError::Joining(_) => Loss::Disconnected,
                    GreetingError::Version { .. } | GreetingError::Protocol(_) => Loss::Protocol,
                    GreetingError::Keep(_) => Loss::Refused,
                };
                (loss, format!("it {}", with_sources(error)))
            }
            Failure::Plan(_, error) => (Loss::Refused, format!("it does not fit in: {error}")),
            Failure::Untracked => {
                (Loss::Refused, "it cannot tell which pages of RAM it writes".to_owned())
            }
            Failure::Start(error) => (Loss::Exited, with_sources(&**error)),
        };
        device.care.failure = Some(failure);
        device.standing = Standing::Lost(loss, text.clone());
        self.fence_outside(id, loss, &text);
    }

    /// No transition is under way: the newcomer is welcomed and brought to STOP.
    pub(super) fn welcome_newcomer(&mut self, id: ParticipantId) {
        let whole = self.plan(Operation::Pause);
        let Some(device) = self.devices.get_mut(id) else { return };
        let Some(join) = &mut device.care.join else { return };
        let Stage::Greeted(hello, files) = std::mem::replace(&mut join.stage, Stage::Stopping)
        else {
            return;
        };
        device.state = hello.state;
        device.hello = Some(*hello.clone());
        let refused = self.tracking.as_ref().is_some_and(|tracking| {
            tracking.options.untracked == Untracked::Refuse && !hello.capabilities.dirty_tracking
        });
        if refused {
            return self.join_failed(id, Failure::Untracked);
        }
        let mut whole = whole;
        // With those that are on their way in, too: each would fit in alone.
        let joining = |device: &&Device| device.id == id || device.standing == Standing::Joining;
        let members = self.devices.iter().filter(joining).filter_map(|device| self.member(device));
        whole.members.extend(members);
        if let Err(error) = whole.check() {
            let name = self.in_the_way(&error);
            return self.join_failed(id, Failure::Plan(name, error));
        }
        if let Err(error) = self.welcome(id, &hello, files) {
            return self.join_failed(id, Failure::Greeting(error));
        }
        if let Some(device) = self.device(id) {
            device.standing = Standing::Joining;
        }
        if self.slips.is(Slip::CountsNewcomersAtOnce) {
            return self.counted(id);
        }
        // What it writes before it is in STOP has no marks.
        if let Some(tracking) = &self.tracking {
            tracking.add_device(id, &self.names.participant(id), hello.capabilities.dirty_tracking);
        }
        self.begin_internal(id, Operation::Pause, Purpose::Join(id));
    }

    /// A transition over the newcomer alone has ended.
    pub(super) fn newcomer_moved(
        &mut self,
        id: ParticipantId,
        operation: Operation,
        outcome: &Outcome,
        text: &str,
    ) {
        let Some(device) = self.device(id) else { return };
        if device.standing != Standing::Joining {
            // It was lost; its fence is what is waited for now.
            return;
        }
        match (outcome, operation) {
            (Outcome::Done, Operation::Pause) => self.declare_all(id),
            (Outcome::Done, _) => self.counted(id),
            (Outcome::Held { .. }, _) => self.lost(id, Loss::Timeout, text.to_owned()),
            _ => self.lost(id, Loss::Refused, text.to_owned()),
        }
    }

    /// Declares all RAM to a newcomer.
    fn declare_all(&mut self, id: ParticipantId) {
        let sequence = self.next_declaration();
        match self.declare_to(id, 0..self.ram.len(), sequence) {
            Ok(0) => self.newcomer_knows(id),
            Ok(answers) => {
                self.set_stage(id, Stage::Memory);
                let waiting = Waiting::from([(id, answers)]);
                self.await_memory(sequence, waiting, Declared::To(id));
            }
            Err(text) => self.lost(id, Loss::Disconnected, text),
        }
    }

    /// A newcomer knows all RAM.
    pub(super) fn newcomer_knows(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        if device.care.join.is_some() {
            self.set_stage(id, Stage::Stopped);
        }
        if let Some(tracking) = &self.tracking {
            tracking.relied_on(id);
        }
    }

    fn set_stage(&mut self, id: ParticipantId, stage: Stage) {
        if let Some(join) = self.device(id).and_then(|device| device.care.join.as_mut()) {
            join.stage = stage;
            self.unsettled = true;
        }
    }

    /// The newcomer goes where the machine is.
    pub(super) fn follow(&mut self, id: ParticipantId) {
        if self.machine == MachineState::Running {
            self.set_stage(id, Stage::Starting);
            self.begin_internal(id, Operation::Resume, Purpose::Join(id));
        } else {
            self.counted(id);
        }
    }

    /// The newcomer is where the machine is.
    fn counted(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        let Some(join) = device.care.join.take() else { return };
        device.standing = Standing::Ready;
        device.care.added = false;
        device.care.pulse.reset();
        let (name, incarnation) = (device.spec.name.clone(), device.incarnation);
        let (state, took, pid) = (device.state, clock::since(join.began), device.pid());
        if let Some(owner) = device.care.owner.take() {
            let _ = owner.send(Ok(()));
        }
        self.emit(MachineEvent::DeviceJoined { device: name, incarnation, pid, state, took });
        self.unsettled = true;
    }

    /// A newcomer did not come in, and nothing of it is left.
    pub(super) fn give_in(&mut self, id: ParticipantId) {
        use super::supervision::Recovery;
        let Some(device) = self.device(id) else { return };
        device.care.join = None;
        let failure = device.care.failure.take().unwrap_or_else(|| {
            let text = match &device.standing {
                Standing::Lost(_, text) | Standing::Fenced(text) => text.clone(),
                _ => String::new(),
            };
            Failure::Greeting(GreetingError::Joining(text))
        });
        // The same would come of another attempt.
        let unfit = matches!(failure, Failure::Plan(..) | Failure::Untracked);
        let error = match failure {
            Failure::Start(error) => *error,
            Failure::Greeting(error) => self.greeting_error(id, error),
            Failure::Plan(device, source) => StartError::Plan { device, source },
            Failure::Untracked => StartError::Untracked { device: self.names.participant(id) },
        };
        let why = with_sources(&error);
        let Some(device) = self.device(id) else { return };
        let name = device.spec.name.clone();
        let (added, owner) = (device.care.added, device.care.owner.take());
        device.care.recovery = if unfit { Recovery::GivenUp } else { Recovery::Undecided };
        self.emit(MachineEvent::DeviceNotRestarted { device: name, why });
        if added {
            self.take_out(id);
        }
        if let Some(owner) = owner {
            let _ = owner.send(Err(MachineError::NotStarted(Box::new(error))));
        }
        self.unsettled = true;
    }
}
