//! Until when a call may take. The clock is read no earlier than somebody waits: a call that is
//! answered at once costs no look at it.

use std::time::{Duration, Instant};

/// The end of the time that a call has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(End);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Never,
    /// So much from the first look at the clock on.
    Within(Duration),
    At(Instant),
}

impl Deadline {
    /// As long as it takes.
    #[must_use]
    pub const fn never() -> Self {
        Self(End::Never)
    }

    /// So much time, which begins when the call has to wait for something.
    #[must_use]
    pub const fn within(time: Duration) -> Self {
        Self(End::Within(time))
    }

    /// When that is; `None` if there is none. The time runs from now on, if it did not.
    pub(crate) fn at(&mut self) -> Option<Instant> {
        match self.0 {
            End::Never => None,
            End::At(at) => Some(at),
            End::Within(time) => {
                // What is too far away for the clock does not come.
                self.0 = Instant::now().checked_add(time).map_or(End::Never, End::At);
                self.at()
            }
        }
    }

    /// What is left of the time; `None` if it has no end. It runs from now on, if it did not.
    pub(crate) fn left(&mut self) -> Option<Duration> {
        self.at().map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether there is none left.
    pub(crate) fn is_over(&mut self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }

    /// Whether there is this much left. Begins nothing.
    #[inline]
    pub(crate) fn has(&self, time: Duration) -> bool {
        match self.0 {
            End::Never => true,
            End::Within(within) => within >= time,
            End::At(at) => at.saturating_duration_since(Instant::now()) >= time,
        }
    }

    /// Whether it has an end.
    #[inline]
    pub(crate) fn is_finite(&self) -> bool {
        self.0 != End::Never
    }

    /// The call has waited for so long, without a look at the clock.
    pub(crate) fn has_waited(&mut self, time: Duration) {
        if let End::Within(within) = self.0 {
            self.0 = End::Within(within.saturating_sub(time));
            let _ = self.at();
        }
    }
}

impl From<Instant> for Deadline {
    fn from(at: Instant) -> Self {
        Self(End::At(at))
    }
}

/// `None` is as long as it takes.
impl From<Option<Instant>> for Deadline {
    fn from(at: Option<Instant>) -> Self {
        at.map_or(Self::never(), Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn its_time_runs_from_the_first_look_on() {
        let mut deadline = Deadline::within(LONG);
        assert!(deadline.has(LONG), "it has not begun");
        let before = Instant::now();
        let at = deadline.at().expect("an end");
        assert!(at >= before + LONG && at <= Instant::now() + LONG);
        assert_eq!(deadline.at(), Some(at), "it runs");
        assert!(!deadline.has(LONG + Duration::from_nanos(1)));
        assert!(!deadline.is_over());
    }

    #[test]
    fn what_was_waited_counts() {
        let mut deadline = Deadline::within(LONG);
        deadline.has_waited(LONG - Duration::from_secs(60));
        assert!(deadline.left().expect("an end") <= Duration::from_secs(60));
        let mut over = Deadline::within(LONG);
        over.has_waited(2 * LONG);
        assert!(over.is_over());
        // Of one that runs already it was seen.
        let at = Instant::now() + LONG;
        let mut runs = Deadline::from(at);
        runs.has_waited(2 * LONG);
        assert_eq!(runs.at(), Some(at));
    }

    #[test]
    fn what_never_ends_is_never_over() {
        let mut ends = [Deadline::never(), Deadline::from(None), Deadline::within(Duration::MAX)];
        for deadline in &mut ends {
            deadline.has_waited(LONG);
            assert!(deadline.has(LONG) && !deadline.is_over());
        }
        assert!(Deadline::within(Duration::ZERO).is_over());
    }
}
