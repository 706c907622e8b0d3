//! The `tracing` spans of a transition: `transition{operation, term, epoch}`, and in it
//! `phase{phase, epoch}` for the phase that was told last.
//!
//! An actor has no stack that lives as long as a transition does, so the spans are kept with it and
//! entered around each thing that is handled for it. Where nobody wants them they cost nothing
//! worth measuring.

use crate::events::TARGET;
use standstill_protocol::message::{Epoch, Phase, Term};
use standstill_protocol::transition::{Operation, Transition};
use tracing::Span;

/// The spans of one transition.
#[derive(Debug)]
pub(crate) struct Spans {
    term: Term,
    transition: Span,
    /// The phase that was told last, by its epoch, and its span.
    phase: Option<((Epoch, Phase), Span)>,
}

impl Spans {
    /// A transition that begins now; of that device alone, if it is given. It is in no other span,
    /// such as the actor's.
    pub(crate) fn new(
        operation: Operation,
        (term, epoch): (Term, Epoch),
        device: Option<&str>,
    ) -> Self {
        let transition = tracing::info_span!(
            parent: None, "transition", %operation, term = term.0, epoch = epoch.0, device
        );
        Self { term, transition, phase: None }
    }

    /// Where the transition is; to be entered only while something is handled for it.
    pub(crate) fn present(&self) -> Span {
        self.phase.as_ref().map_or(&self.transition, |(_, span)| span).clone()
    }

    /// The transition may have gone on to another phase.
    pub(crate) fn follow(&mut self, transition: &Transition) {
        if transition.is_over() {
            // Its end is in none of its phases.
            self.phase = None;
            return;
        }
        let Some(phase) = transition.phase() else { return };
        let key = (transition.epoch(), phase);
        if self.phase.as_ref().is_some_and(|(present, _)| *present == key) {
            return;
        }
        let (term, epoch) = (self.term.0, transition.epoch().0);
        let span = tracing::info_span!(parent: &self.transition, "phase", %phase, epoch);
        let undo = transition.is_undoing();
        span.in_scope(|| {
            tracing::debug!(target: TARGET, term, epoch, %phase, undo, "phase begins");
        });
        self.phase = Some((key, span));
    }
}
