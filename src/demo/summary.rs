//! What came of a run: tables for a person, one JSON object for a program.

use super::memcpy;
use super::options::DemoArgs;
use super::statistics::Spread;
use crate::engines::engine::Work;
use crate::engines::layout::BLOCK;
use crate::engines::oracle::Verdict;
use crate::engines::pairs::Pair;
use serde::Serialize;
use standstill::coordinator::Status;
use standstill::coordinator::report::{CommandReport, Nanos, TransitionReport};
use standstill::protocol::message::Phase;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// The order in which phases come.
const PHASES: [Phase; 4] = [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start];
/// How many late writes are told in words.
const EXAMPLES: usize = 5;

/// What all rounds gave.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measurements {
    pause_ns: Vec<u64>,
    resume_ns: Vec<u64>,
    hash_ns: Vec<u64>,
    evidence_ns: Vec<u64>,
    barriers: BTreeMap<Phase, Vec<u64>>,
    /// By device, then by phase.
    devices: Vec<BTreeMap<Phase, Vec<u64>>>,
    checks: u64,
    late_writes: u64,
    rounds_with_late_writes: u64,
    rounds_without_traffic: u64,
    examples: Vec<String>,
}

impl Measurements {
    /// Adds a round.
    pub(crate) fn add(
        &mut self,
        pause: &TransitionReport,
        resume: &TransitionReport,
        hash_ns: u64,
        verdict: &Verdict,
        without_traffic: bool,
    ) {
        self.pause_ns.push(pause.net_ns());
        self.resume_ns.push(resume.net_ns());
        self.evidence_ns.push(
            pause.total_ns.saturating_sub(pause.net_ns())
                + resume.total_ns.saturating_sub(resume.net_ns()),
        );
        self.hash_ns.push(hash_ns);
        self.devices.resize_with(pause.participants.len(), BTreeMap::new);
        for report in [pause, resume] {
            for phase in PHASES {
                if let Some(ns) = report.barrier_ns(phase) {
                    self.barriers.entry(phase).or_default().push(ns);
                }
                for (device, participant) in self.devices.iter_mut().zip(&report.participants) {
                    let command = participant.command(phase);
                    if let Some(ns) = command.and_then(CommandReport::net_ns) {
                        device.entry(phase).or_default().push(ns);
                    }
                }
            }
        }
        self.checks += verdict.checks;
        self.late_writes += verdict.late.len() as u64;
        self.rounds_with_late_writes += u64::from(!verdict.late.is_empty());
        self.rounds_without_traffic += u64::from(without_traffic);
        let room = EXAMPLES.saturating_sub(self.examples.len());
        self.examples.extend(verdict.late.iter().take(room).map(ToString::to_string));
    }
}

/// What came of a run. Its fields are the keys of the JSON object.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    /// True if the run did what its mode promises.
    ok: bool,
    /// Number of devices.
    devices: u16,
    /// Number of rounds.
    rounds: u32,
    /// Whether the first phase was left out.
    single_phase: bool,
    /// Number of ordered pairs that write.
    pairs: usize,
    /// Bytes of one write.
    block_bytes: u32,
    /// Checks that were made.
    checks: u64,
    /// Checks that failed.
    late_writes: u64,
    /// Rounds with a check that failed.
    rounds_with_late_writes: u64,
    /// Rounds after which a pair did not write any more.
    rounds_without_traffic: u64,
    /// Writes of all devices.
    writes_total: u64,
    /// From the call to a machine that is stopped, without hashing.
    pause_ns: Spread,
    /// From the call to a machine that runs.
    resume_ns: Spread,
    /// The VMM's hashing of all memory, twice in a round. In no other time.
    hash_ns: Spread,
    /// The devices' collecting of evidence, in a round. In no other time.
    evidence_ns: Spread,
    /// Each phase of all devices, by its name.
    barrier_ns: BTreeMap<&'static str, Spread>,
    /// Plain copies on this machine, in bytes per second of CPU time.
    memcpy_bytes_per_second: u64,
    /// Every device.
    per_device: Vec<DeviceSummary>,
    /// The first checks that failed, in words.
    late_write_examples: Vec<String>,
}

/// What came of one device.
#[derive(Clone, Debug, Serialize)]
struct DeviceSummary {
    name: String,
    pid: Option<u32>,
    /// The state at the end.
    state: &'static str,
    writes: u64,
    bytes: u64,
    /// CPU time of its engine.
    busy_ns: u64,
    /// Bytes per second of that.
    bytes_per_second: u64,
    /// From the message to its answer, by phase.
    answer_ns: BTreeMap<&'static str, Spread>,
}

