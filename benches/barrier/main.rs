//! The whole two-phase round of the full stack, beside a bare floor in the same run.
//!
//! ```text
//! cargo bench --bench barrier [-- --devices 8,64,256,1000 --rounds 200]
//! cargo bench --bench barrier -- --lane [--devices … --rounds …]
//! ```
//!
//! The full stack is real device processes of this package's command (copy engines with gate,
//! vfio-user transport and a data thread, idle and without clients) under a coordinator in this
//! process. The floor is one thread, epoll, and as many bare processes that answer packets of the
//! same lengths. A harness of its own: what counts is the ratio, and it is robust only if the two
//! take turns, round by round, so that both meet the same machine and find their processes'
//! caches equally cold.
//!
//! With `--lane` it is not the full stack that is compared with the floor, but bare processes that
//! are told and answer by shared memory: see `lane.rs`.
//!
//! Devices give no signs of life meanwhile, as those would fall into some rounds and not into
//! others.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

mod calls;
#[path = "../floor/mod.rs"]
mod floor;
#[path = "../harness/mod.rs"]
mod harness;
mod lane;
#[path = "../program/mod.rs"]
mod program;
mod switches;

use calls::Tracing;
use floor::Floor;
use harness::Times;
use lane::Lane;
use program::{Failure, end, option};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::json;
use standstill::coordinator::{DeviceSpec, Machine, MachineBuilder};
use standstill::protocol::channel::prefer_short_waits;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use switches::{Tally, own, processes};
use tempfile::TempDir;

/// How many rounds are traced, and of how many devices at most.
const TRACED: usize = 10;
const MOST_TRACED: usize = 64;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let done = match arguments.split_first() {
        Some((first, rest)) if first == floor::CHILD => {
            let answer = rest.first().and_then(|length| length.parse().ok()).unwrap_or_default();
            floor::child(answer).map_err(Into::into)
        }
        Some((first, rest)) if first == lane::CHILD => {
            lane::child(rest.first().and_then(|length| length.parse().ok()).unwrap_or_default())
        }
        _ => measure(&arguments),
    };
    end(done)
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let devices = option(arguments, "--devices").unwrap_or("8,64,256,1000");
    let rounds: Option<usize> = option(arguments, "--rounds").map(str::parse).transpose()?;
    room_for_fds()?;
    // As a VMM does on the thread on which its coordinator lives.
    prefer_short_waits()?;
    if arguments.iter().any(|argument| argument == "--lane") {
        return measure_lane(devices, rounds);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!(
        "Times in ms: median (p99). A round of the floor has two phases, as a pause or a resume.\n"
    );
    println!(
        "| devices | rounds | floor: round | pause | resume | pause ÷ floor | resume ÷ floor |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut all = Vec::new();
    for count in devices.split(',') {
        let count: usize = count.trim().parse()?;
        let rounds = rounds.unwrap_or_else(|| rounds_for(count));
        let measured = runtime.block_on(contest(count, rounds))?;
        println!("{measured}");
        all.push(measured);
    }
    println!("\nPer device and phase: CPU time, context switches (voluntary + not).\n");
    println!("| devices | floor: child | device process | floor: sender | coordinator |");
    println!("|---|---|---|---|---|");
    for measured in &all {
        println!("{}", measured.costs());
    }
    println!(
        "\nSystem calls per device and phase, in {TRACED} rounds under strace (a slower machine, so the"
    );
    println!("coordinator finds fewer answers at once).\n");
    println!("| devices | floor: child | device process | floor: sender | coordinator |");
    println!("|---|---|---|---|---|");
    for measured in &all {
        if measured.devices <= MOST_TRACED {
            println!("{}", runtime.block_on(count_calls(measured.devices))?);
        }
    }
    println!("\n{}", serde_json::Value::Array(all.iter().map(Measured::json).collect()));
    Ok(())
}

/// Floor and lane in turns.
fn measure_lane(devices: &str, rounds: Option<usize>) -> Result<(), Failure> {
    println!("A round of two phases; ms: median (p99).\n");
    println!(
        "| devices | rounds | floor | lane | lane, frames | lane ÷ floor | with frames ÷ floor |"
    );
    println!("|---|---|---|---|---|---|---|");
    for count in devices.split(',') {
        let count: usize = count.trim().parse()?;
        let rounds = rounds.unwrap_or_else(|| rounds_for(count));
        let mut floor = Floor::new(count)?;
        let (mut bare, mut framed) = (Lane::new(count, false)?, Lane::new(count, true)?);
        let [mut floors, mut bares, mut frameds] = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            floors.push(floor.round()?);
            bares.push(bare.round()?);
            frameds.push(framed.round()?);
        }
        let [floor, bare, framed] = [floors, bares, frameds].map(Times::from);
        println!(
            "| {count} | {rounds} | {floor} | {bare} | {framed} | {:.2} | {:.2} |",
            bare.median() / floor.median(),
            framed.median() / floor.median()
        );
    }
    Ok(())
}

/// About as long for each number of devices.
fn rounds_for(devices: usize) -> usize {
    (40_000 / devices.max(1)).clamp(60, 500)
}

