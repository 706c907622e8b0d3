//! Tells devices that hang from devices that have nothing to do.
//!
//! A control thread that hangs sends nothing. A data thread that hangs is told by the signs of life
//! of its healthy control thread: there is work, and the progress stands still. No clock: the
//! caller says what time it is, in ticks.
//!
//! Time counts only while the caller was awake for it: one that was suspended (SIGSTOP, a laptop
//! asleep) finds everybody silent when it wakes, and has proven nothing by that.

use standstill_protocol::message::Heartbeat;
use std::time::{Duration, Instant};

/// How long a device may be silent, or stand still.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How long progress may stand still while there is work; `None` for ever.
    pub(crate) stall: Option<Duration>,
    /// How long a device may say nothing at all; `None` for ever.
    pub(crate) silence: Option<Duration>,
}

impl Limits {
    /// Zero is none; without signs of life nothing can be told. Whoever is to speak in intervals
    /// may be silent for two of them.
    pub(crate) fn new(stall: Duration, silence: Duration, heartbeat: Duration) -> Self {
        let on = |limit: Duration| (!limit.is_zero() && !heartbeat.is_zero()).then_some(limit);
        let least = heartbeat.saturating_mul(2);
        Self { stall: on(stall), silence: on(silence).map(|limit| limit.max(least)) }
    }

    /// How often to look; `None` if there is nothing to look for.
    pub(crate) fn interval(&self) -> Option<Duration> {
        let shortest = self.stall.into_iter().chain(self.silence).min()?;
        Some((shortest / 8).clamp(Duration::from_millis(5), Duration::from_secs(1)))
    }
}

/// The ticks at which devices are judged.
#[derive(Debug)]
pub(crate) struct Ticks {
    interval: Duration,
    last: Instant,
}

impl Ticks {
    pub(crate) fn new(interval: Duration, now: Instant) -> Self {
        Self { interval, last: now }
    }

    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// How much of the time since the last tick counts: not more than two intervals.
    pub(crate) fn tick(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.last);
        self.last = now;
        passed.min(self.interval * 2)
    }
}

/// In what way a device hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hang {
    /// Its control thread says nothing.
    Control {
        /// For how long.
        silent: Duration,
    },
    /// Its data threads have something to do, and their progress stands still.
    Data {
        /// For how long.
        standing: Duration,
    },
}

impl std::fmt::Display for Hang {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Control { silent } => write!(f, "it has given no sign of life for {silent:.1?}"),
            Self::Data { standing } => write!(
                f,
                "its data threads have had something to do and made no progress for {standing:.1?}"
            ),
        }
    }
}

/// What a device's signs of life have said.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    silent: Duration,
    /// Progress, while there is work.
    at_work: Option<u64>,
    standing: Duration,
    /// A second sign of life has said the same: it is not that there was none.
    confirmed: bool,
}

impl Pulse {
    /// The device said something.
    pub(crate) fn heard(&mut self) {
        self.silent = Duration::ZERO;
    }

    /// The device gave a sign of life.
    pub(crate) fn heartbeat(&mut self, heartbeat: &Heartbeat) {
        self.heard();
        let at_work = heartbeat.pending.then_some(heartbeat.progress);
        if at_work.is_some() && at_work == self.at_work {
            self.confirmed = true;
        } else {
            self.moved(at_work);
        }
    }

    fn moved(&mut self, at_work: Option<u64>) {
        self.at_work = at_work;
        self.standing = Duration::ZERO;
        self.confirmed = false;
    }

    /// Nothing that was before counts: a transition was under way.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// So much time has passed. `works` is false for a device that is stopped, or that does not
    /// tell its progress.
    pub(crate) fn tick(&mut self, passed: Duration, works: bool, limits: &Limits) -> Option<Hang> {
        self.silent += passed;
        if works && self.at_work.is_some() {
            self.standing += passed;
        } else {
            self.moved(None);
        }
        if limits.silence.is_some_and(|limit| self.silent >= limit) {
            return Some(Hang::Control { silent: self.silent });
        }
        let stalled = limits.stall.is_some_and(|limit| self.standing >= limit);
        (stalled && self.confirmed).then_some(Hang::Data { standing: self.standing })
    }
}

#[cfg(test)]
mod tests;
