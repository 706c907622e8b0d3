//! What is saved of a vhost-user device beside what its backend writes, and what is checked of it.
//! Pure.
//!
//! The memory, the kick and the call eventfds of a ring come from the frontend alone, and so does the
//! index at which it begins: a device that has loaded a state keeps it, waits until the frontend starts
//! the ring, and compares. Nothing is pushed ahead of the frontend.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use standstill_protocol::codec::{decode_state, encode_state};
use std::io::{self, Read, Write};
use thiserror::Error;
use virtio_queue::{Queue, QueueState};

/// Version of the layout of [`Saved`].
const LAYOUT: u16 = 1;
/// The most bytes of it: 64 rings have less.
const MOST_BYTES: u32 = 16 << 10;

/// A ring as it was saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedRing {
    /// A frontend has started it, so its indexes mean something.
    pub(super) used: bool,
    /// Number of descriptors.
    pub(super) size: u16,
    /// What is popped next.
    pub(super) next_avail: u16,
    /// Where the next used entry goes. The same as the above: nothing is in flight.
    pub(super) next_used: u16,
    pub(super) event_idx: bool,
    /// Guest addresses of its three parts.
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used_ring: u64,
}

impl SavedRing {
    pub(super) fn of(state: &QueueState) -> Self {
        Self {
            used: true,
            size: state.size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            descriptors: state.desc_table,
            avail: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    fn check(&self, queue: usize, max_size: u16) -> Result<(), StateError> {
        if !self.used {
            return Ok(());
        }
        let state = QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: false,
            desc_table: self.descriptors,
            avail_ring: self.avail,
            used_ring: self.used_ring,
        };
        let checked = Queue::try_from(state).map(drop);
        checked.map_err(|source| StateError::Ring { queue, size: self.size, max_size, source })
    }
}

/// What is saved of a device beside what its backend writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    layout: u16,
    /// The virtio features that the driver has accepted; 0 if it has not come so far.
    pub(super) accepted: u64,
    /// One for each queue of the device.
    pub(super) rings: Vec<SavedRing>,
}

/// A saved state is none for this device.
#[derive(Debug, Error)]
pub(super) enum StateError {
    #[error("the rings cannot be saved")]
    Encode(#[from] standstill_protocol::codec::EncodeError),
    #[error("the saved rings are damaged")]
    Decode(#[from] standstill_protocol::codec::DecodeError),
    #[error("the saved rings cannot be read or written")]
    Io(#[from] io::Error),
    #[error("the saved rings have {0} bytes, at most {MOST_BYTES} are possible")]
    TooLong(u32),
    #[error("the saved rings have layout {0}, this device knows {LAYOUT}")]
    Layout(u16),
    #[error("saved was a device with {found} queues, this one has {expected}")]
    Queues { found: usize, expected: usize },
    #[error(
        "the driver of the saved device had accepted the features {accepted:#x}, this device offers {offered:#x}: {:#x} are missing",
        accepted & !offered
    )]
    Features { accepted: u64, offered: u64 },
    #[error(
        "queue {queue} was saved with {size} descriptors, which cannot be: at most {max_size} are possible here"
    )]
    Ring {
        queue: usize,
        size: u16,
        max_size: u16,
        #[source]
        source: virtio_queue::Error,
    },
    #[error("queue {queue}: {source}")]
    Start {
        queue: usize,
        #[source]
        source: StartError,
    },
}

impl Saved {
    pub(super) fn new(accepted: u64, rings: Vec<SavedRing>) -> Self {
        Self { layout: LAYOUT, accepted, rings }
    }

    /// Writes it, after its length, so that a backend's own state can follow.
    pub(super) fn write(&self, to: &mut dyn Write) -> Result<(), StateError> {
        let bytes = encode_state(self)?;
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        to.write_all(&length.to_le_bytes())?;
        Ok(to.write_all(&bytes)?)
    }

