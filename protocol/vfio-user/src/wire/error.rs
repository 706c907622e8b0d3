//! What can be wrong with a body.

use super::errno::Errno;
use thiserror::Error;

/// A body that is not what its command asks for. `what` names the message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// The body ends too early.
    #[error("{what}: {length} bytes, at least {needed} are due")]
    Short {
        /// Which message.
        what: &'static str,
        /// How many bytes there are.
        length: usize,
        /// How many are due.
        needed: usize,
    },
    /// `argsz` leaves no room for what has to be answered, or is less than the request itself.
    #[error("{what}: argsz {argsz} is less than {needed}")]
    Argsz {
        /// Which message.
        what: &'static str,
        /// What it says.
        argsz: u32,
        /// How much is due.
        needed: u64,
    },
    /// Flags that do not exist, or do not go together.
    #[error("{what}: flags {flags:#x} do not exist or do not go together")]
    Flags {
        /// Which message.
        what: &'static str,
        /// The flags.
        flags: u32,
    },
    /// There is more or less data than the message says.
    #[error("{what}: {length} bytes of data for a count of {count}")]
    DataLength {
        /// Which message.
        what: &'static str,
        /// How many bytes came.
        length: usize,
        /// What it says.
        count: u64,
    },
    /// A count or size above what was agreed.
    #[error("{what}: a count of {count} is more than {limit}")]
    TooLong {
        /// Which message.
        what: &'static str,
        /// What it says.
        count: u64,
        /// How much is possible.
        limit: u64,
    },
    /// A range that is empty or reaches beyond the last address.
    #[error("{what}: {size:#x} bytes from {start:#x} are no range")]
    Range {
        /// Which message.
        what: &'static str,
        /// First address.
        start: u64,
        /// How many bytes.
        size: u64,
    },
    /// A field with a value that it cannot have.
    #[error("{what}: {field} cannot be {value:#x}")]
    Field {
        /// Which message.
        what: &'static str,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Another number of fds than the message needs.
    #[error("{what}: {fds} fds, {expected} are due")]
    Fds {
        /// Which message.
        what: &'static str,
        /// How many came.
        fds: usize,
        /// How many are due.
        expected: usize,
    },
    /// The other side has no such command.
    #[error("no command {number}")]
    UnknownCommand {
        /// Its number.
        number: u16,
    },
    /// There is no such feature, or it has no such operation.
    #[error("DEVICE_FEATURE: no feature {feature} with flags {flags:#x}")]
    UnknownFeature {
        /// Its number.
        feature: u16,
        /// All the flags.
        flags: u32,
    },
    /// The data of VERSION are not what they should be.
    #[error("VERSION: {reason}")]
    Version {
        /// What is wrong with them.
        reason: String,
    },
}

impl WireError {
    /// What to answer the sender.
    #[must_use]
    pub fn errno(&self) -> Errno {
        // Measured: that is what libvfio-user answers, whatever is wrong.
        Errno::EINVAL
    }
}
