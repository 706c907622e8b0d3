//! From reports and events to the records of a trace. Nothing here knows a clock or a file.

use crate::events::MachineEvent;
use crate::report::{
    CommandAnswer, CommandReport, HookReport, ParticipantReport, TransitionReport, moment,
};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use standstill_protocol::message::{Epoch, Phase, Timings};
use std::collections::BTreeMap;

/// The coordinator's track for what happens outside of transitions. No thread has so low a number.
const MARKS: u32 = 1;

/// One record of the Trace Event Format.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Record {
    name: String,
    /// `X` slice, `i` mark, `s` and `f` ends of an arrow, `M` name.
    ph: char,
    /// When, in nanoseconds; the format has microseconds.
    #[serde(serialize_with = "micros")]
    ts: u64,
    #[serde(serialize_with = "micros_if", skip_serializing_if = "Option::is_none")]
    dur: Option<u64>,
    pid: u32,
    tid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<&'static str>,
    /// Which arrow.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    /// An arrow ends at the slice around it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bp: Option<char>,
    /// How far a mark reaches: the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<char>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    args: Map<String, Value>,
}

#[expect(clippy::cast_precision_loss, reason = "a nanosecond is one in 100 days")]
fn micros<S: Serializer>(ns: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(*ns as f64 / 1e3)
}

#[expect(clippy::ref_option, reason = "serde wants it so")]
fn micros_if<S: Serializer>(ns: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    micros(&ns.unwrap_or_default(), serializer)
}

impl Record {
    /// When it is.
    pub(super) fn ns(&self) -> u64 {
        self.ts
    }

    fn new(ph: char, name: impl Into<String>, (pid, tid): Track, ts: u64) -> Self {
        let (name, args) = (name.into(), Map::new());
        Self { name, ph, ts, dur: None, pid, tid, cat: None, id: None, bp: None, s: None, args }
    }

    fn slice(name: impl Into<String>, track: Track, (from, to): (u64, u64)) -> Self {
        Self { dur: Some(to.saturating_sub(from)), ..Self::new('X', name, track, from) }
    }

    fn mark(name: impl Into<String>, track: Track, ts: u64) -> Self {
        Self { s: Some('p'), ..Self::new('i', name, track, ts) }
    }

    fn with(mut self, args: Value) -> Self {
        if let Value::Object(args) = args {
            self.args.extend(args.into_iter().filter(|(_, value)| !value.is_null()));
        }
        self
    }
}

/// A process and a thread of it, as a viewer counts them.
pub(super) type Track = (u32, u32);

/// Which tracks there are.
#[derive(Debug)]
pub(super) struct Tracks {
    /// This process.
    coordinator: u32,
    /// Device processes, by name and incarnation.
    devices: BTreeMap<(String, u64), u32>,
    /// Hooks and local devices: tracks of the coordinator.
    threads: BTreeMap<String, u32>,
    /// How many arrows there are.
    arrows: u64,
}

impl Tracks {
    pub(super) fn new(machine: &str, coordinator: u32) -> (Self, Vec<Record>) {
        let (devices, threads) = (BTreeMap::new(), BTreeMap::new());
        let tracks = Self { coordinator, devices, threads, arrows: 0 };
        let own = (coordinator, coordinator);
        let mut records = vec![
            named("process_name", own, &format!("coordinator of {machine}")),
            named("thread_name", own, "transitions"),
            named("thread_name", (coordinator, MARKS), "events"),
        ];
        records
            .push(Record::new('M', "process_sort_index", own, 0).with(json!({"sort_index": -1})));
        (tracks, records)
    }

    /// The track of a device; it is named in `records` if it is new.
    pub(super) fn device(
        &mut self,
        name: &str,
        incarnation: u64,
        pid: Option<u32>,
        records: &mut Vec<Record>,
    ) -> Track {
        let Some(pid) = pid else {
            return self.thread(&format!("device {name}"), records);
        };
        let key = (name.to_owned(), incarnation);
        if self.devices.insert(key, pid) != Some(pid) {
            let text = match incarnation {
                1 => name.to_owned(),
                _ => format!("{name} ({incarnation})"),
            };
            records.push(named("process_name", (pid, pid), &text));
            records.push(named("thread_name", (pid, pid), "commands"));
        }
        (pid, pid)
    }

