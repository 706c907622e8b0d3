//! The last events and reports of a machine, and what happens from now on, for whoever asks.

use super::message::{EventLine, LastTransition, ReportReply};
use standstill::coordinator::events::JsonEvent;
use standstill::coordinator::report::{JsonReport, TransitionReport};
use standstill::coordinator::{Events, MachineEvent};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::broadcast::{self, error::RecvError};

/// How many events are kept, and how many a reader may be behind.
pub(crate) const EVENTS: usize = 256;
/// How many reports are kept.
pub(crate) const REPORTS: usize = 32;

/// Clones are the same history.
#[derive(Clone, Debug)]
pub(crate) struct History {
    inner: Arc<Mutex<Inner>>,
    /// When it began.
    pub(crate) since: SystemTime,
}

#[derive(Debug)]
struct Inner {
    events: VecDeque<Arc<EventLine>>,
    next_event: u64,
    reports: VecDeque<Kept>,
    next_report: u64,
    /// `None` once the machine has ended.
    live: Option<broadcast::Sender<Arc<EventLine>>>,
}

#[derive(Debug)]
struct Kept {
    /// The report's own: no other one of this machine has the same.
    identity: (u64, u64, u64),
    reply: Arc<ReportReply>,
}

/// The last events, and a reader of all that come after them; without one once the machine has
/// ended.
pub(crate) struct Past {
    pub(crate) events: Vec<Arc<EventLine>>,
    pub(crate) live: Option<broadcast::Receiver<Arc<EventLine>>>,
}

impl History {
    pub(crate) fn new() -> Self {
        let inner = Inner {
            events: VecDeque::new(),
            next_event: 1,
            reports: VecDeque::new(),
            next_report: 1,
            live: Some(broadcast::channel(EVENTS).0),
        };
        Self { inner: Arc::new(Mutex::new(inner)), since: SystemTime::now() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down what happens to a machine until it is gone.
    pub(crate) async fn follow(self, mut events: Events) {
        while let Some(event) = events.recv().await {
            self.record(&event);
        }
        self.end();
    }

    /// Waits until the machine is gone and its last event is written down.
    pub(crate) async fn ended(&self) {
        let live = self.lock().live.as_ref().map(broadcast::Sender::subscribe);
        let Some(mut live) = live else { return };
        while !matches!(live.recv().await, Err(RecvError::Closed)) {}
    }

    /// Nothing comes any more: whoever follows the events is told.
    pub(crate) fn end(&self) {
        self.lock().live = None;
    }

    fn record(&self, event: &MachineEvent) {
        if let MachineEvent::Transition(report) = event {
            self.report(report);
        }
        let mut inner = self.lock();
        let line = Arc::new(EventLine {
            number: inner.next_event,
            time: timestamp(SystemTime::now()),
            text: event.to_string(),
            event: JsonEvent::from(event),
        });
        inner.next_event += 1;
        if inner.events.len() == EVENTS {
            inner.events.pop_front();
        }
        inner.events.push_back(Arc::clone(&line));
        if let Some(live) = &inner.live {
            // Nobody listens, most of the time.
            let _ = live.send(line);
        }
    }

    /// Gives a report its number and keeps it. The same report always gets the same number.
    pub(crate) fn report(&self, report: &TransitionReport) -> Arc<ReportReply> {
        let identity = (report.term.0, report.first_epoch.0, report.last_epoch.0);
        let mut inner = self.lock();
        if let Some(kept) = inner.reports.iter().find(|kept| kept.identity == identity) {
            return Arc::clone(&kept.reply);
        }
        let reply = Arc::new(ReportReply {
            number: inner.next_report,
            time: timestamp(SystemTime::now()),
            text: report.to_string(),
            report: JsonReport::from(report),
        });
        inner.next_report += 1;
        if inner.reports.len() == REPORTS {
            inner.reports.pop_front();
        }
        inner.reports.push_back(Kept { identity, reply: Arc::clone(&reply) });
        reply
    }

    /// The last reports, oldest first.
    pub(crate) fn reports(&self, last: usize) -> Vec<ReportReply> {
        let inner = self.lock();
        let skipped = inner.reports.len().saturating_sub(last);
        inner.reports.iter().skip(skipped).map(|kept| ReportReply::clone(&kept.reply)).collect()
    }

    /// The last transition in short, if there was one.
    pub(crate) fn last(&self) -> Option<LastTransition> {
        let inner = self.lock();
        let reply = &inner.reports.back()?.reply;
        Some(LastTransition {
            number: reply.number,
            time: reply.time.clone(),
            operation: reply.report.operation.clone(),
            outcome: reply.report.outcome.clone(),
            total_ns: reply.report.total_ns,
            downtime_ns: reply.report.downtime_ns,
        })
    }

    /// The last events, and those that come after them: none is missed between the two.
    pub(crate) fn events(&self, last: usize) -> Past {
        let inner = self.lock();
        let skipped = inner.events.len().saturating_sub(last);
        let events = inner.events.iter().skip(skipped).cloned().collect();
        Past { events, live: inner.live.as_ref().map(broadcast::Sender::subscribe) }
    }
}

/// A time for people and programs: RFC 3339, UTC, with milliseconds.
pub(crate) fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(device: usize) -> MachineEvent {
        MachineEvent::HoldBegan { device: device.to_string() }
    }

    #[test]
    fn the_last_events_are_kept_and_the_next_ones_follow_without_a_gap() {
        let history = History::new();
        for number in 0..EVENTS + 10 {
            history.record(&hold(number));
        }
        let Past { events, live } = history.events(2);
        let numbers: Vec<_> = events.iter().map(|event| event.number).collect();
        assert_eq!(numbers, [EVENTS as u64 + 9, EVENTS as u64 + 10]);
        history.record(&hold(0));
        assert_eq!(live.unwrap().try_recv().unwrap().number, EVENTS as u64 + 11);
        assert_eq!(history.events(usize::MAX).events.len(), EVENTS);
        history.end();
        assert!(history.events(1).live.is_none());
    }
}
