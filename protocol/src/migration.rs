//! The VFIO migration states, version 2, and which way leads from one to another.
//!
//! Follows `enum vfio_device_mig_state` of `<linux/vfio.h>` and the next-state rules of the
//! kernel's `vfio_mig_get_next_state`. The rules depend on what a device offers
//! ([`MigrationFlags`]): a device without P2P states goes from RUNNING to STOP in one arc, a
//! device with them passes RUNNING_P2P.
//!
//! ```
//! use standstill_protocol::migration::{MigrationFlags, MigrationState::*, path};
//!
//! let way = path(MigrationFlags::STOP_COPY_P2P, Running, Stop).unwrap();
//! assert_eq!(way.as_slice(), [RunningP2p, Stop]);
//! ```

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;

/// A device's migration state; the discriminants are those of `<linux/vfio.h>`.
///
/// On the control channel a state travels as its index in this declaration, which is the same
/// number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u32)]
pub enum MigrationState {
    /// Unusable until it is reset; never a legal target.
    Error = 0,
    /// Does nothing: no DMA, no interrupt, internal state frozen.
    Stop = 1,
    /// Runs.
    Running = 2,
    /// As [`Stop`](Self::Stop), and its state can be read.
    StopCopy = 3,
    /// Stopped, and its state can be written.
    Resuming = 4,
    /// Runs but starts no peer-to-peer DMA; still answers MMIO and incoming DMA.
    RunningP2p = 5,
    /// Runs, and its state can be read meanwhile.
    PreCopy = 6,
    /// [`RunningP2p`](Self::RunningP2p) and [`PreCopy`](Self::PreCopy) together.
    PreCopyP2p = 7,
}

/// How much a device may do; what a migration state means for its DMA.
///
/// The order is from the most cautious to the least: of two wishes the smaller one wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Activity {
    /// No DMA, no interrupt, no change of saved state.
    Stopped,
    /// Starts no peer-to-peer DMA.
    NoPeer,
    /// Everything.
    Full,
}

impl fmt::Display for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::NoPeer => "no peer DMA",
            Self::Full => "full",
        })
    }
}

impl MigrationState {
    /// All eight states, by value.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The state with that value in `<linux/vfio.h>`, if there is one.
    #[must_use]
    pub fn from_value(value: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(value).ok()?).copied()
    }

    /// The value in `<linux/vfio.h>`, 0 to 7.
    #[must_use]
    pub fn value(self) -> u32 {
        self as u32
    }

    /// The state's name as the field writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        }
    }

    /// What the device may do in this state.
    #[must_use]
    pub fn activity(self) -> Activity {
        match self {
            Self::Running | Self::PreCopy => Activity::Full,
            Self::RunningP2p | Self::PreCopyP2p => Activity::NoPeer,
            Self::Error | Self::Stop | Self::StopCopy | Self::Resuming => Activity::Stopped,
        }
    }

    /// True where the device's state is being read: PRE_COPY, PRE_COPY_P2P, STOP_COPY.
    #[must_use]
    pub fn is_saving(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p | Self::StopCopy)
    }
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which migration states a device has: `VFIO_MIGRATION_STOP_COPY`, `_P2P`, `_PRE_COPY`.
///
/// The legal sets are 1, 3, 5 and 7, and for devices whose state can neither be saved nor loaded 0
/// and 2: they are stopped and started, but have no STOP_COPY and no RESUMING. `<linux/vfio.h>` has no
/// flags for such a device, which offers it no migration.
/// [`MigrationFlags::new`] is the only way to make a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct MigrationFlags(u8);

/// The flags are not one of the legal sets 0, 1, 2, 3, 5, 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("migration flags {0:#x} are none of the legal sets 0, 1, 2, 3, 5, 7")]
pub struct IllegalFlags(pub u64);

impl MigrationFlags {
    /// Set 0: no P2P states, and no state that can be saved or loaded.
    pub const NO_STATE: Self = Self(0);
    /// Set 2: P2P states, and no state that can be saved or loaded.
    pub const NO_STATE_P2P: Self = Self(2);
    /// Set 1: no P2P states, no PRE_COPY.
    pub const STOP_COPY: Self = Self(1);
    /// Set 3: P2P states, no PRE_COPY.
    pub const STOP_COPY_P2P: Self = Self(3);
    /// Set 5: PRE_COPY, no P2P states.
    pub const STOP_COPY_PRE_COPY: Self = Self(5);
    /// Set 7: everything.
    pub const ALL: Self = Self(7);

    /// The set with these bits.
    ///
    /// # Errors
    ///
    /// [`IllegalFlags`] for anything but 0, 1, 2, 3, 5 and 7.
    pub fn new(bits: u64) -> Result<Self, IllegalFlags> {
        match bits {
            0 => Ok(Self::NO_STATE),
            1 => Ok(Self::STOP_COPY),
            2 => Ok(Self::NO_STATE_P2P),
            3 => Ok(Self::STOP_COPY_P2P),
            5 => Ok(Self::STOP_COPY_PRE_COPY),
            7 => Ok(Self::ALL),
            _ => Err(IllegalFlags(bits)),
        }
    }

    /// The bits as in `struct vfio_device_feature_migration`.
    #[must_use]
    pub fn bits(self) -> u64 {
        u64::from(self.0)
    }

