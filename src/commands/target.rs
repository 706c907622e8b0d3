//! Which machine is meant.

use crate::exit::Exit;
use crate::machine_file::checks::somebody_listens;
use crate::operator::client::Client;
use crate::run::directory::{DirectoryError, OPERATOR_SOCKET, machines, runtime_directory};
use clap::Args;
use std::path::PathBuf;
use thiserror::Error;

/// The options of every command that talks to a machine.
#[derive(Args, Clone, Debug)]
pub(crate) struct Target {
    /// The machine's name; not needed if just one runs
    #[arg(short, long, value_name = "NAME", env = "STANDSTILL_MACHINE", conflicts_with = "socket")]
    machine: Option<String>,
    /// The path of the machine's operator socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where machines live, instead of the default
    #[arg(long, value_name = "DIR", env = "STANDSTILL_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
    /// Write JSON for programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// It is not clear which machine is meant.
#[derive(Debug, Error)]
pub(crate) enum TargetError {
    /// There is no runtime directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// None runs.
    #[error("no machine runs in {}", runtime.display())]
    None {
        /// The runtime directory.
        runtime: PathBuf,
    },
    /// There are some, and none has this name.
    #[error("no machine {name:?} runs in {}", runtime.display())]
    Unknown {
        /// The name.
        name: String,
        /// The runtime directory.
        runtime: PathBuf,
        /// Those that run.
        others: Vec<String>,
    },
    /// There is more than one.
    #[error("there are {} machines: {}", names.len(), names.join(", "))]
    Many {
        /// Their names.
        names: Vec<String>,
    },
}

impl TargetError {
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Directory(_) | Self::Many { .. } => Exit::Usage,
            Self::None { .. } | Self::Unknown { .. } => Exit::NotRunning,
        }
    }

    pub(super) fn advice(&self) -> Option<String> {
        Some(match self {
            Self::Directory(_) => "use --socket PATH or --runtime-dir DIR".to_owned(),
            Self::None { .. } => {
                "start one with `standstill run MACHINE.toml`; a machine of another \
                                  user is reached with --socket PATH"
                    .to_owned()
            }
            Self::Unknown { others, .. } if others.is_empty() => return Self::advice_to_start(),
            Self::Unknown { name, others, .. } => {
                match crate::nearest::nearest(name, others.iter().map(String::as_str)) {
                    Some(meant) => format!("did you mean {meant:?}?"),
                    None => format!("these run: {}", others.join(", ")),
                }
            }
            Self::Many { .. } => "say which one with --machine NAME".to_owned(),
        })
    }

    fn advice_to_start() -> Option<String> {
        Some("start it with `standstill run MACHINE.toml`".to_owned())
    }
}

impl Target {
    /// Where the machine's operator socket is.
    fn socket(&self) -> Result<PathBuf, TargetError> {
        if let Some(socket) = &self.socket {
            return Ok(socket.clone());
        }
        let runtime = runtime_directory(self.runtime_dir.as_deref())?;
        if let Some(name) = &self.machine {
            let socket = runtime.join(name).join(OPERATOR_SOCKET);
            if matches!(socket.try_exists(), Ok(false)) {
                let (name, others) = (name.clone(), machines(&runtime));
                return Err(TargetError::Unknown { name, runtime, others });
            }
            return Ok(socket);
        }
        // Those that were killed are meant only if no other one is there.
        let (mut names, left): (Vec<_>, Vec<_>) =
            machines(&runtime).into_iter().partition(|name| {
                somebody_listens(&runtime.join(name).join(OPERATOR_SOCKET)).unwrap_or(true)
            });
        if names.is_empty() {
            names = left;
        }
        match names.as_slice() {
            [] => Err(TargetError::None { runtime }),
            [name] => Ok(runtime.join(name).join(OPERATOR_SOCKET)),
            _ => Err(TargetError::Many { names }),
        }
    }

    /// Connects to the machine.
    pub(crate) fn connect(&self) -> Result<Client, super::CommandError> {
        let socket = self.socket()?;
        Ok(Client::connect(&socket)?)
    }
}
