//! What an embedding VMM touches: describe a machine, start it, pause and resume it.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use standstill_coordinator::{DeviceSpec, MachineBuilder};
//!
//! let machine = MachineBuilder::new("vm0")
//!     .device(DeviceSpec::new("nic0", "/usr/bin/my-nic").arg("--socket").arg("/run/nic0.sock"))
//!     .start()
//!     .await?;
//! let stopped = machine.pause().await?;
//! println!("{}", stopped.report());
//! stopped.resume().await?;
//! machine.shutdown().await?;
//! # Ok(())
//! # }
//! ```

use crate::coordinator::{self, Request};
use crate::error::{MachineError, StartError};
use crate::participant::{Hook, LocalDevice};
use crate::process::{Exit, ProcessSpec};
use crate::report::TransitionReport;
use ractor::ActorRef;
use standstill_protocol::message::OrphanPolicy;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{
    MachineState, OnFailure, OnLoss, Operation, Outcome, Phases, Slot,
};
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, oneshot};

/// How long things may take. Every wait of a coordinator has one of these as its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// A device process's greeting, from its start.
    pub hello: Duration,
    /// The answers of a first phase.
    pub first_phase: Duration,
    /// The answers of a second phase.
    pub second_phase: Duration,
    /// A whole undo, and a whole hold.
    pub undo: Duration,
    /// The proof of a fence.
    pub fence: Duration,
    /// The answer to a memory declaration.
    pub memory: Duration,
}

impl Default for Deadlines {
    /// 10 s for a greeting, 5 s for a phase or memory declaration, 10 s for an undo, 2 s for a
    /// fence.
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(10),
            first_phase: Duration::from_secs(5),
            second_phase: Duration::from_secs(5),
            undo: Duration::from_secs(10),
            fence: Duration::from_secs(2),
            memory: Duration::from_secs(5),
        }
    }
}

/// One device process of a machine.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    pub(crate) name: String,
    pub(crate) process: ProcessSpec,
    pub(crate) one_phase_allowed: bool,
    pub(crate) on_loss: OnLoss,
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
            on_loss: OnLoss::Fail,
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

    /// Lets the device take part although it has no P2P states and is not alone. Its DMA can then
    /// reach a peer that is stopped already.
    #[must_use]
    pub fn allow_one_phase(mut self) -> Self {
        self.one_phase_allowed = true;
        self
    }

    /// The machine goes on without this device if it is lost.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.on_loss = OnLoss::ContinueWithout;
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
    pub(crate) heartbeat: Duration,
    pub(crate) phases: Phases,
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
            heartbeat: Duration::from_secs(1),
            phases: Phases::Two,
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

    /// Sets the interval of the devices' signs of life; zero for none. One second by default.
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = interval;
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
    /// To be called on a tokio runtime with I/O and time; the machine lives on it.
    ///
    /// # Errors
    ///
    /// [`StartError`] if the description does not fit or any device does not start; everything
    /// that was started is gone then.
    pub async fn start(self) -> Result<Machine, StartError> {
        coordinator::start(self).await
    }
}

/// A running machine of device processes. Clones are handles of the same machine.
///
/// When the last handle is dropped without [`shutdown`](Self::shutdown), its processes are killed.
#[derive(Clone, Debug)]
pub struct Machine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    actor: ActorRef<coordinator::Message>,
    /// Weak: the actor has the sender, so that readers learn when it ends.
    events: broadcast::WeakSender<MachineEvent>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The actor's state owns the processes and kills them when it is dropped.
        self.actor.kill();
    }
}

/// Something that happened to a machine.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MachineEvent {
    /// A transition ended.
    Transition(Arc<TransitionReport>),
    /// A device process is lost outside any transition and is being fenced.
    DeviceLost {
        /// Its name.
        device: String,
        /// Why, for a person.
        why: String,
    },
    /// The fence of a device is proven.
    DeviceFenced {
        /// Its name.
        device: String,
        /// How its process ended, for a person.
        proof: String,
    },
    /// A device process tells something.
    Device {
        /// Its name.
        device: String,
        /// What.
        event: standstill_protocol::message::DeviceEvent,
    },
}

/// Where a machine is.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Where it is as a whole.
    pub machine: MachineState,
    /// What is under way, if anything is.
    pub operation: Option<Operation>,
    /// Every device, in the order of the description.
    pub devices: Vec<DeviceStatus>,
}

/// Where one device is.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Process id; `None` for a local device.
    pub pid: Option<u32>,
    /// Kind and version of its program, such as `copy-engine 0.1.0`.
    pub kind: String,
    /// Where it last proved to be; `None` if it is lost.
    pub state: Option<MigrationState>,
    /// Why it is lost.
    pub lost: Option<String>,
    /// The progress of its data threads that its last sign of life told.
    pub progress: u64,
}

