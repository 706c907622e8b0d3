//! How fast a device's state goes from one device process to another: 1 GiB of memory behind a BAR,
//! written by `Save` and read by `Load`, through a pipe.
//!
//! ```text
//! cargo bench --bench state [-- --rounds 9 --memory 1024]
//! ```
//!
//! The floor is the same memory copied through a pipe by two threads, straight from one mapping and into
//! another, without a look at it; its pipe is as large as that of a state stream. They take turns, round by
//! round; the ratio is the median of the rounds' ratios. Every page was touched before. Beside it: one pass
//! while the device runs and what is left for STOP_COPY when nothing has changed since. The devices are
//! processes of this program, which the benchmark speaks to as a coordinator does.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../program/mod.rs"]
mod program;

use program::{Failure, end, option};
use standstill::device_proc::device::{
    AccessError, Bar, Device, DeviceError, DeviceInfo, Handles, PciIdentity,
};
use standstill::device_proc::{ServeOptions, serve};
use standstill::protocol::channel::CoordinatorEnd;
use standstill::protocol::message::{
    Command, CoordinatorMessage, DeviceMessage, Epoch, OrphanPolicy, Phase, Term, Welcome,
};
use standstill::protocol::migration::MigrationState as S;
use standstill::vfio_user::client::Client;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::{Child, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// The argument that makes this program a device process; its socket and its memory follow.
const DEVICE: &str = "device";
/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(120);
/// As large as the pipe of a state stream is made.
const PIPE_SIZE: usize = 1 << 20;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    end(match words[..] {
        [DEVICE, socket, memory] => run_device(socket, memory),
        _ => measure(&arguments),
    })
}

/// A device that has memory and nothing else.
struct OnlyMemory;

impl Device for OnlyMemory {
    fn region_read(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn region_write(&self, _: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn reset(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self, _: &mut dyn Write) -> Result<(), DeviceError> {
        Ok(())
    }

    fn load(&self, _: &mut dyn Read) -> Result<(), DeviceError> {
        Ok(())
    }
}

fn run_device(socket: &str, memory: &str) -> Result<(), Failure> {
    let build = |_: Handles| {
        let open = File::options().read(true).write(true).open(memory);
        let file = open.map_err(DeviceError::new)?;
        let size = file.metadata().map_err(DeviceError::new)?.len();
        let info = DeviceInfo::new("memory", PciIdentity::new(0x1234, 0x0001))
            .bar(0, Bar::memory(size, file.into()))
            .pre_copy();
        Ok((OnlyMemory, info))
    };
    Ok(serve(ServeOptions::new(socket), build)?)
}

/// A device process, and what the benchmark has of it.
struct Process {
    child: Child,
    channel: CoordinatorEnd,
    epoch: u64,
    memory: MmapRegion,
    client: Client,
    _folder: TempDir,
}

impl Process {
    fn start(size: u64) -> Result<Self, Failure> {
        let file = File::from(rustix::fs::memfd_create(
            "state",
            rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING,
        )?);
        file.set_len(size)?;
        let folder = tempfile::tempdir()?;
        let (channel, stdin) = CoordinatorEnd::pair()?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let child = std::process::Command::new(std::env::current_exe()?)
            .arg(DEVICE)
            .arg(folder.path().join("data.sock"))
            .arg(path)
            .stdin(Stdio::from(stdin))
            .spawn()?;
        let DeviceMessage::Hello(_) = channel.recv(PATIENCE)?.message else {
            return Err("no Hello".into());
        };
        let welcome = Welcome {
            version: 1,
            machine: Default::default(),
            name: "state".into(),
            incarnation: 1,
            term: Term(1),
            epoch: Epoch(0),
            heartbeat_ns: 0,
            orphan: OrphanPolicy::Exit,
            listener: false,
            log: false,
        };
        channel.send(&CoordinatorMessage::Welcome(welcome), &[], PATIENCE)?;
        channel.set_version(1);
        let client = Client::builder().connect(folder.path().join("data.sock"))?;
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), usize::try_from(size)?)?;
        Ok(Self { child, channel, epoch: 0, memory, client, _folder: folder })
    }

    fn tell(&mut self, phase: Phase, target: S, fd: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
        if !matches!(phase, Phase::Stop) {
            self.epoch += 1;
        }
        let command = Command {
            term: Term(1),
            epoch: Epoch(self.epoch),
            phase,
            target,
            budget_ns: u64::try_from(PATIENCE.as_nanos())?,
            lease_ns: 0,
        };
        let fds: Vec<_> = fd.into_iter().collect();
        Ok(self.channel.send(&CoordinatorMessage::Command(command), &fds, PATIENCE)?)
    }

    fn reached(&self) -> Result<(), Failure> {
        loop {
            match self.channel.recv(PATIENCE)?.message {
                DeviceMessage::Reached(_) => return Ok(()),
                DeviceMessage::Refused(refused) => return Err(refused.refusal.text.into()),
                _ => {}
            }
        }
    }

