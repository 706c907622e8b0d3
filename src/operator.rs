//! The operator socket: how the `standstill` command talks to a running `standstill run`.
//!
//! - [`message`]: what travels, a JSON object on each line; `docs/operator-socket.md` says it to the
//!   byte;
//! - [`server`] and [`connection`]: the end of `standstill run`;
//! - [`history`]: the last events and reports, for whoever asks later;
//! - [`client`]: the end of the commands.

pub(crate) mod client;
pub(crate) mod connection;
pub(crate) mod history;
pub(crate) mod message;
pub(crate) mod server;
