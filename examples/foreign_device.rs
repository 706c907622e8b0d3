//! Somebody's own device program, through a sweep of faults: every fault from outside, in every phase,
//! on each device of a machine of three, with whatever comes of it judged.
//!
//! The device program is `scratch_device.rs`; put your own in its place. Nothing in it knows of faults.
//!
//! `cargo build --examples && target/debug/examples/foreign_device [PART]`: `8` tries every eighth.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::DeviceSpec;
use standstill_testkit::sweep::{DevicePrograms, Sweep};
use std::cell::Cell;
use std::error::Error;
use std::process::ExitCode;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    // What stands between the coordinator and a device is this program again.
    if let Some(exit) = standstill_testkit::programs::serve() {
        return Ok(exit);
    }
    let part: usize = std::env::args().nth(1).map_or(Ok(1), |part| part.parse())?;
    let program = std::env::current_exe()?.with_file_name("scratch_device");
    let devices = DevicePrograms::new(move |number, socket| {
        DeviceSpec::new(format!("scratch{number}"), &program).arg(socket)
    });
    let number = Cell::new(0_usize);
    let sweep = Sweep::from_outside()?.only(|_| {
        number.set(number.get() + 1);
        number.get().is_multiple_of(part)
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tally = runtime.block_on(sweep.run(devices.register(0, 0)));
    println!("{tally}");
    let whole = tally.failures().is_empty();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