    /// Reads what [`write`](Self::write) wrote, and nothing behind it.
    pub(super) fn read(from: &mut dyn Read) -> Result<Self, StateError> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length > MOST_BYTES {
            return Err(StateError::TooLong(length));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        from.read_exact(&mut bytes)?;
        // The layout comes first, so that it can be told what a later one is.
        match bytes.first_chunk().map(|layout| u16::from_le_bytes(*layout)) {
            Some(LAYOUT) | None => Ok(decode_state(&bytes)?),
            Some(other) => Err(StateError::Layout(other)),
        }
    }

    /// Whether it can be this device's. Says what differs.
    pub(super) fn check(
        &self,
        queues: usize,
        max_size: u16,
        offered: u64,
    ) -> Result<(), StateError> {
        if self.rings.len() != queues {
            return Err(StateError::Queues { found: self.rings.len(), expected: queues });
        }
        if self.accepted & !offered != 0 {
            return Err(StateError::Features { accepted: self.accepted, offered });
        }
        let mut rings = self.rings.iter().enumerate();
        rings.try_for_each(|(queue, ring)| ring.check(queue, max_size))
    }
}

/// How a frontend starts a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Start {
    pub(super) size: u16,
    /// The index that it has set.
    pub(super) next_avail: u16,
    /// The index of the used ring, as it is in memory.
    pub(super) next_used: u16,
    /// The virtio features that the driver has accepted.
    pub(super) accepted: u64,
}

/// A ring cannot be served as a frontend starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum StartError {
    #[error(
        "the frontend starts its ring at index {found}, the state that was loaded says {expected}"
    )]
    Base { found: u16, expected: u16 },
    #[error(
        "the frontend starts a ring of {found} descriptors, the state that was loaded has {expected}"
    )]
    Size { found: u16, expected: u16 },
    #[error(
        "the driver has accepted the features {found:#x}, in the state that was loaded {expected:#x}"
    )]
    Features { found: u64, expected: u64 },
    #[error(
        "the frontend starts its ring at index {next_avail}, which no ring of {size} descriptors can have whose used index is {next_used}"
    )]
    Indexes { next_avail: u16, next_used: u16, size: u16 },
    #[error("its ring does not lie in the memory of the frontend")]
    Memory,
    #[error(
        "the frontend goes on at {next_avail} of a ring that is used up to {next_used}, and something \
         was taken out of it before that was seen"
    )]
    Late { next_avail: u16, next_used: u16 },
}

