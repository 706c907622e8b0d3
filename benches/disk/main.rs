//! A vhost-user-blk device of this project, beside the one of `qemu-storage-daemon`, under the same
//! driver; and how long a stop of it takes with requests under way.
//!
//! ```text
//! cargo bench --bench disk [-- --rounds 8 --time 500ms --daemon qemu-storage-daemon --size 256]
//! cargo bench --bench disk -- --stops 50
//! ```
//!
//! Both have an image of their own, full of data, and one queue; the daemon works with `io_uring` and in
//! an I/O thread. They take turns of `--time`, round by round, so that both find the same machine. The
//! *ceiling* is the daemon's device that does nothing (`null-co`): what protocol and driver take.
//! `--size` is that of an image in MiB.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

mod driver;
mod exports;
#[path = "../harness/mod.rs"]
mod harness;
#[path = "../program/mod.rs"]
mod program;
mod stops;

use driver::{Driver, Load, Order};
use exports::{Daemon, Ours};
use program::{Failure, end, option};
use std::process::ExitCode;
use std::time::Duration;

/// The most requests under way, and the longest of them in bytes.
const DEPTH: usize = 32;
const LENGTH: usize = 128 << 10;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    end(measure(&arguments))
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    // Not in memory, for what goes past the page cache.
    let folder =
        tempfile::Builder::new().prefix("disk-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let size: u64 = option(arguments, "--size").unwrap_or("256").parse()?;
    let size = size << 20;
    if let Some(rounds) = option(arguments, "--stops") {
        return stops::measure(folder.path(), size, rounds.parse()?);
    }
    let rounds: usize = option(arguments, "--rounds").unwrap_or("8").parse()?;
    let time = humantime::parse_duration(option(arguments, "--time").unwrap_or("500ms"))?;
    let daemon = option(arguments, "--daemon").unwrap_or("qemu-storage-daemon");
    let ours = exports::image(folder.path(), "ours.img", size)?;
    let theirs = exports::image(folder.path(), "daemon.img", size)?;
    println!("{rounds} rounds of {time:?} each; median, in requests a second\n");
    println!(
        "| | request | depth | ours | daemon | ours ÷ daemon (worst, best round) | ceiling \
         | ours ÷ ceiling |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let null = format!("driver=null-co,size={size}");
    let null = Daemon::start(daemon, folder.path(), "null", &null)?;
    let mut null =
        Driver::connect(&null.socket, size, DEPTH, LENGTH).map(|driver| (driver, null))?;
    for direct in [false, true] {
        let place = if direct { "O_DIRECT" } else { "page cache" };
        let ours = Ours::start(folder.path(), &ours, direct, &[])?;
        let theirs = Daemon::of_image(daemon, folder.path(), &theirs, direct)?;
        exports::wait_for(&ours.socket)?;
        let mut devices = [
            Driver::connect(&ours.socket, size, DEPTH, LENGTH)?,
            Driver::connect(&theirs.socket, size, DEPTH, LENGTH)?,
        ];
        for load in loads() {
            let figures = Figures::take(&mut devices, &mut null.0, load, rounds, time)?;
            println!("| {place} | {} | {} | {figures} |", name(load), load.depth);
        }
        drop(devices);
        ours.machine.shutdown()?;
    }
    Ok(())
}

/// What is measured.
fn loads() -> Vec<Load> {
    let random = |writes, depth| Load { writes, order: Order::Random, length: 4096, depth };
    let sequential = |writes| Load { writes, order: Order::Sequential, length: LENGTH, depth: 8 };
    vec![
        random(false, 1),
        random(false, DEPTH),
        random(true, 1),
        random(true, DEPTH),
        sequential(false),
        sequential(true),
    ]
}

fn name(load: Load) -> String {
    let order = if load.order == Order::Random { "random" } else { "sequential" };
    let what = if load.writes { "write" } else { "read" };
    format!("{} KiB {order} {what}", load.length >> 10)
}

/// Requests a second, by round.
struct Figures {
    ours: Vec<f64>,
    daemon: Vec<f64>,
    ceiling: Vec<f64>,
}

impl Figures {
    fn take(
        [ours, daemon]: &mut [Driver; 2],
        null: &mut Driver,
        load: Load,
        rounds: usize,
        time: Duration,
    ) -> Result<Self, Failure> {
        let mut figures = Self { ours: Vec::new(), daemon: Vec::new(), ceiling: Vec::new() };
        // What is found cold by the first turn is not the device's.
        ours.run(load, time / 5)?;
        daemon.run(load, time / 5)?;
        for round in 0..rounds {
            // Neither has always what the other one leaves to be written.
            if round % 2 == 0 {
                figures.ours.push(ours.run(load, time)?);
                figures.daemon.push(daemon.run(load, time)?);
            } else {
                figures.daemon.push(daemon.run(load, time)?);
                figures.ours.push(ours.run(load, time)?);
            }
            figures.ceiling.push(null.run(load, time / 5)?);
        }
        Ok(figures)
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ratios = sorted(self.ours.iter().zip(&self.daemon).map(|(ours, daemon)| ours / daemon));
        let (ours, ceiling) = (median(&self.ours), median(&self.ceiling));
        let (worst, best) = (ratios.first(), ratios.last());
        write!(
            f,
            "{ours:.0} | {:.0} | {:.2} ({:.2}, {:.2}) | {ceiling:.0} | {:.2}",
            median(&self.daemon),
            median(&ratios),
            worst.unwrap_or(&f64::NAN),
            best.unwrap_or(&f64::NAN),
            ours / ceiling,
        )
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values
}

fn median(values: &[f64]) -> f64 {
    let values = sorted(values.iter().copied());
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
