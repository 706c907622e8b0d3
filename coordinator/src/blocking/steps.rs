//! A transition in four calls; see [`steps`](crate::steps).

use super::inbox::{Inbox, Taken};
use super::{Machine, Stopped};
use crate::error::MachineError;
use crate::report::TransitionReport;
use crate::steps;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use tokio::task::AbortHandle;

type Ended<T> = Result<T, MachineError>;

/// Something that was launched and is to be joined.
#[derive(Debug)]
struct Launched<T> {
    inbox: Arc<Inbox<Ended<T>>>,
    task: AbortHandle,
    machine: Machine,
}

impl<T: Send + 'static> Launched<T> {
    fn new(machine: &Machine, join: impl Future<Output = Ended<T>> + Send + 'static) -> Self {
        let inbox = Arc::new(Inbox::new(1));
        let delivery = Delivery { inbox: Arc::clone(&inbox) };
        let task = machine.thread.spawn(async move { delivery.inbox.push(join.await) });
        Self { inbox, task, machine: machine.clone() }
    }

    fn join(self) -> Ended<T> {
        match self.inbox.take(None) {
            Taken::Item(ended) => ended,
            Taken::Missed(_) | Taken::Late | Taken::Closed => Err(MachineError::Gone),
        }
    }
}

impl<T> Drop for Launched<T> {
    fn drop(&mut self) {
        // With the task, or with what it has left in the inbox, the transition is given up.
        self.task.abort();
    }
}

/// Closes the inbox when there is nobody left to fill it.
struct Delivery<T> {
    inbox: Arc<Inbox<Ended<T>>>,
}

impl<T> Drop for Delivery<T> {
    fn drop(&mut self) {
        self.inbox.close();
    }
}

macro_rules! launched {
    ($(#[$doc:meta])* $name:ident($of:ty), $launched:ty, $joined:ty, $join:expr) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[must_use = "a handle that is dropped gives the transition up"]
        pub struct $name(Launched<$of>);

        impl $name {
            pub(super) fn of(machine: &Machine, launched: $launched) -> Self {
                Self(Launched::new(machine, launched.join()))
            }

            /// True if [`join`](Self::join) would not wait.
            #[must_use]
            pub fn is_ready(&self) -> bool {
                self.0.inbox.is_ready()
            }

            /// Readable once [`join`](Self::join) would not wait; for the program's own `epoll` or
            /// `poll`, level-triggered. Only to be polled.
            ///
            /// # Errors
            ///
            /// Whatever `eventfd(2)` says at the first call.
            pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
                self.0.inbox.fd()
            }

            /// Waits until the phase has ended, or has failed and is undone.
            ///
            /// # Errors
            ///
            /// As that of the async handle of the same name.
            pub fn join(self) -> Result<$joined, MachineError> {
                let machine = self.0.machine.clone();
                let join: fn(Machine, $of) -> $joined = $join;
                Ok(join(machine, self.0.join()?))
            }
        }
    };
}

launched! {
    /// The first phase of a stop is under way.
    PreparingStop(steps::Quiet), steps::PreparingStop, Quiet,
    |machine, quiet| Quiet { quiet, machine }
}
launched! {
    /// The second phase of a stop is under way.
    Stopping(crate::Stopped), steps::Stopping, Stopped,
    |machine, guard| machine.guard(guard)
}
launched! {
    /// The first phase of a start is under way.
    PreparingStart(steps::Accepting), steps::PreparingStart, Accepting,
    |machine, accepting| Accepting { accepting, machine }
}
launched! {
    /// The second phase of a start is under way.
    Starting(Arc<TransitionReport>), steps::Starting, Arc<TransitionReport>,
    |_, report| report
}

/// No device starts DMA into a peer; they still accept it, and serve the VM.
#[must_use = "a handle that is dropped gives the transition up"]
#[derive(Debug)]
pub struct Quiet {
    quiet: steps::Quiet,
    machine: Machine,
}

impl Quiet {
    /// Tells every device to stop, and returns without waiting for any answer.
    pub fn launch_stop(self) -> Stopping {
        Stopping::of(&self.machine, self.quiet.launch_stop())
    }

    /// Gives the transition up and waits until it is undone; the report says how that went.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`].
    pub fn give_up(self) -> Result<Arc<TransitionReport>, MachineError> {
        let Self { quiet, machine } = self;
        machine.ask(|_| quiet.give_up())
    }
}

/// Every device accepts DMA of its peers and serves the VM; none starts DMA into a peer.
#[must_use = "a handle that is dropped gives the transition up"]
#[derive(Debug)]
pub struct Accepting {
    accepting: steps::Accepting,
    machine: Machine,
}

impl Accepting {
    /// Tells every device to run, and returns without waiting for any answer.
    pub fn launch_start(self) -> Starting {
        Starting::of(&self.machine, self.accepting.launch_start())
    }

    /// Gives the transition up and waits until it is undone; the report says how that went.
    ///
    /// # Errors
    ///
    /// [`MachineError::Gone`].
    pub fn give_up(self) -> Result<Arc<TransitionReport>, MachineError> {
        let Self { accepting, machine } = self;
        machine.ask(|_| accepting.give_up())
    }
}
