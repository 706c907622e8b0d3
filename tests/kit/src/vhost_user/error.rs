//! What can go wrong between a driver, its frontend and a device.

use super::guest::RequestId;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// A frontend or a driver cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VhostUserError {
    /// The system refuses something.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Nobody listens at a data socket, or whoever does has no room for one more.
    #[error("nobody accepts a frontend at {} within {within:?}", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// For how long it was tried.
        within: Duration,
        /// What was said last.
        source: io::Error,
    },
    /// A call of the frontend was not answered in time. Its connection is cut.
    #[error("{call} is not answered within {within:?}: the connection is cut")]
    Deadline {
        /// Which message of the protocol.
        call: &'static str,
        /// The deadline.
        within: Duration,
    },
    /// A call of the frontend has failed: the device has refused it or is gone, or there is no such call.
    #[error("{call}")]
    Call {
        /// Which message of the protocol.
        call: &'static str,
        /// Why.
        source: vhost::Error,
    },
    /// The device lacks virtio features that its driver cannot do without.
    #[error("the device does not offer the virtio features {missing:#x}, only {offered:#x}")]
    NotOffered {
        /// Those that it does not offer.
        missing: u64,
        /// Those that it offers.
        offered: u64,
    },
    /// Guest memory cannot be made, or something lies outside it.
    #[error("guest memory")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Rings cannot be made so.
    #[error("{queues} rings of {descriptors} descriptors with buffers of {buffer} bytes cannot be")]
    Layout {
        /// How many rings.
        queues: usize,
        /// How many descriptors each has.
        descriptors: u16,
        /// Size of the buffer of each descriptor in bytes.
        buffer: u32,
    },
    /// There is no such queue.
    #[error("there is no queue {queue}, only {queues}")]
    NoQueue {
        /// Which.
        queue: usize,
        /// How many there are.
        queues: usize,
    },
    /// A request does not fit into its ring now.
    #[error("ring {queue} has {free} free descriptors, and a request needs {needed}")]
    Full {
        /// Which ring.
        queue: usize,
        /// How many descriptors are free.
        free: usize,
        /// How many the request needs.
        needed: usize,
    },
    /// A part of a request does not fit into the buffer of a descriptor, or a request has no parts.
    #[error("a part of {length} bytes does not fit into a buffer of {most}")]
    Length {
        /// Its length in bytes.
        length: usize,
        /// What a buffer has.
        most: u32,
    },
    /// The device has put something into a used ring that it must not: a request that was answered
    /// already, one that was never made, or more than were made.
    #[error("the device breaks the used ring of queue {queue}: {what}")]
    Used {
        /// Which queue.
        queue: usize,
        /// What it has done.
        what: String,
    },
    /// Requests were not answered in time.
    #[error("queue {queue}: {answered} of {wanted} requests are answered within {within:?}")]
    Unanswered {
        /// Which queue.
        queue: usize,
        /// How many were waited for.
        wanted: usize,
        /// How many were answered.
        answered: usize,
        /// The deadline.
        within: Duration,
    },
    /// Requests were answered, and the driver was not signalled, though it wanted to be: a guest would
    /// wait for ever.
    #[error(
        "queue {queue}: {answered} requests are answered, and no signal came within {within:?}"
    )]
    Unsignalled {
        /// Which queue.
        queue: usize,
        /// How many were answered.
        answered: usize,
        /// The deadline.
        within: Duration,
    },
    /// An answer to a request of a block device is none.
    #[error("{request} has no answer of a block device: {what}")]
    Block {
        /// Which request.
        request: RequestId,
        /// What is wrong with it.
        what: String,
    },
}
