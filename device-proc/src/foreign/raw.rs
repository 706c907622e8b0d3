//! What the transport calls where a device answers for its regions, windows and interrupts itself.

use crate::interrupt::SetIrqs;
use crate::memory::WindowSpec;
use rustix::io::Errno;
use standstill_protocol::message::FileIdentity;
use standstill_vfio_user::wire::{IrqInfo, RegionInfo};
use std::fmt::Debug;
use std::os::fd::{BorrowedFd, OwnedFd};

/// A device that answers for its regions, windows and interrupts itself. An error is the errno for
/// the client. The calls may block for as long as the device does.
///
/// The transport has checked that an access lies inside its region, that the client may have it now,
/// and that a request for interrupts is one.
pub(crate) trait RawDevice: Debug + Send + Sync {
    /// What a region is like; its size is 0 if it is absent.
    fn region(&self, index: u32) -> RegionInfo;

    /// Its size alone, in bytes.
    fn region_size(&self, index: u32) -> u64;

    /// The file through which a region can be mapped.
    fn region_memory(&self, index: u32) -> Option<BorrowedFd<'_>>;

    /// The files of all regions, each once.
    fn memory_files(&self) -> Vec<FileIdentity>;

    /// How many interrupts an index has, and how they work.
    fn irq(&self, index: u32) -> IrqInfo;

    /// Reads from a region.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes to a region.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Adds a DMA window.
    fn map(&self, window: WindowSpec, fd: Option<OwnedFd>) -> Result<(), Errno>;

    /// Removes a DMA window; the device does not use it any more when this returns.
    fn unmap(&self, iova: u64, size: u64) -> Result<(), Errno>;

    /// Removes all DMA windows, also those that the device does not want to give back; the first
    /// error.
    fn unmap_all(&self) -> Result<(), Errno>;

    /// Installs, removes, masks or fires interrupts.
    fn set_irqs(&self, request: &SetIrqs, data: &[u8], fds: Vec<OwnedFd>) -> Result<(), Errno>;

    /// Closes all eventfds: the client has gone.
    fn release_irqs(&self);

    /// More files are known to be RAM.
    fn ram_declared(&self);

    /// Removes the windows onto these files that are not RAM.
    fn revoke(&self, files: &[FileIdentity]);
}
