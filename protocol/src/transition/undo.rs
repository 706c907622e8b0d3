//! The undo table: what happens to the survivors of a transition that fails.
//!
//! One row per operation, policy and phase that had begun when it failed. Every row begins with a
//! wait for the fences that are under way, and is an epoch (or two) of its own. Hooks that had run
//! are run the other way at their places in the row.

use super::plan::{OnFailure, Operation};
use crate::message::Phase;

/// One step of an undo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UndoStep {
    /// Phase 1 of a stop, again or anew.
    PrepareStop,
    /// To STOP. A participant that refuses and is in a P2P state stays there, where a start
    /// follows.
    Stop,
    /// Phase 1 of a start.
    PrepareStart,
    /// To where each participant was; for one that was pre-copying and had to give its stream up,
    /// to RUNNING.
    Start,
    /// To power-on contents.
    Reset,
    /// The next steps belong to a new epoch.
    NewEpoch,
}

impl UndoStep {
    /// The phase that participants are told, if they are told anything.
    #[must_use]
    pub fn phase(self) -> Option<Phase> {
        Some(match self {
            Self::PrepareStop => Phase::PrepareStop,
            Self::Stop => Phase::Stop,
            Self::PrepareStart => Phase::PrepareStart,
            Self::Start => Phase::Start,
            Self::Reset => Phase::Reset,
            Self::NewEpoch => return None,
        })
    }
}

/// One row of the undo table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoRow {
    /// What failed.
    pub operation: Operation,
    /// The policy.
    pub on_failure: OnFailure,
    /// True if the second phase had begun.
    pub second_phase: bool,
    /// What is done about it.
    pub steps: &'static [UndoStep],
}

/// The undo table.
pub const UNDO: [UndoRow; 12] = {
    use OnFailure::{Rollback, StayStopped};
    use Operation::{Load, Pause, Resume, SwitchOver};
    use UndoStep::{NewEpoch, PrepareStart, PrepareStop, Reset, Start, Stop};
    const fn new(
        operation: Operation,
        on_failure: OnFailure,
        second_phase: bool,
        steps: &'static [UndoStep],
    ) -> UndoRow {
        UndoRow { operation, on_failure, second_phase, steps }
    }
    [
        new(Pause, Rollback, false, &[Start]),
        new(Pause, Rollback, true, &[Stop, NewEpoch, PrepareStart, Start]),
        new(Pause, StayStopped, false, &[PrepareStop, Stop]),
        new(Pause, StayStopped, true, &[Stop]),
        new(SwitchOver, Rollback, false, &[Start]),
        new(SwitchOver, Rollback, true, &[Stop, NewEpoch, PrepareStart, Start]),
        new(SwitchOver, StayStopped, false, &[PrepareStop, Stop]),
        new(SwitchOver, StayStopped, true, &[Stop]),
        new(Resume, Rollback, false, &[Stop]),
        new(Resume, Rollback, true, &[PrepareStop, Stop]),
        // A load has one row: nothing of it can be kept.
        new(Load, Rollback, false, &[Reset, NewEpoch, Stop]),
        new(Load, StayStopped, false, &[Reset, NewEpoch, Stop]),
    ]
};

/// The row for a failure. A resume that fails goes back to STOP under either policy.
pub(super) fn undo_row(
    operation: Operation,
    on_failure: OnFailure,
    second_phase: bool,
) -> &'static [UndoStep] {
    let on_failure = match operation {
        Operation::Resume => OnFailure::Rollback,
        _ => on_failure,
    };
    let second_phase = second_phase && operation != Operation::Load;
    UNDO.iter()
        .find(|row| {
            row.operation == operation
                && row.on_failure == on_failure
                && row.second_phase == second_phase
        })
        .map_or(&[], |row| row.steps)
}
