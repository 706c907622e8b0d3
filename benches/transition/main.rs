//! Devices that take their time: all of them at once, beside one after another.
//!
//! ```text
//! cargo bench --bench transition [-- --devices 8,64 --delay 20ms --rounds 30]
//! ```
//!
//! Each device takes the delay in each of the two phases of a pause, so a machine whose devices go
//! together takes twice the delay, however many they are. *One after another* is as many machines of
//! one device each, paused in turn: what a VMM takes that walks its devices. *Busy* is
//! `standstill demo` with the same delays, whose engines leave no CPU idle; its times are those of
//! the transitions alone, without the hashing of its oracle.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../harness/mod.rs"]
mod harness;
#[path = "../program/mod.rs"]
mod program;

use harness::Times;
use program::{Failure, end, option};
use serde_json::{Value, json};
use standstill::coordinator::report::{CommandAnswer, TransitionReport};
use standstill::coordinator::{DeviceSpec, Machine, MachineBuilder};
use standstill::protocol::channel::prefer_short_waits;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    end(measure(&arguments))
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let devices = option(arguments, "--devices").unwrap_or("8,64");
    let rounds: usize = option(arguments, "--rounds").unwrap_or("30").parse()?;
    let delay = humantime::parse_duration(option(arguments, "--delay").unwrap_or("20ms"))?;
    // As a VMM does on the thread on which its coordinator lives.
    prefer_short_waits()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!(
        "A pause of devices that take {delay:?} in each phase; ms: median (p99) of {rounds}\n"
    );
    println!(
        "| devices | idle | of two delays | sum of the devices' own times | one after another \
         | busy | of two delays |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut all = Vec::new();
    for count in devices.split(',') {
        let count: usize = count.trim().parse()?;
        let measured = Measured {
            devices: count,
            delay,
            together: runtime.block_on(together(count, delay, rounds))?,
            in_turn: runtime.block_on(in_turn(count, delay))?,
            busy: busy(count, delay, rounds)?,
        };
        println!("{measured}");
        all.push(measured.json());
    }
    println!("\n{}", Value::Array(all));
    Ok(())
}

struct Measured {
    devices: usize,
    delay: Duration,
    /// The pauses, and the median of what the devices say they took, all together.
    together: (Times, Duration),
    in_turn: Duration,
    /// Median and p99.
    busy: (Duration, Duration),
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Measured {
    fn goal(&self) -> f64 {
        ms(self.delay * 2)
    }

    fn json(&self) -> Value {
        json!({
            "devices": self.devices,
            "delay_ms": ms(self.delay),
            "idle_ms": self.together.0.json(),
            "idle_ratio": self.together.0.median() / self.goal(),
            "sum_of_own_times_ms": ms(self.together.1),
            "one_after_another_ms": ms(self.in_turn),
            "busy_ms": { "median": ms(self.busy.0), "p99": ms(self.busy.1) },
            "busy_ratio": ms(self.busy.0) / self.goal(),
        })
    }
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (pause, own) = &self.together;
        write!(
            f,
            "| {} | {pause} | {:.2} | {:.0} | {:.0} | {:.1} ({:.1}) | {:.2} |",
            self.devices,
            pause.median() / self.goal(),
            ms(*own),
            ms(self.in_turn),
            ms(self.busy.0),
            ms(self.busy.1),
            ms(self.busy.0) / self.goal(),
        )
    }
}

fn device(folder: &Path, number: usize, delay: Duration) -> DeviceSpec {
    let delay = format!("{}us", delay.as_micros());
    DeviceSpec::new(format!("engine{number}"), env!("CARGO_BIN_EXE_standstill"))
        .args(["device", "copy-engine", "--memory=4KiB"])
        .args([format!("--slow-prepare={delay}"), format!("--slow-stop={delay}")])
        .arg("--socket")
        .arg(folder.join(format!("engine{number}.sock")))
}

/// One machine.
async fn together(
    count: usize,
    delay: Duration,
    rounds: usize,
) -> Result<(Times, Duration), Failure> {
    let folder = tempfile::tempdir()?;
    let devices = (0..count).map(|number| device(folder.path(), number, delay));
    let machine = MachineBuilder::new("transition").devices(devices).heartbeat(Duration::ZERO);
    let machine = machine.start().await?;
    machine.pause().await?.resume().await?;
    let (mut pauses, mut own) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let began = Instant::now();
        let stopped = machine.pause().await?;
        pauses.push(began.elapsed());
        own.push(own_times(stopped.report()));
        stopped.resume().await?;
    }
    machine.shutdown().await?;
    own.sort_unstable();
    let own = own.get(own.len() / 2).copied().unwrap_or_default();
    Ok((pauses.into(), own))
}

/// How long the devices say that they took for their commands, one added to the other.
fn own_times(report: &TransitionReport) -> Duration {
    let commands = report.participants.iter().flat_map(|participant| &participant.commands);
    let own = commands.map(|command| match &command.answer {
        CommandAnswer::Reached { timings, .. } => timings.total_ns,
        _ => 0,
    });
    Duration::from_nanos(own.sum())
}

/// A machine for each device.
async fn in_turn(count: usize, delay: Duration) -> Result<Duration, Failure> {
    let folder = tempfile::tempdir()?;
    let mut machines: Vec<Machine> = Vec::with_capacity(count);
    for number in 0..count {
        let machine = MachineBuilder::new("alone").device(device(folder.path(), number, delay));
        machines.push(machine.heartbeat(Duration::ZERO).start().await?);
    }
    let began = Instant::now();
    for machine in &machines {
        machine.pause().await?.leave_stopped();
    }
    let took = began.elapsed();
    for machine in &machines {
        machine.shutdown().await?;
    }
    Ok(took)
}

/// `standstill demo`: median and p99 of its pauses.
fn busy(count: usize, delay: Duration, rounds: usize) -> Result<(Duration, Duration), Failure> {
    let slow = format!("all={}us", delay.as_micros());
    let demo = Command::new(env!("CARGO_BIN_EXE_standstill"))
        .args(["demo", "--json", "--devices", &count.to_string()])
        .args(["--rounds", &rounds.to_string(), "--slow-prepare", &slow, "--slow-stop", &slow])
        .output()?;
    if !demo.status.success() {
        return Err(format!("the demo failed: {}", String::from_utf8_lossy(&demo.stderr)).into());
    }
    let summary: Value = serde_json::from_slice(&demo.stdout)?;
    let time = |name| summary["pause_ns"][name].as_u64().map(Duration::from_nanos);
    Ok((time("p50").ok_or("no median")?, time("p99").ok_or("no p99")?))
}
