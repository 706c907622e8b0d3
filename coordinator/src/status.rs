//! Where a machine and its devices are.

use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{MachineState, Operation};

/// Where a machine is.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Where it is as a whole.
    pub machine: MachineState,
    /// What is under way, if anything is.
    pub operation: Option<Operation>,
    /// Every device, in the order of the description.
    pub devices: Vec<DeviceStatus>,
}

/// Where one device is.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Process id; `None` for a local device.
    pub pid: Option<u32>,
    /// Kind and version of its program, such as `copy-engine 0.1.0`.
    pub kind: String,
    /// Where it last proved to be; `None` if it is lost.
    pub state: Option<MigrationState>,
    /// Why it is lost.
    pub lost: Option<String>,
    /// The progress of its data threads that its last sign of life told.
    pub progress: u64,
}
