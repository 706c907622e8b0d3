//! Which faults hit which device of a machine, and when.
//!
//! A plan is data: it is built in a test, drawn from a seed, or read from a TOML file, and the same
//! plan gives the same faults each time.
//!
//! ```
//! use standstill_protocol::fault::{Action, Fault, Point};
//! use standstill_protocol::message::Phase;
//! use standstill_testkit::plan::{Plan, Policy};
//!
//! let plan = Plan::new(3)
//!     .policy(Policy::StayStopped)
//!     .fault(1, Fault::new(Point::BeforeAck(Phase::Stop), Action::Exit(1)));
//! let text = plan.to_toml()?;
//! assert_eq!(Plan::from_toml(&text)?, plan);
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

mod read;
#[cfg(test)]
mod tests;

use crate::trace::Call;
use serde::{Deserialize, Serialize};
use standstill_protocol::fault::Fault;
use standstill_protocol::message::Phase;
use std::fmt;
use thiserror::Error;

/// What is to happen to one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Plan {
    /// How many devices the machine has, from 1.
    pub devices: u16,
    /// How often it is paused and resumed, from 1.
    #[serde(default = "once")]
    pub rounds: u32,
    /// What the machine does about a failure.
    #[serde(default)]
    pub policy: Policy,
    /// What goes wrong with devices.
    #[serde(default, rename = "fault")]
    pub faults: Vec<Injection>,
    /// What goes wrong with hooks.
    #[serde(default, rename = "hook", skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<HookFault>,
}

fn once() -> u32 {
    1
}

/// What a machine does about a failure.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// A transition that fails is undone; who is lost fails it.
    #[default]
    Rollback,
    /// A transition that fails stops everybody; who is lost fails it.
    StayStopped,
    /// A transition goes on without who is lost, once that one is fenced.
    ContinueWithout,
    /// As `Rollback`, and who is lost is started again.
    Restart,
}

/// One fault, whom it hits and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "read::Written", into = "read::Written")]
pub struct Injection {
    /// Which device, from 0.
    pub device: u16,
    /// From which round on, from 1.
    pub round: u32,
    /// What.
    pub cause: Cause,
}

/// Where a fault comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The device process does it itself; its program must have the feature `fault-injection`.
    Inside(Fault),
    /// It is done to the device process, whatever its program is.
    Outside(Outside),
}

/// What is done to a device process from outside, and at which moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Outside {
    /// When.
    pub moment: Moment,
    /// What.
    pub action: OutsideAction,
}

/// When something is done from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// While the machine runs, before the pause of the round.
    Running,
    /// While it stands still, before the resume of the round.
    Stopped,
    /// When a command of that phase is on its way to the device, and is held back until it is done.
    Command(Phase),
    /// When an answer to a command of that phase is on its way from the device, and is held back
    /// until it is done.
    Answer(Phase),
    /// When another packet of that kind is on its way, and is held back until it is done.
    Packet(PacketKind),
}

/// What a packet is that is neither a command nor the answer to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PacketKind {
    /// A device's Hello.
    Hello,
    /// The coordinator's Welcome.
    Welcome,
    /// A memory declaration.
    Memory,
    /// A device's answer to it, or to a revocation.
    MemoryAccepted,
    /// That windows lead nowhere any more.
    Revoke,
    /// The coordinator asks a device where it is.
    Query,
    /// A device's answer to that.
    Status,
    /// A transition is given up.
    Abort,
    /// A sign of life.
    Heartbeat,
    /// A device tells that something has happened.
    Event,
    /// A device is told to end.
    Shutdown,
}

