//! `standstill device …`: one device process by itself.

use crate::size::parse_size;
use clap::{Args, Subcommand, ValueEnum};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::devices::vhost_user_blk::{
    BlockConfig, Lock, MAX_QUEUES, VhostUserBlk,
};
use standstill::device_proc::vhost_user::serve_vhost_user;
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
    /// A disk for a virtual machine: a virtio block device over vhost-user
    ///
    /// Its blocks are those of a file or of a block device, which it locks. Serves until it gets SIGTERM
    /// or SIGINT. If its standard input is a socket of a coordinator, it is that coordinator's device and
    /// lives as long as it is told to.
    VhostUserBlk(BlockArgs),
}

#[derive(Args, Clone, Debug)]
struct BlockArgs {
    /// The image: a file or a block device, whose size is the disk's
    #[arg(long, value_name = "PATH")]
    file: PathBuf,
    /// Where the vhost-user socket is made (at most 107 bytes)
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// How many request queues the disk has, each with a thread: 1 to 64
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)), default_value_t = 1)]
    queues: u16,
    /// Refuse to write
    #[arg(long)]
    read_only: bool,
    /// Pass the page cache by: direct I/O
    #[arg(long)]
    direct: bool,
    /// Serial number that the guest sees (at most 20 bytes)
    #[arg(long, value_name = "TEXT", default_value = "")]
    serial: String,
    /// How long each request waits before it is begun, such as 20ms
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "0s")]
    delay: Duration,
    #[arg(long, help = "Do without io_uring: each queue does one request after the other")]
    without_io_uring: bool,
    /// When the image is locked
    #[arg(long, value_name = "WHEN", default_value = "process")]
    lock: LockArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LockArg {
    /// As long as this process lives
    Process,
    /// While the guest uses it, so that another process can take the disk over in a live migration. The
    /// file SOCKET.lock is locked as long as this process lives then
    Rings,
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
    let served = match args.kind {
        DeviceKind::CopyEngine(args) => {
            let config = CopyEngineConfig {
                memory_size: args.memory,
                vectors: args.vectors,
                slow_prepare: args.slow_prepare,
                slow_stop: args.slow_stop,
                rest: args.rest,
                ..CopyEngineConfig::default()
            };
            let options = ServeOptions::new(args.socket);
            serve(options, |handles| CopyEngine::build(config, handles))
        }
        DeviceKind::VhostUserBlk(args) => {
            let lock = match args.lock {
                LockArg::Process => Lock::Process,
                LockArg::Rings => {
                    let mut proof = args.socket.clone().into_os_string();
                    proof.push(".lock");
                    Lock::Rings { proof: proof.into() }
                }
            };
            let config = BlockConfig {
                file: args.file,
                queues: args.queues,
                read_only: args.read_only,
                direct: args.direct,
                serial: args.serial,
                delay: args.delay,
                without_io_uring: args.without_io_uring,
                lock,
            };
            serve_vhost_user(ServeOptions::new(args.socket), || VhostUserBlk::device(&config))
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        // It was told already, in the form that a coordinator reads.
        Err(error) => ExitCode::from(error.exit_code()),
    }
}
