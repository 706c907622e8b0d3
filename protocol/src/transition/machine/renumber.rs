//! The same transition of a machine whose participants have other numbers.

use super::super::outcome::{Failure, HeldReason, Subject};
use super::super::plan::ParticipantId;
use super::{Timer, Transition};

impl Transition {
    /// This transition as it would be if its participants had other numbers.
    ///
    /// No decision depends on a participant's number, so what follows is the same up to the
    /// numbers. For model checkers: of states that differ in nothing else one has to be looked at.
    ///
    /// `number` must give each participant a number of its own.
    #[must_use]
    pub fn renumbered(&self, number: impl Fn(ParticipantId) -> ParticipantId) -> Self {
        let mut other = self.clone();
        for member in &mut other.plan.members {
            member.id = number(member.id);
        }
        other.plan.members.sort_unstable_by_key(|member| member.id);
        for participant in &mut other.participants {
            participant.member.id = number(participant.member.id);
        }
        other.participants.sort_unstable_by_key(|participant| participant.member.id);
        for (id, _) in &mut other.early {
            *id = number(*id);
        }
        for timer in &mut other.armed {
            if let Timer::Fence(id) = timer {
                *id = number(*id);
            }
        }
        for reason in &mut other.reasons {
            if let HeldReason::FenceUnproven(id) | HeldReason::LocalHung(id) = reason {
                *id = number(*id);
            }
        }
        for Failure { subject, .. } in &mut other.history.failures {
            if let Subject::Participant(id) = subject {
                *id = number(*id);
            }
        }
        other
    }
}
