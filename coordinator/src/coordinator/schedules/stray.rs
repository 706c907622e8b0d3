//! What a device sends though nobody waits for it: it must change nothing.

use super::world::World;
use standstill_protocol::message::{
    DeviceEvent, DeviceMessage, Epoch, Evidence, MemoryAccepted, Phase, Reached, Refusal,
    RefusalKind, Refused, Status, Term, Timings,
};
use standstill_protocol::migration::MigrationState;

impl World {
    /// A device sends an answer that it has sent before, one to another term or epoch, or one that
    /// nobody has asked for.
    pub(super) fn stray(&mut self, i: usize, what: usize) {
        let unit = &self.units[i];
        let term = unit.device.lifecycle.term();
        let which = (what / 8) % unit.device.answers.len().max(1);
        let answered = unit.device.answers.get(which).copied();
        let (mut epoch, phase, reached, state) = answered
            .map_or((Epoch(u64::MAX), Phase::Stop, true, MigrationState::Stop), |answer| {
                (answer.epoch, answer.phase, answer.reached, answer.state)
            });
        let mut named = term;
        match what % 8 {
            0 => named = Term(term.0 - 1),
            1 => named = Term(term.0 + 1),
            2 => epoch = Epoch(epoch.0.saturating_add(1000)),
            3 => epoch = Epoch(0),
            _ => {}
        }
        let message = match what % 8 {
            5 => {
                let sequence = u64::try_from(what).unwrap_or_default();
                DeviceMessage::MemoryAccepted(MemoryAccepted { sequence: sequence + 1000 })
            }
            6 => DeviceMessage::Status(Status {
                term: Term(term.0 - 1),
                epoch,
                state,
                client_state: state,
                moving_to: None,
            }),
            7 => DeviceMessage::Event(DeviceEvent::ClientState(state)),
            _ if reached => {
                let (timings, evidence) = (Timings::default(), Evidence::default());
                let reached = Reached { term: named, epoch, phase, state, timings, evidence };
                DeviceMessage::Reached(reached)
            }
            _ => {
                let refusal = Refusal { kind: RefusalKind::Device, text: "again".to_owned() };
                DeviceMessage::Refused(Refused { term: named, epoch, phase, state, refusal })
            }
        };
        self.units[i].device.send(&message);
    }
}
