//! What the coordinator actor knows about its machine.

use super::incarnation::{Process, Starter};
use super::keep::Kept;
use super::lease::Lease;
use super::roster::{Ids, Roster};
use super::slips::Slips;
use super::supervision::Care;
use super::{Exits, Message, Owner, Reply, Request};
use crate::clock;
use crate::description::{Deadlines, DeviceSpec};
use crate::device::Message as DeviceMessage;
use crate::dirty::{DirtyTracking, Registry};
use crate::error::{GreetingError, StartError};
use crate::events::{self, MachineEvent};
use crate::logs::LogTail;
use crate::machine::Machine;
use crate::mailbox::{Alarm, Mailbox};
use crate::participant::LocalThread;
use crate::policy::Policies;
use crate::poll::Poll;
use crate::process::Exit;
use crate::recorder::Recorder;
use crate::report::Names;
use crate::spans::Spans;
use crate::status::{DeviceStanding, DeviceStatus, DroppedLogs, Status};
use crate::watchdog::{Limits, Ticks};
use ractor::ActorId;
use standstill_protocol::channel::CoordinatorEnd;
use standstill_protocol::message::{
    Command, Epoch, FileIdentity, Hello, OrphanPolicy, PeerDma, Phase, Term,
};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_protocol::transition::{
    HeldReason, Hook, HookMoment, Loss, MachineState, OnFailure, Operation, ParticipantId, Phases,
    Timer, Transition,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, oneshot};
use uuid::Uuid;

/// The machine, as the coordinator actor knows it.
pub(crate) struct State {
    pub(super) myself: Mailbox,
    pub(super) name: String,
    pub(super) uuid: Uuid,
    pub(super) term: Term,
    pub(super) epoch: Epoch,
    pub(super) machine: MachineState,
    /// Why the machine is held: what is still to be proven.
    pub(super) held: Vec<HeldReason>,
    pub(super) deadlines: Deadlines,
    pub(super) on_failure: OnFailure,
    pub(super) orphan: OrphanPolicy,
    /// If the device processes outlive this coordinator.
    pub(super) kept: Option<Kept>,
    /// Another coordinator has the machine, with that term.
    pub(super) superseded: Option<Term>,
    pub(super) heartbeat_ns: u64,
    pub(super) phases: Phases,
    pub(super) poll: Poll,
    /// Starts the processes of later incarnations.
    pub(super) starter: Starter,
    pub(super) devices: Roster,
    /// By participant number.
    pub(super) locals: Vec<Local>,
    pub(super) ids: Ids,
    pub(super) policies: Policies,
    /// Something may have to be done that no message is for: see [`State::settle`].
    pub(super) unsettled: bool,
    /// Requests that wait for the end of what is under way.
    pub(super) queue: VecDeque<Request>,
    /// How many processes are being started, or are being ended because nobody wants them.
    pub(super) spawning: usize,
    pub(super) limits: Limits,
    /// `None` if there is nothing to look for.
    pub(super) ticks: Option<Ticks>,
    /// All RAM that was declared.
    pub(super) ram: Vec<(FileIdentity, OwnedFd)>,
    /// While the devices mark what they write to it.
    pub(super) tracking: Option<Arc<Registry>>,
    pub(super) hooks: Vec<HookEntry>,
    pub(super) names: Names,
    pub(super) active: Option<Active>,
    pub(super) transitions: u64,
    pub(super) starting: Option<Starting>,
    pub(super) ending: Option<Ending>,
    /// Everything has ended; nothing is begun any more.
    pub(super) over: bool,
    pub(super) declarations: BTreeMap<u64, Declaration>,
    pub(super) next_declaration: u64,
    pub(super) events: broadcast::Sender<MachineEvent>,
    pub(super) paused_at: Option<Instant>,
    pub(super) slips: Slips,
}

