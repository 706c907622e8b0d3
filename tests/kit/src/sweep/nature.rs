//! What kind of thing a fault is: its word in the table of outcomes, its place there, and what it does
//! to the one who has it.

use super::Times;
use crate::plan::{Cause, Injection, Moment, Outside, OutsideAction, Resource};
use standstill_protocol::channel::CoordinatorEnd;
use standstill_protocol::fault::{Action, Fault, Forgery, Packet, Point};
use standstill_protocol::message::Phase;
use std::sync::OnceLock;

/// What a fault does to its device, as the coordinator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Nature {
    /// The device is lost at once, without any deadline.
    Ends,
    /// It does not answer, or not in time, or to something that was not asked: it is lost at the
    /// deadline.
    Silent,
    /// It refuses, or nothing comes of it.
    Lives,
}

/// More signs of life than that in a second are too many for any coordinator; see
/// `docs/protocol.md`.
const FLOOD: u32 = 1000;
/// More fds than anybody has asked for, which get through or are refused by the kernel.
const FD_FLOOD: &str = "fd-flood";
const FD_FLOOD_REFUSED: &str = "fd-flood-refused";

/// Whether fds reach a coordinator that has not asked for them: a kernel of 6.16 or later lets a socket
/// refuse them, and whoever sends them gets an error. Not before a Hello, with which fds may come.
fn fds_get_through(point: Point) -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    point == Point::Hello
        || *KNOWN
            .get_or_init(|| CoordinatorEnd::pair().and_then(|(end, _)| end.refuse_fds()).is_err())
}

/// The word of the same fault on a kernel that takes it otherwise.
pub(super) fn on_another_kernel(word: &str) -> Option<&'static str> {
    match word {
        FD_FLOOD => Some(FD_FLOOD_REFUSED),
        FD_FLOOD_REFUSED => Some(FD_FLOOD),
        _ => None,
    }
}

/// What a fault does.
#[must_use]
pub fn nature(cause: &Cause, times: &Times) -> Nature {
    let late = |ms: u32| {
        if u128::from(ms) >= times.short.as_millis() { Nature::Silent } else { Nature::Lives }
    };
    match cause {
        Cause::Inside(fault) => match fault.action {
            Action::Exit(_)
            | Action::Abort
            | Action::Segv
            | Action::Send(_)
            | Action::Forge(Forgery::State)
            | Action::Disconnect => Nature::Ends,
            Action::FdFlood(_) if fds_get_through(fault.point) => Nature::Ends,
            Action::MessageFlood(count) if count > FLOOD => Nature::Ends,
            Action::Spin | Action::DelayMs(_) if fault.point == Point::Dma => Nature::Lives,
            Action::Stop | Action::Spin | Action::NoAck | Action::Forge(_) => Nature::Silent,
            Action::DelayMs(ms) => late(ms),
            Action::TwoAcks
            | Action::Refuse(_)
            | Action::FdFlood(_)
            | Action::MessageFlood(_)
            | Action::KeepDma => Nature::Lives,
        },
        Cause::Outside(outside) => match outside.action {
            OutsideAction::Kill
            | OutsideAction::Corrupt
            | OutsideAction::CorruptAt(_)
            | OutsideAction::Split
            | OutsideAction::Cut => Nature::Ends,
            // The next packet may not come.
            OutsideAction::StopMs(0) | OutsideAction::Drop | OutsideAction::Merge => Nature::Silent,
            OutsideAction::StopMs(ms) | OutsideAction::DelayMs(ms) => late(ms),
            // The next packet from a device is a sign of life, which comes soon; to it, none comes.
            OutsideAction::Swap if matches!(outside.moment, Moment::Command(_)) => Nature::Silent,
            OutsideAction::Hold
            | OutsideAction::Duplicate
            | OutsideAction::Swap
            | OutsideAction::Limit(_)
            | OutsideAction::KillCoordinator
            | OutsideAction::StopCoordinatorMs(_) => Nature::Lives,
        },
    }
}

