//! Median, 99th percentile and maximum of many measurements.

use serde::Serialize;

/// How a set of measurements is spread. All zero for an empty set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Spread {
    /// Half of the measurements are at most this.
    pub(crate) p50: u64,
    /// 99 of 100 measurements are at most this.
    pub(crate) p99: u64,
    /// The largest.
    pub(crate) max: u64,
}

impl Spread {
    /// Of these measurements, in any order (nearest rank).
    pub(crate) fn of(values: impl IntoIterator<Item = u64>) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_unstable();
        let rank = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100);
            values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: rank(50), p99: rank(99), max: rank(100) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_measured_is_all_zero() {
        assert_eq!(Spread::of([]), Spread::default());
    }

    #[test]
    fn one_measurement_is_every_percentile() {
        assert_eq!(Spread::of([7]), Spread { p50: 7, p99: 7, max: 7 });
    }

    #[test]
    fn the_nearest_rank_is_taken_whatever_the_order() {
        assert_eq!(Spread::of((1..=100).rev()), Spread { p50: 50, p99: 99, max: 100 });
        assert_eq!(Spread::of([3, 1, 2]), Spread { p50: 2, p99: 3, max: 3 });
        assert_eq!(Spread::of([1, 2, 3, 4]), Spread { p50: 2, p99: 4, max: 4 });
        assert_eq!(Spread::of(1..=1000), Spread { p50: 500, p99: 990, max: 1000 });
    }
}