/// Many devices have many fds.
fn room_for_fds() -> Result<(), Failure> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// What came of one number of devices.
struct Measured {
    devices: usize,
    rounds: usize,
    floor: Times,
    pause: Times,
    resume: Times,
    /// Of all rounds together.
    floor_sender: Tally,
    floor_children: Tally,
    coordinator: Tally,
    device_processes: Tally,
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { devices, rounds, floor, pause, resume, .. } = self;
        write!(
            f,
            "| {devices} | {rounds} | {floor} | {pause} | {resume} | {:.2} | {:.2} |",
            pause.median() / floor.median(),
            resume.median() / floor.median()
        )
    }
}

impl Measured {
    /// Each side has done four phases in a round.
    fn per_device_and_phase(&self, tally: &Tally) -> String {
        tally.per(self.devices * self.rounds * 4)
    }

    fn costs(&self) -> String {
        format!(
            "| {} | {} | {} | {} | {} |",
            self.devices,
            self.per_device_and_phase(&self.floor_children),
            self.per_device_and_phase(&self.device_processes),
            self.per_device_and_phase(&self.floor_sender),
            self.per_device_and_phase(&self.coordinator),
        )
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "devices": self.devices,
            "rounds": self.rounds,
            "floor_ms": self.floor.json(),
            "pause_ms": self.pause.json(),
            "resume_ms": self.resume.json(),
            "pause_ratio": self.pause.median() / self.floor.median(),
            "resume_ratio": self.resume.median() / self.floor.median(),
            "phases": self.devices * self.rounds * 4,
            "floor_children": self.floor_children.json(),
            "device_processes": self.device_processes.json(),
            "floor_sender": self.floor_sender.json(),
            "coordinator": self.coordinator.json(),
        })
    }
}

/// Floor and full stack in turns.
async fn contest(devices: usize, rounds: usize) -> Result<Measured, Failure> {
    let mut floor = Floor::new(devices)?;
    let folder = tempfile::tempdir()?;
    let machine = start(devices, &folder).await?;
    let status = machine.status().await?;
    let engines: Vec<_> = status.devices.iter().filter_map(|device| device.pid).collect();
    for _ in 0..3 {
        floor.round()?;
        machine.pause().await?.resume().await?;
    }
    let (mut floors, mut pauses, mut resumes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut sender, mut coordinator) = (Tally::default(), Tally::default());
    let bare: Vec<_> = floor.children.iter().map(|(_, child)| child.id()).collect();
    let before = (processes(&bare)?, processes(&engines)?);
    for _ in 0..rounds {
        let at = own()?;
        floors.push(floor.round()?);
        let paused_from = own()?;
        let began = Instant::now();
        let stopped = machine.pause().await?;
        pauses.push(began.elapsed());
        let paused_at = own()?;
        floors.push(floor.round()?);
        let resumed_from = own()?;
        let began = Instant::now();
        stopped.resume().await?;
        resumes.push(began.elapsed());
        sender += paused_from - at + (resumed_from - paused_at);
        coordinator += paused_at - paused_from + (own()? - resumed_from);
    }
    let after = (processes(&bare)?, processes(&engines)?);
    machine.shutdown().await?;
    Ok(Measured {
        devices,
        rounds,
        floor: floors.into(),
        pause: pauses.into(),
        resume: resumes.into(),
        floor_sender: sender,
        floor_children: after.0 - before.0,
        coordinator,
        device_processes: after.1 - before.1,
    })
}

/// What floor and full stack ask of the kernel; a row of a table.
async fn count_calls(devices: usize) -> Result<String, Failure> {
    let mut floor = Floor::new(devices)?;
    let folder = tempfile::tempdir()?;
    let machine = start(devices, &folder).await?;
    let status = machine.status().await?;
    let engines: Vec<_> = status.devices.iter().filter_map(|device| device.pid).collect();
    floor.round()?;
    machine.pause().await?.resume().await?;
    let own = std::process::id();
    let phases = devices * TRACED * 4;
    let with = |others: &[u32]| Tracing::begin(&[others, &[own]].concat());
    let Some(tracing) =
        with(&floor.children.iter().map(|(_, child)| child.id()).collect::<Vec<_>>())?
    else {
        return Ok(format!("| {devices} | there is no strace here | | | |"));
    };
    for _ in 0..2 * TRACED {
        floor.round()?;
    }
    let bare = tracing.end()?;
    let Some(tracing) = with(&engines)? else { return Err("strace is gone".into()) };
    for _ in 0..TRACED {
        machine.pause().await?.resume().await?;
    }
    let full = tracing.end()?;
    machine.shutdown().await?;
    let all = std::fs::read_dir("/proc/self/task")?.map(|task| task.map(|task| task.file_name()));
    let all: Vec<_> = all.collect::<Result<_, _>>()?;
    let ours = |thread| thread == own;
    let others = |thread: u32| !all.iter().any(|own| *own == *thread.to_string());
    Ok(format!(
        "| {devices} | {} | {} | {} | {} |",
        bare.per(others, phases),
        full.per(others, phases),
        bare.per(ours, phases),
        full.per(ours, phases)
    ))
}

async fn start(devices: usize, folder: &TempDir) -> Result<Machine, Failure> {
    let devices = (0..devices).map(|number| {
        DeviceSpec::new(format!("engine{number}"), env!("CARGO_BIN_EXE_standstill"))
            // The least memory: an engine hashes it when it stops, for the oracle of the tests.
            .args(["device", "copy-engine", "--memory=4KiB", "--socket"])
            .arg(folder.path().join(format!("engine{number}.sock")))
    });
    let machine = MachineBuilder::new("barrier").devices(devices).heartbeat(Duration::ZERO);
    Ok(machine.start().await?)
}
