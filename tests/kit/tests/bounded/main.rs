//! What a coordinator may take of its process: heap, threads and file descriptors, with devices that
//! do what they can to make it take more, and over thousands of transitions.
//!
//! `cargo test -p standstill-testkit --test bounded -- --nocapture` prints the figures of
//! `docs/verification.md`.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is how a test fails, in the functions that tests share too"
)]

mod alone;
mod endurance;
#[expect(dead_code, reason = "other tests use the rest of it")]
#[path = "../machines/fixture.rs"]
mod fixture;
mod hostile;
mod memory;
mod process;
