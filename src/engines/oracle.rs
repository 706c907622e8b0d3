//! Did the machine really stand still? Pure checks of one round; what goes in is evidence of the
//! devices, and what the VMM saw through its own mappings of the same memory.
//!
//! The engines ignore every request to stop and keep trying to write, so nothing here is a matter
//! of good will:
//!
//! - for every ordered pair, the writer's last sequence number when it said that it is quiet is
//!   what the receiver finds in its mailbox when its `Stop` arrives and when it leaves STOP, and
//!   what the VMM finds there after the last `StopAck` and before the first `PrepareStart`;
//! - each device's hash of its memory in its `StopAck` is what the VMM hashes at both moments; so
//!   is guest RAM at both;
//! - no interrupt comes in between, and no counter of a device moves.
//!
//! What is missing counts as a failed check: nothing is ever guessed.

use super::pairs::Pair;
use standstill_protocol::message::{Counter, CounterKind, Evidence};
use std::fmt;

/// What one device showed in a round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Proof {
    /// With the answer that promises no more writes to peers: `PrepareStopAck`, or `StopAck`
    /// where the first phase is left out.
    pub(crate) quiet: Evidence,
    /// With its `StopAck`: mailboxes as of the moment when its `Stop` arrived.
    pub(crate) stopped: Evidence,
    /// With its `PrepareStartAck`: everything as of the moment when it arrived.
    pub(crate) leaving: Evidence,
}

/// What the VMM saw by itself at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sight {
    /// What the mailbox of each pair holds, in the order of the pairs.
    pub(crate) mailboxes: Vec<u64>,
    /// Hash of each device's memory.
    pub(crate) memory: Vec<u64>,
    /// Hash of guest RAM.
    pub(crate) ram: u64,
}

/// Everything about one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round<'a> {
    /// Who writes into whose memory.
    pub(crate) pairs: &'a [Pair],
    /// What each device showed; `None` of one that took no part, of which nothing is checked.
    pub(crate) proofs: &'a [Option<Proof>],
    /// What the VMM saw after the last `StopAck`.
    pub(crate) after_stop: &'a Sight,
    /// What it saw before the first `PrepareStart`.
    pub(crate) before_start: &'a Sight,
    /// How many interrupts came from each device between these two moments.
    pub(crate) interrupts: &'a [u64],
}

/// Where a pair's sequence number was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// By the receiver, when its `Stop` arrived.
    ReceiverStopping,
    /// By the VMM, after the last `StopAck`.
    VmmAfterStop,
    /// By the VMM, before the first `PrepareStart`.
    VmmBeforeStart,
    /// By the receiver, when it was told to leave STOP.
    ReceiverLeaving,
}

/// A check that failed: something was written, or raised, that should not have been. `None` where
/// a value is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LateWrite {
    /// A receiver's mailbox does not hold what the writer last wrote before it was quiet.
    Mailbox { pair: Pair, place: Place, written: Option<u64>, found: Option<u64> },
    /// The VMM hashes something else after the last `StopAck` than the device before its own.
    MemoryAfterAck { device: usize, device_hash: Option<u64>, found: Option<u64> },
    /// A device's memory changed while it was stopped.
    MemoryWhileStopped { device: usize, before: Option<u64>, after: Option<u64> },
    /// Guest RAM changed while all devices were stopped.
    Ram { before: u64, after: u64 },
    /// Interrupts came while the device was stopped.
    Interrupt { device: usize, count: Option<u64> },
    /// A counter of the device moved while it was stopped.
    Counter { device: usize, kind: CounterKind, index: u32, before: u64, after: Option<u64> },
}

/// What came of a round's checks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// How many checks were made.
    pub(crate) checks: u64,
    /// Those that failed.
    pub(crate) late: Vec<LateWrite>,
}

impl Verdict {
    fn check(&mut self, holds: bool, otherwise: impl FnOnce() -> LateWrite) {
        self.checks += 1;
        if !holds {
            self.late.push(otherwise());
        }
    }
}

/// The last sequence number that a device's descriptor wrote.
pub(crate) fn written(evidence: &Evidence, descriptor: u32) -> Option<u64> {
    counter(evidence, CounterKind::Written, descriptor)
}

fn counter(evidence: &Evidence, kind: CounterKind, index: u32) -> Option<u64> {
    let mut counters = evidence.counters.iter();
    counters.find(|c| (c.kind, c.index) == (kind, index)).map(|c| c.value)
}

