//! The commands that talk to a running machine, and those about machine files and shells.
//!
//! - [`target`]: which machine is meant;
//! - [`status`], [`transition`], [`membership`], [`events`], [`report`]: what is asked of it;
//! - [`check`]: a machine file, without starting anything;
//! - [`shell`]: completions and man pages;
//! - [`show`]: tables and colours.

pub(crate) mod check;
pub(crate) mod events;
pub(crate) mod membership;
pub(crate) mod report;
pub(crate) mod shell;
pub(crate) mod show;
pub(crate) mod status;
pub(crate) mod target;
pub(crate) mod transition;

use crate::exit::Exit;
use crate::explain::explain;
use crate::operator::client::ClientError;
use crate::operator::message::{Code, Problem, ReportReply};
use std::io::{self, Write};
use std::process::ExitCode;
use target::TargetError;
use thiserror::Error;

/// Why a command did not do what it was asked.
#[derive(Debug, Error)]
pub(crate) enum CommandError {
    /// It is not clear which machine is meant.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The machine does not answer, or says no.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A file cannot be read or written.
    #[error("cannot {what}")]
    File {
        /// What.
        what: String,
        /// Why.
        source: io::Error,
    },
}

impl CommandError {
    fn exit(&self) -> Exit {
        match self {
            Self::Target(error) => error.exit(),
            Self::Client(
                ClientError::NotRunning { .. }
                | ClientError::Silent { .. }
                | ClientError::Closed { .. },
            ) => Exit::NotRunning,
            Self::Client(ClientError::Problem(problem)) => exit_of(problem),
            Self::Client(_) => Exit::Failed,
            Self::File { .. } => Exit::Usage,
        }
    }

    /// What a person can do about it.
    fn advice(&self) -> Option<String> {
        let text = match self {
            Self::Client(ClientError::NotRunning { left: true, .. }) => {
                "whoever ran it was killed. `standstill run --attach MACHINE.toml` takes the machine over"
            }
            Self::Client(ClientError::NotRunning { left: false, .. }) => {
                "start it with `standstill run MACHINE.toml`"
            }
            Self::Client(ClientError::System { source, .. })
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                "only the user who runs the machine, and root, may operate it"
            }
            Self::Client(ClientError::Silent { .. }) => {
                "`standstill run --attach MACHINE.toml` takes the machine away from it"
            }
            Self::Client(ClientError::Version { .. }) => {
                "use the `standstill` of the same version; a machine is upgraded by \
                 `standstill shutdown --keep-devices` and `standstill run --attach`"
            }
            Self::Client(ClientError::Problem(problem)) => return problem.advice.clone(),
            Self::Target(error) => return error.advice(),
            _ => return None,
        };
        Some(text.to_owned())
    }
}

fn exit_of(problem: &Problem) -> Exit {
    match (problem.code, &problem.report) {
        (Code::Transition, Some(report)) => exit_of_report(report),
        (Code::BadDevice, _) => Exit::Usage,
        (Code::Superseded, _) => Exit::Superseded,
        _ => Exit::Failed,
    }
}

/// How a command that moves the machine ends.
fn exit_of_report(report: &ReportReply) -> Exit {
    match report.report.outcome.as_str() {
        "Done" => Exit::Done,
        "Degraded" => Exit::Degraded,
        "RolledBack" | "Stopped" => Exit::Whole,
        _ => Exit::Held,
    }
}

/// Ends a command: tells a person what went wrong. With `json`, a program gets it on standard
/// output.
pub(crate) fn finish(result: Result<Exit, CommandError>, json: bool) -> ExitCode {
    let error = match result {
        Ok(exit) => return exit.into(),
        Err(error) => error,
    };
    if json {
        let object = match &error {
            CommandError::Client(ClientError::Problem(problem)) => serde_json::to_value(problem),
            error => Ok(serde_json::json!({ "code": "client", "message": explain(error) })),
        };
        show::line(&serde_json::json!({ "error": object.unwrap_or_default() }).to_string());
        return error.exit().into();
    }
    let mut stderr = anstream::stderr().lock();
    let report = match &error {
        CommandError::Client(ClientError::Problem(problem)) => problem.report.as_ref(),
        _ => None,
    };
    // Nobody is left to be told if standard error is closed.
    let _ = match (report, &error) {
        (Some(report), _) => write!(stderr, "{}", report.text),
        // As `check` shows it.
        (None, CommandError::Client(ClientError::Problem(problem)))
            if problem.code == Code::BadDevice =>
        {
            writeln!(stderr, "{}\n\nstandstill: nothing was added", problem.message)
        }
        _ => writeln!(stderr, "standstill: {}", explain(&error)),
    };
    if let Some(advice) = error.advice() {
        let _ = writeln!(stderr, "  {advice}");
    }
    error.exit().into()
}
