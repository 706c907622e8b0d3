//! One-line faults of the two pure machines, to be switched on at run time.
//!
//! A model checker that never finds anything proves nothing. So each rule that it checks can be
//! broken on purpose: with the feature `mutations`, a [`Transition`](crate::transition::Transition)
//! or a [`Lifecycle`](crate::lifecycle::Lifecycle) can be made with one [`Mutation`] in it, and a
//! test shows that the checker notices. Without the feature, which is how it is shipped, the
//! question whether a fault is switched on is `false` at compile time.

/// One fault of one of the two machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    not(feature = "mutations"),
    expect(unreachable_pub, reason = "public with the feature `mutations` alone")
)]
pub enum Mutation {
    /// Coordinator: the second phase is sent when all but one have answered the first.
    CountsOneAnswerLess,
    /// Coordinator: who is silent at its deadline is taken to have answered.
    TakesSilenceForAnAck,
    /// Coordinator: nothing waits for the proof of a fence.
    GoesOnBesideAFence,
    /// Coordinator: a fence that is not proven in time is taken for proven.
    TakesUnprovenForProven,
    /// Coordinator: an answer counts whatever its epoch is.
    TakesAnswersOfOtherEpochs,
    /// Coordinator: a refusal is passed over.
    GoesOnAfterARefusal,
    /// Coordinator: the last participant is not told what the others are told.
    ForgetsTheLast,
    /// Coordinator: the last participant is left out of an undo.
    UndoForgetsTheLast,
    /// Coordinator: nothing is undone.
    UndoesNothing,
    /// Coordinator: a refusal in an undo is undone by another one.
    UndoesAnUndo,
    /// Coordinator: a failure in the second phase is undone by the row of the first.
    UndoesTheSecondPhaseAsTheFirst,
    /// Coordinator: the undo of a machine that neither ran nor stood leads back to that.
    GoesBackToAHalf,
    /// Coordinator: the answers to a phase have no deadline.
    ArmsNoPhaseTimer,
    /// Coordinator: the outcome does not say who was fenced.
    HidesWhoWasFenced,
    /// Coordinator: who has left STOP when its lease ran out counts as stopped.
    TakesWhoLeftStopForStopped,
    /// Coordinator: a transition that was undone is called done.
    CallsAnUndoDone,
    /// Coordinator: a hold stops nobody.
    HoldsWithoutStopping,
    /// Coordinator: it still acts when it is over.
    ActsAfterTheEnd,
    /// Coordinator: a take-over starts the machine although somebody had reached STOP.
    StartsWhatWasStopped,
    /// Coordinator: a hook that fails is passed over.
    GoesOnAfterAFailedHook,
    /// Device: a command is obeyed whatever its term is.
    ObeysEveryTerm,
    /// Device: a command is obeyed whatever its epoch is.
    ObeysEveryEpoch,
    /// Device: a coordinator is welcome whatever its term is.
    WelcomesEveryTerm,
    /// Device: what the last coordinator wanted is still done for the next one.
    KeepsTheOldCommand,
    /// Device: it answers when the arc begins.
    AnswersBeforeTheArc,
    /// Device: it refuses, and says that it is where it was to go.
    RefusesFromElsewhere,
    /// Device: an abort makes it leave STOP.
    LeavesStopOnAbort,
}

/// The fault that is built into one machine; none without the feature `mutations`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Broken {
    #[cfg(feature = "mutations")]
    by: Option<Mutation>,
}

impl Broken {
    #[cfg(feature = "mutations")]
    pub(crate) fn by(mutation: Mutation) -> Self {
        Self { by: Some(mutation) }
    }

    /// True if this fault is switched on.
    #[cfg(feature = "mutations")]
    pub(crate) fn is(self, mutation: Mutation) -> bool {
        self.by == Some(mutation)
    }

    /// No fault is: this is the code that is shipped.
    #[cfg(not(feature = "mutations"))]
    #[inline(always)]
    pub(crate) const fn is(self, _: Mutation) -> bool {
        false
    }
}
