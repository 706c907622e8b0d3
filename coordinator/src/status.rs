//! Where a machine and its devices are.

mod json;

pub use json::{JsonDeviceStatus, JsonStatus};
use serde::{Deserialize, Serialize};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{MachineState, Operation};

/// Where a machine is.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Where it is as a whole.
    pub machine: MachineState,
    /// True if all that counts has certainly been in STOP since the last pause ended. False also from
    /// the moment when a lease may have run out: the devices' word for it comes a little later.
    pub stands: bool,
    /// What is under way, if anything is.
    pub operation: Option<Operation>,
    /// Why it is held, for a person: what is still to be proven. Empty if it is not.
    pub held: Vec<String>,
    /// Every device, in the order of the description.
    pub devices: Vec<DeviceStatus>,
}

/// Where one device is.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Process id; `None` for a local device, or one that could not be started.
    pub pid: Option<u32>,
    /// How often it was started; 0 for a local device.
    pub incarnation: u64,
    /// Whether it counts.
    pub standing: DeviceStanding,
    /// Kind and version of its program, such as `copy-engine 0.1.0`.
    pub kind: String,
    /// Where it last proved to be; `None` if it does not count.
    pub state: Option<MigrationState>,
    /// Why it is lost.
    pub lost: Option<String>,
    /// The progress of its data threads that its last sign of life told.
    pub progress: u64,
    /// Log lines of its present process that are in no log.
    pub dropped_logs: DroppedLogs,
}

/// Log lines of a device process that nobody waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedLogs {
    /// By the device process, since its pipe was full or they were too long; as its last sign of
    /// life told.
    pub by_device: u64,
    /// By the coordinator, since there were [too many in one second].
    ///
    /// [too many in one second]: crate::logs::MAX_LINES_PER_SECOND
    pub by_coordinator: u64,
}

/// Whether a device counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceStanding {
    /// Its process was started, or is being started, and has not been welcomed.
    Starting,
    /// It was welcomed and is being brought to the machine's present state.
    Joining,
    /// It counts.
    Ready,
    /// It is lost, and its fence is not proven yet. Of a local device: it hangs, and the owner has taken
    /// that as it is; it cannot be removed.
    Lost,
    /// It is lost, and nothing of its process is left.
    Fenced,
    /// As [`Fenced`](Self::Fenced), and it will be started again.
    Restarting,
    /// It is being removed.
    Leaving,
}

impl DeviceStanding {
    /// `starting`, `joining`, `ready`, `lost`, `fenced`, `restarting` or `leaving`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Joining => "joining",
            Self::Ready => "ready",
            Self::Lost => "lost",
            Self::Fenced => "fenced",
            Self::Restarting => "restarting",
            Self::Leaving => "leaving",
        }
    }
}
