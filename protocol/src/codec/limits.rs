//! The limits of each message, and how many file descriptors come with it.

#![forbid(unsafe_code)]

use crate::dirty::{LayoutError, check_page_size};
use crate::message::{
    Command, CoordinatorMessage, Counter, DeviceEvent, DeviceMessage, FileIdentity, Hello,
    MAX_COUNTERS, MAX_FDS, MAX_FILES, MAX_NAME, MAX_TEXT, MemoryDeclaration, Phase, VersionRange,
    Welcome,
};
use serde::de::{DeserializeOwned, Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::marker::PhantomData;
use thiserror::Error;

/// A field is out of its range.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LimitError {
    /// A text is too long.
    #[error("{field} has {length} bytes, at most {limit} are allowed")]
    Text {
        /// Which one.
        field: &'static str,
        /// Its length in bytes.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// There are too many counters.
    #[error("{count} counters, at most {MAX_COUNTERS} are allowed")]
    Counters {
        /// How many there are.
        count: usize,
    },
    /// More file descriptors are announced than fit, or fewer than needed.
    #[error("{field} announces {count} file descriptors, allowed are {min} to {max}")]
    Fds {
        /// Which field.
        field: &'static str,
        /// What it announces.
        count: u8,
        /// The fewest that are allowed.
        min: u8,
        /// The most.
        max: usize,
    },
    /// There are too many files, or none where there must be one.
    #[error("{count} files, allowed are {min} to {MAX_FILES}")]
    Files {
        /// How many there are.
        count: usize,
        /// The fewest that are allowed.
        min: usize,
    },
    /// A range of versions is empty or begins at 0, which is the handshake's.
    #[error("protocol versions {} to {} are no range from 1 upwards", .0.min, .0.max)]
    Versions(VersionRange),
    /// The version of a Welcome is 0, which is the handshake's.
    #[error("version 0 cannot be agreed on")]
    VersionZero,
    /// Pages of such a size are not tracked.
    #[error(transparent)]
    PageSize(#[from] LayoutError),
    /// There are too many faults, or none.
    #[cfg(feature = "fault-injection")]
    #[error("{count} faults, allowed are 1 to {}", crate::fault::MAX_FAULTS)]
    Faults {
        /// How many there are.
        count: usize,
    },
    /// A fault cannot be done where it should.
    #[cfg(feature = "fault-injection")]
    #[error("no such fault: {0}")]
    ImpossibleFault(crate::fault::Fault),
    /// A lease comes with a phase that has none.
    #[error("{phase} with a lease of {lease_ns} ns; only Stop has one")]
    Lease {
        /// The command's phase.
        phase: Phase,
        /// The lease.
        lease_ns: u64,
    },
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::CoordinatorMessage {}
    impl Sealed for super::DeviceMessage {}
}

/// What travels in one direction of a control channel: [`CoordinatorMessage`] or
/// [`DeviceMessage`], and nothing else.
pub trait Message: Serialize + DeserializeOwned + sealed::Sealed {
    /// The variant's name, for errors and logs.
    fn name(&self) -> &'static str;

    /// True for `Hello`, `Welcome` and `Reject`, whose layout is the same in all versions.
    fn is_handshake(&self) -> bool;

    /// How many file descriptors come with this message.
    fn fd_count(&self) -> usize;

    /// Checks what the types cannot say: lengths, counts, ranges.
    ///
    /// # Errors
    ///
    /// [`LimitError`] names the first field that is out of its range.
    fn validate(&self) -> Result<(), LimitError>;
}

impl Message for CoordinatorMessage {
    fn name(&self) -> &'static str {
        match self {
            Self::Welcome(_) => "Welcome",
            Self::Reject(_) => "Reject",
            Self::Command(_) => "Command",
            Self::Abort(_) => "Abort",
            Self::Query(_) => "Query",
            Self::Memory(_) => "Memory",
            Self::Shutdown(_) => "Shutdown",
            Self::Revoke(_) => "Revoke",
            Self::Untrack(_) => "Untrack",
            #[cfg(feature = "fault-injection")]
            Self::Arm(_) => "Arm",
        }
    }

    fn is_handshake(&self) -> bool {
        matches!(self, Self::Welcome(_) | Self::Reject(_))
    }

    fn fd_count(&self) -> usize {
        match self {
            Self::Welcome(Welcome { listener, log, .. }) => {
                usize::from(*listener) + usize::from(*log)
            }
            Self::Command(Command { phase: Phase::Save | Phase::Load, .. }) => 1,
            Self::Memory(MemoryDeclaration { ram_fds, dirty_page_size, .. }) => {
                usize::from(*ram_fds) * fds_for_each_file(*dirty_page_size)
            }
            #[cfg(feature = "fault-injection")]
            Self::Arm(_) => 1,
            _ => 0,
        }
    }

    fn validate(&self) -> Result<(), LimitError> {
        match self {
            Self::Welcome(welcome) => {
                if welcome.version == 0 {
                    return Err(LimitError::VersionZero);
                }
                text("name", &welcome.name, MAX_NAME)
            }
            Self::Reject(reject) => {
                versions(reject.versions)?;
                text("reason", &reject.reason, MAX_TEXT)
            }
            Self::Command(Command { phase, lease_ns, .. }) => {
                if *lease_ns != 0 && *phase != Phase::Stop {
                    return Err(LimitError::Lease { phase: *phase, lease_ns: *lease_ns });
                }
                Ok(())
            }
            Self::Memory(MemoryDeclaration { ram_fds, dirty_page_size, .. }) => {
                if *dirty_page_size != 0 {
                    check_page_size(*dirty_page_size)?;
                }
                fds("ram_fds", *ram_fds, 1, MAX_FDS / fds_for_each_file(*dirty_page_size))
            }
            Self::Revoke(revocation) => file_count(revocation.files.len(), 1),
            #[cfg(feature = "fault-injection")]
            Self::Arm(arm) => {
                let count = arm.faults.len();
                if !(1..=crate::fault::MAX_FAULTS).contains(&count) {
                    return Err(LimitError::Faults { count });
                }
                let impossible = arm.faults.iter().find(|fault| !fault.is_possible());
                impossible.map_or(Ok(()), |fault| Err(LimitError::ImpossibleFault(*fault)))
            }
            Self::Abort(_) | Self::Query(_) | Self::Shutdown(_) | Self::Untrack(_) => Ok(()),
        }
    }
}

impl Message for DeviceMessage {
    fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Reached(_) => "Reached",
            Self::Refused(_) => "Refused",
            Self::Status(_) => "Status",
            Self::MemoryAccepted(_) => "MemoryAccepted",
            Self::Heartbeat(_) => "Heartbeat",
            Self::Event(_) => "Event",
        }
    }

    fn is_handshake(&self) -> bool {
        matches!(self, Self::Hello(_))
    }

    fn fd_count(&self) -> usize {
        match self {
            Self::Hello(Hello { backing_files, .. }) => usize::from(*backing_files),
            _ => 0,
        }
    }

    fn validate(&self) -> Result<(), LimitError> {
        match self {
            Self::Hello(hello) => {
                versions(hello.versions)?;
                text("kind", &hello.kind, MAX_NAME)?;
                text("program_version", &hello.program_version, MAX_NAME)?;
                fds("backing_files", hello.backing_files, 0, MAX_FDS)?;
                file_count(hello.memory.len(), 0)
            }
            Self::Reached(reached) => {
                let count = reached.evidence.counters.len();
                if count > MAX_COUNTERS {
                    return Err(LimitError::Counters { count });
                }
                Ok(())
            }
            Self::Refused(refused) => text("text", &refused.refusal.text, MAX_TEXT),
            Self::Event(DeviceEvent::Failed(reason)) => text("reason", reason, MAX_TEXT),
            Self::Status(_) | Self::MemoryAccepted(_) | Self::Heartbeat(_) | Self::Event(_) => {
                Ok(())
            }
        }
    }
}

