//! Stops and starts all device processes of a virtual machine as one.
//!
//! **The problem.** A VM whose devices live in processes of their own is paused by stopping each
//! of them. But devices write into each other's memory: a device that is stopped while a peer
//! still writes into it has not stopped at all, and what is saved of it is wrong.
//!
//! **The idea.** Two phases, with a barrier after each. First every device is told to start no
//! more writes to its peers and to finish those under way ([`Phase::PrepareStop`]); when *all*
//! have said that they have, every device is told to stop for good ([`Phase::Stop`]). A start is
//! the mirror image ([`Phase::PrepareStart`], [`Phase::Start`]). A phase is sent to all devices
//! before any answer is awaited, so it takes as long as the slowest device, not as long as all of
//! them together; and a device that does not answer is proven gone before anything goes on.
//!
//! **The parts.** A VMM embeds [`coordinator`]: it starts the device processes and pauses and
//! resumes them. A device author writes a [`Device`](device_proc::device::Device) and gets a
//! process that keeps the rules whatever the device does: [`device_proc`]. Between them travels
//! [`protocol`], which holds both ends' rules as state machines without I/O.
//!
//! The `standstill` command of this package shows it at work: `standstill demo`.
//!
//! [`Phase::PrepareStop`]: protocol::message::Phase::PrepareStop
//! [`Phase::Stop`]: protocol::message::Phase::Stop
//! [`Phase::PrepareStart`]: protocol::message::Phase::PrepareStart
//! [`Phase::Start`]: protocol::message::Phase::Start

#![forbid(unsafe_code)]
#![cfg_attr(
    fuzzing,
    expect(
        dead_code,
        unused_imports,
        reason = "the fuzz targets use a part of the command's modules"
    )
)]

pub use standstill_coordinator as coordinator;
pub use standstill_device_proc as device_proc;
pub use standstill_protocol as protocol;
pub use standstill_vfio_user as vfio_user;

// What of the command reads what others write, for the fuzz targets.
#[cfg(fuzzing)]
pub mod fuzzing;

#[cfg(fuzzing)]
extern crate self as standstill;
#[cfg(fuzzing)]
mod explain;
#[cfg(fuzzing)]
mod machine_file;
#[cfg(fuzzing)]
mod nearest;
#[cfg(fuzzing)]
mod operator;
#[cfg(fuzzing)]
mod run {
    pub(crate) mod directory;
    pub(crate) mod hook;
    pub(crate) mod notify;
}
#[cfg(fuzzing)]
mod size;
