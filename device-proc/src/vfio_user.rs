//! The transport towards the VMM: vfio-user over a Unix socket.
//!
//! `endpoint` says what a client may do with a device and does it; it knows no bytes.
//! `server` is the transport: today the rust-vmm `vfio_user` crate's server with an adapter
//! (`adapter`) between the two, on a thread of its own. Another transport takes the place of
//! those two and calls the same endpoint. `listener` makes the data socket.
//!
//! One client at a time is served; when it goes, its DMA windows and eventfds go with it, the
//! device and its state stay for the next one.
//!
//! # Limits of the present transport
//!
//! The crate (0.1.7) has these, and nothing here can mend them:
//!
//! - A `VERSION` message that is too short, or whose JSON has no terminating NUL, panics in the
//!   crate: that ends the connection, with a line in the log and without an answer.
//! - A header that arrives in two pieces, or a body whose length is not what the header says,
//!   puts the stream out of step; a message cut short blocks the thread until the client goes.
//! - The counts of accesses are believed before anything here sees them: a read of 4 GiB is
//!   allocated first and refused afterwards.
//! - Refusals of the device reach the client as error replies with errno 0; the crate drops the
//!   number that the endpoint gives.
//! - Commands 6, 11, 12 and 14 and above (the migration commands among them) and `DATA_BOOL` are
//!   refused without their bodies being read, which puts the stream out of step.
//! - What waits in the socket when the device is stopped is not executed before the stop, but
//!   refused while it lasts: a client has to be quiet before its device is stopped.

#![forbid(unsafe_code)]

pub(crate) mod endpoint;
pub(crate) mod listener;
pub(crate) mod server;

mod adapter;

pub use listener::ListenError;