fn text(field: &'static str, value: &str, limit: usize) -> Result<(), LimitError> {
    let length = value.len();
    if length > limit { Err(LimitError::Text { field, length, limit }) } else { Ok(()) }
}

fn fds(field: &'static str, count: u8, min: u8, max: usize) -> Result<(), LimitError> {
    if count < min || usize::from(count) > max {
        return Err(LimitError::Fds { field, count, min, max });
    }
    Ok(())
}

/// Of a memory declaration: the file's, and its bitmap's.
fn fds_for_each_file(dirty_page_size: u64) -> usize {
    if dirty_page_size == 0 { 1 } else { 2 }
}

fn file_count(count: usize, min: usize) -> Result<(), LimitError> {
    if (min..=MAX_FILES).contains(&count) { Ok(()) } else { Err(LimitError::Files { count, min }) }
}

fn versions(range: VersionRange) -> Result<(), LimitError> {
    if range.min == 0 || range.min > range.max { Err(LimitError::Versions(range)) } else { Ok(()) }
}

/// Reads the counters of an [`Evidence`](crate::message::Evidence).
pub(crate) fn counters<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Counter>, D::Error> {
    bounded::<_, _, MAX_COUNTERS>(from, |count| LimitError::Counters { count })
}

/// Reads the files of a [`Hello`] or a [`Revocation`](crate::message::Revocation).
pub(crate) fn files<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<FileIdentity>, D::Error> {
    bounded::<_, _, MAX_FILES>(from, |count| LimitError::Files { count, min: 0 })
}

/// Reads the faults of an [`Arm`](crate::message::Arm).
#[cfg(feature = "fault-injection")]
pub(crate) fn faults<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Vec<crate::fault::Fault>, D::Error> {
    bounded::<_, _, { crate::fault::MAX_FAULTS }>(from, |count| LimitError::Faults { count })
}

/// Reads a sequence of at most `MAX` items.
///
/// serde's own reader of a `Vec` believes a length prefix up to 1 MiB; this one refuses what is
/// beyond the limit before it allocates.
fn bounded<'de, T: Deserialize<'de>, D: Deserializer<'de>, const MAX: usize>(
    from: D,
    too_many: fn(usize) -> LimitError,
) -> Result<Vec<T>, D::Error> {
    struct Bounded<T, const MAX: usize>(fn(usize) -> LimitError, PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX} items")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
            let announced = items.size_hint().unwrap_or(0);
            if announced > MAX {
                return Err(A::Error::custom((self.0)(announced)));
            }
            let mut read = Vec::with_capacity(announced);
            while let Some(item) = items.next_element()? {
                if read.len() == MAX {
                    return Err(A::Error::custom((self.0)(read.len() + 1)));
                }
                read.push(item);
            }
            Ok(read)
        }
    }

    from.deserialize_seq(Bounded::<T, MAX>(too_many, PhantomData))
}
