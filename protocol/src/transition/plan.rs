//! What a transition is to do: its participants, hooks and budgets, and the table of targets.

use crate::message::{Epoch, PeerDma, Term};
use crate::migration::{MigrationFlags, MigrationState};
use std::fmt;
use thiserror::Error;

/// Number of a participant in its machine; never used again for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParticipantId(pub u32);

/// Number of a hook in its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HookId(pub u32);

/// What a transition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Running to stopped.
    Pause,
    /// Running or pre-copying to STOP_COPY: the last step of a migration at its source.
    SwitchOver,
    /// Fresh devices take over saved states: the last step of a migration at its destination.
    Load,
    /// Stopped to running.
    Resume,
    /// A coordinator finds devices that another one has left behind.
    TakeOver,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pause => "pause",
            Self::SwitchOver => "switch-over",
            Self::Load => "load",
            Self::Resume => "resume",
            Self::TakeOver => "take-over",
        })
    }
}

/// What an operation does with a participant that is in a given state when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// Where the two phases lead; both may be the present state.
    Take {
        /// The target of the first phase.
        first: MigrationState,
        /// The target of the second phase.
        second: MigrationState,
    },
    /// The operation is refused before anything was sent, with this reason.
    Refuse(&'static str),
}

/// The row of an operation and a participant's state at its beginning.
///
/// Participants that are where the operation leads are told all the same: their answer shows that
/// they are alive and where they are. A stream that is being read is never ended by a pause.
/// (A take-over has no row: it asks first.)
#[must_use]
pub fn row(operation: Operation, state: MigrationState) -> Row {
    use MigrationState as S;
    use Operation as O;
    let take = |first, second| Row::Take { first, second };
    match (operation, state) {
        (_, S::Error) => Row::Refuse("it is in ERROR and must be reset first"),

        (O::Pause, S::Running | S::RunningP2p) => take(S::RunningP2p, S::Stop),
        (O::Pause, S::PreCopy | S::PreCopyP2p) => take(S::PreCopyP2p, S::StopCopy),
        (O::Pause, S::Stop) => take(S::Stop, S::Stop),
        (O::Pause, S::StopCopy) => take(S::StopCopy, S::StopCopy),
        (O::Pause, S::Resuming) => take(S::Resuming, S::Resuming),

        (O::SwitchOver, S::Running | S::RunningP2p) => take(S::RunningP2p, S::StopCopy),
        (O::SwitchOver, S::PreCopy | S::PreCopyP2p) => take(S::PreCopyP2p, S::StopCopy),
        (O::SwitchOver, S::Stop) => take(S::Stop, S::StopCopy),
        (O::SwitchOver, S::StopCopy) => take(S::StopCopy, S::StopCopy),
        (O::SwitchOver, S::Resuming) => Row::Refuse("its state is being loaded"),

        (O::Resume, S::Stop | S::StopCopy | S::RunningP2p) => take(S::RunningP2p, S::Running),
        (O::Resume, S::Running) => take(S::Running, S::Running),
        (O::Resume, S::PreCopy) => take(S::PreCopy, S::PreCopy),
        (O::Resume, S::PreCopyP2p) => take(S::PreCopyP2p, S::PreCopy),
        (O::Resume, S::Resuming) => Row::Refuse("its state is only half loaded"),

        (O::Load, S::Stop | S::Running | S::RunningP2p | S::Resuming) => take(S::Resuming, S::Stop),
        (O::Load, S::PreCopy | S::PreCopyP2p | S::StopCopy) => {
            Row::Refuse("its state is being saved")
        }

        (O::TakeOver, state) => take(state, state),
    }
}

/// What happens to the survivors when an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnFailure {
    /// They go back to where they were.
    Rollback,
    /// They go to STOP and stay there.
    StayStopped,
}

/// What the loss of a participant means for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnLoss {
    /// It fails.
    Fail,
    /// It goes on without that participant, once that is fenced.
    ContinueWithout,
}

/// Which phases a stop has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phases {
    /// Both: every machine in earnest.
    Two,
    /// A stop leaves the first one out. **Unsafe for peers**: it exists to show what the first
    /// phase is for, and that an oracle notices when it is missing.
    SecondOnly,
}

/// Where a participant lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberKind {
    /// In a process of its own: it can be fenced.
    Process,
    /// In the VMM: it cannot.
    Local,
}

/// One participant of a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Its number.
    pub id: ParticipantId,
    /// Where it lives.
    pub kind: MemberKind,
    /// Where it is.
    pub state: MigrationState,
    /// The states that it has.
    pub flags: MigrationFlags,
    /// Whether DMA between it and its peers is possible.
    pub peer_dma: PeerDma,
    /// Its owner says that it may go without a first phase although it has peers.
    pub one_phase_allowed: bool,
    /// What its loss means.
    pub on_loss: OnLoss,
    /// Budget of the first phase, in nanoseconds.
    pub first_ns: u64,
    /// Budget of the second phase, in nanoseconds.
    pub second_ns: u64,
    /// Lease of a stop, in nanoseconds; 0 for none.
    pub lease_ns: u64,
}

