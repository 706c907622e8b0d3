//! What was seen when a plan was run: data, for [oracles](super::oracle) to judge.

use standstill_coordinator::report::{CommandAnswer, TransitionReport};
use standstill_coordinator::{DeviceStanding, DeviceStatus, MachineError, Status};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{MachineState, Outcome};
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// Everything that was seen of one run.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// What happened, in order.
    pub events: Vec<Event>,
    /// For each fault of the plan, whether it has fired.
    pub fired: Vec<bool>,
    /// The faults of hooks that have fired, by their number in the plan from 0.
    pub hooks_fired: BTreeSet<usize>,
    /// Writes that came too late, by the round.
    pub late: Vec<(u32, String)>,
    /// What did not work any more after a round.
    pub idle: Vec<(u32, String)>,
    /// Device processes that were left at the end.
    pub left: Vec<String>,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The machine was asked something.
    Step(Step),
    /// A device was lost outside of any transition, and is fenced.
    Lost {
        /// In which round, from 1.
        round: u32,
        /// Who.
        device: usize,
    },
    /// A device was to be started again, and all attempts have failed.
    GivenUp {
        /// In which round, from 1.
        round: u32,
        /// Who.
        device: usize,
    },
    /// The machine has not started.
    NotStarted {
        /// The device that has not greeted as it should.
        device: usize,
        /// What the error says.
        why: String,
    },
}

/// One thing that the machine was asked.
#[derive(Clone, Debug)]
pub struct Step {
    /// In which round, from 1; the round after the last one of the plan has no faults of its own.
    pub round: u32,
    /// What.
    pub act: Act,
    /// How it ended.
    pub ended: Ended,
    /// Where the machine was after it.
    pub machine: MachineState,
    /// Devices that count after it.
    pub survivors: Vec<Survivor>,
    /// Faults of the plan, by their number from 0, that have fired between the step before and this one.
    pub fired_before: BTreeSet<usize>,
    /// Those that have fired in it.
    pub fired: BTreeSet<usize>,
    /// Faults of hooks that have fired in it, by their number from 0.
    pub hooks_fired: BTreeSet<usize>,
    /// How long it took.
    pub took: Duration,
}

/// What a machine is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    /// To accept a declaration of guest RAM.
    Declare,
    /// To pause.
    Pause,
    /// To resume.
    Resume,
    /// To have another coordinator, after its first one was lost.
    TakeOver,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All are where it leads. Of a declaration: it is in force everywhere.
    Done,
    /// All are where they were.
    RolledBack,
    /// All are stopped.
    Stopped,
    /// These devices were fenced, all others run or are stopped.
    Degraded {
        /// Who.
        fenced: BTreeSet<usize>,
    },
    /// Something is not proven.
    Held,
    /// Nothing was begun, or what was begun was not accepted, for this reason.
    Refused(String),
}

/// A device that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// Its number.
    pub device: usize,
    /// Where the machine's status says that it is.
    pub status: Option<MigrationState>,
    /// Where its own last answer says that it is; `None` if it was asked nothing.
    pub answered: Option<MigrationState>,
}

impl Ended {
    /// Of a transition. Devices are known by their names.
    pub(super) fn of(
        ended: &Result<std::sync::Arc<TransitionReport>, MachineError>,
        names: &[String],
    ) -> Self {
        let report = match ended {
            Ok(report) => report,
            Err(MachineError::Transition(report)) => report,
            Err(error) => return Self::Refused(crate::chain(error)),
        };
        match &report.outcome {
            Outcome::Done => Self::Done,
            Outcome::RolledBack => Self::RolledBack,
            Outcome::Stopped => Self::Stopped,
            Outcome::Degraded { fenced, .. } => {
                let name = |id| report.names.participant(id);
                let number = |id| names.iter().position(|known| *known == name(id));
                let fenced = fenced.iter().filter_map(|(id, _)| number(*id)).collect();
                Self::Degraded { fenced }
            }
            Outcome::Held { .. } => Self::Held,
        }
    }
}

/// The devices that count, by the status, and what the report knows of their own last words.
pub(super) fn survivors(
    status: &Status,
    report: Option<&TransitionReport>,
    names: &[String],
) -> Vec<Survivor> {
    // One that is started again counts when it has joined, not before.
    let counts =
        |device: &&DeviceStatus| device.lost.is_none() && device.standing == DeviceStanding::Ready;
    let counting = status.devices.iter().filter(counts);
    let survivor = |device: &DeviceStatus| {
        let number = names.iter().position(|name| *name == device.name)?;
        let answered = report.and_then(|report| {
            let participants = &mut report.participants.iter();
            let own = participants
                .find(|p| p.name == device.name && p.incarnation == device.incarnation)?;
            match &own.commands.last()?.answer {
                CommandAnswer::Reached { state, .. } | CommandAnswer::Refused { state, .. } => {
                    Some(*state)
                }
                CommandAnswer::None => None,
            }
        });
        Some(Survivor { device: number, status: device.state, answered })
    };
    counting.filter_map(survivor).collect()
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Declare => "declaration of RAM",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::TakeOver => "take-over",
        })
    }
}
