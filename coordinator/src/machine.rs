//! The handle of a machine, for an embedding VMM: pause it, resume it, watch it, end it.
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

use crate::coordinator::{self, Gap, Owner, Request, Step, Ticket};
use crate::description::DeviceSpec;
use crate::dirty::{DirtyOptions, DirtyTracking};
use crate::error::MachineError;
use crate::events::{Events, MachineEvent};
use crate::mailbox::Mailbox;
use crate::process::Exit;
use crate::report::TransitionReport;
use crate::status::Status;
use crate::steps::{PreparingStart, PreparingStop, Steps};
use standstill_protocol::transition::{MachineState, Operation, Outcome};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, oneshot};

/// How long the devices may take to end by themselves.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// A running machine of device processes. Clones are handles of the same machine.
///
/// When the last handle is dropped without [`shutdown`](Self::shutdown), its processes are killed;
/// those of a machine that [keeps](crate::MachineBuilder::keep) them live on.
#[derive(Clone, Debug)]
pub struct Machine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    actor: Mailbox,
    /// Weak: the actor has the sender, so that readers learn when it ends.
    events: broadcast::WeakSender<MachineEvent>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The actor's state owns the processes and kills them when it is dropped.
        self.actor.kill();
    }
}

/// A machine that was taken over, and what was found and done.
#[derive(Debug)]
#[must_use = "a machine that is dropped has no coordinator again"]
pub struct TakenOver {
    /// The machine.
    pub machine: Machine,
    /// How the take-over ended: *Done* (nothing was under way), *rolled back* (to RUNNING),
    /// *Degraded* (devices were lost and fenced, the others run), or *Held* (all that can be is in
    /// STOP, and only the owner resumes).
    pub report: Arc<TransitionReport>,
}

impl Machine {
    pub(crate) fn new(actor: Mailbox, events: &broadcast::Sender<MachineEvent>) -> Self {
        Self { inner: Arc::new(Inner { actor, events: events.downgrade() }) }
    }