    /// The track of something in the coordinator's process.
    fn thread(&mut self, name: &str, records: &mut Vec<Record>) -> Track {
        if let Some(&thread) = self.threads.get(name) {
            return (self.coordinator, thread);
        }
        let count = u32::try_from(self.threads.len()).unwrap_or(u32::MAX);
        let thread = MARKS.saturating_add(1).saturating_add(count);
        self.threads.insert(name.to_owned(), thread);
        records.push(named("thread_name", (self.coordinator, thread), name));
        (self.coordinator, thread)
    }

    /// Says that nothing more is written.
    pub(super) fn full(&self, ts: u64) -> Record {
        Record::mark("the trace is full", (self.coordinator, MARKS), ts)
    }

    /// An event that is no report, as a mark on the track of whom it is about.
    pub(super) fn mark(&mut self, event: &MachineEvent, ts: u64) -> Vec<Record> {
        let mut records = Vec::new();
        if let MachineEvent::DeviceJoined { device, incarnation, pid: Some(pid), .. } = event {
            self.device(device, *incarnation, Some(*pid), &mut records);
        }
        let process = event.device().zip(event.incarnation()).and_then(|(name, incarnation)| {
            let pid = self.devices.get(&(name.to_owned(), incarnation))?;
            Some((*pid, *pid))
        });
        let track = process.unwrap_or((self.coordinator, MARKS));
        let about = json!({ "device": event.device(), "incarnation": event.incarnation() });
        records.push(Record::mark(event.to_string(), track, ts).with(about));
        records
    }

    /// A transition that has ended; it began at `base`.
    pub(super) fn transition(&mut self, report: &TransitionReport, base: u64) -> Vec<Record> {
        let mut records = Vec::new();
        let own = (self.coordinator, self.coordinator);
        let at = |ns: u64| base.saturating_add(ns.min(report.total_ns));
        let end = at(report.total_ns);
        records.push(Record::slice(report.operation.to_string(), own, (base, end)).with(json!({
            "outcome": report.outcome.name(),
            "machine": report.machine.to_string(),
            "term": report.term.0,
            "first_epoch": report.first_epoch.0,
            "last_epoch": report.last_epoch.0,
            "downtime_ns": report.downtime_ns,
            "failures": Some(report.failure_lines()).filter(|lines| !lines.is_empty()),
        })));
        for phase in phases(report) {
            let answered = format!("{} of {}", phase.answered, phase.told);
            records.push(
                Record::slice(phase.name(), own, (at(phase.from), at(phase.to)))
                    .with(json!({ "epoch": phase.epoch.0, "answered": answered })),
            );
        }
        for hook in &report.hooks {
            let track = self.thread(&format!("hook {}", hook.name), &mut records);
            records.push(hook_slice(hook, track, &at));
        }
        for one in &report.participants {
            let track = self.device(&one.name, one.incarnation, one.pid, &mut records);
            let until = one.fence.as_ref().map_or(report.total_ns, |fence| fence.began_ns);
            for (number, command) in one.commands.iter().enumerate() {
                let next = one.commands.get(number + 1).map_or(until, |next| next.sent_ns);
                self.command(command, next.min(until), own, track, &at, &mut records);
            }
            records.extend(fence_slice(one, track, &at));
        }
        records
    }

    /// A command from its sending to its answer, or to `until` without one.
    fn command(
        &mut self,
        command: &CommandReport,
        until: u64,
        coordinator: Track,
        track: Track,
        at: &impl Fn(u64) -> u64,
        records: &mut Vec<Record>,
    ) {
        let from = at(command.sent_ns);
        // What is answered after the next command was sent is overtaken by that.
        let to = at(command.answered_ns.unwrap_or(until).min(until.max(command.sent_ns)));
        let (answer, timings) = match &command.answer {
            CommandAnswer::None => (json!({ "answer": "none" }), None),
            CommandAnswer::Reached { state, timings, .. } => {
                (json!({ "answer": "reached", "state": state.name() }), Some(timings))
            }
            CommandAnswer::Refused { state, why } => {
                (json!({ "answer": "refused", "state": state.name(), "why": why }), None)
            }
        };
        let name = match command.undo {
            false => format!("{} → {}", command.phase, command.target),
            true => format!("undo: {} → {}", command.phase, command.target),
        };
        let slice = Record::slice(name, track, (from, to));
        records.push(slice.with(json!({ "epoch": command.epoch.0 })).with(answer));
        self.arrows += 1;
        for (ph, track, bp) in [('s', coordinator, None), ('f', track, Some('e'))] {
            let arrow = Record::new(ph, command.phase.to_string(), track, from);
            let (cat, id) = (Some("command"), Some(self.arrows));
            records.push(Record { cat, id, bp, ..arrow });
        }
        if let Some(timings) = timings {
            records.extend(inside(timings, track, (from, to)));
        }
        if let CommandAnswer::Refused { why, .. } = &command.answer {
            records.push(Record::mark(format!("refused: {why}"), track, to));
        }
    }
}

