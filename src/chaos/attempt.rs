//! The runs: plans from a seed, from a file, or of every fault; whatever fails is made smaller.

use super::options::ChaosArgs;
use super::subject::Engines;
use super::summary::{Failure, Summary};
use crate::progress::Progress;
use standstill_testkit::plan::{Plan, PlanError};
use standstill_testkit::sweep::cases;
use standstill_testkit::sweep::resources::Resources;
use standstill_testkit::sweep::seeded::Seeded;
use standstill_testkit::sweep::{
    Expected, Judge, Subject, Sweep, TableError, Tally, Times, Tried, attempt, shrunk,
};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// Rounds with random faults, unless said otherwise.
const ROUNDS: u32 = 50;
/// The most rounds of one random machine.
const ROUNDS_OF_ONE: u32 = 3;
/// Devices of the machines of the sweep.
const SWEPT: u16 = 3;
/// How many failed plans are made smaller.
const SHRUNK: usize = 3;
/// How long the machines may take to end when this ends before its time.
const LAST_GRACE: Duration = Duration::from_secs(3);

/// Why nothing was tried, or not all.
#[derive(Debug, Error)]
enum ChaosError {
    /// The command's own runtime, or another call of the system.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
    /// A file cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why it was not.
        source: io::Error,
    },
    /// The file is no plan.
    #[error("{} is no plan that can be run", path.display())]
    Plan {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: Box<PlanError>,
    },
    /// The table of outcomes that is built in cannot be read.
    #[error("the table of expected outcomes is wrong")]
    Table(#[from] TableError),
    /// A signal ended it.
    #[error("ended by {}", if *.0 == SignalKind::interrupt() { "SIGINT" } else { "SIGTERM" })]
    Signal(SignalKind),
}

impl ChaosError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Signal(kind) => {
                128_u8.saturating_add(u8::try_from(kind.as_raw_value()).unwrap_or(0))
            }
            Self::Plan { .. } => 2,
            Self::System(..) | Self::File { .. } | Self::Table(_) => 1,
        }
    }
}

/// Ends without waiting for threads that block, also when it unwinds.
struct Background(Option<Runtime>);

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Machines that are at work are dropped by this, and their processes killed.
            runtime.shutdown_timeout(LAST_GRACE);
        }
    }
}

/// Tries faults; returns the command's exit code.
pub(crate) fn run(args: &ChaosArgs) -> ExitCode {
    // What coordinators and devices complain of is what is tried here.
    let _log = crate::logging::start(args.log, "off");
    crate::raise_file_limit();
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Threads that wait for devices end soon, so that what is left is seen.
        .thread_keep_alive(Duration::from_millis(500))
        .build()
        .map_err(|error| ChaosError::System("start the tokio runtime", error))
        .and_then(|runtime| {
            let background = Background(Some(runtime));
            background.0.as_ref().map_or(Ok(false), |runtime| runtime.block_on(supervise(args)))
        });
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            crate::print_error(&error);
            if args.json {
                let object = serde_json::json!({ "ok": false, "error": error.to_string() });
                print_line(&object.to_string());
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Tries faults until all are tried or a signal comes. True if everything was as it must be.
async fn supervise(args: &ChaosArgs) -> Result<bool, ChaosError> {
    let listen =
        |kind| signal(kind).map_err(|error| ChaosError::System("listen to signals", error));
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let summary = tokio::select! {
        biased;
        _ = interrupt.recv() => Err(ChaosError::Signal(SignalKind::interrupt())),
        _ = terminate.recv() => Err(ChaosError::Signal(SignalKind::terminate())),
        summary = try_all(args) => summary,
    }?;
    if let Some(path) = &args.markdown {
        let written = std::fs::write(path, summary.to_markdown());
        written.map_err(|source| ChaosError::File { what: "write", path: path.clone(), source })?;
    }
    let text = if args.json { summary.to_json() } else { summary.to_string() };
    print_line(&text);
    Ok(summary.ok())
}

fn print_line(text: &str) {
    let mut stdout = io::stdout().lock();
    // A reader that has gone away wants no more.
    let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

async fn try_all(args: &ChaosArgs) -> Result<Summary, ChaosError> {
    let judge =
        Judge { expected: Expected::ours()?, times: Times::default(), knows_liars: args.sweep };
    let seed = args.seed.unwrap_or_else(any_seed);
    let plans = match &args.plan {
        Some(path) => vec![read(path)?],
        None => plans(args, seed, &judge),
    };
    let progress = Progress::new();
    let subject: Arc<dyn Subject> = Arc::new(Engines);

    // Whatever is made once for all machines is there after the first one.
    progress.say("a machine without faults", 1);
    let plain = attempt(Arc::clone(&subject), Plan::new(2), &judge).await;
    let mut tally = Tally::default();
    if !plain.violations.is_empty() {
        tally.add(plain, &judge.times);
    }
    let before = Resources::settled(None).await;

    progress.say("machines with faults", plans.len());
    let sweep = Sweep::new(plans)?.judge(judge.clone()).at_once(args.at_once.into());
    let ended = |tried: &Tried| {
        progress.bar.inc(1);
        progress.bar.suspend(|| tell(tried));
    };
    tally.merge(sweep.run_with(Arc::clone(&subject), ended).await);

    progress.say("making smaller what failed", tally.failures().len().min(SHRUNK));
    let mut failures = Vec::new();
    for (at, failed) in tally.failures().iter().enumerate() {
        let smallest = if at < SHRUNK {
            Some(shrunk(Arc::clone(&subject), failed, &judge).await)
        } else {
            None
        };
        progress.bar.inc(1);
        failures.push(Failure::new(failed, smallest.as_ref()));
    }
    let after = Resources::settled(Some(before)).await;
    let seed = args.plan.is_none().then_some(seed);
    Ok(Summary::new(seed, tally, failures, judge.expected, before, after))
}

/// Tells at once what failed; the plan comes later, when it is as small as it can be.
fn tell(tried: &Tried) {
    for violation in &tried.violations {
        let faults: Vec<_> = tried.plan.faults.iter().map(ToString::to_string).collect();
        let (policy, faults) = (tried.plan.policy, faults.join("; "));
        // Nobody is left to be told if standard error is closed.
        let _ = writeln!(io::stderr(), "standstill: {violation} ({policy}: {faults})");
    }
}

fn read(path: &PathBuf) -> Result<Plan, ChaosError> {
    let failed = |source| ChaosError::File { what: "read", path: path.clone(), source };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    Plan::from_toml(&text)
        .map_err(|error| ChaosError::Plan { path: path.clone(), source: Box::new(error) })
}

fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // Short enough to be typed again.
    now.map_or(0, |now| u64::from(now.subsec_nanos()))
}

fn plans(args: &ChaosArgs, seed: u64, judge: &Judge) -> Vec<Plan> {
    let Judge { expected, times, .. } = judge;
    let causes = [cases::inside(times), cases::outside(times)].concat();
    let mut plans = Vec::new();
    if args.sweep {
        plans = cases::sweep(&causes, SWEPT, expected, times);
    }
    let rounds = args.rounds.unwrap_or(if args.sweep { 0 } else { ROUNDS });
    let mut seeded = Seeded::new(seed, args.devices, ROUNDS_OF_ONE, &causes, expected, times);
    let mut drawn = 0;
    while drawn < rounds {
        let plan = seeded.plan();
        // And one without faults, to see that all is well again.
        drawn = drawn.saturating_add(plan.rounds + 1);
        plans.push(plan);
    }
    plans
}
