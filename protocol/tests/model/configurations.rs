//! What is checked: bounds that make each configuration exhaustive in seconds.

use crate::machine::rule::Antecedent::{self, *};
use crate::machine::scenario::{Faults, Scenario, Successor};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{OnFailure, Operation};

/// Each kind of fault at most once, and at most `total` in all.
fn every(total: u8) -> Faults {
    Faults { crashes: 1, refusals: 1, errors: 1, timeouts: 1, unproven: 1, repeats: 1, total }
}

/// As [`every`], without messages that come again and devices in ERROR.
fn some(total: u8) -> Faults {
    Faults { errors: 0, repeats: 0, ..every(total) }
}

const NO_FAULT: &[Antecedent] =
    &[SecondPhase, EverybodyStopped, PromisedQuiet, Done, SecondOperation];

/// What any configuration with two faults reaches; what only some reach is added.
macro_rules! two_faults {
    ($($also:ident),*) => {
        &[
            SecondPhase, SecondPhaseWithoutAFenced, EverybodyStopped, PromisedQuiet, Silence,
            Unproven, LateProof, StartAfterAFence, Refusal, ErrorState, StartUndone,
            TwoUndoEpochs, Done, Degraded, Held, RepeatedCommand, RepeatedAnswer, OtherEpoch,
            SecondOperation, LossBetween, $($also),*
        ]
    };
}

pub(crate) fn one_and_two() -> Vec<Scenario> {
    let after = Scenario { successor: Successor::AfterDeath, ..Scenario::new("", 2) };
    let beside = Scenario { successor: Successor::BesideTheFirst, ..Scenario::new("", 2) };
    vec![
        Scenario { reaches: NO_FAULT, ..Scenario::new("pause, resume", 2) },
        Scenario {
            faults: every(2),
            reaches: two_faults!(RolledBack),
            ..Scenario::new("pause, resume; 2 faults", 2)
        },
        Scenario {
            faults: every(2),
            on_failure: OnFailure::StayStopped,
            reaches: two_faults!(Stopped),
            ..Scenario::new("pause, resume; stay stopped; 2 faults", 2)
        },
        Scenario {
            faults: every(2),
            hook: true,
            last_is_optional: true,
            reaches: two_faults!(RolledBack, HookFailed, HookHung),
            ..Scenario::new("pause, resume; a hook, an optional device; 2 faults", 2)
        },
        Scenario {
            faults: every(2),
            hook: true,
            last_from: Some(MigrationState::RunningP2p),
            reaches: two_faults!(Stopped, HookFailed, HookHung),
            ..Scenario::new("pause of what a hold has left half, resume; a hook; 2 faults", 2)
        },
        Scenario {
            faults: every(2),
            operations: &[Operation::SwitchOver, Operation::Resume],
            from: MigrationState::PreCopy,
            reaches: two_faults!(RolledBack),
            ..Scenario::new("switch-over from PRE_COPY, resume; 2 faults", 2)
        },
        Scenario {
            name: "pause, resume; take-over after a death; 1 fault",
            faults: every(1),
            reaches: &[
                LowerTerm,
                TakeOverDone,
                TakeOverRolledBack,
                TakeOverHeld,
                HeldWhileStopping,
            ],
            ..after.clone()
        },
        Scenario {
            name: "pause; take-over after a death; 2 faults",
            operations: &[Operation::Pause],
            faults: some(2),
            reaches: &[LowerTerm, TakeOverDone, TakeOverRolledBack, TakeOverHeld, Unproven],
            ..after
        },
        Scenario {
            name: "pause, resume; take-over beside the first",
            reaches: &[
                LowerTerm,
                TakeOverDone,
                TakeOverRolledBack,
                TakeOverHeld,
                FirstActsLater,
                Superseded,
            ],
            ..beside.clone()
        },
        Scenario {
            name: "pause; take-over beside the first; 1 crash",
            operations: &[Operation::Pause],
            faults: Faults { crashes: 1, total: 1, ..Faults::default() },
            reaches: &[LowerTerm, TakeOverRolledBack, TakeOverHeld, FirstActsLater, Superseded],
            ..beside.clone()
        },
        // The first one may kill a device that the second one is just talking to.
        Scenario {
            name: "pause; take-over beside the first; 1 timeout",
            devices: 1,
            operations: &[Operation::Pause],
            faults: Faults { timeouts: 1, total: 1, ..Faults::default() },
            reaches: &[LowerTerm, TakeOverRolledBack, TakeOverHeld, FirstActsLater, Silence],
            ..beside
        },
    ]
}

pub(crate) fn three() -> Vec<Scenario> {
    let after = Scenario { successor: Successor::AfterDeath, ..Scenario::new("", 3) };
    let beside = Scenario { successor: Successor::BesideTheFirst, ..Scenario::new("", 3) };
    vec![
        Scenario {
            faults: every(1),
            reaches: &[Silence, StartAfterAFence, Refusal, StartUndone, TwoUndoEpochs, Degraded],
            ..Scenario::new("pause, resume; 1 fault", 3)
        },
        Scenario {
            faults: Faults { timeouts: 0, ..some(2) },
            operations: &[Operation::Pause],
            reaches: &[Unproven, StartAfterAFence, Refusal, TwoUndoEpochs, Held],
            ..Scenario::new("pause; 2 faults, no timeout", 3)
        },
        Scenario {
            name: "pause, resume; take-over after a death",
            reaches: &[LowerTerm, TakeOverDone, TakeOverRolledBack, TakeOverHeld],
            ..after.clone()
        },
        Scenario {
            name: "pause; take-over after a death; 1 crash",
            operations: &[Operation::Pause],
            faults: Faults { crashes: 1, total: 1, ..Faults::default() },
            reaches: &[LowerTerm, TakeOverRolledBack, TakeOverHeld, StartAfterAFence],
            ..after
        },
        Scenario {
            name: "pause; take-over beside the first",
            operations: &[Operation::Pause],
            reaches: &[LowerTerm, TakeOverRolledBack, TakeOverHeld, FirstActsLater, Superseded],
            ..beside
        },
    ]
}

/// What takes minutes. For the run with symmetry: all devices are alike, and no message is kept.
pub(crate) fn four() -> Vec<Scenario> {
    let errors = Faults { errors: 1, ..some(1) };
    vec![
        Scenario { reaches: NO_FAULT, ..Scenario::new("pause, resume", 4) },
        Scenario {
            faults: errors,
            reaches: &[Silence, StartAfterAFence, Refusal, StartUndone, TwoUndoEpochs, Degraded],
            ..Scenario::new("pause, resume; 1 fault", 4)
        },
        Scenario {
            successor: Successor::AfterDeath,
            reaches: &[LowerTerm, TakeOverDone, TakeOverRolledBack, TakeOverHeld],
            ..Scenario::new("pause, resume; take-over after a death", 4)
        },
        Scenario {
            operations: &[Operation::Pause],
            faults: some(2),
            reaches: &[Silence, Unproven, StartAfterAFence, Refusal, TwoUndoEpochs, Held],
            ..Scenario::new("pause; 2 faults", 4)
        },
        Scenario {
            successor: Successor::BesideTheFirst,
            operations: &[Operation::Pause],
            faults: Faults { timeouts: 1, total: 1, ..Faults::default() },
            reaches: &[LowerTerm, TakeOverRolledBack, TakeOverHeld, FirstActsLater, Silence],
            ..Scenario::new("pause; take-over beside the first; 1 timeout", 2)
        },
    ]
}