impl Summary {
    /// Of everything that was measured.
    pub(crate) fn new(
        args: &DemoArgs,
        pairs: &[Pair],
        measured: &Measurements,
        work: &[Work],
        memcpy_bytes_per_second: u64,
        status: &Status,
    ) -> Self {
        let per_device = status
            .devices
            .iter()
            .zip(work)
            .zip(&measured.devices)
            .map(|((device, work), answers)| DeviceSummary {
                name: device.name.clone(),
                pid: device.pid,
                state: device.state.map_or("lost", |state| state.name()),
                writes: work.writes,
                bytes: work.bytes,
                busy_ns: work.busy_ns,
                bytes_per_second: memcpy::per_second(
                    work.bytes,
                    Duration::from_nanos(work.busy_ns),
                ),
                answer_ns: by_name(answers),
            })
            .collect();
        let ok = promise_holds(
            args.single_phase,
            u64::from(args.rounds),
            measured.rounds_with_late_writes,
            measured.rounds_without_traffic,
        );
        let spread = |values: &Vec<u64>| Spread::of(values.iter().copied());
        Self {
            ok,
            devices: args.devices,
            rounds: args.rounds,
            single_phase: args.single_phase,
            pairs: pairs.len(),
            block_bytes: BLOCK,
            checks: measured.checks,
            late_writes: measured.late_writes,
            rounds_with_late_writes: measured.rounds_with_late_writes,
            rounds_without_traffic: measured.rounds_without_traffic,
            writes_total: work.iter().map(|work| work.writes).sum(),
            pause_ns: spread(&measured.pause_ns),
            resume_ns: spread(&measured.resume_ns),
            hash_ns: spread(&measured.hash_ns),
            evidence_ns: spread(&measured.evidence_ns),
            barrier_ns: by_name(&measured.barriers),
            memcpy_bytes_per_second,
            per_device,
            late_write_examples: measured.examples.clone(),
        }
    }

    /// Whether the run did what its mode promises.
    pub(crate) fn ok(&self) -> bool {
        self.ok
    }

    /// One line.
    pub(crate) fn to_json(&self) -> String {
        // Names and numbers: nothing that could not be written.
        serde_json::to_string(self)
            .unwrap_or_else(|error| format!("{{\"error\":{:?}}}", error.to_string()))
    }
}

/// Normal mode: no late write and traffic after every round. Without the first phase: late writes
/// in at least 90 of 100 rounds, else the checks prove nothing.
fn promise_holds(single_phase: bool, rounds: u64, with_late: u64, without_traffic: u64) -> bool {
    if single_phase { with_late * 10 >= rounds * 9 } else { with_late == 0 && without_traffic == 0 }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::PrepareStop => "prepare_stop",
        Phase::Stop => "stop",
        Phase::PrepareStart => "prepare_start",
        Phase::Start => "start",
        Phase::Save => "save",
        Phase::Load => "load",
        Phase::Reset => "reset",
    }
}

fn by_name(times: &BTreeMap<Phase, Vec<u64>>) -> BTreeMap<&'static str, Spread> {
    times
        .iter()
        .map(|(phase, values)| (phase_name(*phase), Spread::of(values.iter().copied())))
        .collect()
}

/// What is going to happen.
pub(crate) fn headline(args: &DemoArgs, pairs: usize) -> String {
    let DemoArgs { devices, rounds, .. } = args;
    let block = Bytes(u64::from(BLOCK));
    let mode = if args.single_phase { ", without the first phase" } else { "" };
    format!(
        "{devices} copy engines write blocks of {block} into each other's memory ({pairs} ordered \
         pairs) and into guest RAM.\n{rounds} rounds of pause, check and resume{mode} …"
    )
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.device_table(f)?;
        self.time_table(f)?;
        self.verdict(f)
    }
}

