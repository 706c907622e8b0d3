//! What is true of the machine, seen from outside both machines.

use super::coordinator::{Coordinator, Fence, Seat};
use super::device::Life;
use super::scenario::{device_of, participant};
use super::world::World;
use standstill_protocol::migration::{Activity, MigrationState};
use standstill_protocol::transition::{
    HeldReason, Loss, MachineState, Operation, Outcome, ParticipantId, Row, row,
};

/// True if somebody is stopped and another one may write into it: the statement of
/// `protocol/src/transition/tests/world/oracle.rs`.
///
/// A dead writer counts until its fence is proven. One whose fence could not be proven does not:
/// nothing more can be done about it, and the machine is held. Whoever is dead or in ERROR cannot
/// be spoilt.
pub(crate) fn mixed(world: &World) -> bool {
    let unproven = |device: usize| {
        let mut coordinators = world.coordinators.iter().flatten();
        coordinators.any(|coordinator| coordinator.seats[device].fence == Fence::Unproven)
    };
    let writes = world.devices.iter().enumerate().any(|(number, device)| {
        let counts = device.life != Life::Gone && !device.ghost && !unproven(number);
        counts && device.may_do() == Activity::Full
    });
    writes
        && world.devices.iter().any(|device| {
            device.life == Life::Alive
                && device.is_stopped()
                && device.lifecycle.state() != MigrationState::Error
        })
}

/// Whether an outcome says where everybody is.
pub(crate) fn is_true(world: &World, coordinator: &Coordinator, outcome: &Outcome) -> bool {
    let seats = || coordinator.seats.iter().enumerate().filter(|(_, seat)| seat.member);
    let nobody_fenced = seats().all(|(_, seat)| seat.fence == Fence::None);
    let fenced_are = |fenced: &[(ParticipantId, Loss)]| {
        seats().all(|(device, seat)| {
            let named = fenced.iter().any(|(id, _)| *id == participant(device));
            named == (seat.fence == Fence::Proven)
                && (!named || world.devices[device].life == Life::Gone)
        })
    };
    let left_are = |fits: &dyn Fn(&Seat, MigrationState) -> bool| {
        coordinator.standing().all(|(device, seat)| {
            let believed = coordinator.transition.state(participant(device));
            let is = world.devices[device].lifecycle.state();
            let lags = world.devices[device].activity != is.activity();
            believed == Some(is) && !lags && fits(seat, is)
        })
    };
    let done = |seat: &Seat, is: MigrationState| match coordinator.operation {
        Operation::TakeOver => is.activity() == Activity::Full,
        operation => match row(operation, seat.original) {
            Row::Take { second, .. } => is == second,
            Row::Refuse(_) => false,
        },
    };
    let undone = |seat: &Seat, is: MigrationState| match (coordinator.operation, seat.original) {
        (Operation::TakeOver, _) => is.activity() == Activity::Full,
        // A stream that was given up is not opened again.
        (Operation::Pause | Operation::SwitchOver, MigrationState::PreCopy)
            if coordinator.second_phase =>
        {
            is == MigrationState::Running
        }
        // A resume goes back to STOP; who has not left STOP_COPY stays there.
        (Operation::Resume, MigrationState::StopCopy) => {
            matches!(is, MigrationState::Stop | MigrationState::StopCopy)
        }
        (_, original) => is == original,
    };
    let stopped = |_: &Seat, is: MigrationState| {
        is.activity() == Activity::Stopped && is != MigrationState::Error
    };
    let hook_is = |stopped: bool| !world.hooks || coordinator.hook_stopped == stopped;
    let hook_done = match coordinator.operation {
        Operation::Pause | Operation::SwitchOver => hook_is(true),
        Operation::Resume => hook_is(false),
        Operation::Load | Operation::TakeOver => true,
    };
    // Back to where everybody was is no one state if they were in several.
    let half = || {
        let mut activities = seats().map(|(_, seat)| seat.original.activity());
        let first = activities.next();
        first == Some(Activity::NoPeer) || activities.any(|other| Some(other) != first)
    };
    let rolls_back = coordinator.operation == Operation::TakeOver || coordinator.undone;
    match outcome {
        Outcome::Done => nobody_fenced && !coordinator.undone && hook_done && left_are(&done),
        Outcome::RolledBack => {
            nobody_fenced
                && rolls_back
                && (coordinator.operation == Operation::TakeOver || !half())
                && hook_is(coordinator.hook_found_stopped)
                && left_are(&undone)
        }
        Outcome::Stopped => nobody_fenced && coordinator.undone && left_are(&stopped),
        Outcome::Degraded { machine, fenced } => {
            let unproven = |seat: &Seat| matches!(seat.fence, Fence::Asked | Fence::Unproven);
            !fenced.is_empty()
                && fenced_are(fenced)
                && !seats().any(|(_, seat)| unproven(seat))
                && match machine {
                    MachineState::Running => {
                        left_are(&|_, is: MigrationState| is.activity() == Activity::Full)
                    }
                    MachineState::Stopped => left_are(&stopped),
                    MachineState::Held | MachineState::LeaseExpired => false,
                }
        }
        Outcome::Held { reasons, fenced } => {
            let given_up = coordinator.hold_expired || coordinator.superseded;
            let named = reasons.iter().all(|reason| match reason {
                HeldReason::FenceUnproven(id) => matches!(
                    coordinator.seats[device_of(*id)].fence,
                    Fence::Unproven | Fence::Proven
                ),
                _ => true,
            });
            let quiet =
                coordinator.standing().all(|(device, _)| world.devices[device].is_stopped());
            !reasons.is_empty() && named && fenced_are(fenced) && (given_up || quiet)
        }
    }
}
