//! `standstill device …`: one device process by itself.

use crate::size::parse_size;
use clap::{Args, Subcommand};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What follows `standstill device`.
#[derive(Args, Clone, Debug)]
pub(crate) struct DeviceArgs {
    #[command(subcommand)]
    kind: DeviceKind,
}

#[derive(Subcommand, Clone, Debug)]
enum DeviceKind {
    /// A PCI device that copies between any DMA addresses at memory speed
    ///
    /// Serves until it gets SIGTERM or SIGINT. If its standard input is a socket of a coordinator,
    /// it is that coordinator's device and lives as long as it is told to.
    CopyEngine(CopyEngineArgs),
}

#[derive(Args, Clone, Debug)]
struct CopyEngineArgs {
    /// Where the vfio-user socket is made (at most 107 bytes)
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Size of the memory BAR: a power of two, 4KiB to 4GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1MiB")]
    memory: u64,
    /// How many MSI-X interrupt vectors the device has: 0 to 16
    #[arg(long, value_name = "NUMBER", default_value_t = CopyEngineConfig::default().vectors)]
    vectors: u16,
    /// How long the device takes to become quiet, such as 20ms
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "0s")]
    slow_prepare: Duration,
    /// How long the device takes to stop, such as 20ms
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "0s")]
    slow_stop: Duration,
    /// How long the device rests each time that it begins its ring again, such as 1ms
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "0s")]
    rest: Duration,
}

/// Serves the device; returns the process's exit code when it is over.
pub(crate) fn run(args: DeviceArgs) -> ExitCode {
    let DeviceKind::CopyEngine(args) = args.kind;
    let config = CopyEngineConfig {
        memory_size: args.memory,
        vectors: args.vectors,
        slow_prepare: args.slow_prepare,
        slow_stop: args.slow_stop,
        rest: args.rest,
        ..CopyEngineConfig::default()
    };
    let served =
        serve(ServeOptions::new(args.socket), |handles| CopyEngine::build(config, handles));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        // It was told already, in the form that a coordinator reads.
        Err(error) => ExitCode::from(error.exit_code()),
    }
}
