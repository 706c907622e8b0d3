//! `DEVICE_SET_IRQS`: what a request means and whether it is acceptable, as a pure function.
//!
//! Follows the vfio-user specification and `struct vfio_irq_set` of `<linux/vfio.h>`; the checks
//! are those of libvfio-user.

use super::bytes::{Put, Reader};
use super::errno::Errno;
use super::error::WireError;
use std::ops::Range;
use thiserror::Error;

/// Size of the fixed part of a request, in bytes.
pub const SET_IRQS_SIZE: u32 = 20;

/// `VFIO_IRQ_SET_DATA_NONE`.
pub const DATA_NONE: u32 = 1;
/// `VFIO_IRQ_SET_DATA_BOOL`.
pub const DATA_BOOL: u32 = 1 << 1;
/// `VFIO_IRQ_SET_DATA_EVENTFD`.
pub const DATA_EVENTFD: u32 = 1 << 2;
/// `VFIO_IRQ_SET_ACTION_MASK`.
pub const ACTION_MASK: u32 = 1 << 3;
/// `VFIO_IRQ_SET_ACTION_UNMASK`.
pub const ACTION_UNMASK: u32 = 1 << 4;
/// `VFIO_IRQ_SET_ACTION_TRIGGER`.
pub const ACTION_TRIGGER: u32 = 1 << 5;

const DATA_BITS: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
const ACTION_BITS: u32 = ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER;

/// Interrupt index of a PCI device: `VFIO_PCI_*_IRQ_INDEX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum IrqIndex {
    /// INTx, by level.
    Intx = 0,
    /// MSI.
    Msi = 1,
    /// MSI-X.
    Msix = 2,
    /// The device reports an error.
    Error = 3,
    /// The device asks to be given back.
    Request = 4,
}

impl IrqIndex {
    /// All indexes, by number.
    pub const ALL: [Self; 5] = [Self::Intx, Self::Msi, Self::Msix, Self::Error, Self::Request];

    /// The index with that number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// How many interrupts it has in a device with so many.
    #[must_use]
    pub fn count(self, counts: IrqCounts) -> u32 {
        match self {
            Self::Intx => u32::from(counts.intx),
            Self::Msi => u32::from(counts.msi),
            Self::Msix => u32::from(counts.msix),
            Self::Error | Self::Request => 1,
        }
    }

    fn can_be_masked(self) -> bool {
        !matches!(self, Self::Error | Self::Request)
    }
}

/// How many interrupts a device has where devices differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IrqCounts {
    /// INTx: 0 or 1.
    pub intx: u16,
    /// MSI vectors: 0 to 32.
    pub msi: u16,
    /// MSI-X vectors: 0 to 2048.
    pub msix: u16,
}

/// The fixed part of a request, as it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs {
    /// Size of the payload, fixed part included, as the client says.
    pub argsz: u32,
    /// One data bit and one action bit.
    pub flags: u32,
    /// Interrupt index.
    pub index: u32,
    /// First interrupt of the index.
    pub start: u32,
    /// How many interrupts.
    pub count: u32,
}

impl SetIrqs {
    /// Reads the body of a request: the fixed part, and what follows it.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short.
    pub fn decode(body: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let mut reader = Reader::new("DEVICE_SET_IRQS", body);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        let (index, start, count) = (reader.u32()?, reader.u32()?, reader.u32()?);
        Ok((Self { argsz, flags, index, start, count }, reader.rest()))
    }

    /// Appends the fixed part of the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        for field in [self.argsz, self.flags, self.index, self.start, self.count] {
            out.put_u32(field);
        }
    }
}

/// A request that is acceptable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IrqRequest {
    /// Which index.
    pub index: IrqIndex,
    /// Which of its interrupts.
    pub range: Range<u32>,
    /// What to do.
    pub operation: IrqOperation,
}

/// What to do with a range of interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqOperation {
    /// Drop all eventfds of the index.
    Disable,
    /// Raise them now.
    Fire(Selection),
    /// Install eventfds, one for each; as many came with the request.
    Install,
    /// Remove their eventfds.
    Remove,
    /// Raise them no more, remember that they wanted to be raised.
    Mask(Selection),
    /// Raise them again, at once if they wanted to be raised meanwhile.
    Unmask(Selection),
}

/// Which interrupts of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All.
    All,
    /// Those whose byte in the request's data is not 0.
    ByData,
}

