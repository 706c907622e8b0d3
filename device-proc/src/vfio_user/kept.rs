//! Posted writes that have come while the device is stopped.
//!
//! Nobody waits for an answer to a posted write, so it cannot be refused audibly: it is kept, and
//! carried out once, in order, before anything else that comes after the start. What is kept is
//! bounded; what is done about a write beyond the bound is the [connection's](super::connection) to
//! say.

use super::endpoint::Endpoint;
use crate::device::Device;
use crate::gate::Permit;
use std::collections::VecDeque;
use std::fmt;

/// How much is kept. The message that exceeds it is kept whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    writes: usize,
    bytes: usize,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} writes or {} bytes", self.writes, self.bytes)
    }
}

/// What is kept of a client that is there. A fuzz target reaches it in a few steps.
pub(super) const MOST: Bound = if cfg!(fuzzing) {
    Bound { writes: 8, bytes: 64 }
} else {
    Bound { writes: 1024, bytes: 64 << 10 }
};

/// What is kept if it is of clients that have gone. What one of them leaves fits, all in all: what was
/// read of it and a socket's buffer, as large as the kernel makes them.
pub(super) const LEFT: Bound = Bound { writes: 16 * 1024, bytes: 512 << 10 };

#[derive(Debug)]
struct Write {
    region: u32,
    offset: u64,
    data: Box<[u8]>,
    /// What the device's contents were when it came; see [`Edge::contents`](crate::edge::Edge).
    contents: u64,
}

/// Posted writes in the order in which they have come.
#[derive(Debug, Default)]
pub(super) struct Kept {
    writes: VecDeque<Write>,
    bytes: usize,
}

impl Kept {
    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Whether there is as much as of a client that is there.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.exceeds(MOST)
    }

    fn exceeds(&self, bound: Bound) -> bool {
        self.writes.len() >= bound.writes || self.bytes >= bound.bytes
    }

    /// Whether one more message fits below the bound, for a device with these contents. What was
    /// meant for others takes no room.
    pub(super) fn has_room(&mut self, bound: Bound, contents: u64) -> bool {
        if self.exceeds(bound) {
            self.writes.retain(|write| write.contents == contents);
            self.bytes = self.writes.iter().map(|write| write.data.len()).sum();
        }
        !self.exceeds(bound)
    }

    /// Keeps a write to a device with these contents.
    pub(super) fn keep(&mut self, region: u32, offset: u64, data: &[u8], contents: u64) {
        self.bytes += data.len();
        self.writes.push_back(Write { region, offset, data: data.into(), contents });
    }

    /// Carries all of them out, under a permit. Those that were meant for other contents of the
    /// device are void.
    pub(super) fn carry_out<D: Device>(&mut self, endpoint: &Endpoint<D>, permit: &Permit<'_>) {
        if self.writes.is_empty() {
            return;
        }
        let contents = endpoint.parts().edge.contents();
        self.bytes = 0;
        for write in self.writes.drain(..).filter(|write| write.contents == contents) {
            let Write { region, offset, data, .. } = write;
            // As with any posted write, nobody hears of a refusal.
            let _ = endpoint.region_write(Some(permit), region, offset, &data);
        }
    }
}
