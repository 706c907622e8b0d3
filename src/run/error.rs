//! Why a machine does not run, and what a person can do about it.

use super::directory::DirectoryError;
use crate::exit::Exit;
use crate::machine_file::Problems;
use crate::metrics::MetricsError;
use crate::trace::TraceError;
use standstill::coordinator::control_directory::ControlDirectoryError;
use standstill::coordinator::error::GreetingError;
use standstill::coordinator::{MachineError, StartError, TakeOverError};
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why a machine does not run.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    /// The machine file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The machine file is wrong.
    #[error("the machine file has problems")]
    File(Box<Problems>),
    /// Its place cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// What is left of an earlier coordinator cannot be used.
    #[error("what an earlier coordinator has left cannot be used")]
    Control(#[from] ControlDirectoryError),
    /// Devices of an earlier coordinator are there.
    #[error("machine {machine:?} was left behind by an earlier coordinator: {} alive", alive.join(", "))]
    LeftBehind {
        /// The machine.
        machine: String,
        /// Its devices that are alive.
        alive: Vec<String>,
    },
    /// There is nothing to take over.
    #[error("there is nothing of machine {machine:?} to take over")]
    NothingLeft {
        /// The machine.
        machine: String,
    },
    /// A device cannot be described.
    #[error(
        "device {device:?} is there and cannot be described: it is neither in the machine file nor was it added here"
    )]
    Undescribed {
        /// Its name.
        device: String,
    },
    /// The machine does not start.
    #[error("the machine does not start")]
    Start(#[source] Box<StartError>),
    /// The machine cannot be taken over.
    #[error("the machine cannot be taken over")]
    TakeOver(#[source] Box<TakeOverError>),
    /// The machine does not do what it is told.
    #[error("{what}")]
    Machine {
        /// What it was to do.
        what: String,
        /// Why it does not.
        source: MachineError,
    },
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The trace cannot be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A signal came while it started.
    #[error("ended by a signal before the machine had started")]
    Interrupted,
    /// The machine ended by itself.
    #[error("the coordinator of the machine has ended unexpectedly; see the log")]
    Lost,
    /// Another coordinator has the machine.
    #[error("another coordinator has taken machine {machine:?} over; its devices are unharmed")]
    Superseded {
        /// The machine.
        machine: String,
    },
}

impl RunError {
    /// How the command ends.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Read { .. } | Self::File(_) => Exit::Usage,
            Self::NothingLeft { .. } => Exit::NotRunning,
            Self::Superseded { .. } => Exit::Superseded,
            Self::TakeOver(error) if matches!(**error, TakeOverError::Superseded { .. }) => {
                Exit::Superseded
            }
            _ => Exit::Failed,
        }
    }

    /// What a person can do about it.
    pub(crate) fn advice(&self) -> Option<&'static str> {
        match self {
            Self::File(_) => Some("docs/machine-file.md has every key"),
            Self::Directory(DirectoryError::Unknown) => {
                Some("set XDG_RUNTIME_DIR, or use --runtime-dir DIR")
            }
            Self::Directory(DirectoryError::Foreign { .. }) => Some(
                "whoever can write there is in command of the machine; choose another --runtime-dir",
            ),
            Self::Directory(DirectoryError::Running { .. }) => Some(
                "`standstill status` shows how it is. If that process hangs, `standstill run --attach` \
                 takes the machine away from it",
            ),
            Self::Directory(DirectoryError::System { source, .. })
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Some("run it as a user who may write there, or use --runtime-dir DIR")
            }
            Self::LeftBehind { .. } => Some(
                "take it over with `standstill run --attach`; `standstill shutdown` ends it then",
            ),
            Self::Trace(_) => Some("choose another --trace FILE"),
            Self::Metrics(_) => Some("choose another --metrics ADDR"),
            Self::Start(error) if is_mute(error) => Some(
                "a device's program says Hello on its standard input, by `serve` of the device \
                 runtime: README.md, \"Write a device\"",
            ),
            Self::NothingLeft { .. } => Some("start it without --attach"),
            Self::Undescribed { .. } => Some("put it into the machine file as it was started"),
            Self::TakeOver(_) => {
                Some("its devices are as they were; see docs/take-over.md, and try again")
            }
            _ => None,
        }
    }
}

/// Whether a device's program has neither greeted nor said why: it may be none of a device.
fn is_mute(error: &StartError) -> bool {
    use GreetingError::{Disconnected, Exited, Silent};
    let StartError::Greeting { source: Silent(_) | Exited(_) | Disconnected, stderr, .. } = error
    else {
        return false;
    };
    stderr.is_empty()
}
