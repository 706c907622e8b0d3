//! The `standstill` command: one binary is a whole installation. It starts itself again for device
//! processes of its own kinds.

#![forbid(unsafe_code)]

mod chaos;
mod commands;
mod demo;
mod device;
mod engines;
mod exit;
mod explain;
mod logging;
mod machine_file;
mod metrics;
mod nearest;
mod operator;
mod progress;
mod run;
mod size;
mod top;
mod trace;

use clap::{Parser, Subcommand};
use commands::{check, events, membership, report, shell, status, transition};
use operator::message::Request;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

/// Stops and starts all device processes of a virtual machine as one
///
/// Devices that write into each other's memory cannot be stopped one after another: one that has
/// stopped would still be written to by one that has not. Standstill stops them in two phases with
/// a barrier after each: first all become quiet, and only when all are, all stop.
///
/// Begin with `standstill demo`; then write a machine file and `standstill run` it.
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
    /// Let devices of such a machine die, hang and lie, and see what becomes of it
    Chaos(chaos::ChaosArgs),
    /// Run one device process by itself, for any vfio-user client
    Device(device::DeviceArgs),
    /// Run a machine: start its devices, or take them over, and stay until it is shut down
    Run(run::RunArgs),
    /// Look at a machine file and start nothing
    Check(check::CheckArgs),
    /// Show where a machine and its devices are
    Status(status::StatusArgs),
    /// Stop all devices of a machine
    Pause(transition::PauseArgs),
    /// Start all devices of a machine again
    Resume(transition::PlainArgs),
    /// Give the pause or resume up that is under way: it is undone
    Cancel(transition::PlainArgs),
    /// End a machine
    Shutdown(transition::ShutdownArgs),
    /// Add a device to a machine
    Add(membership::AddArgs),
    /// Remove a device from a machine
    Remove(membership::DeviceNameArgs),
    /// Start a lost device of a machine again
    Restart(membership::DeviceNameArgs),
    /// Watch a machine in a terminal
    Top(top::TopArgs),
    /// Show what has happened to a machine
    Events(events::EventsArgs),
    /// Show the reports of the last pauses and resumes
    Report(report::ReportArgs),
    /// Take what is not proven as it is: a machine that is held counts as stopped then
    ///
    /// Only who knows that the VM does not run elsewhere, and that nothing of a lost device can
    /// still write, may say so.
    AcceptHold(transition::PlainArgs),
    /// Declare a file to be guest RAM, to every device of a machine
    DeclareRam(membership::DeclareRamArgs),
    /// Write completions for a shell to standard output
    Completions(shell::CompletionsArgs),
    /// Write man pages into a folder
    Man(shell::ManArgs),
}

/// `standstill device …` and nothing else. Device processes are started by the dozen: each would build
/// the whole command line of all the others otherwise, and keep the memory that it took.
#[derive(Parser, Debug)]
#[command(name = "standstill", version, max_term_width = 100)]
struct DeviceCli {
    #[command(subcommand)]
    command: DeviceCommand,
}

#[derive(Subcommand, Debug)]
enum DeviceCommand {
    /// Run one device process by itself, for any vfio-user client
    Device(device::DeviceArgs),
}

fn main() -> ExitCode {
    // This program again, between a device and its coordinator: see `standstill chaos`.
    #[cfg(feature = "fault-injection")]
    if let Some(ended) = standstill_testkit::programs::serve() {
        return ended;
    }
    if std::env::args_os().nth(1).is_some_and(|first| first == "device") {
        let DeviceCommand::Device(args) = DeviceCli::parse().command;
        return device::run(args);
    }
    match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Chaos(args) => chaos::run(&args),
        Command::Device(args) => device::run(args),
        Command::Run(args) => run::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Pause(args) => transition::pause(&args),
        Command::Resume(args) => transition::resume(&args),
        Command::Cancel(args) => transition::cancel(&args),
        Command::Shutdown(args) => transition::shutdown(&args),
        Command::Add(args) => membership::add(&args),
        Command::Remove(args) => membership::remove(&args),
        Command::Restart(args) => membership::restart(&args),
        Command::Top(args) => top::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Report(args) => report::run(&args),
        Command::AcceptHold(args) => {
            let done = "accepted: the machine counts as stopped";
            transition::tell(&args, Request::AcceptHold {}, done)
        }
        Command::DeclareRam(args) => membership::declare_ram(&args),
        Command::Completions(args) => shell::completions(&args),
        Command::Man(args) => shell::man(&args),
    }
}

/// Tells a person what went wrong: the error and all that caused it.
fn print_error(error: &dyn Error) {
    // Nobody is left to be told if standard error is closed.
    let _ = writeln!(std::io::stderr(), "standstill: {}", explain::explain(error));
}

/// Each device costs a coordinator a handful of descriptors.
fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
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
            &["standstill", "run"],
            &["standstill", "run", "--attach=maybe", "vm0.toml"],
            &["standstill", "status", "--machine", "vm0", "--socket", "/run/s"],
            &["standstill", "pause", "--lease", "soon"],
            &["standstill", "resume", "--lease", "1s"],
            &["standstill", "add"],
            &["standstill", "add", "nic0.toml", "--name", "nic0"],
            &["standstill", "add", "--name", "nic0", "--set", "presence"],
        ] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
    }
}