/// One device, with its present process.
pub(super) struct Device {
    /// Of this incarnation.
    pub(super) id: ParticipantId,
    pub(super) spec: DeviceSpec,
    /// How often it was started.
    pub(super) incarnation: u64,
    /// `None` if it could not be started.
    pub(super) process: Option<Process>,
    /// `None` once it was read to its end.
    pub(super) channel: Option<CoordinatorEnd>,
    pub(super) tail: LogTail,
    pub(super) standing: Standing,
    pub(super) hello: Option<Hello>,
    pub(super) state: MigrationState,
    /// What it was told last.
    pub(super) told: Option<(Epoch, Phase)>,
    /// Of the stop that it was told last.
    pub(super) lease: Option<Lease>,
    pub(super) progress: u64,
    /// Log lines that its process says it has dropped.
    pub(super) dropped_logs: u64,
    pub(super) exit: Option<Exit>,
    pub(super) gone: bool,
    pub(super) allowance: Allowance,
    pub(super) tellings: Tellings,
    pub(super) care: Care,
}

impl Device {
    /// A device whose process could not be started, or is still to be.
    pub(super) fn without_process(id: ParticipantId, spec: DeviceSpec, why: String) -> Self {
        Self {
            id,
            spec,
            incarnation: 0,
            process: None,
            channel: None,
            tail: LogTail::default(),
            standing: Standing::Fenced(why),
            hello: None,
            state: MigrationState::Running,
            told: None,
            lease: None,
            progress: 0,
            dropped_logs: 0,
            exit: None,
            gone: true,
            allowance: Allowance::new(),
            tellings: Tellings::new(),
            care: Care::default(),
        }
    }

    /// Tells the actor of the process something. One that is gone has killed its process.
    pub(super) fn tell(&self, message: DeviceMessage) {
        if let Some(process) = &self.process {
            process.tell(message);
        }
    }

    /// Whether it can mark the pages that it writes.
    pub(super) fn tracks(&self) -> bool {
        self.hello.as_ref().is_some_and(|hello| hello.capabilities.dirty_tracking)
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }
}

/// Whether a device process counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It has not said Hello yet.
    Greeting,
    /// It was welcomed, and is being brought to the machine's state.
    Joining,
    /// It counts.
    Ready,
    /// It does not, for that reason; its end is not proven yet.
    Lost(Loss, String),
    /// It does not, and nothing of it is left.
    Fenced(String),
    /// It is in STOP, and its process is to end.
    Leaving,
}

/// How much a device process may say that nobody has asked for: a number of messages a second.
#[derive(Debug)]
pub(super) struct Allowance {
    left: u32,
    since: Instant,
}

impl Allowance {
    /// Unasked messages a second.
    pub(super) const LIMIT: u32 = 1000;

    pub(super) fn new() -> Self {
        Self { left: Self::LIMIT, since: clock::now() }
    }

    /// Something was asked: its answer is welcome.
    pub(super) fn asked(&mut self) {
        self.left = self.left.saturating_add(1);
    }

    /// A message came; false if it is one too many.
    pub(super) fn came(&mut self) -> bool {
        if self.left == 0 {
            if clock::since(self.since).as_secs() == 0 {
                return false;
            }
            *self = Self::new();
        }
        self.left -= 1;
        true
    }
}

/// How much of what a device process tells of itself becomes an event of the machine: so much at
/// once, and one more each second. Whoever reads events slowly keeps them meanwhile, and no device
/// must fill that place with its own.
#[derive(Debug)]
pub(super) struct Tellings {
    left: u32,
    since: Instant,
    left_out: u64,
}

impl Tellings {
    /// As many events at once.
    pub(super) const AT_ONCE: u32 = 32;

    pub(super) fn new() -> Self {
        Self { left: Self::AT_ONCE, since: clock::now(), left_out: 0 }
    }

