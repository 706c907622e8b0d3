//! Stops and starts all device processes of a virtual machine as one; embedded by a VMM.
//!
//! [`MachineBuilder`] describes a machine and starts it; [`Machine`] is the handle: `pause`,
//! `resume`, `status`, `shutdown`. Every transition gives a [`report::TransitionReport`]; a failure
//! is data: who, in which phase, in what state, what was done about it.
//!
//! - [`description`]: what a machine is made of; [`machine`]: its handle; [`events`] and [`status`]:
//!   what it tells;
//! - [`blocking`]: the same machine for programs without async; [`steps`]: a transition in four calls;
//! - [`policy`]: what the loss of a device means for its machine;
//! - [`participant`]: devices and hooks inside the VMM;
//! - [`dirty`]: which pages of RAM the devices write, for whoever copies it while they run;
//! - [`report`]: what happened, when, per participant;
//! - [`control_directory`], [`record`]: where a later coordinator finds a machine;
//! - [`error`]: why a machine does not start, stop or answer;
//! - [`system_calls`]: what a seccomp filter has to allow;
//! - [`process`]: starts device processes and proves that they are gone;
//! - [`logs`]: takes what they write to standard error into this program's log.
//!
//! Inside: one actor owns the machine and all control sockets (behind one nested epoll fd) and
//! drives the pure state machine [`standstill_protocol::transition`]; one actor for each device
//! process owns the process, fences it and forwards its log.

#![forbid(unsafe_code)]

pub mod blocking;
mod clock;
pub mod control_directory;
mod coordinator;
mod custody;
pub mod description;
mod device;
pub mod dirty;
pub mod error;
pub mod events;
#[cfg(feature = "fault-injection")]
pub mod fault;
mod identity;
pub mod logs;
pub mod machine;
mod mailbox;
pub mod participant;
pub mod policy;
mod poll;
pub mod process;
pub mod record;
mod recorder;
pub mod report;
mod restarts;
mod spans;
pub mod status;
pub mod steps;
#[cfg(target_arch = "x86_64")]
pub mod system_calls;
pub mod trace_file;
mod watchdog;
mod words;

#[cfg(fuzzing)]
#[doc(hidden)]
pub use coordinator::script::packets;
pub use description::{Deadlines, DeviceSpec, HookSpec, MachineBuilder};
pub use dirty::{DirtyOptions, DirtyReport, DirtyTracking};
pub use error::{MachineError, StartError, TakeOverError};
pub use events::{Events, MachineEvent};
pub use machine::{Machine, Stopped, TakenOver};
pub use participant::{Hook, LocalDevice, LocalError};
pub use policy::{LossPolicy, Presence, QEMU_VFIO_USER, RestartPolicy};
pub use standstill_protocol::transition::{OnFailure, OnLoss, Operation, Outcome, Slot};
pub use status::{DeviceStanding, DeviceStatus, DroppedLogs, Status};
pub use steps::{Accepting, PreparingStart, PreparingStop, Quiet, Starting, Stopping};
pub use watchdog::Hang;
