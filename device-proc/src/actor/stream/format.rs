//! The bytes of a state stream, as `docs/state-format.md` has them. Pure: no device, no I/O.

use super::StreamError;
use crate::pci::{BarLayout, BarUse};
use standstill_protocol::message::MAX_NAME;
use twox_hash::XxHash3_128;

pub(super) const MAGIC: [u8; 8] = *b"STANDSTL";
/// Version 1 was a stream of one pass, without records.
pub(super) const MAJOR: u16 = 2;
pub(super) const MINOR: u16 = 0;

/// Length of what a stream begins with.
pub(super) const PREAMBLE: usize = 16;
/// Length of a record's header.
pub(super) const HEADER: usize = 16;
/// Length of the digest behind a record's contents.
pub(super) const DIGEST: usize = 16;
/// The most contents of one record; what a BAR's memory is cut into.
pub(super) const PIECE: usize = 65536;

/// May be skipped by who does not know it.
pub(super) const OPTIONAL: u16 = 1;
/// The section goes on in the next record.
pub(super) const MORE: u16 = 2;

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(pub(super) u16);

impl Tag {
    pub(super) const IDENTITY: Self = Self(1);
    pub(super) const CONFIG: Self = Self(2);
    pub(super) const MSIX: Self = Self(3);
    pub(super) const INTERRUPTS: Self = Self(4);
    pub(super) const DEVICE: Self = Self(5);
    pub(super) const RUNNING_FIRST: Self = Self(6);
    pub(super) const RUNNING_LATER: Self = Self(7);
    pub(super) const PADDING: Self = Self(8);
    pub(super) const END: Self = Self(0xffff);

    pub(super) const fn memory(bar: u8) -> Self {
        Self(0x10 + bar as u16)
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match *self {
            Self::IDENTITY => "identity",
            Self::CONFIG => "configuration space",
            Self::MSIX => "MSI-X table",
            Self::INTERRUPTS => "interrupts that wait",
            Self::DEVICE => "device's state",
            Self::RUNNING_FIRST | Self::RUNNING_LATER => "device's state while it ran",
            Self::PADDING => "padding",
            Self::END => "end",
            Self(tag @ 0x10..=0x15) => return write!(f, "memory of BAR {}", tag - 0x10),
            Self(tag) => return write!(f, "record {tag:#x}"),
        })
    }
}

/// The header of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) tag: Tag,
    pub(super) flags: u16,
    /// Length of the contents.
    pub(super) length: u32,
    /// Where the contents belong, in bytes from the beginning of the section.
    pub(super) at: u64,
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..2].copy_from_slice(&self.tag.0.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..].copy_from_slice(&self.at.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: [u8; HEADER]) -> Self {
        let [t0, t1, f0, f1, l0, l1, l2, l3, at @ ..] = bytes;
        Self {
            tag: Tag(u16::from_le_bytes([t0, t1])),
            flags: u16::from_le_bytes([f0, f1]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            at: u64::from_le_bytes(at),
        }
    }
}

/// What tells two streams of bytes apart: of a record, its header and contents.
pub(super) fn digest(bytes: &[u8]) -> u128 {
    XxHash3_128::oneshot(bytes)
}

/// What all records so far come to, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    records: u64,
    digest: u128,
}

impl Chain {
    /// Length of the contents of the last record.
    pub(super) const LENGTH: usize = 24;

    pub(super) fn new(preamble: &[u8; PREAMBLE]) -> Self {
        Self { records: 0, digest: digest(preamble) }
    }

    pub(super) fn add(&mut self, record: u128) {
        let mut both = [0; 2 * DIGEST];
        both[..DIGEST].copy_from_slice(&self.digest.to_le_bytes());
        both[DIGEST..].copy_from_slice(&record.to_le_bytes());
        *self = Self { records: self.records + 1, digest: digest(&both) };
    }

    pub(super) fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&self.records.to_le_bytes());
        bytes[8..].copy_from_slice(&self.digest.to_le_bytes());
        bytes
    }
}

/// What a stream of this version begins with.
pub(super) fn preamble() -> [u8; PREAMBLE] {
    let mut bytes = [0; PREAMBLE];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
    bytes[10..12].copy_from_slice(&MINOR.to_le_bytes());
    bytes
}

/// Checks what a stream begins with, and says whether its minor version is newer.
pub(super) fn check_preamble(bytes: &[u8; PREAMBLE]) -> Result<bool, StreamError> {
    let [magic @ .., j0, j1, n0, n1, _, _, _, _] = *bytes;
    if magic != MAGIC {
        return Err(StreamError::Magic(magic));
    }
    let (major, minor) = (u16::from_le_bytes([j0, j1]), u16::from_le_bytes([n0, n1]));
    if major != MAJOR {
        return Err(StreamError::Version { major, minor });
    }
    Ok(minor > MINOR)
}

/// Whose state it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) kind: Vec<u8>,
    /// Vendor, device, subsystem vendor, subsystem.
    pub(super) ids: [u16; 4],
    /// The 32 bits at 0x08 of the configuration space.
    pub(super) class_revision: u32,
    /// Major and minor version of the device's own state.
    pub(super) state: [u16; 2],
    pub(super) msix_vectors: u16,
    pub(super) bar_sizes: [u64; 6],
    pub(super) bar_uses: [u8; 6],
}

