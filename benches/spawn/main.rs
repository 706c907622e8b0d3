//! How long a machine takes to start, and how much memory each of its device processes costs.
//!
//! ```text
//! cargo bench --bench spawn [-- --devices 64 --rounds 15]
//! ```
//!
//! Devices are copy engines of this package's command, idle and without clients. Each start is in a
//! parent process of its own, which is this program again: a small one, or one that has touched 2 GiB
//! before, as VMMs have; they take turns. The floor is as many bare processes, started by the same
//! parent, until each has answered two packets.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../floor/mod.rs"]
mod floor;
#[path = "../harness/mod.rs"]
mod harness;
#[path = "../program/mod.rs"]
mod program;

use floor::Floor;
use harness::Times;
use program::{Failure, end, option};
use serde_json::{Value, json};
use standstill::coordinator::{DeviceSpec, MachineBuilder};
use standstill::protocol::channel::prefer_short_waits;
use std::fs::read_to_string;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The argument that makes this program a parent; how many devices and MiB of memory follow.
const PARENT: &str = "parent";
const LARGE: usize = 2048;
/// With fewer devices, to see what each more costs.
const FEW: usize = 8;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        [floor::CHILD, answer] => answer
            .parse()
            .map_err(Failure::from)
            .and_then(|answer| floor::child(answer).map_err(Into::into)),
        [PARENT, devices, memory] => parent(devices, memory),
        _ => measure(&arguments),
    };
    end(done)
}

/// Starts a machine, and says what that took and costs.
fn parent(devices: &str, memory: &str) -> Result<(), Failure> {
    let (devices, memory): (usize, usize) = (devices.parse()?, memory.parse()?);
    let ballast = vec![1_u8; memory << 20];
    let began = Instant::now();
    let floor = Floor::new(devices)?;
    let floor_took = began.elapsed();
    drop(floor);

    prefer_short_waits()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let folder = tempfile::tempdir()?;
    let specs = (0..devices).map(|number| {
        DeviceSpec::new(format!("engine{number}"), env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "copy-engine", "--memory=64KiB", "--socket"])
            .arg(folder.path().join(format!("engine{number}.sock")))
    });
    let builder = MachineBuilder::new("spawn").devices(specs);
    let before = resident("self", "Rss:")?;
    let began = Instant::now();
    let machine = runtime.block_on(builder.start())?;
    let took = began.elapsed();
    let after = resident("self", "Rss:")?;
    let status = runtime.block_on(machine.status())?;
    let mut private = Vec::new();
    for device in &status.devices {
        let pid = device.pid.ok_or("a device without a process")?.to_string();
        private.push(resident(&pid, "Private_Clean:")? + resident(&pid, "Private_Dirty:")?);
    }
    runtime.block_on(machine.shutdown())?;
    private.sort_unstable();
    let result = json!({
        "took_ns": u64::try_from(took.as_nanos())?,
        "floor_ns": u64::try_from(floor_took.as_nanos())?,
        "private_kib": private.get(private.len() / 2),
        "grown_kib": after.saturating_sub(before),
        "ballast": ballast.len(),
    });
    println!("{result}");
    Ok(())
}

/// A line of a process's `smaps_rollup`, in KiB.
fn resident(process: &str, field: &str) -> Result<u64, Failure> {
    let text = read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let line = text.lines().find(|line| line.starts_with(field)).ok_or("no such line")?;
    Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse()?)
}

fn run(devices: usize, memory: usize) -> Result<Value, Failure> {
    let output = Command::new(std::env::current_exe()?)
        .args([PARENT, &devices.to_string(), &memory.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let last = text.lines().last().filter(|_| output.status.success());
    Ok(serde_json::from_str(last.ok_or("a parent has failed")?)?)
}

fn number(value: &Value, field: &str) -> Result<u64, Failure> {
    value.get(field).and_then(Value::as_u64).ok_or_else(|| format!("no {field}").into())
}

fn median(mut numbers: Vec<u64>) -> u64 {
    numbers.sort_unstable();
    numbers.get(numbers.len() / 2).copied().unwrap_or_default()
}

#[derive(Default)]
struct Parents {
    start: Vec<Duration>,
    floor: Vec<Duration>,
    private: Vec<u64>,
    grown: Vec<u64>,
}

impl Parents {
    fn add(&mut self, devices: usize, memory: usize) -> Result<(), Failure> {
        let value = run(devices, memory)?;
        let each = |field| -> Result<Duration, Failure> {
            Ok(Duration::from_nanos(number(&value, field)? / devices.max(1) as u64))
        };
        self.start.push(each("took_ns")?);
        self.floor.push(each("floor_ns")?);
        self.private.push(number(&value, "private_kib")?);
        self.grown.push(number(&value, "grown_kib")?);
        Ok(())
    }
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let devices: usize = option(arguments, "--devices").unwrap_or("64").parse()?;
    let rounds: usize = option(arguments, "--rounds").unwrap_or("15").parse()?;
    let (mut small, mut large, mut few) =
        (Parents::default(), Parents::default(), Parents::default());
    for _ in 0..rounds {
        small.add(devices, 0)?;
        large.add(devices, LARGE)?;
        few.add(FEW, 0)?;
    }
    println!("{devices} devices, {rounds} rounds; ms for each device: median (p99).\n");
    println!("| parent | floor: spawn → answer | spawn → ready | ÷ floor |\n|---|---|---|---|");
    let [small_start, large_start] = [&small, &large].map(|of| Times::from(of.start.clone()));
    for (name, parent, start) in
        [("small", &small, &small_start), ("2 GiB touched", &large, &large_start)]
    {
        let floor = Times::from(parent.floor.clone());
        println!("| {name} | {floor} | {start} | {:.2} |", start.median() / floor.median());
    }
    println!("\nLarge ÷ small: {:.2}", large_start.median() / small_start.median());
    let private = median(small.private);
    let grown = median(small.grown).saturating_sub(median(few.grown)) as f64;
    println!(
        "Private memory of a device process: {} KiB. Coordinator: {:.1} KiB for each device ({FEW} to \
         {devices}).",
        private,
        grown / devices.saturating_sub(FEW).max(1) as f64
    );
    let (start, large) = (small_start.json(), large_start.json());
    println!("\n{}", json!({ "start_ms": start, "large_ms": large, "private_kib": private }));
    Ok(())
}
