//! What happened in a transition, when, and to whom: data first, for programs; `Display` draws
//! the table for people.
//!
//! All times are nanoseconds since the transition began, measured on the coordinator's clock.
//! Durations that a device reports are its own measurements.

mod json;
#[cfg(test)]
pub(crate) mod tests;

pub use json::{JsonCommand, JsonHook, JsonParticipant, JsonReport};
use standstill_protocol::message::{Epoch, Evidence, Phase, Term, Timings};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{
    Failure, FailureKind, HeldReason, HookId, HookMoment, Loss, MachineState, Operation, Outcome,
    ParticipantId, Subject,
};
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

/// Everything about one transition of a machine.
#[derive(Clone, Debug)]
pub struct TransitionReport {
    /// What it was for.
    pub operation: Operation,
    /// How it ended.
    pub outcome: Outcome,
    /// Where the machine is now.
    pub machine: MachineState,
    /// The coordinator's term.
    pub term: Term,
    /// The first epoch that it used.
    pub first_epoch: Epoch,
    /// The last one; more than the first if something was undone.
    pub last_epoch: Epoch,
    /// When it began, by the wall clock: to put reports and logs side by side.
    pub began: SystemTime,
    /// How long it took, from the call to the outcome.
    pub total_ns: u64,
    /// Of a resume: from the beginning of the pause before it to the end of this; else `None`.
    pub downtime_ns: Option<u64>,
    /// Every participant, in the order of the machine's description.
    pub participants: Vec<ParticipantReport>,
    /// Every hook call, in the order in which they were called.
    pub hooks: Vec<HookReport>,
    /// Everything that went wrong, in order.
    pub failures: Vec<Failure>,
    /// Answers that were stale, duplicate or foreign and changed nothing.
    pub strays: u64,
    /// Names of participants and hooks.
    pub names: Names,
}

/// Names of participants and hooks, for texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// By participant.
    pub participants: BTreeMap<ParticipantId, String>,
    /// By hook.
    pub hooks: BTreeMap<HookId, String>,
}

impl Names {
    /// A participant's name; its number if it has none.
    #[must_use]
    pub fn participant(&self, id: ParticipantId) -> String {
        self.participants.get(&id).cloned().unwrap_or_else(|| format!("participant {}", id.0))
    }

    /// A hook's name; its number if it has none.
    #[must_use]
    pub fn hook(&self, id: HookId) -> String {
        self.hooks.get(&id).cloned().unwrap_or_else(|| format!("hook {}", id.0))
    }

    /// Why a machine is held, for a person.
    #[must_use]
    pub fn held(&self, reason: HeldReason) -> String {
        match reason {
            HeldReason::FenceUnproven(id) => {
                format!("nothing proves that device {:?} is gone", self.participant(id))
            }
            HeldReason::LocalHung(id) => {
                let name = self.participant(id);
                format!("{name:?} hangs and cannot be fenced, it lives in the VMM")
            }
            HeldReason::HookHung(id) => format!("hook {:?} has not returned", self.hook(id)),
            HeldReason::HookFailed(id) => {
                format!("hook {:?} failed where there was no way back", self.hook(id))
            }
            HeldReason::UndoExpired => "the undo did not end within its budget".to_owned(),
            HeldReason::TakenOverStopped => {
                "a device had reached STOP when the machine was taken over; it may run elsewhere"
                    .to_owned()
            }
            HeldReason::Superseded => "another coordinator has the machine".to_owned(),
        }
    }
}

/// What one participant did in a transition.
#[derive(Clone, Debug)]
pub struct ParticipantReport {
    /// Its number.
    pub id: ParticipantId,
    /// Its name.
    pub name: String,
    /// How often its device was started; 0 for a local device.
    pub incarnation: u64,
    /// Process id; `None` for a local device.
    pub pid: Option<u32>,
    /// Where it was at the beginning.
    pub before: MigrationState,
    /// Where it is now; `None` if it is fenced or to be fenced.
    pub after: Option<MigrationState>,
    /// Every command that it was sent, in order.
    pub commands: Vec<CommandReport>,
    /// If it was fenced: why, and what came of it.
    pub fence: Option<FenceReport>,
}

/// One command and its answer.
#[derive(Clone, Debug)]
pub struct CommandReport {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its phase.
    pub phase: Phase,
    /// Where it was to lead.
    pub target: MigrationState,
    /// True if it belongs to an undo.
    pub undo: bool,
    /// When it was sent.
    pub sent_ns: u64,
    /// When its answer came; `None` if none came.
    pub answered_ns: Option<u64>,
    /// The answer.
    pub answer: CommandAnswer,
}

