//! Counts restarts against their budget. No clock: the caller says what time it is.

use crate::policy::RestartPolicy;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The restarts of one device that still count.
#[derive(Debug, Default)]
pub(crate) struct Restarts(VecDeque<Instant>);

/// A restart that the budget allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// The how-manieth within the window, from 1.
    pub(crate) number: u32,
    /// How long to wait before it.
    pub(crate) after: Duration,
}

impl Restarts {
    /// Charges a restart to the budget; `None` if it is used up.
    pub(crate) fn charge(&mut self, policy: &RestartPolicy, now: Instant) -> Option<Attempt> {
        let in_window = |at: &Instant| now.saturating_duration_since(*at) < policy.window;
        self.0.retain(in_window);
        let before = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        if before >= policy.budget {
            return None;
        }
        self.0.push_back(now);
        let doubled = policy.first_backoff.saturating_mul(1_u32.checked_shl(before).unwrap_or(0));
        let after = if before >= 31 { policy.longest_backoff } else { doubled };
        Some(Attempt { number: before + 1, after: after.min(policy.longest_backoff) })
    }

    /// The owner wants it: whatever was before is forgiven.
    pub(crate) fn forgive(&mut self) {
        self.0.clear();
    }

    /// How many were charged and still counted at the last charge.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: RestartPolicy = RestartPolicy {
        budget: 4,
        window: Duration::from_secs(10),
        first_backoff: Duration::from_millis(10),
        longest_backoff: Duration::from_millis(35),
    };

    #[test]
    fn the_wait_doubles_up_to_its_longest_and_the_budget_ends() {
        let (mut restarts, now) = (Restarts::default(), Instant::now());
        let waits: Vec<_> =
            (0..6).map(|_| restarts.charge(&POLICY, now).map(|a| a.after.as_millis())).collect();
        assert_eq!(waits, [Some(10), Some(20), Some(35), Some(35), None, None]);
        let later = now + POLICY.window;
        let first = Attempt { number: 1, after: POLICY.first_backoff };
        assert_eq!(restarts.charge(&POLICY, later), Some(first));
        restarts.forgive();
        assert_eq!(restarts.charge(&POLICY, later), Some(first));
    }

    #[test]
    fn a_huge_budget_never_waits_longer_than_the_longest() {
        let policy = RestartPolicy { budget: u32::MAX, ..POLICY };
        let (mut restarts, now) = (Restarts::default(), Instant::now());
        for number in 1..100 {
            let attempt = restarts.charge(&policy, now).unwrap();
            assert_eq!(attempt.number, number);
            assert!(attempt.after <= policy.longest_backoff);
        }
    }

    proptest! {
        #[test]
        fn no_window_has_more_restarts_than_the_budget(
            gaps in prop::collection::vec(0_u64..4000, 1..60),
            budget in 0_u32..6,
        ) {
            let policy = RestartPolicy { budget, ..POLICY };
            let mut restarts = Restarts::default();
            let mut now = Instant::now();
            let mut granted = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                if restarts.charge(&policy, now).is_some() {
                    granted.push(now);
                }
            }
            for &end in &granted {
                let within = granted.iter().filter(|&&at| at <= end && end - at < policy.window);
                prop_assert!(within.count() <= budget as usize);
            }
        }
    }
}
