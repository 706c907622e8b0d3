//! The system that is checked: the shipped machines of both ends, with FIFO links between them.
//!
//! `docs/verification.md` says what is modelled and what is not.

pub(crate) mod action;
pub(crate) mod coordinator;
pub(crate) mod device;
pub(crate) mod oracle;
pub(crate) mod report;
pub(crate) mod rule;
pub(crate) mod scenario;
pub(crate) mod shared;
pub(crate) mod symmetry;
pub(crate) mod world;
