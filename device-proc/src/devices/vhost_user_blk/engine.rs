//! One queue: takes requests out of its ring, has them done, and tells the guest in the order of the
//! ring.

#![forbid(unsafe_code)]

use super::buffers::Buffers;
use super::image::Image;
use super::request::{Pieces, Request, Status, parse};
use super::uring::Ring;
use super::window::{Sequence, Window};
use super::work::{Means, Mode, SERIAL, Stage, Step, Work};
use super::{Memory, Vring};
use crate::vhost_user::{PopGate, Popped};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use thiserror::Error;
use vhost_user_backend::VringT;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;
use vm_memory::GuestMemoryAtomic;

/// Requests that are taken out of the ring before the first of them are answered. More would let the
/// guest wait for answers that are there, fewer would signal it more often.
const BATCH: usize = 16;

/// A ring that cannot be served: the driver, or the frontend, has set it up wrongly.
#[derive(Debug, Error)]
pub(super) enum RingFault {
    #[error("queue {queue}: the ring cannot be used")]
    Ring {
        queue: usize,
        #[source]
        source: virtio_queue::Error,
    },
    #[error("queue {queue}: the available ring lies where there is no memory")]
    Memory { queue: usize },
    #[error("queue {queue}: request {head} is available, the ring has {size} descriptors")]
    Head { queue: usize, head: u16, size: u16 },
}

/// What an engine is made of.
pub(super) struct Parts {
    pub(super) queue: usize,
    pub(super) image: Arc<Image>,
    pub(super) ring: Option<Ring>,
    pub(super) pops: PopGate,
    pub(super) serial: [u8; SERIAL],
    /// How long each request waits before it is begun.
    pub(super) delay: Duration,
    /// The most requests of a ring.
    pub(super) max_requests: usize,
}

/// See the [module](self).
pub(super) struct Engine {
    parts: Parts,
    window: Window<Work>,
    /// Memory of requests that are over.
    spare: Vec<(Pieces, Buffers)>,
    /// Requests that were told to the guest, which was not signalled yet.
    told: Vec<Popped>,
    /// The ring is not used any more.
    broken: bool,
    /// Chains to which nothing could be answered.
    unanswerable: Refused,
    /// Requests that were answered with an error before anything was done for them.
    refused: Refused,
}

impl Engine {
    pub(super) fn new(parts: Parts) -> Self {
        let window = Window::with_capacity(parts.max_requests);
        Self {
            parts,
            window,
            spare: Vec::new(),
            told: Vec::new(),
            broken: false,
            unanswerable: Refused::default(),
            refused: Refused::default(),
        }
    }