/// How a command was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandAnswer {
    /// Not at all.
    None,
    /// It was carried out.
    Reached {
        /// The state that was reached.
        state: MigrationState,
        /// The participant's own timings.
        timings: Timings,
        /// What it has to show for it.
        evidence: Evidence,
    },
    /// It was not.
    Refused {
        /// Where the participant is.
        state: MigrationState,
        /// Why, for a person.
        why: String,
    },
}

impl CommandReport {
    /// How long the answer took, without the time for collecting evidence; `None` without answer.
    #[must_use]
    pub fn net_ns(&self) -> Option<u64> {
        let evidence_ns = match &self.answer {
            CommandAnswer::Reached { timings, .. } => timings.evidence_ns,
            _ => 0,
        };
        Some(self.answered_ns?.saturating_sub(self.sent_ns).saturating_sub(evidence_ns))
    }

    /// The evidence of the answer, if it was carried out.
    #[must_use]
    pub fn evidence(&self) -> Option<&Evidence> {
        match &self.answer {
            CommandAnswer::Reached { evidence, .. } => Some(evidence),
            _ => None,
        }
    }
}

impl ParticipantReport {
    /// Of a participant that has not been told anything yet.
    pub(crate) fn new(
        id: ParticipantId,
        name: String,
        (incarnation, pid): (u64, Option<u32>),
        before: MigrationState,
    ) -> Self {
        let commands = Vec::with_capacity(2);
        Self { id, name, incarnation, pid, before, after: None, commands, fence: None }
    }

    /// The last command of that phase, if there was one.
    #[must_use]
    pub fn command(&self, phase: Phase) -> Option<&CommandReport> {
        self.commands.iter().rev().find(|command| command.phase == phase)
    }
}

/// A fence and its proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceReport {
    /// Why.
    pub why: Loss,
    /// What was seen of it, for a person; the text of `why` if that is all.
    pub detail: String,
    /// When it began.
    pub began_ns: u64,
    /// When it was proven; `None` if it is not yet.
    pub proven_ns: Option<u64>,
    /// How the process ended and how many of its files' locks were obtained, for a person.
    pub proof: Option<String>,
}

/// One call of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookReport {
    /// Its number.
    pub id: HookId,
    /// Its name.
    pub name: String,
    /// What it was called for.
    pub moment: HookMoment,
    /// When it was called.
    pub called_ns: u64,
    /// When it returned; `None` if it has not yet.
    pub returned_ns: Option<u64>,
    /// The error that it returned.
    pub error: Option<String>,
}

impl TransitionReport {
    /// When a phase's barrier was passed, measured from the phase's first send to its last answer,
    /// without the time for collecting evidence; `None` if the phase was not reached or some
    /// answer is missing.
    #[must_use]
    pub fn barrier_ns(&self, phase: Phase) -> Option<u64> {
        let began = self.forward(phase).map(|command| command.sent_ns).min()?;
        self.forward(phase)
            .map(|command| Some(command.sent_ns - began + command.net_ns()?))
            .collect::<Option<Vec<_>>>()?
            .into_iter()
            .max()
    }

    /// How long the transition took without the time for collecting evidence.
    ///
    /// The devices collect evidence (hashes of their memory) at the end of a phase and at the same
    /// time as each other; what is left out is how much later the phase's last answer came for it.
    #[must_use]
    pub fn net_ns(&self) -> u64 {
        let mut net = self.total_ns;
        for phase in [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start] {
            let gross = self.gross_ns(phase);
            if let (Some(gross), Some(barrier)) = (gross, self.barrier_ns(phase)) {
                net = net.saturating_sub(gross.saturating_sub(barrier));
            }
        }
        net
    }

    /// The commands of a phase that belong to no undo.
    fn forward(&self, phase: Phase) -> impl Iterator<Item = &CommandReport> {
        self.participants
            .iter()
            .flat_map(|participant| &participant.commands)
            .filter(move |command| command.phase == phase && !command.undo)
    }

    fn gross_ns(&self, phase: Phase) -> Option<u64> {
        let began = self.forward(phase).map(|command| command.sent_ns).min()?;
        let ended = self.forward(phase).filter_map(|command| command.answered_ns).max()?;
        Some(ended - began)
    }

    /// What went wrong, a line each, for a person.
    #[must_use]
    pub fn failure_lines(&self) -> Vec<String> {
        let mut lines: Vec<_> = self.failures.iter().map(|f| self.failure_line(f)).collect();
        if let Outcome::Held { reasons, .. } = &self.outcome {
            lines
                .extend(reasons.iter().map(|&reason| format!("held: {}", self.names.held(reason))));
        }
        lines
    }