/// What is done from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutsideAction {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, for that many milliseconds (then SIGCONT); for ever if 0.
    StopMs(u32),
    /// The packet that is under way is delivered that many milliseconds later.
    DelayMs(u32),
    /// It is not delivered at all.
    Drop,
    /// It is delivered once it is let go ([`Relay::let_go`](crate::outside::Relay::let_go)), or its sender
    /// has ended; and so is all that follows. In a plan it is let go once everybody is lost who has a fault
    /// after an answer to the same phase.
    Hold,
    /// It is delivered twice.
    Duplicate,
    /// A byte of it is changed, such that it is no message any more.
    Corrupt,
    /// All bits of its byte at that offset are inverted, or of its last byte if it is shorter.
    CorruptAt(u16),
    /// It is delivered as two packets.
    Split,
    /// It is delivered in one packet with the next one that goes the same way.
    Merge,
    /// It is delivered after the next one that goes the same way.
    Swap,
    /// The control channel is cut; the packet is not delivered.
    Cut,
    /// The device process may have no more than that of a resource.
    Limit(Limit),
    /// SIGKILL for the coordinator. Only where that is a process of its own, not the test.
    KillCoordinator,
    /// SIGSTOP for the coordinator, for that many milliseconds (then SIGCONT); for ever if 0. Only
    /// where that is a process of its own, not the test.
    StopCoordinatorMs(u32),
}

/// The most that a process may have of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limit {
    /// Of which.
    pub resource: Resource,
    /// How much, in the resource's unit.
    pub value: u64,
}

/// What the kernel limits; `setrlimit(2)` has the details.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resource {
    /// Address space, in bytes (`RLIMIT_AS`).
    AddressSpace,
    /// Private writable memory, in bytes (`RLIMIT_DATA`).
    Data,
    /// Open files: the highest fd number and one (`RLIMIT_NOFILE`).
    Files,
    /// Processes and threads of its user (`RLIMIT_NPROC`). Means nothing to root.
    Processes,
    /// The longest file that it can write, in bytes (`RLIMIT_FSIZE`).
    FileSize,
    /// Locked memory, in bytes (`RLIMIT_MEMLOCK`).
    LockedMemory,
}

/// Something that is done to the hook of a machine, which does nothing but that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HookFault {
    /// In which round, from 1.
    #[serde(default = "once")]
    pub round: u32,
    /// Where the hook is in a stop; in a start it is in the mirrored place.
    pub place: Place,
    /// In which of its calls.
    pub call: Call,
    /// What.
    pub action: HookAction,
}

/// Where a hook is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Before the first phase.
    Before,
    /// Between the phases.
    Between,
    /// After the second phase.
    After,
}

/// What happens in a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookAction {
    /// It fails.
    Fail,
    /// It returns that many milliseconds later; not before the machine has ended if 0.
    StickMs(u32),
}

/// A text is no plan, or a plan cannot be.
#[derive(Debug, Error)]
pub enum PlanError {
    /// It is no TOML, or says what a plan has no word for.
    #[error("no plan: {source}{}", meant.as_ref().map(|word| format!("did you mean `{word}`?\n")).unwrap_or_default())]
    Text {
        /// What is wrong, with the line.
        source: toml::de::Error,
        /// The word that was meant, if one is like it.
        meant: Option<String>,
    },
    /// It cannot be written down.
    #[error("the plan cannot be written as TOML: {0}")]
    Write(#[from] toml::ser::Error),
    /// A machine without devices.
    #[error("a machine has at least one device")]
    NoDevices,
    /// A machine of more devices than anybody wants to start.
    #[error("a machine of a plan has {most} devices at most, not {0}", most = Plan::MOST_DEVICES)]
    TooManyDevices(u16),
    /// No round.
    #[error("a plan has at least one round")]
    NoRounds,
    /// A fault of a device that is not there.
    #[error("fault {fault} ({what}) is for device {device}, and the machine has {devices}, from 0")]
    Device {
        /// Which fault, from 1.
        fault: usize,
        /// What it is.
        what: String,
        /// Whom it should hit.
        device: u16,
        /// How many devices there are.
        devices: u16,
    },
    /// A fault in a round that does not come.
    #[error("fault {fault} ({what}) is for round {round}, and there are {rounds}, from 1")]
    Round {
        /// Which fault, from 1.
        fault: usize,
        /// What it is.
        what: String,
        /// When it should come.
        round: u32,
        /// How many rounds there are.
        rounds: u32,
    },
    /// Something that cannot be done there.
    #[error("fault {fault} ({what}) cannot be: {why}")]
    Impossible {
        /// Which fault, from 1.
        fault: usize,
        /// What it is.
        what: String,
        /// Why not.
        why: &'static str,
    },
}

impl Plan {
    /// The most devices of a machine: each is a process, and each writes to each other one in the machines of
    /// `standstill chaos`.
    pub const MOST_DEVICES: u16 = 64;

