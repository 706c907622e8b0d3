//! What a dead device process costs: from the kill to its being seen, fenced, rolled back, and to a
//! new one that counts. Medians and worst cases, next to the floor of the same run.
//!
//! ```text
//! cargo bench --bench failures [-- --devices 8,64 --rounds 50]
//! ```
//!
//! Devices are copy engines of this package's command, idle and without clients. Times are taken
//! where an embedding VMM takes them: at the kill, and where an event or a report has come out of
//! the API.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../floor/mod.rs"]
mod floor;
#[path = "../program/mod.rs"]
mod program;

use floor::Floor;
use program::{Failure, end, option};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use standstill::coordinator::{
    DeviceSpec, Events, LossPolicy, Machine, MachineBuilder, MachineError, MachineEvent,
    RestartPolicy, Status,
};
use standstill::protocol::channel::prefer_short_waits;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long the victim of a pause takes to become quiet: by then all others have long answered.
const SLOW: Duration = Duration::from_millis(60);
/// When it is killed in that time.
const KILL_AFTER: Duration = Duration::from_millis(30);

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let done = match arguments.split_first() {
        Some((first, rest)) if first == floor::CHILD => {
            let answer = rest.first().and_then(|length| length.parse().ok()).unwrap_or_default();
            floor::child(answer).map_err(Into::into)
        }
        _ => measure(&arguments),
    };
    end(done)
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let devices = option(arguments, "--devices").unwrap_or("8,64");
    let rounds: usize = option(arguments, "--rounds").unwrap_or("50").parse()?;
    // As a VMM does on the thread on which its coordinator lives.
    prefer_short_waits()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!("{rounds} rounds; times in ms: median (worst)\n");
    println!(
        "| devices | floor: kill → ended | kill → seen | → fenced | → joined again \
         | floor: round | kill in a pause → rolled back |"
    );
    println!("|---|---|---|---|---|---|---|");
    for count in devices.split(',') {
        let count: usize = count.trim().parse()?;
        let mut floor = Floor::new(count)?;
        let floor: Times = (0..rounds).map(|_| floor.round()).collect::<Result<_, _>>()?;
        let folder = tempfile::tempdir()?;
        let ended: Times = (0..rounds).map(|_| death(&folder)).collect::<Result<_, _>>()?;
        let figures = runtime.block_on(async {
            let machine = start(count, &folder).await?;
            let idle = idle(&machine, rounds).await?;
            let paused = paused(&machine, rounds).await?;
            machine.shutdown().await?;
            Ok::<_, Failure>([idle.seen, idle.fenced, idle.joined, paused])
        })?;
        let [seen, fenced, joined, rolled_back] = figures;
        println!("| {count} | {ended} | {seen} | {fenced} | {joined} | {floor} | {rolled_back} |");
    }
    Ok(())
}

/// Some durations of the same thing.
struct Times(Vec<Duration>);

impl FromIterator<Duration> for Times {
    fn from_iter<I: IntoIterator<Item = Duration>>(times: I) -> Self {
        let mut times: Vec<_> = times.into_iter().collect();
        times.sort_unstable();
        Self(times)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |time: Option<&Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
        write!(f, "{:.2} ({:.2})", ms(self.0.get(self.0.len() / 2)), ms(self.0.last()))
    }
}

/// How long the kernel alone takes: the same program without a coordinator, from the kill to its
/// pidfd.
fn death(folder: &TempDir) -> Result<Duration, Failure> {
    let socket = folder.path().join("alone.sock");
    let mut alone = Command::new(env!("CARGO_BIN_EXE_standstill"))
        .args(["device", "copy-engine", "--memory=64KiB", "--socket"])
        .arg(&socket)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = Pid::from_child(&alone);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    while UnixStream::connect(&socket).is_err() {
        std::thread::yield_now();
    }
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    // As idle as a device that has had nothing to do for a while.
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 200_000_000 }))?;
    let at = Instant::now();
    kill_process(pid, Signal::KILL)?;
    poll(&mut fds, None)?;
    let took = at.elapsed();
    alone.wait()?;
    std::fs::remove_file(&socket)?;
    Ok(took)
}

/// The last device is slow to become quiet; all are started again when they are lost.
async fn start(count: usize, folder: &TempDir) -> Result<Machine, Failure> {
    let restart = RestartPolicy {
        budget: u32::MAX,
        first_backoff: Duration::ZERO,
        ..RestartPolicy::default()
    };
    let devices = (0..count).map(|number| {
        let slow = if number + 1 == count { SLOW } else { Duration::ZERO };
        DeviceSpec::new(format!("engine{number}"), env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "copy-engine", "--memory=64KiB", "--socket"])
            .arg(folder.path().join(format!("engine{number}.sock")))
            .arg(format!("--slow-prepare={}ms", slow.as_millis()))
            .on_loss(LossPolicy::Restart(restart))
    });
    Ok(MachineBuilder::new("failures").devices(devices).start().await?)
}

fn kill(status: &Status, number: usize) -> Result<(String, Instant), Failure> {
    let device = status.devices.get(number).ok_or("no such device")?;
    let pid = device.pid.and_then(|pid| Pid::from_raw(pid.try_into().ok()?)).ok_or("no process")?;
    let at = Instant::now();
    kill_process(pid, Signal::KILL)?;
    Ok((device.name.clone(), at))
}

async fn until(
    events: &mut Events,
    is_it: impl Fn(&MachineEvent) -> bool,
) -> Result<Instant, Failure> {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(20), events.recv())
            .await?
            .ok_or("the machine is gone")?;
        if is_it(&event) {
            return Ok(Instant::now());
        }
    }
}

struct Idle {
    seen: Times,
    fenced: Times,
    joined: Times,
}

/// Kills the devices of a running machine, one after another.
async fn idle(machine: &Machine, rounds: usize) -> Result<Idle, Failure> {
    let (mut seen, mut fenced, mut joined) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let mut events = machine.events();
        let status = machine.status().await?;
        let (victim, at) = kill(&status, round % status.devices.len())?;
        let is = |event: &MachineEvent| matches!(event, MachineEvent::DeviceLost { device, .. } if *device == victim);
        seen.push(until(&mut events, is).await? - at);
        let is = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { device, .. } if *device == victim);
        fenced.push(until(&mut events, is).await? - at);
        let is = |event: &MachineEvent| matches!(event, MachineEvent::DeviceJoined { device, .. } if *device == victim);
        joined.push(until(&mut events, is).await? - at);
    }
    let [seen, fenced, joined] = [seen, fenced, joined].map(Times::from_iter);
    Ok(Idle { seen, fenced, joined })
}

/// Kills the slow device in the first phase of a pause, when all others have answered.
async fn paused(machine: &Machine, rounds: usize) -> Result<Times, Failure> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let mut events = machine.events();
        let status = machine.status().await?;
        let pause = tokio::spawn({
            let machine = machine.clone();
            async move {
                let paused = machine.pause().await;
                (Instant::now(), paused.map(drop))
            }
        });
        tokio::time::sleep(KILL_AFTER).await;
        let (victim, at) = kill(&status, status.devices.len() - 1)?;
        match pause.await? {
            (ended, Err(MachineError::Transition(_))) => times.push(ended - at),
            (_, other) => return Err(format!("the pause ended otherwise: {other:?}").into()),
        }
        let is = |event: &MachineEvent| matches!(event, MachineEvent::DeviceJoined { device, .. } if *device == victim);
        until(&mut events, is).await?;
    }
    Ok(times.into_iter().collect())
}
