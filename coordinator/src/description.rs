//! Describes a machine: its device processes, local devices and hooks, and how long things may take.

use crate::coordinator;
use crate::error::{StartError, TakeOverError};
use crate::events::{Events, MachineEvent};
use crate::machine::{Machine, TakenOver};
use crate::participant::{Hook, LocalDevice};
use crate::policy::{LossPolicy, Presence};
use crate::process::ProcessSpec;
use standstill_protocol::message::OrphanPolicy;
use standstill_protocol::transition::{OnFailure, Phases, Slot};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::broadcast;

/// How many events a slow reader may be behind.
const EVENTS: usize = 1024;
/// The shortest interval of signs of life: a fifth of what a device may say unasked.
const LEAST_HEARTBEAT: Duration = Duration::from_millis(5);

/// How long things may take. Every wait of a coordinator has one of these as its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// A device process's greeting, from its start.
    pub hello: Duration,
    /// The answers of a first phase.
    pub first_phase: Duration,
    /// The answers of a second phase.
    pub second_phase: Duration,
    /// A whole undo, and a whole hold. It does its work only if it is large enough for what an undo
    /// waits for: twice each phase, twice the hooks, and the fences. What it cuts off is *Held*.
    pub undo: Duration,
    /// The proof of a fence.
    pub fence: Duration,
    /// The answer to a memory declaration or a revocation. For a revocation a device has no longer
    /// than for a first phase.
    pub memory: Duration,
    /// How long a running device's progress may stand still while it says that it has something to
    /// do; longer is a hang. Zero: for ever.
    pub stall: Duration,
    /// How long a device may give no sign of life; longer is a hang. Two intervals of
    /// [`MachineBuilder::heartbeat`] at least. Zero: for ever.
    pub silence: Duration,
}

impl Default for Deadlines {
    /// 10 s for a greeting, 5 s for a phase or memory declaration, 25 s for an undo, 2 s for a
    /// fence; a hang is 10 s without progress or 5 s without a sign of life.
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(10),
            first_phase: Duration::from_secs(5),
            second_phase: Duration::from_secs(5),
            undo: Duration::from_secs(25),
            fence: Duration::from_secs(2),
            memory: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            silence: Duration::from_secs(5),
        }
    }
}

/// One device process of a machine.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    pub(crate) name: String,
    pub(crate) process: ProcessSpec,
    pub(crate) one_phase_allowed: bool,
    pub(crate) on_loss: Option<LossPolicy>,
    pub(crate) presence: Option<Presence>,
    pub(crate) no_reconnect: Option<String>,
    pub(crate) first_phase: Option<Duration>,
    pub(crate) second_phase: Option<Duration>,
}

impl DeviceSpec {
    /// A device process: its name in the machine (unique, at most 64 bytes) and its program.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            process: ProcessSpec::new(program),
            one_phase_allowed: false,
            on_loss: None,
            presence: None,
            no_reconnect: None,
            first_phase: None,
            second_phase: None,
        }
    }

    /// Adds an argument of the program.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.process = self.process.arg(arg);
        self
    }

    /// Adds arguments of the program.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.process = self.process.args(args);
        self
    }

    /// Sets an environment variable of the program.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.process = self.process.env(name, value);
        self
    }

    /// Does not let the program inherit an environment variable of this one.
    #[must_use]
    pub fn env_remove(mut self, name: impl Into<OsString>) -> Self {
        self.process = self.process.env_remove(name);
        self
    }

    /// Its program, with arguments and environment.
    #[must_use]
    pub fn process(&self) -> &ProcessSpec {
        &self.process
    }

    /// The same device by another program: such as one that sets a limit, or stands between the
    /// coordinator and the device, and starts the [program](Self::process) that was here before.
    ///
    /// What it starts must end with it: the process that the coordinator knows is the one that it
    /// fences.
    #[must_use]
    pub fn launched_by(mut self, launcher: impl FnOnce(ProcessSpec) -> ProcessSpec) -> Self {
        self.process = launcher(self.process);
        self
    }

    /// The name of the device in its machine.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Lets the device take part although it has no P2P states and is not alone. Its DMA can then
    /// reach a peer that is stopped already.
    #[must_use]
    pub fn allow_one_phase(mut self) -> Self {
        self.one_phase_allowed = true;
        self
    }

    /// The machine may run without this device, and goes on without it if it is lost, unless
    /// [`on_loss`](Self::on_loss) says otherwise.
    #[must_use]
    pub fn optional(self) -> Self {
        self.presence(Presence::Optional)
    }

    /// Whether the machine may run without this device; [`MachineBuilder::presence`] by default.
    #[must_use]
    pub fn presence(mut self, presence: Presence) -> Self {
        self.presence = Some(presence);
        self
    }

    /// What is done when this device is lost; [`MachineBuilder::on_loss`] by default.
    #[must_use]
    pub fn on_loss(mut self, policy: LossPolicy) -> Self {
        self.on_loss = Some(policy);
        self
    }

    /// The client of this device (whoever is at the other end of its data socket) does not come
    /// back to a new process, for this reason: [`LossPolicy::Restart`] is refused. See
    /// [`QEMU_VFIO_USER`](crate::QEMU_VFIO_USER).
    #[must_use]
    pub fn client_cannot_reconnect(mut self, reason: impl Into<String>) -> Self {
        self.no_reconnect = Some(reason.into());
        self
    }

    /// Deadlines of this device instead of the machine's.
    #[must_use]
    pub fn deadlines(mut self, first_phase: Duration, second_phase: Duration) -> Self {
        self.first_phase = Some(first_phase);
        self.second_phase = Some(second_phase);
        self
    }
}

