//! Write a device once, get a device process that stops and starts with its machine.
//!
//! A device author implements [`device::Device`] and calls [`serve()`] from `main`. The runtime does
//! the rest: it greets the coordinator on standard input, serves the device to its VMM, and owns
//! everything that a standstill depends on.
//!
//! - [`device`]: the trait and its contract;
//! - [`gate`]: who may do DMA now; closing it waits for what is in flight;
//! - [`memory`]: the IOVA map; all DMA passes here;
//! - [`interrupt`]: interrupt lines, latched while the device is stopped;
//! - [`foreign`]: backends of the `vfio_user` crate as devices;
//! - [`actor`]: control messages to lifecycle to device;
//! - [`registers`]: registers that are read, written, saved and loaded;
//! - [`vfio_user`]: the transport towards the VMM;
//! - [`vhost_user`]: the transport for backends of the `vhost-user-backend` crate;
//! - [`devices`]: reference devices.

pub mod actor;
pub mod device;
pub mod devices;
mod edge;
#[cfg(feature = "fault-injection")]
mod fault;
pub mod foreign;
pub mod gate;
pub mod interrupt;
pub mod log;
pub mod memory;
pub mod pci;
pub mod registers;
pub mod serve;
pub mod vfio_user;
pub mod vhost_user;

pub use serve::{ServeOptions, serve};

/// The code in the documentation, compiled by the tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/writing-a-device.md")]
struct WritingADevice;

#[cfg(doctest)]
#[doc = include_str!("../../docs/vhost-user.md")]
struct VhostUserBackends;
