//! A transition in four calls, for a VMM that does things of its own between the phases: launch and
//! join of the first phase, launch and join of the second.
//!
//! | | launch | join: what holds then |
//! |---|---|---|
//! | stop, phase 1 | [`Machine::launch_prepare_stop`] | [`Quiet`]: no device starts DMA into a peer |
//! | stop, phase 2 | [`Quiet::launch_stop`] | [`Stopped`]: the machine stands still |
//! | start, phase 1 | [`Machine::launch_prepare_start`] | [`Accepting`]: every device accepts DMA of its peers |
//! | start, phase 2 | [`Accepting::launch_start`] | the report: the machine runs |
//!
//! A launch returns without waiting for any answer. A handle that is dropped before the end gives
//! the transition up: it is undone, as after [`Machine::cancel`]; `give_up` does the same and waits
//! for the report. When something fails between the phases, the transition is undone at once, and
//! the next join has the report of that.
//!
//! The time between the first join and the second launch is the caller's, and limited: when it is
//! over, the transition is rolled back. In the order of [hooks](crate::HookSpec) it comes after all
//! others between the phases on stop, and before them on start.
//!
//! ```no_run
//! # async fn example(machine: standstill_coordinator::Machine) -> Result<(), Box<dyn std::error::Error>> {
//! # fn stop_vcpus() {}
//! # use std::time::Duration;
//! let preparing = machine.launch_prepare_stop(Duration::from_secs(1))?;
//! // … whatever the VMM has to do meanwhile …
//! let quiet = preparing.join().await?;
//! stop_vcpus(); // No device writes into another one by now.
//! let stopped = quiet.launch_stop().join().await?;
//! stopped.resume().await?;
//! # Ok(())
//! # }
//! ```

use crate::coordinator::{Step, Ticket};
use crate::error::MachineError;
use crate::machine::{Machine, Stopped, running};
use crate::report::TransitionReport;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

type Ended = Result<Arc<TransitionReport>, MachineError>;

/// A transition that its owner can give up. Dropped before its end, it is given up.
#[derive(Debug)]
pub(crate) struct Steps {
    machine: Machine,
    ticket: Ticket,
    quiet: oneshot::Receiver<()>,
    ended: oneshot::Receiver<Ended>,
    over: bool,
}

impl Steps {
    pub(crate) fn new(
        machine: Machine,
        ticket: Ticket,
        quiet: oneshot::Receiver<()>,
        ended: oneshot::Receiver<Ended>,
    ) -> Self {
        Self { machine, ticket, quiet, ended, over: false }
    }

    /// Waits for the end of the first phase. A transition that ends before it has failed.
    async fn first_phase(&mut self) -> Result<(), MachineError> {
        match (&mut self.quiet).await {
            Ok(()) => Ok(()),
            Err(_) => Err(MachineError::Transition(self.ended().await?)),
        }
    }

    async fn ended(&mut self) -> Ended {
        let ended = (&mut self.ended).await;
        self.over = true;
        ended.map_err(|_| MachineError::Gone)?
    }

    /// Waits for the end, and gives the transition up after that time.
    pub(crate) async fn ended_within(&mut self, patience: Duration) -> Ended {
        match tokio::time::timeout(patience, self.ended()).await {
            Ok(ended) => ended,
            Err(_) => self.give_up().await,
        }
    }

    async fn give_up(&mut self) -> Ended {
        self.machine.step(self.ticket, Step::GiveUp)?;
        self.ended().await
    }

    /// Launches the second phase. One that cannot be launched any more says so when it is joined.
    fn go_on(self) -> Self {
        // Fails if the machine is gone.
        let _ = self.machine.step(self.ticket, Step::GoOn);
        self
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if !self.over {
            // A machine that is gone has nothing to undo.
            let _ = self.machine.step(self.ticket, Step::GiveUp);
        }
    }
}

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[must_use = "a handle that is dropped gives the transition up"]
        pub struct $name(Steps);

        impl $name {
            /// Gives the transition up and waits until it is undone; the report says how that went.
            ///
            /// # Errors
            ///
            /// Whatever has kept the transition from beginning, or [`MachineError::Gone`].
            pub async fn give_up(mut self) -> Result<Arc<TransitionReport>, MachineError> {
                self.0.give_up().await
            }
        }
    };
}

handle! {
    /// The first phase of a stop is under way.
    PreparingStop
}
handle! {
    /// No device starts DMA into a peer; they still accept it, and serve the VM.
    Quiet
}
handle! {
    /// The second phase of a stop is under way.
    Stopping
}
handle! {
    /// The first phase of a start is under way.
    PreparingStart
}
handle! {
    /// Every device accepts DMA of its peers and serves the VM; none starts DMA into a peer.
    Accepting
}
handle! {
    /// The second phase of a start is under way.
    Starting
}

impl PreparingStop {
    pub(crate) fn of(steps: Steps) -> Self {
        Self(steps)
    }

    /// Waits until every device is quiet.
    ///
    /// # Errors
    ///
    /// As [`Machine::pause`]. With [`OnFailure::StayStopped`](crate::OnFailure) the machine may stand
    /// still by then: see the report.
    pub async fn join(mut self) -> Result<Quiet, MachineError> {
        self.0.first_phase().await?;
        Ok(Quiet(self.0))
    }
}

impl Quiet {
    /// Tells every device to stop, and returns without waiting for any answer.
    pub fn launch_stop(self) -> Stopping {
        Stopping(self.0.go_on())
    }
}

impl Stopping {
    /// Waits until every device has stopped.
    ///
    /// # Errors
    ///
    /// As [`Machine::pause`].
    pub async fn join(mut self) -> Result<Stopped, MachineError> {
        let report = self.0.ended().await?;
        self.0.machine.stopped(report)
    }
}

impl PreparingStart {
    pub(crate) fn of(steps: Steps) -> Self {
        Self(steps)
    }

    /// Waits until every device accepts DMA of its peers.
    ///
    /// # Errors
    ///
    /// As [`Machine::resume`].
    pub async fn join(mut self) -> Result<Accepting, MachineError> {
        self.0.first_phase().await?;
        Ok(Accepting(self.0))
    }
}

impl Accepting {
    /// Tells every device to run, and returns without waiting for any answer.
    pub fn launch_start(self) -> Starting {
        Starting(self.0.go_on())
    }
}

impl Starting {
    /// Waits until every device runs.
    ///
    /// # Errors
    ///
    /// As [`Machine::resume`].
    pub async fn join(mut self) -> Result<Arc<TransitionReport>, MachineError> {
        running(self.0.ended().await?)
    }
}
