//! Faults from outside, on real processes.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is how a test fails, in the functions that tests share too"
)]

mod coordinators;
mod disks;
mod fixture;
mod machines;
mod relays;
mod strangers;

standstill_testkit::programs!();