impl Summary {
    fn device_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<10} {:>11} {:>11} {:>13} {:>11}  {:<11} {:>13} {:>11}",
            "device", "PrepareStop", "Stop", "PrepareStart", "Start", "state", "writes", "speed"
        )?;
        for device in &self.per_device {
            let median = |phase| match device.answer_ns.get(phase_name(phase)) {
                Some(spread) => Nanos(spread.p50).to_string(),
                None => "left out".to_owned(),
            };
            writeln!(
                f,
                "{:<10} {:>11} {:>11} {:>13} {:>11}  {:<11} {:>13} {:>9}/s",
                device.name,
                median(Phase::PrepareStop),
                median(Phase::Stop),
                median(Phase::PrepareStart),
                median(Phase::Start),
                device.state,
                Grouped(device.writes).to_string(),
                Bytes(device.bytes_per_second).to_string(),
            )?;
        }
        writeln!(
            f,
            "{:<10} {:>49}  {:<11} {:>13} {:>9}/s",
            "",
            "medians of all rounds",
            "memcpy:",
            "",
            Bytes(self.memcpy_bytes_per_second).to_string(),
        )
    }

    fn time_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<30} {:>11} {:>11} {:>11}", "all devices", "median", "p99", "max")?;
        let mut row = |name: &str, spread: &Spread| {
            let [p50, p99, max] = [spread.p50, spread.p99, spread.max].map(Nanos);
            writeln!(f, "{name:<30} {p50:>11} {p99:>11} {max:>11}")
        };
        let words = [
            (Phase::PrepareStop, "  PrepareStop: all are quiet"),
            (Phase::Stop, "  Stop: all have stopped"),
        ];
        for (phase, name) in words {
            if let Some(spread) = self.barrier_ns.get(phase_name(phase)) {
                row(name, spread)?;
            }
        }
        row("pause", &self.pause_ns)?;
        let words = [
            (Phase::PrepareStart, "  PrepareStart: all accept"),
            (Phase::Start, "  Start: all run"),
        ];
        for (phase, name) in words {
            if let Some(spread) = self.barrier_ns.get(phase_name(phase)) {
                row(name, spread)?;
            }
        }
        row("resume", &self.resume_ns)?;
        row("hashing (in none of these)", &self.hash_ns)
    }

    fn verdict(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, rounds_with_late_writes, rounds_without_traffic, .. } = self;
        writeln!(
            f,
            "\nlate writes             {} of {} checks, in {rounds_with_late_writes} of {rounds} rounds",
            Grouped(self.late_writes),
            Grouped(self.checks),
        )?;
        writeln!(f, "rounds without traffic  {rounds_without_traffic}")?;
        for example in &self.late_write_examples {
            writeln!(f, "  {example}")?;
        }
        let seen = self.late_write_examples.len() as u64;
        if self.late_writes > seen {
            writeln!(f, "  … and {} more", Grouped(self.late_writes - seen))?;
        }
        let writes = Grouped(self.writes_total);
        f.write_str("\n")?;
        match (self.single_phase, self.ok) {
            (false, true) => write!(
                f,
                "OK: {writes} writes, and not one moved a byte while the machine stood still."
            ),
            (false, false) => write!(f, "FAILED: the machine did not stand still, or not go on."),
            (true, true) => write!(
                f,
                "As expected: without the first phase devices were written to after they had been \
                 told to stop.\nRun it without --single-phase to see the difference."
            ),
            (true, false) => write!(
                f,
                "FAILED: without the first phase there should have been late writes in nearly \
                 every round. The checks prove nothing here."
            ),
        }
    }
}

/// A number in groups of three digits.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::with_capacity(digits.len() * 4 / 3);
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}

/// A number of bytes for a person.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        let value = self.0 as f64;
        let text = match self.0 {
            0..0x400 => format!("{} B", self.0),
            0x400..0x10_0000 => format!("{:.0} KiB", value / 1024.0),
            0x10_0000..0x4000_0000 => format!("{:.1} MiB", value / 1_048_576.0),
            _ => format!("{:.2} GiB", value / 1_073_741_824.0),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normal_run_needs_no_late_write_and_traffic_after_every_round() {
        assert!(promise_holds(false, 10, 0, 0));
        assert!(!promise_holds(false, 10, 1, 0));
        assert!(!promise_holds(false, 10, 0, 1));
    }

    #[test]
    fn a_single_phase_run_needs_late_writes_in_nearly_every_round() {
        assert!(promise_holds(true, 100, 90, 0));
        assert!(!promise_holds(true, 100, 89, 0));
        assert!(promise_holds(true, 1, 1, 1));
        assert!(!promise_holds(true, 1, 0, 0));
    }

    #[test]
    fn numbers_are_grouped_and_bytes_have_units() {
        let grouped = [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")];
        for (number, text) in grouped {
            assert_eq!(Grouped(number).to_string(), text);
        }
        let bytes = [(12, "12 B"), (65_536, "64 KiB"), (1 << 21, "2.0 MiB"), (3 << 30, "3.00 GiB")];
        for (number, text) in bytes {
            assert_eq!(Bytes(number).to_string(), text);
        }
    }
}