/// Makes every check of a round.
pub(crate) fn check(round: &Round<'_>) -> Verdict {
    let mut verdict = Verdict::default();
    for (at, pair) in round.pairs.iter().enumerate() {
        check_pair(round, at, *pair, &mut verdict);
    }
    for (device, proof) in round.proofs.iter().enumerate() {
        if let Some(proof) = proof {
            check_device(round, device, proof, &mut verdict);
        }
    }
    let (before, after) = (round.after_stop.ram, round.before_start.ram);
    verdict.check(before == after, || LateWrite::Ram { before, after });
    verdict
}

fn check_pair(round: &Round<'_>, at: usize, pair: Pair, verdict: &mut Verdict) {
    // One that is not there at all counts as one that showed nothing.
    let nothing = Some(Proof::default());
    let proof = |device: usize| round.proofs.get(device).unwrap_or(&nothing).as_ref();
    let (Some(writer), Some(receiver)) = (proof(pair.writer), proof(pair.receiver)) else {
        return;
    };
    let written = written(&writer.quiet, pair.descriptor);
    let received = |evidence| counter(evidence, CounterKind::Received, pair.mailbox);
    let places = [
        (Place::ReceiverStopping, received(&receiver.stopped)),
        (Place::VmmAfterStop, round.after_stop.mailboxes.get(at).copied()),
        (Place::VmmBeforeStart, round.before_start.mailboxes.get(at).copied()),
        (Place::ReceiverLeaving, received(&receiver.leaving)),
    ];
    for (place, found) in places {
        verdict.check(written.is_some() && written == found, || LateWrite::Mailbox {
            pair,
            place,
            written,
            found,
        });
    }
}

fn check_device(round: &Round<'_>, device: usize, proof: &Proof, verdict: &mut Verdict) {
    let device_hash = proof.stopped.memory_hash;
    let before = round.after_stop.memory.get(device).copied();
    let after = round.before_start.memory.get(device).copied();
    verdict.check(device_hash.is_some() && device_hash == before, || LateWrite::MemoryAfterAck {
        device,
        device_hash,
        found: before,
    });
    verdict.check(before.is_some() && before == after, || LateWrite::MemoryWhileStopped {
        device,
        before,
        after,
    });
    let count = round.interrupts.get(device).copied();
    verdict.check(count == Some(0), || LateWrite::Interrupt { device, count });

    // Mailboxes are checked above, against what their writers say.
    let own = proof.stopped.counters.iter().filter(|c| c.kind != CounterKind::Received);
    for &Counter { kind, index, value } in own {
        let after = counter(&proof.leaving, kind, index);
        verdict.check(after == Some(value), || LateWrite::Counter {
            device,
            kind,
            index,
            before: value,
            after,
        });
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReceiverStopping => "in its mailbox when its Stop arrived",
            Self::VmmAfterStop => "in its mailbox (read by the VMM) after the last StopAck",
            Self::VmmBeforeStart => {
                "in its mailbox (read by the VMM) before the first PrepareStart"
            }
            Self::ReceiverLeaving => "in its mailbox when it left STOP",
        })
    }
}

/// A number, or that it is missing.
struct Number(Option<u64>);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, "{value}"),
            None => f.write_str("nothing"),
        }
    }
}

/// A hash, or that it is missing.
struct Hash(Option<u64>);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, "{value:016x}"),
            None => f.write_str("nothing"),
        }
    }
}

impl fmt::Display for LateWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Mailbox { pair: Pair { writer, receiver, .. }, place, written, found } => write!(
                f,
                "engine{writer} had written {} to engine{receiver} when it said that it is quiet, \
                 engine{receiver} has {} {place}",
                Number(written),
                Number(found),
            ),
            Self::MemoryAfterAck { device, device_hash, found } => write!(
                f,
                "engine{device} hashed its memory to {} before its StopAck, the VMM hashes {} \
                 after the last one",
                Hash(device_hash),
                Hash(found),
            ),
            Self::MemoryWhileStopped { device, before, after } => write!(
                f,
                "the memory of engine{device} changed while it was stopped: hash {} became {}",
                Hash(before),
                Hash(after),
            ),
            Self::Ram { before, after } => write!(
                f,
                "guest RAM changed while every device was stopped: hash {before:016x} became \
                 {after:016x}"
            ),
            Self::Interrupt { device, count } => {
                write!(f, "engine{device} raised {} interrupts while it was stopped", Number(count))
            }
            Self::Counter { device, kind, index, before, after } => write!(
                f,
                "counter {kind:?} {index} of engine{device} moved from {before} to {} while it \
                 was stopped",
                Number(after),
            ),
        }
    }
}

#[cfg(test)]
mod tests;
