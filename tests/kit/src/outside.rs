//! Faults from outside: what befalls a device process, or its coordinator, whatever its program is.
//!
//! - [`relay`]: between a coordinator and a device process: packets that come late, twice, damaged or
//!   never, and signals at exactly that packet.
//! - [`data`]: between a device process and its client: messages that come late, damaged, in pieces
//!   or not to their end;
//! - [`disk`]: a small disk that is filled and freed while a program works on it;
//! - [`signals`]: SIGKILL, SIGSTOP and SIGCONT, and their effect seen;
//! - [`hooks`]: hooks that fail and hooks that do not return;
//! - [`Pilot`](crate::Pilot): a coordinator in a process of its own, to be lost, to hang and to come
//!   back; a [`Relay`] does that to it at exactly one packet;
//! - [`Limit::impose`](crate::plan::Limit::impose): too little memory, files, …
//!
//! Each says when it has fired: [`Fired`].

pub mod data;
pub mod disk;
pub mod hooks;
mod limits;
pub mod relay;
pub mod signals;

pub use data::DataRelay;
pub use disk::SmallDisk;
pub use hooks::{FaultyHook, HookFaults};
pub use relay::{Relay, RelayError};

/// A fault has happened: the proof that it was not only planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fired {
    /// Which: counted from 0 in the order in which they were armed.
    pub index: u32,
    /// The how-manieth of its moments it was, from 1.
    pub occurrence: u32,
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
}
