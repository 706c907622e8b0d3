//! The messages of vfio-user: bytes to types and back. No I/O, no state.
//!
//! A message is a [`Header`] and a body. [`Request::decode`] makes a type of the body of any command
//! that a client can send; the types of the replies have an `encode` and a `decode` of their own.
//! All numbers travel in the machine's byte order, since both ends are on one machine.
//!
//! Bodies come from another process: each number is judged, and each length is compared with what
//! came or what was agreed, before anything is allocated. What is wrong is a [`WireError`], which
//! knows the error number to answer.
//!
//! The layouts are those of the vfio-user specification; where Linux has the same structure
//! (`<linux/vfio.h>`), tests compare with that.
//!
//! ```
//! use standstill_vfio_user::wire::{Command, Header, Limits, RegionAccess, Request};
//!
//! // A client writes a message …
//! let mut message = Vec::new();
//! let access = RegionAccess { offset: 0x10, region: 2, count: 4 };
//! let header = Header::command(7, Command::RegionRead);
//! header.encode_message(&mut message, 0, |body| access.encode(body));
//!
//! // … and a server reads it.
//! let header = Header::decode(&message).unwrap();
//! let limits = Limits { max_data_xfer_size: 1 << 20 };
//! let request = Request::decode(header.command, &message[16..], 0, limits).unwrap();
//! assert_eq!(request, Request::RegionRead(access));
//! ```

mod access;
mod bitmap;
mod bytes;
mod command;
mod dma;
mod errno;
mod error;
pub mod feature;
mod header;
mod info;
mod io_fds;
pub mod irq;
mod migration;
mod region;
mod request;
mod version;

#[cfg(test)]
mod tests;

pub use access::{RegionAccess, SmallWrite, WriteMulti};
pub use bitmap::{PageBitmap, bitmap_size};
pub use command::Command;
pub(crate) use dma::MAX_BITMAP_ARGSZ;
pub use dma::{
    DMA_BY_FILE, DMA_BY_MMAP, DMA_READABLE, DMA_WRITABLE, DmaAccess, DmaMap, DmaUnmap, Unmap,
};
pub use errno::Errno;
pub use error::WireError;
pub use feature::{Feature, LoggingReport, LoggingStart};
pub use header::{HEADER_SIZE, Header, Kind};
pub use info::{
    DEVICE_PCI, DEVICE_RESETTABLE, DeviceInfo, IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE,
    IRQ_NORESIZE, IrqInfo, PCI_CONFIG_REGION, PCI_IRQS, PCI_REGIONS, Query,
};
pub use io_fds::{IoFd, IoFdKind, IoFds, IoFdsQuery, IoFdsReply, Stride};
pub use irq::{IrqIndex, SetIrqs};
pub use migration::MigData;
pub use region::{
    REGION_MAPPABLE, REGION_READABLE, REGION_WRITABLE, RegionInfo, RegionReply, SparseArea,
};
pub use request::{Limits, Request};
pub use version::{
    Capabilities, DEFAULT_MAX_DATA_XFER_SIZE, DEFAULT_MAX_DMA_MAPS, DEFAULT_MAX_MSG_FDS,
    DEFAULT_PGSIZES, MAJOR, MAX_DATA_XFER_SIZE, MAX_MSG_FDS, MAX_VERSION_SIZE, MINOR,
    MigrationCapability, QEMU_MAX_MSG_FDS, TwinSocket, Version,
};
