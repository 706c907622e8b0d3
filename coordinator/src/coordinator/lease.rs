//! Leases: device processes that are stopped for a time, and that leave STOP by themselves when it is
//! over. (`docs/transitions.md` says what that means for a machine.)
//!
//! A device tells that its lease has run out, and nothing but that makes the coordinator believe it. Until
//! the message comes it cannot know better than that it *may* have: see [`State::stands`].

use super::state::{Device, Standing, State};
use crate::clock;
use crate::error::ProtocolError;
use crate::events::MachineEvent;
use standstill_protocol::message::{Command, DeviceEvent, Epoch, Phase};
use standstill_protocol::migration::{Activity, MigrationState};
use standstill_protocol::transition::{Event, MachineState, ParticipantId};
use std::time::{Duration, Instant};

/// The lease of a device's last stop. It ends with the next command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    /// The epoch of the stop.
    epoch: Epoch,
    /// It cannot have run out sooner.
    ends: Instant,
    /// The device says that it has run out.
    expired: bool,
}

impl Lease {
    /// That of a command which is being sent, if it has one.
    pub(super) fn given_by(command: &Command) -> Option<Self> {
        let Command { epoch, lease_ns, .. } = *command;
        let ends = || clock::now() + Duration::from_nanos(lease_ns);
        (lease_ns > 0).then(|| Self { epoch, ends: ends(), expired: false })
    }

    /// One that an earlier coordinator may have given: nobody here knows.
    pub(super) fn of_another() -> Self {
        Self { epoch: Epoch(0), ends: clock::now(), expired: false }
    }
}

impl Device {
    /// True if it counts and is not in STOP. In a machine that was stopped it has left STOP by itself
    /// then, and has not been told to go anywhere since; not even by a transition that was given up
    /// before this was known.
    fn has_left(&self) -> bool {
        self.standing == Standing::Ready && self.state.activity() != Activity::Stopped
    }

    /// True if it is in STOP, and cannot have left it yet.
    pub(super) fn stands(&self) -> bool {
        self.state.activity() == Activity::Stopped
            && self.lease.is_none_or(|lease| !lease.expired && clock::now() < lease.ends)
    }
}

impl State {
    /// Where the machine is: one that was stopped for the time of a lease may not be any more.
    pub(super) fn present(&self) -> MachineState {
        match self.machine {
            MachineState::Stopped if self.devices.iter().any(Device::has_left) => {
                MachineState::LeaseExpired
            }
            machine => machine,
        }
    }

    /// True if all that counts has certainly been in STOP since the last pause has ended.
    pub(super) fn stands(&self) -> bool {
        let mut counts = self.devices.iter().filter(|device| device.standing == Standing::Ready);
        self.machine == MachineState::Stopped && self.active.is_none() && counts.all(Device::stands)
    }

    /// A device has answered to a command of the present term: what it was told before is over. Outside a
    /// transition that was what it was told last before it was given up, and says where it is.
    pub(super) fn lease_answered(
        &mut self,
        id: ParticipantId,
        epoch: Epoch,
        phase: Phase,
        state: MigrationState,
    ) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let asked = device.told == Some((epoch, phase)) && phase != Phase::Save;
        if !asked || device.lease.is_none_or(|lease| lease.epoch >= epoch) {
            return;
        }
        device.lease = None;
        if self.active.as_ref().is_none_or(|active| active.transition.state(id).is_none()) {
            device.state = state;
        }
    }

    /// A device says that its lease has run out.
    pub(super) fn lease_expired(
        &mut self,
        id: ParticipantId,
        state: MigrationState,
    ) -> Result<(), ProtocolError> {
        let member = self.active.as_ref().and_then(|active| active.transition.state(id));
        let Some(device) = self.devices.get_mut(id) else { return Ok(()) };
        if !matches!(device.standing, Standing::Ready | Standing::Joining) {
            return Ok(());
        }
        let event = DeviceEvent::LeaseExpired(state);
        let believed = member.unwrap_or(device.state);
        if believed.activity() != Activity::Stopped {
            // What it was told meanwhile had its answer first, or has none: nothing follows from this.
            self.tell_event(id, event);
            return Ok(());
        }
        let unexpected = |what| {
            Err(ProtocolError::Unexpected { what, expected: "nothing before the next command" })
        };
        let p2p = device.hello.as_ref().is_none_or(|hello| hello.capabilities.migration.p2p());
        let leads = if p2p { MigrationState::RunningP2p } else { MigrationState::Running };
        // Another command may have overtaken it on its way from STOP_COPY.
        let fits = state == leads || state == MigrationState::Stop;
        match &mut device.lease {
            Some(lease) if !lease.expired && fits => lease.expired = state == leads,
            Some(_) => return unexpected("the end of a lease in a state to which none leads"),
            None => return unexpected("the end of a lease that it does not have"),
        }
        device.state = state;
        let device = device.spec.name.clone();
        // Once for each stop, so it is never too much.
        self.emit(MachineEvent::Device { device, event });
        if member.is_some() {
            self.feed(Event::LeaseExpired(id, state));
        }
        Ok(())
    }
}
