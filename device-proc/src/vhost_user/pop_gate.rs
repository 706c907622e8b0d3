//! Who may take requests out of a ring now, and when are those that were taken done?

use crate::gate::{Age, InFlight};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What every pop from a ring passes, for all rings of a device.
///
/// A request is in flight from before it is taken out of its ring until its used entry is published
/// and the guest is signalled. Whoever pops holds a [`Popped`] as long as that:
///
/// ```
/// use standstill_device_proc::vhost_user::{PopGate, Popped};
///
/// fn serve_ring(pops: &PopGate, queue: usize, mut pop: impl FnMut() -> Option<u16>) -> Vec<(u16, Popped)> {
///     let mut begun = Vec::new();
///     // Before the pop: a gate that is closed leaves the request in the ring.
///     while let Some(popped) = pops.enter(queue) {
///         let Some(head) = pop() else { break };
///         begun.push((head, popped));
///     }
///     begun
/// }
///
/// let pops = PopGate::new(1);
/// let mut ring = vec![1, 0];
/// let begun = serve_ring(&pops, 0, || ring.pop());
/// assert_eq!(pops.in_flight(), 2);
/// drop(begun);
/// pops.close();
/// assert!(pops.enter(0).is_none());
/// ```
///
/// All clones are the same gate. Entering and leaving cost two atomic operations each, on memory
/// that the queues do not share, and no system call as long as nobody waits.
#[derive(Clone)]
pub struct PopGate(Arc<Gates>);

struct Gates {
    queues: Box<[Arc<Queue>]>,
    holds: Mutex<Holds>,
    /// Wakes [`wait_open`](PopGate::wait_open).
    changed: Condvar,
    /// The gate of the device's DMA, which can be told to hold nobody back.
    #[cfg(feature = "fault-injection")]
    dma: std::sync::OnceLock<Arc<crate::gate::Gate>>,
}

/// Why it is closed.
struct Holds {
    /// For all queues: a bit for each [`Hold`].
    all: u8,
    /// By queue: its ring is not started, as far as the runtime has seen.
    not_started: Box<[bool]>,
}

/// One ring's count. Rings are served by threads of their own, so that no two share a cache line.
#[derive(Default)]
#[repr(align(128))]
struct Queue(InFlight);

/// Why nothing may be popped. It is open when there is no reason left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Hold {
    /// The device is stopped, or about to be.
    Stopped = 1,
    /// The backend cannot go on.
    Failed = 2,
    /// The device is being reset.
    Resetting = 4,
    /// The frontend has gone, and what it had asked for comes to its end.
    Leaving = 8,
    /// The threads that served it are to end.
    Exiting = 16,
    /// Somebody else has what the device needs to itself, or no ring is started that it needs it for.
    Unclaimed = 32,
}

impl PopGate {
    /// Open, for that many queues, with nothing in flight.
    #[must_use]
    pub fn new(queues: usize) -> Self {
        let not_started = vec![false; queues].into_boxed_slice();
        let queues = (0..queues).map(|_| Arc::default()).collect();
        Self(Arc::new(Gates {
            queues,
            holds: Mutex::new(Holds { all: 0, not_started }),
            changed: Condvar::new(),
            #[cfg(feature = "fault-injection")]
            dma: std::sync::OnceLock::new(),
        }))
    }

    /// Leave to take one request (or one batch of them) out of this queue's ring. `None` if the gate
    /// is closed, the frontend has not started the ring, or there is no such queue: then nothing may be
    /// popped, and the caller returns as if there were no work. What is in the ring is found again by the
    /// kick that every started ring gets when the gate opens, or by the ring's first event. Never waits.
    #[inline]
    #[must_use]
    pub fn enter(&self, queue: usize) -> Option<Popped> {
        let queue = self.0.queues.get(queue)?;
        #[cfg(feature = "fault-injection")]
        crate::fault::pass(standstill_protocol::fault::Point::Dma);
        let entered = queue.0.try_count_up();
        #[cfg(feature = "fault-injection")]
        let (queue, entered) = match entered {
            None => (self.leak()?, Some(Age::Even)),
            entered => (queue, entered),
        };
        let popped = Popped { age: entered?, queue: Arc::clone(queue) };
        #[cfg(feature = "fault-injection")]
        crate::fault::pass(standstill_protocol::fault::Point::DmaInFlight);
        Some(popped)
    }

