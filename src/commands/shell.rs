//! `standstill completions` and `standstill man`: generated from the command line itself.

use crate::exit::Exit;
use crate::explain::explain;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// What follows `standstill completions`.
#[derive(Args, Clone, Debug)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
}

/// What follows `standstill man`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ManArgs {
    /// The folder into which the pages are written, such as /usr/local/share/man/man1
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Writes completions to standard output.
pub(crate) fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "standstill", &mut script);
    // A reader that has gone away wants no more.
    let _ = io::stdout().lock().write_all(&script);
    Exit::Done.into()
}

/// Writes a page for the command and for each of its subcommands.
pub(crate) fn man(args: &ManArgs) -> ExitCode {
    let command = crate::Cli::command().disable_help_subcommand(true);
    let written = std::fs::create_dir_all(&args.folder)
        .and_then(|()| clap_mangen::generate_to(command, &args.folder));
    match written {
        Ok(()) => Exit::Done.into(),
        Err(error) => {
            let text = explain(&error);
            let _ = writeln!(io::stderr(), "standstill: {}: {text}", args.folder.display());
            Exit::Failed.into()
        }
    }
}
