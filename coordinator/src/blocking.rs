//! The same machine for programs without async: every call blocks its thread until it is answered.
//!
//! [`MachineBuilder::start_blocking`] gives a [`Machine`] that lives on a thread of its own, named
//! `standstill`. Calls may come from any thread, from several at once, and from inside an async
//! runtime of the program's own (where they block a worker, but do not panic). Reports, errors,
//! policies, hooks and local devices are those of the async API.
//!
//! ```no_run
//! # fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use standstill_coordinator::{DeviceSpec, MachineBuilder};
//!
//! let machine = MachineBuilder::new("vm0")
//!     .device(DeviceSpec::new("nic0", "/usr/bin/my-nic").arg("--socket").arg("/run/nic0.sock"))
//!     .start_blocking()?;
//! let stopped = machine.pause()?;
//! println!("{}", stopped.report());
//! stopped.resume()?;
//! machine.shutdown()?;
//! # Ok(())
//! # }
//! ```
//!
//! A program with an event loop of its own registers [`Events::fd`], and the `fd` of a
//! [launched phase](PreparingStop::fd), in it.
//!
//! A [hook](crate::Hook) or [local device](crate::LocalDevice) that a transition waits for may ask for
//! the [status](Machine::status) and [cancel](Machine::cancel); another transition is refused. It must
//! not add, remove or restart a device: that waits for the end of the transition, and so for itself,
//! until its deadline, and the machine is held then.
//!
//! Threads do not survive a `fork`: in the child every call fails with [`MachineError::Gone`], events
//! end at once, and dropping a handle does nothing to the machine, which is the parent's.

mod events;
mod inbox;
mod steps;
mod thread;

pub use events::Events;
pub use steps::{Accepting, PreparingStart, PreparingStop, Quiet, Starting, Stopping};

use crate::description::{DeviceSpec, MachineBuilder};
use crate::dirty::{DirtyOptions, DirtyTracking};
use crate::error::{MachineError, StartError, TakeOverError};
use crate::machine as asynchronous;
use crate::process::Exit;
use crate::report::TransitionReport;
use crate::status::Status;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use thread::MachineThread;

/// A running machine of device processes, for programs without async. Clones are handles of the
/// same machine.
///
/// When the last handle is dropped without [`shutdown`](Self::shutdown), its processes are killed;
/// those of a machine that [keeps](MachineBuilder::keep) them live on.
#[derive(Clone, Debug)]
pub struct Machine {
    machine: asynchronous::Machine,
    // After the machine: fields are dropped in order, and the thread ends with its last handle.
    thread: Arc<MachineThread>,
}

/// A machine that was taken over, and what was found and done.
#[derive(Debug)]
#[must_use = "a machine that is dropped has no coordinator again"]
pub struct TakenOver {
    /// The machine.
    pub machine: Machine,
    /// How the take-over ended; see [`TakenOver::report`](asynchronous::TakenOver::report).
    pub report: Arc<TransitionReport>,
}

impl MachineBuilder {
    /// Starts all device processes and waits until each has greeted, as [`start`](Self::start);
    /// blocks the calling thread meanwhile. The machine lives on a thread of its own.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start); [`StartError::System`] also if the thread cannot be made.
    pub fn start_blocking(self) -> Result<Machine, StartError> {
        let system = |source| StartError::System { what: "make the machine's thread", source };
        let thread = MachineThread::start().map_err(system)?;
        let machine = thread.run(self.start()).ok_or_else(|| system(thread::ended()))??;
        Ok(Machine { machine, thread: Arc::new(thread) })
    }

    /// Takes over the machine that an earlier coordinator has left behind, as
    /// [`take_over`](Self::take_over); blocks the calling thread meanwhile.
    ///
    /// # Errors
    ///
    /// As [`take_over`](Self::take_over); [`TakeOverError::System`] also if the thread cannot be
    /// made.
    pub fn take_over_blocking(self) -> Result<TakenOver, TakeOverError> {
        let system = |source| TakeOverError::System { what: "make the machine's thread", source };
        let thread = MachineThread::start().map_err(system)?;
        let asynchronous::TakenOver { machine, report } =
            thread.run(self.take_over()).ok_or_else(|| system(thread::ended()))??;
        Ok(TakenOver { machine: Machine { machine, thread: Arc::new(thread) }, report })
    }
}

impl Machine {
    /// Has the machine's thread do something with it, and waits for the end of that.
    fn ask<T, F>(
        &self,
        call: impl FnOnce(asynchronous::Machine) -> F + Send + 'static,
    ) -> Result<T, MachineError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, MachineError>> + Send + 'static,
    {
        let machine = self.machine.clone();
        self.thread.run(call(machine)).unwrap_or(Err(MachineError::Gone))
    }

