//! Devices are alike: of states that differ only in their numbers one is looked at.

use super::coordinator::{Coordinator, Seat};
use super::device::Device;
use super::scenario::{device_of, participant};
use super::shared::{Shared, hash_of};
use super::world::World;
use standstill_protocol::transition::{Event, HeldReason, Outcome, ParticipantId, Timer};

/// A state that is the same but for the devices' numbers; the same one for many of these.
///
/// Whatever order is chosen here, the result is equivalent to the state; a better order only makes
/// more states one. The last device must not be special, and no message may be kept.
pub(crate) fn representative(world: &World) -> World {
    let mut order: Vec<_> = (0..world.devices.len()).collect();
    order.sort_by_cached_key(|&device| key(world, device));
    let mut number = vec![0; order.len()];
    for (new, &old) in order.iter().enumerate() {
        number[old] = new;
    }
    let rename = |id: ParticipantId| participant(number[device_of(id)]);
    let mut other = world.clone();
    for (new, &old) in order.iter().enumerate() {
        other.devices[new] = Shared::new(device(&world.devices[old], participant(new)));
    }
    for coordinator in other.coordinators.iter_mut().flatten() {
        let mut renamed: Coordinator = (**coordinator).clone();
        renamed.transition = renamed.transition.renumbered(rename);
        renamed.seats = order.iter().map(|&old| coordinator.seats[old]).collect::<Vec<Seat>>();
        for timer in &mut renamed.timers {
            if let Timer::Fence(id) = timer {
                *id = rename(*id);
            }
        }
        renamed.timers.sort_unstable();
        if let Some(outcome) = &mut renamed.outcome {
            rename_outcome(outcome, rename);
        }
        *coordinator = Shared::new(renamed);
    }
    other
}

/// What is known of a device, without its number.
fn key(world: &World, number: usize) -> u64 {
    let of_coordinator = |coordinator: &Shared<Coordinator>| {
        let id = participant(number);
        let awaited = coordinator.transition.awaited().any(|awaited| awaited == id);
        (coordinator.seats[number], coordinator.transition.state(id), awaited)
    };
    let seats: Vec<_> = world.coordinators.iter().flatten().map(of_coordinator).collect();
    hash_of(&(device(&world.devices[number], participant(0)), seats))
}

/// The device as it would be under that number.
fn device(device: &Device, id: ParticipantId) -> Device {
    let mut renamed = device.clone();
    for event in renamed.links.iter_mut().flat_map(|link| &mut link.up) {
        if let Event::Answer { from: who, .. } | Event::Lost(who, _) = event {
            *who = id;
        }
    }
    renamed
}

fn rename_outcome(outcome: &mut Outcome, rename: impl Fn(ParticipantId) -> ParticipantId) {
    if let Outcome::Degraded { fenced, .. } | Outcome::Held { fenced, .. } = outcome {
        for (id, _) in fenced.iter_mut() {
            *id = rename(*id);
        }
        fenced.sort_unstable_by_key(|(id, _)| *id);
    }
    if let Outcome::Held { reasons, .. } = outcome {
        for reason in reasons {
            if let HeldReason::FenceUnproven(id) | HeldReason::LocalHung(id) = reason {
                *id = rename(*id);
            }
        }
    }
}
