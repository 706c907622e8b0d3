//! The rings of a device, as far as the runtime has to know them: which are started, where they are in
//! memory, and what is to be saved of them.
//!
//! A ring is started when the frontend says so, but the crate tells that only by the first event of it
//! ([`Rings::start`]). It is stopped by `GET_VRING_BASE`, by a reset or by the end of the connection.
//!
//! Nothing may be taken out of a ring before that first event: it tells where the ring goes on by the
//! index that the frontend has set. A thread has other events, too, and one of them can come between the
//! frontend's message and the ring's first event. Whoever has permits of its own gets none for a ring that
//! is not started; for the others each event is a first look at all rings of its thread.
//!
//! # In the middle of an event
//!
//! A backend without permits of its own takes what it finds, request by request or batch by batch, and
//! under a guest that always has another request it may never come to the end of an event. So when the
//! device is to rest, and while some event goes on, the started rings are made not ready, as
//! `GET_VRING_BASE` does it: then nothing can be taken out of them ([`Rings::close`]). They are made
//! ready again as soon as nothing is in flight. The crate looks at that when the frontend changes something:
//! a `SET_VRING_ENABLE` that comes in between has left the ring without its kicks, so whoever makes it ready
//! has its thread wait for them.
//!
//! That takes the lock of each ring, which a backend may hold throughout an event. So it is done on
//! a thread that may wait, and that finds out there whether it is still wanted.

#![forbid(unsafe_code)]

use super::kick::{kick, wait_for};
use super::pop_gate::PopGate;
use super::state::{SavedRing, Start, StartError, StateError};
use super::{Backend, Memory};
use crate::device::Progress;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vhost_user_backend::VringT;
use virtio_queue::{QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::event::EventConsumer;

/// All rings of a device, and which of them are closed in the middle of an event.
pub(super) struct Rings<B: Backend> {
    /// By queue number.
    all: Vec<Ring<B>>,
    /// Counts the changes of whether they are to be closed; odd while they are.
    rests: AtomicU64,
    /// Queues whose rings were made not ready here. Held while waiting for the lock of a ring: never
    /// taken by the control thread while something is in flight.
    closed: Mutex<Vec<usize>>,
    /// What a backend with permits of its own passes.
    pops: Option<PopGate>,
    /// By queue, of the present connection.
    waiters: Mutex<Vec<Waiter>>,
}

/// By what the thread of a ring waits for its kicks: an epoll, and a number there.
pub(super) type Waiter = (Arc<OwnedFd>, u64);

struct Ring<B: Backend> {
    /// Its first event since the frontend has started it was seen.
    started: AtomicBool,
    /// The guest is to be signalled at the next event: it may have missed a signal.
    signal_due: AtomicBool,
    state: Mutex<RingState<B>>,
}

struct RingState<B: Backend> {
    /// The present connection's.
    vring: Option<B::Vring>,
    /// Where it is in memory, while it is started.
    place: Option<Place<B>>,
    /// As it was at the end of the last connection, or in the state that was loaded.
    last: SavedRing,
    /// How the frontend must start it: it was loaded so, with these features accepted.
    expected: Option<(SavedRing, u64)>,
    /// Why it was not started, which was told.
    refused: Option<StartError>,
    /// How often it was stopped.
    stops: u64,
    /// What came of the first look at it since then.
    looked: Option<Looked>,
}

/// A ring that can be served.
#[derive(Clone, Copy)]
struct Looked {
    avail: u64,
    used: u64,
    /// The index that the frontend has set, if the ring goes on at another one.
    moved: Option<u16>,
}

struct Place<B: Backend> {
    memory: Memory<B>,
    avail: u64,
    used: u64,
}

impl<B: Backend> Place<B> {
    /// The two indexes that driver and device have published. `None` if the memory has gone.
    fn indexes(&self) -> Option<(u16, u16)> {
        let memory = self.memory.memory();
        let index = |ring: u64| {
            let at = GuestAddress(ring.checked_add(2)?);
            memory.load(at, Ordering::Acquire).ok().map(u16::from_le)
        };
        Some((index(self.avail)?, index(self.used)?))
    }
}

/// How a ring is looked at for the first time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Its backend completes in order.
    pub(super) in_order: bool,
    /// Something may have been taken out of it, and used, since the frontend has started it.
    pub(super) late: bool,
}

/// What came of the first look at a ring.
#[derive(Debug)]
pub(super) enum Started {
    /// It is started. If the frontend has set another index than the one at which it goes on, that.
    Yes(Option<u16>),
    /// The frontend has not started it yet, or stopped it already.
    NotReady,
    /// It cannot be served; `true` the first time that this is found.
    Refused(StartError, bool),
}

