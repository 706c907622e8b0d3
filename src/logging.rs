//! The log of this command: its own lines and those of its device processes, on standard error.
//!
//! A thread of its own writes it, so that a standard error that nobody reads holds nothing up: a
//! line for which there is no room is dropped and counted.

use clap::{Args, ValueEnum};
use std::io::{self, IsTerminal, Write};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// How many lines may wait to be written; none is much longer than 8 KiB.
const WAITING: usize = 4096;

/// How the log looks.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct LogArgs {
    /// How log lines on standard error look
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Text for a person.
    Text,
    /// One JSON object on each line.
    Json,
}

/// The log, until it is dropped: what waits is written then, for a second at most.
#[derive(Debug)]
#[must_use = "the log ends when it is dropped"]
pub(crate) struct Log {
    dropped: ErrorCounter,
    writer: NonBlocking,
    _guard: WorkerGuard,
}

impl Log {
    /// Counts the lines that were dropped, since there was no room for them.
    pub(crate) fn dropped(&self) -> ErrorCounter {
        self.dropped.clone()
    }

    /// Writes a text for a person after the lines that came before it.
    pub(crate) fn tell(&self, text: &str) {
        // Nobody is left to be told if standard error is closed.
        let _ = self.writer.clone().write_all(format!("{text}\n").as_bytes());
    }
}

/// Starts the log. What is in it is what `RUST_LOG` says, or `default` without that variable.
pub(crate) fn start(args: LogArgs, default: &str) -> Log {
    let (filter, refused) = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(text) => match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(error) => (EnvFilter::new(default), Some(error)),
        },
        Err(_) => (EnvFilter::new(default), None),
    };
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING)
        .lossy(true)
        .thread_name("log")
        .finish(io::stderr());
    let dropped = writer.error_counter();
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer.clone())
        .with_ansi(io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().with_current_span(false).init(),
    }
    if let Some(error) = refused {
        tracing::warn!(%error, default, "RUST_LOG is no filter; the default one is used");
    }
    Log { dropped, writer, _guard: guard }
}
