//! The coordinator's side of the barrier: a state machine without sockets, clocks or threads.
//!
//! A [`Transition`] moves all participants of a machine from one state to another. It is made from
//! a [`Plan`], fed [`Event`]s and gives back [`Effect`]s; when it gives [`Effect::Finish`] it is
//! over. Events are commands, answers, losses, fence proofs and deadline expiries; effects are
//! sends, fences, hook calls, timers and the end.
//!
//! ```text
//!  forward   hooks ─ phase 1 ─┤barrier├─ hooks ─ phase 2 ─┤barrier├─ hooks ─► Done
//!                       │ failure                 │ failure               └► Degraded
//!                       ▼                         ▼
//!  undo      wait for fences ─ the row of the undo table ─► RolledBack, Stopped, Degraded
//!                       │ cannot be proven
//!                       ▼
//!  hold      everything that can be goes to STOP ─► Held
//! ```
//!
//! The rules that it keeps, whatever the events are and in whatever order they come:
//!
//! - nobody is told the second phase before everybody who is not fenced has reached the first;
//! - an answer counts only if its term, epoch and phase are those that were asked for;
//! - a participant that is silent at its deadline is fenced, never assumed to have answered;
//! - nothing is started while a fence is not proven;
//! - every transition ends in exactly one [`Outcome`], within budgets that are fixed at its
//!   beginning.

mod machine;
mod outcome;
mod plan;
mod undo;

#[cfg(test)]
mod tests;

pub use machine::{Answer, Effect, Event, Timer, Transition};
pub use outcome::{Failure, FailureKind, HeldReason, Loss, MachineState, Outcome, Subject};
pub use plan::{
    Hook, HookId, HookMoment, Member, MemberKind, OnFailure, OnLoss, Operation, ParticipantId,
    Phases, Plan, PlanError, Row, Slot, row,
};
pub use undo::{UNDO, UndoRow, UndoStep};
