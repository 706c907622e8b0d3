//! What `standstill demo` can be told.

use crate::logging::LogArgs;
use crate::trace::TraceArgs;
use clap::Args;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use thiserror::Error;

const AFTER_HELP: &str = "\
The devices are copy engines, each a process of its own: PCI devices that write blocks and sequence
numbers into each other's memory and into guest RAM, over vfio-user DMA mappings, as fast as they
can. They ignore every request to stop and keep trying; only the runtime's gate holds them. So the
demo can check what a standstill promises: after each pause, whatever any engine had written when
it said that it is quiet is exactly what is found, by the receiver and by the VMM, until the
machine starts again. Hashes of all memory and interrupt counters are compared, too.

Examples:
  standstill demo
      Eight devices, a hundred rounds.
  standstill demo --single-phase
      Leave the first phase of the stop out, and see that the checks notice. So that it shows on
      any machine, every second device then takes 20 ms to become quiet on its way to the stop,
      unless --slow-prepare says otherwise.
  standstill demo --slow-prepare engine3=15ms --slow-stop engine5=20ms --timeline round.svg
      Two slow devices: the machine takes as long as the slowest, not as long as all together.
      round.svg shows when each device did what.
  standstill demo --slow-stop engine1=5ms --trace trace.json
      Every phase in every process; open trace.json at https://ui.perfetto.dev.
  standstill demo --devices 64 --rounds 200 --json | tail -n 1
      Many devices, and the figures for a program.

Exit status:
  0    the run did what its mode promises: no late write and no round without traffic; with
       --single-phase, late writes in at least 90 of 100 rounds
  1    it did not, or it could not be finished
  2    the command line is wrong
  130  ended by SIGINT (Ctrl-C); 143: by SIGTERM. No process is left behind.

Log lines of the command and of its devices go to standard error; RUST_LOG=info shows more.";

/// Runs a machine of copy engines, pauses and resumes it again and again, and checks each time
/// that nothing moved while it stood still.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = AFTER_HELP, after_help = "Examples and exit status: --help")]
pub(crate) struct DemoArgs {
    /// How many devices: 2 to 256
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(2..=256))]
    pub(crate) devices: u16,
    /// How often to pause and resume
    #[arg(long, value_name = "R", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) rounds: u32,
    /// Leave the first phase of the stop out, to show what it is for
    #[arg(long)]
    pub(crate) single_phase: bool,
    /// Let a device take that long to become quiet: engine3=20ms, or all=20ms; can be repeated
    #[arg(long, value_name = "DEVICE=DURATION")]
    pub(crate) slow_prepare: Vec<Slow>,
    /// Let a device take that long to stop: engine3=20ms, or all=20ms; can be repeated
    #[arg(long, value_name = "DEVICE=DURATION")]
    pub(crate) slow_stop: Vec<Slow>,
    /// Print one JSON object as the last line instead of tables
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the round of median length as a picture (SVG)
    #[arg(long, value_name = "FILE")]
    pub(crate) timeline: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) trace: TraceArgs,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    /// For tests: panic in that round
    #[arg(long, hide = true)]
    pub(crate) panic_in_round: Option<u32>,
}

/// One `DEVICE=DURATION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slow {
    /// Which device; `None` for all.
    device: Option<usize>,
    /// How slow.
    duration: Duration,
}

/// How long every second device takes to become quiet where the first phase is left out (on its
/// way through the second, then): real devices differ, and the longer one of them goes on, the
/// more certainly its peers are written to.
const UNEQUAL: Duration = Duration::from_millis(20);
/// The longest time that a device can be told to take.
const SLOWEST: Duration = Duration::from_secs(60);

/// A `DEVICE=DURATION` that cannot be.
#[derive(Clone, Debug, PartialEq, Error)]
pub(crate) enum SlowError {
    /// There is no `=`.
    #[error("expected DEVICE=DURATION, such as engine3=20ms or all=20ms")]
    NoDuration,
    /// Not `engineN` and not `all`.
    #[error("{0:?} is no device: expected engine0, engine1, … or all")]
    Device(String),
    /// Not a time.
    #[error("{text:?} is no duration, such as 20ms")]
    Duration {
        /// What was given.
        text: String,
        /// Why it is none.
        source: humantime::DurationError,
    },
    /// Too long.
    #[error("{} is too long: at most {} are possible", humantime::format_duration(*.0), humantime::format_duration(SLOWEST))]
    TooLong(Duration),
    /// The machine has no such device.
    #[error("there is no engine{device}: this machine has engine0 to engine{last}")]
    NoSuchDevice {
        /// What was named.
        device: usize,
        /// The last that there is.
        last: usize,
    },
}

impl FromStr for Slow {
    type Err = SlowError;

