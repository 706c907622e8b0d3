//! Faults from outside: what befalls a device process, or its coordinator, whatever its program is.
//!
//! - [`relay`]: between a coordinator and a device process: packets that come late, twice, damaged or
//!   never, and signals at exactly that packet.
//! - [`Limit::impose`](crate::plan::Limit::impose): too little memory, files, …
//!
//! Each says when it has fired: [`Fired`].

mod limits;
pub mod relay;

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
