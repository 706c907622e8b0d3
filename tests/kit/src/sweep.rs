//! Tries faults on machines of device processes, and judges what comes of them.
//!
//! - [`Subject`] and [`Rig`]: what is tried: device programs and the VMM's side for them; [`DevicePrograms`] is
//!   a ready one for any device programs;
//! - [`run`]: one [plan](crate::plan::Plan) on one machine: what was [seen](Observation);
//! - [`Judge`]: whether that is as it must be, by a [table](Expected) of outcomes that was written by
//!   hand;
//! - [`cases`]: every fault in every phase on every device; [`seeded`]: plans drawn from a seed;
//! - [`Sweep`]: many plans, several at the same time; [`Tally`]: what came of them;
//! - [`shrunk`]: the smallest plan that still fails.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use standstill_coordinator::DeviceSpec;
//! use standstill_testkit::sweep::{DevicePrograms, Sweep};
//!
//! // Somebody's device program, that serves vfio-user at the socket that it is told.
//! let programs = DevicePrograms::new(|number, socket| {
//!     DeviceSpec::new(format!("nic{number}"), "/usr/bin/my-nic").arg("--socket").arg(socket)
//! });
//! let tally = Sweep::from_outside()?.run(programs).await;
//! assert!(tally.failures().is_empty(), "{tally}");
//! # Ok(())
//! # }
//! ```

mod arms;
mod batch;
pub mod cases;
mod deadlines;
pub mod engine;
pub mod expected;
mod greetings;
mod hooks;
pub mod nature;
pub mod observation;
pub mod oracle;
mod principal;
mod programs;
pub mod resources;
pub mod seeded;
pub mod shrink;
mod subject;
mod tally;

pub use batch::{Sweep, Tried, attempt, shrunk};
pub use engine::{RunError, run};
pub use expected::{Course, Expected, Seen, TableError};
pub use observation::Observation;
pub use oracle::{Judge, Violation};
pub use programs::{DevicePrograms, Driven, moved};
pub use subject::{Access, Look, Rig, RigError, Subject};
pub use tally::{Ends, Tally};

use std::time::Duration;

/// How long things may take while faults are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// The deadline of a device in the phase in which it will be silent.
    pub short: Duration,
    /// Every other deadline: long enough to be kept on a busy machine.
    pub long: Duration,
    /// The deadline of a declaration of RAM in plans with a device that is silent there.
    pub memory: Duration,
    /// The interval of signs of life.
    pub heartbeat: Duration,
    /// What a call may take beyond what its faulty devices are given.
    pub grace: Duration,
    /// How long processes may take to be gone after the end of their machine.
    pub end: Duration,
}

impl Default for Times {
    /// 1 s, 60 s, 3 s, 200 ms, 2 s, 20 s.
    fn default() -> Self {
        Self {
            short: Duration::from_secs(1),
            long: Duration::from_secs(60),
            memory: Duration::from_secs(3),
            heartbeat: Duration::from_millis(200),
            grace: Duration::from_secs(2),
            end: Duration::from_secs(20),
        }
    }
}
