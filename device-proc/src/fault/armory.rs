//! What is armed, and how often each of it has been reached.

use super::journal::Journal;
use rustix::time::{ClockId, clock_gettime};
use standstill_protocol::fault::{Fault, JournalLine, Point};
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// The most faults that are armed at a time.
const MOST: usize = 1024;

/// Faults were not armed.
#[derive(Debug, Error)]
pub(crate) enum ArmError {
    /// There are too many of them already.
    #[error("more than {MOST} faults at a time")]
    TooMany,
    /// One cannot be done where it should.
    #[error("no such fault: {0}")]
    Impossible(Fault),
    /// Nothing can be written to the journal.
    #[error("the journal of injected faults cannot be used")]
    Journal(#[source] io::Error),
}

/// A fault that waits for its turn.
#[derive(Debug)]
struct Armed {
    fault: Fault,
    index: u32,
    /// How often its point was reached since it was armed.
    reached: u32,
    journal: Arc<Journal>,
}

/// A fault whose turn has come.
#[derive(Debug)]
pub(super) struct Hit {
    pub(super) fault: Fault,
    pub(super) line: JournalLine,
    pub(super) journal: Arc<Journal>,
}

/// All that is armed, in its order.
#[derive(Debug)]
pub(super) struct Armory(Vec<Armed>);

impl Armory {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(super) fn add(&mut self, faults: &[Fault], journal: Journal) -> Result<(), ArmError> {
        if let Some(impossible) = faults.iter().find(|fault| !fault.is_possible()) {
            return Err(ArmError::Impossible(*impossible));
        }
        if self.0.len() + faults.len() > MOST {
            return Err(ArmError::TooMany);
        }
        let count = u32::try_from(faults.len()).unwrap_or(u32::MAX);
        // Before any of it can fire.
        journal.write(JournalLine::Armed(count)).map_err(ArmError::Journal)?;
        let journal = Arc::new(journal);
        let armed = faults.iter().zip(0..);
        self.0.extend(armed.map(|(&fault, index)| Armed {
            fault,
            index,
            reached: 0,
            journal: Arc::clone(&journal),
        }));
        Ok(())
    }

    /// Counts, and takes those whose turn it is.
    pub(super) fn reach(&mut self, point: Point) -> Vec<Hit> {
        let mut hits = Vec::new();
        self.0.retain_mut(|armed| {
            if armed.fault.point != point {
                return true;
            }
            armed.reached = armed.reached.saturating_add(1);
            let every_time = armed.fault.nth == 0;
            if !every_time && armed.reached < armed.fault.nth {
                return true;
            }
            let (index, occurrence) = (armed.index, armed.reached);
            hits.push(Hit {
                fault: armed.fault,
                line: JournalLine::Fired { index, occurrence, at_ns: now_ns() },
                journal: Arc::clone(&armed.journal),
            });
            every_time
        });
        hits
    }

    /// The [`kind`]s of all points at which something is armed.
    pub(super) fn kinds(&self) -> u32 {
        self.0.iter().fold(0, |kinds, armed| kinds | kind(armed.fault.point))
    }
}

/// One bit for each kind of point.
pub(super) fn kind(point: Point) -> u32 {
    1 << match point {
        Point::Hello => 0,
        Point::Receipt(_) => 1,
        Point::BeforeAck(_) => 2,
        Point::AfterAck(_) => 3,
        Point::Query => 4,
        Point::Memory => 5,
        Point::Shutdown => 6,
        Point::Saving => 7,
        Point::Loading => 8,
        Point::Mmio => 9,
        Point::Dma => 10,
        Point::DmaInFlight => 11,
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_protocol::fault::Action;
    use standstill_protocol::message::Phase;
    use std::io::Read;

    const ACK: Point = Point::BeforeAck(Phase::Stop);

    fn fired(hits: &[Hit]) -> Vec<(u32, u32)> {
        let parts = hits.iter().map(|hit| match hit.line {
            JournalLine::Fired { index, occurrence, .. } => (index, occurrence),
            JournalLine::Armed(_) => panic!("nothing is armed here"),
        });
        parts.collect()
    }

    #[test]
    fn each_fault_counts_from_when_it_was_armed_and_fires_in_its_turn() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut armory = Armory::new();
        let twice = Fault::new(ACK, Action::NoAck).nth(2);
        let always = Fault::new(ACK, Action::TwoAcks).nth(0);
        armory.add(&[twice, always], Journal::new(writer.into()).unwrap()).unwrap();
        assert!(armory.reach(Point::BeforeAck(Phase::Start)).is_empty(), "another phase");
        assert_eq!(fired(&armory.reach(ACK)), [(1, 1)]);

        let (_later, writer) = io::pipe().unwrap();
        armory
            .add(&[Fault::new(ACK, Action::NoAck)], Journal::new(writer.into()).unwrap())
            .unwrap();
        let hits = armory.reach(ACK);
        assert_eq!(fired(&hits), [(0, 2), (1, 2), (0, 1)], "in the order in which they were armed");
        assert_eq!(fired(&armory.reach(ACK)), [(1, 3)], "a fault that has fired is over");
        assert_eq!(armory.kinds(), kind(ACK));

        drop((armory, hits));
        let mut journal = String::new();
        reader.read_to_string(&mut journal).unwrap();
        assert_eq!(journal, "armed 2\n", "what has fired is written by whoever does it");
    }

    #[test]
    fn what_cannot_be_done_or_told_is_not_armed() {
        let pipe = || {
            let (reader, writer) = io::pipe().unwrap();
            (reader, Journal::new(writer.into()).unwrap())
        };
        let mut armory = Armory::new();
        let (_reader, journal) = pipe();
        let impossible = [Fault::new(Point::Dma, Action::NoAck)];
        assert!(matches!(armory.add(&impossible, journal), Err(ArmError::Impossible(_))));
        let (reader, journal) = pipe();
        drop(reader);
        let exit = Fault::new(Point::Dma, Action::Exit(1));
        assert!(matches!(armory.add(&[exit], journal), Err(ArmError::Journal(_))));
        let (_reader, journal) = pipe();
        assert!(matches!(armory.add(&[exit; MOST + 1], journal), Err(ArmError::TooMany)));
        assert_eq!(armory.kinds(), 0);
    }
}
