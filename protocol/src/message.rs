//! What coordinator and device process say to each other.
//!
//! [`CoordinatorMessage`] goes to the device process, [`DeviceMessage`] comes back. Nothing here
//! knows bytes or sockets: see [`codec`](crate::codec) and [`channel`](crate::channel).
//!
//! A conversation begins with the device's [`Hello`] and the coordinator's [`Welcome`] (or
//! [`Reject`]). Then the coordinator sends [`Command`]s, each of which is answered by exactly one
//! [`Reached`] or [`Refused`], unless a later command or an [`Abort`] has overtaken it. Every
//! command names its [`Term`] and [`Epoch`]; whatever belongs to another one is dropped.
//!
//! Durations are nanoseconds. A deadline travels as the budget that remains, never as a time of
//! day: two processes need not agree on a clock.

use crate::migration::{MigrationFlags, MigrationState};
use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

/// The protocol versions that this crate speaks.
pub const VERSIONS: VersionRange = VersionRange { min: 1, max: 1 };

/// The most counters in one [`Evidence`].
pub const MAX_COUNTERS: usize = 64;
/// The longest name, in bytes.
pub const MAX_NAME: usize = 64;
/// The longest text of a [`Refusal`], [`Reject`] or [`DeviceEvent`], in bytes.
pub const MAX_TEXT: usize = 512;
/// The most file descriptors in one message.
pub const MAX_FDS: usize = 16;
/// The most files in one [`Hello`] or [`Revocation`]: a PCI device has six BARs.
pub const MAX_FILES: usize = 8;
/// The most files that can be declared RAM, in all [`MemoryDeclaration`]s together. A device does not
/// accept one more, and a coordinator does not ask for it.
pub const MAX_RAM_FILES: usize = 64;

/// Which coordinator speaks: grows with each one that takes a machine over.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Term(pub u64);

/// Which transition of a term: grows with each one; an undo has an epoch of its own.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Inclusive range of protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl VersionRange {
    /// The newest version that both sides speak.
    #[must_use]
    pub fn negotiate(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// A step of a transition that a device is told to take.
///
/// The first four are the phases of the barrier; the others have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// First phase of a stop: start no more peer DMA, finish what was started.
    PrepareStop,
    /// Second phase of a stop: stop for good. Its answer is the join.
    Stop,
    /// First phase of a start: accept peers' DMA again.
    PrepareStart,
    /// Second phase of a start: run.
    Start,
    /// Write the device's state into the attached fd.
    Save,
    /// Read the device's state from the attached fd and commit it.
    Load,
    /// Power-on state.
    Reset,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PrepareStop => "PrepareStop",
            Self::Stop => "Stop",
            Self::PrepareStart => "PrepareStart",
            Self::Start => "Start",
            Self::Save => "Save",
            Self::Load => "Load",
            Self::Reset => "Reset",
        })
    }
}

/// Coordinator to device process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorMessage {
    /// The device belongs to the machine now.
    Welcome(Welcome),
    /// It does not; the connection ends.
    Reject(Reject),
    /// Take a step of a transition.
    Command(Command),
    /// Give a transition up.
    Abort(Abort),
    /// Say where you are.
    Query(Query),
    /// Which memory is RAM; the fds come with the message.
    Memory(MemoryDeclaration),
    /// End the process.
    Shutdown(Shutdown),
    /// Windows onto these files lead nowhere any more.
    Revoke(Revocation),
    /// Mark no more pages.
    Untrack(Untrack),
    /// Do these things wrong; the journal comes with the message.
    #[cfg(feature = "fault-injection")]
    Arm(Arm),
}

/// Device process to coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceMessage {
    /// First message of every connection; carries the fds of the device's backing files.
    Hello(Hello),
    /// A command was carried out.
    Reached(Reached),
    /// A command was not carried out; the device is in a known state.
    Refused(Refused),
    /// Answer to a query.
    Status(Status),
    /// Answer to a memory declaration or a revocation: it is in force.
    MemoryAccepted(MemoryAccepted),
    /// Sign of life.
    Heartbeat(Heartbeat),
    /// Something happened in the device process by itself.
    Event(DeviceEvent),
}

/// What a device process is and can.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol versions that it speaks.
    pub versions: VersionRange,
    /// Kind of device, such as `copy-engine`; at most [`MAX_NAME`] bytes.
    pub kind: String,
    /// Version of the device program; at most [`MAX_NAME`] bytes.
    pub program_version: String,
    /// What the device can.
    pub capabilities: Capabilities,
    /// The machine that this process belongs to; `None` before its first Welcome.
    pub machine: Option<Uuid>,
    /// The highest term seen; 0 before the first Welcome.
    pub term: Term,
    /// The highest epoch seen in that term.
    pub epoch: Epoch,
    /// Where the device is.
    pub state: MigrationState,
    /// How many backing files' fds come with this message, at most [`MAX_FDS`].
    pub backing_files: u8,
    /// The files behind the device's memory BARs, at most [`MAX_FILES`]: when this process is gone,
    /// peers' windows onto them are revoked.
    #[serde(deserialize_with = "crate::codec::files")]
    pub memory: Vec<FileIdentity>,
}

