//! Tests of device processes, ours or anybody's: machines of real processes, what befalls them in the
//! field done to them on purpose, and checks of what becomes of them. `docs/testkit.md` begins at the
//! beginning.
//!
//! ```standalone_crate
//! use standstill_protocol::message::Phase;
//! use standstill_testkit::plan::{Moment, OutsideAction};
//! use standstill_testkit::{Script, TestMachine};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! // Scripted devices here; `device` takes any program.
//! let machine = TestMachine::builder()?
//!     .scripted("nic0", Script::honest())
//!     .scripted("disk0", Script::honest())
//!     .relay("disk0")
//!     .start()
//!     .await?;
//! machine.pause().await?.resume().await?;
//!
//! // disk0 is killed when the next Stop is on its way to it.
//! let relay = machine.relay("disk0");
//! relay.arm(Moment::Command(Phase::Stop), 1, OutsideAction::Kill)?;
//! let error = machine.pause().await.expect_err("a required device was lost");
//! println!("{error}");
//! assert_eq!(relay.fired()?.len(), 1, "the fault has happened");
//! machine.end().await;
//! # Ok(())
//! # }
//! # fn main() -> Result<std::process::ExitCode, Box<dyn std::error::Error>> {
//! #     if let Some(exit) = standstill_testkit::programs::serve() {
//! #         return Ok(exit);
//! #     }
//! #     let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
//! #     runtime.block_on(example())?;
//! #     Ok(std::process::ExitCode::SUCCESS)
//! # }
//! ```
//!
//! **Machines and faults**
//! - [`machine`]: machines of any device programs, with all that a test needs around them;
//! - [`outside`]: faults that befall a device process or its coordinator, whatever its program is;
//! - [`plan`]: which faults hit whom and when, as data;
//! - [`sweep`]: tries plans on machines of any device programs, and judges what comes of them;
//! - [`vhost_user`]: the VMM's side of a vhost-user device, and the driver behind it;
//! - [`qemu`]: a real VMM with a real guest, over the data sockets of device processes;
//! - [`script`]: a device process without a device, that does at which message what you say;
//! - [`pilot`]: a coordinator in a process of its own, to be killed or stopped;
//! - [`mod@programs`]: the programs of this kit, in a test of another package too.
//!
//! **What happened**
//! - [`trace`]: who was told and answered what, when, in one order over all processes and threads;
//! - [`log`]: what this process and its device processes have logged;
//! - [`participant`]: hooks and local devices that write to the trace;
//! - [`gate`]: holds a device, a local device or a hook until a test lets it go;
//! - [`deadline`]: calls must end in time;
//! - [`process`]: processes must be gone, and none of them a zombie.
//!
//! Checks panic where they fail, as tests do.

#![forbid(unsafe_code)]

pub mod deadline;
pub mod gate;
pub mod log;
pub mod machine;
pub mod outside;
pub mod participant;
pub mod pilot;
pub mod plan;
pub mod process;
pub mod programs;
pub mod qemu;
pub mod script;
pub mod sweep;
pub mod trace;
pub mod vhost_user;

pub use deadline::{GRACE, deadlines_of, within};
pub use gate::{Gate, GateKey};
pub use machine::{TestMachine, TestMachineBuilder};
pub use participant::{TracedHook, TracedLocal};
pub use pilot::{Course, CourseDevice, Pilot};
pub use process::Processes;
pub use script::{DROPPED_LOGS, Forgery, Packet, Pulse, Script, Step, Trigger};
pub use trace::{Call, Entry, Trace, What};

/// An error and all its sources, as one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |&error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

/// The code in the documentation, compiled by the tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/testkit.md")]
struct TestkitPage;
