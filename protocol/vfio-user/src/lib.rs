//! The vfio-user protocol: a device in one process, its VM in another, and a Unix socket between.
//!
//! - [`wire`]: the messages, bytes to types and back, without I/O;
//! - [`framing`]: a stream of bytes and file descriptors to whole messages, without I/O;
//! - [`connection`]: a Unix stream socket that carries them, with deadlines;
//! - [`client`]: the client, for all commands.
//!
//! Both ends need these: the server, which is part of `standstill-device-proc`, and clients (VMMs,
//! tests, benchmarks). They are a crate of their own so that a client does not pull in the runtime
//! of device processes, nor a device anything of a VMM.

#![forbid(unsafe_code)]

pub mod client;
pub mod connection;
mod deadline;
pub mod framing;
pub mod wire;

pub use deadline::Deadline;