/// Where and when a hook runs.
#[derive(Clone, Debug)]
pub struct HookSpec {
    pub(crate) name: String,
    pub(crate) stop: Slot,
    pub(crate) start: Slot,
    pub(crate) stop_rank: i32,
    pub(crate) start_rank: i32,
    pub(crate) deadline: Duration,
}

impl HookSpec {
    /// A hook that runs in that slot of a stop and in the mirrored slot of a start; rank 0,
    /// deadline 5 s.
    pub fn new(name: impl Into<String>, stop: Slot) -> Self {
        Self {
            name: name.into(),
            stop,
            start: stop.mirrored(),
            stop_rank: 0,
            start_rank: 0,
            deadline: Duration::from_secs(5),
        }
    }

    /// Another slot of a start than the mirrored one.
    #[must_use]
    pub fn start_slot(mut self, start: Slot) -> Self {
        self.start = start;
        self
    }

    /// Order within the slot: ascending on stop, descending on start. Equal ranks run at the same
    /// time.
    #[must_use]
    pub fn rank(mut self, rank: i32) -> Self {
        self.stop_rank = rank;
        self.start_rank = rank.saturating_neg();
        self
    }

    /// Another order on start than the reversed one: ascending.
    #[must_use]
    pub fn start_rank(mut self, rank: i32) -> Self {
        self.start_rank = rank;
        self
    }

    /// How long one call may take.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

/// Describes a machine and starts it.
pub struct MachineBuilder {
    pub(crate) name: String,
    pub(crate) devices: Vec<DeviceSpec>,
    pub(crate) locals: Vec<(String, Box<dyn LocalDevice>)>,
    pub(crate) hooks: Vec<(HookSpec, Box<dyn Hook>)>,
    pub(crate) deadlines: Deadlines,
    pub(crate) on_failure: OnFailure,
    pub(crate) orphan: OrphanPolicy,
    pub(crate) control_directory: Option<PathBuf>,
    pub(crate) heartbeat: Duration,
    pub(crate) phases: Phases,
    pub(crate) on_loss: Option<LossPolicy>,
    pub(crate) presence: Presence,
    pub(crate) events: broadcast::Sender<MachineEvent>,
}

impl std::fmt::Debug for MachineBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineBuilder")
            .field("name", &self.name)
            .field("devices", &self.devices)
            .field("locals", &self.locals.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .field("hooks", &self.hooks.iter().map(|(spec, _)| spec).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl MachineBuilder {
    /// An empty machine of that name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            devices: Vec::new(),
            locals: Vec::new(),
            hooks: Vec::new(),
            deadlines: Deadlines::default(),
            on_failure: OnFailure::Rollback,
            orphan: OrphanPolicy::Exit,
            control_directory: None,
            heartbeat: Duration::from_secs(1),
            phases: Phases::Two,
            on_loss: None,
            presence: Presence::Required,
            events: broadcast::channel(EVENTS).0,
        }
    }

    /// Adds a device process.
    #[must_use]
    pub fn device(mut self, spec: DeviceSpec) -> Self {
        self.devices.push(spec);
        self
    }

    /// Adds device processes.
    #[must_use]
    pub fn devices(mut self, specs: impl IntoIterator<Item = DeviceSpec>) -> Self {
        self.devices.extend(specs);
        self
    }

    /// Adds a device that lives in the VMM, under a name that is unique among all devices.
    #[must_use]
    pub fn local_device(mut self, name: impl Into<String>, device: impl LocalDevice) -> Self {
        self.locals.push((name.into(), Box::new(device)));
        self
    }

    /// Adds a hook.
    #[must_use]
    pub fn hook(mut self, spec: HookSpec, hook: impl Hook) -> Self {
        self.hooks.push((spec, Box::new(hook)));
        self
    }

    /// Sets the deadlines.
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// Sets what happens to the survivors of a transition that fails; going back is the default.
    #[must_use]
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = on_failure;
        self
    }