    fn failure_line(&self, failure: &Failure) -> String {
        let who = match failure.subject {
            Subject::Participant(id) => format!("device {:?}", self.names.participant(id)),
            Subject::Hook(id) => format!("hook {:?}", self.names.hook(id)),
            Subject::Owner => "the owner".to_owned(),
        };
        let what = match failure.kind {
            FailureKind::Refused => match self.refusal(failure) {
                Some(why) => format!("refused ({why})"),
                None => "refused".to_owned(),
            },
            FailureKind::Lost(loss) => format!("is lost: {}", self.loss_detail(failure, loss)),
            FailureKind::Hung => "did not return within its deadline".to_owned(),
            FailureKind::FenceUnproven => "could not be proven gone".to_owned(),
            FailureKind::LeaseExpired => {
                "has left STOP: its lease ran out before all were stopped".to_owned()
            }
            FailureKind::Cancelled => "gave it up".to_owned(),
        };
        match failure.phase {
            Some(phase) => format!("{who} {what}, in {phase} of epoch {}", failure.epoch),
            None => format!("{who} {what}, before the first phase"),
        }
    }

    fn loss_detail(&self, failure: &Failure, loss: Loss) -> String {
        let fence = self
            .participants
            .iter()
            .find(|participant| failure.subject == Subject::Participant(participant.id))
            .and_then(|participant| participant.fence.as_ref())
            .filter(|fence| fence.why == loss);
        fence.map_or_else(|| loss.to_string(), |fence| fence.detail.clone())
    }

    fn refusal(&self, failure: &Failure) -> Option<String> {
        match failure.subject {
            Subject::Participant(id) => {
                let participant = self.participants.iter().find(|p| p.id == id)?;
                participant.commands.iter().find_map(|command| match &command.answer {
                    CommandAnswer::Refused { why, .. }
                        if command.epoch == failure.epoch
                            && Some(command.phase) == failure.phase =>
                    {
                        Some(why.clone())
                    }
                    _ => None,
                })
            }
            Subject::Hook(id) => self.hooks.iter().rev().find(|hook| hook.id == id)?.error.clone(),
            Subject::Owner => None,
        }
    }
}

impl fmt::Display for TransitionReport {
    /// One line for the outcome, one for each participant and each hook call, one for each failure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} in {} (term {}, epoch {})",
            self.operation,
            self.outcome.name(),
            Nanos(self.total_ns),
            self.term,
            self.last_epoch,
        )?;
        for participant in &self.participants {
            write!(f, "  {:<16} {}", participant.name, participant.before)?;
            let mut undo = false;
            for command in &participant.commands {
                if command.undo && !std::mem::replace(&mut undo, true) {
                    write!(f, "; undo:")?;
                }
                match (&command.answer, command.net_ns()) {
                    (CommandAnswer::Reached { state, .. }, Some(ns)) => {
                        write!(f, " → {state} in {}", Nanos(ns))?;
                    }
                    (CommandAnswer::Refused { state, why }, _) => {
                        write!(f, " ✗ {} refused in {state}: {why}", command.phase)?;
                    }
                    _ => write!(f, " ✗ no answer to {}", command.phase)?,
                }
            }
            // Where it is now, unless its last answer has just said it.
            let last = participant.commands.last();
            let reached = last.is_some_and(|last| last.evidence().is_some());
            if let (Some(after), false) = (participant.after, reached) {
                write!(f, "; now {after}")?;
            }
            if let Some(fence) = &participant.fence {
                match &fence.proof {
                    Some(proof) => write!(f, "; fenced: {} ({proof})", fence.detail)?,
                    None => write!(f, "; to be fenced: {}, not proven", fence.detail)?,
                }
            }
            writeln!(f)?;
        }
        for hook in &self.hooks {
            write!(f, "  {:<16} {}", hook.name, moment(hook.moment))?;
            match (&hook.error, hook.returned_ns) {
                (Some(error), _) => writeln!(f, " ✗ {error}")?,
                (None, Some(ns)) => {
                    writeln!(f, " in {}", Nanos(ns.saturating_sub(hook.called_ns)))?;
                }
                (None, None) => writeln!(f, " ✗ has not returned")?,
            }
        }
        for line in self.failure_lines() {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

pub(crate) fn moment(moment: HookMoment) -> &'static str {
    match moment {
        HookMoment::Stop => "stop",
        HookMoment::Start => "start",
    }
}

/// Nanoseconds for a person: `850 ns`, `12.3 µs`, `4.56 ms`, `1.20 s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nanos(pub u64);

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        let value = self.0 as f64;
        let text = match self.0 {
            0..1_000 => format!("{} ns", self.0),
            1_000..1_000_000 => format!("{:.1} µs", value / 1e3),
            1_000_000..1_000_000_000 => format!("{:.2} ms", value / 1e6),
            _ => format!("{:.2} s", value / 1e9),
        };
        f.pad(&text)
    }
}

/// A duration as nanoseconds, capped at what fits 64 bits (584 years).
#[must_use]
pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