    /// Something is told. If it is to be an event: how many before it were left out.
    pub(super) fn tell(&mut self) -> Option<u64> {
        let seconds = clock::since(self.since).as_secs();
        self.since += Duration::from_secs(seconds);
        let more = u32::try_from(seconds).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(Self::AT_ONCE);
        let Some(left) = self.left.checked_sub(1) else {
            self.left_out += 1;
            return None;
        };
        self.left = left;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// One device inside the VMM.
pub(super) struct Local {
    pub(super) id: ParticipantId,
    pub(super) name: String,
    pub(super) flags: MigrationFlags,
    pub(super) peer_dma: PeerDma,
    pub(super) state: MigrationState,
    /// It hangs, and the owner has taken that as it is: it is left out until it has answered and was
    /// brought where the machine is.
    pub(super) hung: bool,
    /// It is left out, and has answered to something from before.
    pub(super) returned: bool,
    pub(super) thread: LocalThread<Command>,
}

/// One hook.
pub(super) struct HookEntry {
    pub(super) hook: Hook,
    pub(super) hung: bool,
    pub(super) thread: LocalThread<HookMoment>,
}

/// The transition that is under way.
pub(super) struct Active {
    pub(super) number: u64,
    pub(super) operation: Operation,
    pub(super) transition: Transition,
    pub(super) recorder: Recorder,
    pub(super) spans: Spans,
    pub(super) timers: Timers,
    pub(super) purpose: Purpose,
}

/// Who wants a transition.
pub(super) enum Purpose {
    /// The owner.
    Owner(Owner),
    /// Nobody but this device, which joins.
    Join(ParticipantId),
    /// Nobody but this device, which leaves.
    Leave(ParticipantId),
}

impl Purpose {
    pub(super) fn is_internal(&self) -> bool {
        self.device().is_some()
    }

    /// The device that alone takes part; `None` if it is the whole machine.
    pub(super) fn device(&self) -> Option<ParticipantId> {
        match self {
            Self::Owner(_) => None,
            Self::Join(id) | Self::Leave(id) => Some(*id),
        }
    }
}

/// Deadlines that run; they are forgotten with the transition.
#[derive(Debug, Default)]
pub(super) struct Timers(Vec<(Timer, Alarm)>);

impl Timers {
    pub(super) fn arm(&mut self, timer: Timer, handle: Alarm) {
        self.0.push((timer, handle));
    }

    pub(super) fn disarm(&mut self, timer: Timer) {
        self.0.retain(|(armed, handle)| {
            if *armed == timer {
                handle.abort();
            }
            *armed != timer
        });
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.0.iter().for_each(|(_, handle)| handle.abort());
    }
}

/// The greeting of a new machine.
pub(super) struct Starting {
    pub(super) reply: oneshot::Sender<Result<Machine, StartError>>,
    /// For the Hello of everybody, and then for `settling`.
    pub(super) deadline: Alarm,
    /// Who has been welcomed and has not shown yet that it can outlive this coordinator; `None`
    /// while some have still to be welcomed.
    pub(super) settling: Option<BTreeSet<ParticipantId>>,
}

/// The end of a machine.
pub(super) struct Ending {
    pub(super) reply: EndingReply,
    pub(super) deadline: Alarm,
}

/// Who waits for the end.
pub(super) enum EndingReply {
    /// Whoever asked for it.
    Owner(Reply<Exits>),
    /// Whoever tried to start a machine of which one device did not start.
    Starter(oneshot::Sender<Result<Machine, StartError>>, ParticipantId, GreetingError),
    /// Whoever tried to start a machine that is not possible as a whole.
    Planner(oneshot::Sender<Result<Machine, StartError>>, StartError),
}

/// Who still has to answer a declaration, and how often.
pub(super) type Waiting = BTreeMap<ParticipantId, usize>;

/// A declaration about memory that is not in force everywhere yet.
pub(super) struct Declaration {
    pub(super) waiting: Waiting,
    pub(super) purpose: Declared,
    /// One for each budget that somebody has.
    pub(super) deadlines: Alarms,
    /// Somebody has accepted it.
    pub(super) accepted: bool,
}

/// Deadlines that are forgotten together.
#[derive(Debug)]
pub(super) struct Alarms(pub(super) Vec<Alarm>);

impl Drop for Alarms {
    fn drop(&mut self) {
        self.0.iter().for_each(Alarm::abort);
    }
}

/// What about memory is declared.
pub(super) enum Declared {
    /// RAM, by the owner.
    By {
        /// Where the owner waits.
        reply: Reply<()>,
        /// The file, if it was not declared before.
        new: Option<FileIdentity>,
    },
    /// RAM, to this newcomer.
    To(ParticipantId),
    /// RAM, again, with bitmaps to mark in what is written to it.
    Tracking(Arc<Registry>, Reply<DirtyTracking>),
    /// That what this device had is gone.
    Gone(ParticipantId),
}

impl State {
    /// The device of that incarnation; `None` for an earlier one, which nobody listens to.
    pub(super) fn device(&mut self, id: ParticipantId) -> Option<&mut Device> {
        self.devices.get_mut(id)
    }

    pub(super) fn local(&mut self, id: ParticipantId) -> Option<&mut Local> {
        let at = self.locals.binary_search_by_key(&id, |local| local.id).ok()?;
        self.locals.get_mut(at)
    }

    pub(super) fn device_of_actor(&self, actor: ActorId) -> Option<&str> {
        let is_of = |process: &Process| process.is_of(actor);
        let mut devices = self.devices.iter();
        let device = devices.find(|device| device.process.as_ref().is_some_and(is_of))?;
        Some(&device.spec.name)
    }

    /// Casts a message to this actor after a time.
    pub(super) fn after(
        &self,
        time: Duration,
        message: impl FnOnce() -> Message + Send + 'static,
    ) -> Alarm {
        self.myself.cast_after(time, message)
    }

    /// Tells the log and whoever listens.
    pub(super) fn emit(&self, event: MachineEvent) {
        {
            let _inside = self.active.as_ref().map(|active| active.spans.present().entered());
            events::log(&event, self.term, self.present_epoch());
        }
        // Nobody may be listening.
        let _ = self.events.send(event);
    }

    /// The epoch of what is under way, or the last one.
    fn present_epoch(&self) -> Epoch {
        self.active.as_ref().map_or(self.epoch, |active| active.transition.epoch())
    }

    pub(super) fn status(&self) -> Status {
        let devices = self.devices.iter().map(|device| {
            let (standing, lost) = match &device.standing {
                Standing::Ready => (DeviceStanding::Ready, None),
                Standing::Greeting => (DeviceStanding::Starting, None),
                Standing::Joining => (DeviceStanding::Joining, None),
                Standing::Leaving => (DeviceStanding::Leaving, None),
                Standing::Lost(_, why) => (DeviceStanding::Lost, Some(why.clone())),
                Standing::Fenced(why) => {
                    let restarts = device.care.recovery.is_under_way();
                    let fenced = DeviceStanding::Fenced;
                    let standing = if restarts { DeviceStanding::Restarting } else { fenced };
                    (standing, Some(why.clone()))
                }
            };
            let standing =
                if device.care.leaving.is_some() { DeviceStanding::Leaving } else { standing };
            let state = (device.standing == Standing::Ready).then_some(device.state);
            let kind = device.hello.as_ref().map_or_else(String::new, |hello| {
                format!("{} {}", hello.kind, hello.program_version)
            });
            let name = device.spec.name.clone();
            DeviceStatus {
                name,
                pid: device.pid(),
                incarnation: device.incarnation,
                standing,
                kind,
                state,
                lost,
                progress: device.progress,
                dropped_logs: DroppedLogs {
                    by_device: device.dropped_logs,
                    by_coordinator: device.tail.dropped(),
                },
            }
        });
        let locals = self.locals.iter().map(|local| DeviceStatus {
            name: local.name.clone(),
            pid: None,
            incarnation: 0,
            standing: if local.hung { DeviceStanding::Lost } else { DeviceStanding::Ready },
            kind: "local".to_owned(),
            state: (!local.hung).then_some(local.state),
            lost: local.hung.then(|| "it hangs, taken as it is by the owner".to_owned()),
            progress: 0,
            dropped_logs: DroppedLogs::default(),
        });
        Status {
            name: self.name.clone(),
            machine: self.present(),
            stands: self.stands(),
            operation: self.active.as_ref().map(|active| active.operation),
            held: self.held.iter().map(|&reason| self.names.held(reason)).collect(),
            devices: devices.chain(locals).collect(),
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.tracking.iter().for_each(|tracking| tracking.end());
        for device in self.devices.iter_mut().filter(|d| d.standing == Standing::Greeting) {
            device.channel.take().into_iter().for_each(|channel| self.poll.close_apart(channel));
        }
        let spares = self.kept.as_ref().is_some_and(|kept| kept.custody.spares());
        // A newcomer that was not welcomed could not be found by anybody.
        let ends = |device: &&Device| {
            !spares || device.care.join.is_some() && device.standing == Standing::Greeting
        };
        // All are killed before the first is waited for, which their actors' ends do.
        let alive = self.devices.iter().filter(|device| device.exit.is_none());
        for device in alive.filter(ends) {
            device.process.iter().for_each(Process::kill);
        }
    }
}
