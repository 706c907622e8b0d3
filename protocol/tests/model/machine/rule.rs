//! What must always hold, and what must be reached so that this means something.

macro_rules! named {
    ($(#[$doc:meta])* $kind:ident { $($(#[$what:meta])* $name:ident => $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub(crate) enum $kind { $($(#[$what])* $name,)+ }

        impl $kind {
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)+];

            /// The property's name; it does not change.
            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

named! {
    /// A property that holds in every state, named after the invariant in the design.
    Rule {
        /// Of the messages: see `Coordinator::send_phase`.
        Barrier => "invariant 1: nobody is told the second phase before everybody has reached the first",
        /// Of the devices: see `oracle::mixed`.
        NoWriterBesideAStopped => "invariant 1: nobody is stopped while another may write into it",
        /// See `Device::step`.
        Quiet => "invariant 2: a device is as quiet as its last answer says until it is started",
        /// Everybody who is not fenced, in one step.
        ToldAtOnce => "invariant 4: a phase is told to everybody at once",
        /// In the very step in which the deadline passes.
        SilenceIsFenced => "invariant 5: who is silent at the deadline is fenced",
        /// Of devices: the state in an answer is the one they are in.
        AnswerIsTrue => "invariant 5: an answer says where the device is",
        /// At the end, nobody who is left owes an answer.
        EverybodyAnswered => "invariant 5: there is no outcome but Held while an answer is missing",
        /// See `oracle::is_true`.
        OutcomeIsTrue => "invariant 6: the outcome says where everybody is",
        /// Nobody is in the middle of anything when it is over.
        NothingRunsHalf => "invariant 6: nothing is on the way when it is over",
        /// No effects, timers or second outcome after the end.
        OneOutcome => "invariant 6: there is one outcome and nothing after it",
        /// Of `PrepareStart` and `Start`.
        NoStartBesideAFence => "invariant 6: nothing is started while a fence is not proven",
        /// Of devices.
        LowerTerm => "invariant 7: a lower term moves no device",
        /// Of devices and coordinators.
        Repeated => "invariant 7: a message that comes again changes nothing",
        /// Of coordinators.
        OtherEpoch => "invariant 7: an answer to another epoch changes nothing",
        /// Of coordinators.
        Deadline => "invariant 8: whatever is waited for has a deadline",
        /// Of coordinators: one for the operation, two for its undo, one for a hold.
        FourEpochs => "invariant 8: a transition has at most four epochs",
        /// Of the second coordinator.
        StoppedIsNotStarted => "invariant 10: a take-over starts nothing once anybody had reached STOP",
    }
}

named! {
    /// Something that must be reached, or the properties that depend on it prove nothing.
    Antecedent {
        SecondPhase => "reached: a second phase is told",
        SecondPhaseWithoutAFenced => "reached: a second phase is told although somebody was fenced",
        EverybodyStopped => "reached: everybody is stopped",
        PromisedQuiet => "reached: a device promises to be quiet",
        Silence => "reached: somebody is silent at a deadline",
        Unproven => "reached: a fence is not proven in time",
        LateProof => "reached: a fence is proven late",
        StartAfterAFence => "reached: a start after a fence was proven",
        Refusal => "reached: a participant refuses",
        ErrorState => "reached: a participant is in ERROR",
        StartUndone => "reached: a start is undone",
        TwoUndoEpochs => "reached: an undo of two epochs ends",
        Done => "reached: Done",
        RolledBack => "reached: RolledBack",
        Stopped => "reached: Stopped",
        Degraded => "reached: Degraded",
        Held => "reached: Held",
        HeldWhileStopping => "reached: Held when a hold has run out of time",
        LowerTerm => "reached: a message of a lower term arrives",
        RepeatedCommand => "reached: a message comes again to a device",
        RepeatedAnswer => "reached: an answer comes again",
        OtherEpoch => "reached: an answer to another epoch arrives",
        SecondOperation => "reached: a second operation ends in Done",
        LossBetween => "reached: somebody is lost between two operations",
        TakeOverDone => "reached: a take-over finds a machine that runs",
        TakeOverRolledBack => "reached: a take-over goes back to RUNNING",
        TakeOverHeld => "reached: a take-over finds somebody stopped",
        FirstActsLater => "reached: the first coordinator sends something after the take-over",
        Superseded => "reached: the first coordinator learns that it is superseded",
        HookFailed => "reached: a hook fails",
        HookHung => "reached: a hook does not return",
    }
}
