//! Device processes as a whole: this test program runs itself as one.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a panic is how a test fails")]

mod child;
mod client;
mod probe;

mod control;
mod copy;
mod data;
mod dirty;
#[cfg(feature = "fault-injection")]
mod faults;
mod fds;
mod foreign;
mod greeting;
mod in_band;
mod revoke;
mod state;
mod takeover;
mod vhost;

/// Not a test: what a stranger of these tests does. Without its variable it is empty.
#[test]
fn stranger() {
    if let Ok(path) = std::env::var(takeover::STRANGER_VARIABLE) {
        takeover::be_a_stranger(path.as_ref());
    }
}

/// Not a test: what a parent of a device process does. Without its variable it is empty.
#[test]
fn parent() {
    if let Ok(folder) = std::env::var(takeover::PARENT_VARIABLE) {
        takeover::be_a_parent(folder.as_ref());
    }
}

/// Not a test: what a device process of these tests does. Without its variable it is empty.
#[test]
fn device_process() {
    if let Ok(socket) = std::env::var(child::SOCKET_VARIABLE) {
        probe::run(&socket);
    }
}
