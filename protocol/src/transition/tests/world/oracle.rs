//! What must hold while a simulated machine is moved, seen from outside.

use super::super::super::*;
use super::World;
use super::node::{Fence, Life, Node};
use crate::message::{Epoch, Phase};
use crate::migration::{Activity, MigrationState};
use std::collections::BTreeSet;

impl World {
    /// Nobody is told a second phase before everybody has reached the first, and nothing is
    /// started while a fence is not proven.
    pub(super) fn check_barrier(&self, (epoch, phase): (Epoch, Phase)) {
        let first = match phase {
            Phase::Stop => Phase::PrepareStop,
            Phase::Start => Phase::PrepareStart,
            _ => phase,
        };
        for &id in self.told.get(&(epoch, first)).into_iter().flatten() {
            let fenced = self.nodes.iter().any(|n| n.member.id == id && n.fence == Fence::Proven);
            let given_up = self.unproven.contains(&id) || self.local_hung(id);
            let quiet = self.refused_stopped.contains(&(id, epoch, first));
            let acked = self.acks.contains(&(id, epoch, first));
            assert!(acked || fenced || given_up || quiet, "{id:?} has not reached {first}");
        }
        if matches!(phase, Phase::PrepareStart | Phase::Start) {
            let pending = self.nodes.iter().find(|node| node.fence == Fence::Asked);
            assert!(pending.is_none(), "{phase} while a fence is not proven: {pending:?}");
            assert!(self.unproven.is_empty());
        }
    }

    pub(super) fn local_hung(&self, id: ParticipantId) -> bool {
        self.nodes.iter().any(|node| {
            node.member.id == id
                && node.member.kind == MemberKind::Local
                && self.transition.state(id).is_none()
        })
    }

    /// Pairs of one who is stopped and one who may write into it.
    pub(super) fn mixed(&self) -> BTreeSet<(ParticipantId, ParticipantId)> {
        let counts = |node: &&Node| node.fence != Fence::Proven && node.member.flags.p2p();
        let writers: Vec<_> = self
            .nodes
            .iter()
            .filter(counts)
            .filter(|node| node.activity() == Activity::Full)
            .map(|node| node.member.id)
            .filter(|id| !self.unproven.contains(id) && !self.ghosts.contains(id))
            .filter(|id| !self.local_hung(*id))
            .collect();
        let mut mixed = BTreeSet::new();
        if !writers.is_empty() {
            for node in self.nodes.iter().filter(counts) {
                let state = node.state();
                let stopped =
                    state.activity() == Activity::Stopped && state != MigrationState::Error;
                if stopped && node.life != Life::Dead {
                    mixed.extend(writers.iter().map(|&writer| (node.member.id, writer)));
                }
            }
        }
        mixed
    }

    /// What must hold after every step; at the end, `properties::ends` has more to say.
    pub(super) fn check(&mut self) {
        if !self.no_barrier && self.broken.is_none() {
            let broken = self.mixed().into_iter().find(|pair| !self.found.contains(pair));
            if let Some(pair) = broken {
                self.broken = Some(format!("{pair:?} is (stopped, may write): {:#?}", self.nodes));
            }
        }
        if self.outcome.is_some() {
            let longest = longest(&self.plan);
            assert!(
                self.now <= longest,
                "{} ns, longer than {longest}: {:#?}",
                self.now,
                self.plan
            );
        }
    }

    /// Where everybody is who still counts, as far as anybody can know, and where it was at the
    /// beginning.
    pub(in super::super) fn left(&self) -> Vec<(Member, MigrationState)> {
        let live = |node: &&Node| self.transition.state(node.member.id).is_some();
        let is = |node: &Node| node.stood.unwrap_or(node.state());
        self.nodes.iter().filter(live).map(|node| (node.member, is(node))).collect()
    }

    /// True if anybody was fenced, or was to be.
    pub(in super::super) fn any_fenced(&self) -> bool {
        self.nodes.iter().any(|node| node.fence != Fence::None)
    }

    pub(in super::super) fn was_undone(&self) -> bool {
        self.undone
    }

    pub(in super::super) fn hold_expired(&self) -> bool {
        self.hold_expired
    }

    pub(in super::super) fn was_told(&self) -> bool {
        !self.told.is_empty()
    }

    /// True if the second phase of the operation itself had begun.
    pub(in super::super) fn second_phase(&self) -> bool {
        self.told.keys().any(|&(epoch, phase)| {
            epoch == self.plan.epoch && matches!(phase, Phase::Stop | Phase::Start | Phase::Load)
        })
    }
}

/// The longest that a transition may take: see "Deadlines" in `docs/transitions.md`.
fn longest(plan: &Plan) -> u64 {
    let all = |budget: fn(&Member) -> u64| plan.members.iter().map(budget).max().unwrap_or(0);
    let optional = plan.members.iter().filter(|member| {
        plan.operation == Operation::TakeOver || member.on_loss == OnLoss::ContinueWithout
    });
    let hooks: u64 = plan.hooks.iter().map(|hook| hook.budget_ns).sum();
    hooks
        + all(|member| member.first_ns)
        + all(|member| member.second_ns)
        + optional.count() as u64 * plan.fence_ns
        + 2 * plan.undo_ns
}
