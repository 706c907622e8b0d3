//! The transport towards the VMM: vfio-user over a Unix socket.
//!
//! | module | |
//! |---|---|
//! | `listener` | makes the data socket |
//! | `server` | the thread that serves one client after another |
//! | `connection` | how it serves one: how it waits, and what it does at the edge of a stop |
//! | `link` | bytes and fds in, replies out |
//! | `session` | what is done about each message, and what is answered: no socket, no thread |
//! | `requests` | what this end asks of the client: DMA by messages |
//! | `backlog` | what has come while another message was carried out |
//! | `kept` | posted writes that have come while the device is stopped |
//! | `share` | how many of the process's fds a client may have |
//! | `doorbells` | eventfds that stand for writes |
//! | `endpoint` | what a client may do with a device, whatever transport it comes over |
//!
//! The messages themselves are `standstill-vfio-user`'s. What is served, and what is left out, is in
//! `docs/vfio-user.md`.
//!
//! One client at a time is served; when it goes, its DMA windows and eventfds go with it, the
//! device, its state and its migration state stay for the next one. Nothing that a client sends
//! does more than end its connection.

#![forbid(unsafe_code)]

pub(crate) mod endpoint;
pub(crate) mod listener;
pub(crate) mod server;

mod backlog;
mod connection;
mod doorbells;
#[cfg(fuzzing)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "a panic is how a fuzz target fails")]
pub mod fuzzing;
mod kept;
mod link;
mod requests;
#[cfg(any(test, fuzzing))]
#[expect(clippy::unwrap_used, clippy::panic, reason = "a panic is how a test fails")]
#[cfg_attr(fuzzing, expect(dead_code, reason = "a fuzz target needs a part of it"))]
mod rig;
mod session;
mod share;

pub use listener::ListenError;
