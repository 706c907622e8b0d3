//! `standstill demo`: a machine of copy engines that is paused and resumed again and again while a
//! physical oracle watches.
//!
//! This command is the VMM and embeds the coordinator:
//!
//! - [`engines`](crate::engines): the machine, its VMM and the oracle;
//! - [`rounds`]: pause, look, resume, wait for traffic;
//! - [`summary`] and [`timeline`]: what a person, a program, and the eye get to see.

mod memcpy;
mod options;
mod rounds;
mod statistics;
mod summary;
mod timeline;

pub(crate) use options::DemoArgs;

use crate::engines::layout::BLOCK;
use crate::engines::machine::{self, Blueprint, VmmError};
use crate::progress::Progress;
use crate::trace::{Trace, TraceError};
use options::SlowError;
use rounds::{Run, on_own_thread};
use standstill::coordinator::{Events, Machine, MachineError, MachineEvent, StartError};
use std::cell::OnceCell;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use summary::Summary;
use thiserror::Error;
use timeline::{Timeline, TimelineError};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// How long the devices may take to end by themselves before they are killed.
const LAST_GRACE: Duration = Duration::from_millis(500);
/// How long connecting all devices may take: a refused register write would wait for ever.
const CONNECT_DEADLINE: Duration = Duration::from_secs(120);

/// Why the demonstration could not be finished.
#[derive(Debug, Error)]
enum DemoError {
    /// An option does not fit the machine.
    #[error("the options do not fit")]
    Options(#[from] SlowError),
    /// The command's own runtime.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
    /// The machine does not start.
    #[error("the machine does not start")]
    Start(#[source] Box<StartError>),
    /// The machine does not do what it is told.
    #[error("round {round}")]
    Round {
        /// Which, from 1; 0 is before the first.
        round: u32,
        /// Why.
        source: Box<MachineError>,
    },
    /// A device process ended by itself.
    #[error("device {device:?} is lost: {why}{}", proof.as_ref().map(|p| format!(" ({p})")).unwrap_or_default())]
    Lost {
        /// Its name.
        device: String,
        /// Why it does not count any more.
        why: String,
        /// How its process ended, once that is known.
        proof: Option<String>,
    },
    /// The VMM's side failed.
    #[error("the machine's VMM side failed")]
    Vmm(#[from] VmmError),
    /// Connecting took too long.
    #[error("connecting the devices to each other took longer than {CONNECT_DEADLINE:?}")]
    Connect,
    /// Nothing moved at all.
    #[error(
        "engine{writer} had not written to engine{receiver} {:?} after the start, nor had {others} other pairs",
        machine::TRAFFIC_DEADLINE
    )]
    NoTraffic {
        /// One that writes.
        writer: usize,
        /// The one that it should have written to.
        receiver: usize,
        /// How many more.
        others: usize,
    },
    /// The trace cannot be made.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The picture was not written.
    #[error(transparent)]
    Timeline(#[from] TimelineError),
    /// A signal ended it.
    #[error("ended by {}", signal_name(*.0))]
    Signal(SignalKind),
}

fn signal_name(kind: SignalKind) -> &'static str {
    if kind == SignalKind::interrupt() { "SIGINT" } else { "SIGTERM" }
}

impl DemoError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Signal(kind) => {
                128_u8.saturating_add(u8::try_from(kind.as_raw_value()).unwrap_or(0))
            }
            Self::Options(_) => 2,
            _ => 1,
        }
    }

    /// What a person can do about it.
    fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Options(_) => Some("see standstill demo --help"),
            Self::Start(_) => Some(
                "try fewer --devices; RUST_LOG=info shows what the devices say. Each needs a \
                 process and some file descriptors (ulimit -u, ulimit -n)",
            ),
            Self::Round { .. } | Self::Lost { .. } => {
                Some("RUST_LOG=info shows what the devices say")
            }
            Self::Vmm(VmmError::Folder(_)) => Some("set TMPDIR to a folder that can be written"),
            Self::Vmm(_) | Self::Connect | Self::NoTraffic { .. } => {
                Some("try fewer --devices; RUST_LOG=info shows what the devices say")
            }
            Self::Trace(_) => Some("choose another --trace FILE"),
            Self::Timeline(_) => {
                Some("the run itself was finished; choose another --timeline FILE")
            }
            Self::System(..) | Self::Signal(_) => None,
        }
    }
}