/// The fault's word in the table of outcomes.
#[must_use]
pub fn word(cause: &Cause, times: &Times) -> &'static str {
    let delay = |ms: u32, short, long| {
        if u128::from(ms) >= times.short.as_millis() { long } else { short }
    };
    match cause {
        Cause::Inside(fault) => match fault.action {
            Action::Exit(_) => "exit",
            Action::Abort => "abort",
            Action::Segv => "segv",
            Action::Stop => "stop",
            Action::Spin => "spin",
            Action::DelayMs(ms) => delay(ms, "short-delay", "long-delay"),
            Action::NoAck => "no-ack",
            Action::TwoAcks => "two-acks",
            Action::Forge(Forgery::LowerTerm) => "forge-lower-term",
            Action::Forge(Forgery::HigherTerm) => "forge-higher-term",
            Action::Forge(Forgery::EarlierEpoch) => "forge-earlier-epoch",
            Action::Forge(Forgery::LaterEpoch) => "forge-later-epoch",
            Action::Forge(Forgery::Phase) => "forge-phase",
            Action::Forge(Forgery::State) => "forge-state",
            Action::Forge(Forgery::Declaration) => "forge-declaration",
            Action::Refuse(_) => "refuse",
            Action::Send(Packet::Garbage) => "send-garbage",
            Action::Send(Packet::Empty) => "send-empty",
            Action::Send(Packet::Truncated) => "send-truncated",
            Action::Send(Packet::Oversized) => "send-oversized",
            Action::FdFlood(_) if fds_get_through(fault.point) => FD_FLOOD,
            Action::FdFlood(_) => FD_FLOOD_REFUSED,
            Action::MessageFlood(count) if count > FLOOD => "message-flood",
            Action::MessageFlood(_) => "messages",
            Action::Disconnect => "disconnect",
            Action::KeepDma => "keep-dma",
        },
        Cause::Outside(Outside { action, .. }) => match *action {
            OutsideAction::Kill => "kill",
            OutsideAction::StopMs(0) => "sigstop",
            OutsideAction::StopMs(ms) => delay(ms, "short-sigstop", "long-sigstop"),
            OutsideAction::DelayMs(ms) => delay(ms, "late-packet", "too-late-packet"),
            OutsideAction::Hold => "hold",
            OutsideAction::Drop => "drop",
            OutsideAction::Duplicate => "duplicate",
            OutsideAction::Corrupt => "corrupt",
            OutsideAction::CorruptAt(_) => "corrupt-at",
            OutsideAction::Split => "split",
            OutsideAction::Merge => "merge",
            OutsideAction::Swap => "swap",
            OutsideAction::Cut => "cut",
            OutsideAction::Limit(limit) => limit_word(limit.resource),
            OutsideAction::KillCoordinator => "kill-coordinator",
            OutsideAction::StopCoordinatorMs(0) => "stop-coordinator",
            OutsideAction::StopCoordinatorMs(ms) => {
                delay(ms, "short-stop-coordinator", "long-stop-coordinator")
            }
        },
    }
}

/// A limit's word in the table, however much it leaves.
fn limit_word(resource: Resource) -> &'static str {
    match resource {
        Resource::AddressSpace => "limit-address-space",
        Resource::Data => "limit-data",
        Resource::Files => "limit-files",
        Resource::Processes => "limit-processes",
        Resource::FileSize => "limit-file-size",
        Resource::LockedMemory => "limit-locked-memory",
    }
}

/// Where a fault stands in the table of outcomes: a row's place and a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// `receipt`, `before-ack`, `after-ack`, `after-last-ack`, `command` or `answer`; `-` for faults that
    /// belong to no phase.
    pub row: &'static str,
    /// A phase, or `running`, `stopped`, `mmio`, `dma`, `dma-in-flight`, `memory` or `shutdown`.
    pub column: &'static str,
}

/// The column of faults at the Hello with which a device greets when its machine starts.
pub(super) const HELLO: &str = "hello";
/// The column of those at its Hello after it was lost, in the first process that greets again.
pub(super) const HELLO_AGAIN: &str = "hello again";
/// The column of those in every process that does.
pub(super) const HELLO_EACH_TIME: &str = "hello each time";

/// The column of those at the query of a take-over.
pub(super) const QUERY: &str = "query";

/// The row place of faults after an ack that was the last one of its phase.
pub(super) const AFTER_LAST_ACK: &str = "after-last-ack";
/// The row place of what is done with an answer under way that is the last one of its phase.
pub(super) const LAST_ANSWER: &str = "last-answer";