    /// Can be polled, and is readable when there is something for [`run`](Self::run) to do beside
    /// what is in the ring.
    pub(super) fn completions(&self) -> Option<BorrowedFd<'_>> {
        self.parts.ring.as_ref().map(AsFd::as_fd)
    }

    /// The ring begins anew.
    pub(super) fn restart(&mut self) {
        self.broken = false;
    }

    /// Does all that there is to do now.
    ///
    /// # Errors
    ///
    /// [`RingFault`], once: then no more requests are taken out of this ring before it begins anew.
    /// Those that are in flight go on.
    pub(super) fn run(
        &mut self,
        vring: &Vring,
        memory: &GuestMemoryAtomic<Memory>,
        mode: Mode,
    ) -> Result<(), RingFault> {
        let served = self.serve(vring, memory, mode);
        if served.is_err() {
            if self.broken {
                return Ok(());
            }
            self.broken = true;
        }
        served
    }

    fn serve(
        &mut self,
        vring: &Vring,
        memory: &GuestMemoryAtomic<Memory>,
        mode: Mode,
    ) -> Result<(), RingFault> {
        self.reap(mode);
        self.tell(vring, memory)?;
        loop {
            let popped =
                if self.broken { Ok(Popping::Rests) } else { self.pop(vring, memory, mode) };
            self.hand_over();
            self.reap(mode);
            self.tell(vring, memory)?;
            match popped? {
                Popping::GoesOn => {}
                Popping::Rests => return Ok(()),
            }
        }
    }

    /// Takes a batch of requests out of the ring and begins them.
    fn pop(
        &mut self,
        vring: &Vring,
        memory: &GuestMemoryAtomic<Memory>,
        mode: Mode,
    ) -> Result<Popping, RingFault> {
        let first = self.window.end();
        let popping = self.take(vring, memory);
        for sequence in first..self.window.end() {
            self.begin(sequence, mode);
        }
        popping
    }

    /// Takes a batch of requests out of the ring.
    fn take(
        &mut self,
        vring: &Vring,
        memory: &GuestMemoryAtomic<Memory>,
    ) -> Result<Popping, RingFault> {
        let queue_number = self.parts.queue;
        let unusable = |source| RingFault::Ring { queue: queue_number, source };
        let memory = memory.memory().into_inner();
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return Ok(Popping::Rests);
        }
        let queue = state.get_queue_mut();
        let size = queue.size();
        let mut room = usize::from(size).saturating_sub(self.window.len());
        let mut look_again = false;
        let mut taken = 0;
        while taken < BATCH {
            if room == 0 {
                // No driver has more in flight than fits into its ring.
                return Ok(if taken > 0 { Popping::GoesOn } else { Popping::Rests });
            }
            let Some(popped) = self.parts.pops.enter(queue_number) else {
                return Ok(Popping::Rests);
            };
            let Some(chain) = queue.iter(&*memory).map_err(unusable)?.next() else {
                drop(popped);
                if look_again {
                    return Err(RingFault::Memory { queue: queue_number });
                }
                // From here on the driver kicks, unless something came just before.
                look_again = queue.enable_notification(&*memory).map_err(unusable)?;
                if look_again {
                    continue;
                }
                return Ok(Popping::Rests);
            };
            if taken == 0 && !look_again {
                queue.disable_notification(&*memory).map_err(unusable)?;
            }
            look_again = false;
            let head = chain.head_index();
            if head >= size {
                return Err(RingFault::Head { queue: queue_number, head, size });
            }
            let (mut pieces, buffers) = self.spare.pop().unwrap_or_default();
            let request = parse(chain, &self.parts.image.disk, &mut pieces);
            let memory = Arc::clone(&memory);
            let stage = Stage::New;
            let part = 0..0;
            self.window.push(Work { head, popped, memory, request, pieces, buffers, part, stage });
            room -= 1;
            taken += 1;
        }
        Ok(Popping::GoesOn)
    }

    fn begin(&mut self, sequence: Sequence, mode: Mode) {
        let Some(work) = self.window.get_mut(sequence) else { return };
        let queue = self.parts.queue;
        match &work.request {
            Err(error) => {
                self.unanswerable.note(queue, error, "a request that cannot be answered");
            }
            Ok(Request { what: Err(refusal), .. }) => {
                self.refused.note(queue, refusal, "a request is refused");
            }
            Ok(_) => {}
        }
        if work.request.is_ok() && !self.parts.delay.is_zero() {
            match self.parts.ring.as_mut().map(|ring| ring.wait(sequence)) {
                Some(Ok(())) => return,
                // It is begun at once then.
                Some(Err(error)) => tracing::warn!(%error, "a request cannot be delayed"),
                None => rest(self.parts.delay),
            }
        }
        let step = work.begin(sequence, &mut self.parts.means(mode));
        self.take_step(sequence, step);
    }

    /// Looks at what the kernel has done.
    fn reap(&mut self, mode: Mode) {
        while let Some(completion) = self.parts.ring.as_mut().and_then(Ring::next_completion) {
            let sequence = completion.sequence;
            let Some(work) = self.window.get_mut(sequence) else { continue };
            let step = work.go_on(completion, &mut self.parts.means(mode));
            self.take_step(sequence, step);
        }
        self.hand_over();
    }

    fn take_step(&mut self, sequence: Sequence, step: Step) {
        if let Step::Over(status) = step {
            self.finish(sequence, status);
        }
    }

    fn finish(&mut self, sequence: Sequence, status: Status) {
        if let Some(work) = self.window.get_mut(sequence) {
            work.conclude(status);
        }
        self.window.finish(sequence);
    }

    /// Tells the kernel of what is to be done. What it does not take now it gets at the next event;
    /// if there is none, the device makes no progress, and that is seen from outside.
    fn hand_over(&mut self) {
        if let Some(Err(error)) = self.parts.ring.as_mut().map(Ring::submit) {
            tracing::warn!(queue = self.parts.queue, %error, "io_uring takes no requests now");
        }
    }

    /// Tells the guest of all that is over, in order.
    fn tell(&mut self, vring: &Vring, memory: &GuestMemoryAtomic<Memory>) -> Result<(), RingFault> {
        if !self.window.has_finished() {
            return Ok(());
        }
        let queue_number = self.parts.queue;
        let unusable = |source| RingFault::Ring { queue: queue_number, source };
        let memory = memory.memory();
        let mut state = vring.get_mut();
        // A frontend sets the place of a ring that runs once more when it begins to log pages, and
        // ends; the crate reads the used index then and sets it as the next one, in two steps. What is
        // in memory was written by this device alone, and is right.
        let queue = state.get_queue_mut();
        let used = queue.used_idx(&*memory, Ordering::Relaxed).map_err(unusable);
        let mut told = used.map(|used| queue.set_next_used(used.0));
        while let Some(work) = self.window.pop_finished() {
            if told.is_ok() {
                let queue = state.get_queue_mut();
                told = queue.add_used(&*memory, work.head, work.used_len()).map_err(unusable);
            }
            self.told.push(work.popped);
            let (mut pieces, mut buffers) = (work.pieces, work.buffers);
            pieces.clear();
            buffers.clear();
            self.spare.push((pieces, buffers));
        }
        let signal = state.get_queue_mut().needs_notification(&*memory);
        // Rather once too often: nobody would signal later.
        if signal.unwrap_or(true)
            && let Err(error) = state.signal_used_queue()
        {
            tracing::warn!(queue = queue_number, %error, "the guest cannot be signalled");
        }
        drop(state);
        self.told.clear();
        told
    }
}

impl Parts {
    fn means(&mut self, mode: Mode) -> Means<'_> {
        Means { image: &self.image, ring: self.ring.as_mut(), serial: &self.serial, mode }
    }
}

/// Whether there may be more in the ring.
enum Popping {
    GoesOn,
    /// No, or it may not be taken out, or whoever changes that kicks.
    Rests,
}

/// How many requests were of no use, of one kind.
#[derive(Default)]
struct Refused(u64);

impl Refused {
    /// One more. Not each is in the log: a guest must not be able to fill it.
    fn note(&mut self, queue: usize, why: &dyn std::fmt::Display, text: &str) {
        self.0 += 1;
        if self.0.is_power_of_two() {
            tracing::warn!(queue, count = self.0, %why, "{text}");
        }
    }
}

/// Waits for the delay of a request that nothing else can wait for.
#[expect(clippy::disallowed_methods, reason = "to take time is what it is for")]
fn rest(delay: Duration) {
    std::thread::sleep(delay);
}
