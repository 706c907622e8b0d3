//! The owner's part in a transition: to give it up, and to drive it in two steps.
//!
//! Between the steps is a gap, which belongs to the owner. To the pure machine the gap is a hook
//! between the phases: it is called when the first phase has ended, and returns when the owner
//! launches the second. So the barrier, the undo and the deadlines know nothing of it. An owner who
//! takes too long is a hook that fails, never one that hangs: things are as before its call.

use super::state::{Active, Purpose, State};
use super::{Reply, Request};
use crate::error::MachineError;
use crate::report::{TransitionReport, nanos};
use standstill_protocol::transition::{Event, Hook, HookId, HookMoment, Operation, Slot};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

/// The hook that stands for the gap. Hooks of the owner are numbered from 0.
pub(super) const GAP: HookId = HookId(u32::MAX);
/// Its name in reports.
pub(super) const GAP_NAME: &str = "gap";

/// By which an owner means the transition that it has asked for, and no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

impl Ticket {
    /// One that nobody else has in this program.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Who asks for a transition, and where the answer goes.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) ticket: Ticket,
    /// If it drives the transition in two steps.
    pub(crate) gap: Option<Gap>,
    /// For how long device processes stay stopped if they are told nothing more; zero for ever.
    pub(crate) lease: Duration,
    pub(crate) reply: Reply<Arc<TransitionReport>>,
}

/// The time between the first phase and the launch of the second.
#[derive(Debug)]
pub(crate) struct Gap {
    /// How long it may be.
    budget: Duration,
    /// Told when it begins.
    quiet: Option<oneshot::Sender<()>>,
    /// It has begun, in a stop or in a start.
    open: Option<HookMoment>,
}

impl Gap {
    pub(crate) fn new(budget: Duration, quiet: oneshot::Sender<()>) -> Self {
        Self { budget, quiet: Some(quiet), open: None }
    }

    /// After all other hooks between the phases on stop, before all of them on start.
    pub(super) fn hook(&self, operation: Operation) -> Hook {
        Hook {
            id: GAP,
            stop: Slot::Between,
            start: Slot::Between,
            stop_rank: i32::MAX,
            start_rank: i32::MIN,
            budget_ns: nanos(self.budget),
            stopped: operation == Operation::Resume,
        }
    }
}

/// What an owner does about its transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Launches the second phase.
    GoOn,
    /// Gives the transition up: it is undone.
    GiveUp,
}

impl Active {
    fn gap(&mut self) -> Option<&mut Gap> {
        match &mut self.purpose {
            Purpose::Owner(owner) => owner.gap.as_mut(),
            Purpose::Join(_) | Purpose::Leave(_) => None,
        }
    }
}

impl State {
    /// The transition has come to the gap.
    pub(super) fn open_gap(&mut self, moment: HookMoment, events: &mut VecDeque<Event>) {
        let Some(active) = &mut self.active else { return };
        if active.transition.is_undoing() {
            // There is nothing of the owner's to undo.
            events.push_back(Event::HookDone(GAP, moment));
            return;
        }
        active.recorder.hook_called(GAP, moment);
        let Some(gap) = active.gap() else { return };
        gap.open = Some(moment);
        if let Some(quiet) = gap.quiet.take() {
            // An owner who is gone has given it up, which comes as a message.
            let _ = quiet.send(());
        }
    }

    /// Ends the gap if it has begun, and says what the transition is to know.
    fn close_gap(&mut self, error: Option<String>) -> Option<Event> {
        let active = self.active.as_mut()?;
        let moment = active.gap()?.open.take()?;
        let failed = error.is_some();
        active.recorder.hook_returned(GAP, moment, error);
        Some(if failed { Event::HookFailed(GAP, moment) } else { Event::HookDone(GAP, moment) })
    }

    /// Something has failed in the gap: the undo does not wait for the owner, who learns of it at
    /// its next step.
    pub(super) fn close_gap_for_undo(&mut self, events: &mut VecDeque<Event>) {
        events.extend(self.close_gap(None));
    }

    /// The gap's budget is used up.
    pub(super) fn gap_expired(&mut self) {
        let Some(gap) = self.active.as_mut().and_then(Active::gap) else { return };
        let why = format!("the second phase was not launched within {:?}", gap.budget);
        if let Some(event) = self.close_gap(Some(why)) {
            self.feed(event);
        }
    }

    /// The owner does something about its transition. One that has ended by now is over.
    pub(super) fn step(&mut self, ticket: Ticket, step: Step) {
        let is_active = self.active.as_ref().is_some_and(
            |active| matches!(&active.purpose, Purpose::Owner(owner) if owner.ticket == ticket),
        );
        match step {
            Step::GoOn if is_active => {
                if let Some(event) = self.close_gap(None) {
                    self.feed(event);
                }
            }
            Step::GiveUp if is_active => self.feed(Event::Cancel),
            Step::GoOn => {}
            Step::GiveUp => self.give_up_queued(ticket),
        }
    }

    fn give_up_queued(&mut self, ticket: Ticket) {
        for request in std::mem::take(&mut self.queue) {
            match request {
                Request::Transition(operation, owner) if owner.ticket == ticket => {
                    let _ = owner.reply.send(Err(MachineError::Cancelled { operation }));
                }
                other => self.queue.push_back(other),
            }
        }
    }
}
