//! What it costs that all DMA passes the gate: a permit, a transaction, with writes tracked and not;
//! and copies of the same blocks with and without the runtime.
//!
//! ```text
//! cargo bench --bench gate [-- --rounds 60]
//! ```
//!
//! A harness of its own: each round does everything once, for a few milliseconds, so that all of it
//! meets the same machine; figures are medians of the rounds, ratios medians of the rounds' ratios.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../program/mod.rs"]
mod program;

use program::{Failure, end, option};
use standstill::device_proc::gate::{Gate, InFlight};
use standstill::device_proc::memory::{
    Dma, DmaError, MemoryMap, SharedMemory, Span, Tracked, WindowSpec,
};
use standstill::protocol::dirty::{DirtyBitmap, Layout};
use std::hint::black_box;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Two of them: what is copied, and where to.
const MEMORY: u64 = 16 << 20;
const SOURCE: u64 = 0x1_0000_0000;
const TARGET: u64 = 0x2_0000_0000;
const PAGE: u64 = 4096;
/// How long one thing is measured in one round.
const SLICE: Duration = Duration::from_millis(4);

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    end(measure(&arguments))
}

/// A device's memory: both are RAM.
struct Bench {
    map: MemoryMap,
    dma: Dma,
    memory: [SharedMemory; 2],
    /// The same, mapped without the runtime.
    bare: [MmapRegion; 2],
    tracked: Vec<Tracked>,
}

impl Bench {
    fn new() -> Result<Self, Failure> {
        let map = MemoryMap::new(Arc::new(Gate::new()));
        let memory =
            [SharedMemory::create("source", MEMORY)?, SharedMemory::create("target", MEMORY)?];
        for (memory, iova) in memory.iter().zip([SOURCE, TARGET]) {
            memory.zero();
            map.declare_ram(memory.try_clone_fd()?)?;
            let (size, offset) = (MEMORY, 0);
            let spec = WindowSpec { iova, size, offset, readable: true, writable: true };
            map.map(spec, Some(memory.try_clone_fd()?))?;
        }
        let bare = |memory: &SharedMemory| -> Result<MmapRegion, Failure> {
            let offset = FileOffset::new(memory.try_clone_fd()?.into(), 0);
            Ok(MmapRegion::from_file(offset, usize::try_from(MEMORY)?)?)
        };
        let bare = [bare(&memory[0])?, bare(&memory[1])?];
        Ok(Self { dma: map.dma(), map, memory, bare, tracked: Vec::new() })
    }

    fn track(&mut self, on: bool) -> Result<(), Failure> {
        for tracked in self.tracked.drain(..) {
            self.map.untrack(&tracked);
        }
        if on {
            for memory in &self.memory {
                let bitmap = DirtyBitmap::create(Layout::new(PAGE, MEMORY)?)?;
                let bitmap = bitmap.as_fd().try_clone_to_owned()?;
                self.tracked.push(self.map.track_ram(memory.try_clone_fd()?, bitmap, PAGE)?);
            }
        }
        Ok(())
    }

    /// One transaction of one span, which writes 8 bytes.
    fn store(&self, number: u64) -> Result<(), DmaError> {
        let span = Span::write(TARGET + number * PAGE % MEMORY, 8);
        self.dma.access(&[span])?.store_u64(0, 0, number)
    }

    /// One transaction as a copy engine's.
    fn copy(&self, number: u64, len: u64) -> Result<(), DmaError> {
        let at = number * len % (MEMORY - len) / PAGE * PAGE;
        let access =
            self.dma.access(&[Span::read(SOURCE + at, len), Span::write(TARGET + at, len)])?;
        access.copy(0, 1)
    }

    /// The same copy without the runtime.
    fn bare_copy(&self, number: u64, len: u64) -> Option<()> {
        let at = usize::try_from(number * len % (MEMORY - len) / PAGE * PAGE).ok()?;
        let len = usize::try_from(len).ok()?;
        let source = self.bare[0].get_slice(at, len).ok()?;
        source.copy_to_volatile_slice(self.bare[1].get_slice(at, len).ok()?);
        Some(())
    }
}

