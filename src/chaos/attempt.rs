//! The runs: plans from a seed, from a file, or of every fault; whatever fails is made smaller.

use super::disk::{self, DISK, DiskAndEngines};
use super::options::SweptPolicies::All;
use super::options::{ChaosArgs, MOST_DEVICES};
use super::subject::Engines;
use super::summary::{Failure, Summary, as_text};
use crate::progress::Progress;
use standstill_testkit::plan::{Plan, PlanError};
use standstill_testkit::sweep::cases::{self, Policies, Victims};
use standstill_testkit::sweep::resources::Resources;
use standstill_testkit::sweep::seeded::Seeded;
use standstill_testkit::sweep::{
    Expected, Judge, Subject, Sweep, TableError, Tally, Times, Tried, attempt,
};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use thiserror::Error;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// Rounds with random faults, unless said otherwise.
const ROUNDS: u32 = 50;
/// The most rounds of one random machine.
const ROUNDS_OF_ONE: u32 = 3;
/// Devices of the machines of the sweep.
const SWEPT: u16 = 3;
const _: () = assert!(MOST_DEVICES == Plan::MOST_DEVICES);
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
    #[error("ended by {}", signal_name(*.0))]
    Signal(SignalKind),
}

fn signal_name(kind: SignalKind) -> &'static str {
    match kind {
        kind if kind == SignalKind::interrupt() => "SIGINT",
        kind if kind == SignalKind::hangup() => "SIGHUP",
        _ => "SIGTERM",
    }
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
    let seed = args.draws().then(|| args.seed.unwrap_or_else(any_seed));
    if let Some(seed) = seed {
        // Whatever becomes of this, it can be done again. Nobody is left to be told if standard error is closed.
        let _ = writeln!(io::stderr(), "standstill: random faults from seed {seed}");
    }
    // Blocking calls may outlive the runtime, and would keep the folders of their machines.
    let folder = match own_folder() {
        Ok(folder) => folder,
        Err(error) => return failed(args, seed, &ChaosError::System("make a folder", error)),
    };
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Threads that wait for devices end soon, so that what is left is seen.
        .thread_keep_alive(Duration::from_millis(500))
        .build()
        .map_err(|error| ChaosError::System("start the tokio runtime", error))
        .and_then(|runtime| {
            let background = Background(Some(runtime));
            background
                .0
                .as_ref()
                .map_or(Ok(false), |runtime| runtime.block_on(supervise(args, seed)))
        });
    drop(folder);
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed(args, seed, &error),
    }
}

/// Tells why not everything was tried.
fn failed(args: &ChaosArgs, seed: Option<u64>, error: &ChaosError) -> ExitCode {
    crate::print_error(error);
    if args.json {
        let error = standstill_testkit::chain(error);
        let object = serde_json::json!({ "ok": false, "seed": seed, "error": error });
        print_line(&object.to_string());
    }
    ExitCode::from(error.exit_code())
}

/// A folder in which all others of this process are made; with it they all go.
fn own_folder() -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("chaos-");
    let mut folder = builder.tempdir()?;
    // There are sockets in it, of which no path has more than 107 bytes.
    if folder.path().as_os_str().len() > 48 {
        folder = builder.tempdir_in("/tmp")?;
    }
    let known = |_| io::Error::other("there is one already");
    tempfile::env::override_temp_dir(folder.path()).map_err(known)?;
    Ok(folder)
}

