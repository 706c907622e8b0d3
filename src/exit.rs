//! How the commands end.

use std::process::ExitCode;

/// What a shell gets to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It was done.
    Done = 0,
    /// It was refused, or did not work.
    Failed = 1,
    /// The command line or the machine file is wrong.
    Usage = 2,
    /// A device is lost and fenced; all others are in the state that the report says (`Degraded`).
    Degraded = 3,
    /// Something went wrong, and the machine is whole (`RolledBack`, `Stopped`).
    Whole = 4,
    /// The machine is held: something is not proven, and nothing starts.
    Held = 5,
    /// No such machine runs, or it does not answer.
    NotRunning = 6,
    /// Another coordinator has the machine.
    Superseded = 7,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// For the help of the commands.
pub(crate) const HELP: &str = "\
Exit status:
  0  done
  1  refused, or it did not work
  2  the command line or the machine file is wrong
  3  a device is lost; the report says where all others are (Degraded)
  4  something went wrong, and the machine is whole (RolledBack, Stopped)
  5  the machine is held: something is not proven, and nothing starts
  6  no such machine runs, or it does not answer
  7  another coordinator has the machine";
