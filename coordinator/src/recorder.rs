//! Keeps what happens in a transition, and when, until it becomes a report.

use crate::clock;
use crate::report::{
    CommandAnswer, CommandReport, FenceReport, HookReport, Names, ParticipantReport,
    TransitionReport, nanos,
};
use standstill_protocol::message::{
    Command, Epoch, Evidence, Phase, Reached, Refused, Term, Timings,
};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{
    HookId, HookMoment, Loss, MachineState, Operation, Outcome, ParticipantId, Transition,
};
use std::collections::HashMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What has happened so far in one transition.
#[derive(Debug)]
pub(crate) struct Recorder {
    operation: Operation,
    term: Term,
    first_epoch: Epoch,
    began: Instant,
    began_at: SystemTime,
    participants: Vec<ParticipantReport>,
    index: HashMap<ParticipantId, usize>,
    hooks: Vec<HookReport>,
    names: Names,
}

impl Recorder {
    pub(crate) fn new(
        operation: Operation,
        (term, first_epoch): (Term, Epoch),
        began: Instant,
        participants: Vec<ParticipantReport>,
        names: Names,
    ) -> Self {
        let index = participants.iter().enumerate().map(|(at, p)| (p.id, at)).collect();
        let began_at = SystemTime::now().checked_sub(clock::since(began)).unwrap_or(UNIX_EPOCH);
        let hooks = Vec::new();
        Self { operation, term, first_epoch, began, began_at, participants, index, hooks, names }
    }

    pub(crate) fn began(&self) -> Instant {
        self.began
    }

    fn now(&self) -> u64 {
        nanos(clock::since(self.began))
    }

    fn participant(&mut self, id: ParticipantId) -> Option<&mut ParticipantReport> {
        self.index.get(&id).map(|&at| &mut self.participants[at])
    }

    pub(crate) fn sent(&mut self, id: ParticipantId, command: &Command, undo: bool) {
        let sent_ns = self.now();
        if let Some(participant) = self.participant(id) {
            participant.commands.push(CommandReport {
                epoch: command.epoch,
                phase: command.phase,
                target: command.target,
                undo,
                sent_ns,
                answered_ns: None,
                answer: CommandAnswer::None,
            });
        }
    }

    fn answered(&mut self, id: ParticipantId, key: (Epoch, Phase), answer: CommandAnswer) {
        let now = self.now();
        let Some(participant) = self.participant(id) else { return };
        // What comes after its deadline has changed nothing, and the report says no other thing.
        if participant.fence.is_some() {
            return;
        }
        let command =
            participant.commands.iter_mut().rev().find(|command| {
                (command.epoch, command.phase) == key && command.answered_ns.is_none()
            });
        if let Some(command) = command {
            command.answered_ns = Some(now);
            command.answer = answer;
        }
    }

    pub(crate) fn reached(&mut self, id: ParticipantId, reached: Reached) {
        let Reached { epoch, phase, state, timings, evidence, .. } = reached;
        self.answered(id, (epoch, phase), CommandAnswer::Reached { state, timings, evidence });
    }

    pub(crate) fn refused(&mut self, id: ParticipantId, refused: Refused) {
        let Refused { epoch, phase, state, refusal, .. } = refused;
        let why = refusal.to_string();
        self.answered(id, (epoch, phase), CommandAnswer::Refused { state, why });
    }

    /// A local device answered.
    pub(crate) fn local(
        &mut self,
        id: ParticipantId,
        command: &Command,
        state: MigrationState,
        why: Option<String>,
    ) {
        let answer = match why {
            Some(why) => CommandAnswer::Refused { state, why },
            None => CommandAnswer::Reached {
                state,
                timings: Timings::default(),
                evidence: Evidence::default(),
            },
        };
        self.answered(id, (command.epoch, command.phase), answer);
    }

    /// What a participant's last answer says that cannot be, for a person.
    pub(crate) fn contradiction(&self, id: ParticipantId) -> Option<String> {
        let participant = &self.participants[*self.index.get(&id)?];
        let command = participant.commands.iter().rev().find(|c| c.answered_ns.is_some())?;
        let CommandReport { phase, target, answer, .. } = command;
        match answer {
            CommandAnswer::Reached { state, .. } if state != target => {
                Some(format!("it answered that {phase} had led to {state} instead of {target}"))
            }
            _ => None,
        }
    }

