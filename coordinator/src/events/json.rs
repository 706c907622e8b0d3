//! Events as JSON, for programs.

use super::MachineEvent;
use crate::report::{JsonReport, nanos};
use serde::{Deserialize, Serialize};
use standstill_protocol::message::DeviceEvent;

/// An event as one JSON object, with names instead of numbers; for `serde_json`. The field `kind`
/// says which; fields are those of [`MachineEvent`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "each is the variant of MachineEvent with its name")]
pub enum JsonEvent {
    TransitionBegan {
        operation: String,
        epoch: u64,
    },
    Transition {
        report: Box<JsonReport>,
    },
    DeviceLost {
        device: String,
        incarnation: u64,
        loss: String,
        detail: String,
        during: Option<String>,
    },
    DeviceHung {
        device: String,
        incarnation: u64,
        hang: String,
    },
    DeviceExited {
        device: String,
        incarnation: u64,
        exit: String,
    },
    DeviceFenced {
        device: String,
        incarnation: u64,
        exit: String,
        locks: u64,
    },
    FenceUnproven {
        device: String,
        incarnation: u64,
    },
    DeviceRestarting {
        device: String,
        attempt: u32,
        after_ns: u64,
    },
    DeviceJoined {
        device: String,
        incarnation: u64,
        pid: Option<u32>,
        state: String,
        took_ns: u64,
    },
    DeviceRestartsExhausted {
        device: String,
        restarts: u32,
    },
    DeviceNotRestarted {
        device: String,
        why: String,
    },
    DeviceNotStarted {
        device: String,
        why: String,
    },
    DeviceRemoved {
        device: String,
        exit: Option<String>,
    },
    HoldBegan {
        device: String,
    },
    HoldEnded {
        by_owner: bool,
    },
    Superseded {
        term: u64,
    },
    Missed {
        events: u64,
    },
    ClientConnected {
        device: String,
    },
    ClientDisconnected {
        device: String,
    },
    ClientState {
        device: String,
        state: String,
    },
    LeaseExpired {
        device: String,
        state: String,
    },
    DeviceFailed {
        device: String,
        why: String,
    },
    DeviceSuperseded {
        device: String,
        term: u64,
    },
}

impl From<&MachineEvent> for JsonEvent {
    fn from(event: &MachineEvent) -> Self {
        use MachineEvent as E;
        match event.clone() {
            E::TransitionBegan { operation, epoch } => {
                Self::TransitionBegan { operation: operation.to_string(), epoch: epoch.0 }
            }
            E::Transition(report) => {
                Self::Transition { report: Box::new(JsonReport::from(&*report)) }
            }
            E::DeviceLost { device, incarnation, loss, detail, during } => Self::DeviceLost {
                device,
                incarnation,
                loss: loss.to_string(),
                detail,
                during: during.map(|operation| operation.to_string()),
            },
            E::DeviceHung { device, incarnation, hang } => {
                Self::DeviceHung { device, incarnation, hang: hang.to_string() }
            }
            E::DeviceExited { device, incarnation, exit } => {
                Self::DeviceExited { device, incarnation, exit: exit.to_string() }
            }
            E::DeviceFenced { device, incarnation, exit, locks } => Self::DeviceFenced {
                device,
                incarnation,
                exit: exit.to_string(),
                locks: locks as u64,
            },
            E::FenceUnproven { device, incarnation } => Self::FenceUnproven { device, incarnation },
            E::DeviceRestarting { device, attempt, after } => {
                Self::DeviceRestarting { device, attempt, after_ns: nanos(after) }
            }
            E::DeviceJoined { device, incarnation, pid, state, took } => Self::DeviceJoined {
                device,
                incarnation,
                pid,
                state: state.name().to_owned(),
                took_ns: nanos(took),
            },
            E::DeviceRestartsExhausted { device, restarts } => {
                Self::DeviceRestartsExhausted { device, restarts }
            }
            E::DeviceNotRestarted { device, why } => Self::DeviceNotRestarted { device, why },
            E::DeviceNotStarted { device, why } => Self::DeviceNotStarted { device, why },
            E::DeviceRemoved { device, exit } => {
                Self::DeviceRemoved { device, exit: exit.map(|exit| exit.to_string()) }
            }
            E::HoldBegan { device } => Self::HoldBegan { device },
            E::HoldEnded { by_owner } => Self::HoldEnded { by_owner },
            E::Superseded { term } => Self::Superseded { term: term.0 },
            E::Missed { events } => Self::Missed { events },
            E::Device { device, event } => told(device, event),
        }
    }
}

/// What a device process tells.
fn told(device: String, event: DeviceEvent) -> JsonEvent {
    match event {
        DeviceEvent::ClientConnected => JsonEvent::ClientConnected { device },
        DeviceEvent::ClientDisconnected => JsonEvent::ClientDisconnected { device },
        DeviceEvent::ClientState(state) => {
            JsonEvent::ClientState { device, state: state.name().to_owned() }
        }
        DeviceEvent::LeaseExpired(state) => {
            JsonEvent::LeaseExpired { device, state: state.name().to_owned() }
        }
        DeviceEvent::Failed(why) => JsonEvent::DeviceFailed { device, why },
        DeviceEvent::Superseded(term) => JsonEvent::DeviceSuperseded { device, term: term.0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Exit;
    use serde_json::json;
    use standstill_protocol::transition::{Loss, Operation};

    #[test]
    fn an_event_says_its_kind_and_is_read_back() {
        let lost = MachineEvent::DeviceLost {
            device: "nic0".into(),
            incarnation: 2,
            loss: Loss::Exited,
            detail: "killed".into(),
            during: Some(Operation::Pause),
        };
        let removed =
            MachineEvent::DeviceRemoved { device: "nic0".into(), exit: Some(Exit::Code(0)) };
        let told =
            MachineEvent::Device { device: "nic0".into(), event: DeviceEvent::ClientConnected };
        for (event, expected) in [
            (
                lost,
                json!({
                    "kind": "device-lost", "device": "nic0", "incarnation": 2,
                    "loss": "its process ended", "detail": "killed", "during": "pause",
                }),
            ),
            (
                removed,
                json!({ "kind": "device-removed", "device": "nic0", "exit": "exited with status 0" }),
            ),
            (told, json!({ "kind": "client-connected", "device": "nic0" })),
        ] {
            let event = JsonEvent::from(&event);
            let value = serde_json::to_value(&event).unwrap();
            assert_eq!(value, expected);
            assert_eq!(serde_json::from_value::<JsonEvent>(value).unwrap(), event);
        }
    }
}
