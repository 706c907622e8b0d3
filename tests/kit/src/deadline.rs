//! Calls must end in time, whatever the devices do.

#![expect(clippy::panic, reason = "a check fails by a panic")]

use standstill_coordinator::Deadlines;
use std::time::{Duration, Instant};

/// What a call may take beyond its deadline; long, since tests run on busy machines.
pub const GRACE: Duration = Duration::from_secs(2);

/// Awaits a call and checks that it ends within its deadline and [`GRACE`].
///
/// # Panics
///
/// If it does not; `what` says which call it was.
pub async fn within<F: Future>(deadline: Duration, what: &str, call: F) -> F::Output {
    let began = Instant::now();
    let limit = deadline + GRACE;
    let Ok(output) = tokio::time::timeout(limit, call).await else {
        panic!("{what} has not ended after {:?}; its deadline is {deadline:?}", began.elapsed());
    };
    // A blocked runtime sees its own timers late.
    let took = began.elapsed();
    assert!(took <= limit, "{what} took {took:?}; its deadline is {deadline:?}");
    output
}

/// Deadlines of a machine that are all as long as this, but for that of an undo, which has several
/// phases: for tests in which none of them runs out.
#[must_use]
pub fn deadlines_of(longest: Duration) -> Deadlines {
    Deadlines {
        hello: longest,
        first_phase: longest,
        second_phase: longest,
        undo: 4 * longest,
        fence: longest,
        memory: longest,
        stall: longest,
        silence: longest,
    }
}
