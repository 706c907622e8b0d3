//! What a panic does to a device process.
//!
//! Half a device process would go on acknowledging what it no longer does: so a panic of any
//! thread ends the process at once. The exception is code that only takes a client's bytes apart:
//! a panic there ends that client's connection ([`contained`]).

use crate::log;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use thiserror::Error;

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Something contained has panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("it panicked")]
pub(crate) struct Panicked;

/// Makes a panic of any thread end the process by `abort`, from now on.
pub(super) fn abort_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("unnamed");
            let text = panic.to_string().replace('\n', " ");
            let mut line = format!("device process: thread {name}: {text}");
            while line.len() >= log::LONGEST_LINE {
                line.pop();
            }
            line.push('\n');
            log::write_to_stderr(line.as_bytes());
            if !CONTAINED.get() {
                std::process::abort();
            }
        }));
    });
}

/// Runs something whose panic only means that it has failed.
///
/// It must leave nothing behind that others see half done.
pub(crate) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    let before = CONTAINED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(before);
    result.map_err(|_| Panicked)
}

/// Runs something inside [`contained`] whose panic ends the process all the same.
pub(crate) fn strict<T>(work: impl FnOnce() -> T) -> T {
    let before = CONTAINED.replace(false);
    let result = work();
    CONTAINED.set(before);
    result
}
