//! Reference devices: small, complete, and good to copy from.

pub mod copy_engine;
pub mod vhost_user_blk;
