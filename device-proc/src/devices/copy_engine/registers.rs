//! The registers in BAR 0, as a driver sees them.
//!
//! Each register begins at a multiple of 8. All are little endian. A 32-bit register is accessed
//! with 4 bytes, a 64-bit one with 8 or, half by half, with 4. Everything else is refused.
//!
//! | offset | name | bits | access |
//! |---|---|---|---|
//! | 0x00 | [`ID`] | 32 | read |
//! | 0x08 | [`VERSION`] | 32 | read |
//! | 0x10 | [`CONTROL`] | 32 | read, write |
//! | 0x18 | [`STATUS`] | 32 | read |
//! | 0x20 | [`RING_BASE`] | 64 | read, write while not running |
//! | 0x28 | [`RING_ENTRIES`] | 32 | read, write while not running |
//! | 0x30 | [`DOORBELL`] | 32 | read, write |
//! | 0x38 | [`HEAD`] | 32 | read |
//! | 0x40 | [`BYTES`] | 64 | read |
//! | 0x48 | [`DESCRIPTORS`] | 64 | read |
//! | 0x50 | [`BUSY_NS`] | 64 | read |
//! | 0x58 | [`INTERRUPTS`] | 64 | read |
//! | 0x60 | [`MEMORY_SIZE`] | 64 | read |
//! | 0x80 | [`PROBE_IOVA`] | 64 | read, write |
//! | 0x88 | [`PROBE_LEN`] | 64 | read, write |
//! | 0x90 | [`PROBE_RESULT`] | 32 | read |

#![forbid(unsafe_code)]

/// The BAR with the registers.
pub const REGISTER_BAR: u32 = 0;
/// Its size in bytes.
pub const REGISTER_BAR_SIZE: u64 = 4096;
/// The BAR with the memory.
pub const MEMORY_BAR: u32 = 2;

/// Always [`ID_VALUE`].
pub const ID: u64 = 0x00;
/// Version of this interface: [`VERSION_VALUE`].
pub const VERSION: u64 = 0x08;
/// [`CONTROL_RUN`] and [`CONTROL_LOOP`].
pub const CONTROL: u64 = 0x10;
/// [`STATUS_BUSY`], [`STATUS_HALTED`] and the error code.
pub const STATUS: u64 = 0x18;
/// IOVA of the descriptor ring, a multiple of 64. Writing sets `HEAD` and `DOORBELL` to 0.
pub const RING_BASE: u64 = 0x20;
/// Number of descriptors in the ring, 0 to [`MAX_ENTRIES`]. Writing sets `HEAD` and `DOORBELL`
/// to 0.
pub const RING_ENTRIES: u64 = 0x28;
/// Index of the first descriptor that is not yet to be executed, less than `RING_ENTRIES`. The
/// ring is empty when it equals `HEAD`, so at most one descriptor less than it has can wait in it.
/// Has no effect with [`CONTROL_LOOP`].
pub const DOORBELL: u64 = 0x30;
/// Index of the descriptor that is executed now or next.
pub const HEAD: u64 = 0x38;
/// Bytes copied.
pub const BYTES: u64 = 0x40;
/// Descriptors executed.
pub const DESCRIPTORS: u64 = 0x48;
/// CPU time of the engine's thread in nanoseconds; brought up to date whenever the ring gets
/// empty, every 64 descriptors, and every MiB.
pub const BUSY_NS: u64 = 0x50;
/// Interrupts raised.
pub const INTERRUPTS: u64 = 0x58;
/// Size of the memory BAR in bytes.
pub const MEMORY_SIZE: u64 = 0x60;
/// First IOVA of a range to look up.
pub const PROBE_IOVA: u64 = 0x80;
/// Length of the range in bytes. Writing it looks the range up.
pub const PROBE_LEN: u64 = 0x88;
/// What was found: [`PROBE_UNMAPPED`], [`PROBE_RAM`] or [`PROBE_PEER`].
pub const PROBE_RESULT: u64 = 0x90;

/// The bytes `COPE`.
pub const ID_VALUE: u32 = u32::from_le_bytes(*b"COPE");
/// Version of this interface.
pub const VERSION_VALUE: u32 = 1;

/// In [`CONTROL`]: execute descriptors. Setting it clears an error; `HEAD` stays.
pub const CONTROL_RUN: u32 = 1;
/// In [`CONTROL`]: go round the ring for ever, whatever [`DOORBELL`] says.
pub const CONTROL_LOOP: u32 = 1 << 1;

/// In [`STATUS`]: there are descriptors to execute.
pub const STATUS_BUSY: u32 = 1;
/// In [`STATUS`]: halted at the descriptor at `HEAD` by an error; its [`ErrorCode`] is in
/// the byte at [`STATUS_ERROR_SHIFT`]. `CONTROL_RUN` is cleared.
pub const STATUS_HALTED: u32 = 1 << 1;
/// Where in [`STATUS`] the error code begins, in bits; it has eight.
pub const STATUS_ERROR_SHIFT: u32 = 8;

/// In [`PROBE_RESULT`]: no DMA window contains the range.
pub const PROBE_UNMAPPED: u32 = 0;
/// In [`PROBE_RESULT`]: guest RAM.
pub const PROBE_RAM: u32 = 1;
/// In [`PROBE_RESULT`]: a peer's memory.
pub const PROBE_PEER: u32 = 2;

/// The most descriptors in a ring.
pub const MAX_ENTRIES: u32 = 1024;
/// The longest copy of one descriptor in bytes: 16 MiB.
pub const MAX_COPY: u32 = 16 << 20;
/// How many mailboxes there are: little-endian 64-bit numbers at the start of the memory BAR,
/// where peers write their sequence numbers.
pub const MAILBOXES: u32 = 16;

/// Why the engine has halted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ErrorCode {
    /// The descriptor itself cannot be read.
    Ring = 1,
    /// The descriptor contradicts the rules.
    Descriptor = 2,
    /// Source, destination or place of the sequence number is not mapped.
    Unmapped = 3,
    /// The client does not allow the access.
    Forbidden = 4,
    /// The window has no memory that could be mapped, and the client did not do what it was asked
    /// by messages.
    NoMemory = 5,
}

impl ErrorCode {
    /// The code with that value.
    #[must_use]
    pub fn from_value(value: u8) -> Option<Self> {
        [Self::Ring, Self::Descriptor, Self::Unmapped, Self::Forbidden, Self::NoMemory]
            .into_iter()
            .find(|code| *code as u8 == value)
    }
}
