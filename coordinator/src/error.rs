//! Why a machine does not start, stop or answer.

use crate::control_directory::ControlDirectoryError;
use crate::dirty::DirtyError;
use crate::process::{Exit, SpawnError};
use crate::report::TransitionReport;
use standstill_protocol::channel::{RecvError, SendError};
use standstill_protocol::message::{Term, VersionRange};
use standstill_protocol::transition::{MachineState, Operation, PlanError};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

/// Why a machine was not started. Everything that was started is gone.
#[derive(Debug, Error)]
pub enum StartError {
    /// The description does not fit.
    #[error("bad machine description: {0}")]
    Description(String),
    /// A device's program cannot be started.
    #[error("device {device:?} cannot be started")]
    Spawn {
        /// Its name.
        device: String,
        /// Why.
        source: SpawnError,
    },
    /// A device did not greet as it should.
    #[error("device {device:?} {source}{}", tail(.stderr))]
    Greeting {
        /// Its name.
        device: String,
        /// What it did instead.
        source: GreetingError,
        /// The last lines that it wrote to standard error.
        stderr: Vec<String>,
    },
    /// The directory in which a later coordinator is to find the machine cannot be used.
    #[error("the machine cannot be kept for a later coordinator")]
    ControlDirectory(#[from] ControlDirectoryError),
    /// The machine as a whole is not possible.
    #[error("device {device:?} does not fit into this machine: {source}")]
    Plan {
        /// The device that stands in the way.
        device: String,
        /// Why.
        source: PlanError,
    },
    /// The device is to be restarted when it is lost, and its client cannot reconnect.
    #[error("device {device:?} cannot have the policy restart: {reason}")]
    RestartRefused {
        /// Its name.
        device: String,
        /// Why its client cannot.
        reason: String,
    },
    /// The device cannot mark what it writes to RAM, and the machine's devices have to.
    #[error(
        "device {device:?} cannot tell which pages of RAM it writes, and that is being tracked"
    )]
    Untracked {
        /// Its name.
        device: String,
    },
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Why a machine was not taken over. Nothing was told to its devices.
#[derive(Debug, Error)]
pub enum TakeOverError {
    /// The description does not say where the machine is.
    #[error("the description has no control directory: say which one with `keep`")]
    NoControlDirectory,
    /// The directory or its record cannot be used.
    #[error("the machine cannot be found")]
    ControlDirectory(#[from] ControlDirectoryError),
    /// Another machine is there.
    #[error("machine {found:?} is recorded there, expected {expected:?}")]
    Machine {
        /// Its name.
        found: String,
        /// The name in the description.
        expected: String,
    },
    /// The description lacks a device. Nobody would stop it with the others.
    #[error("device {device:?} is recorded and the description lacks it")]
    Undescribed {
        /// Its name.
        device: String,
    },
    /// The description has a device that was not there.
    #[error("device {device:?} is described and was never recorded: add it after the take-over")]
    Unrecorded {
        /// Its name.
        device: String,
    },
    /// A device belongs to another machine.
    #[error("device {device:?} belongs to {}, expected machine {expected}", machine(.found))]
    ForeignMachine {
        /// Its name in the record.
        device: String,
        /// The machine to which it belongs.
        found: Option<Uuid>,
        /// The machine of the record.
        expected: Uuid,
    },
    /// A device speaks other versions of the protocol.
    #[error("device {device:?} speaks protocol version {theirs}, this coordinator speaks {ours}")]
    Version {
        /// Its name.
        device: String,
        /// What it speaks.
        theirs: VersionRange,
        /// What this coordinator speaks.
        ours: VersionRange,
    },
    /// Yet another coordinator has taken the machine over meanwhile.
    #[error("another coordinator with the higher term {term} has the machine")]
    Superseded {
        /// Its term.
        term: Term,
    },
    /// The description does not fit.
    #[error(transparent)]
    Description(Box<StartError>),
    /// The take-over was begun and its end is not known.
    #[error("the take-over did not end as it should")]
    Unfinished(#[source] MachineError),
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn machine(found: &Option<Uuid>) -> String {
    found.map_or_else(|| "no machine".to_owned(), |uuid| format!("machine {uuid}"))
}

fn tail(lines: &[String]) -> String {
    if lines.is_empty() {
        String::new()
    } else {
        format!("; it last wrote:\n    {}", lines.join("\n    "))
    }
}

/// What a device process did instead of greeting.
#[derive(Debug, Error)]
pub enum GreetingError {
    /// Nothing.
    #[error("did not say Hello within {0:?}")]
    Silent(Duration),
    /// It ended.
    #[error("ended before it said Hello: {0}")]
    Exited(Exit),
    /// It closed its control channel.
    #[error("closed its control channel before it said Hello")]
    Disconnected,
    /// It speaks other versions of the protocol.
    #[error("speaks protocol version {theirs}, this coordinator speaks {ours}")]
    Version {
        /// What it speaks.
        theirs: VersionRange,
        /// What this coordinator speaks.
        ours: VersionRange,
    },
    /// It sent something that is no Hello.
    #[error("broke the protocol before it said Hello")]
    Protocol(#[source] ProtocolError),
    /// It cannot be kept for a later coordinator.
    #[error("cannot be kept for a later coordinator")]
    Keep(#[source] Box<ControlDirectoryError>),
    /// It was welcomed and was lost on its way in.
    #[error("was lost before it had joined the machine: {0}")]
    Joining(String),
    /// It greeted, and was lost while others had still to greet.
    #[error("greeted and was lost before the machine had started: {0}")]
    Lost(String),
}

/// How a device process broke the protocol.
#[derive(Debug, Error)]
pub enum ProtocolError {
    /// Its packet is no message.
    #[error(transparent)]
    Packet(#[from] RecvError),
    /// Its message comes at the wrong time.
    #[error("sent {what} where {expected} was expected")]
    Unexpected {
        /// What it sent.
        what: &'static str,
        /// What was expected.
        expected: &'static str,
    },
    /// It sends too much.
    #[error("sent more than {0} messages in a second that nobody had asked for")]
    Flood(u32),
    /// A backing file of its Hello is not acceptable.
    #[error("declared a backing file that cannot be used")]
    BackingFile(#[source] crate::process::BackingFileError),
    /// It has not locked a backing file of its Hello.
    #[error("declared a backing file that it has not locked")]
    BackingFileUnlocked,
    /// It cannot be answered.
    #[error("cannot be answered")]
    Send(#[from] SendError),
    /// It says that another coordinator has it, and none has taken the machine over.
    #[error("says that another coordinator has it, with term {0}, which is not so")]
    NotSuperseded(Term),
    /// It claims to belong to another machine or term although it has just been started.
    #[error("claims a past although it has just been started")]
    NotFresh,
}

/// Why a machine did not do what it was asked.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The transition did not end where it was to end; the report says everything.
    #[error("{}", transition(.0))]
    Transition(Arc<TransitionReport>),
    /// The machine is not in a state from which this is possible.
    #[error("{operation} is not possible: the machine is {machine}{}", during(.under_way))]
    State {
        /// What was asked.
        operation: Operation,
        /// Where the machine is.
        machine: MachineState,
        /// What is under way.
        under_way: Option<Operation>,
    },
    /// A participant does not allow it; nothing was sent.
    #[error("device {device:?} stands in the way: {source}")]
    Plan {
        /// Its name.
        device: String,
        /// Why.
        source: PlanError,
    },
    /// A device did not accept a memory declaration.
    #[error("device {device:?} did not accept the memory declaration: {why}")]
    Memory {
        /// Its name.
        device: String,
        /// Why, for a person.
        why: String,
    },
    /// As many files as there can be were declared RAM already; no device was told of this one.
    #[error("{most} files are declared RAM already, and no device accepts another one")]
    TooMuchRam {
        /// How many there can be.
        most: usize,
    },
    /// Which pages are written cannot be tracked as was asked.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The fd cannot be used.
    #[error("the file descriptor cannot be used")]
    Fd {
        /// Why.
        source: io::Error,
    },
    /// Another coordinator has taken the machine over.
    #[error("another coordinator with the higher term {term} has the machine")]
    Superseded {
        /// Its term.
        term: Term,
    },
    /// The machine is not held.
    #[error("the machine is {0}, not held")]
    NotHeld(MachineState),
    /// A device that the machine must not run without is missing. Remove it, or restart it.
    #[error("device {device:?} is missing, and the machine must not run without it: {why}")]
    Missing {
        /// Its name.
        device: String,
        /// Why it is missing, for a person.
        why: String,
    },
    /// There is no device process of that name.
    #[error("the machine has no device process {device:?}")]
    NoDevice {
        /// The name.
        device: String,
    },
    /// Something cannot be done with a device as things are; nothing was begun.
    #[error("{what} device {device:?} is not possible: {why}")]
    Device {
        /// What: adding, removing or restarting.
        what: &'static str,
        /// Its name.
        device: String,
        /// Why not, for a person.
        why: String,
    },
    /// A device was to be added or restarted, and was not. Nothing of it is left, or its fence is
    /// still to be proven.
    #[error(transparent)]
    NotStarted(Box<StartError>),
    /// A device is being removed, and its end is not proven within the grace.
    #[error("nothing proves that device {device:?} is gone")]
    Unproven {
        /// Its name.
        device: String,
    },
    /// What waited for its turn was given up by the owner.
    #[error("the {operation} was cancelled before it had begun")]
    Cancelled {
        /// What was asked.
        operation: Operation,
    },
    /// Too many requests wait for their turn.
    #[error("{0} requests wait for their turn already")]
    Busy(usize),
    /// The machine was shut down.
    #[error("the machine is gone")]
    Gone,
}

fn transition(report: &TransitionReport) -> String {
    let mut text = format!("{} ended in {}", report.operation, report.outcome.name());
    for line in report.failure_lines() {
        text.push_str("; ");
        text.push_str(&line);
    }
    text
}

fn during(operation: &Option<Operation>) -> String {
    operation.map_or_else(String::new, |operation| format!(", and a {operation} is under way"))
}

/// An error and its sources, as one text that people are told why something is so. A source that an
/// error tells itself is not told again.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let sources = std::iter::successors(error.source(), |&error| error.source());
    for source in sources.map(ToString::to_string) {
        if !text.contains(&source) {
            text.push_str(": ");
            text.push_str(&source);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_told_once() {
        let source = io::Error::other("no room");
        let path = "/run/vm/machine.json".into();
        let written = ControlDirectoryError::System { what: "write", path, source };
        let text = with_sources(&GreetingError::Keep(Box::new(written)));
        assert!(text.starts_with("cannot be kept for a later coordinator: "), "{text}");
        assert_eq!(text.matches("no room").count(), 1, "{text}");
    }
}