    /// For how many queues it is.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.0.queues.len()
    }

    /// Gives out no more leave to pop. Those given out already stay valid: wait for them with
    /// [`drained`](Self::drained). The runtime does this when the device is to stop.
    pub fn close(&self) {
        self.hold(Hold::Stopped);
    }

    /// Undoes [`close`](Self::close). Whoever opens it gives every started ring a kick.
    pub fn open(&self) {
        self.release(Hold::Stopped);
    }

    /// Whether it is closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.holds().all != 0
    }

    /// How many [`Popped`] there are.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.0.queues.iter().map(|queue| queue.0.in_flight()).sum()
    }

    /// How many [`Popped`] of this queue there are.
    #[must_use]
    pub fn in_flight_of(&self, queue: usize) -> u64 {
        self.0.queues.get(queue).map_or(0, |queue| queue.0.in_flight())
    }

    /// Waits until nothing is in flight. Call it after [`close`](Self::close). Completes at once,
    /// without yielding, if nothing is in flight; also completes if it is opened meanwhile. May be
    /// dropped at any time.
    pub async fn drained(&self) {
        for queue in &self.0.queues {
            queue.0.drained().await;
        }
    }

    /// As [`drained`](Self::drained), but blocks the calling OS thread, at most that long. Returns
    /// whether nothing is in flight.
    #[must_use]
    pub fn drained_within(&self, timeout: Duration) -> bool {
        let begin = Instant::now();
        let left = || timeout.saturating_sub(begin.elapsed());
        self.0.queues.iter().all(|queue| queue.0.drained_within(left()))
    }

    /// Waits until all that is in flight in this queue now has ended, whether or not the gate is
    /// closed: others may enter meanwhile, which find a ring that was stopped before and pop nothing.
    /// Blocks the calling OS thread, at most that long. Returns whether all has ended.
    #[must_use]
    pub fn passed_within(&self, queue: usize, timeout: Duration) -> bool {
        self.0.queues.get(queue).is_none_or(|queue| queue.0.passed_within(timeout))
    }

    /// Closes it for that reason, too.
    pub(crate) fn hold(&self, reason: Hold) {
        let mut holds = self.holds();
        holds.all |= reason as u8;
        for queue in &self.0.queues {
            queue.0.close();
        }
        self.0.changed.notify_all();
    }

    /// That reason is gone. Returns whether it is open now.
    pub(crate) fn release(&self, reason: Hold) -> bool {
        let mut holds = self.holds();
        holds.all &= !(reason as u8);
        if holds.all != 0 {
            return false;
        }
        for (queue, not_started) in self.0.queues.iter().zip(&holds.not_started) {
            if !not_started {
                queue.0.open();
            }
        }
        self.0.changed.notify_all();
        true
    }

    /// The ring of this queue is not started: nothing may be taken out of it.
    pub(crate) fn hold_queue(&self, queue: usize) {
        self.set_not_started(queue, true);
    }

    /// It is.
    pub(crate) fn release_queue(&self, queue: usize) {
        self.set_not_started(queue, false);
    }

    fn set_not_started(&self, number: usize, is_so: bool) {
        let mut holds = self.holds();
        let Some(queue) = self.0.queues.get(number) else { return };
        if let Some(not_started) = holds.not_started.get_mut(number) {
            *not_started = is_so;
        }
        if is_so {
            queue.0.close();
        } else if holds.all == 0 {
            queue.0.open();
        }
    }

    /// Closes it for good, and waits as [`drained_within`](Self::drained_within) does.
    pub(crate) fn end_within(&self, timeout: Duration) -> bool {
        self.hold(Hold::Leaving);
        self.drained_within(timeout)
    }

    /// Whether it is closed for that reason, and maybe others.
    pub(crate) fn is_held(&self, reason: Hold) -> bool {
        self.holds().all & reason as u8 != 0
    }

    /// Blocks the calling OS thread while it is closed; returns false if that is so since the threads
    /// are to end.
    pub(crate) fn wait_open(&self) -> bool {
        let mut holds = self.holds();
        while holds.all != 0 {
            if holds.all & Hold::Exiting as u8 != 0 {
                return false;
            }
            holds = self.0.changed.wait(holds).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    fn holds(&self) -> MutexGuard<'_, Holds> {
        self.0.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a gate should never do.
#[cfg(feature = "fault-injection")]
impl PopGate {
    /// Holds nobody back when the gate of the device's DMA is told to.
    pub(crate) fn leaks_with(&self, dma: &Arc<crate::gate::Gate>) {
        // There is one device in a process.
        let _ = self.0.dma.set(Arc::clone(dma));
    }

    /// A queue that nobody waits for, if leave is given although the gate is closed.
    fn leak(&self) -> Option<&'static Arc<Queue>> {
        static UNCOUNTED: std::sync::LazyLock<Arc<Queue>> = std::sync::LazyLock::new(Arc::default);
        let leaks = self.0.dma.get().is_some_and(|dma| dma.leaks());
        (leaks && UNCOUNTED.0.try_count_up().is_some()).then_some(&UNCOUNTED)
    }
}

impl fmt::Debug for PopGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PopGate")
            .field("queues", &self.0.queues.len())
            .field("closed", &self.is_closed())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

/// A request that may be popped, is in flight, or both. Drop it after the used entry was published
/// and the guest was signalled.
#[must_use = "the request counts as done when this is dropped"]
pub struct Popped {
    queue: Arc<Queue>,
    age: Age,
}

impl fmt::Debug for Popped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Popped").finish_non_exhaustive()
    }
}

