//! A coordinator that does what it is told, line by line; see [`standstill_testkit::pilot`].

#![forbid(unsafe_code)]

use standstill_testkit::programs::Program;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    ExitCode::from(Program::Pilot.run(&arguments))
}
