//! Stands between a coordinator and a device process; see [`standstill_testkit::outside::relay`].

#![forbid(unsafe_code)]

use standstill_testkit::programs::Program;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    ExitCode::from(Program::Relay.run(&arguments))
}