impl Drop for Popped {
    fn drop(&mut self) {
        self.queue.0.count_down(self.age);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn each_queue_is_counted_and_all_together() {
        let pops = PopGate::new(2);
        let (a, b) = (pops.enter(0).unwrap(), pops.clone().enter(1).unwrap());
        assert!(pops.enter(2).is_none());
        assert_eq!((pops.in_flight_of(0), pops.in_flight_of(1), pops.in_flight()), (1, 1, 2));
        drop(a);
        assert_eq!((pops.in_flight_of(0), pops.in_flight_of(1), pops.in_flight()), (0, 1, 1));
        assert!(pops.passed_within(0, Duration::ZERO));
        assert!(!pops.passed_within(1, Duration::ZERO));
        drop(b);
        assert!(pops.passed_within(1, Duration::ZERO));
    }

    #[test]
    fn a_closed_gate_lets_nobody_in_and_drains() {
        let pops = PopGate::new(2);
        let popped = pops.enter(1).unwrap();
        pops.close();
        assert!(pops.is_closed() && pops.enter(0).is_none() && pops.enter(1).is_none());
        assert!(!pops.drained_within(Duration::from_millis(1)));
        let other = thread::spawn(move || drop(popped));
        assert!(pops.drained_within(LONG));
        other.join().unwrap();
        pops.open();
        assert!(!pops.is_closed() && pops.enter(0).is_some());
    }

    #[test]
    fn a_queue_whose_ring_is_not_started_stays_closed() {
        let pops = PopGate::new(2);
        pops.hold_queue(0);
        assert!(pops.enter(0).is_none() && pops.enter(1).is_some() && !pops.is_closed());
        pops.close();
        pops.open();
        assert!(pops.enter(0).is_none() && pops.enter(1).is_some());
        pops.close();
        pops.release_queue(0);
        assert!(pops.enter(0).is_none());
        pops.open();
        let popped = pops.enter(0).unwrap();
        pops.hold_queue(0);
        assert!(!pops.passed_within(0, Duration::from_millis(1)));
        drop(popped);
        assert!(pops.passed_within(0, LONG) && pops.enter(0).is_none());
    }

    #[tokio::test]
    async fn who_waits_without_a_thread_is_woken_by_the_last_one() {
        let pops = PopGate::new(3);
        let popped: Vec<_> = (0..3).map(|queue| pops.enter(queue).unwrap()).collect();
        pops.close();
        let (drained, ()) = tokio::join!(tokio::time::timeout(LONG, pops.drained()), async {
            drop(popped);
        });
        drained.unwrap();
    }

    /// In band: the ring is stopped, the gate is open, and spurious events go on to enter.
    #[test]
    fn what_is_in_flight_passes_while_others_enter() {
        let pops = PopGate::new(1);
        let before = pops.enter(0).unwrap();
        let waiting = {
            let pops = pops.clone();
            thread::spawn(move || pops.passed_within(0, LONG))
        };
        let after: Vec<_> = (0..3).map(|_| pops.enter(0).unwrap()).collect();
        drop(before);
        drop(after);
        assert!(waiting.join().unwrap());
    }

    #[test]
    fn nothing_is_in_flight_after_a_drain_whoever_races() {
        let pops = PopGate::new(2);
        let begun = Arc::new(AtomicU64::new(0));
        let workers: Vec<_> = (0..2)
            .map(|queue| {
                let (pops, begun) = (pops.clone(), Arc::clone(&begun));
                thread::spawn(move || {
                    let mut refused = 0;
                    while refused < 50 {
                        let Some(_popped) = pops.enter(queue) else {
                            refused += 1;
                            thread::yield_now();
                            continue;
                        };
                        begun.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        while !workers.iter().all(thread::JoinHandle::is_finished) {
            pops.close();
            assert!(pops.drained_within(LONG));
            let before = begun.load(Ordering::Relaxed);
            thread::yield_now();
            assert_eq!((begun.load(Ordering::Relaxed), pops.in_flight()), (before, 0));
            pops.open();
        }
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    }
}
