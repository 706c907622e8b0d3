//! A command from its arrival to its answer.

use super::arc::Spent;
use super::budget::{Budget, Overtaken};
use crate::device::{Device, Moment};
use standstill_protocol::message::{Command, Evidence, MAX_COUNTERS, Phase, Timings};
use standstill_protocol::migration::Activity;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A command that has come and waits to begin.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) command: Command,
    pub(super) at: Instant,
    /// The fd of a Save or Load.
    pub(super) fd: Option<OwnedFd>,
}

/// A command that is being carried out.
#[derive(Debug)]
pub(super) struct Job {
    at: Instant,
    pub(super) budget: Budget,
    pub(super) fd: Option<OwnedFd>,
    /// It stops the device for a time only, while its client waits.
    pub(super) lease: bool,
    pub(super) spent: Spent,
    evidence: Evidence,
    collecting: Duration,
}

impl Job {
    pub(super) fn new(arrival: Arrival, overtaken: Arc<Overtaken>) -> Self {
        let Arrival { command, at, fd } = arrival;
        let budget = Budget::new(at, Duration::from_nanos(command.budget_ns), overtaken);
        Self {
            at,
            budget,
            fd,
            lease: command.lease_ns > 0,
            spent: Spent::default(),
            evidence: Evidence::default(),
            collecting: Duration::ZERO,
        }
    }

    /// Asks the device what it can show.
    pub(super) fn collect(&mut self, device: &impl Device, moment: Moment) {
        let begin = Instant::now();
        let Evidence { memory_hash, counters } = device.evidence(moment);
        self.evidence.memory_hash = memory_hash.or(self.evidence.memory_hash);
        let room = MAX_COUNTERS - self.evidence.counters.len();
        self.evidence.counters.extend(counters.into_iter().take(room));
        self.collecting += begin.elapsed();
    }

    /// Where the time went until now, and what the device can show.
    pub(super) fn finish(self) -> (Timings, Evidence) {
        let timings = Timings {
            total_ns: nanoseconds(self.at.elapsed()),
            hook_ns: nanoseconds(self.spent.hook),
            drain_ns: nanoseconds(self.spent.drain),
            evidence_ns: nanoseconds(self.collecting),
        };
        (timings, self.evidence)
    }
}

/// What is collected before anything is done about a command.
pub(super) fn moment_of_arrival(command: &Command, activity: Activity) -> Option<Moment> {
    match command.phase {
        Phase::Stop => Some(Moment::StopArrived),
        Phase::PrepareStart | Phase::Start if activity == Activity::Stopped => {
            Some(Moment::StartArrived)
        }
        _ => None,
    }
}

/// What is collected before a command is answered.
pub(super) fn moment_of_answer(command: &Command) -> Option<Moment> {
    match command.phase {
        Phase::PrepareStop => Some(Moment::PrepareStopped),
        Phase::Stop => Some(Moment::Stopped),
        _ => None,
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
