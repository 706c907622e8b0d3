//! Why a plan was not run to its end.

use crate::pilot::PilotError;
use crate::plan::PlanError;
use crate::sweep::subject::RigError;
use standstill_coordinator::{MachineError, StartError, TakeOverError};
use std::io;
use std::time::Duration;
use thiserror::Error;

/// A plan was not run to its end.
#[derive(Debug, Error)]
pub enum RunError {
    /// It is no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The VMM's side does not work.
    #[error("cannot {what}")]
    Rig {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        source: RigError,
    },
    /// The machine does not start.
    #[error("the machine does not start")]
    Start(#[from] StartError),
    /// The machine does not do something that it has to.
    #[error("cannot {what}")]
    Machine {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        source: MachineError,
    },
    /// A machine whose coordinator was lost is not taken over.
    #[error("the machine is not taken over")]
    TakeOver(#[from] TakeOverError),
    /// The coordinator that is to fail does something else.
    #[error("the coordinator of the machine does not do what it should")]
    Pilot(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A fault cannot be done.
    #[error("cannot do this to device {device}")]
    Fault {
        /// Whom it should hit.
        device: usize,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something that has to come does not come.
    #[error("not within {limit:?}: {what}")]
    Late {
        /// What.
        what: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The system refuses something.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl From<PilotError> for RunError {
    fn from(error: PilotError) -> Self {
        Self::Pilot(error.into())
    }
}
