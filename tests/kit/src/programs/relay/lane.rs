//! One way through the relay: packets that wait to be delivered, in order.

use super::Error;
use super::packet::{Packet, Sent};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// How many packets may wait; then no more are read, so that senders are held up as without a relay.
const LONGEST_QUEUE: usize = 64;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Deliver,
    Drop,
    Twice,
    CorruptAt(usize),
    Split,
    Merge,
    Swap,
}

impl Fate {
    /// What becomes of a packet that both is to befall: what does more harm, so that whoever is to be lost by
    /// it is.
    pub(super) fn worse(self, other: Self) -> Self {
        let harm = |fate: Self| match fate {
            Self::Deliver => 0,
            Self::Twice => 1,
            Self::Swap => 2,
            Self::Merge => 3,
            Self::Drop => 4,
            Self::CorruptAt(_) => 5,
            Self::Split => 6,
        };
        if harm(other) >= harm(self) { other } else { self }
    }
}

/// A packet that waits to be delivered.
struct Waiting {
    /// Not before.
    due: Instant,
    /// The order by which it is held back until it is let go.
    held_by: Option<usize>,
    packet: Packet,
}

/// Packets that go one way.
#[derive(Default)]
pub(super) struct Lane {
    queue: VecDeque<Waiting>,
    /// Waits for the next one.
    held: Option<(Fate, Packet)>,
    /// No more will come.
    pub(super) ended: bool,
}

impl Lane {
    /// Takes a packet in, which is delivered after that time at the earliest and once it is let go, as
    /// all that follow.
    pub(super) fn push(
        &mut self,
        mut packet: Packet,
        fate: Fate,
        delay: Duration,
        held_by: Option<usize>,
    ) -> Result<(), Error> {
        let mut after = None;
        match self.held.take() {
            Some((Fate::Merge, first)) => packet = first.merged(packet),
            Some((_, first)) => after = Some(first),
            None => {}
        }
        let due = Instant::now() + delay;
        let mut deliver = |packet| self.queue.push_back(Waiting { due, held_by, packet });
        match fate {
            Fate::Deliver => deliver(packet),
            Fate::Drop => {}
            Fate::Twice => {
                deliver(packet.try_clone()?);
                deliver(packet);
            }
            Fate::CorruptAt(offset) => {
                packet.corrupt(offset);
                deliver(packet);
            }
            Fate::Split => packet.split().into_iter().for_each(deliver),
            Fate::Merge | Fate::Swap => self.held = Some((fate, packet)),
        }
        if let Some(after) = after {
            self.queue.push_back(Waiting { due, held_by, packet: after });
        }
        Ok(())
    }

    /// True if there is room for more.
    pub(super) fn has_room(&self) -> bool {
        !self.ended && self.queue.len() < LONGEST_QUEUE
    }

    /// True if nothing waits to be delivered, and nothing will.
    pub(super) fn is_done(&self) -> bool {
        self.ended && self.queue.is_empty()
    }

    /// When the next one is due, if one waits for nothing but a time.
    pub(super) fn due(&self) -> Option<Instant> {
        let next = self.queue.front().filter(|next| self.is_let_go(next));
        next.map(|next| next.due)
    }

    /// What nobody sends after can be held back no more: its end is to be seen.
    fn is_let_go(&self, waiting: &Waiting) -> bool {
        waiting.held_by.is_none() || self.ended
    }

    /// Lets go what is held back by that order.
    pub(super) fn let_go(&mut self, order: usize) {
        let held = self.queue.iter_mut().filter(|waiting| waiting.held_by == Some(order));
        held.for_each(|waiting| waiting.held_by = None);
    }

    /// Delivers what is due. False if there is no receiver any more.
    pub(super) fn deliver(&mut self, to: BorrowedFd<'_>) -> Result<bool, Error> {
        while let Some(next) = self.queue.front() {
            if !self.is_let_go(next) || Instant::now() < next.due {
                break;
            }
            match next.packet.send(to)? {
                Sent::Whole | Sent::Lost => drop(self.queue.pop_front()),
                Sent::Later => break,
                Sent::Gone => return Ok(false),
            }
        }
        Ok(true)
    }

    /// What waits has no receiver any more; nor will have what still comes.
    pub(super) fn discard(&mut self) {
        self.queue.clear();
        self.held = None;
    }

    /// Nobody will receive anything any more, and nobody sends.
    pub(super) fn give_up(&mut self) {
        self.discard();
        self.ended = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_things_that_befall_a_packet_the_worse_one_does_whichever_comes_first() {
        let (twice, drop, corrupt) = (Fate::Twice, Fate::Drop, Fate::CorruptAt(4));
        for (one, other, worse) in [
            (corrupt, twice, corrupt),
            (drop, twice, drop),
            (corrupt, drop, corrupt),
            (Fate::Split, Fate::Swap, Fate::Split),
            (Fate::Deliver, twice, twice),
        ] {
            assert_eq!(one.worse(other), worse);
            assert_eq!(other.worse(one), worse);
        }
    }
}
