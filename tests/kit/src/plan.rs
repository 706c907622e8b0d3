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

use serde::{Deserialize, Serialize};
use standstill_protocol::fault::Fault;
use standstill_protocol::message::Phase;
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
    /// What goes wrong.
    #[serde(default, rename = "fault")]
    pub faults: Vec<Injection>,
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
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Injection {
    /// Which device, from 0.
    pub device: u16,
    /// From which round on, from 1.
    #[serde(default = "once")]
    pub round: u32,
    /// What.
    #[serde(flatten)]
    pub cause: Cause,
}

/// Where a fault comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
    /// It is delivered twice.
    Duplicate,
    /// A byte of it is changed.
    Corrupt,
    /// It is delivered as two packets.
    Split,
    /// It is delivered in one packet with the next one.
    Merge,
    /// The control channel is cut.
    Cut,
}

/// A text is no plan.
#[derive(Debug, Error)]
pub enum PlanError {
    /// It is no TOML, or says what a plan has no word for.
    #[error("no plan: {0}")]
    Text(#[from] toml::de::Error),
    /// It cannot be written down.
    #[error("the plan cannot be written as TOML: {0}")]
    Write(#[from] toml::ser::Error),
}

impl Plan {
    /// A machine of that many devices that is paused and resumed once, without any fault.
    #[must_use]
    pub fn new(devices: u16) -> Self {
        Self { devices, rounds: 1, policy: Policy::Rollback, faults: Vec::new() }
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

    /// Adds anything.
    #[must_use]
    pub fn inject(mut self, injection: Injection) -> Self {
        self.faults.push(injection);
        self
    }

    /// Reads a plan.
    ///
    /// # Errors
    ///
    /// [`PlanError::Text`] says what is wrong and where.
    pub fn from_toml(text: &str) -> Result<Self, PlanError> {
        Ok(toml::from_str(text)?)
    }

    /// Writes it down so that [`from_toml`](Self::from_toml) reads the same plan.
    ///
    /// # Errors
    ///
    /// [`PlanError::Write`], if a number is too large for TOML.
    pub fn to_toml(&self) -> Result<String, PlanError> {
        Ok(toml::to_string_pretty(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_protocol::fault::{Action, Forgery, Point};

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        let forged = Action::Forge(Forgery::LowerTerm);
        let plan = Plan::new(3)
            .rounds(2)
            .policy(Policy::ContinueWithout)
            .fault(1, Fault::new(Point::BeforeAck(Phase::Stop), forged).nth(2))
            .fault(2, Fault::new(Point::Dma, Action::Spin))
            .outside(0, Moment::Command(Phase::PrepareStart), OutsideAction::StopMs(0))
            .outside(0, Moment::Running, OutsideAction::Kill);
        let text = plan.to_toml().unwrap();
        assert_eq!(Plan::from_toml(&text).unwrap(), plan, "{text}");
        println!("{text}");
    }

    #[test]
    fn a_word_that_no_plan_has_is_named() {
        let text = "devices = 3\n[[fault]]\ndevice = 1\ninside = { point = \"dma\", nth = 1, action = \"explode\" }\n";
        let error = Plan::from_toml(text).unwrap_err().to_string();
        assert!(error.contains("explode"), "{error}");
    }
}
