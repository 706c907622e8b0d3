//! What the client's log of written pages costs: to start it for 64 GiB, to mark a million pages, and
//! to report all of it; each beside the same with a plain bitmap, `Vec<u64>`, on one thread.
//!
//! ```text
//! cargo bench --bench dirty [-- --rounds 20]
//! ```
//!
//! A harness of its own: each round does everything once, so that all of it meets the same machine;
//! figures are medians of the rounds, ratios medians of the rounds' ratios. The memory is never
//! touched: a transaction marks what it has named to be written.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../program/mod.rs"]
mod program;

use program::{Failure, end, option};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use standstill::device_proc::gate::Gate;
use standstill::device_proc::memory::{Dma, DmaError, MemoryMap, Report, Span, WindowSpec};
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const SIZE: u64 = 64 << 30;
const PAGES: u64 = SIZE / PAGE;
const MARKS: u64 = 1_000_000;
const BASE: u64 = 0x1_0000_0000;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    end(measure(&arguments))
}

/// Which page is the next to be marked: all over the place, the same in each round.
fn page(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40 & (PAGES - 1)
}

/// Figures of the same thing, one for each round.
#[derive(Default)]
struct Figures(Vec<f64>);

impl Figures {
    fn add(&mut self, took: Duration, parts: u64) {
        self.0.push(took.as_nanos() as f64 / parts as f64);
    }

    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn over(&self, other: &Self) -> f64 {
        Self(self.0.iter().zip(&other.0).map(|(this, other)| this / other).collect()).median()
    }
}

/// A million transactions that write to one page each.
fn transactions(dma: &Dma) -> Result<Duration, DmaError> {
    let began = Instant::now();
    for number in 0..MARKS {
        drop(dma.access(&[Span::write(BASE + page(number) * PAGE, 8)])?);
    }
    Ok(began.elapsed())
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let rounds: usize = option(arguments, "--rounds").unwrap_or("20").parse()?;
    let map = MemoryMap::new(Arc::new(Gate::new()));
    let memory = memfd_create("bench", MemfdFlags::CLOEXEC)?;
    ftruncate(&memory, SIZE)?;
    let spec = WindowSpec { iova: BASE, size: SIZE, offset: 0, readable: true, writable: true };
    map.map(spec, Some(memory))?;
    let (dma, everything) = (map.dma(), Report::new(BASE, SIZE, PAGE)?);

    let [mut start, mut plain_start]: [Figures; 2] = Default::default();
    let [mut without, mut with, mut marks, mut plain_marks]: [Figures; 4] = Default::default();
    let [mut report, mut plain_report, mut nothing, mut plain_nothing]: [Figures; 4] =
        Default::default();
    for _ in 0..rounds {
        without.add(transactions(&dma)?, MARKS);

        let began = Instant::now();
        map.start_log(PAGE, &[], Duration::from_secs(1))?;
        start.add(began.elapsed(), PAGES);
        with.add(transactions(&dma)?, MARKS);
        let difference = with.0.last().zip(without.0.last()).map(|(with, without)| with - without);
        marks.0.extend(difference);
        let mut reported = [Vec::new(), Vec::new()];
        for (figures, reported) in [&mut report, &mut nothing].into_iter().zip(&mut reported) {
            let began = Instant::now();
            *reported = map.report(&everything)?;
            figures.add(began.elapsed(), PAGES);
        }
        map.stop_log();

        let began = Instant::now();
        let mut bits = black_box(vec![0_u64; usize::try_from(PAGES / 64)?]);
        plain_start.add(began.elapsed(), PAGES);
        let began = Instant::now();
        for number in 0..MARKS {
            let page = black_box(page(number));
            if let Some(word) = bits.get_mut(usize::try_from(page / 64)?) {
                *word |= 1 << (page % 64);
            }
        }
        plain_marks.add(began.elapsed(), MARKS);
        let mut copies = [Vec::new(), Vec::new()];
        let figures = [&mut plain_report, &mut plain_nothing];
        for (figures, copy) in figures.into_iter().zip(&mut copies) {
            let began = Instant::now();
            *copy = bits.clone();
            bits.fill(0);
            black_box(&bits);
            figures.add(began.elapsed(), PAGES);
        }
        if copies != reported {
            return Err("the report is not what was marked".into());
        }
    }

    println!("{rounds} rounds; medians; 64 GiB in pages of 4 KiB.\n");
    println!("| | ns | plain bitmap, ns | ratio |\n|---|---|---|---|");
    let row = |what: &str, this: &Figures, plain: &Figures| {
        let (ns, plain_ns) = (this.median(), plain.median());
        println!("| {what} | {ns:.4} | {plain_ns:.4} | {:.1} |", this.over(plain));
    };
    row("START, for each page", &start, &plain_start);
    row("mark: what it adds to a transaction", &marks, &plain_marks);
    row("REPORT after a million marks, for each page", &report, &plain_report);
    row("REPORT of nothing, for each page", &nothing, &plain_nothing);
    println!("\n| | ns |\n|---|---|");
    println!("| transaction of one span | {:.1} |", without.median());
    println!("| the same, logged | {:.1} |", with.median());
    Ok(())
}
