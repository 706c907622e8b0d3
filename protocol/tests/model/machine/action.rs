//! What can happen next.

use standstill_protocol::transition::{HookId, HookMoment, Timer};
use std::fmt;

/// One step of the world. Coordinator 0 is the first one, 1 the one that takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// The first coordinator begins its first operation.
    Begin,
    /// A device reads the next message of a coordinator; `kept`: and that message comes again.
    Read { device: usize, from: usize, kept: bool },
    /// A device has finished the arc that it was taking.
    ArcDone { device: usize },
    /// A device's hook fails; it is back where the arc began, or in ERROR.
    ArcFails { device: usize, restored: bool },
    /// A coordinator reads the next message of a device; `kept`: and that message comes again.
    Hear { coordinator: usize, device: usize, kept: bool },
    /// A timer of a coordinator runs out.
    Expire { coordinator: usize, timer: Timer },
    /// The fence that a coordinator asked for is proven.
    Prove { coordinator: usize, device: usize },
    /// A hook returns to a coordinator, well or with an error.
    HookReturns { coordinator: usize, hook: HookId, moment: HookMoment, well: bool },
    /// A device process dies.
    Crash { device: usize },
    /// A second coordinator takes the machine over.
    TakeOver,
    /// The first coordinator learns that it has been superseded.
    Supersede,
    /// The owner begins the next operation.
    Next,
    /// The message that was kept is delivered once more.
    Again,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Begin => write!(f, "coordinator 0 begins"),
            Self::Read { device, from, kept } => {
                let kept = if kept { ", which will come again" } else { "" };
                write!(f, "device {device} reads the next message of coordinator {from}{kept}")
            }
            Self::ArcDone { device } => write!(f, "device {device} finishes its arc"),
            Self::ArcFails { device, restored: true } => {
                write!(f, "device {device} fails at its arc and is back where it was")
            }
            Self::ArcFails { device, restored: false } => {
                write!(f, "device {device} fails at its arc and is in ERROR")
            }
            Self::Hear { coordinator, device, kept } => {
                let kept = if kept { ", which will come again" } else { "" };
                write!(
                    f,
                    "coordinator {coordinator} reads the next message of device {device}{kept}"
                )
            }
            Self::Expire { coordinator, timer } => {
                write!(f, "coordinator {coordinator}: the timer {timer:?} runs out")
            }
            Self::Prove { coordinator, device } => {
                write!(f, "coordinator {coordinator}: the fence of device {device} is proven")
            }
            Self::HookReturns { coordinator, hook, moment, well } => {
                let how = if well { "returns" } else { "fails" };
                write!(f, "coordinator {coordinator}: hook {} {how} for {moment:?}", hook.0)
            }
            Self::Crash { device } => write!(f, "device {device} crashes"),
            Self::TakeOver => write!(f, "coordinator 1 takes the machine over"),
            Self::Supersede => write!(f, "coordinator 0 learns that it is superseded"),
            Self::Next => write!(f, "the owner begins the next operation"),
            Self::Again => write!(f, "the message that was kept arrives once more"),
        }
    }
}
