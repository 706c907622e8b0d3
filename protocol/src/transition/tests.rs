//! Tests of the coordinator's side of the barrier: readable cases by topic, and a simulated
//! machine under random faults.

use super::*;
use crate::message::{Abort, Command, Epoch, PeerDma, Phase, Term};
use crate::migration::{MigrationFlags, MigrationState};
use std::collections::BTreeMap;

mod barrier;
mod documentation;
mod hooks;
mod leases;
mod losses;
mod properties;
mod rows;
mod take_over;
mod undo;
mod world;

const TERM: Term = Term(3);
const EPOCH: Epoch = Epoch(10);
const FIRST_NS: u64 = 100;
const SECOND_NS: u64 = 200;
const FENCE_NS: u64 = 500;
const UNDO_NS: u64 = 10_000;

fn id(number: u32) -> ParticipantId {
    ParticipantId(number)
}

fn member(number: u32, state: MigrationState) -> Member {
    Member {
        id: id(number),
        kind: MemberKind::Process,
        state,
        flags: MigrationFlags::ALL,
        peer_dma: PeerDma::Possible,
        one_phase_allowed: false,
        on_loss: OnLoss::Fail,
        first_ns: FIRST_NS,
        second_ns: SECOND_NS,
        lease_ns: 0,
    }
}

fn optional(member: Member) -> Member {
    Member { on_loss: OnLoss::ContinueWithout, ..member }
}

fn local(member: Member) -> Member {
    Member { kind: MemberKind::Local, ..member }
}

fn plan(operation: Operation, members: Vec<Member>) -> Plan {
    Plan {
        operation,
        term: TERM,
        epoch: EPOCH,
        members,
        hooks: Vec::new(),
        phases: Phases::Two,
        on_failure: OnFailure::Rollback,
        undo_ns: UNDO_NS,
        fence_ns: FENCE_NS,
    }
}

/// Participants 0, 1, … in these states.
fn machine(operation: Operation, states: &[MigrationState]) -> Plan {
    let members = states.iter().zip(0..).map(|(state, number)| member(number, *state));
    plan(operation, members.collect())
}

/// A transition that is driven by hand: it knows who was asked what, and answers as told.
struct Script {
    transition: Transition,
    asked: BTreeMap<ParticipantId, Command>,
    effects: Vec<Effect>,
}

impl Script {
    fn begin(plan: Plan) -> Self {
        let mut script = Self::prepare(plan);
        script.step(Event::Begin);
        script
    }

    fn prepare(plan: Plan) -> Self {
        let transition = Transition::new(plan).expect("a sound plan");
        Self { transition, asked: BTreeMap::new(), effects: Vec::new() }
    }

    fn step(&mut self, event: Event) -> &[Effect] {
        self.effects = self.transition.step(event);
        for effect in &self.effects {
            if let Effect::Send(id, command) = effect {
                self.asked.insert(*id, *command);
            }
        }
        &self.effects
    }

    fn answer(&mut self, number: u32, state: MigrationState, answer: Answer) -> &[Effect] {
        let Command { term, epoch, phase, .. } = self.asked[&id(number)];
        self.step(Event::Answer { from: id(number), term, epoch, phase, state, answer })
    }

    /// The participant has done what it was told.
    fn reach(&mut self, number: u32) -> &[Effect] {
        let target = self.asked[&id(number)].target;
        self.answer(number, target, Answer::Reached)
    }

    /// Everybody who is waited for has done what it was told.
    fn reach_all(&mut self) -> &[Effect] {
        for id in self.transition.awaited().collect::<Vec<_>>() {
            self.reach(id.0);
        }
        &self.effects
    }

    fn refuse(&mut self, number: u32, state: MigrationState) -> &[Effect] {
        self.answer(number, state, Answer::Refused)
    }

    fn lose(&mut self, number: u32) -> &[Effect] {
        self.step(Event::Lost(id(number), Loss::Exited))
    }

    fn fenced(&mut self, number: u32) -> &[Effect] {
        self.step(Event::Fenced(id(number)))
    }

    fn expire(&mut self, timer: Timer) -> &[Effect] {
        self.step(Event::Expired(timer))
    }

    /// What the last step sent, by participant.
    fn sent(&self) -> Vec<(u32, Phase, MigrationState)> {
        self.effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send(id, command) => Some((id.0, command.phase, command.target)),
                _ => None,
            })
            .collect()
    }

    fn aborted(&self) -> Vec<(u32, Epoch)> {
        self.effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Abort(id, Abort { epoch, .. }) => Some((id.0, *epoch)),
                _ => None,
            })
            .collect()
    }

    fn hooks(&self) -> Vec<(u32, HookMoment)> {
        self.effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::RunHook(id, moment) => Some((id.0, *moment)),
                _ => None,
            })
            .collect()
    }

    fn outcome(&self) -> Option<&Outcome> {
        match self.effects.last() {
            Some(Effect::Finish(outcome)) => Some(outcome),
            _ => None,
        }
    }
}

fn held(reasons: &[HeldReason]) -> Outcome {
    Outcome::Held { reasons: reasons.to_vec(), fenced: Vec::new() }
}