    fn from_str(text: &str) -> Result<Self, SlowError> {
        let (name, duration_text) = text.split_once('=').ok_or(SlowError::NoDuration)?;
        let device = match name {
            "all" => None,
            _ => {
                let number = name.strip_prefix("engine").and_then(|digits| digits.parse().ok());
                Some(number.ok_or_else(|| SlowError::Device(name.to_owned()))?)
            }
        };
        let duration = humantime::parse_duration(duration_text)
            .map_err(|source| SlowError::Duration { text: duration_text.to_owned(), source })?;
        if duration > SLOWEST {
            return Err(SlowError::TooLong(duration));
        }
        Ok(Self { device, duration })
    }
}

impl DemoArgs {
    /// How many devices.
    pub(crate) fn engines(&self) -> usize {
        usize::from(self.devices)
    }

    /// How slow each device is to be in the two steps of a stop; what is said last counts.
    pub(crate) fn slowness(&self) -> Result<Vec<Slowness>, SlowError> {
        let mut all = vec![Slowness::default(); self.engines()];
        if self.single_phase && self.slow_prepare.is_empty() {
            all.iter_mut().skip(1).step_by(2).for_each(|slowness| slowness.prepare = UNEQUAL);
        }
        for slow in &self.slow_prepare {
            slow.apply(&mut all, |slowness| &mut slowness.prepare)?;
        }
        for slow in &self.slow_stop {
            slow.apply(&mut all, |slowness| &mut slowness.stop)?;
        }
        Ok(all)
    }
}

/// How slow one device is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slowness {
    /// In the first step of a stop.
    pub(crate) prepare: Duration,
    /// In the second.
    pub(crate) stop: Duration,
}

impl Slow {
    fn apply(
        self,
        all: &mut [Slowness],
        which: impl Fn(&mut Slowness) -> &mut Duration,
    ) -> Result<(), SlowError> {
        let last = all.len().saturating_sub(1);
        let chosen = match self.device {
            None => all,
            Some(device) => {
                all.get_mut(device..=device).ok_or(SlowError::NoSuchDevice { device, last })?
            }
        };
        chosen.iter_mut().for_each(|slowness| *which(slowness) = self.duration);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: DemoArgs,
    }

    fn parse(args: &[&str]) -> DemoArgs {
        Only::try_parse_from([&["demo"], args].concat()).unwrap_or_else(|e| panic!("{e}")).args
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_defaults_are_eight_devices_and_a_hundred_rounds() {
        let args = parse(&[]);
        assert_eq!((args.devices, args.rounds), (8, 100));
        assert!(!args.single_phase && !args.json && args.timeline.is_none());
        assert_eq!(args.slowness(), Ok(vec![Slowness::default(); 8]));
    }

    #[test]
    fn one_device_or_all_can_be_slow_and_the_last_word_counts() {
        let args = parse(&[
            "--devices",
            "3",
            "--slow-prepare",
            "all=5ms",
            "--slow-prepare",
            "engine1=20ms",
            "--slow-stop",
            "engine2=1s",
        ]);
        let slow = |prepare, stop| Slowness { prepare: ms(prepare), stop: ms(stop) };
        assert_eq!(args.slowness(), Ok(vec![slow(5, 0), slow(20, 0), slow(5, 1000)]));
    }

    #[test]
    fn without_the_first_phase_every_second_device_is_slow_unless_told_otherwise() {
        let times = |args: &[&str]| {
            let all = parse(&[&["--devices", "3", "--single-phase"], args].concat()).slowness();
            all.unwrap().iter().map(|slowness| slowness.prepare).collect::<Vec<_>>()
        };
        assert_eq!(times(&[]), [Duration::ZERO, UNEQUAL, Duration::ZERO]);
        assert_eq!(times(&["--slow-prepare", "all=1ms"]), [ms(1); 3]);
        assert_eq!(times(&["--slow-prepare", "all=0s"]), [Duration::ZERO; 3]);
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = parse(&["--slow-stop", "engine8=1ms"]).slowness().unwrap_err();
        let text = "there is no engine8: this machine has engine0 to engine7";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn what_is_no_delay_is_refused() {
        assert_eq!("engine1".parse::<Slow>(), Err(SlowError::NoDuration));
        assert_eq!("disk=1ms".parse::<Slow>(), Err(SlowError::Device("disk".into())));
        assert_eq!("engine-1=1ms".parse::<Slow>(), Err(SlowError::Device("engine-1".into())));
        assert!(matches!("all=soon".parse::<Slow>(), Err(SlowError::Duration { .. })));
        assert!(matches!("all=1h".parse::<Slow>(), Err(SlowError::TooLong(_))));
    }
}
