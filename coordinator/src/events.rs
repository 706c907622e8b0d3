//! What a machine tells whoever listens.
//!
//! A reader can measure by them how long a device was missing: from [`MachineEvent::DeviceLost`]
//! over [`MachineEvent::DeviceFenced`] to [`MachineEvent::DeviceJoined`].

mod display;
mod json;
mod log;
mod reader;

pub use json::JsonEvent;
pub(crate) use log::{TARGET, log};
pub use reader::Events;

use crate::process::Exit;
use crate::report::TransitionReport;
use crate::watchdog::Hang;
use standstill_protocol::message::{DeviceEvent, Epoch, Term};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{Loss, Operation};
use std::sync::Arc;
use std::time::Duration;

/// Something that happened to a machine.
///
/// `device` is a device's name and `incarnation` how often it was started by then.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MachineEvent {
    /// A transition began.
    TransitionBegan {
        /// What it is for.
        operation: Operation,
        /// Its first epoch.
        epoch: Epoch,
    },
    /// A transition ended.
    Transition(Arc<TransitionReport>),
    /// A device is lost: it does not count any more, and is being fenced.
    DeviceLost {
        /// Its name.
        device: String,
        /// Its incarnation.
        incarnation: u64,
        /// In what way.
        loss: Loss,
        /// What was seen of it, for a person.
        detail: String,
        /// The transition that was under way; it deals with the loss. `None` outside of any.
        during: Option<Operation>,
    },
    /// A device hangs; its loss follows.
    DeviceHung {
        /// Its name.
        device: String,
        /// Its incarnation.
        incarnation: u64,
        /// In what way.
        hang: Hang,
    },
    /// A device process ended.
    DeviceExited {
        /// Its name.
        device: String,
        /// Its incarnation.
        incarnation: u64,
        /// How.
        exit: Exit,
    },
    /// The fence of a device is proven: nothing of its process is left.
    DeviceFenced {
        /// Its name.
        device: String,
        /// Its incarnation.
        incarnation: u64,
        /// How its process ended.
        exit: Exit,
        /// How many locks on its backing files were obtained.
        locks: usize,
    },
    /// The fence of a device was not proven within its grace. It may be later.
    FenceUnproven {
        /// Its name.
        device: String,
        /// Its incarnation.
        incarnation: u64,
    },
    /// A lost device will be started again.
    DeviceRestarting {
        /// Its name.
        device: String,
        /// The how-manieth attempt within its policy's window, from 1.
        attempt: u32,
        /// How long it is waited before that.
        after: Duration,
    },
    /// A device that was restarted or added was brought to the machine's present state, and counts.
    DeviceJoined {
        /// Its name.
        device: String,
        /// Its incarnation.
        incarnation: u64,
        /// The process id of that incarnation.
        pid: Option<u32>,
        /// Where it is.
        state: MigrationState,
        /// How long it took, from the start of its process.
        took: Duration,
    },
    /// A lost device is not started again: its budget is used up.
    DeviceRestartsExhausted {
        /// Its name.
        device: String,
        /// How often it was started again within its policy's window.
        restarts: u32,
    },
    /// One attempt to start or restart a device has failed.
    DeviceNotRestarted {
        /// Its name.
        device: String,
        /// Why, for a person.
        why: String,
    },
    /// An optional device did not start or greet with its machine.
    DeviceNotStarted {
        /// Its name.
        device: String,
        /// Why, for a person.
        why: String,
    },
    /// A device was removed.
    DeviceRemoved {
        /// Its name.
        device: String,
        /// How its process ended; `None` if there was none.
        exit: Option<Exit>,
    },
    /// A machine that stood is held now: a device that was joining or leaving it could not be
    /// proven stopped. (A transition that ends *Held* says so in its report.)
    HoldBegan {
        /// The device's name.
        device: String,
    },
    /// A held machine is held no longer, and counts as stopped.
    HoldEnded {
        /// True if that is the owner's decision, false if everything was proven.
        by_owner: bool,
    },
    /// Another coordinator has taken the machine over. Nothing can be done here any more; the
    /// devices are unharmed.
    Superseded {
        /// Its term.
        term: Term,
    },
    /// Whoever reads these events has fallen behind, and has lost the oldest. Told to that reader
    /// alone, in the place of what is lost.
    Missed {
        /// How many events are lost.
        events: u64,
    },
    /// A device process tells something.
    Device {
        /// Its name.
        device: String,
        /// What.
        event: DeviceEvent,
    },
}

impl MachineEvent {
    /// The name of the device that it is about; `None` if it is about the machine.
    #[must_use]
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::TransitionBegan { .. }
            | Self::Transition(_)
            | Self::HoldEnded { .. }
            | Self::Superseded { .. }
            | Self::Missed { .. } => None,
            Self::DeviceLost { device, .. }
            | Self::DeviceHung { device, .. }
            | Self::DeviceExited { device, .. }
            | Self::DeviceFenced { device, .. }
            | Self::FenceUnproven { device, .. }
            | Self::DeviceRestarting { device, .. }
            | Self::DeviceJoined { device, .. }
            | Self::DeviceRestartsExhausted { device, .. }
            | Self::DeviceNotRestarted { device, .. }
            | Self::DeviceNotStarted { device, .. }
            | Self::DeviceRemoved { device, .. }
            | Self::HoldBegan { device }
            | Self::Device { device, .. } => Some(device),
        }
    }

    /// The incarnation of that device; `None` if it is about no particular one.
    #[must_use]
    pub fn incarnation(&self) -> Option<u64> {
        match self {
            Self::DeviceLost { incarnation, .. }
            | Self::DeviceHung { incarnation, .. }
            | Self::DeviceExited { incarnation, .. }
            | Self::DeviceFenced { incarnation, .. }
            | Self::FenceUnproven { incarnation, .. }
            | Self::DeviceJoined { incarnation, .. } => Some(*incarnation),
            _ => None,
        }
    }
}
