//! `standstill run`: starts a machine from its file, or takes it over, and stays until it is told to
//! end it.
//!
//! - [`directory`]: where the machine is found, and who has it;
//! - [`attach`]: what an earlier coordinator has left behind;
//! - [`hook`]: commands that run when the machine stops and starts;
//! - [`notify`]: what systemd gets to know;
//! - [`observers`]: a trace file, a metrics endpoint;
//! - [`qmp`]: the VM, which stops before its devices;
//! - [`output`]: what is said to whoever started it;
//! - [`stay`]: from the start to the end.
//!
//! Whoever wants to watch the machine gets its handle and a reader of its events: see [`stay`].

mod attach;
pub(crate) mod directory;
mod error;
pub(crate) mod hook;
pub(crate) mod notify;
mod observers;
mod output;
mod qmp;
mod stay;

use crate::exit::Exit;
use crate::explain::explain;
use crate::logging::{Log, LogArgs};
use crate::machine_file::{Beginning, MachineFile, Places, Problems, folder_of};
use clap::{Args, ValueEnum};
use directory::runtime_directory;
use error::RunError;
use observers::ObserverArgs;
use output::Output;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const AFTER_HELP: &str = "\
The machine is found in the runtime directory: $XDG_RUNTIME_DIR/standstill, or /run/standstill for
root. There is its operator socket, for `standstill status`, `pause`, `resume` and the others.

SIGTERM and SIGINT (Ctrl-C) end the machine: every device process is asked to end, and killed after
2 s; a second signal kills at once. If this process is killed itself, also by SIGHUP, the devices stay
as they are (orphan = \"keep\"), and `standstill run --attach` takes them over.

Under systemd (Type=notify) it tells when the machine is ready, how it is, and that it still works.

Log lines of the command and of its devices go to standard error; RUST_LOG=debug shows more, and
docs/observability.md says what there is.

Exit status:
  0  the machine was ended, or left for a later `run --attach`
  1  it did not start, or not everything could be ended
  2  the command line or the machine file is wrong
  6  with --attach: there is nothing to take over
  7  another coordinator has taken the machine over";

/// What is logged unless `RUST_LOG` says otherwise. The actors' own spans say nothing to an operator.
const DEFAULT_FILTER: &str = "info,ractor=warn";

/// What follows `standstill run`.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = AFTER_HELP, after_help = "Signals and exit status: --help")]
pub(crate) struct RunArgs {
    /// The machine file
    #[arg(value_name = "MACHINE.toml")]
    file: PathBuf,
    /// Take the machine over that an earlier `run` has left behind, or that hangs; `if-left`: start
    /// it if nothing is left, and never take it from a process that is alive
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "always")]
    attach: Option<Attach>,
    /// Where machines live, instead of the default
    #[arg(long, value_name = "DIR", env = "STANDSTILL_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
    #[command(flatten)]
    observers: ObserverArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// When a machine is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Attach {
    /// There must be one.
    Always,
    /// If there is one without coordinator.
    IfLeft,
}

/// A machine file that was read.
pub(crate) struct Loaded {
    pub(crate) file: MachineFile,
    pub(crate) problems: Problems,
    /// The runtime directory of all machines.
    pub(crate) runtime: PathBuf,
}

/// Reads a machine file; what is wrong with it is in `problems`.
pub(crate) fn load(path: &Path, runtime: Option<&Path>) -> Result<Loaded, RunError> {
    let runtime = runtime_directory(runtime)?;
    let read = |source| RunError::Read { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(read)?;
    let mut problems = Problems::new(path.display().to_string(), text.clone());
    let places = Places { file: folder_of(path), runtime: runtime.clone() };
    let file = MachineFile::read(&text, &places, &mut problems);
    Ok(Loaded { file, problems, runtime })
}

/// Runs the machine; returns when it is over.
pub(crate) fn run(args: &RunArgs) -> ExitCode {
    // What a launcher has left open is not for devices and hooks: they may outlive it, and a device
    // may be hostile.
    close_fds::set_fds_cloexec(3, &[]);
    let log = crate::logging::start(args.log, DEFAULT_FILTER);
    let output = Output::start();
    crate::raise_file_limit();
    let ended = load(&args.file, args.runtime_dir.as_deref()).and_then(|loaded| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| RunError::System { what: "start the tokio runtime", source })?;
        let ended = runtime.block_on(stay::stay(loaded, args, log.dropped(), &output));
        // A hook that hangs holds nobody up.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(exit) => exit.into(),
        Err(error) => {
            tell(&log, &error);
            error.exit().into()
        }
    }
}

/// Tells a person why the machine does not run.
fn tell(log: &Log, error: &RunError) {
    log.tell(&match error {
        RunError::File(problems) => crate::commands::check::shown(problems),
        error => format!("standstill: {}", explain(error)),
    });
    if let Some(advice) = error.advice() {
        log.tell(&format!("  {advice}"));
    }
}

/// Whether what the file speaks of is there.
fn checked(loaded: &mut Loaded, beginning: Beginning) -> Result<(), RunError> {
    if loaded.problems.is_empty() {
        loaded.file.check(beginning, &mut loaded.problems);
    }
    if loaded.problems.is_empty() {
        Ok(())
    } else {
        Err(RunError::File(Box::new(loaded.problems.clone())))
    }
}

/// How a machine ended that is no error.
fn exit_of(all_gone: bool) -> Exit {
    if all_gone { Exit::Done } else { Exit::Failed }
}