impl Machine {
    pub(crate) fn new(
        actor: ActorRef<coordinator::Message>,
        events: &broadcast::Sender<MachineEvent>,
    ) -> Self {
        Self { inner: Arc::new(Inner { actor, events: events.downgrade() }) }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, MachineError> {
        let (reply, answer) = oneshot::channel();
        self.inner
            .actor
            .cast(coordinator::Message::Request(request(reply)))
            .map_err(|_| MachineError::Gone)?;
        answer.await.map_err(|_| MachineError::Gone)
    }

    /// Stops every device, in two phases, and gives a guard for the stopped machine.
    ///
    /// # Errors
    ///
    /// [`MachineError::Transition`] with the whole report if the machine did not come to a
    /// standstill (it was rolled back, or is held); other variants if nothing was begun.
    pub async fn pause(&self) -> Result<Stopped, MachineError> {
        let report = self.ask(|reply| Request::Transition(Operation::Pause, reply)).await??;
        match (&report.outcome, report.machine) {
            (Outcome::Done | Outcome::Degraded { .. }, MachineState::Stopped) => {
                Ok(Stopped { machine: self.clone(), report, resumed: false })
            }
            _ => Err(MachineError::Transition(report)),
        }
    }

    /// Starts every device again, in two phases. For whoever has not kept the guard.
    ///
    /// # Errors
    ///
    /// [`MachineError::Transition`] with the whole report if the machine does not run now.
    pub async fn resume(&self) -> Result<Arc<TransitionReport>, MachineError> {
        let report = self.ask(|reply| Request::Transition(Operation::Resume, reply)).await??;
        match (&report.outcome, report.machine) {
            (Outcome::Done | Outcome::Degraded { .. }, MachineState::Running) => Ok(report),
            _ => Err(MachineError::Transition(report)),
        }
    }

    /// Where the machine and its devices are. Answered at once, also during a transition.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after a shutdown.
    pub async fn status(&self) -> Result<Status, MachineError> {
        self.ask(Request::Status).await
    }

    /// Declares the file behind `ram` to be guest RAM, to every device, and waits until it is in
    /// force everywhere. Whatever else a client maps into a device counts as a peer's memory.
    ///
    /// # Errors
    ///
    /// [`MachineError::Memory`] names a device that did not accept it.
    pub async fn declare_ram(&self, ram: impl AsFd) -> Result<(), MachineError> {
        let fd: OwnedFd =
            ram.as_fd().try_clone_to_owned().map_err(|source| MachineError::Fd { source })?;
        self.ask(|reply| Request::DeclareRam(fd, reply)).await?
    }

    /// Gives the transition up that is under way, if one is: it is undone.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after a shutdown.
    pub async fn cancel(&self) -> Result<(), MachineError> {
        self.ask(Request::Cancel).await
    }

    /// The owner's decision about a machine that is held: what is not proven is taken as it is,
    /// and the machine counts as stopped.
    ///
    /// # Errors
    ///
    /// [`MachineError::NotHeld`] if it is not.
    pub async fn accept_hold(&self) -> Result<(), MachineError> {
        self.ask(Request::AcceptHold).await?
    }

    /// What happens from now on. A reader that falls more than 1024 events behind loses the
    /// oldest and is told how many. The stream ends with the machine.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MachineEvent> {
        // Of a machine that is gone there is nothing to hear.
        let events = self.inner.events.upgrade();
        events.map_or_else(|| broadcast::channel(1).1, |events| events.subscribe())
    }

    /// Ends every device process: asks it to, and kills it after the grace. Returns how each
    /// ended, by name.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after another shutdown.
    pub async fn shutdown(&self) -> Result<Vec<(String, Option<Exit>)>, MachineError> {
        self.ask(|reply| Request::Shutdown(Duration::from_secs(2), reply)).await
    }
}

/// A machine that stands still.
///
/// Dropped without [`resume`](Self::resume), the machine stays stopped: nothing may start by
/// accident. [`Machine::resume`] starts it then.
#[must_use = "the machine stays stopped until it is resumed"]
#[derive(Debug)]
pub struct Stopped {
    machine: Machine,
    report: Arc<TransitionReport>,
    resumed: bool,
}

impl Stopped {
    /// What happened while it stopped.
    #[must_use]
    pub fn report(&self) -> &Arc<TransitionReport> {
        &self.report
    }

    /// Starts it again.
    ///
    /// # Errors
    ///
    /// As [`Machine::resume`].
    pub async fn resume(mut self) -> Result<Arc<TransitionReport>, MachineError> {
        self.resumed = true;
        self.machine.resume().await
    }

    /// Leaves it stopped, on purpose.
    pub fn leave_stopped(mut self) {
        self.resumed = true;
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.resumed {
            tracing::warn!("a stopped machine was not resumed; it stays stopped");
        }
    }
}
