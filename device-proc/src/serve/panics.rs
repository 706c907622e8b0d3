//! What a panic does to a device process.
//!
//! Half a device process would go on acknowledging what it no longer does: so a panic of any
//! thread ends the process at once.

use crate::log;
use std::sync::Once;

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
            std::process::abort();
        }));
    });
}
