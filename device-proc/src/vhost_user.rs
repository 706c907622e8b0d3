//! The transport for vhost-user: backends of the `vhost-user-backend` crate under the lifecycle of
//! a device process.
//!
//! [`PopGate`] is what every pop from a ring passes.

#![forbid(unsafe_code)]

mod pop_gate;

pub use pop_gate::{PopGate, Popped};
