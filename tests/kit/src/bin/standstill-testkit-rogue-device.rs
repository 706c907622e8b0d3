//! A device process without a device that misbehaves as its script says; see
//! [`standstill_testkit::script`].

#![forbid(unsafe_code)]

use standstill_testkit::programs::Program;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    ExitCode::from(Program::RogueDevice.run(&arguments))
}
