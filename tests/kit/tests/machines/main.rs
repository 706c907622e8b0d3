//! Machines of real processes that keep to the protocol, and of such that do not.
//!
//! The modules with a number test the invariant of that number (see `docs/architecture.md`); what
//! is proven about an order is read from the trace of those who were told, not from the report.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is how a test fails, in the functions that tests share too"
)]

mod blocking;
mod broken_answers;
mod dirty;
mod fixture;
mod greetings;
mod guard;
mod hangs;
mod hooks;
mod in_vmm_participants;
mod invariant_10_boundaries;
mod invariant_10_orphans;
mod invariant_1_barrier;
mod invariant_4_concurrency;
mod invariant_7_terms_and_epochs;
mod invariant_8_bounded;
mod joining;
mod leases;
mod left_behind;
mod logs;
mod losses;
mod membership;
mod memory;
mod newcomers;
mod one_phase;
mod refusals;
mod restarts;
mod steps;
mod supervised;
mod two_coordinators;
mod undo_table;
