//! One device process: the real lifecycle, its links, and what it physically does.

use super::rule::{Antecedent, Rule};
use super::scenario::participant;
use super::world::Notes;
use standstill_protocol::lifecycle::{self, Arc, Effect, Lifecycle};
use standstill_protocol::message::{
    Abort, Command, Epoch, OrphanPolicy, Phase, Query, Refusal, RefusalKind, Term,
};
use standstill_protocol::migration::{Activity, MigrationFlags, MigrationState};
use standstill_protocol::transition::{Answer, Event};
use std::collections::VecDeque;
use std::fmt;

/// A coordinator's message to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Message {
    Welcome(Term),
    Command(Command),
    Abort(Abort),
    Query(Query),
}

impl Message {
    pub(crate) fn term(self) -> Term {
        match self {
            Self::Welcome(term) => term,
            Self::Command(command) => command.term,
            Self::Abort(abort) => abort.term,
            Self::Query(query) => query.term,
        }
    }

    fn event(self) -> lifecycle::Event {
        let orphan = OrphanPolicy::Keep;
        match self {
            Self::Welcome(term) => lifecycle::Event::Welcome { term, epoch: Epoch(0), orphan },
            Self::Command(command) => lifecycle::Event::Command(command),
            Self::Abort(abort) => lifecycle::Event::Abort(abort),
            Self::Query(query) => lifecycle::Event::Query(query),
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Welcome(term) => write!(f, "the welcome of term {term}"),
            Self::Command(Command { term, epoch, phase, target, .. }) => {
                write!(f, "{phase} to {target}, term {term}, epoch {epoch}")
            }
            Self::Abort(Abort { term, epoch }) => {
                write!(f, "the abort of term {term}, epoch {epoch}")
            }
            Self::Query(Query { term, .. }) => write!(f, "the question of term {term}"),
        }
    }
}

