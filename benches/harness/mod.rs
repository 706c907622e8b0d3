//! Durations of the same thing, as the benchmarks tell them.

use serde_json::{Value, json};
use std::time::Duration;

/// Some durations of the same thing, in order of length.
pub(crate) struct Times(Vec<Duration>);

impl From<Vec<Duration>> for Times {
    fn from(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }
}

impl Times {
    /// That part of them (0.5: half) took no longer, in ms.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let at = (self.0.len() as f64 * part) as usize;
        let time = self.0.get(at.min(self.0.len().saturating_sub(1)));
        time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    }

    /// In ms.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub(crate) fn json(&self) -> Value {
        json!({ "median": self.quantile(0.5), "p99": self.quantile(0.99), "min": self.quantile(0.0) })
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2})", self.quantile(0.5), self.quantile(0.99))
    }
}