    fn guard(&self, guard: asynchronous::Stopped) -> Stopped {
        Stopped { guard, machine: self.clone() }
    }

    /// Stops every device, in two phases, and gives a guard for the stopped machine. Takes no longer
    /// than the deadlines of both phases, the hooks and an undo.
    ///
    /// # Errors
    ///
    /// As [the async `pause`](asynchronous::Machine::pause).
    pub fn pause(&self) -> Result<Stopped, MachineError> {
        let guard = self.ask(async |machine| machine.pause().await)?;
        Ok(self.guard(guard))
    }

    /// As [`pause`](Self::pause), for a VM whose processors run on meanwhile: see
    /// [the async `pause_leased`](asynchronous::Machine::pause_leased).
    ///
    /// # Errors
    ///
    /// As [`pause`](Self::pause).
    pub fn pause_leased(&self, lease: Duration) -> Result<Stopped, MachineError> {
        let guard = self.ask(move |machine| async move { machine.pause_leased(lease).await })?;
        Ok(self.guard(guard))
    }

    /// As [`pause`](Self::pause), but gives the pause up if it has not ended after that time: it is
    /// undone then, and the error has the report of that. So this takes no longer than `patience`
    /// and [`Deadlines::undo`](crate::Deadlines::undo).
    ///
    /// # Errors
    ///
    /// As [the async `pause_timeout`](asynchronous::Machine::pause_timeout).
    pub fn pause_timeout(&self, patience: Duration) -> Result<Stopped, MachineError> {
        let guard =
            self.ask(move |machine| async move { machine.pause_timeout(patience).await })?;
        Ok(self.guard(guard))
    }

    /// Starts every device again, in two phases. For whoever has not kept the guard.
    ///
    /// # Errors
    ///
    /// As [the async `resume`](asynchronous::Machine::resume).
    pub fn resume(&self) -> Result<Arc<TransitionReport>, MachineError> {
        self.ask(|machine| async move { machine.resume().await })
    }

    /// As [`resume`](Self::resume), but gives it up as [`pause_timeout`](Self::pause_timeout) does.
    ///
    /// # Errors
    ///
    /// As [the async `resume_timeout`](asynchronous::Machine::resume_timeout).
    pub fn resume_timeout(
        &self,
        patience: Duration,
    ) -> Result<Arc<TransitionReport>, MachineError> {
        self.ask(move |machine| async move { machine.resume_timeout(patience).await })
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
        self.thread.check()?;
        Ok(PreparingStop::of(self, self.machine.launch_prepare_stop(gap)?))
    }

    /// Begins to start every device again, and returns without waiting for any answer; as
    /// [`launch_prepare_stop`](Self::launch_prepare_stop).
    ///
    /// # Errors
    ///
    /// As [`launch_prepare_stop`](Self::launch_prepare_stop).
    pub fn launch_prepare_start(&self, gap: Duration) -> Result<PreparingStart, MachineError> {
        self.thread.check()?;
        Ok(PreparingStart::of(self, self.machine.launch_prepare_start(gap)?))
    }

    /// Where the machine and its devices are. Answered at once, also during a transition.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after a shutdown.
    pub fn status(&self) -> Result<Status, MachineError> {
        self.ask(|machine| async move { machine.status().await })
    }

    /// Declares the file behind `ram` to be guest RAM, to every device, and waits until it is in
    /// force everywhere.
    ///
    /// # Errors
    ///
    /// As [the async `declare_ram`](asynchronous::Machine::declare_ram).
    pub fn declare_ram(&self, ram: impl AsFd) -> Result<(), MachineError> {
        let ram = ram.as_fd().try_clone_to_owned();
        let ram = ram.map_err(|source| MachineError::Fd { source })?;
        self.ask(|machine| async move { machine.declare_ram(ram).await })
    }

    /// Has every device process mark the pages of declared RAM that it writes, and waits until all
    /// of them do. See [`dirty`](crate::dirty); to end it, drop what this returns.
    ///
    /// # Errors
    ///
    /// As [the async `start_dirty_tracking`](asynchronous::Machine::start_dirty_tracking).
    pub fn start_dirty_tracking(
        &self,
        options: DirtyOptions,
    ) -> Result<DirtyTracking, MachineError> {
        self.ask(move |machine| async move { machine.start_dirty_tracking(options).await })
    }

    /// Adds a device, and returns when it counts.
    ///
    /// # Errors
    ///
    /// As [the async `add_device`](asynchronous::Machine::add_device).
    pub fn add_device(&self, spec: DeviceSpec) -> Result<(), MachineError> {
        self.ask(|machine| async move { machine.add_device(spec).await })
    }