/// Which file an fd is open on: what `fstat(2)` says of it, the same in every process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileIdentity {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

impl fmt::Display for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}:{}", self.device, self.inode)
    }
}

/// What a device can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Its migration states.
    pub migration: MigrationFlags,
    /// Whether its DMA can reach a peer, or a peer's DMA can reach it.
    pub peer_dma: PeerDma,
    /// Whether its heartbeats carry the progress of its data threads.
    pub progress: bool,
    /// Whether it can mark the pages of RAM that it writes; see [`crate::dirty`].
    pub dirty_tracking: bool,
    /// Whether its program was built to do wrong what an `Arm` tells it to; see [`crate::fault`].
    pub fault_injection: bool,
}

/// Whether DMA between a device and its peers is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PeerDma {
    /// It is, or nobody knows.
    Possible,
    /// The device reaches RAM only and nothing of it can be mapped by others.
    RamOnly,
}

/// Answer to a [`Hello`] that was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that both sides speak from now on.
    pub version: u16,
    /// The machine.
    pub machine: Uuid,
    /// The device's name in it; at most [`MAX_NAME`] bytes.
    pub name: String,
    /// How often this device was started: 1 for the first time.
    pub incarnation: u64,
    /// The coordinator's term.
    pub term: Term,
    /// The last epoch that was used in it.
    pub epoch: Epoch,
    /// Interval of [`Heartbeat`]s in nanoseconds; 0 for none.
    pub heartbeat_ns: u64,
    /// What to do when the coordinator goes away.
    pub orphan: OrphanPolicy,
    /// True if a socket comes with this message, the first of its fds: bound to the path at which
    /// later coordinators find the device, and not listening yet. (Whoever calls `listen(2)` is
    /// whom `SO_PEERCRED` shows to those who connect.)
    pub listener: bool,
    /// True if a pipe comes with this message, the last of its fds: standard error from now on.
    pub log: bool,
}

/// What a device process does when its coordinator goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OrphanPolicy {
    /// It ends.
    Exit,
    /// It stays in exactly the state that it reached, goes on serving, and waits to be taken over.
    Keep,
}

/// Answer to a [`Hello`] that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// The versions that the coordinator speaks.
    pub versions: VersionRange,
    /// Why, for a person; at most [`MAX_TEXT`] bytes.
    pub reason: String,
}

/// Take a step of a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Command {
    /// The coordinator's term.
    pub term: Term,
    /// The transition.
    pub epoch: Epoch,
    /// The step.
    pub phase: Phase,
    /// Where to go. For [`Phase::Save`] and [`Phase::Reset`]: where the coordinator believes the
    /// device to be.
    pub target: MigrationState,
    /// What is left of the deadline, in nanoseconds.
    pub budget_ns: u64,
    /// Only with [`Phase::Stop`]: go back to RUNNING_P2P by yourself after this many nanoseconds,
    /// unless the state was handed over. 0 for none.
    pub lease_ns: u64,
}

/// Give the transition up: begin nothing more of it. It has no answer; the undo that follows has
/// an epoch of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Abort {
    /// The coordinator's term.
    pub term: Term,
    /// The transition that is given up.
    pub epoch: Epoch,
}

/// Say where you are. Answered at once by a [`Status`], also in the middle of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Query {
    /// The coordinator's term.
    pub term: Term,
    /// The transition that asks.
    pub epoch: Epoch,
}

/// The fds that come with this message are guest RAM. Everything else that a client maps, windows
/// without fd included, counts as a peer's memory.
///
/// Declarations only add. The device keeps the fds, so that a file's identity cannot be reused.
///
/// With a page size, each file comes with a bitmap ([`DirtyBitmap`](crate::dirty::DirtyBitmap)) for
/// pages of that size. From the answer on the device marks in it what it writes to the file, until
/// the next declaration of the file with another bitmap, an [`Untrack`], or the end of the term. If
/// the file was not RAM before, whatever the device may have written to it by then is marked too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDeclaration {
    /// The coordinator's term.
    pub term: Term,
    /// Number of the declaration, echoed in the answer.
    pub sequence: u64,
    /// How many files are declared: 1 to [`MAX_FDS`], with bitmaps half as many. Their fds come with
    /// this message, and then those of as many bitmaps.
    pub ram_fds: u8,
    /// Size of the pages that are to be marked, in bytes; 0 for no bitmaps.
    pub dirty_page_size: u64,
}

/// Mark no more pages, and let go of the bitmaps. It has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Untrack {
    /// The coordinator's term.
    pub term: Term,
}

/// Do these things wrong from now on. It has no answer; the pipe or file that comes with it is the
/// journal, into which [`JournalLine`](crate::fault::JournalLine)s are written.
#[cfg(feature = "fault-injection")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arm {
    /// The coordinator's term.
    pub term: Term,
    /// What: 1 to [`MAX_FAULTS`](crate::fault::MAX_FAULTS), each of which is possible.
    #[serde(deserialize_with = "crate::codec::faults")]
    pub faults: Vec<crate::fault::Fault>,
}