/// Where in a stop or a start a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    /// Before the first phase.
    Before,
    /// Between the phases.
    Between,
    /// After the second phase.
    After,
}

impl Slot {
    /// The slot that undoes this one in the other direction.
    #[must_use]
    pub fn mirrored(self) -> Self {
        match self {
            Self::Before => Self::After,
            Self::Between => Self::Between,
            Self::After => Self::Before,
        }
    }
}

/// What a hook is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HookMoment {
    /// The machine stops.
    Stop,
    /// The machine starts.
    Start,
}

/// Something inside the VMM that runs at a fixed place of a stop and of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hook {
    /// Its number.
    pub id: HookId,
    /// Where it runs in a stop.
    pub stop: Slot,
    /// Where it runs in a start.
    pub start: Slot,
    /// Order within its slot of a stop, ascending; equal ranks run at the same time.
    pub stop_rank: i32,
    /// Order within its slot of a start, ascending.
    pub start_rank: i32,
    /// Budget of one call, in nanoseconds.
    pub budget_ns: u64,
    /// True if it was called for a stop and not for a start since.
    pub stopped: bool,
}

/// What a transition is to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// What for.
    pub operation: Operation,
    /// The coordinator's term.
    pub term: Term,
    /// The first epoch to use; an undo uses those that follow.
    pub epoch: Epoch,
    /// Everybody who takes part.
    pub members: Vec<Member>,
    /// Everything that runs between them.
    pub hooks: Vec<Hook>,
    /// Which phases a stop has.
    pub phases: Phases,
    /// What happens on a failure.
    pub on_failure: OnFailure,
    /// Budget of a whole undo, and of a whole hold, in nanoseconds.
    pub undo_ns: u64,
    /// How long a fence may take to be proven, in nanoseconds.
    pub fence_ns: u64,
}

/// Why a plan is refused before anything is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PlanError {
    /// A participant is in a state from which the operation does not go.
    #[error("{operation} is not possible: participant {} is in {state}: {reason}", id.0)]
    State {
        /// The operation.
        operation: Operation,
        /// The participant.
        id: ParticipantId,
        /// Its state.
        state: MigrationState,
        /// Why not.
        reason: &'static str,
    },
    /// A participant has no P2P states, and peers that it could write into, or they into it.
    #[error(
        "participant {} has no P2P states and is not alone: without a first phase its DMA could \
         reach a peer that is stopped already (allow it with one-phase = \"allow\")", id.0
    )]
    OnePhase {
        /// The participant.
        id: ParticipantId,
    },
    /// A participant's state can neither be saved nor loaded.
    #[error("{operation} is not possible: participant {} has no state that can be saved or loaded", id.0)]
    NoState {
        /// The operation.
        operation: Operation,
        /// The participant.
        id: ParticipantId,
    },
    /// Two participants have the same number.
    #[error("participant {} is there twice", id.0)]
    Twice {
        /// The number.
        id: ParticipantId,
    },
    /// Two hooks have the same number.
    #[error("hook {} is there twice", id.0)]
    HookTwice {
        /// The number.
        id: HookId,
    },
}

impl Plan {
    /// Checks the plan against the table of [`row`]s and the rule for devices without P2P states.
    ///
    /// # Errors
    ///
    /// The first participant or hook that does not fit.
    pub fn check(&self) -> Result<(), PlanError> {
        let mut ids: Vec<_> = self.members.iter().map(|member| member.id).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(PlanError::Twice { id: pair[0] });
        }
        let mut hooks: Vec<_> = self.hooks.iter().map(|hook| hook.id).collect();
        hooks.sort_unstable();
        if let Some(pair) = hooks.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(PlanError::HookTwice { id: pair[0] });
        }
        let alone = self.members.len() == 1;
        for member in &self.members {
            let Member { id, state, .. } = *member;
            if let Row::Refuse(reason) = row(self.operation, state)
                && self.operation != Operation::TakeOver
            {
                return Err(PlanError::State { operation: self.operation, id, state, reason });
            }
            let stream = matches!(self.operation, Operation::SwitchOver | Operation::Load);
            if stream && !member.flags.stop_copy() {
                return Err(PlanError::NoState { operation: self.operation, id });
            }
            let barrier = !matches!(self.operation, Operation::Load | Operation::TakeOver);
            let safe = member.flags.p2p()
                || alone
                || member.one_phase_allowed
                || member.peer_dma == PeerDma::RamOnly;
            if barrier && !safe {
                return Err(PlanError::OnePhase { id });
            }
        }
        Ok(())
    }
}