impl<B: Backend> Rings<B> {
    /// `pops` is what a backend with permits of its own passes.
    pub(super) fn new(queues: usize, pops: Option<PopGate>) -> Self {
        let ring = || Ring {
            started: AtomicBool::new(false),
            signal_due: AtomicBool::new(false),
            state: Mutex::new(RingState {
                vring: None,
                place: None,
                last: SavedRing::default(),
                expected: None,
                refused: None,
                stops: 0,
                looked: None,
            }),
        };
        let all = (0..queues).map(|_| ring()).collect();
        if let Some(pops) = &pops {
            (0..queues).for_each(|queue| pops.hold_queue(queue));
        }
        let (closed, waiters) = (Mutex::default(), Mutex::default());
        Self { all, rests: AtomicU64::new(0), closed, pops, waiters }
    }

    #[inline]
    pub(super) fn is_started(&self, queue: usize) -> bool {
        self.all.get(queue).is_some_and(|ring| ring.started.load(Ordering::Acquire))
    }

    pub(super) fn any_started(&self) -> bool {
        (0..self.all.len()).any(|queue| self.is_started(queue))
    }

    /// The first look at a ring that is not started as far as is known. Called by the thread that
    /// serves it.
    pub(super) fn start(
        &self,
        queue: usize,
        vring: &B::Vring,
        memory: &Memory<B>,
        accepted: u64,
        look: Look,
    ) -> Started {
        let Some(ring) = self.all.get(queue) else { return Started::NotReady };
        let stops = ring.state().stops;
        let (is_enabled, found) = {
            let vring = vring.get_ref();
            let queue = vring.get_queue();
            if !queue.ready() {
                return Started::NotReady;
            }
            let in_memory = queue.is_valid(&*memory.memory());
            (vring.is_enabled(), in_memory.then(|| queue.state()))
        };
        let mut state = ring.state();
        if state.stops != stops {
            // It was stopped meanwhile, and gives another first event if it was started again.
            return Started::NotReady;
        }
        // One that is ready and not enabled yet has no events, but other events may use it.
        let looked = match state.looked {
            Some(looked) => looked,
            None => match state.look(found, accepted, look) {
                Ok(looked) => looked,
                Err(error) => {
                    // Also for a backend that would use it in an event of something else.
                    vring.set_queue_ready(false);
                    let is_news = state.refused.replace(error).is_none();
                    return Started::Refused(error, is_news);
                }
            },
        };
        if let (None, Some(_), Some(found)) = (state.looked.replace(looked), looked.moved, found) {
            vring.set_queue_next_avail(found.next_used);
        }
        state.expected = None;
        state.refused = None;
        if !is_enabled {
            return Started::NotReady;
        }
        let Looked { avail, used, moved } = looked;
        state.vring = Some(vring.clone());
        state.place = Some(Place { memory: memory.clone(), avail, used });
        ring.signal_due.store(true, Ordering::Relaxed);
        ring.started.store(true, Ordering::Release);
        if let Some(pops) = &self.pops {
            pops.release_queue(queue);
        }
        // Before it is seen whether the gate is closed: see `kicks_missed`.
        fence(Ordering::SeqCst);
        Started::Yes(moved)
    }

    /// The frontend has stopped a ring. Whatever is in flight there still is.
    pub(super) fn stopped(&self, queue: usize) {
        let Some(ring) = self.all.get(queue) else { return };
        let mut closed = self.closed();
        closed.retain(|closed| *closed != queue);
        self.mark_stopped(queue, &mut ring.state());
        let vring = ring.state().vring.clone();
        if let Some(vring) = vring {
            // It may have been made ready here after the crate had stopped it.
            vring.set_queue_ready(false);
        }
    }

    fn mark_stopped(&self, queue: usize, state: &mut RingState<B>) {
        if let Some(ring) = self.all.get(queue) {
            ring.started.store(false, Ordering::Release);
        }
        if let Some(pops) = &self.pops {
            pops.hold_queue(queue);
        }
        state.place = None;
        state.refused = None;
        state.stops += 1;
        state.looked = None;
    }

    /// From now on nothing more is to be taken out of the rings, by whoever is in the middle of an event
    /// either. What it returns is for [`close`](Self::close). Never waits.
    pub(super) fn begin_rest(&self) -> u64 {
        let next = |rests: u64| if rests.is_multiple_of(2) { rests + 1 } else { rests + 2 };
        let updated =
            self.rests.fetch_update(Ordering::AcqRel, Ordering::Acquire, |rests| Some(next(rests)));
        updated.map_or(1, next)
    }