/// A request that is not acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum IrqError {
    /// The request is smaller than its fixed part.
    #[error("SET_IRQS: argsz {argsz} is less than {SET_IRQS_SIZE}")]
    TooShort {
        /// What it says.
        argsz: u32,
    },
    /// Not exactly one data bit and one action bit.
    #[error("SET_IRQS: flags {flags:#x} are not exactly one data and one action bit")]
    BadFlags {
        /// The flags.
        flags: u32,
    },
    /// There is no such index.
    #[error("SET_IRQS: no interrupt index {index}")]
    NoIndex {
        /// The index.
        index: u32,
    },
    /// The index has no such interrupts.
    #[error("SET_IRQS: index {index:?} has {available} interrupts, not {count} from {start}")]
    BadRange {
        /// Which index.
        index: IrqIndex,
        /// First interrupt.
        start: u32,
        /// How many.
        count: u32,
        /// How many there are.
        available: u32,
    },
    /// Count 0 means to disable an index; it goes with no other operation.
    #[error("SET_IRQS: count 0 with flags {flags:#x} or a start that is not 0")]
    BadDisable {
        /// The flags.
        flags: u32,
    },
    /// The error and request interrupts cannot be masked.
    #[error("SET_IRQS: index {index:?} cannot be masked")]
    NotMaskable {
        /// Which index.
        index: IrqIndex,
    },
    /// The number of data bytes does not fit.
    #[error("SET_IRQS: {bytes} data bytes for {expected}")]
    BadData {
        /// How many came.
        bytes: usize,
        /// How many were due.
        expected: u32,
    },
    /// The number of fds does not fit.
    #[error("SET_IRQS: {fds} fds for {expected} interrupts")]
    BadFds {
        /// How many came.
        fds: usize,
        /// How many were due.
        expected: u32,
    },
    /// Masking or unmasking through an eventfd is not offered.
    #[error("SET_IRQS: index {index:?}: masking by eventfd is not offered")]
    MaskByEventfd {
        /// Which index.
        index: IrqIndex,
    },
}

impl IrqError {
    /// What to answer the client.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::MaskByEventfd { .. } => Errno::EOPNOTSUPP,
            _ => Errno::EINVAL,
        }
    }
}

/// Whether a request with that many data bytes and fds is acceptable to a device with so many
/// interrupts, and what it means.
///
/// # Errors
///
/// [`IrqError`] with errno EINVAL, or EOPNOTSUPP for what is valid but not offered.
pub fn validate(
    request: &SetIrqs,
    data_bytes: usize,
    fds: usize,
    counts: IrqCounts,
) -> Result<IrqRequest, IrqError> {
    let SetIrqs { argsz, flags, index, start, count } = *request;
    if argsz < SET_IRQS_SIZE {
        return Err(IrqError::TooShort { argsz });
    }
    let (data, action) = (flags & DATA_BITS, flags & ACTION_BITS);
    if flags & !(DATA_BITS | ACTION_BITS) != 0
        || !data.is_power_of_two()
        || !action.is_power_of_two()
    {
        return Err(IrqError::BadFlags { flags });
    }
    let index = IrqIndex::from_number(index).ok_or(IrqError::NoIndex { index })?;
    let available = index.count(counts);
    let end = start.checked_add(count).filter(|end| *end <= available && start < available);
    let end = end.ok_or(IrqError::BadRange { index, start, count, available })?;
    if action != ACTION_TRIGGER && !index.can_be_masked() {
        return Err(IrqError::NotMaskable { index });
    }
    if count == 0 && (start != 0 || data != DATA_NONE || action != ACTION_TRIGGER) {
        return Err(IrqError::BadDisable { flags });
    }
    let bytes_due = if data == DATA_BOOL { count } else { 0 };
    if u32::try_from(data_bytes) != Ok(bytes_due) {
        return Err(IrqError::BadData { bytes: data_bytes, expected: bytes_due });
    }
    let fds_due = if data == DATA_EVENTFD && fds > 0 { count } else { 0 };
    if u32::try_from(fds) != Ok(fds_due) {
        return Err(IrqError::BadFds { fds, expected: fds_due });
    }
    let selection = if data == DATA_BOOL { Selection::ByData } else { Selection::All };
    let operation = match (data, action) {
        (DATA_EVENTFD, ACTION_TRIGGER) if fds == 0 => IrqOperation::Remove,
        (DATA_EVENTFD, ACTION_TRIGGER) => IrqOperation::Install,
        (DATA_EVENTFD, _) => return Err(IrqError::MaskByEventfd { index }),
        (_, ACTION_MASK) => IrqOperation::Mask(selection),
        (_, ACTION_UNMASK) => IrqOperation::Unmask(selection),
        _ if count == 0 => IrqOperation::Disable,
        _ => IrqOperation::Fire(selection),
    };
    Ok(IrqRequest { index, range: start..end, operation })
}

#[cfg(test)]
mod tests;