/// How long one call of it takes on each of so many threads at the same time, in ns.
fn time(threads: usize, call: impl Fn(u64) -> bool + Sync) -> Result<f64, Failure> {
    let barrier = Barrier::new(threads);
    let times: Vec<Option<f64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads as u64)
            .map(|thread| {
                let (barrier, call) = (&barrier, &call);
                scope.spawn(move || {
                    barrier.wait();
                    let began = Instant::now();
                    let mut number = thread << 20;
                    let first = number;
                    loop {
                        for _ in 0..64 {
                            if !call(black_box(number)) {
                                return None;
                            }
                            number += 1;
                        }
                        let took = began.elapsed();
                        if took >= SLICE {
                            return Some(took.as_nanos() as f64 / (number - first) as f64);
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
    });
    let times = times.into_iter().collect::<Option<Vec<_>>>().ok_or("an access failed")?;
    Ok(times.iter().sum::<f64>() / times.len() as f64)
}

/// Figures of the same thing, one for each round.
#[derive(Default)]
struct Figures(Vec<f64>);

impl Figures {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn over(&self, other: &Self) -> f64 {
        Self(self.0.iter().zip(&other.0).map(|(this, other)| this / other).collect()).median()
    }
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let rounds: usize = option(arguments, "--rounds").unwrap_or("60").parse()?;
    let mut bench = Bench::new()?;
    let gate = InFlight::new();

    let mut permits = [Figures::default(), Figures::default()];
    let mut stores: [[Figures; 2]; 2] = Default::default();
    const BLOCKS: [u64; 3] = [512, 4096, 60 << 10];
    let mut copies: [[Figures; 3]; 3] = Default::default();
    for _ in 0..rounds {
        for (threads, figures) in (1..).zip(&mut permits) {
            figures.0.push(time(threads, |_| gate.try_enter().is_some())?);
        }
        for (block, copies) in BLOCKS.iter().zip(&mut copies) {
            copies[0].0.push(time(1, |number| bench.bare_copy(number, *block).is_some())?);
        }
        for (tracked, stores) in [false, true].into_iter().zip(&mut stores) {
            bench.track(tracked)?;
            for (threads, figures) in (1..).zip(stores) {
                figures.0.push(time(threads, |number| bench.store(number).is_ok())?);
            }
            for (block, copies) in BLOCKS.iter().zip(&mut copies) {
                let figures = &mut copies[1 + usize::from(tracked)];
                figures.0.push(time(1, |number| bench.copy(number, *block).is_ok())?);
            }
        }
        bench.track(false)?;
    }

    println!("{rounds} rounds; medians.\n");
    println!("| ns for each, on each thread | 1 thread | 2 threads |\n|---|---|---|");
    let row = |what: &str, figures: &[Figures; 2]| {
        println!("| {what} | {:.1} | {:.1} |", figures[0].median(), figures[1].median());
    };
    row("permit: taken and dropped", &permits);
    row("transaction of one span that writes 8 bytes", &stores[0]);
    row("the same, writes tracked", &stores[1]);
    println!(
        "\n| block | without the runtime | with | with, tracked | with ÷ without | tracked ÷ without |"
    );
    println!("|---|---|---|---|---|---|");
    for (block, [bare, with, tracked]) in BLOCKS.iter().zip(&copies) {
        // Bytes for each ns are GB for each s.
        let speed = |figures: &Figures| *block as f64 / figures.median();
        println!(
            "| {block} bytes | {:.1} GB/s | {:.1} GB/s | {:.1} GB/s | {:.3} | {:.3} |",
            speed(bare),
            speed(with),
            speed(tracked),
            1.0 / with.over(bare),
            1.0 / tracked.over(bare),
        );
    }
    Ok(())
}