fn named(what: &str, track: Track, name: &str) -> Record {
    Record::new('M', what, track, 0).with(json!({ "name": name }))
}

/// What a device measured, inside its command. The lengths are the device's own; when they began is
/// not told, so they are put into the middle, one after another.
pub(super) fn inside(timings: &Timings, track: Track, (from, to): (u64, u64)) -> Vec<Record> {
    let Timings { total_ns, hook_ns, drain_ns, evidence_ns } = *timings;
    let total = total_ns.min(to - from);
    if total == 0 {
        return Vec::new();
    }
    let begin = from + (to - from - total) / 2;
    let end = begin + total;
    let mut records = vec![Record::slice("in the device", track, (begin, end))];
    let mut next = begin;
    for (name, length) in [("drain", drain_ns), ("hook", hook_ns), ("evidence", evidence_ns)] {
        let last = next.saturating_add(length).min(end);
        if last > next {
            records.push(Record::slice(name, track, (next, last)));
        }
        next = last;
    }
    records
}

fn hook_slice(hook: &HookReport, track: Track, at: &impl Fn(u64) -> u64) -> Record {
    let until = at(hook.returned_ns.unwrap_or(u64::MAX));
    let returned = hook.returned_ns.is_some();
    Record::slice(moment(hook.moment), track, (at(hook.called_ns), until))
        .with(json!({ "error": hook.error, "returned": returned }))
}

fn fence_slice(one: &ParticipantReport, track: Track, at: &impl Fn(u64) -> u64) -> Option<Record> {
    let fence = one.fence.as_ref()?;
    let to = at(fence.proven_ns.unwrap_or(u64::MAX));
    let name = if fence.proven_ns.is_some() { "fence" } else { "fence, not proven" };
    let why = json!({ "why": fence.detail, "proof": fence.proof });
    Some(Record::slice(name, track, (at(fence.began_ns), to)).with(why))
}

/// One phase of one epoch.
struct PhaseSlice {
    epoch: Epoch,
    phase: Phase,
    undo: bool,
    from: u64,
    to: u64,
    told: usize,
    answered: usize,
}

impl PhaseSlice {
    fn name(&self) -> String {
        if self.undo { format!("undo: {}", self.phase) } else { self.phase.to_string() }
    }
}

/// The phases of a transition in their order: from the first command to the last answer, or to the
/// next phase if some did not answer.
fn phases(report: &TransitionReport) -> Vec<PhaseSlice> {
    let mut phases: Vec<PhaseSlice> = Vec::new();
    for command in report.participants.iter().flat_map(|one| &one.commands) {
        let same =
            |known: &&mut PhaseSlice| (known.epoch, known.phase) == (command.epoch, command.phase);
        let phase = match phases.iter_mut().find(same) {
            Some(phase) => phase,
            None => {
                let CommandReport { epoch, phase, undo, sent_ns: from, .. } = *command;
                phases.push(PhaseSlice { epoch, phase, undo, from, to: 0, told: 0, answered: 0 });
                let last = phases.len() - 1;
                &mut phases[last]
            }
        };
        phase.from = phase.from.min(command.sent_ns);
        phase.to = phase.to.max(command.answered_ns.unwrap_or(0));
        phase.told += 1;
        phase.answered += usize::from(command.answered_ns.is_some());
    }
    phases.sort_by_key(|phase| phase.from);
    let nexts: Vec<u64> = phases.iter().skip(1).map(|next| next.from).collect();
    for (phase, next) in phases.iter_mut().zip(nexts.into_iter().chain([report.total_ns])) {
        let last = if phase.answered == phase.told { phase.to } else { next };
        phase.to = last.min(next).max(phase.from);
    }
    phases
}
