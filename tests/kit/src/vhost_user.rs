//! The other end of a vhost-user device's data socket, without a VM: a frontend and the driver behind it.
//!
//! - [`Guest`]: memory with rings in it, and what a driver knows of them: pushes requests, kicks, waits for
//!   answers as a guest does, and finds whatever is answered twice, or was never asked for;
//! - [`Frontend`]: one connection to a device, as a VMM has it: starts and stops rings, reads and writes
//!   the configuration space, has dirty pages [logged](DirtyLog). Each call has a deadline;
//! - [`BlockRequest`]: the requests of a disk.
//!
//! A guest outlives its frontends, as one does whose device process was lost: the next frontend
//! [starts its rings](Base) as QEMU does then, or as Cloud Hypervisor does. Nothing here knows who the
//! device is, or panics because of it.
//!
//! ```standalone_crate
//! use standstill_testkit::TestMachine;
//! use standstill_testkit::vhost_user::{Base, BlockRequest, BlockStatus, Frontend, Guest};
//! use std::time::Duration;
//!
//! const LONG: Duration = Duration::from_secs(30);
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let image = folder.path().join("image");
//! # std::fs::File::create(&image)?.set_len(1 << 20)?;
//! # let program = std::env::current_exe()?;
//! // Any program that serves vhost-user at the path of a socket: here it is a disk.
//! let machine = TestMachine::builder()?
//!     .device("disk", program, |spec, socket| spec.arg(&image).arg(socket))
//!     .start()
//!     .await?;
//! let socket = machine.socket("disk");
//! let mut guest = Guest::new(1)?;
//! let mut frontend = Frontend::connect(&socket, &guest)?;
//! frontend.start_rings(&mut guest, Base::Used)?;
//!
//! let write = BlockRequest::Write { sector: 7, data: vec![0xa5; 512] };
//! assert_eq!(guest.block(0, &write, LONG)?.status, BlockStatus::Ok);
//!
//! // A machine that is paused leaves what comes then in its ring, and finds it afterwards.
//! let paused = machine.pause().await?;
//! guest.push_block(0, &BlockRequest::Read { sector: 7, length: 512 })?;
//! guest.notify(0)?;
//! assert_eq!(guest.used(0)?, 1);
//! paused.resume().await?;
//! let answers = guest.wait_all(0, LONG)?;
//! assert_eq!(answers[0].data[0], [0xa5; 512]);
//!
//! // A VMM that goes, and one that comes.
//! drop(frontend);
//! let mut frontend = Frontend::connect(&socket, &guest)?;
//! frontend.start_rings(&mut guest, Base::Used)?;
//! assert_eq!(guest.block(0, &BlockRequest::Flush, LONG)?.status, BlockStatus::Ok);
//! machine.end().await;
//! # Ok(())
//! # }
//! # fn main() -> Result<std::process::ExitCode, Box<dyn std::error::Error>> {
//! #     use standstill_device_proc::ServeOptions;
//! #     use standstill_device_proc::devices::vhost_user_blk::{BlockConfig, VhostUserBlk};
//! #     use standstill_device_proc::vhost_user::serve_vhost_user;
//! #     if let Some(exit) = standstill_testkit::programs::serve() {
//! #         return Ok(exit);
//! #     }
//! #     if let [_, image, socket] = &std::env::args_os().collect::<Vec<_>>()[..] {
//! #         let disk = BlockConfig::new(image);
//! #         serve_vhost_user(ServeOptions::new(socket), || VhostUserBlk::device(&disk))?;
//! #         return Ok(std::process::ExitCode::SUCCESS);
//! #     }
//! #     let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
//! #     runtime.block_on(example())?;
//! #     Ok(std::process::ExitCode::SUCCESS)
//! # }
//! ```

mod block;
mod error;
mod frontend;
mod guest;
mod ring;
#[cfg(test)]
mod tests;

pub use block::{BlockAnswer, BlockRequest, BlockStatus, SECTOR};
pub use error::VhostUserError;
pub use frontend::{Base, DirtyLog, EVENT_IDX, Frontend, FrontendOptions, VERSION_1};
pub use guest::{Completion, Guest, Part, RequestId};
pub use ring::{RingLayout, RingPlace};

use standstill_coordinator::report::{CommandReport, TransitionReport};
use standstill_protocol::message::CounterKind;

/// How many requests the vhost-user devices of a machine had in flight when they were told to prepare for
/// a stop, all together.
#[must_use]
pub fn in_flight(report: &TransitionReport) -> u64 {
    let commands = report.participants.iter().flat_map(|device| &device.commands);
    let counters = commands.filter_map(CommandReport::evidence).flat_map(|found| &found.counters);
    let in_flight = counters.filter(|counter| counter.kind == CounterKind::InFlight);
    in_flight.map(|counter| counter.value).sum()
}
