//! A report as JSON, for programs that read a log or a terminal.

use super::{
    CommandAnswer, CommandReport, HookReport, ParticipantReport, TransitionReport, moment, nanos,
};
use serde::{Deserialize, Serialize};
use standstill_protocol::message::Timings;
use standstill_protocol::migration::MigrationState;
use std::time::UNIX_EPOCH;

/// A report as one JSON object, with names instead of numbers; for `serde_json`. Times are
/// nanoseconds since the transition began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonReport {
    /// `pause`, `resume`, …
    pub operation: String,
    /// `Done`, `RolledBack`, `Stopped`, `Degraded` or `Held`.
    pub outcome: String,
    /// `running`, `stopped` or `held`.
    pub machine: String,
    /// The coordinator's term.
    pub term: u64,
    /// The last epoch.
    pub epoch: u64,
    /// When it began: nanoseconds since 1970-01-01T00:00:00Z.
    pub began_unix_ns: u64,
    /// Whole time.
    pub total_ns: u64,
    /// Downtime, of a resume.
    pub downtime_ns: Option<u64>,
    /// Every participant.
    pub participants: Vec<JsonParticipant>,
    /// Every hook call, in order.
    pub hooks: Vec<JsonHook>,
    /// What went wrong, a line each.
    pub failures: Vec<String>,
}

/// One participant of a [`JsonReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonParticipant {
    /// Its name.
    pub name: String,
    /// How often its device was started; 0 for a local device.
    pub incarnation: u64,
    /// Process id; absent for a local device.
    pub pid: Option<u32>,
    /// State before.
    pub before: String,
    /// State after; absent if it does not count any more.
    pub after: Option<String>,
    /// Every command.
    pub commands: Vec<JsonCommand>,
    /// Why it was fenced.
    pub fenced: Option<String>,
    /// When its fence began.
    pub fence_ns: Option<u64>,
    /// When its fence was proven; absent if it is not yet.
    pub proven_ns: Option<u64>,
    /// The proof of the fence; absent without one.
    pub proof: Option<String>,
}

/// One command of a [`JsonParticipant`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonCommand {
    /// Its epoch; an undo has its own.
    pub epoch: u64,
    /// `PrepareStop`, …
    pub phase: String,
    /// Where it was to lead.
    pub target: String,
    /// True if it belongs to an undo.
    pub undo: bool,
    /// When it was sent.
    pub sent_ns: u64,
    /// When its answer came.
    pub answered_ns: Option<u64>,
    /// State that was reached; absent if it was not.
    pub reached: Option<String>,
    /// Why it was refused.
    pub refused: Option<String>,
    /// State in which it was refused.
    pub refused_in: Option<String>,
    /// The device's time in its own hooks.
    pub hook_ns: u64,
    /// The device's wait for DMA in flight.
    pub drain_ns: u64,
    /// The device's time for its evidence.
    pub evidence_ns: u64,
}

/// One call of a hook, in a [`JsonReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonHook {
    /// Its name.
    pub name: String,
    /// `stop` or `start`.
    pub moment: String,
    /// When it was called.
    pub called_ns: u64,
    /// When it returned; absent if it has not yet.
    pub returned_ns: Option<u64>,
    /// The error that it returned.
    pub error: Option<String>,
}

fn name(state: MigrationState) -> String {
    state.name().to_owned()
}

impl From<&TransitionReport> for JsonReport {
    fn from(report: &TransitionReport) -> Self {
        Self {
            operation: report.operation.to_string(),
            outcome: report.outcome.name().to_owned(),
            machine: report.machine.to_string(),
            term: report.term.0,
            epoch: report.last_epoch.0,
            began_unix_ns: report.began.duration_since(UNIX_EPOCH).map_or(0, nanos),
            total_ns: report.total_ns,
            downtime_ns: report.downtime_ns,
            participants: report.participants.iter().map(JsonParticipant::from).collect(),
            hooks: report.hooks.iter().map(JsonHook::from).collect(),
            failures: report.failure_lines(),
        }
    }
}

impl From<&ParticipantReport> for JsonParticipant {
    fn from(participant: &ParticipantReport) -> Self {
        let fence = participant.fence.as_ref();
        Self {
            name: participant.name.clone(),
            incarnation: participant.incarnation,
            pid: participant.pid,
            before: name(participant.before),
            after: participant.after.map(name),
            commands: participant.commands.iter().map(JsonCommand::from).collect(),
            fenced: fence.map(|fence| fence.detail.clone()),
            fence_ns: fence.map(|fence| fence.began_ns),
            proven_ns: fence.and_then(|fence| fence.proven_ns),
            proof: fence.and_then(|fence| fence.proof.clone()),
        }
    }
}

impl From<&CommandReport> for JsonCommand {
    fn from(command: &CommandReport) -> Self {
        let (reached, refused, timings) = match &command.answer {
            CommandAnswer::None => (None, None, Timings::default()),
            CommandAnswer::Reached { state, timings, .. } => (Some(name(*state)), None, *timings),
            CommandAnswer::Refused { state, why } => {
                (None, Some((name(*state), why.clone())), Timings::default())
            }
        };
        let (refused_in, refused) = refused.unzip();
        Self {
            epoch: command.epoch.0,
            phase: command.phase.to_string(),
            target: name(command.target),
            undo: command.undo,
            sent_ns: command.sent_ns,
            answered_ns: command.answered_ns,
            reached,
            refused,
            refused_in,
            hook_ns: timings.hook_ns,
            drain_ns: timings.drain_ns,
            evidence_ns: timings.evidence_ns,
        }
    }
}

impl From<&HookReport> for JsonHook {
    fn from(hook: &HookReport) -> Self {
        Self {
            name: hook.name.clone(),
            moment: moment(hook.moment).to_owned(),
            called_ns: hook.called_ns,
            returned_ns: hook.returned_ns,
            error: hook.error.clone(),
        }
    }
}