/// The connection between a device and one coordinator: FIFO in both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    /// To the device, not read yet.
    pub(crate) down: VecDeque<Message>,
    /// To the coordinator, not read yet.
    pub(crate) up: VecDeque<Event>,
    /// The coordinator is there to hear.
    pub(crate) open: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Life {
    Alive,
    /// The process is dead; what it had in flight may still arrive.
    Dead,
    /// Nothing of it is left, with proof.
    Gone,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device {
    pub(crate) lifecycle: Lifecycle,
    /// The arc that it is taking.
    pub(crate) arc: Option<Arc>,
    /// What it may physically do: where its last finished arc led.
    pub(crate) activity: Activity,
    pub(crate) life: Life,
    /// A coordinator that is dead by now could not prove its fence.
    pub(crate) ghost: bool,
    /// The most that it may do by its last answer, until it is started.
    pub(crate) promised: Activity,
    pub(crate) links: [Link; 2],
}

impl Device {
    /// A device that the first coordinator has welcomed, in `state`.
    pub(crate) fn new(mut lifecycle: Lifecycle, state: MigrationState) -> Self {
        lifecycle.step(Message::Welcome(Term(1)).event());
        if state != MigrationState::Running {
            let (term, epoch) = (Term(1), Epoch(1));
            let phase = match state.activity() {
                Activity::NoPeer => Phase::PrepareStop,
                Activity::Full | Activity::Stopped => Phase::Start,
            };
            let command = Command { term, epoch, phase, target: state, budget_ns: 0, lease_ns: 0 };
            lifecycle.step(lifecycle::Event::Command(command));
            while lifecycle.is_busy() {
                lifecycle.step(lifecycle::Event::ArcDone);
            }
        }
        Self {
            lifecycle,
            arc: None,
            activity: state.activity(),
            life: Life::Alive,
            ghost: false,
            promised: state.activity(),
            links: [Link { open: true, ..Link::default() }, Link::default()],
        }
    }

    pub(crate) fn power_on() -> Lifecycle {
        Lifecycle::new(MigrationFlags::ALL)
    }

    /// The most that it may be doing now; an arc counts with both its ends.
    pub(crate) fn may_do(&self) -> Activity {
        self.arc.map_or(self.activity, |arc| self.activity.max(arc.after))
    }

    /// It is stopped, and will be while nobody tells it anything.
    pub(crate) fn is_stopped(&self) -> bool {
        self.may_do() == Activity::Stopped
    }

    /// Takes the next message of a coordinator, or one that is repeated.
    pub(crate) fn read(&mut self, message: Message, again: bool, notes: &mut Notes<'_>) {
        notes.say(|| format!("it is {message}"));
        let before = self.lifecycle.clone();
        let effects = self.step(message.event(), notes);
        let changed = before != self.lifecycle
            || effects.iter().any(|effect| !matches!(effect, Effect::Dropped(_)));
        if message.term() < before.term() {
            notes.reached(Antecedent::LowerTerm);
            notes.check(Rule::LowerTerm, !changed);
        }
        // A query is answered as often as it comes; that changes nothing either.
        if again && !matches!(message, Message::Query(_)) {
            notes.reached(Antecedent::RepeatedCommand);
            notes.check(Rule::Repeated, !changed);
        }
    }

    /// The arc that is being taken ends.
    pub(crate) fn end_arc(&mut self, failure: Option<bool>, notes: &mut Notes<'_>) {
        let Some(arc) = self.arc.take() else { return };
        let refusal = Refusal { kind: RefusalKind::Device, text: String::new() };
        let event = match failure {
            None => {
                self.activity = arc.after;
                lifecycle::Event::ArcDone
            }
            Some(restored) => {
                if !restored {
                    self.activity = Activity::Stopped;
                }
                lifecycle::Event::ArcFailed { refusal, restored }
            }
        };
        self.step(event, notes);
    }

    fn step(&mut self, event: lifecycle::Event, notes: &mut Notes<'_>) -> Vec<Effect> {
        let effects = self.lifecycle.step(event);
        for effect in &effects {
            match effect {
                Effect::Begin(command) => {
                    notes.check(Rule::LowerTerm, command.term >= self.lifecycle.term());
                    if matches!(command.phase, Phase::PrepareStart | Phase::Start) {
                        self.promised = Activity::Full;
                    }
                }
                Effect::Arc(arc) => {
                    notes.say(|| format!("it takes the arc {} to {}", arc.from, arc.to));
                    self.arc = Some(*arc);
                }
                Effect::Reached(command, state) => {
                    self.promised = match command.phase {
                        Phase::PrepareStop => Activity::NoPeer.min(self.promised),
                        Phase::Stop => Activity::Stopped,
                        _ => self.promised,
                    };
                    if self.promised != Activity::Full {
                        notes.reached(Antecedent::PromisedQuiet);
                    }
                    self.answer(*command, *state, Answer::Reached, notes);
                }
                Effect::Refused(command, state, _) => {
                    self.answer(*command, *state, Answer::Refused, notes);
                }
                Effect::Status(status) => {
                    let idle = status.moving_to.is_some() || self.arc.is_none();
                    notes.check(Rule::AnswerIsTrue, idle);
                    notes.say(|| match status.moving_to {
                        Some(to) => {
                            format!("it answers that it is in {}, on the way to {to}", status.state)
                        }
                        None => format!("it answers that it is in {}", status.state),
                    });
                    let answer = Answer::Status { moving_to: status.moving_to };
                    self.send(Event::Answer {
                        from: participant(notes.device),
                        term: status.term,
                        epoch: status.epoch,
                        phase: Phase::Stop,
                        state: status.state,
                        answer,
                    });
                }
                Effect::Dropped(stale) => notes.say(|| format!("it drops it: {stale:?}")),
                _ => {}
            }
        }
        notes.check(Rule::Quiet, self.may_do() <= self.promised);
        effects
    }

    fn answer(
        &mut self,
        command: Command,
        state: MigrationState,
        answer: Answer,
        notes: &mut Notes<'_>,
    ) {
        let Command { term, epoch, phase, .. } = command;
        notes.say(|| {
            format!("it answers {answer:?} to {phase} of term {term}, epoch {epoch}, in {state}")
        });
        // ERROR is not an activity: whatever it does, it will be reset before it counts.
        let fits = state.activity() == self.activity && self.arc.is_none();
        notes.check(Rule::AnswerIsTrue, fits);
        self.send(Event::Answer {
            from: participant(notes.device),
            term,
            epoch,
            phase,
            state,
            answer,
        });
    }

    /// Answers go to the coordinator whose term they name.
    fn send(&mut self, event: Event) {
        let Event::Answer { term, .. } = event else { return };
        let link = &mut self.links[usize::from(term > Term(1))];
        if link.open {
            link.up.push_back(event);
        }
    }
}
