//! Faults at the control channel: what is done wrong with a command, an answer, a query.

use super::State;
use crate::device::Device;
use crate::fault::{self, wire};
use crate::log;
use standstill_protocol::fault::{Action, Forgery, Point};
use standstill_protocol::lifecycle::Event;
use standstill_protocol::message::{
    Arm, Command, DeviceMessage, Query, Refusal, RefusalKind, Refused, Shutdown,
};
use std::io;
use std::os::fd::OwnedFd;

/// How a command, a query or the end is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    Rightly,
    /// Something else was done, and that is all.
    Not,
}

impl<D: Device> State<D> {
    pub(super) fn arm(&mut self, arm: &Arm, fds: Vec<OwnedFd>) {
        if arm.term != self.lifecycle.term() {
            tracing::debug!(term = arm.term.0, "faults of another term");
            return;
        }
        // Exactly one comes with the message.
        let Some(journal) = fds.into_iter().next() else { return };
        match fault::arm(&arm.faults, journal) {
            Ok(()) => tracing::warn!(faults = arm.faults.len(), "armed"),
            Err(error) => tracing::error!(error = log::with_causes(&error), "not armed"),
        }
    }

    /// A command was read.
    pub(super) fn at_receipt(&mut self, command: &Command) -> Taken {
        let mut taken = Taken::Rightly;
        for action in fault::reach(Point::Receipt(command.phase)) {
            match action {
                Action::NoAck => taken = Taken::Not,
                Action::Refuse(errno) => {
                    taken = Taken::Not;
                    let Command { term, epoch, phase, .. } = *command;
                    let text = io::Error::from_raw_os_error(errno).to_string();
                    let refusal = Refusal { kind: RefusalKind::Device, text };
                    let state = self.lifecycle.state();
                    let refused = Refused { term, epoch, phase, state, refusal };
                    self.deliver(DeviceMessage::Refused(refused));
                }
                Action::Send(_) => {
                    taken = Taken::Not;
                    self.misbehave(action, None);
                }
                action => self.misbehave(action, None),
            }
        }
        taken
    }

    /// A query was read.
    pub(super) fn at_query(&mut self, query: Query) -> Taken {
        let mut taken = Taken::Rightly;
        for action in fault::reach(Point::Query) {
            match action {
                Action::NoAck => taken = Taken::Not,
                // Answered at once, and then once more by the caller.
                Action::TwoAcks => self.feed(Event::Query(query)),
                Action::Send(_) => {
                    taken = Taken::Not;
                    self.misbehave(action, None);
                }
                action => self.misbehave(action, None),
            }
        }
        taken
    }

    /// It was read that the process is to end.
    pub(super) fn at_shutdown(&mut self, _shutdown: &Shutdown) -> Taken {
        let mut taken = Taken::Rightly;
        for action in fault::reach(Point::Shutdown) {
            match action {
                Action::NoAck => taken = Taken::Not,
                action => self.misbehave(action, None),
            }
        }
        taken
    }

    /// Sends a message, unless it is an answer that is to be spoilt.
    pub(super) fn send_or_spoil(&mut self, message: DeviceMessage) {
        let (before, after) = match &message {
            DeviceMessage::Reached(reached) => {
                (Point::BeforeAck(reached.phase), Some(Point::AfterAck(reached.phase)))
            }
            DeviceMessage::Refused(refused) => {
                (Point::BeforeAck(refused.phase), Some(Point::AfterAck(refused.phase)))
            }
            DeviceMessage::MemoryAccepted(_) => (Point::Memory, None),
            _ => return self.deliver(message),
        };
        let mut answered = true;
        let mut answers = vec![message];
        for action in fault::reach(before) {
            match action {
                Action::NoAck => {
                    answers.clear();
                    answered = false;
                }
                Action::TwoAcks => answers.extend(answers.first().cloned()),
                Action::Forge(forgery) => forge_all(&mut answers, forgery),
                Action::Send(_) => {
                    self.misbehave(action, answers.first());
                    answers.clear();
                }
                action => self.misbehave(action, None),
            }
        }
        for answer in answers {
            self.deliver(answer);
        }
        if let Some(after) = after.filter(|_| answered) {
            for action in fault::reach(after) {
                self.misbehave(action, None);
            }
        }
    }

    /// Does what has nothing to do with an answer.
    fn misbehave(&mut self, action: Action, answer: Option<&DeviceMessage>) {
        if action == Action::KeepDma {
            self.parts.gate.leak();
            return;
        }
        if let Some(control) = &self.control {
            wire::spoil(control.channel(), action, answer);
        }
        if action == Action::Disconnect {
            // It lives on, whatever the orphan policy says: to itself it has a coordinator.
            self.control = None;
        }
    }
}

fn forge_all(answers: &mut Vec<DeviceMessage>, forgery: Forgery) {
    *answers = std::mem::take(answers).into_iter().map(|one| wire::forge(one, forgery)).collect();
}