/// These files belonged to a process that is gone. Windows onto them are taken out of the IOVA map,
/// once nobody uses them; a DMA through one fails like one through no window at all. A file that was
/// declared RAM stays what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// The coordinator's term.
    pub term: Term,
    /// Number of the revocation, echoed in the answer; counted with the memory declarations.
    pub sequence: u64,
    /// The files: 1 to [`MAX_FILES`].
    #[serde(deserialize_with = "crate::codec::files")]
    pub files: Vec<FileIdentity>,
}

/// End the process in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// The coordinator's term.
    pub term: Term,
    /// After this many nanoseconds the process is killed.
    pub grace_ns: u64,
}

/// A command was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// The command's term.
    pub term: Term,
    /// The command's epoch.
    pub epoch: Epoch,
    /// The command's phase.
    pub phase: Phase,
    /// Where the device is now.
    pub state: MigrationState,
    /// Where the time went.
    pub timings: Timings,
    /// What the device has to show for it.
    pub evidence: Evidence,
}

/// A command was not carried out. The device is in `state` and has begun nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The command's term.
    pub term: Term,
    /// The command's epoch.
    pub epoch: Epoch,
    /// The command's phase.
    pub phase: Phase,
    /// Where the device is now.
    pub state: MigrationState,
    /// Why.
    pub refusal: Refusal,
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kind of reason, for a program.
    pub kind: RefusalKind,
    /// The reason, for a person; at most [`MAX_TEXT`] bytes.
    pub text: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.text)
    }
}

/// Kinds of reasons for which a command is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RefusalKind {
    /// No way leads from the present state to the target.
    NoWay,
    /// The client holds the device in a state that excludes it, such as an open state stream.
    Busy,
    /// A hook of the device failed.
    Device,
    /// DMA in flight did not end within the budget.
    Drain,
    /// The state stream was short, damaged, or of another device or version.
    Stream,
    /// The device cannot do this at all.
    Unsupported,
}

impl fmt::Display for RefusalKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoWay => "no way to that state",
            Self::Busy => "held by the client",
            Self::Device => "the device failed",
            Self::Drain => "DMA in flight did not end",
            Self::Stream => "bad state stream",
            Self::Unsupported => "not supported",
        })
    }
}

/// Where a device's time went while it carried out a command, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// From the command's receipt to its answer.
    pub total_ns: u64,
    /// In the device's own hooks.
    pub hook_ns: u64,
    /// Waiting for DMA and accesses in flight.
    pub drain_ns: u64,
    /// Collecting the evidence.
    pub evidence_ns: u64,
}

/// What a device can show for an answer, for an oracle outside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Hash of the device's memory.
    pub memory_hash: Option<u64>,
    /// Counters of the device, at most [`MAX_COUNTERS`].
    #[serde(deserialize_with = "crate::codec::counters")]
    pub counters: Vec<Counter>,
}

/// One number of an [`Evidence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Counter {
    /// What it counts.
    pub kind: CounterKind,
    /// Which one of that kind; the device's own numbering.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// What a [`Counter`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CounterKind {
    /// Sequence number of the last write that the device completed, by descriptor.
    Written,
    /// Sequence number that the device finds in its memory, by mailbox.
    Received,
    /// Interrupts raised, by vector.
    Interrupts,
    /// Requests that were in flight when the first step of the stop was taken, by queue.
    InFlight,
}

/// Answer to a [`Query`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The query's term.
    pub term: Term,
    /// The query's epoch.
    pub epoch: Epoch,
    /// Where the coordinator has brought the device.
    pub state: MigrationState,
    /// Where the client has brought it.
    pub client_state: MigrationState,
    /// Where it is on the way to, if it is in the middle of a command.
    pub moving_to: Option<MigrationState>,
}

/// Answer to a [`MemoryDeclaration`] or a [`Revocation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryAccepted {
    /// Its number.
    pub sequence: u64,
}

/// Sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Grows by one with each.
    pub sequence: u64,
    /// Grows while the data threads work; its unit is the device's own.
    pub progress: u64,
    /// True if the data threads have something to do. Progress that stands still meanwhile, in a
    /// device that runs, is a hung data thread.
    pub pending: bool,
    /// Log lines that were dropped rather than waited for.
    pub dropped_logs: u64,
}

/// Something happened in the device process by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceEvent {
    /// A client connected to the data socket.
    ClientConnected,
    /// The client went away.
    ClientDisconnected,
    /// The client changed the state in band.
    ClientState(MigrationState),
    /// The lease of a stop ran out; the device is in that state now.
    LeaseExpired(MigrationState),
    /// The device cannot go on; at most [`MAX_TEXT`] bytes.
    Failed(String),
    /// Another coordinator, with this higher term, has the device; nothing more comes.
    Superseded(Term),
}