    /// The first thing that is asked of a machine that is taken over.
    pub(crate) async fn finish_take_over(&self) -> Result<Arc<TransitionReport>, MachineError> {
        self.transition(Operation::TakeOver).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, MachineError> {
        let (reply, answer) = oneshot::channel();
        self.cast(coordinator::Message::Request(request(reply)))?;
        answer.await.map_err(|_| MachineError::Gone)
    }

    /// Stops every device, in two phases, and gives a guard for the stopped machine.
    ///
    /// # Errors
    ///
    /// [`MachineError::Transition`] with the whole report if the machine did not come to a
    /// standstill (it was rolled back, or is held); other variants if nothing was begun. A machine
    /// that stands still is no error, whatever went wrong on the way: look at
    /// [`Stopped::report`] for *Stopped* (by [`OnFailure::StayStopped`](crate::OnFailure)) and
    /// *Degraded*.
    pub async fn pause(&self) -> Result<Stopped, MachineError> {
        self.stopped(self.transition(Operation::Pause).await?)
    }

    /// As [`pause`](Self::pause), for a VM whose processors run on meanwhile: a lease protects it. A
    /// device that stands still leaves its data socket unread, and a VMM waits for the answer to a
    /// guest's access only so long (QEMU 5 s) before it takes the device for broken. A device process
    /// that is told nothing more for `lease` after it has stopped goes to `RUNNING_P2P` by itself,
    /// where it serves its client again and starts no peer-to-peer DMA, and tells so
    /// ([`DeviceEvent::LeaseExpired`]). The start brings it to RUNNING with all others, another pause
    /// to STOP again.
    ///
    /// From then on the machine is not stopped any more, and its status says so
    /// ([`MachineState::LeaseExpired`]). What is read of it (its memory, the state of its devices) is of
    /// one moment only if the guard [stands](Stopped::stands) when all was read. A lease that runs out
    /// before the last device has stopped is a failure of this pause, and nobody's loss.
    ///
    /// Zero is no lease. A hold, and an undo that leaves the machine stopped, have none either.
    ///
    /// [`DeviceEvent::LeaseExpired`]: standstill_protocol::message::DeviceEvent::LeaseExpired
    ///
    /// # Errors
    ///
    /// As [`pause`](Self::pause).
    pub async fn pause_leased(&self, lease: Duration) -> Result<Stopped, MachineError> {
        let owner = |reply| Owner { ticket: Ticket::new(), gap: None, lease, reply };
        let report = self.ask(|reply| Request::Transition(Operation::Pause, owner(reply))).await?;
        self.stopped(report?)
    }

    /// As [`pause`](Self::pause), but gives the pause up if it has not ended after that time: it is
    /// undone then, and the error has the report of that. So this takes no longer than `patience`
    /// and [`Deadlines::undo`](crate::Deadlines::undo).
    ///
    /// To drop the future of this gives it up too; to drop that of a `pause` gives nothing up, and
    /// the machine stops all the same.
    ///
    /// # Errors
    ///
    /// As [`pause`](Self::pause); [`MachineError::Cancelled`] if it had to wait for its turn and
    /// did not get it in time.
    pub async fn pause_timeout(&self, patience: Duration) -> Result<Stopped, MachineError> {
        let mut steps = self.launch(Operation::Pause, None)?;
        self.stopped(steps.ended_within(patience).await?)
    }

    /// Starts every device again, in two phases. For whoever has not kept the guard.
    ///
    /// # Errors
    ///
    /// [`MachineError::Missing`] names a device that the machine must not run without.
    /// [`MachineError::Transition`] with the whole report if the machine does not run now.
    pub async fn resume(&self) -> Result<Arc<TransitionReport>, MachineError> {
        running(self.transition(Operation::Resume).await?)
    }

    /// As [`resume`](Self::resume), but gives it up as [`pause_timeout`](Self::pause_timeout) does.
    ///
    /// # Errors
    ///
    /// As [`resume`](Self::resume) and [`pause_timeout`](Self::pause_timeout).
    pub async fn resume_timeout(
        &self,
        patience: Duration,
    ) -> Result<Arc<TransitionReport>, MachineError> {
        running(self.launch(Operation::Resume, None)?.ended_within(patience).await?)
    }

    /// Begins to stop every device, and returns without waiting for any answer: the first of the
    /// four calls of [`steps`](crate::steps). `gap` is how long the caller may take between the end
    /// of the first phase and the launch of the second; after that the machine is rolled back.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after a shutdown. Whatever else is in the way is told by
    /// [`PreparingStop::join`].
    pub fn launch_prepare_stop(&self, gap: Duration) -> Result<PreparingStop, MachineError> {
        Ok(PreparingStop::of(self.launch(Operation::Pause, Some(gap))?))
    }

    /// Begins to start every device again, and returns without waiting for any answer; as
    /// [`launch_prepare_stop`](Self::launch_prepare_stop).
    ///
    /// # Errors
    ///
    /// As [`launch_prepare_stop`](Self::launch_prepare_stop).
    pub fn launch_prepare_start(&self, gap: Duration) -> Result<PreparingStart, MachineError> {
        Ok(PreparingStart::of(self.launch(Operation::Resume, Some(gap))?))
    }

    async fn transition(
        &self,
        operation: Operation,
    ) -> Result<Arc<TransitionReport>, MachineError> {
        let owner =
            |reply| Owner { ticket: Ticket::new(), gap: None, lease: Duration::ZERO, reply };
        self.ask(|reply| Request::Transition(operation, owner(reply))).await?
    }

    /// Asks for a transition without waiting for anything.
    fn launch(&self, operation: Operation, gap: Option<Duration>) -> Result<Steps, MachineError> {
        let (reply, ended) = oneshot::channel();
        let (quiet, is_quiet) = oneshot::channel();
        let ticket = Ticket::new();
        let gap = gap.map(|budget| Gap::new(budget, quiet));
        let owner = Owner { ticket, gap, lease: Duration::ZERO, reply };
        let request = Request::Transition(operation, owner);
        self.cast(coordinator::Message::Request(request))?;
        Ok(Steps::new(self.clone(), ticket, is_quiet, ended))
    }

    /// An owner goes on with its transition, or gives it up.
    pub(crate) fn step(&self, ticket: Ticket, step: Step) -> Result<(), MachineError> {
        self.cast(coordinator::Message::Step(ticket, step))
    }

    fn cast(&self, message: coordinator::Message) -> Result<(), MachineError> {
        self.inner.actor.cast(message).map_err(|_| MachineError::Gone)
    }

    /// The guard of a machine that a pause has stopped.
    pub(crate) fn stopped(&self, report: Arc<TransitionReport>) -> Result<Stopped, MachineError> {
        match (&report.outcome, report.machine) {
            (
                Outcome::Done | Outcome::Stopped | Outcome::Degraded { .. },
                MachineState::Stopped,
            ) => Ok(Stopped { machine: self.clone(), report, resumed: false }),
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
    /// [`MachineError::Memory`] names a device that did not accept it. A new file that no device has
    /// accepted within the deadline is declared to nobody later. [`MachineError::TooMuchRam`] if 64 files are declared
    /// already.
    pub async fn declare_ram(&self, ram: impl AsFd) -> Result<(), MachineError> {
        let fd: OwnedFd =
            ram.as_fd().try_clone_to_owned().map_err(|source| MachineError::Fd { source })?;
        self.ask(|reply| Request::DeclareRam(fd, reply)).await?
    }

    /// Has every device process mark the pages of declared RAM that it writes, and waits until all
    /// of them do: nothing that is written after this returns is missed. RAM that is declared later
    /// is tracked too, from the return of [`declare_ram`](Self::declare_ram) on, and devices that
    /// join later are told before they may run. See [`dirty`](crate::dirty).
    ///
    /// # Errors
    ///
    /// [`MachineError::Dirty`] if that is not possible (among others with the names of devices that
    /// cannot tell what they write); [`MachineError::Memory`] names a device that did not accept it.
    /// Nothing is tracked then.
    pub async fn start_dirty_tracking(
        &self,
        options: DirtyOptions,
    ) -> Result<DirtyTracking, MachineError> {
        self.ask(|reply| Request::StartDirtyTracking(options, reply)).await?
    }

    /// Adds a device: starts its process, waits for its greeting, and brings it to the machine's
    /// present state. When this returns it counts. RAM that was declared is declared to it.
    ///
    /// While a transition is under way it waits for its turn.
    ///
    /// # Errors
    ///
    /// [`MachineError::NotStarted`] if the device does not start, greet, fit in or come along;
    /// [`MachineError::Device`] if the machine is held; [`MachineError::Unproven`] if the process
    /// cannot be proven gone after that. Otherwise the machine is as it was.
    pub async fn add_device(&self, spec: DeviceSpec) -> Result<(), MachineError> {
        self.ask(|reply| Request::AddDevice(Box::new(spec), reply)).await?
    }

    /// Removes a device: brings it to STOP, asks its process to end, kills it after a grace of 2 s,
    /// proves that it is gone, and has its peers' windows onto its memory revoked. Returns how it
    /// ended. One that is lost already is forgotten once it is proven gone.
    ///
    /// While a transition is under way it waits for its turn. If it is given up by dropping the
    /// future, the device is removed all the same.
    ///
    /// # Errors
    ///
    /// [`MachineError::NoDevice`]; [`MachineError::Device`] if the machine is held and the device is
    /// not fenced; [`MachineError::Unproven`] if it cannot be proven gone in time: it is lost then,
    /// is not restarted, and can be removed again.
    pub async fn remove_device(&self, name: &str) -> Result<Option<Exit>, MachineError> {
        let name = name.to_owned();
        self.ask(|reply| Request::RemoveDevice(name, reply)).await?
    }

    /// Starts a lost device again, whatever its policy is and however often it was restarted; its
    /// budget is as new. When this returns the device counts.
    ///
    /// While a transition is under way it waits for its turn.
    ///
    /// # Errors
    ///
    /// [`MachineError::NoDevice`]; [`MachineError::Device`] if it is not lost and fenced, is being
    /// restarted already, or has a client that cannot reconnect; [`MachineError::NotStarted`] if it
    /// does not start, greet, fit in or come along.
    pub async fn restart_device(&self, name: &str) -> Result<(), MachineError> {
        let name = name.to_owned();
        self.ask(|reply| Request::RestartDevice(name, reply)).await?
    }

    /// Gives the transition up that is under way, if one is: it is undone. One that waits for its
    /// turn is not begun.
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

    /// What happens from now on. The stream ends with the machine.
    #[must_use]
    pub fn events(&self) -> Events {
        let events = self.inner.events.upgrade();
        events.map_or_else(Events::none, |events| Events::of(events.subscribe()))
    }

    /// Tells a device process what to do wrong from now on, at any time, also in the middle of a
    /// transition. Commands that are sent after this returns find it armed. The journal says what it
    /// has done; its first line, that it was armed. A later incarnation of the device is not.
    ///
    /// ```no_run
    /// # async fn example(machine: standstill_coordinator::Machine) -> Result<(), Box<dyn std::error::Error>> {
    /// use standstill_protocol::fault::{Action, Fault, JournalLine, Point};
    /// use standstill_protocol::message::Phase;
    ///
    /// let dies = Fault::new(Point::BeforeAck(Phase::Stop), Action::Abort);
    /// let mut journal = machine.arm("nic0", &[dies]).await?;
    /// assert!(machine.pause().await.is_err(), "nic0 is gone");
    /// assert_eq!(journal.next().await?, JournalLine::Armed(1));
    /// assert!(matches!(journal.next().await?, JournalLine::Fired { index: 0, .. }));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ArmError`](crate::fault::ArmError); nothing is armed then.
    #[cfg(feature = "fault-injection")]
    pub async fn arm(
        &self,
        device: &str,
        faults: &[standstill_protocol::fault::Fault],
    ) -> Result<crate::fault::Journal, crate::fault::ArmError> {
        let (reader, journal) = crate::fault::journal(faults)?;
        let (device, faults) = (device.to_owned(), faults.to_vec());
        self.ask(|reply| Request::Arm(crate::fault::ArmRequest { device, faults, journal, reply }))
            .await??;
        Ok(reader)
    }

    /// Ends every device process: asks it to, and kills it after the grace. Returns how each
    /// ended, by name. Of a machine that keeps its processes, the record and the sockets are removed
    /// once all have ended.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after another shutdown; [`MachineError::Superseded`] if another
    /// coordinator has the machine, whose processes live on then.
    pub async fn shutdown(&self) -> Result<Vec<(String, Option<Exit>)>, MachineError> {
        self.shutdown_within(SHUTDOWN_GRACE).await
    }

    /// As [`shutdown`](Self::shutdown) with another grace than 2 s; zero kills at once.
    ///
    /// While a shutdown is under way, one with a shorter grace hurries it: what has not ended within
    /// that is killed. The answer goes to the first one.
    ///
    /// # Errors
    ///
    /// As [`shutdown`](Self::shutdown).
    pub async fn shutdown_within(
        &self,
        grace: Duration,
    ) -> Result<Vec<(String, Option<Exit>)>, MachineError> {
        self.ask(|reply| Request::Shutdown(grace, reply)).await?
    }
}

/// The report of a resume after which the machine runs.
pub(crate) fn running(
    report: Arc<TransitionReport>,
) -> Result<Arc<TransitionReport>, MachineError> {
    match (&report.outcome, report.machine) {
        (Outcome::Done | Outcome::Degraded { .. }, MachineState::Running) => Ok(report),
        _ => Err(MachineError::Transition(report)),
    }
}

/// A machine that stands still; until a lease runs out, if it was [stopped with
/// one](Machine::pause_leased).
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

    /// Whether all devices are in STOP, and certainly have been since the last pause ended. Whoever
    /// reads anything under a [lease](Machine::pause_leased) asks this when all is read: if it is false,
    /// a device may have written meanwhile. It is false from the moment when a lease may have run out,
    /// which is a little earlier than a device tells that it has.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after a shutdown.
    pub async fn stands(&self) -> Result<bool, MachineError> {
        Ok(self.machine.status().await?.stands)
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

    /// Begins to start it again in two steps; as [`Machine::launch_prepare_start`].
    ///
    /// # Errors
    ///
    /// As [`Machine::launch_prepare_start`].
    pub fn launch_prepare_start(mut self, gap: Duration) -> Result<PreparingStart, MachineError> {
        self.resumed = true;
        self.machine.launch_prepare_start(gap)
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
