//! The deadlines of a machine for the faults of its plan.

use super::Times;
use super::nature::{self, HELLO, HELLO_AGAIN, HELLO_EACH_TIME, Nature, nature};
use super::principal::principals;
use crate::plan::{Cause, Plan};
use standstill_coordinator::Deadlines;
use standstill_protocol::fault::{Action, Point};
use std::time::Duration;

/// How many short deadlines devices have for their Hello, or to answer a query, if one will be silent there:
/// those that greet have to begin, and all have the same deadline, on CPUs that have much to do.
pub(super) const HELLOS: u32 = 10;

/// Deadlines that nobody misses who is not made to.
pub(super) fn deadlines(plan: &Plan, times: &Times) -> Deadlines {
    // With several faults, one who is silent may have to confirm that windows onto another are revoked.
    let several = principals(plan).len() > 1;
    let silent_at_memory = plan.faults.iter().any(|injection| {
        nature(&injection.cause, times) == Nature::Silent
            && (several
                || matches!(&injection.cause, Cause::Inside(fault) if fault.point == Point::Memory))
    });
    let silent_at_hello = plan.faults.iter().any(|injection| {
        nature(&injection.cause, times) == Nature::Silent
            && matches!(&injection.cause, Cause::Inside(fault) if fault.point == Point::Hello)
    });
    let silent_at_query = plan.faults.iter().any(|injection| {
        nature(&injection.cause, times) == Nature::Silent
            && matches!(&injection.cause, Cause::Inside(fault) if fault.point == Point::Query)
    });
    Deadlines {
        hello: if silent_at_hello { HELLOS * times.short } else { times.long },
        first_phase: if silent_at_query { HELLOS * times.short } else { times.long },
        second_phase: times.long,
        undo: 4 * times.long,
        fence: times.long,
        memory: if silent_at_memory { times.memory } else { times.long },
        // A device that hangs outside of any transition is looked for in tests of its own.
        stall: Duration::ZERO,
        silence: Duration::ZERO,
    }
}

/// Whether a device has a short deadline in the first and in the second phase: where it will be silent,
/// and nowhere else, so that a busy machine gives no loss that was not planned.
pub(super) fn short_deadlines(plan: &Plan, device: u16, times: &Times) -> (bool, bool) {
    let mut short = (false, false);
    let silent = |cause: &Cause| nature(cause, times) == Nature::Silent;
    for fault in plan.faults.iter().filter(|f| f.device == device && silent(&f.cause)) {
        let Some(place) = nature::place(fault) else { continue };
        if principals(plan).len() > 1 {
            // It may be silent in the undo that another fault leads to.
            return (true, true);
        }
        // After an answer, it is the next command that gets none.
        let stops = match &fault.cause {
            Cause::Inside(inside) => matches!(inside.action, Action::Stop),
            Cause::Outside(outside) => !outside.action.needs_a_packet(),
        };
        let next = place.row == "after-ack" || (place.row == "answer" && stops);
        let (first, second) = match (place.column, next) {
            ("PrepareStop" | "PrepareStart", false) | ("Stop" | "Start", true) => (true, false),
            ("Stop" | "Start", false) | ("PrepareStop" | "PrepareStart", true) => (false, true),
            ("memory", _) => (true, false),
            ("shutdown" | HELLO | HELLO_AGAIN | HELLO_EACH_TIME, _) => (false, false),
            _ => (true, true),
        };
        short = (short.0 || first, short.1 || second);
    }
    short
}
