//! What goes into a transition: who takes part in it and how, and whether it can begin as things are.

use super::Owner;
use super::state::{Device, Local, Standing, State};
use crate::description::DeviceSpec;
use crate::error::MachineError;
use crate::report::nanos;
use standstill_protocol::message::PeerDma;
use standstill_protocol::migration::MigrationFlags;
use standstill_protocol::transition::{
    HeldReason, MachineState, Member, MemberKind, OnFailure, OnLoss, Operation, Plan, PlanError,
    Transition,
};
use std::time::Duration;

impl State {
    /// What an operation would be for this machine as it is.
    pub(super) fn plan(&self, operation: Operation) -> Plan {
        let devices = self.devices.iter().filter_map(|device| {
            let counts = matches!(device.standing, Standing::Ready | Standing::Lost(..));
            counts.then(|| self.member(device)).flatten()
        });
        let locals = self.locals.iter().filter(|local| !local.hung);
        let locals = locals.map(|local| self.local_member(local));
        Plan {
            operation,
            term: self.term,
            epoch: self.epoch.next(),
            members: devices.chain(locals).collect(),
            hooks: self.hooks.iter().filter(|entry| !entry.hung).map(|e| e.hook).collect(),
            phases: self.phases,
            on_failure: self.on_failure,
            undo_ns: nanos(self.deadlines.undo),
            fence_ns: nanos(self.deadlines.fence),
        }
    }

    /// What a device is to a transition; `None` if it has no process.
    pub(super) fn member(&self, device: &Device) -> Option<Member> {
        let lost = match device.standing {
            Standing::Ready | Standing::Greeting | Standing::Joining => false,
            // It was lost before; what is left is to prove it.
            Standing::Lost(..) => true,
            Standing::Fenced(_) | Standing::Leaving => return None,
        };
        let on_loss = match lost {
            true => OnLoss::ContinueWithout,
            false => self.policies.in_transition(&device.spec),
        };
        let capabilities = device.hello.as_ref().map(|hello| hello.capabilities);
        Some(Member {
            id: device.id,
            kind: MemberKind::Process,
            state: device.state,
            flags: capabilities.map_or(MigrationFlags::STOP_COPY, |c| c.migration),
            peer_dma: capabilities.map_or(PeerDma::Possible, |c| c.peer_dma),
            // One that is lost is told nothing.
            one_phase_allowed: device.spec.one_phase_allowed || lost,
            on_loss,
            first_ns: nanos(self.first_phase(&device.spec)),
            second_ns: nanos(device.spec.second_phase.unwrap_or(self.deadlines.second_phase)),
            lease_ns: 0,
        })
    }

    /// What a local device is to a transition.
    pub(super) fn local_member(&self, local: &Local) -> Member {
        Member {
            id: local.id,
            kind: MemberKind::Local,
            state: local.state,
            flags: local.flags,
            peer_dma: local.peer_dma,
            one_phase_allowed: false,
            on_loss: OnLoss::Fail,
            first_ns: nanos(self.deadlines.first_phase),
            second_ns: nanos(self.deadlines.second_phase),
            lease_ns: 0,
        }
    }

    /// How long a device has for the answer to a first phase.
    pub(super) fn first_phase(&self, spec: &DeviceSpec) -> Duration {
        spec.first_phase.unwrap_or(self.deadlines.first_phase)
    }

    pub(super) fn admit(
        &self,
        operation: Operation,
        owner: &Owner,
    ) -> Result<Transition, MachineError> {
        let under_way = self.active.as_ref().map(|active| active.operation);
        // A held machine can be stopped again, and be proven stopped by that, unless it depends on
        // something that cannot be asked.
        let possible = self.machine != MachineState::Held
            || (operation != Operation::Resume
                && !self.held.iter().any(|reason| {
                    matches!(
                        reason,
                        HeldReason::HookHung(_)
                            | HeldReason::TakenOverStopped
                            | HeldReason::Superseded
                    )
                }));
        if under_way.is_some() || !possible || self.ending.is_some() {
            let machine = self.present();
            return Err(MachineError::State { operation, machine, under_way });
        }
        if operation == Operation::Resume {
            self.nobody_is_missing()?;
        }
        let mut plan = self.plan(operation);
        if self.machine == MachineState::Held {
            // Nothing starts in a machine that is held, whatever comes of this.
            plan.on_failure = OnFailure::StayStopped;
        }
        plan.hooks.extend(owner.gap.as_ref().map(|gap| gap.hook(operation)));
        for member in &mut plan.members {
            if member.kind == MemberKind::Process {
                member.lease_ns = nanos(owner.lease);
            }
        }
        Transition::new(plan).map_err(|source| {
            let device = self.in_the_way(&source);
            MachineError::Plan { device, source }
        })
    }

    /// Whether every device is there that the machine must not run without.
    fn nobody_is_missing(&self) -> Result<(), MachineError> {
        for device in self.devices.iter() {
            let missed = !device.care.added
                && device.care.leaving.is_none()
                && !self.policies.may_be_missing(&device.spec);
            let why = match &device.standing {
                Standing::Lost(_, why) | Standing::Fenced(why) => why.clone(),
                Standing::Greeting | Standing::Joining => "it is being restarted".to_owned(),
                Standing::Ready | Standing::Leaving => continue,
            };
            if missed {
                return Err(MachineError::Missing { device: device.spec.name.clone(), why });
            }
        }
        Ok(())
    }

    /// The name of the participant or hook that a plan fails for.
    pub(super) fn in_the_way(&self, error: &PlanError) -> String {
        match *error {
            PlanError::State { id, .. }
            | PlanError::OnePhase { id }
            | PlanError::NoState { id, .. }
            | PlanError::Twice { id } => self.names.participant(id),
            PlanError::HookTwice { id } => self.names.hook(id),
        }
    }
}
