//! The `standstill` command: one binary is a whole installation. It starts itself again for the
//! device processes of its demonstration.

#![forbid(unsafe_code)]

mod demo;
mod device;
mod logging;
mod size;
mod trace;

use clap::{Parser, Subcommand};
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

/// Stops and starts all device processes of a virtual machine as one
///
/// Devices that write into each other's memory cannot be stopped one after another: one that has
/// stopped would still be written to by one that has not. Standstill stops them in two phases with
/// a barrier after each: first all become quiet, and only when all are, all stop.
///
/// Begin with `standstill demo`.
#[derive(Parser, Debug)]
#[command(version, arg_required_else_help = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Show a machine of device processes that stops and starts as one, and prove it
    Demo(demo::DemoArgs),
    /// Run one device process by itself, for any vfio-user client
    Device(device::DeviceArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Device(args) => device::run(args),
    }
}

/// Tells a person what went wrong: the error and all that caused it.
fn print_error(error: &dyn Error) {
    let mut text = format!("standstill: {error}");
    let mut last = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their source in their own text.
        if !last.ends_with(&cause_text) {
            text.push_str("\n  because: ");
            text.push_str(&cause_text);
        }
        last = cause_text;
        source = cause.source();
    }
    // Nobody is left to be told if standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_demo_needs_no_options_and_a_device_needs_a_socket() {
        assert!(Cli::try_parse_from(["standstill", "demo"]).is_ok());
        assert!(Cli::try_parse_from(["standstill", "device", "copy-engine"]).is_err());
        let device =
            ["standstill", "device", "copy-engine", "--socket", "/run/e", "--memory", "64K"];
        assert!(Cli::try_parse_from(device).is_ok());
    }

    #[test]
    fn nonsense_is_refused() {
        for args in [
            &["standstill", "demo", "--devices", "1"][..],
            &["standstill", "demo", "--devices", "257"],
            &["standstill", "demo", "--rounds", "0"],
            &["standstill", "demo", "--slow-prepare", "engine1"],
            &["standstill", "demo", "--slow-stop", "engine1=soon"],
            &["standstill", "device", "toaster", "--socket", "/run/e"],
        ] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
    }
}