    /// A machine of that many devices that is paused and resumed once, without any fault.
    #[must_use]
    pub fn new(devices: u16) -> Self {
        Self { devices, rounds: 1, policy: Policy::Rollback, faults: Vec::new(), hooks: Vec::new() }
    }

    /// Pauses and resumes it that often, from 1.
    #[must_use]
    pub fn rounds(mut self, rounds: u32) -> Self {
        self.rounds = rounds;
        self
    }

    /// What the machine does about a failure.
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// Adds a fault of a device process, in the first round.
    #[must_use]
    pub fn fault(self, device: u16, fault: Fault) -> Self {
        self.inject(Injection { device, round: 1, cause: Cause::Inside(fault) })
    }

    /// Adds something that is done to a device process, in the first round.
    #[must_use]
    pub fn outside(self, device: u16, moment: Moment, action: OutsideAction) -> Self {
        let cause = Cause::Outside(Outside { moment, action });
        self.inject(Injection { device, round: 1, cause })
    }

    /// Adds a fault of a hook, in the first round.
    #[must_use]
    pub fn hook(mut self, place: Place, call: Call, action: HookAction) -> Self {
        self.hooks.push(HookFault { round: 1, place, call, action });
        self
    }

    /// Adds any fault of a device.
    #[must_use]
    pub fn inject(mut self, injection: Injection) -> Self {
        self.faults.push(injection);
        self
    }

    /// Reads a plan and [checks](Self::check) it.
    ///
    /// # Errors
    ///
    /// [`PlanError::Text`] says what is wrong, in which line, and what may have been meant.
    pub fn from_toml(text: &str) -> Result<Self, PlanError> {
        let plan: Self = toml::from_str(text).map_err(read::explained)?;
        plan.check()?;
        Ok(plan)
    }

    /// Writes it down so that [`from_toml`](Self::from_toml) reads the same plan.
    ///
    /// # Errors
    ///
    /// [`PlanError::Write`], which does not happen with any plan that passes [`check`](Self::check).
    pub fn to_toml(&self) -> Result<String, PlanError> {
        Ok(toml::to_string(self)?)
    }

    /// Whether all of it can be done.
    ///
    /// # Errors
    ///
    /// The first fault that cannot, and why.
    pub fn check(&self) -> Result<(), PlanError> {
        if self.devices == 0 {
            return Err(PlanError::NoDevices);
        }
        if self.devices > Self::MOST_DEVICES {
            return Err(PlanError::TooManyDevices(self.devices));
        }
        if self.rounds == 0 {
            return Err(PlanError::NoRounds);
        }
        for (fault, injection) in (1..).zip(&self.faults) {
            let what = || injection.cause.to_string();
            if injection.device >= self.devices {
                let (device, devices) = (injection.device, self.devices);
                return Err(PlanError::Device { fault, what: what(), device, devices });
            }
            if injection.round == 0 || injection.round > self.rounds {
                let (round, rounds) = (injection.round, self.rounds);
                return Err(PlanError::Round { fault, what: what(), round, rounds });
            }
            if let Some(why) = injection.cause.impossible() {
                return Err(PlanError::Impossible { fault, what: what(), why });
            }
        }
        for (fault, hook) in (1..).zip(&self.hooks) {
            if hook.round == 0 || hook.round > self.rounds {
                let (what, round, rounds) = (hook.to_string(), hook.round, self.rounds);
                return Err(PlanError::Round { fault, what, round, rounds });
            }
            if self.hooks.iter().take(fault - 1).any(|other| hook.is_of_the_call_of(other)) {
                let why = "something else happens in that call already";
                return Err(PlanError::Impossible { fault, what: hook.to_string(), why });
            }
        }
        Ok(())
    }
}

impl HookFault {
    /// Whether both are for one and the same call.
    pub(crate) fn is_of_the_call_of(&self, other: &Self) -> bool {
        (self.round, self.place, self.call) == (other.round, other.place, other.call)
    }
}

impl Cause {
    /// Why it cannot be done, if it cannot.
    pub(crate) fn impossible(&self) -> Option<&'static str> {
        match self {
            Self::Inside(fault) if !fault.is_possible() => {
                Some("a device process cannot do that there")
            }
            Self::Outside(Outside { moment: Moment::Running | Moment::Stopped, action })
                if action.needs_a_packet() =>
            {
                Some("no packet is under way at that moment")
            }
            Self::Inside(_) | Self::Outside(_) => None,
        }
    }
}