    /// The device processes outlive their coordinator: when it dies, or this machine is dropped
    /// without [`Machine::shutdown`], each stays in exactly the state that it has reached and waits
    /// to be [taken over](Self::take_over). Without this they end with it.
    ///
    /// In `directory` is what a later coordinator needs: a socket for each device process, and a
    /// record. It is made, for this user alone, if it is not there; it belongs on a local file
    /// system in memory, such as below `/run`. One directory is for one machine. See
    /// `docs/take-over.md`.
    #[must_use]
    pub fn keep(mut self, directory: impl Into<PathBuf>) -> Self {
        self.orphan = OrphanPolicy::Keep;
        self.control_directory = Some(directory.into());
        self
    }

    /// Sets what is done when a device is lost that says nothing of its own:
    /// [`LossPolicy::Fail`] by default, [`LossPolicy::ContinueWithout`] for optional devices.
    #[must_use]
    pub fn on_loss(mut self, policy: LossPolicy) -> Self {
        self.on_loss = Some(policy);
        self
    }

    /// Sets whether the machine may run without a device that says nothing of its own;
    /// [`Presence::Required`] by default.
    #[must_use]
    pub fn presence(mut self, presence: Presence) -> Self {
        self.presence = presence;
        self
    }

    /// What will happen, from the beginning of the start on. As
    /// [`Machine::events`](crate::Machine::events).
    #[must_use]
    pub fn events(&self) -> Events {
        Events::of(self.events.subscribe())
    }

    /// Sets the interval of the devices' signs of life, 5 ms at least; zero for none. One second by
    /// default.
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        // More often, an honest device would look like one that floods.
        let least = if interval.is_zero() { interval } else { LEAST_HEARTBEAT };
        self.heartbeat = interval.max(least);
        self
    }

    /// Leaves the first phase of every stop out. **Unsafe for peers**: for showing what the first
    /// phase is for, and that an oracle notices when it is missing.
    #[must_use]
    pub fn without_first_phase(mut self) -> Self {
        self.phases = Phases::SecondOnly;
        self
    }

    /// Starts all device processes and waits until each has greeted. Devices begin RUNNING.
    ///
    /// An optional device that does not start or greet is lost, and its policy decides; every
    /// other one fails the start.
    ///
    /// To be called on a tokio runtime with I/O and time; the machine lives on it.
    ///
    /// # Errors
    ///
    /// [`StartError`] if the description does not fit or any device does not start; everything
    /// that was started is gone then.
    pub async fn start(self) -> Result<Machine, StartError> {
        coordinator::start(self).await
    }

    /// Takes over the machine that an earlier coordinator has left in the
    /// [control directory](Self::keep), dead or alive. The description is the same as at its start:
    /// the same names of device processes; hooks and local devices are this program's own. No
    /// process is started.
    ///
    /// Nothing is started that had stopped, either. If no device had reached STOP or was on the way
    /// there, all go on running; if any had, all are brought to STOP and the outcome is *Held*: the
    /// machine may run elsewhere by now, and only its owner can know
    /// ([`Machine::accept_hold`], then [`Machine::resume`]). Devices that cannot be reached are
    /// fenced.
    ///
    /// To be called on a tokio runtime with I/O and time; the machine lives on it.
    ///
    /// # Errors
    ///
    /// [`TakeOverError`] if nothing was taken over; every device is as it was then, but an earlier
    /// coordinator may have lost the right to the machine.
    pub async fn take_over(self) -> Result<TakenOver, TakeOverError> {
        coordinator::take_over(self).await
    }
}