    /// That has ended; [`open`](Self::open) does the rest. Never waits.
    pub(super) fn end_rest(&self) {
        let next = |rests: u64| Some(rests + rests % 2);
        // It always gives something.
        let _ = self.rests.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// Makes the started rings not ready, as long as that rest goes on. May wait for the end of an event.
    pub(super) fn close(&self, rest: u64) {
        let mut closed = self.closed();
        for (queue, ring) in self.all.iter().enumerate() {
            let vring = ring.state().vring.clone();
            let Some(vring) = vring.filter(|_| self.is_started(queue)) else { continue };
            if self.rests.load(Ordering::Acquire) != rest {
                return;
            }
            vring.set_queue_ready(false);
            closed.push(queue);
        }
    }

    /// Makes the rings ready that were closed, unless another rest has begun. May wait for the end of an
    /// event, if one goes on.
    pub(super) fn open(&self) {
        let mut closed = self.closed();
        if self.rests.load(Ordering::Acquire) % 2 == 1 {
            return;
        }
        for queue in closed.drain(..) {
            let vring = self.all.get(queue).and_then(|ring| ring.state().vring.clone());
            if let Some(vring) = vring.filter(|_| self.is_started(queue)) {
                vring.set_queue_ready(true);
                self.wait_for_kicks(queue, &vring);
            }
        }
    }

    /// Has the thread of a ring wait for its kicks, if the frontend has it enabled.
    fn wait_for_kicks(&self, queue: usize, vring: &B::Vring) {
        let Some((epoll, number)) = self.waiters().get(queue).cloned() else { return };
        // Held so that the frontend changes nothing meanwhile.
        let state = vring.get_ref();
        let Some(kick) = state.get_kick().as_ref().filter(|_| state.is_enabled()) else { return };
        if let Err(error) = wait_for(&epoll, kick, number) {
            tracing::error!(%error, queue, "nobody waits for the kicks of a ring");
        }
    }

    /// A frontend has connected; these are for its rings.
    pub(super) fn connected(&self, waiters: Vec<Waiter>) {
        *self.waiters() = waiters;
    }

    fn waiters(&self) -> MutexGuard<'_, Vec<Waiter>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn closed(&self) -> MutexGuard<'_, Vec<usize>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The frontend has reset the device: it starts its rings over, wherever it likes.
    pub(super) fn reset(&self) {
        self.closed().clear();
        for (queue, ring) in self.all.iter().enumerate() {
            let mut state = ring.state();
            self.mark_stopped(queue, &mut state);
            state.vring = None;
            state.expected = None;
            state.last = SavedRing::default();
        }
    }

    /// The coordinator has reset the device: its rings are the frontend's and stay as they are.
    pub(super) fn expect_nothing(&self) {
        for ring in &self.all {
            ring.state().expected = None;
        }
    }

    /// The connection has ended, and nothing is in flight.
    pub(super) fn disconnected(&self) {
        self.closed().clear();
        self.waiters().clear();
        for (queue, ring) in self.all.iter().enumerate() {
            let mut state = ring.state();
            self.mark_stopped(queue, &mut state);
            if let Some(vring) = state.vring.take() {
                state.last = SavedRing::of(&vring.get_ref().get_queue().state());
            }
        }
    }

    /// The guest is to be signalled at the next event of each ring.
    pub(super) fn want_signals(&self) {
        for ring in &self.all {
            ring.signal_due.store(true, Ordering::Release);
        }
    }

    /// Whether the guest is to be signalled.
    #[inline]
    pub(super) fn is_signal_due(&self, queue: usize) -> bool {
        self.all.get(queue).is_some_and(|ring| ring.signal_due.load(Ordering::Acquire))
    }

    /// The same, for who does it.
    pub(super) fn take_signal(&self, queue: usize) -> bool {
        self.all.get(queue).is_some_and(|ring| ring.signal_due.swap(false, Ordering::AcqRel))
    }

    /// Kicks every started ring, whether or not there is something in it. Waits for a thread that has locked
    /// its ring.
    pub(super) fn kick_all(&self) {
        for (queue, ring) in self.all.iter().enumerate() {
            let vring = ring.state().vring.clone();
            let Some(vring) = vring.filter(|_| self.is_started(queue)) else { continue };
            let state = vring.get_ref();
            if let Some(eventfd) = state.get_kick() {
                kick(eventfd).unwrap_or_else(|error| not_kicked(queue, &error));
            }
        }
    }

    /// The same for later, when nobody may wait: all for which an fd can be had. Waits as that does.
    pub(super) fn kicks(&self) -> Kicks {
        let mut kicks = Vec::new();
        for (queue, ring) in self.all.iter().enumerate() {
            let vring = ring.state().vring.clone();
            let Some(vring) = vring.filter(|_| self.is_started(queue)) else { continue };
            let duplicate = vring.get_ref().get_kick().as_ref().map(EventConsumer::try_clone);
            if let Some(Ok(eventfd)) = duplicate {
                kicks.push((queue, eventfd));
            }
        }
        Kicks(kicks)
    }

    /// Whether there are others to be kicked than those that [`kicks`](Self::kicks) has given. The gate was
    /// opened since: the first event of a ring that was started meanwhile may have found it closed.
    pub(super) fn kicks_missed(&self, kicked: &[usize]) -> bool {
        fence(Ordering::SeqCst);
        (0..self.all.len()).any(|queue| self.is_started(queue) && !kicked.contains(&queue))
    }

    /// What is to be saved. Nothing is in flight.
    pub(super) fn save(&self) -> Vec<SavedRing> {
        let save = |ring: &Ring<B>| {
            let state = ring.state();
            match (&state.vring, &state.expected) {
                (Some(vring), None) => SavedRing::of(&vring.get_ref().get_queue().state()),
                (_, Some((expected, _))) => *expected,
                (None, None) => state.last,
            }
        };
        self.all.iter().map(save).collect()
    }

    /// Whether rings that the frontend has started already are as they were saved.
    pub(super) fn check_started(
        &self,
        saved: &[SavedRing],
        accepted: u64,
        now: u64,
    ) -> Result<(), StateError> {
        for (queue, (ring, saved)) in self.all.iter().zip(saved).enumerate() {
            let state = ring.state();
            let Some(vring) = state.vring.as_ref().filter(|_| self.is_started(queue)) else {
                continue;
            };
            let found = vring.get_ref().get_queue().state();
            let start = Start {
                size: found.size,
                next_avail: found.next_avail,
                next_used: found.next_used,
                accepted: now,
            };
            let checked = start.check(saved.used.then_some((saved, accepted)), false);
            checked.map_err(|source| StateError::Start { queue, source })?;
        }
        Ok(())
    }

    /// From now on the frontend must start its rings so.
    pub(super) fn load(&self, saved: &[SavedRing], accepted: u64) {
        for (queue, (ring, saved)) in self.all.iter().zip(saved).enumerate() {
            let is_started = self.is_started(queue);
            let mut state = ring.state();
            state.last = *saved;
            state.looked = None;
            // One that is started was looked at.
            state.expected = (saved.used && !is_started).then_some((*saved, accepted));
        }
    }

    /// How far the rings are that `is_watched`: entries used, and whether some are left.
    pub(super) fn progress(&self, is_watched: impl Fn(usize) -> bool) -> Progress {
        let mut progress = Progress::default();
        for (queue, ring) in self.all.iter().enumerate() {
            let indexes = ring.state().place.as_ref().and_then(Place::indexes);
            let Some((avail, used)) = indexes else { continue };
            progress.done = progress.done.wrapping_add(used.into());
            progress.pending |= avail != used && is_watched(queue);
        }
        progress
    }
}

impl<B: Backend> RingState<B> {
    /// Whether it can be served as the frontend has set it up, and where it goes on. `found` is how it is,
    /// if it lies in memory.
    fn look(
        &self,
        found: Option<QueueState>,
        accepted: u64,
        look: Look,
    ) -> Result<Looked, StartError> {
        if let Some(error @ StartError::Late { .. }) = self.refused {
            // Where it goes on cannot be found out any more.
            return Err(error);
        }
        let found = found.ok_or(StartError::Memory)?;
        let (next_avail, next_used) = (found.next_avail, found.next_used);
        let start = Start { size: found.size, next_avail, next_used, accepted };
        let expected = self.expected.as_ref().map(|(ring, features)| (ring, *features));
        let is_moved = start.check(expected, look.in_order)? != next_avail;
        if is_moved && look.late {
            return Err(StartError::Late { next_avail, next_used });
        }
        let (avail, used) = (found.avail_ring, found.used_ring);
        Ok(Looked { avail, used, moved: is_moved.then_some(next_avail) })
    }
}

/// The kick eventfds of the rings that were started.
#[derive(Debug)]
pub(super) struct Kicks(Vec<(usize, EventConsumer)>);

impl Kicks {
    /// The queues.
    pub(super) fn queues(&self) -> Vec<usize> {
        self.0.iter().map(|(queue, _)| *queue).collect()
    }

    /// Kicks them all. Never waits.
    pub(super) fn give(self) {
        for (queue, eventfd) in self.0 {
            kick(&eventfd).unwrap_or_else(|error| not_kicked(queue, &error));
        }
    }
}

fn not_kicked(queue: usize, error: &std::io::Error) {
    tracing::error!(%error, queue, "a ring is not kicked: what is in it waits");
}

impl<B: Backend> Ring<B> {
    /// Held for moments only: no lock of a ring is waited for with it.
    fn state(&self) -> MutexGuard<'_, RingState<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