    pub(crate) fn fencing(&mut self, id: ParticipantId, why: Loss, detail: String) {
        let began_ns = self.now();
        if let Some(participant) = self.participant(id) {
            participant.fence =
                Some(FenceReport { why, detail, began_ns, proven_ns: None, proof: None });
        }
    }

    pub(crate) fn fenced(&mut self, id: ParticipantId, proof: String) {
        let now = self.now();
        if let Some(fence) = self.participant(id).and_then(|p| p.fence.as_mut()) {
            fence.proven_ns = Some(now);
            fence.proof = Some(proof);
        }
    }

    pub(crate) fn hook_called(&mut self, id: HookId, moment: HookMoment) {
        let called_ns = self.now();
        let name = self.names.hook(id);
        self.hooks.push(HookReport { id, name, moment, called_ns, returned_ns: None, error: None });
    }

    pub(crate) fn hook_returned(&mut self, id: HookId, moment: HookMoment, error: Option<String>) {
        let now = self.now();
        let call = self
            .hooks
            .iter_mut()
            .rev()
            .find(|hook| hook.id == id && hook.moment == moment && hook.returned_ns.is_none());
        if let Some(call) = call {
            call.returned_ns = Some(now);
            call.error = error;
        }
    }

    /// Whether that participant takes part.
    pub(crate) fn knows(&self, id: ParticipantId) -> bool {
        self.index.contains_key(&id)
    }

    /// Whether a participant has answered everything that it was sent.
    pub(crate) fn has_answered(&self, id: ParticipantId) -> bool {
        let commands = self.index.get(&id).map(|&at| &self.participants[at].commands);
        commands.is_some_and(|all| all.iter().all(|command| command.answered_ns.is_some()))
    }

    /// Whether a hook's last call has left what it stands for stopped; `None` if it has not
    /// returned. After an error things are as before the call.
    pub(crate) fn left_stopped(&self, id: HookId) -> Option<bool> {
        let last = self.hooks.iter().rev().find(|hook| hook.id == id)?;
        last.returned_ns?;
        Some((last.moment == HookMoment::Stop) != last.error.is_some())
    }

    pub(crate) fn finish(
        mut self,
        transition: &Transition,
        outcome: Outcome,
        machine: MachineState,
        downtime_ns: Option<u64>,
    ) -> TransitionReport {
        let total_ns = self.now();
        for participant in &mut self.participants {
            participant.after = transition.state(participant.id);
        }
        TransitionReport {
            operation: self.operation,
            outcome,
            machine,
            term: self.term,
            first_epoch: self.first_epoch,
            last_epoch: transition.epoch(),
            began: self.began_at,
            total_ns,
            downtime_ns,
            participants: self.participants,
            hooks: self.hooks,
            failures: transition.failures().to_vec(),
            strays: transition.strays(),
            names: self.names,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ParticipantId = ParticipantId(1);
    const EPOCH: Epoch = Epoch(7);
    const RUNNING: MigrationState = MigrationState::Running;

    fn recorder() -> Recorder {
        let members = [ParticipantReport::new(ID, "d1".to_owned(), (1, None), RUNNING)];
        let (operation, now) = (Operation::Pause, Instant::now());
        let names = Names::default();
        let mut recorder = Recorder::new(operation, (Term(1), EPOCH), now, members.into(), names);
        let command = Command {
            term: Term(1),
            epoch: EPOCH,
            phase: Phase::PrepareStop,
            target: MigrationState::RunningP2p,
            budget_ns: 1,
            lease_ns: 0,
        };
        recorder.sent(ID, &command, false);
        recorder
    }

    fn answer() -> Reached {
        Reached {
            term: Term(1),
            epoch: EPOCH,
            phase: Phase::PrepareStop,
            state: MigrationState::RunningP2p,
            timings: Timings::default(),
            evidence: Evidence::default(),
        }
    }

    fn told(recorder: &Recorder) -> (bool, bool) {
        let participant = &recorder.participants[0];
        (participant.commands[0].answered_ns.is_some(), participant.fence.is_some())
    }

    /// Of an answer and a deadline the one counts that is seen first, and the report says only
    /// that.
    #[test]
    fn an_answer_that_comes_after_its_deadline_is_not_in_the_report() {
        let mut in_time = recorder();
        in_time.reached(ID, answer());
        assert_eq!(told(&in_time), (true, false));
        let mut late = recorder();
        late.fencing(ID, Loss::Timeout, Loss::Timeout.to_string());
        late.reached(ID, answer());
        assert_eq!(told(&late), (false, true));
    }
}
