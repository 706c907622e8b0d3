//! What `standstill chaos` can be told.

use crate::logging::LogArgs;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// The most devices of a machine, as of one of a plan.
pub(super) const MOST_DEVICES: u16 = 64;

/// The exit status of a program whose devices take no orders to fail.
#[cfg(not(feature = "fault-injection"))]
pub(super) const NOT_BUILT_FOR_IT: u8 = 3;

const AFTER_HELP: &str = "\
The machine is that of `standstill demo`: copy engines that write into each other's memory without
rest. What goes wrong is drawn from the seed: devices exit, crash, hang, refuse, answer wrongly, flood
or close their channel, before, in and after every phase, and when they greet; packets come late, twice,
damaged or never; processes are killed and stopped; hooks fail and hang; the coordinator is killed, or
stopped and let go when another one has the machine. After each pause and resume it is checked that the outcome is the one that a table says (tests/expected-outcomes), that all devices that
are left are in one state, that nothing was written while the machine stood still, that every call kept
its deadline, that each fault really happened, and at the end that no process, file descriptor or thread
is left.

With --disk the first device is a virtio disk over vhost-user, whose queues are kept at work; it is checked too
that each request is answered once, that what was written is read again, and that its image does not change while
the machine stands still.

Whatever fails is printed as a plan, a TOML text that --plan runs again, and is made as small as possible in the
time that --shrinking gives: one plan of each kind of failure first, then the others.

This needs a program whose devices can be told to fail, for tests only:
  cargo run --release --features fault-injection -- chaos

Examples:
  standstill chaos
      Random faults, from a seed that is told.
  standstill chaos --seed 7 --rounds 500 --devices 5
      The same faults each time.
  standstill chaos --sweep
      Every fault in every phase on each of three devices, another policy on each: a minute or two.
  standstill chaos --sweep --policies all --at-once 24
      The same under all four policies: four times as many.
  standstill chaos --disk --sweep --policies all --at-once 16
      Every fault in every phase on a disk among two copy engines, under all four policies.
  standstill chaos --plan liar.toml
      What the plan says.

Exit status:
  0    everything was as it must be
  1    something was not, or it could not be finished
  2    the command line or the plan is wrong
  3    this program was built without the feature fault-injection
  130  ended by SIGINT (Ctrl-C); 129: by SIGHUP; 143: by SIGTERM. No process is left behind.";

/// The policies of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum SweptPolicies {
    /// Another one on each device
    InTurn,
    /// All four on each device
    All,
}

/// Runs machines of copy engines of which devices fail, and checks what becomes of each machine.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = AFTER_HELP, after_help = "Examples and exit status: --help")]
pub(crate) struct ChaosArgs {
    /// Where the faults are drawn from [default: another one each time]
    #[arg(long, value_name = "S", conflicts_with = "plan")]
    pub(super) seed: Option<u64>,
    /// How often machines are paused and resumed, with random faults [default: 50]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=10_000_000), conflicts_with = "plan")]
    pub(super) rounds: Option<u32>,
    /// How many devices each machine has: 2 to 64
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=i64::from(MOST_DEVICES)), conflicts_with = "plan")]
    pub(super) devices: u16,
    /// Do what this file says instead
    #[arg(long, value_name = "FILE", conflicts_with = "sweep")]
    pub(super) plan: Option<PathBuf>,
    /// Try every fault in every phase on each of three devices; random ones only if --rounds is given
    #[arg(long)]
    pub(super) sweep: bool,
    /// Make the first device a disk (vhost-user-blk) at work; a sweep tries every fault on it alone
    #[arg(long)]
    pub(super) disk: bool,
    /// Of a sweep, try only every Nth plan
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..), requires = "sweep")]
    pub(super) every: u16,
    /// Under which policies a sweep tries each fault of each device: one of them on each device, or all
    #[arg(long, value_enum, default_value_t = SweptPolicies::InTurn, requires = "sweep")]
    pub(super) policies: SweptPolicies,
    /// How many machines are at work at the same time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) at_once: u16,
    /// How long to look for smaller plans in the place of those that failed, all in all
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "60s")]
    pub(super) shrinking: Duration,
    /// Write what came of each fault into this file, as tables
    #[arg(long, value_name = "FILE")]
    pub(super) markdown: Option<PathBuf>,
    /// Print one JSON object as the last line instead of a table
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[cfg(feature = "fault-injection")]
impl ChaosArgs {
    /// Whether there are random faults.
    pub(super) fn draws(&self) -> bool {
        self.plan.is_none() && (!self.sweep || self.rounds.is_some())
    }
}
