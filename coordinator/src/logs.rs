//! What a device process writes to its standard error becomes part of this program's log.
//!
//! A device process under our runtime writes JSON lines in the shape of `tracing-subscriber`; they
//! are emitted again at their level, with the target `standstill::device` and the fields `device`,
//! `incarnation`, `origin` (their own target), and `term` and `epoch` as the device knew them when it
//! wrote the line. Anything else (a panic, a sanitizer's report, a foreign program's output) is
//! emitted at WARN as it is, without the last three.
//!
//! ```no_run
//! # async fn example(stderr: std::os::fd::OwnedFd) -> std::io::Result<()> {
//! use standstill_coordinator::logs::{LogTail, Origin, forward};
//!
//! let tail = LogTail::default();
//! let origin = Origin { device: "nvme0".into(), incarnation: 1 };
//! tokio::spawn(forward(stderr, origin, tail.clone()));
//! // Should the process end at once, this says why:
//! let last_words = tail.lines();
//! # Ok(())
//! # }
//! ```
//!
//! The text is another process's, which may be hostile: a line is cut at [`MAX_LINE`] bytes, at most
//! [`MAX_LINES_PER_SECOND`] are emitted (the rest is counted: [`LogTail::dropped`]), and control
//! characters are escaped.
#![forbid(unsafe_code)]

mod line;
#[cfg(test)]
mod tests;

pub(crate) use line::clean;

use line::{Rendered, Splitter};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::unix::pipe::Receiver;
use tracing::Level;

/// The longest line in bytes; what is longer is cut there.
pub const MAX_LINE: usize = 8 * 1024;
/// The most lines of one process that are emitted in one second.
pub const MAX_LINES_PER_SECOND: u64 = 1000;
/// How many of the last lines a [`LogTail`] keeps.
pub const TAIL_LINES: usize = 16;
/// How many bytes of them it keeps: of long lines there are fewer.
pub const TAIL_BYTES: usize = 16 * 1024;

/// Interval of the reports about lines that were not emitted, or not as a whole.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Whose lines they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The device's name in its machine.
    pub device: String,
    /// How often the device was started.
    pub incarnation: u64,
}

/// The last [`TAIL_LINES`] lines of a process (at most [`TAIL_BYTES`] of them), and how many were not emitted. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct LogTail {
    /// As they came; rendered when somebody asks.
    lines: Arc<Mutex<VecDeque<Vec<u8>>>>,
    dropped: Arc<AtomicU64>,
}

impl LogTail {
    /// The lines, oldest first, as a person wants to read them: free of control characters, JSON
    /// lines as `LEVEL target: message key=value`.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone();
        lines.iter().map(|line| Rendered::new(line).to_string()).collect()
    }

    /// How many lines were not emitted so far, since there were too many in one second.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn push(&self, line: &[u8]) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push_back(line.to_vec());
        let mut bytes: usize = lines.iter().map(Vec::len).sum();
        while lines.len() > TAIL_LINES || bytes > TAIL_BYTES {
            bytes -= lines.pop_front().map_or(bytes, |oldest| oldest.len());
        }
    }
}

/// What [`forward`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogSummary {
    /// Lines that were emitted.
    pub emitted: u64,
    /// Lines that were not, since there were too many in one second.
    pub dropped: u64,
    /// Lines that were longer than [`MAX_LINE`], emitted or not.
    pub cut: u64,
}

impl LogSummary {
    fn since(self, earlier: Self) -> Self {
        Self {
            emitted: self.emitted - earlier.emitted,
            dropped: self.dropped - earlier.dropped,
            cut: self.cut - earlier.cut,
        }
    }
}

/// Reads a process's standard error until everybody who could write to it has closed it, emits its
/// lines, and keeps the last ones in `tail`. Waits for nothing but the pipe; to be run as a task of
/// its own on a tokio runtime with I/O and time. Dropping the future closes the pipe.
///
/// A child of the process may keep the pipe open after the process has ended.
///
/// # Errors
///
/// If the fd is not the reading end of a pipe, or a read fails.
pub async fn forward(stderr: OwnedFd, origin: Origin, tail: LogTail) -> io::Result<LogSummary> {
    let pipe = Receiver::from_owned_fd(stderr)?;
    let mut log = Forwarder::new(origin, tail);
    let mut splitter = Splitter::default();
    let mut chunk = [0; 4096];
    loop {
        let ready = match log.report_due() {
            None => pipe.readable().await,
            Some(due) => match tokio::time::timeout_at(due.into(), pipe.readable()).await {
                Ok(ready) => ready,
                Err(_) => {
                    log.report();
                    continue;
                }
            },
        };
        ready?;
        match pipe.try_read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => {
                let now = Instant::now();
                splitter.push(&chunk[..len], |line, cut| log.line(line, cut, now));
                // A process that never stops writing must not keep the runtime from others.
                tokio::task::yield_now().await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    splitter.finish(|line, cut| log.line(line, cut, Instant::now()));
    log.report();
    Ok(log.summary)
}

/// Emits lines, but not too many in a second.
struct Forwarder {
    origin: Origin,
    tail: LogTail,
    summary: LogSummary,
    /// The summary as it was when the running second began.
    before: LogSummary,
    second: Option<Instant>,
}

impl Forwarder {
    fn new(mut origin: Origin, tail: LogTail) -> Self {
        origin.device = clean(&origin.device);
        let summary = LogSummary::default();
        Self { origin, tail, summary, before: summary, second: None }
    }

    fn line(&mut self, line: &[u8], cut: bool, now: Instant) {
        if self.second.is_none_or(|began| now.duration_since(began) >= REPORT_INTERVAL) {
            self.report();
            self.second = Some(now);
        }
        self.tail.push(line);
        self.summary.cut += u64::from(cut);
        if self.summary.since(self.before).emitted >= MAX_LINES_PER_SECOND {
            self.summary.dropped += 1;
            self.tail.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            self.summary.emitted += 1;
            self.emit(&Rendered::new(line));
        }
    }

    fn emit(&self, line: &Rendered) {
        macro_rules! emit {
            ($level:ident) => {
                tracing::event!(
                    target: "standstill::device",
                    Level::$level,
                    device = self.origin.device,
                    incarnation = self.origin.incarnation,
                    term = line.term,
                    epoch = line.epoch,
                    origin = line.target.as_deref(),
                    "{}",
                    line.text
                )
            };
        }
        match line.level {
            Level::ERROR => emit!(ERROR),
            Level::WARN => emit!(WARN),
            Level::INFO => emit!(INFO),
            Level::DEBUG => emit!(DEBUG),
            Level::TRACE => emit!(TRACE),
        }
    }

    /// When the next report is due; `None` while there is nothing to report.
    fn report_due(&self) -> Option<Instant> {
        let news = self.summary.since(self.before);
        self.second.filter(|_| news.dropped + news.cut > 0).map(|began| began + REPORT_INTERVAL)
    }

    /// Says what was dropped or cut since the second began, and ends it.
    fn report(&mut self) {
        let LogSummary { dropped, cut, .. } = self.summary.since(self.before);
        let Origin { device, incarnation } = &self.origin;
        if dropped > 0 {
            tracing::warn!(target: "standstill::device", device, incarnation,
                "dropped {dropped} lines, more than {MAX_LINES_PER_SECOND} in a second");
        }
        if cut > 0 {
            tracing::warn!(target: "standstill::device", device, incarnation,
                "cut {cut} lines, longer than {MAX_LINE} bytes");
        }
        self.before = self.summary;
        self.second = None;
    }
}
