//! `standstill run` and the commands that talk to it, as an operator uses them: the real command,
//! real device processes, real sockets.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a panic is how a test fails")]

mod attach;
mod disk;
mod ending;
mod files;
mod fixture;
mod hostile;
mod leases;
mod lifecycle;
mod membership;
mod metrics;
mod outcomes;
mod permissions;
mod qmp;
mod service;
mod shell;
mod strangers;
mod top;
mod trace;