impl Start {
    /// The index at which to go on. `expected` is what a state says that was loaded: the ring, and the
    /// features that the driver had accepted.
    ///
    /// A frontend whose backend has died knows how far the ring was used, or how far it was popped. Of a
    /// backend that completes in order all before the used index is done, and nothing behind it.
    pub(super) fn check(
        &self,
        expected: Option<(&SavedRing, u64)>,
        completes_in_order: bool,
    ) -> Result<u16, StartError> {
        let Self { size, next_avail, next_used, accepted } = *self;
        if let Some((ring, features)) = expected {
            if accepted != features {
                return Err(StartError::Features { found: accepted, expected: features });
            }
            if size != ring.size {
                return Err(StartError::Size { found: size, expected: ring.size });
            }
            if next_avail != ring.next_avail {
                return Err(StartError::Base { found: next_avail, expected: ring.next_avail });
            }
        }
        let ahead = next_avail.wrapping_sub(next_used);
        if ahead > size {
            return Err(StartError::Indexes { next_avail, next_used, size });
        }
        Ok(if completes_in_order { next_used } else { next_avail })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring() -> SavedRing {
        SavedRing {
            used: true,
            size: 64,
            next_avail: 7,
            next_used: 7,
            event_idx: true,
            descriptors: 0x1000,
            avail: 0x2000,
            used_ring: 0x3000,
        }
    }

    fn saved() -> Saved {
        Saved::new(0x3, vec![ring(), SavedRing::default()])
    }

    fn bytes(saved: &Saved) -> Vec<u8> {
        let mut bytes = Vec::new();
        saved.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_was_written_is_read_and_nothing_behind_it() {
        let mut bytes = bytes(&saved());
        bytes.extend(b"the backend's");
        let mut rest = bytes.as_slice();
        assert_eq!(Saved::read(&mut rest).unwrap(), saved());
        assert_eq!(rest, b"the backend's");
    }

    /// The layout of bytes that are on somebody's disk.
    #[test]
    fn the_bytes_are_these() {
        let bytes = bytes(&Saved::new(0x1_0000_0003, vec![ring()]));
        let expected = [
            50, 0, 0, 0, // length
            1, 0, // layout
            3, 0, 0, 0, 1, 0, 0, 0, // features
            1, 0, 0, 0, 0, 0, 0, 0, // number of rings
            1, 64, 0, 7, 0, 7, 0, 1, // used, size, indexes, event index
            0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_differs_is_said() {
        let text = |saved: &Saved, queues| saved.check(queues, 64, 0x3).unwrap_err().to_string();
        assert!(saved().check(2, 64, 0xff).is_ok());
        assert_eq!(text(&saved(), 4), "saved was a device with 2 queues, this one has 4");
        let features = text(&Saved { accepted: 0x15, ..saved() }, 2);
        assert!(features.contains("0x15") && features.contains("0x14 are missing"), "{features}");
        for size in [0, 3, 128] {
            let mut wrong = saved();
            wrong.rings[0].size = size;
            assert!(text(&wrong, 2).starts_with(&format!("queue 0 was saved with {size} desc")));
        }
        let mut layout = bytes(&saved());
        layout[4] = 2;
        let error = Saved::read(&mut layout.as_slice()).unwrap_err();
        assert_eq!(error.to_string(), "the saved rings have layout 2, this device knows 1");
    }

    #[test]
    fn a_frontend_that_starts_elsewhere_than_the_state_says_is_refused() {
        let start = Start { size: 64, next_avail: 7, next_used: 7, accepted: 3 };
        let check =
            |start: Start| start.check(Some((&ring(), 3)), false).map_err(|e| e.to_string());
        assert_eq!(check(start), Ok(7));
        let refused = |start, words: [&str; 2]| {
            let text = check(start).unwrap_err();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        refused(Start { next_avail: 5, next_used: 5, ..start }, ["index 5", "says 7"]);
        refused(Start { size: 32, ..start }, ["32 descriptors", "has 64"]);
        refused(Start { accepted: 1, ..start }, ["0x1", "0x3"]);
    }

    #[test]
    fn what_was_popped_and_not_done_is_done_again_by_who_completes_in_order() {
        let start = Start { size: 64, next_avail: 3, next_used: 0xffff, accepted: 0 };
        assert_eq!(start.check(None, true), Ok(0xffff));
        assert_eq!(start.check(None, false), Ok(3));
        let behind = Start { next_avail: 0xfffe, ..start };
        assert!(matches!(behind.check(None, true), Err(StartError::Indexes { .. })));
        assert!(matches!(behind.check(None, false), Err(StartError::Indexes { .. })));
    }

    proptest! {
        #[test]
        fn damage_is_an_error_and_no_panic(at in 0_usize..200, byte: u8, cut in 0_usize..200) {
            let mut damaged = bytes(&saved());
            let length = damaged.len();
            damaged[at % length] = byte;
            damaged.truncate(length - cut % length);
            if let Ok(read) = Saved::read(&mut damaged.as_slice()) {
                let _ = read.check(2, 64, 0x3);
            }
        }

        #[test]
        fn a_ring_goes_on_where_it_can(next_avail: u16, next_used: u16, in_order: bool) {
            let start = Start { size: 256, next_avail, next_used, accepted: 0 };
            match start.check(None, in_order) {
                Ok(at) => {
                    prop_assert!(next_avail.wrapping_sub(at) <= 256);
                    prop_assert_eq!(at, if in_order { next_used } else { next_avail });
                }
                Err(_) => prop_assert!(next_avail.wrapping_sub(next_used) > 256),
            }
        }
    }
}
