//! Posted writes that have come while the device is stopped.
//!
//! Nobody waits for an answer to a posted write, so it cannot be refused audibly: it is kept, and
//! carried out once, in order, before anything else that comes after the start. What is kept is
//! bounded: when that is full, the socket is not read any more until the start.

use super::endpoint::Endpoint;
use crate::device::Device;
use crate::gate::Permit;
use std::collections::VecDeque;

/// How many writes are kept at least.
const MOST_WRITES: usize = 1024;
/// How many bytes they have together at least.
const MOST_BYTES: usize = 64 << 10;

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

    /// Whether no more messages should be read that could be posted writes. The last message may
    /// have brought more than there was room for, so one message comes on top of the bounds.
    pub(super) fn is_full(&self) -> bool {
        self.writes.len() >= MOST_WRITES || self.bytes >= MOST_BYTES
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