/// Tries faults until all are tried or a signal comes. True if everything was as it must be.
async fn supervise(args: &ChaosArgs, seed: Option<u64>) -> Result<bool, ChaosError> {
    let listen =
        |kind| signal(kind).map_err(|error| ChaosError::System("listen to signals", error));
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let summary = tokio::select! {
        biased;
        _ = interrupt.recv() => Err(ChaosError::Signal(SignalKind::interrupt())),
        _ = terminate.recv() => Err(ChaosError::Signal(SignalKind::terminate())),
        _ = hangup.recv() => Err(ChaosError::Signal(SignalKind::hangup())),
        summary = try_all(args, seed) => summary,
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

async fn try_all(args: &ChaosArgs, seed: Option<u64>) -> Result<Summary, ChaosError> {
    let judge =
        Judge { expected: Expected::ours()?, times: Times::default(), knows_liars: args.sweep };
    let (sweep, steps) = match &args.plan {
        Some(path) => {
            let plan = read(path, args, &judge)?;
            let steps = usize::try_from(rounds(&plan)).unwrap_or(usize::MAX);
            (Sweep::new([plan])?, steps)
        }
        None => plans(args, seed, &judge)?,
    };
    let progress = Progress::new();
    let subject: Arc<dyn Subject> =
        if args.disk { Arc::new(DiskAndEngines) } else { Arc::new(Engines) };

    // Whatever is made once for all machines is there after the first one.
    progress.say("a machine without faults", 1);
    let plain = attempt(Arc::clone(&subject), Plan::new(2), &judge).await;
    let mut tally = Tally::default();
    if !plain.violations.is_empty() {
        tally.add(plain, &judge.times);
    }
    let before = Resources::settled(None).await;

    progress.say("machines with faults", steps);
    // Smaller plans are looked for below, so that it can be seen how far that is.
    let sweep = sweep.judge(judge.clone()).at_once(args.at_once.into()).shrinking(Duration::ZERO);
    let ended = |tried: &Tried| {
        progress.bar.inc(rounds(&tried.plan).into());
        progress.bar.suspend(|| tell(args, tried));
    };
    tally.merge(sweep.run_with(Arc::clone(&subject), ended).await);

    progress.say("making smaller what failed", tally.failures().len());
    tally.shrink(&subject, &judge, args.shrinking, |_| progress.bar.inc(1)).await;
    let after = Resources::settled(Some(before)).await;
    let failures = tally.failures().iter().map(|failed| Failure::new(failed, args.disk)).collect();
    Ok(Summary::new(seed, tally, failures, judge.expected, before, after))
}

/// How many rounds are run of a plan: its own, and one without faults, to see that all is well again.
fn rounds(plan: &Plan) -> u32 {
    plan.rounds.saturating_add(1)
}

/// Tells at once what failed, with its plan; a smaller one comes later.
fn tell(args: &ChaosArgs, tried: &Tried) {
    for violation in &tried.violations {
        let hooks = tried.plan.hooks.iter().map(ToString::to_string);
        let faults: Vec<_> =
            tried.plan.faults.iter().map(ToString::to_string).chain(hooks).collect();
        let (policy, faults) = (tried.plan.policy, faults.join("; "));
        // Nobody is left to be told if standard error is closed.
        let _ = writeln!(io::stderr(), "standstill: {violation} ({policy}: {faults})");
    }
    if !tried.violations.is_empty() {
        let plan = as_text(&tried.plan, args.disk);
        let _ = writeln!(io::stderr(), "standstill: that was this plan:\n{plan}");
    }
}

fn read(path: &PathBuf, args: &ChaosArgs, judge: &Judge) -> Result<Plan, ChaosError> {
    let failed = |source| ChaosError::File { what: "read", path: path.clone(), source };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let accepted = |plan: Plan| {
        judge.accepts(&plan)?;
        if args.disk {
            disk::accepts(&plan)?;
        }
        Ok(plan)
    };
    let plan = Plan::from_toml(&text).and_then(accepted);
    plan.map_err(|error| ChaosError::Plan { path: path.clone(), source: Box::new(error) })
}

fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // Short enough to be typed again.
    now.map_or(0, |now| u64::from(now.subsec_nanos()))
}

/// Everything that is to be tried, and how many rounds that are.
fn plans(args: &ChaosArgs, seed: Option<u64>, judge: &Judge) -> Result<(Sweep, usize), ChaosError> {
    let Judge { expected, times, .. } = judge;
    let mut causes = [cases::inside(times), cases::outside(times)].concat();
    causes.retain(|cause| !args.disk || disk::is_judged(cause));
    let mut plans = Vec::new();
    if args.sweep {
        let policies = if args.policies == All { Policies::All } else { Policies::InTurn };
        let mut swept = [&causes[..], &cases::limits()].concat();
        swept.retain(|cause| !args.disk || disk::is_judged(cause));
        let victims = match policies {
            _ if args.disk => Victims::Only(DISK),
            Policies::All => Victims::Each,
            Policies::InTurn => Victims::InTurn { from: 0 },
        };
        // Those that wait longest come first.
        plans = cases::sweep_of_restarts(&causes, SWEPT, &victims, times);
        if args.disk {
            plans.extend(cases::sweep_of_one(DISK, &swept, SWEPT, policies, expected, times));
        } else {
            plans.extend(cases::sweep(&swept, SWEPT, policies, expected, times));
        }
        plans.extend(cases::sweep_of_hooks(SWEPT, expected, times));
        plans.extend(cases::sweep_of_coordinators(SWEPT, &victims));
        plans.extend(cases::sweep_of_queries(SWEPT, &victims, times));
        plans = plans.into_iter().step_by(args.every.into()).collect();
    }
    let mut all: u32 = plans.iter().map(rounds).fold(0, u32::saturating_add);
    let mut sweep = Sweep::new(plans)?;
    if let Some(seed) = seed {
        let own = args.rounds.unwrap_or(ROUNDS);
        let from = Seeded::new(seed, args.devices, ROUNDS_OF_ONE, &causes, expected, times);
        sweep = sweep.and_random(from, own);
        all = all.saturating_add(own);
    }
    Ok((sweep, usize::try_from(all).unwrap_or(usize::MAX)))
}
