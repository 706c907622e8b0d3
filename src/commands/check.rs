//! `standstill check`: looks at a machine file and starts nothing.

use super::show::{colours_on_stderr, json, line};
use crate::exit::Exit;
use crate::explain::explain;
use crate::machine_file::checks::somebody_listens;
use crate::machine_file::{Beginning, MachineFile, Problems};
use crate::run::directory::OPERATOR_SOCKET;
use crate::run::load;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// What follows `standstill check`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Exit status:\n  0  nothing is wrong\n  2  something is, or the file cannot be read"
)]
pub(crate) struct CheckArgs {
    /// The machine file
    #[arg(value_name = "MACHINE.toml")]
    file: PathBuf,
    /// Look at the text alone: not at programs, sockets and files that it speaks of
    #[arg(long)]
    text_only: bool,
    /// Where machines live, instead of the default
    #[arg(long, value_name = "DIR", env = "STANDSTILL_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
    /// Write the problems as JSON
    #[arg(long)]
    json: bool,
}

/// Exit code 0 if nothing is wrong, else 2.
pub(crate) fn run(args: &CheckArgs) -> ExitCode {
    let mut loaded = match load(&args.file, args.runtime_dir.as_deref()) {
        Ok(loaded) => loaded,
        Err(error) => {
            let _ = writeln!(anstream::stderr(), "standstill: {}", explain(&error));
            if let Some(advice) = error.advice() {
                let _ = writeln!(anstream::stderr(), "  {advice}");
            }
            return Exit::Usage.into();
        }
    };
    let running = is_running(&loaded.file);
    if !args.text_only {
        // The sockets of a machine that runs are its own.
        let beginning = if running { Beginning::TakeOver } else { Beginning::Start };
        loaded.file.check(beginning, &mut loaded.problems);
    }
    let problems = &loaded.problems;
    if args.json {
        json(&problems.to_json());
    } else if problems.is_empty() {
        let MachineFile { name, devices, .. } = &loaded.file;
        let runs = if running { ", which runs" } else { "" };
        let devices = devices.len();
        line(&format!("{}: machine {name:?}{runs}, {devices} devices", args.file.display()));
    } else {
        let _ = writeln!(anstream::stderr(), "{}", shown(problems));
    }
    if problems.is_empty() { Exit::Done.into() } else { Exit::Usage.into() }
}

/// Whether somebody serves the machine's operator socket.
fn is_running(file: &MachineFile) -> bool {
    !file.name.is_empty() && somebody_listens(&file.folder.join(OPERATOR_SOCKET)).unwrap_or(false)
}

/// The problems and how many they are, in colours where standard error shows them.
pub(crate) fn shown(problems: &Problems) -> String {
    let many = match problems.len() {
        1 => "one problem".to_owned(),
        many => format!("{many} problems"),
    };
    let shown = problems.render(colours_on_stderr());
    format!("{shown}\n\nstandstill: {many}; nothing was started")
}
