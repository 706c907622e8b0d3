//! What happened in which order, told by those to whom it happened.
//!
//! Devices (processes), local devices and hooks (threads) append to one file, a line each. An
//! answer is written down *before* it is sent and a command *after* it was received: whenever one
//! was the cause of the other, the trace has them in that order, and by their times too.

#![expect(clippy::panic, reason = "a check fails by a panic")]

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use standstill_protocol::message::{Epoch, Phase};
use standstill_protocol::migration::MigrationState;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How often a file is read that is waited for.
const INTERVAL: Duration = Duration::from_millis(2);

/// Something that happened to somebody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`, which all processes share.
    pub at_ns: u64,
    /// To whom.
    pub who: String,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A device process began.
    Began {
        /// Its process id.
        pid: u32,
    },
    /// A command was received.
    Received {
        /// Its phase.
        phase: Phase,
        /// Its epoch.
        epoch: Epoch,
        /// Where it is to lead.
        target: MigrationState,
    },
    /// A command was carried out; its answer is about to be sent.
    Reached {
        /// Its phase.
        phase: Phase,
        /// Its epoch.
        epoch: Epoch,
        /// Where the device is.
        state: MigrationState,
    },
    /// A command was not carried out; its answer is about to be sent.
    Refused {
        /// Its phase.
        phase: Phase,
        /// Its epoch.
        epoch: Epoch,
        /// Where the device is.
        state: MigrationState,
    },
    /// A transition was given up.
    Aborted {
        /// Its epoch.
        epoch: Epoch,
    },
    /// It marks nothing more.
    Untracked,
    /// A memory declaration was received.
    Memory {
        /// Its number.
        sequence: u64,
    },
    /// The device was told that files are gone.
    Revoked {
        /// Number of the revocation.
        sequence: u64,
    },
    /// Another coordinator has the device.
    TakenOver {
        /// Its term.
        term: u64,
    },
    /// A command was received that names another term than that of the device's coordinator.
    Stale {
        /// The term that it names.
        term: u64,
    },
    /// A hook was called.
    Called(Call),
    /// A hook is about to return.
    Returned(Call),
}

/// What a hook was called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// The machine stops.
    Stop,
    /// The machine starts.
    Start,
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Appends to a trace, from any process.
#[derive(Clone, Debug)]
pub struct TraceWriter {
    who: String,
    file: Arc<File>,
}

impl TraceWriter {
    /// Writes to the trace at that path as `who`.
    ///
    /// # Errors
    ///
    /// If the file cannot be opened.
    pub fn open(path: &Path, who: impl Into<String>) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        Ok(Self { who: who.into(), file: Arc::new(file) })
    }

    /// Appends an entry, now.
    ///
    /// # Panics
    ///
    /// If it cannot: a trace with holes proves nothing.
    pub fn write(&self, what: What) {
        let entry = Entry { at_ns: now_ns(), who: self.who.clone(), what };
        let line = serde_json::to_string(&entry).map(|text| text + "\n");
        // One write with O_APPEND: lines of several writers do not mix.
        let written = line.map_err(io::Error::from).and_then(|line| {
            let length = (&*self.file).write(line.as_bytes())?;
            if length == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
        });
        if let Err(error) = written {
            panic!("{} cannot write to the trace: {error}", self.who);
        }
    }
}

/// One trace of one test. Its file is gone when it is dropped.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    _folder: TempDir,
}

impl Trace {
    /// An empty trace in a new temporary folder.
    ///
    /// # Errors
    ///
    /// If the folder or file cannot be made.
    pub fn new() -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("trace.jsonl");
        File::create(&path)?;
        Ok(Self { path, _folder: folder })
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends as `who`.
    ///
    /// # Errors
    ///
    /// If the file cannot be opened.
    pub fn writer(&self, who: impl Into<String>) -> io::Result<TraceWriter> {
        TraceWriter::open(&self.path, who)
    }

    /// Everything so far, by time.
    ///
    /// # Panics
    ///
    /// If the file cannot be read or a line is no entry.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) => panic!("the trace {} cannot be read: {error}", self.path.display()),
        };
        // What follows the last line end is being written just now.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut entries: Vec<Entry> = whole
            .lines()
            .map(|line| match serde_json::from_str(line) {
                Ok(entry) => entry,
                Err(error) => panic!("bad line in the trace: {line:?}: {error}"),
            })
            .collect();
        entries.sort_by_key(|entry| entry.at_ns);
        entries
    }

    /// Everything so far, a line each, for a failed test's message.
    #[must_use]
    pub fn text(&self) -> String {
        let entries = self.entries();
        let first = entries.first().map_or(0, |entry| entry.at_ns);
        let line = |Entry { at_ns, who, what }: &Entry| {
            format!("{:>9} µs  {who:<12} {what:?}\n", (at_ns - first) / 1000)
        };
        entries.iter().map(line).collect()
    }

    /// Waits until the trace is as wanted.
    ///
    /// # Panics
    ///
    /// If it is not within 20 s; `what` says what was waited for.
    pub async fn wait_for(&self, what: &str, wanted: impl Fn(&[Entry]) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !wanted(&self.entries()) {
            assert!(Instant::now() < end, "waited in vain for {what}:\n{}", self.text());
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Who has received a command of that phase so far, each as often as it did.
    #[must_use]
    pub fn received(&self, phase: Phase) -> Vec<Entry> {
        let is = |what: &What| matches!(what, What::Received { phase: p, .. } if *p == phase);
        self.entries().into_iter().filter(|entry| is(&entry.what)).collect()
    }

    /// Who has carried out a command of that phase so far, each as often as it did.
    #[must_use]
    pub fn reached(&self, phase: Phase) -> Vec<Entry> {
        let is = |what: &What| matches!(what, What::Reached { phase: p, .. } if *p == phase);
        self.entries().into_iter().filter(|entry| is(&entry.what)).collect()
    }

    /// How often somebody's process was begun so far.
    #[must_use]
    pub fn incarnations(&self, who: &str) -> usize {
        let began = |entry: &Entry| entry.who == who && matches!(entry.what, What::Began { .. });
        self.entries().into_iter().filter(began).count()
    }

    /// Where somebody said last that it is; `None` if it has answered nothing.
    #[must_use]
    pub fn last_state(&self, who: &str) -> Option<MigrationState> {
        let state = |entry: &Entry| match entry.what {
            What::Reached { state, .. } | What::Refused { state, .. } => Some(state),
            _ => None,
        };
        self.entries().iter().rev().filter(|entry| entry.who == who).find_map(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_several_writers_do_not_mix_and_come_in_order() {
        let trace = Trace::new().unwrap();
        std::thread::scope(|scope| {
            for who in ["one", "other"] {
                let writer = trace.writer(who).unwrap();
                scope.spawn(move || {
                    for sequence in 0..500 {
                        writer.write(What::Memory { sequence });
                    }
                });
            }
        });
        let entries = trace.entries();
        assert!(entries.is_sorted_by_key(|entry| entry.at_ns));
        for who in ["one", "other"] {
            let sequences = entries.iter().filter(|entry| entry.who == who).map(|e| e.what);
            let expected = (0..500).map(|sequence| What::Memory { sequence });
            assert!(sequences.eq(expected), "lines of {who} are lost or out of order");
        }
    }
}
