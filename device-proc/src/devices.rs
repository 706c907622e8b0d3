//! Reference devices: small, complete, and good to copy from.

pub mod copy_engine;