    /// Removes a device, and returns how its process ended.
    ///
    /// # Errors
    ///
    /// As [the async `remove_device`](asynchronous::Machine::remove_device).
    pub fn remove_device(&self, name: &str) -> Result<Option<Exit>, MachineError> {
        let name = name.to_owned();
        self.ask(|machine| async move { machine.remove_device(&name).await })
    }

    /// Starts a lost device again, and returns when it counts.
    ///
    /// # Errors
    ///
    /// As [the async `restart_device`](asynchronous::Machine::restart_device).
    pub fn restart_device(&self, name: &str) -> Result<(), MachineError> {
        let name = name.to_owned();
        self.ask(|machine| async move { machine.restart_device(&name).await })
    }

    /// Gives the transition up that is under way, whoever has asked for it, if one is: it is undone.
    /// One that waits for its turn is not begun. For another thread than the one that waits in
    /// [`pause`](Self::pause).
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after a shutdown.
    pub fn cancel(&self) -> Result<(), MachineError> {
        self.ask(|machine| async move { machine.cancel().await })
    }

    /// The owner's decision about a machine that is held: what is not proven is taken as it is,
    /// and the machine counts as stopped.
    ///
    /// # Errors
    ///
    /// [`MachineError::NotHeld`] if it is not.
    pub fn accept_hold(&self) -> Result<(), MachineError> {
        self.ask(|machine| async move { machine.accept_hold().await })
    }

    /// What happens from now on. The stream ends with the machine.
    #[must_use]
    pub fn events(&self) -> Events {
        self.read(self.machine.events())
    }

    /// Reads events from another place on: with those of [`MachineBuilder::events`], from the
    /// beginning of the start.
    #[must_use]
    pub fn read(&self, events: crate::Events) -> Events {
        Events::of(&self.thread, events)
    }

    /// Tells a device process what to do wrong from now on; see
    /// [the async `arm`](asynchronous::Machine::arm). The journal is read with
    /// [`next_within`](crate::fault::Journal::next_within).
    ///
    /// # Errors
    ///
    /// As [the async `arm`](asynchronous::Machine::arm).
    #[cfg(feature = "fault-injection")]
    pub fn arm(
        &self,
        device: &str,
        faults: &[standstill_protocol::fault::Fault],
    ) -> Result<crate::fault::Journal, crate::fault::ArmError> {
        let (device, faults) = (device.to_owned(), faults.to_vec());
        self.ask(|machine| async move { Ok(machine.arm(&device, &faults).await) })?
    }

    /// Ends every device process: asks it to, and kills it after a grace of 2 s. Returns how each
    /// ended, by name.
    ///
    /// # Errors
    ///
    /// As [the async `shutdown`](asynchronous::Machine::shutdown).
    pub fn shutdown(&self) -> Result<Vec<(String, Option<Exit>)>, MachineError> {
        self.ask(|machine| async move { machine.shutdown().await })
    }
}

/// A machine that stands still.
///
/// Dropped without [`resume`](Self::resume), the machine stays stopped: nothing may start by
/// accident. [`Machine::resume`] starts it then.
#[must_use = "the machine stays stopped until it is resumed"]
#[derive(Debug)]
pub struct Stopped {
    guard: asynchronous::Stopped,
    machine: Machine,
}

impl Stopped {
    /// What happened while it stopped.
    #[must_use]
    pub fn report(&self) -> &Arc<TransitionReport> {
        self.guard.report()
    }

    /// Whether it stands still: see [the async `stands`](asynchronous::Stopped::stands).
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`] after a shutdown.
    pub fn stands(&self) -> Result<bool, MachineError> {
        self.machine.status().map(|status| status.stands)
    }

    /// Starts it again.
    ///
    /// # Errors
    ///
    /// As [`Machine::resume`].
    pub fn resume(self) -> Result<Arc<TransitionReport>, MachineError> {
        let Self { guard, machine } = self;
        machine.ask(|_| guard.resume())
    }

    /// Begins to start it again in two steps; as [`Machine::launch_prepare_start`].
    ///
    /// # Errors
    ///
    /// As [`Machine::launch_prepare_start`].
    pub fn launch_prepare_start(self, gap: Duration) -> Result<PreparingStart, MachineError> {
        self.machine.thread.check()?;
        Ok(PreparingStart::of(&self.machine, self.guard.launch_prepare_start(gap)?))
    }

    /// Leaves it stopped, on purpose.
    pub fn leave_stopped(self) {
        self.guard.leave_stopped();
    }
}
