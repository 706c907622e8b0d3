//! What a device process can be told to do wrong, to see what becomes of its machine.
//!
//! These are words only. A device process whose program was built with the feature
//! `fault-injection` takes them with an `Arm` message, or at its start as an [`Armament`], and does
//! what they say; to every other one that message is an unknown tag and the variable means nothing.
//! `docs/fault-injection.md` says how they are used.
//!
//! ```
//! use standstill_protocol::fault::{Action, Fault, Point};
//! use standstill_protocol::message::Phase;
//!
//! // Exits when it would answer the second PrepareStop that it gets from now on.
//! let fault = Fault::new(Point::BeforeAck(Phase::PrepareStop), Action::Exit(1)).nth(2);
//! assert_eq!(fault.to_string(), "exit with status 1 before the ack of PrepareStop, occurrence 2");
//! ```

#![forbid(unsafe_code)]

use crate::message::Phase;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// The most faults that one message arms.
pub const MAX_FAULTS: usize = 16;

/// The environment variable with an [`Armament`], as JSON.
pub const VARIABLE: &str = "STANDSTILL_FAULTS";

/// What a device process is armed with before anybody can tell it anything: for faults at its first
/// Hello.
///
/// ```json
/// {"journal":"/tmp/journal","faults":[{"point":"hello","nth":1,"action":"no-ack"}]}
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Armament {
    /// The file to which [`JournalLine`]s are appended; made if it is not there.
    pub journal: PathBuf,
    /// What it does wrong.
    pub faults: Vec<Fault>,
}

/// One thing that a device process does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Fault {
    /// Where.
    pub point: Point,
    /// The how-manieth time that the process gets there after it was armed, from 1; every time if 0.
    #[serde(default = "first")]
    pub nth: u32,
    /// What it does there.
    pub action: Action,
}

const fn first() -> u32 {
    1
}

impl Fault {
    /// Does this the next time that the process gets there.
    #[must_use]
    pub const fn new(point: Point, action: Action) -> Self {
        Self { point, nth: 1, action }
    }

    /// Does it the `nth` time instead, from 1; every time if 0.
    #[must_use]
    pub const fn nth(self, nth: u32) -> Self {
        Self { nth, ..self }
    }

    /// Whether the action can be done at the point.
    #[must_use]
    pub const fn is_possible(&self) -> bool {
        self.action.fits(self.point)
    }
}

/// Where in a device process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// Before it says Hello, at its start or to a coordinator that takes the machine over.
    Hello,
    /// It has read a command of that phase and has done nothing about it.
    Receipt(Phase),
    /// It has carried out a command of that phase, and would answer.
    BeforeAck(Phase),
    /// It has answered a command of that phase.
    AfterAck(Phase),
    /// It has read a query.
    Query,
    /// It would answer a memory declaration or a revocation.
    Memory,
    /// It has read that it is to end.
    Shutdown,
    /// It writes a piece of its state stream.
    Saving,
    /// It reads a piece of its state stream.
    Loading,
    /// Its client accesses a register; on the thread that serves the client.
    Mmio,
    /// One of its threads is about to do DMA, and may be kept from it by the gate.
    Dma,
    /// One of its threads does DMA: the gate waits for it.
    DmaInFlight,
}

impl Point {
    /// The phase that it belongs to, if it belongs to one.
    #[must_use]
    pub const fn phase(self) -> Option<Phase> {
        match self {
            Self::Receipt(phase) | Self::BeforeAck(phase) | Self::AfterAck(phase) => Some(phase),
            Self::Saving => Some(Phase::Save),
            Self::Loading => Some(Phase::Load),
            Self::Hello
            | Self::Query
            | Self::Memory
            | Self::Shutdown
            | Self::Mmio
            | Self::Dma
            | Self::DmaInFlight => None,
        }
    }
}