/// Where a fault stands; `None` if pausing and resuming a machine never gets there.
#[must_use]
pub fn place(injection: &Injection) -> Option<Place> {
    let of = |row, phase| Some(Place { row, column: phase_word(phase)? });
    let apart = |column| Some(Place { row: "-", column });
    match &injection.cause {
        Cause::Inside(fault) => match fault.point {
            Point::Receipt(phase) => of("receipt", phase),
            Point::BeforeAck(phase) => of("before-ack", phase),
            Point::AfterAck(phase) => of("after-ack", phase),
            Point::Memory => apart("memory"),
            Point::Shutdown => apart("shutdown"),
            Point::Mmio => apart("mmio"),
            Point::Dma => apart("dma"),
            Point::DmaInFlight => apart("dma-in-flight"),
            Point::Hello => apart(match fault.nth {
                _ if injection.round == 1 => HELLO,
                0 => HELLO_EACH_TIME,
                _ => HELLO_AGAIN,
            }),
            Point::Query => apart(QUERY),
            Point::Saving | Point::Loading => None,
        },
        Cause::Outside(outside) => match outside.moment {
            Moment::Running => apart("running"),
            Moment::Stopped => apart("stopped"),
            Moment::Command(phase) => of("command", phase),
            Moment::Answer(phase) => of("answer", phase),
            Moment::Packet(_) => None,
        },
    }
}

/// Why a plan is refused in which a coordinator's fault is not the only one.
pub(super) const NOT_ALONE: &str =
    "nothing is known of what comes of a coordinator's fault together with others";

/// Whether it is the coordinator that has this fault.
pub(super) fn hits_the_coordinator(cause: &Cause) -> bool {
    matches!(cause, Cause::Outside(outside) if outside.action.hits_the_coordinator())
}

/// The column of a phase of a pause or resume.
fn phase_word(phase: Phase) -> Option<&'static str> {
    match phase {
        Phase::PrepareStop => Some("PrepareStop"),
        Phase::Stop => Some("Stop"),
        Phase::PrepareStart => Some("PrepareStart"),
        Phase::Start => Some("Start"),
        Phase::Save | Phase::Load | Phase::Reset => None,
    }
}

/// Whether `death` is there so that its device greets again, with the fault that it has then.
pub(super) fn leads_to_hello(death: &Injection, fault: &Injection) -> bool {
    let kill = Outside { moment: Moment::Running, action: OutsideAction::Kill };
    let hello = matches!(&fault.cause, Cause::Inside(fault) if fault.point == Point::Hello);
    hello
        && fault.round > 1
        && death.cause == Cause::Outside(kill)
        && (death.device, death.round) == (fault.device, fault.round)
}

/// Whether `loss` is there so that its machine is taken over, and a device is asked, with the fault that it
/// has then.
pub(super) fn leads_to_query(loss: &Injection, fault: &Injection) -> bool {
    let kill = Outside { moment: Moment::Running, action: OutsideAction::KillCoordinator };
    let query = matches!(&fault.cause, Cause::Inside(fault) if fault.point == Point::Query);
    query && loss.cause == Cause::Outside(kill) && loss.round == fault.round
}

/// Whether somebody else's answer is held back in the phase after whose ack this fault comes: it is
/// certain then that it comes before the last ack.
pub(super) fn others_are_held(fault: &Injection, all: &[Injection]) -> bool {
    all.iter().any(|other| holds_others_back(other, fault))
}

/// Whether `hold` is there for the sake of `fault`: see [`others_are_held`].
pub(super) fn holds_others_back(hold: &Injection, fault: &Injection) -> bool {
    let phase = match &fault.cause {
        Cause::Inside(fault) => match fault.point {
            Point::AfterAck(phase) => phase,
            _ => return false,
        },
        Cause::Outside(outside) => match outside.moment {
            Moment::Answer(phase) if outside.action != OutsideAction::Hold => phase,
            _ => return false,
        },
    };
    let held = Outside { moment: Moment::Answer(phase), action: OutsideAction::Hold };
    (hold.round, &hold.cause) == (fault.round, &Cause::Outside(held)) && hold.device != fault.device
}

/// Whether a device that has this fault, and is not lost by it, can be expected to go on working.
pub(super) fn goes_on(cause: &Cause, times: &Times) -> bool {
    match cause {
        Cause::Inside(Fault { action: Action::Spin, .. }) => false,
        // Nobody waits for the end of such a DMA.
        Cause::Inside(Fault { action: Action::DelayMs(ms), .. }) => {
            u128::from(*ms) < times.short.as_millis()
        }
        _ => nature(cause, times) == Nature::Lives,
    }
}
