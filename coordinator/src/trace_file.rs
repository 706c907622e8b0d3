//! What happened to a machine as a trace file, for <https://ui.perfetto.dev> or `chrome://tracing`:
//! one track for the coordinator, one for each device process, all on one time axis.
//!
//! ```no_run
//! # async fn example(machine: standstill_coordinator::Machine) -> Result<(), Box<dyn std::error::Error>> {
//! use standstill_coordinator::trace_file::TraceFile;
//! use std::time::SystemTime;
//!
//! let mut trace = TraceFile::begin(std::fs::File::create("vm0.trace.json")?, "vm0")?;
//! trace.know(&machine.status().await?)?;
//! let mut events = machine.events();
//! while let Some(event) = events.recv().await {
//!     trace.event(&event, SystemTime::now())?;
//! }
//! trace.end()?;
//! # Ok(())
//! # }
//! ```
//!
//! A transition is written when it has ended, from its report: the coordinator's track has the
//! transition and its phases, each device's track has its commands from their sending to their
//! answer, and inside them what the device measured itself. Losses, fences, restarts and the like are
//! marks at the time at which they are told.
//!
//! The file is a JSON array in the [Trace Event Format]. It is written in whole records, so the file
//! of a program that was killed can be opened, too: the array's end may be missing.
//!
//! [Trace Event Format]: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

mod records;
#[cfg(test)]
mod tests;

use crate::events::MachineEvent;
use crate::report::nanos;
use crate::status::Status;
use records::{Record, Tracks};
use std::io::{self, Write};
use std::time::SystemTime;

/// How long a trace file becomes at most, in bytes, unless something else is said.
pub const LIMIT: u64 = 256 << 20;

/// A trace file that is being written.
#[derive(Debug)]
pub struct TraceFile<W> {
    out: W,
    began: SystemTime,
    tracks: Tracks,
    written: u64,
    limit: u64,
    full: bool,
}

impl<W: Write> TraceFile<W> {
    /// Begins the trace of a machine of that name; its times count from now.
    ///
    /// Everything is given to `out` at once and flushed: it needs no buffer of its own.
    ///
    /// # Errors
    ///
    /// Those of `out`, here and in the other functions.
    pub fn begin(out: W, machine: &str) -> io::Result<Self> {
        let (tracks, records) = Tracks::new(machine, std::process::id());
        let began = SystemTime::now();
        let mut file = Self { out, began, tracks, written: 0, limit: LIMIT, full: false };
        file.write(&records)?;
        Ok(file)
    }

    /// The file may have so many bytes. What would make it longer is left out, and a mark says so.
    #[must_use]
    pub fn limited_to(self, bytes: u64) -> Self {
        Self { limit: bytes, ..self }
    }

    /// Tells which processes there are, so that what happens to them has its track. Those that start
    /// later are told by their events.
    ///
    /// # Errors
    ///
    /// Those of the file.
    pub fn know(&mut self, status: &Status) -> io::Result<()> {
        let mut records = Vec::new();
        for device in &status.devices {
            self.tracks.device(&device.name, device.incarnation, device.pid, &mut records);
        }
        self.write(&records)
    }

    /// Writes an event that was told at that time.
    ///
    /// # Errors
    ///
    /// Those of the file.
    pub fn event(&mut self, event: &MachineEvent, at: SystemTime) -> io::Result<()> {
        let ns = |time: SystemTime| time.duration_since(self.began).map_or(0, nanos);
        let records = match event {
            MachineEvent::Transition(report) => self.tracks.transition(report, ns(report.began)),
            event => self.tracks.mark(event, ns(at)),
        };
        self.write(&records)
    }

    /// Ends the array, and gives the file back.
    ///
    /// # Errors
    ///
    /// Those of the file.
    pub fn end(mut self) -> io::Result<W> {
        self.out.write_all(b"\n]\n")?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn write(&mut self, records: &[Record]) -> io::Result<()> {
        if self.full || records.is_empty() {
            return Ok(());
        }
        let mut bytes = self.bytes(records)?;
        if self.written + bytes.len() as u64 > self.limit {
            self.full = true;
            let at = records.iter().map(Record::ns).max().unwrap_or_default();
            bytes = self.bytes(&[self.tracks.full(at)])?;
        }
        // In one piece, so that whoever kills this process finds no half a record.
        self.out.write_all(&bytes)?;
        self.written += bytes.len() as u64;
        self.out.flush()
    }

    fn bytes(&self, records: &[Record]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(256 * records.len());
        for record in records {
            let first = self.written == 0 && bytes.is_empty();
            bytes.extend_from_slice(if first { b"[\n" } else { b",\n" });
            serde_json::to_writer(&mut bytes, record)?;
        }
        Ok(bytes)
    }
}
