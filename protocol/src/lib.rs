//! What travels between a coordinator and a device process, and the pure rules of both ends.
//!
//! - [`migration`]: the VFIO migration states and which way leads from one to another;
//! - [`message`]: commands, answers, events, capabilities;
//! - [`codec`]: bytes to messages and back, with limits;
//! - [`channel`]: one `SOCK_SEQPACKET` connection that carries messages and file descriptors;
//! - [`fault`]: what a device process built for tests can be told to do wrong;
//! - [`dirty`]: which pages of guest RAM a device has written to, in memory that both map;
//! - [`sealed`]: such memory;
//! - [`transition`]: the coordinator's side of the barrier, a state machine without I/O;
//! - [`lifecycle`]: the device's side, a state machine without I/O.
//!
//! The last two live here, next to each other, so that one model can check them together.
//! `docs/protocol.md` describes the bytes.

pub mod channel;
pub mod codec;
pub mod dirty;
pub mod fault;
pub mod lifecycle;
pub mod message;
pub mod migration;
#[cfg(feature = "mutations")]
pub mod mutation;
#[cfg(not(feature = "mutations"))]
mod mutation;
pub mod sealed;
pub mod transition;