    /// True if the device's state can be saved and loaded: it has STOP_COPY and RESUMING.
    #[must_use]
    pub fn stop_copy(self) -> bool {
        self.0 & 1 != 0
    }

    /// True if the device has the P2P states.
    #[must_use]
    pub fn p2p(self) -> bool {
        self.0 & 2 != 0
    }

    /// True if the device has PRE_COPY.
    #[must_use]
    pub fn pre_copy(self) -> bool {
        self.0 & 4 != 0
    }

    /// True if a device with these flags has that state.
    #[must_use]
    pub fn has(self, state: MigrationState) -> bool {
        match state {
            MigrationState::StopCopy | MigrationState::Resuming => self.stop_copy(),
            MigrationState::RunningP2p => self.p2p(),
            MigrationState::PreCopy => self.pre_copy(),
            MigrationState::PreCopyP2p => self.p2p() && self.pre_copy(),
            _ => true,
        }
    }
}

impl TryFrom<u64> for MigrationFlags {
    type Error = IllegalFlags;
    fn try_from(bits: u64) -> Result<Self, IllegalFlags> {
        Self::new(bits)
    }
}

impl From<MigrationFlags> for u64 {
    fn from(flags: MigrationFlags) -> Self {
        flags.bits()
    }
}

/// The first step on the way to a wanted state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The device is there.
    Already,
    /// Take this arc first.
    Arc(MigrationState),
}

/// No way leads from one state to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no way from {from} to {to} with migration flags {:#x}", flags.bits())]
pub struct NoWay {
    /// Where the device is.
    pub from: MigrationState,
    /// Where it was to go.
    pub to: MigrationState,
    /// What it has.
    pub flags: MigrationFlags,
}

/// The first step on the way from one state to another, for a device with these flags.
///
/// This is the kernel's method: one table for a device with every state; where the table's step
/// is a state that the device lacks, look again from there.
///
/// # Errors
///
/// [`NoWay`] if the device lacks either state, if either is ERROR, or where the table refuses
/// (from STOP_COPY to PRE_COPY or PRE_COPY_P2P).
pub fn next_state(
    flags: MigrationFlags,
    from: MigrationState,
    to: MigrationState,
) -> Result<Next, NoWay> {
    let refused = NoWay { from, to, flags };
    let usable = |state| flags.has(state) && state != MigrationState::Error;
    if !usable(from) || !usable(to) {
        return Err(refused);
    }
    if from == to {
        return Ok(Next::Already);
    }
    let mut step = full_table(from, to).ok_or(refused)?;
    while !flags.has(step) {
        step = full_table(step, to).ok_or(refused)?;
    }
    Ok(Next::Arc(step))
}

/// The next single arc for a device that has every state; `None` where it is refused.
fn full_table(from: MigrationState, to: MigrationState) -> Option<MigrationState> {
    use MigrationState as S;
    Some(match (from, to) {
        (S::Error, _) | (_, S::Error) => return None,
        (S::StopCopy, S::PreCopy | S::PreCopyP2p) => return None,

        (S::Stop, S::Stop | S::StopCopy | S::Resuming) => to,
        (S::Stop, _) => S::RunningP2p,

        (S::Running, S::Running | S::PreCopy) => to,
        (S::Running, _) => S::RunningP2p,

        (S::StopCopy, S::StopCopy) => to,
        (S::StopCopy, _) => S::Stop,

        (S::Resuming, S::Resuming) => to,
        (S::Resuming, _) => S::Stop,

        (S::RunningP2p, S::RunningP2p | S::PreCopyP2p) => to,
        (S::RunningP2p, S::Running | S::PreCopy) => S::Running,
        (S::RunningP2p, S::Stop | S::StopCopy | S::Resuming) => S::Stop,

        (S::PreCopy, S::PreCopy | S::PreCopyP2p) => to,
        (S::PreCopy, S::StopCopy) => S::PreCopyP2p,
        (S::PreCopy, _) => S::Running,

        (S::PreCopyP2p, S::PreCopyP2p | S::PreCopy | S::StopCopy) => to,
        (S::PreCopyP2p, _) => S::RunningP2p,
    })
}

/// The arcs from one state to another: every state that is entered, the last one the target.
///
/// At most four, so it lives on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    states: [MigrationState; Path::LONGEST],
    len: usize,
}

impl Path {
    /// No two states are further apart than this many arcs (a test walks every pair).
    pub const LONGEST: usize = 4;

    /// The states that are entered, in order; empty if the device is there already.
    #[must_use]
    pub fn as_slice(&self) -> &[MigrationState] {
        &self.states[..self.len]
    }
}

/// All arcs from one state to another, for a device with these flags.
///
/// # Errors
///
/// As [`next_state`].
pub fn path(
    flags: MigrationFlags,
    from: MigrationState,
    to: MigrationState,
) -> Result<Path, NoWay> {
    let mut way = Path { states: [from; Path::LONGEST], len: 0 };
    let mut at = from;
    while let Next::Arc(step) = next_state(flags, at, to)? {
        let refused = NoWay { from, to, flags };
        *way.states.get_mut(way.len).ok_or(refused)? = step;
        way.len += 1;
        at = step;
    }
    Ok(way)
}