/// Length of an identity before the kind.
const FIXED: usize = 76;

impl Identity {
    pub(super) fn bars(bars: &[BarLayout; 6]) -> ([u64; 6], [u8; 6]) {
        let usage = |bar: &BarLayout| match bar.usage {
            BarUse::Absent => 0,
            BarUse::Registers => 1,
            BarUse::Memory => 2,
            BarUse::Msix => 3,
        };
        (bars.each_ref().map(|bar| bar.size), bars.each_ref().map(usage))
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + self.kind.len());
        for id in self.ids {
            bytes.extend(id.to_le_bytes());
        }
        bytes.extend(self.class_revision.to_le_bytes());
        for version in self.state {
            bytes.extend(version.to_le_bytes());
        }
        bytes.extend(self.msix_vectors.to_le_bytes());
        // A kind has at most 64 bytes.
        bytes.extend(u16::try_from(self.kind.len()).unwrap_or(u16::MAX).to_le_bytes());
        for size in self.bar_sizes {
            bytes.extend(size.to_le_bytes());
        }
        bytes.extend(self.bar_uses);
        bytes.extend([0; 2]);
        bytes.extend(&self.kind);
        bytes
    }

    /// Takes an identity apart. Only a newer minor version has something behind it.
    pub(super) fn from_bytes(bytes: &[u8], newer: bool) -> Result<Self, StreamError> {
        let (mut rest, length) = (bytes, bytes.len());
        let ids =
            [take_u16(&mut rest), take_u16(&mut rest), take_u16(&mut rest), take_u16(&mut rest)];
        let class_revision = take(&mut rest).map(u32::from_le_bytes);
        let state = [take_u16(&mut rest), take_u16(&mut rest)];
        let msix_vectors = take_u16(&mut rest);
        let kind_length = take_u16(&mut rest);
        let mut bar_sizes = [0; 6];
        for size in &mut bar_sizes {
            *size = take(&mut rest).map_or(0, u64::from_le_bytes);
        }
        let bar_uses = take(&mut rest);
        let reserved: Option<[u8; 2]> = take(&mut rest);
        let whole = || {
            let kind_length = usize::from(kind_length?);
            reserved?;
            let kind = rest.get(..kind_length)?.to_vec();
            let at_end = kind_length == rest.len() || newer;
            (kind_length <= MAX_NAME && at_end).then_some(())?;
            let [i0, i1, i2, i3] = ids;
            Some(Self {
                kind,
                ids: [i0?, i1?, i2?, i3?],
                class_revision: class_revision?,
                state: [state[0]?, state[1]?],
                msix_vectors: msix_vectors?,
                bar_sizes,
                bar_uses: bar_uses?,
            })
        };
        whole().ok_or(StreamError::Malformed { section: Tag::IDENTITY, length })
    }

    /// Compares a saved identity with this device's, and says what differs first.
    pub(super) fn check(&self, saved: &Self) -> Result<(), StreamError> {
        if saved.kind != self.kind {
            let text = |kind: &[u8]| String::from_utf8_lossy(kind).into_owned();
            return Err(StreamError::Kind { found: text(&saved.kind), expected: text(&self.kind) });
        }
        let names = ["vendor id", "device id", "subsystem vendor id", "subsystem id"];
        for ((name, found), expected) in names.into_iter().zip(saved.ids).zip(self.ids) {
            same(name.into(), found, expected, |id| format!("{id:#06x}"))?;
        }
        let hex = |bits: u32| format!("{bits:#010x}");
        same("class and revision".into(), saved.class_revision, self.class_revision, hex)?;
        let decimal = |number: u16| number.to_string();
        let [major, _] = saved.state;
        if major != self.state[0] {
            return Err(StreamError::DeviceVersion { found: saved.state, expected: self.state });
        }
        same(
            "a number of MSI-X vectors of".into(),
            saved.msix_vectors,
            self.msix_vectors,
            decimal,
        )?;
        for bar in 0..6 {
            let whole = |identity: &Self| (identity.bar_uses[bar], identity.bar_sizes[bar]);
            same(format!("a BAR {bar} of"), whole(saved), whole(self), |(usage, size)| {
                let usage = match usage {
                    0 => return "nothing".into(),
                    1 => "registers",
                    2 => "memory",
                    3 => "MSI-X table",
                    other => return format!("{size:#x} bytes of use {other}"),
                };
                format!("{size:#x} bytes of {usage}")
            })?;
        }
        Ok(())
    }
}

fn same<T: Copy + PartialEq>(
    what: String,
    found: T,
    expected: T,
    text: impl Fn(T) -> String,
) -> Result<(), StreamError> {
    if found == expected {
        return Ok(());
    }
    Err(StreamError::Identity { what, found: text(found), expected: text(expected) })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, others) = rest.split_first_chunk()?;
    *rest = others;
    Some(*first)
}

fn take_u16(rest: &mut &[u8]) -> Option<u16> {
    take(rest).map(u16::from_le_bytes)
}
