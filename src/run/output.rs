//! What `standstill run` says to whoever started it, on standard output.
//!
//! A thread of its own writes it, so that a pipe that nobody reads, or a terminal that was stopped,
//! holds neither the machine nor its end up.

use std::io::{self, Write};
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};

/// How many texts may wait to be written; more are left out.
const WAITING: usize = 1024;

/// Standard output, until it is dropped: what waits is written then, for a second at most.
#[derive(Debug)]
pub(super) struct Output {
    writer: NonBlocking,
    _guard: WorkerGuard,
}

impl Output {
    pub(super) fn start() -> Self {
        let (writer, guard) = NonBlockingBuilder::default()
            .buffered_lines_limit(WAITING)
            .lossy(true)
            .thread_name("output")
            .finish(io::stdout());
        Self { writer, _guard: guard }
    }

    /// Writes a text as a line, or as several.
    pub(super) fn say(&self, text: &str) {
        // A reader that has gone away wants no more.
        let _ = self.writer.clone().write_all(format!("{}\n", text.trim_end()).as_bytes());
    }
}