/// Ends without waiting for threads that block, also when it unwinds.
struct Background(Option<Runtime>);

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs the demonstration; returns the command's exit code.
pub(crate) fn run(args: &DemoArgs) -> ExitCode {
    let _log = crate::logging::start(args.log, "warn");
    crate::raise_file_limit();
    // The demo's devices leave no CPU idle; where it is not possible, the figures are worse.
    if let Err(error) = standstill::protocol::channel::prefer_short_waits() {
        tracing::info!(%error, "no short waits for the coordinator");
    }
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| DemoError::System("start the tokio runtime", error))
        .and_then(|runtime| {
            let background = Background(Some(runtime));
            background.0.as_ref().map_or(Ok(false), |runtime| runtime.block_on(supervise(args)))
        });
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            crate::print_error(&error);
            if let Some(advice) = error.advice() {
                let _ = writeln!(io::stderr(), "  {advice}");
            }
            if args.json {
                let object = serde_json::json!({ "ok": false, "error": error.to_string() });
                print_line(&object.to_string());
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs the demonstration until it is over or a signal comes; whatever comes, the machine is shut
/// down at the end. True if the run did what its mode promises.
async fn supervise(args: &DemoArgs) -> Result<bool, DemoError> {
    let listen = |kind| signal(kind).map_err(|error| DemoError::System("listen to signals", error));
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let started = OnceCell::new();
    let ended = tokio::select! {
        biased;
        _ = interrupt.recv() => Err(DemoError::Signal(SignalKind::interrupt())),
        _ = terminate.recv() => Err(DemoError::Signal(SignalKind::terminate())),
        summary = demonstrate(args, &started) => summary,
    };
    if let Some(Started { machine, trace }) = started.into_inner() {
        // Whatever has not ended by then is killed when the machine is dropped.
        match tokio::time::timeout(LAST_GRACE, machine.shutdown()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "shutting down"),
            Err(_) => tracing::warn!("devices did not end within {LAST_GRACE:?} and are killed"),
        }
        drop(machine);
        if let Some(trace) = trace.into_inner() {
            trace.finish().await;
        }
    }
    let (summary, timeline) = ended?;
    if args.json {
        print_line(&summary.to_json());
    } else {
        print_line(&summary.to_string());
    }
    if let (Some(path), Some(timeline)) = (&args.timeline, timeline) {
        write_timeline(path, &timeline)?;
    }
    Ok(summary.ok())
}

fn print_line(text: &str) {
    let mut stdout = io::stdout().lock();
    // A reader that has gone away wants no more.
    let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

fn write_timeline(path: &Path, timeline: &Timeline) -> Result<(), TimelineError> {
    svg::save(path, &timeline::draw(timeline))
        .map_err(|source| TimelineError { path: path.to_owned(), source })
}

/// What has to be ended, whatever happens.
struct Started {
    machine: Machine,
    trace: OnceCell<Trace>,
}

async fn demonstrate(
    args: &DemoArgs,
    slot: &OnceCell<Started>,
) -> Result<(Summary, Option<Timeline>), DemoError> {
    let slowness = args.slowness()?;
    let progress = Progress::new();
    let blueprint = Blueprint::new(args.engines(), BLOCK)?;
    let builder = rounds::machine(&blueprint, &slowness, args.single_phase)?;
    let trace = args.trace.open("the demonstration")?;
    progress.say("starting device processes", args.engines());
    let machine = builder.start().await.map_err(|error| DemoError::Start(Box::new(error)))?;
    let events = machine.events();
    let started = slot.get_or_init(|| Started { machine, trace: OnceCell::new() });
    let machine = started.machine.clone();
    let before = |source| DemoError::Round { round: 0, source: Box::new(source) };
    if let Some(trace) = trace {
        let status = machine.status().await.map_err(before)?;
        let trace = trace.follow(&status, events);
        let _ = started.trace.set(trace.map_err(|e| DemoError::System("start a thread", e))?);
    }
    machine.declare_ram(blueprint.ram()).await.map_err(before)?;

    progress.say("connecting them to each other", args.engines());
    let bar = progress.bar.clone();
    let connecting = on_own_thread(move || blueprint.connect(|| bar.inc(1)));
    let vmm = tokio::time::timeout(CONNECT_DEADLINE, connecting)
        .await
        .map_err(|_| DemoError::Connect)??;
    if !args.json {
        print_line(&summary::headline(args, vmm.pairs().len()));
    }
    progress.say("rounds", usize::try_from(args.rounds).unwrap_or(usize::MAX));
    let lost = device_lost(machine.events());
    let run = Run::new(args, machine, vmm, progress.bar.clone());
    tokio::select! {
        ended = run.all() => ended,
        lost = lost => Err(lost),
    }
}

/// Waits until a device process is lost outside any transition: a transition reports its own.
async fn device_lost(mut events: Events) -> DemoError {
    let (device, why) = loop {
        match events.recv().await {
            Some(MachineEvent::DeviceLost { device, detail, during: None, .. }) => {
                break (device, detail);
            }
            Some(_) => {}
            // The machine is gone: whoever waits for it learns that.
            None => std::future::pending().await,
        }
    };
    let fenced = async {
        loop {
            match events.recv().await {
                Some(MachineEvent::DeviceFenced { device: fenced, exit, .. })
                    if fenced == device =>
                {
                    return Some(exit.to_string());
                }
                Some(_) => {}
                None => return None,
            }
        }
    };
    let proof = tokio::time::timeout(LAST_GRACE, fenced).await.ok().flatten();
    DemoError::Lost { device, why, proof }
}
