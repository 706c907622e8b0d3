//! What a machine tells whoever listens.

use crate::report::TransitionReport;
use standstill_protocol::message::Term;
use std::sync::Arc;

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
    /// Another coordinator has taken the machine over. Nothing can be done here any more; the
    /// devices are unharmed.
    Superseded {
        /// Its term.
        term: Term,
    },
    /// A device process tells something.
    Device {
        /// Its name.
        device: String,
        /// What.
        event: standstill_protocol::message::DeviceEvent,
    },
}
