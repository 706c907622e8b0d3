//! What is checked together: a machine, what its owner does, and which faults may happen.

use super::rule::Antecedent;
use standstill_protocol::message::{Epoch, PeerDma, Term};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_protocol::transition::{
    Hook, HookId, Member, MemberKind, OnFailure, OnLoss, Operation, ParticipantId, Phases, Plan,
    Slot,
};

/// How many faults of each kind may happen in one run, in any order and at any moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Faults {
    /// Device processes that die by themselves.
    pub(crate) crashes: u8,
    /// Arcs that fail with the device back where it was.
    pub(crate) refusals: u8,
    /// Arcs that fail and leave the device in ERROR.
    pub(crate) errors: u8,
    /// Timers that run out: of a phase, a query, a hook, an undo, a hold.
    pub(crate) timeouts: u8,
    /// Fences whose proof does not come in time. It may come later.
    pub(crate) unproven: u8,
    /// Messages that are delivered once more, at any later moment.
    pub(crate) repeats: u8,
    /// All of these together.
    pub(crate) total: u8,
}

impl Faults {
    /// One fault happens. When the last one has, all states without a fault to come are one.
    pub(crate) fn spend(&mut self, kind: impl Fn(&mut Self) -> &mut u8) {
        *kind(self) -= 1;
        self.total -= 1;
        if self.total == 0 {
            *self = Self::default();
        }
    }
}

/// A second coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Successor {
    /// There is none.
    None,
    /// It takes over at any moment; the first one is dead, its messages are still in flight.
    AfterDeath,
    /// It takes over at any moment, and the first one goes on as if nothing had happened.
    BesideTheFirst,
}

/// One configuration of the model.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) devices: usize,
    /// Where every device is at the beginning: RUNNING or PRE_COPY.
    pub(crate) from: MigrationState,
    /// Where a hold that ran out of its time has left the last one.
    pub(crate) last_from: Option<MigrationState>,
    /// What the owner does, one after the other, as long as the machine is not held.
    pub(crate) operations: &'static [Operation],
    pub(crate) on_failure: OnFailure,
    /// The machine can go on without its last device.
    pub(crate) last_is_optional: bool,
    /// The vCPUs: a hook before a stop and after a start.
    pub(crate) hook: bool,
    pub(crate) phases: Phases,
    pub(crate) faults: Faults,
    pub(crate) successor: Successor,
    /// What this configuration must reach.
    pub(crate) reaches: &'static [Antecedent],
}

impl Scenario {
    pub(crate) fn new(name: &'static str, devices: usize) -> Self {
        Self {
            name,
            devices,
            from: MigrationState::Running,
            last_from: None,
            operations: &[Operation::Pause, Operation::Resume],
            on_failure: OnFailure::Rollback,
            last_is_optional: false,
            hook: false,
            phases: Phases::Two,
            faults: Faults::default(),
            successor: Successor::None,
            reaches: &[],
        }
    }

    /// Where a device is at the beginning.
    pub(crate) fn from(&self, device: usize) -> MigrationState {
        let last = self.last_from.filter(|_| device + 1 == self.devices);
        last.unwrap_or(self.from)
    }

    pub(crate) fn hooks(&self, stopped: bool) -> Vec<Hook> {
        let hook = Hook {
            id: HookId(0),
            stop: Slot::Before,
            start: Slot::After,
            stop_rank: 0,
            start_rank: 0,
            budget_ns: 1,
            stopped,
        };
        if self.hook { vec![hook] } else { Vec::new() }
    }

    pub(crate) fn plan(
        &self,
        operation: Operation,
        term: Term,
        epoch: Epoch,
        members: &[(usize, MigrationState)],
        hooks: Vec<Hook>,
    ) -> Plan {
        let members = members.iter().map(|&(device, state)| Member {
            id: participant(device),
            kind: MemberKind::Process,
            state,
            flags: MigrationFlags::ALL,
            peer_dma: PeerDma::Possible,
            one_phase_allowed: false,
            on_loss: match self.last_is_optional && device + 1 == self.devices {
                true => OnLoss::ContinueWithout,
                false => OnLoss::Fail,
            },
            first_ns: 1,
            second_ns: 1,
            lease_ns: 0,
        });
        Plan {
            operation,
            term,
            epoch,
            members: members.collect(),
            hooks,
            phases: self.phases,
            on_failure: self.on_failure,
            undo_ns: 1,
            fence_ns: 1,
        }
    }
}

pub(crate) fn participant(device: usize) -> ParticipantId {
    ParticipantId(u32::try_from(device).expect("a handful of devices"))
}

pub(crate) fn device_of(id: ParticipantId) -> usize {
    usize::try_from(id.0).expect("a handful of devices")
}
