//! What an owner asks of a machine, and whether it is answered.

use crate::description::DeviceSpec;
use crate::error::MachineError;
use crate::machine::Machine;
use crate::report::TransitionReport;
use crate::status::Status;
use rustix::fs::{MemfdFlags, memfd_create};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// What an owner may ask of a machine at any time. Devices are named by their place in the
/// description, those that are added behind the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(fuzzing),
    expect(unreachable_pub, reason = "public where cargo-fuzz builds it, and nowhere else")
)]
pub enum Ask {
    /// [`Machine::pause`].
    Pause,
    /// [`Machine::pause_leased`].
    PauseLeased,
    /// [`Machine::resume`].
    Resume,
    /// [`Machine::launch_prepare_stop`], with [`Ask::GoOn`] or [`Ask::GiveUp`] to follow.
    PauseInSteps,
    /// [`Machine::launch_prepare_start`], the same way.
    ResumeInSteps,
    /// The second phase of what is done in steps is launched.
    GoOn,
    /// What is done in steps is given up.
    GiveUp,
    /// [`Machine::cancel`].
    Cancel,
    /// [`Machine::accept_hold`].
    AcceptHold,
    /// [`Machine::status`].
    Status,
    /// [`Machine::declare_ram`].
    DeclareRam,
    /// [`Machine::add_device`].
    Add,
    /// [`Machine::restart_device`].
    Restart(u8),
    /// [`Machine::remove_device`].
    Remove(u8),
    /// [`Machine::shutdown`].
    Shutdown,
}

/// What came of it.
#[derive(Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "only schedules look at what is answered"))]
pub(in super::super) enum Answer {
    Transition(Result<Arc<TransitionReport>, MachineError>),
    Status(Result<Status, MachineError>),
    Other(Result<(), MachineError>),
}

#[cfg(test)]
impl Answer {
    /// Why it was not done, if that was no transition's end.
    pub(in super::super) fn error(&self) -> Option<&MachineError> {
        match self {
            Self::Transition(Err(error)) | Self::Status(Err(error)) | Self::Other(Err(error)) => {
                Some(error)
            }
            _ => None,
        }
    }
}

/// How long the owner may take between the phases of what is done in steps.
pub(in super::super) const GAP: Duration = Duration::from_secs(1);

/// How long devices stay stopped that were stopped with a lease.
const LEASE: Duration = Duration::from_secs(1);

const GO_ON: u8 = 1;
const GIVE_UP: u8 = 2;

/// One call of the owner.
pub(in super::super) struct Call {
    pub(in super::super) ask: Ask,
    gate: Arc<AtomicU8>,
    future: Pin<Box<dyn Future<Output = Answer>>>,
}

impl Call {
    /// Asks; `name` is that of the device it is about.
    pub(in super::super) fn new(machine: &Machine, ask: Ask, name: String) -> Self {
        let machine = machine.clone();
        let gate = Arc::new(AtomicU8::new(0));
        let opened = Arc::clone(&gate);
        let future: Pin<Box<dyn Future<Output = Answer>>> = match ask {
            Ask::Pause => Box::pin(async move { stopped(machine.pause().await) }),
            Ask::PauseLeased => Box::pin(async move { stopped(machine.pause_leased(LEASE).await) }),
            Ask::Resume => Box::pin(async move { ended(machine.resume().await) }),
            Ask::PauseInSteps => Box::pin(async move {
                let preparing = match machine.launch_prepare_stop(GAP) {
                    Ok(preparing) => preparing,
                    Err(error) => return ended(Err(error)),
                };
                let quiet = match preparing.join().await {
                    Ok(quiet) => quiet,
                    Err(error) => return ended(Err(error)),
                };
                if goes_on(opened).await {
                    stopped(quiet.launch_stop().join().await)
                } else {
                    ended(quiet.give_up().await)
                }
            }),
            Ask::ResumeInSteps => Box::pin(async move {
                let preparing = match machine.launch_prepare_start(GAP) {
                    Ok(preparing) => preparing,
                    Err(error) => return ended(Err(error)),
                };
                let accepting = match preparing.join().await {
                    Ok(accepting) => accepting,
                    Err(error) => return ended(Err(error)),
                };
                if goes_on(opened).await {
                    ended(accepting.launch_start().join().await)
                } else {
                    ended(accepting.give_up().await)
                }
            }),
            Ask::Status => Box::pin(async move { Answer::Status(machine.status().await) }),
            Ask::Cancel | Ask::GoOn | Ask::GiveUp => {
                Box::pin(async move { Answer::Other(machine.cancel().await) })
            }
            Ask::AcceptHold => Box::pin(async move { Answer::Other(machine.accept_hold().await) }),
            Ask::DeclareRam => Box::pin(async move {
                let ram = match memfd_create("ram", MemfdFlags::CLOEXEC) {
                    Ok(ram) => ram,
                    Err(errno) => {
                        let source = errno.into();
                        return Answer::Other(Err(MachineError::Fd { source }));
                    }
                };
                Answer::Other(machine.declare_ram(&ram).await)
            }),
            Ask::Add => Box::pin(async move {
                Answer::Other(machine.add_device(DeviceSpec::new(name, "scripted")).await)
            }),
            Ask::Restart(_) => {
                Box::pin(async move { Answer::Other(machine.restart_device(&name).await) })
            }
            Ask::Remove(_) => {
                Box::pin(async move { Answer::Other(machine.remove_device(&name).await.map(drop)) })
            }
            Ask::Shutdown => {
                Box::pin(async move { Answer::Other(machine.shutdown().await.map(drop)) })
            }
        };
        Self { ask, gate, future }
    }

    /// Waits for the end of the take-over with which the machine began.
    #[cfg(test)]
    pub(in super::super) fn take_over(machine: &Machine) -> Self {
        let machine = machine.clone();
        let (ask, gate) = (Ask::Status, Arc::new(AtomicU8::new(0)));
        let future = Box::pin(async move { ended(machine.finish_take_over().await) });
        Self { ask, gate, future }
    }

    /// The owner goes on with the second phase, or gives it up.
    pub(in super::super) fn decide(&self, goes_on: bool) {
        self.gate.store(if goes_on { GO_ON } else { GIVE_UP }, Ordering::Relaxed);
    }

    /// The answer, if it has come.
    pub(in super::super) fn answer(&mut self) -> Option<Answer> {
        match self.future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answer) => Some(answer),
            Poll::Pending => None,
        }
    }
}

/// Waits until the owner has decided.
async fn goes_on(gate: Arc<AtomicU8>) -> bool {
    let decided = poll_fn(|_| match gate.load(Ordering::Relaxed) {
        0 => Poll::Pending,
        decision => Poll::Ready(decision),
    });
    decided.await == GO_ON
}

fn ended(ended: Result<Arc<TransitionReport>, MachineError>) -> Answer {
    Answer::Transition(match ended {
        Err(MachineError::Transition(report)) => Ok(report),
        ended => ended,
    })
}

fn stopped(stopped: Result<crate::machine::Stopped, MachineError>) -> Answer {
    ended(stopped.map(|stopped| {
        let report = Arc::clone(stopped.report());
        stopped.leave_stopped();
        report
    }))
}