impl OutsideAction {
    /// Whether it is done to the coordinator, and not to the device or its packets.
    #[must_use]
    pub const fn hits_the_coordinator(self) -> bool {
        matches!(self, Self::KillCoordinator | Self::StopCoordinatorMs(_))
    }

    /// Whether it is done to a packet, and not to a process.
    #[must_use]
    pub const fn needs_a_packet(self) -> bool {
        match self {
            Self::Kill
            | Self::StopMs(_)
            | Self::Limit(_)
            | Self::KillCoordinator
            | Self::StopCoordinatorMs(_) => false,
            Self::DelayMs(_)
            | Self::Hold
            | Self::Drop
            | Self::Duplicate
            | Self::Corrupt
            | Self::CorruptAt(_)
            | Self::Split
            | Self::Merge
            | Self::Swap
            | Self::Cut => true,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Rollback => "rollback",
            Self::StayStopped => "stay-stopped",
            Self::ContinueWithout => "continue-without",
            Self::Restart => "restart",
        })
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of device {}", self.cause, self.device)?;
        if self.round > 1 { write!(f, ", from round {}", self.round) } else { Ok(()) }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inside(fault) => fault.fmt(f),
            Self::Outside(Outside { moment, action }) => write!(f, "{action} {moment}"),
        }
    }
}

impl fmt::Display for HookFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, call, action, .. } = self;
        match action {
            HookAction::Fail => f.write_str("failure")?,
            HookAction::StickMs(0) => f.write_str("endless call")?,
            HookAction::StickMs(ms) => write!(f, "call of {ms} ms")?,
        }
        write!(f, " of the hook {place:?} the phases, in its {call:?}")
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("while the machine runs"),
            Self::Stopped => f.write_str("while the machine stands still"),
            Self::Command(phase) => write!(f, "with {phase} on its way"),
            Self::Answer(phase) => write!(f, "with the answer to {phase} on its way"),
            Self::Packet(kind) => write!(f, "with {kind:?} on its way"),
        }
    }
}

impl fmt::Display for OutsideAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill => f.write_str("SIGKILL"),
            Self::StopMs(0) => f.write_str("SIGSTOP"),
            Self::StopMs(ms) => write!(f, "SIGSTOP for {ms} ms"),
            Self::DelayMs(ms) => write!(f, "packet {ms} ms late"),
            Self::Hold => f.write_str("packet held back"),
            Self::Drop => f.write_str("packet lost"),
            Self::Duplicate => f.write_str("packet twice"),
            Self::Corrupt => f.write_str("packet corrupted"),
            Self::Split => f.write_str("packet in two"),
            Self::Merge => f.write_str("packet in one with the next"),
            Self::Cut => f.write_str("control channel cut"),
            Self::CorruptAt(offset) => write!(f, "packet corrupted at byte {offset}"),
            Self::Swap => f.write_str("packet after the next"),
            Self::Limit(Limit { resource, value }) => write!(f, "limit of {resource:?} to {value}"),
            Self::KillCoordinator => f.write_str("SIGKILL for the coordinator"),
            Self::StopCoordinatorMs(0) => f.write_str("SIGSTOP for the coordinator"),
            Self::StopCoordinatorMs(ms) => write!(f, "SIGSTOP for the coordinator for {ms} ms"),
        }
    }
}
