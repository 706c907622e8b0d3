//! How a transition can end, and what went wrong on the way.

use super::plan::{HookId, ParticipantId};
use crate::message::{Epoch, Phase};
use std::fmt;

/// How a transition ended. There are these five ways and no other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// All participants are in the target state.
    Done,
    /// Nobody was fenced; all participants are in the state that they had.
    RolledBack,
    /// Nobody was fenced; all participants are in STOP because the policy says so.
    Stopped,
    /// At least one participant was fenced; all others are where the machine is.
    Degraded {
        /// Where all others are.
        machine: MachineState,
        /// Who was fenced, with a proof, and why.
        fenced: Vec<(ParticipantId, Loss)>,
    },
    /// Something could not be proven in time. Everything that can be is in STOP, and nothing
    /// starts until the proof comes or the owner decides.
    Held {
        /// What could not be proven; never empty.
        reasons: Vec<HeldReason>,
        /// Who was fenced, with a proof, and why.
        fenced: Vec<(ParticipantId, Loss)>,
    },
}

impl Outcome {
    /// The outcome's name: `Done`, `RolledBack`, `Stopped`, `Degraded` or `Held`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done => "Done",
            Self::RolledBack => "RolledBack",
            Self::Stopped => "Stopped",
            Self::Degraded { .. } => "Degraded",
            Self::Held { .. } => "Held",
        }
    }
}

/// Where a machine is as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MachineState {
    /// Its participants run (RUNNING or PRE_COPY).
    Running,
    /// Its participants are stopped (STOP, STOP_COPY or RESUMING).
    Stopped,
    /// Something about it is not proven; whatever could be stopped is.
    Held,
    /// It was stopped for the time of a lease, and that ran out for at least one of its participants,
    /// which has gone to RUNNING_P2P by itself. The others are stopped. No transition ends so.
    LeaseExpired,
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Held => "held",
            Self::LeaseExpired => "lease-expired",
        })
    }
}

/// Why a participant does not count any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Loss {
    /// It did not answer within its deadline.
    Timeout,
    /// Its process ended.
    Exited,
    /// Its control channel was closed.
    Disconnected,
    /// It broke the protocol.
    Protocol,
    /// It refused a step that could not be done without it.
    Refused,
    /// It gave no signs of life, or its data threads had something to do and made no progress.
    Hung,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Timeout => "no answer within the deadline",
            Self::Exited => "its process ended",
            Self::Disconnected => "its control channel was closed",
            Self::Protocol => "it broke the protocol",
            Self::Refused => "it refused",
            Self::Hung => "it hangs",
        })
    }
}

/// Why a transition ended in [`Outcome::Held`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeldReason {
    /// The participant was to be fenced and the proof did not come within the grace.
    FenceUnproven(ParticipantId),
    /// The in-VMM participant did not answer; it cannot be fenced.
    LocalHung(ParticipantId),
    /// The hook did not return within its deadline; it cannot be fenced.
    HookHung(HookId),
    /// The hook failed where there was no way back.
    HookFailed(HookId),
    /// The undo did not end within its budget, or the hold did not and somebody is not stopped.
    UndoExpired,
    /// A machine was taken over in which somebody had reached STOP: it may run elsewhere.
    TakenOverStopped,
    /// Another coordinator with a higher term has taken the machine over.
    Superseded,
}

/// Who failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A participant.
    Participant(ParticipantId),
    /// A hook.
    Hook(HookId),
    /// The owner of the machine, who gave up.
    Owner,
}

/// How it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// It said no, and stays where it is.
    Refused,
    /// It does not count any more.
    Lost(Loss),
    /// It did not return within its deadline.
    Hung,
    /// The fence was not proven within the grace.
    FenceUnproven,
    /// It has left STOP, since its lease ran out before the stop had ended.
    LeaseExpired,
    /// It gave the transition up.
    Cancelled,
}

/// One thing that went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Who.
    pub subject: Subject,
    /// How.
    pub kind: FailureKind,
    /// The epoch that was current.
    pub epoch: Epoch,
    /// The phase that was current, if one was.
    pub phase: Option<Phase>,
}
