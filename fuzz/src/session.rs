//! Runs what a target does with one input, and looks whether anything is left of it.

use crate::memory::{live, used_by};
use crate::socket::open_fds;
use signal_hook::consts::SIGPIPE;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};
use tokio::runtime::{Builder, Runtime};

/// Runs a session on a runtime of its own, of one thread, whose clock stands still while there is
/// something to do and jumps when there is nothing.
///
/// # Panics
///
/// As [`checked`].
pub fn run(heap: usize, session: impl Future<Output = ()>) {
    static FIRST: Once = Once::new();
    // What is made once in the life of a process is made.
    FIRST.call_once(|| drop(runtime()));
    checked(heap, || runtime().block_on(session));
}

/// Runs a session.
///
/// # Panics
///
/// If the session takes more than `heap` bytes of the heap at a time; leaves file descriptors open;
/// or if memory is lost from one session to the next.
pub fn checked(heap: usize, session: impl FnOnce()) {
    survive_broken_pipes();
    let fds = open_fds();
    let ((), usage) = used_by(session);
    assert_eq!(open_fds(), fds, "file descriptors are left open");
    assert!(usage.peak <= heap, "a session takes {} bytes of the heap", usage.peak);
    // Not after each: some things are kept. What is lost each time adds up.
    assert!(live() <= heap, "{} bytes of the heap are left behind", live());
}

/// A write to a pipe that nobody reads is an error, as in every program whose `main` is Rust's; one that
/// libFuzzer begins would be ended.
fn survive_broken_pipes() {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        let seen = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGPIPE, seen).expect("a handler for SIGPIPE");
    });
}

fn runtime() -> Runtime {
    let runtime = Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime")
}