/// What a device process does at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It exits with this status.
    Exit(u8),
    /// It ends itself by SIGABRT.
    Abort,
    /// It ends itself by SIGSEGV.
    Segv,
    /// It stops itself by SIGSTOP.
    Stop,
    /// The thread that got there goes round in an endless loop.
    Spin,
    /// The thread that got there waits for that many milliseconds, and goes on.
    DelayMs(u32),
    /// It does not answer.
    NoAck,
    /// It answers twice.
    TwoAcks,
    /// It answers wrongly, and not rightly.
    Forge(Forgery),
    /// It refuses, for the reason that has this `errno`, and does nothing.
    Refuse(i32),
    /// It sends this in place of its answer, or of a piece of the state that it saves.
    Send(Packet),
    /// It sends that many packets with as many file descriptors as a packet can have, and goes on.
    FdFlood(u32),
    /// It sends that many signs of life as fast as they are taken, and goes on.
    MessageFlood(u32),
    /// It closes its control channel and lives on.
    Disconnect,
    /// It goes on and answers, but the gate holds no DMA any more: it writes to peers and to guest
    /// RAM as if it ran, until it is started. An oracle that does not notice proves nothing.
    KeepDma,
}

impl Action {
    /// Whether it can be done at that point: some need an answer that they can spoil, and what is
    /// done to the control channel is done by the thread that has it.
    #[must_use]
    pub const fn fits(self, point: Point) -> bool {
        match self {
            Self::Exit(_)
            | Self::Abort
            | Self::Segv
            | Self::Stop
            | Self::Spin
            | Self::DelayMs(_) => true,
            Self::NoAck => matches!(
                point,
                Point::Hello
                    | Point::Receipt(_)
                    | Point::BeforeAck(_)
                    | Point::Query
                    | Point::Memory
                    | Point::Shutdown
            ),
            Self::TwoAcks => {
                matches!(point, Point::Hello | Point::BeforeAck(_) | Point::Query | Point::Memory)
            }
            Self::Forge(Forgery::Declaration) => matches!(point, Point::Memory),
            Self::Forge(Forgery::Phase) => {
                matches!(point, Point::BeforeAck(phase) if !matches!(phase, Phase::Reset))
            }
            Self::Forge(_) => matches!(point, Point::BeforeAck(_)),
            Self::Refuse(_) => {
                matches!(point, Point::Receipt(_) | Point::Saving | Point::Loading)
            }
            Self::Send(_) if matches!(point, Point::Saving) => true,
            Self::Send(_) | Self::FdFlood(_) | Self::MessageFlood(_) | Self::Disconnect => {
                !matches!(
                    point,
                    Point::Saving | Point::Loading | Point::Mmio | Point::Dma | Point::DmaInFlight
                )
            }
            Self::KeepDma => matches!(
                point,
                Point::BeforeAck(Phase::PrepareStop | Phase::Stop)
                    | Point::AfterAck(Phase::PrepareStop | Phase::Stop)
            ),
        }
    }
}

/// What about an answer is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Forgery {
    /// It names a term that is lower by one.
    LowerTerm,
    /// It names a term that is higher by one.
    HigherTerm,
    /// It names the epoch before.
    EarlierEpoch,
    /// It names an epoch that has not been.
    LaterEpoch,
    /// It names the other phase of the same direction; Load instead of Save, or Save of Load.
    Phase,
    /// It names the state that the device should have left.
    State,
    /// It answers a memory declaration that was another device's. (Answers to commands do not say
    /// whose they are: their channel does.)
    Declaration,
}

/// A packet that is no message, or a piece of saved state that is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packet {
    /// 64 bytes that are no message. A piece with other contents than it should have.
    Garbage,
    /// No bytes. No piece.
    Empty,
    /// The answer without its last byte; half a sign of life where there is no answer. Neither this
    /// piece nor anything after it, as if all had been saved.
    Truncated,
    /// More bytes than a packet may have. A piece that claims to be longer than one may be.
    Oversized,
}

/// A line of the journal in which an armed process says what it does: the proof that a fault was
/// not only planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalLine {
    /// That many faults more are armed.
    Armed(u32),
    /// A fault is about to be done.
    Fired {
        /// Which: its place in the message (or the [`Armament`]) that armed it, from 0.
        index: u32,
        /// The how-manieth time that the process got to its point, from 1.
        occurrence: u32,
        /// When, by `CLOCK_MONOTONIC`, in nanoseconds.
        at_ns: u64,
    },
}

impl JournalLine {
    /// Reads a line, without its line feed; `None` if it is none.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let read = match (words.next()?, words.next()?) {
            ("armed", count) => Self::Armed(count.parse().ok()?),
            ("fired", index) => Self::Fired {
                index: index.parse().ok()?,
                occurrence: words.next()?.parse().ok()?,
                at_ns: words.next()?.parse().ok()?,
            },
            _ => return None,
        };
        words.next().is_none().then_some(read)
    }
}

