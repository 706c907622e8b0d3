//! For tests of machines of device processes: devices that misbehave as they are told, a trace of
//! what happened in which order, and checks of deadlines and processes.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use standstill_coordinator::MachineBuilder;
//! use standstill_protocol::message::Phase;
//! use standstill_testkit::{Script, Step, Trace};
//!
//! let trace = Trace::new()?;
//! let machine = MachineBuilder::new("vm0")
//!     .device(Script::honest().device("nic0", &trace)?)
//!     .device(Script::honest().on(Phase::Stop, [Step::Freeze]).device("disk0", &trace)?)
//!     .start()
//!     .await?;
//! assert!(machine.pause().await.is_err(), "disk0 froze when it was told to stop");
//! println!("{}", trace.text());
//! # Ok(())
//! # }
//! ```
//!
//! - [`plan`]: which faults hit which device of a machine, and when;
//! - [`outside`]: faults that befall a device process, whatever its program is;
//! - [`mod@programs`]: the programs of this kit, in a test of another package too;
//! - [`sweep`]: tries them on machines of any device programs, and judges what comes of it;
//! - [`script`]: what a device process does at which message; the program is `rogue-device`, built
//!   with this package. Where nothing else was said it keeps to the protocol;
//! - [`trace`]: who was told and answered what, when, in one order over all processes and threads;
//! - [`gate`]: holds a device, a local device or a hook until a test lets it go;
//! - [`participant`]: hooks and local devices that write to the trace;
//! - [`deadline`]: calls must end in time;
//! - [`pilot`]: a coordinator in a process of its own, to be killed or stopped;
//! - [`process`]: processes must be gone, and none of them a zombie.
//!
//! Checks panic where they fail, as tests do.

#![forbid(unsafe_code)]

pub mod deadline;
pub mod gate;
pub mod outside;
pub mod participant;
pub mod pilot;
pub mod plan;
pub mod process;
pub mod programs;
pub mod script;
pub mod sweep;
pub mod trace;

pub use deadline::{GRACE, within};
pub use gate::{Gate, GateKey};
pub use participant::{TracedHook, TracedLocal};
pub use pilot::{Course, Pilot};
pub use process::Processes;
pub use script::{DROPPED_LOGS, Forgery, Packet, Pulse, Script, Step, Trigger};
pub use trace::{Call, Entry, Trace, What};

/// An error and all its sources, as one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |&error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
