//! Logs of a device process.
//!
//! With a coordinator: one JSON object on each line of standard error, which is a pipe that the
//! coordinator reads; it names the term and the epoch that the device knew. Standalone: text for a
//! person. The filter is `RUST_LOG`, by default [`DEFAULT_FILTER`].
//!
//! Writing never waits: a coordinator that does not read its pipe must not stop the device. A line
//! that cannot be written at once, or is longer than [`LONGEST_LINE`], is dropped and counted
//! ([`dropped`]); the count travels in the heartbeats.

#![forbid(unsafe_code)]

mod json;

use json::JsonLines;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::JsonFields;

pub(crate) use json::knows;

/// What is logged unless `RUST_LOG` says otherwise.
pub const DEFAULT_FILTER: &str = "info";

/// The longest line in bytes. A pipe that says it is writable takes that much at once (`PIPE_BUF`
/// of Linux), so writing it does not wait.
pub const LONGEST_LINE: usize = 4096;

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// How many lines this process has dropped so far.
#[must_use]
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// An error with its causes, in one line.
pub(crate) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some repeat their cause.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object on each line.
    Json,
    /// Text for a person.
    Text,
}

/// Sends this process's log lines to standard error from now on. Does nothing if the process has
/// a subscriber already.
pub fn start(format: LogFormat) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(Lines(io::stderr()));
    let started = match format {
        LogFormat::Json => lines.fmt_fields(JsonFields::new()).event_format(JsonLines).try_init(),
        LogFormat::Text => lines.with_ansi(false).try_init(),
    };
    if let Err(error) = started {
        tracing::debug!(%error, "the log lines go elsewhere already");
    }
}

/// Makes a pipe this process's standard error, so that its log lines go there from now on; those
/// that found no reader before count as dropped.
///
/// # Errors
///
/// `InvalidInput` if it is no pipe: a line goes whole and without waiting only into one. Otherwise
/// those of dup2(2). Standard error stays what it was.
pub(crate) fn attach(pipe: &OwnedFd) -> io::Result<()> {
    if FileType::from_raw_mode(fstat(pipe)?.st_mode) != FileType::Fifo {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no pipe"));
    }
    Ok(nix::unistd::dup2_stderr(pipe)?)
}

/// Writes a line to standard error, or drops and counts it.
pub(crate) fn write_to_stderr(line: &[u8]) {
    write_line(io::stderr().as_fd(), line);
}

fn write_line(to: BorrowedFd<'_>, line: &[u8]) {
    if !try_write(to, line) {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a line if that can be done without waiting; false if it was not written.
fn try_write(to: BorrowedFd<'_>, line: &[u8]) -> bool {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if line.len() > LONGEST_LINE {
        return false;
    }
    // Never waits for long: whoever holds it does not wait either. A thread that panicked inside
    // has left nothing half done.
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut fds = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let writable = poll(&mut fds, Some(&now)).is_ok_and(|ready| ready == 1)
        && fds[0].revents().contains(PollFlags::OUT);
    writable && rustix::io::write(to, line).is_ok_and(|written| written == line.len())
}

/// Gives the subscriber a writer for each line.
struct Lines<F>(F);

impl<'a, F: AsFd> MakeWriter<'a> for Lines<F>
where
    F: 'a,
{
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self.0.as_fd())
    }
}

/// The subscriber formats a line and writes it in one call.
struct Line<'a>(BorrowedFd<'a>);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        write_line(self.0, line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_full_pipe_takes_whole_lines_only_and_nobody_waits() {
        let (mut reader, writer) = io::pipe().unwrap();
        let line = [b'x'; LONGEST_LINE];
        // More than any pipe holds by default.
        let written = (0..64).filter(|_| try_write(writer.as_fd(), &line)).count();
        assert!(written > 0, "an empty pipe takes a line");
        assert!(written < 64, "a full pipe does not");
        drop(writer);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), written * LONGEST_LINE);
    }

    #[test]
    fn a_line_that_is_too_long_is_dropped_whole_and_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let lines = Lines(writer);
        let before = dropped();
        lines.make_writer().write_all(&[b'x'; LONGEST_LINE + 1]).unwrap();
        assert!(dropped() > before);
        lines.make_writer().write_all(b"short\n").unwrap();
        drop(lines);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"short\n");
    }

    #[test]
    fn causes_are_told_once() {
        let device = crate::device::DeviceError::new("no disk");
        assert_eq!(with_causes(&device), "no disk");
        let error = crate::serve::ServeError::Build(device);
        assert_eq!(with_causes(&error), "the device cannot be built: no disk");
    }
}