impl fmt::Display for JournalLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Armed(count) => write!(f, "armed {count}"),
            Self::Fired { index, occurrence, at_ns } => {
                write!(f, "fired {index} {occurrence} {at_ns}")
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.action, self.point)?;
        match self.nth {
            0 => f.write_str(", every time"),
            1 => Ok(()),
            nth => write!(f, ", occurrence {nth}"),
        }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello => f.write_str("before its Hello"),
            Self::Receipt(phase) => write!(f, "at the receipt of {phase}"),
            Self::BeforeAck(phase) => write!(f, "before the ack of {phase}"),
            Self::AfterAck(phase) => write!(f, "after the ack of {phase}"),
            Self::Query => f.write_str("at a query"),
            Self::Memory => f.write_str("before the ack of a memory declaration"),
            Self::Shutdown => f.write_str("at Shutdown"),
            Self::Saving => f.write_str("while its state is saved"),
            Self::Loading => f.write_str("while its state is loaded"),
            Self::Mmio => f.write_str("in a register access"),
            Self::Dma => f.write_str("before a DMA"),
            Self::DmaInFlight => f.write_str("in the middle of a DMA"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(status) => write!(f, "exit with status {status}"),
            Self::Abort => f.write_str("abort"),
            Self::Segv => f.write_str("segmentation fault"),
            Self::Stop => f.write_str("SIGSTOP to itself"),
            Self::Spin => f.write_str("endless loop"),
            Self::DelayMs(ms) => write!(f, "delay of {ms} ms"),
            Self::NoAck => f.write_str("no answer"),
            Self::TwoAcks => f.write_str("two answers"),
            Self::Forge(forgery) => write!(f, "answer with {forgery}"),
            Self::Refuse(errno) => write!(f, "refusal with errno {errno}"),
            Self::Send(packet) => write!(f, "{packet} packet"),
            Self::FdFlood(count) => write!(f, "{count} packets full of fds"),
            Self::MessageFlood(count) => write!(f, "{count} messages"),
            Self::Disconnect => f.write_str("closed control channel"),
            Self::KeepDma => f.write_str("DMA that goes on"),
        }
    }
}

impl fmt::Display for Forgery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LowerTerm => "a lower term",
            Self::HigherTerm => "a higher term",
            Self::EarlierEpoch => "an earlier epoch",
            Self::LaterEpoch => "a later epoch",
            Self::Phase => "the other phase",
            Self::State => "a wrong state",
            Self::Declaration => "another device's declaration",
        })
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Garbage => "a garbage",
            Self::Empty => "an empty",
            Self::Truncated => "a truncated",
            Self::Oversized => "an oversized",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_line_is_read_as_it_was_written() {
        let fired = JournalLine::Fired { index: 3, occurrence: 7, at_ns: u64::MAX };
        for line in [JournalLine::Armed(2), fired] {
            assert_eq!(JournalLine::parse(&line.to_string()), Some(line));
        }
        for other in ["", "armed", "armed x", "armed 1 2", "fired 1 2", "fired 1 2 3 4", "hello 1"]
        {
            assert_eq!(JournalLine::parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn what_spoils_an_answer_needs_one() {
        let ack = Point::BeforeAck(Phase::Stop);
        assert!(Fault::new(ack, Action::Forge(Forgery::Phase)).is_possible());
        assert!(Fault::new(Point::Dma, Action::Spin).is_possible());
        assert!(!Fault::new(Point::Dma, Action::NoAck).is_possible());
        assert!(!Fault::new(Point::AfterAck(Phase::Stop), Action::TwoAcks).is_possible());
        assert!(!Fault::new(ack, Action::Forge(Forgery::Declaration)).is_possible());
        assert!(!Fault::new(Point::Receipt(Phase::Start), Action::KeepDma).is_possible());
        assert!(Fault::new(Point::Saving, Action::Send(Packet::Truncated)).is_possible());
        assert!(!Fault::new(Point::Loading, Action::Send(Packet::Truncated)).is_possible());
        assert!(!Fault::new(Point::Saving, Action::Disconnect).is_possible());
        let reset = Point::BeforeAck(Phase::Reset);
        assert!(!Fault::new(reset, Action::Forge(Forgery::Phase)).is_possible());
    }
}
