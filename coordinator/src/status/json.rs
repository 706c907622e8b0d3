//! A status as JSON, for programs.

use super::{DeviceStatus, DroppedLogs, Status};
use serde::{Deserialize, Serialize};

/// A status as one JSON object, with names instead of numbers; for `serde_json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonStatus {
    /// The machine's name.
    pub name: String,
    /// `running`, `stopped`, `held` or `lease-expired`.
    pub machine: String,
    /// What is under way: `pause`, `resume`, …; absent if nothing is.
    pub operation: Option<String>,
    /// Why it is held, for a person: what is still to be proven. Empty if it is not.
    #[serde(default)]
    pub held: Vec<String>,
    /// Every device, in the order of the description.
    pub devices: Vec<JsonDeviceStatus>,
}

/// One device of a [`JsonStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonDeviceStatus {
    /// Its name.
    pub name: String,
    /// Process id; absent for a local device, or one that could not be started.
    pub pid: Option<u32>,
    /// How often it was started; 0 for a local device.
    pub incarnation: u64,
    /// The name of its [`DeviceStanding`](crate::DeviceStanding).
    pub standing: String,
    /// Kind and version of its program.
    pub kind: String,
    /// Where it last proved to be; absent if it does not count.
    pub state: Option<String>,
    /// Why it is lost.
    pub lost: Option<String>,
    /// The progress of its data threads that its last sign of life told.
    pub progress: u64,
    /// Log lines of its present process that are in no log.
    pub dropped_logs: DroppedLogs,
}

impl From<&Status> for JsonStatus {
    fn from(status: &Status) -> Self {
        Self {
            name: status.name.clone(),
            machine: status.machine.to_string(),
            operation: status.operation.map(|operation| operation.to_string()),
            held: status.held.clone(),
            devices: status.devices.iter().map(JsonDeviceStatus::from).collect(),
        }
    }
}

impl From<&DeviceStatus> for JsonDeviceStatus {
    fn from(device: &DeviceStatus) -> Self {
        Self {
            name: device.name.clone(),
            pid: device.pid,
            incarnation: device.incarnation,
            standing: device.standing.name().to_owned(),
            kind: device.kind.clone(),
            state: device.state.map(|state| state.name().to_owned()),
            lost: device.lost.clone(),
            progress: device.progress,
            dropped_logs: device.dropped_logs,
        }
    }
}
