//! Faults of the coordinator actor, to be switched on by its tests.
//!
//! Schedules that never find anything prove nothing. So one fault of the actor, or of the pure
//! machine that it drives, can be built in when a test of this crate is built with the feature
//! `mutations`. In what is shipped the question whether one is, is `false` at compile time.

#[cfg(all(test, feature = "mutations"))]
use standstill_protocol::mutation::Mutation;
use standstill_protocol::transition::Transition;

/// One fault of the actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slip {
    /// A deadline is decided before what has come by then is read.
    DecidesBeforeReading,
    /// The last answers of a process that has ended are not read.
    ForgetsLastAnswers,
    /// The sockets are not watched any more once they were read.
    ForgetsToWatch,
    /// Whoever waits for a transition is not answered.
    ForgetsTheOwner,
    /// Requests that wait never have their turn.
    ForgetsTheQueue,
    /// A device that is lost outside a transition is not fenced.
    FencesNobodyOutside,
    /// A newcomer counts before it was brought to the machine's state.
    CountsNewcomersAtOnce,
    /// Devices are killed though another coordinator has them.
    KillsWhatIsAnothers,
    /// A device inside the VMM counts as done as soon as it was called.
    AnswersForLocals,
}

/// The faults that are built in; none in what is shipped.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slips {
    #[cfg(all(test, feature = "mutations"))]
    pub(super) slip: Option<Slip>,
    #[cfg(all(test, feature = "mutations"))]
    pub(super) mutation: Option<Mutation>,
}

impl Slips {
    /// True if this fault is switched on.
    #[cfg(all(test, feature = "mutations"))]
    pub(super) fn is(self, slip: Slip) -> bool {
        self.slip == Some(slip)
    }

    /// No fault is: this is the code that is shipped.
    #[cfg(not(all(test, feature = "mutations")))]
    #[inline(always)]
    pub(super) const fn is(self, _: Slip) -> bool {
        false
    }

    /// A transition, with the fault that is built into it.
    #[cfg(all(test, feature = "mutations"))]
    pub(super) fn transition(self, transition: Transition) -> Transition {
        match self.mutation {
            Some(mutation) => transition.with_mutation(mutation),
            None => transition,
        }
    }

    /// A transition as it is shipped.
    #[cfg(not(all(test, feature = "mutations")))]
    #[inline(always)]
    pub(super) fn transition(self, transition: Transition) -> Transition {
        transition
    }

    /// A device's lifecycle, with the fault that is built into it.
    #[cfg(test)]
    pub(super) fn lifecycle(
        self,
        lifecycle: standstill_protocol::lifecycle::Lifecycle,
    ) -> standstill_protocol::lifecycle::Lifecycle {
        #[cfg(feature = "mutations")]
        if let Some(mutation) = self.mutation {
            return lifecycle.with_mutation(mutation);
        }
        lifecycle
    }
}