    fn go(&mut self, phase: Phase, target: S) -> Result<(), Failure> {
        self.tell(phase, target, None)?;
        self.reached()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What no compression or comparison makes short.
fn fill(memory: &MmapRegion) -> Result<(), Failure> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = vec![0; 1 << 16];
    for at in (0..memory.size()).step_by(block.len()) {
        for word in block.chunks_exact_mut(8) {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            word.copy_from_slice(&seed.to_le_bytes());
        }
        memory.as_volatile_slice().write_slice(&block, at)?;
    }
    Ok(())
}

/// The same memory through a pipe, without a device.
fn floor(from: &MmapRegion, to: &MmapRegion) -> Result<Duration, Failure> {
    let (reader, writer) = std::io::pipe()?;
    rustix::pipe::fcntl_setpipe_size(&writer, PIPE_SIZE)?;
    let (reader, writer) =
        (reader.as_fd().try_clone_to_owned()?, writer.as_fd().try_clone_to_owned()?);
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    let begin = Instant::now();
    std::thread::scope(|scope| -> Result<(), Failure> {
        let writing = scope.spawn(move || {
            let size = from.size();
            from.as_volatile_slice().write_all_volatile_to(0, &mut writer, size)
        });
        to.as_volatile_slice().read_exact_volatile_from(0, &mut reader, to.size())?;
        writing.join().map_err(|_| "the writer panicked")??;
        Ok(())
    })?;
    Ok(begin.elapsed())
}

/// From one device process to another.
fn stream(source: &mut Process, target: &mut Process) -> Result<Duration, Failure> {
    let (reader, writer) = std::io::pipe()?;
    let begin = Instant::now();
    source.tell(Phase::Save, S::StopCopy, Some(writer.as_fd()))?;
    target.tell(Phase::Load, S::Stop, Some(reader.as_fd()))?;
    drop((reader, writer));
    source.reached()?;
    target.reached()?;
    Ok(begin.elapsed())
}

/// The same in band, from one device process's client to the other's.
fn in_band(source: &Process, target: &Process) -> Result<Duration, Failure> {
    let (mut reader, mut writer) = std::io::pipe()?;
    rustix::pipe::fcntl_setpipe_size(&writer, PIPE_SIZE)?;
    source.client.set_migration_state(S::StopCopy)?;
    target.client.set_migration_state(S::Resuming)?;
    let begin = Instant::now();
    std::thread::scope(|scope| -> Result<(), Failure> {
        let reading = scope.spawn(move || source.client.read_state(&mut writer, u64::MAX));
        target.client.write_state(&mut reader)?;
        reading.join().map_err(|_| "the reader panicked")??;
        Ok(())
    })?;
    target.client.set_migration_state(S::Stop)?;
    let took = begin.elapsed();
    source.client.set_migration_state(S::Running)?;
    target.client.set_migration_state(S::Running)?;
    Ok(took)
}

/// To nowhere: what a pass costs the source alone.
fn save(source: &mut Process, state: S) -> Result<Duration, Failure> {
    let null = File::options().write(true).open("/dev/null")?;
    let begin = Instant::now();
    source.tell(Phase::Save, state, Some(null.as_fd()))?;
    source.reached()?;
    Ok(begin.elapsed())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let rounds: usize = option(arguments, "--rounds").unwrap_or("9").parse()?;
    let mebibytes: u64 = option(arguments, "--memory").unwrap_or("1024").parse()?;
    let size = mebibytes << 20;
    let (mut source, mut target) = (Process::start(size)?, Process::start(size)?);
    fill(&source.memory)?;
    target.go(Phase::PrepareStop, S::RunningP2p)?;
    target.go(Phase::Stop, S::Stop)?;

    let (mut floors, mut streams, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let (mut passes, mut rests, mut in_bands) = (Vec::new(), Vec::new(), Vec::new());
    // The first round touches every page, and does not count.
    for round in 0..=rounds {
        source.go(Phase::Start, S::PreCopy)?;
        let pass = save(&mut source, S::PreCopy)?;
        source.go(Phase::PrepareStop, S::PreCopyP2p)?;
        source.go(Phase::Stop, S::StopCopy)?;
        let rest = save(&mut source, S::StopCopy)?;
        let stream = stream(&mut source, &mut target)?;
        let floor = floor(&source.memory, &target.memory)?;
        source.go(Phase::PrepareStart, S::RunningP2p)?;
        source.go(Phase::Start, S::Running)?;
        let in_band = in_band(&source, &target)?;
        if round > 0 {
            floors.push(floor.as_secs_f64());
            streams.push(stream.as_secs_f64());
            ratios.push(floor.as_secs_f64() / stream.as_secs_f64());
            passes.push(pass.as_secs_f64());
            rests.push(rest.as_secs_f64());
            in_bands.push(in_band.as_secs_f64());
        }
    }
    let row = |what: &str, figures: Vec<f64>| {
        let seconds = median(figures);
        println!("| {what} | {seconds:.3} | {:.2} |", size as f64 / 1e9 / seconds);
    };
    println!("{mebibytes} MiB, {rounds} rounds; medians.\n");
    println!("| | s | GB/s |\n|---|---|---|");
    row("floor: memcpy through a pipe", floors);
    row("state stream, saved and loaded through a pipe", streams);
    row("the same in band, through two clients and a pipe", in_bands);
    row("one pass while it runs, to /dev/null", passes);
    row("what is left when nothing has changed, to /dev/null", rests);
    println!("\nfloor ÷ state stream: {:.2}", median(ratios));
    Ok(())
}
