//! Who may do something now, and when is the last one of them done?
//!
//! [`InFlight`] is the primitive: who wants to do something takes a [`Permit`] and drops it
//! afterwards; who wants it to stop [closes](InFlight::close) and waits until
//! [nobody is left](InFlight::drained). Taking and dropping a permit costs one atomic operation
//! each and no system call as long as it is open. Who only wants to know that whatever is under
//! way *now* has ended, and lets others begin meanwhile, waits until it has
//! [passed](InFlight::passed).
//!
//! [`Gate`] is the pair of them that all DMA of a device passes: one for accesses that touch a
//! peer's memory, one for those that touch RAM only. A device comes to rest in two steps:
//!
//! | to | call | what goes on |
//! |---|---|---|
//! | no peer DMA (RUNNING_P2P) | `close(Scope::Peer)` | RAM accesses |
//! | no DMA (STOP) | `close(Scope::All)` | nothing |
//! | no peer DMA | `open(Scope::Ram)` | RAM accesses |
//! | everything (RUNNING) | `open(Scope::All)` | everything |
//!
//! Nothing (no device lock, no reference to a DMA window) may be held while
//! [waiting for a permit](InFlight::enter): whoever waits for that thing would wait for the start
//! of the machine.
//!
//! # Why nothing is lost
//!
//! One word holds the closed bit and the number of permits, so all changes of both have one
//! order. A closer that does not find the number 0 in its own change comes before the leaver that
//! brings it to 0; that leaver finds the closed bit in *its* change and wakes the waiters. Who
//! enters does so by compare-and-swap and never changes a closed word, so after a close the number
//! only falls. Waiters register (with the mutex, or by making the notification future) before they
//! look at the word, wakers change the word before they wake.
//!
//! Permits are counted in two numbers, and one bit says in which of them those count that are given
//! out now. Who waits for all present ones to pass turns that bit and waits until the number that
//! counted before is 0; it does not turn before the other number is 0, so no two ages mix.
//!
//! Entering acquires and leaving releases: what was done under a permit happens before
//! whatever a closer does after it found the number 0.

#![forbid(unsafe_code)]

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::Notify;

/// The bit of [`InFlight::word`] that says closed.
const CLOSED: u64 = 1 << 63;
/// The bit that says which of the two numbers counts the permits that are given out now.
const TURN: u64 = 1 << 62;
/// Bits of each number: no process has so many threads.
const BITS: u32 = 31;
/// The bits of both numbers.
const COUNTS: u64 = TURN - 1;

/// In which of the two numbers a permit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    Even,
    Odd,
}

impl Age {
    /// Of the permits that are given out while the word is this.
    fn present(word: u64) -> Self {
        if word & TURN == 0 { Self::Even } else { Self::Odd }
    }

    fn other(self) -> Self {
        match self {
            Self::Even => Self::Odd,
            Self::Odd => Self::Even,
        }
    }

    /// Where its number is in the word.
    fn shift(self) -> u32 {
        match self {
            Self::Even => 0,
            Self::Odd => BITS,
        }
    }

    /// What one permit adds to the word.
    fn unit(self) -> u64 {
        1 << self.shift()
    }

    /// How many permits of this age a word counts.
    fn count(self, word: u64) -> u64 {
        (word >> self.shift()) & ((1 << BITS) - 1)
    }
}

/// Counts what is in flight and can be closed; see the [module](self).
#[derive(Default)]
pub struct InFlight {
    /// [`CLOSED`], [`TURN`] and the two numbers of permits.
    word: AtomicU64,
    /// Wakes [`drained`](Self::drained) and [`passed`](Self::passed).
    left: Notify,
    /// How many threads sleep on the two below; guards the order of looking at `word` and
    /// sleeping, too.
    sleepers: Mutex<usize>,
    /// Wakes [`drained_within`](Self::drained_within) and [`passed_within`](Self::passed_within).
    empty: Condvar,
    /// Wakes [`enter`](Self::enter).
    opened: Condvar,
    /// It gives out permits although it is closed, until it is opened.
    #[cfg(feature = "fault-injection")]
    leaks: std::sync::atomic::AtomicBool,
}

impl InFlight {
    /// Open, with nothing in flight.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A permit, or `None` if it is closed. Never waits.
    pub fn try_enter(&self) -> Option<Permit<'_>> {
        let permit = self.try_count_up().map(|age| Permit { of: self, age });
        #[cfg(feature = "fault-injection")]
        let permit = permit.or_else(|| self.leak_through());
        permit
    }

    /// A permit; blocks the calling OS thread while it is closed.
    ///
    /// Hold nothing that others wait for, and do not call this from an async task.
    pub fn enter(&self) -> Permit<'_> {
        loop {
            if let Some(permit) = self.try_enter() {
                return permit;
            }
            self.wait_open();
        }
    }

    /// Blocks the calling OS thread while it is closed. It may be closed again when this returns.
    pub fn wait_open(&self) {
        let mut sleepers = self.lock();
        while self.holds_back() {
            *sleepers += 1;
            sleepers = self.opened.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
            *sleepers -= 1;
        }
    }

    /// Gives out no more permits. Returns whether it was open before.
    ///
    /// Those given out already stay valid: wait for them with [`drained`](Self::drained).
    pub fn close(&self) -> bool {
        self.word.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    /// Gives out permits again and wakes whoever waits for one. Returns whether it was closed
    /// before.
    pub fn open(&self) -> bool {
        #[cfg(feature = "fault-injection")]
        self.leaks.store(false, Ordering::Relaxed);
        let was_closed = self.word.fetch_and(!CLOSED, Ordering::AcqRel) & CLOSED != 0;
        if was_closed {
            if self.anybody_sleeps() {
                self.opened.notify_all();
                // Who waits for it to drain has nothing to wait for any more.
                self.empty.notify_all();
            }
            self.left.notify_waiters();
        }
        was_closed
    }

    /// Whether it is closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Whether whoever wants a permit has to wait for it.
    pub(crate) fn holds_back(&self) -> bool {
        #[cfg(feature = "fault-injection")]
        if self.leaks.load(Ordering::Relaxed) {
            return false;
        }
        self.is_closed()
    }

    /// How many permits are held now.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let word = self.word.load(Ordering::Acquire);
        Age::Even.count(word) + Age::Odd.count(word)
    }

    /// Waits until no permit is held. Call it after [`close`](Self::close).
    ///
    /// Completes at once, without yielding, if nothing is in flight. Also completes if it is
    /// opened meanwhile: then there is no end to wait for. May be dropped at any time.
    pub async fn drained(&self) {
        loop {
            // Made before the look at the word: from now on a wake-up is not missed.
            let left = self.left.notified();
            if self.is_settled() {
                return;
            }
            left.await;
        }
    }

    /// Waits until every permit that is held now has been dropped; others may be given out meanwhile.
    ///
    /// What was done before the call is visible to whoever gets a permit that this does not wait
    /// for. Completes at once, without yielding, if nothing is in flight. May be dropped at any
    /// time.
    pub async fn passed(&self) {
        let mut waits_for = None;
        loop {
            // Made before the look at the word, as above.
            let left = self.left.notified();
            match waits_for {
                None => {
                    waits_for = self.try_turn();
                    if waits_for.is_some() {
                        // Others wait for an age before this one.
                        self.wake();
                    } else {
                        left.await;
                    }
                }
                Some(age) if self.has_passed(age) => return,
                Some(_) => left.await,
            }
        }
    }

    /// Has new permits counted in the other number, if that is 0. Returns the age of those that
    /// are to pass; the caller then wakes who waits for an age before it.
    fn try_turn(&self) -> Option<Age> {
        let turned = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            (Age::present(word).other().count(word) == 0).then_some(word ^ TURN)
        });
        turned.ok().map(Age::present)
    }

    /// As [`passed`](Self::passed), but blocks the calling OS thread, at most that long. Returns
    /// whether all that were held have been dropped.
    #[must_use]
    pub fn passed_within(&self, timeout: Duration) -> bool {
        let begin = Instant::now();
        let mut waits_for = None;
        let mut sleepers = self.lock();
        loop {
            if waits_for.is_none() {
                waits_for = self.try_turn();
                if waits_for.is_some() {
                    self.empty.notify_all();
                    self.left.notify_waiters();
                }
            }
            if waits_for.is_some_and(|age| self.has_passed(age)) {
                return true;
            }
            let Some(rest) = timeout.checked_sub(begin.elapsed()).filter(|rest| !rest.is_zero())
            else {
                return false;
            };
            *sleepers += 1;
            let slept = self.empty.wait_timeout(sleepers, rest);
            sleepers = slept.unwrap_or_else(PoisonError::into_inner).0;
            *sleepers -= 1;
        }
    }

    /// Whether no permit of an age that was turned away from is held any more.
    fn has_passed(&self, age: Age) -> bool {
        let word = self.word.load(Ordering::Acquire);
        // If somebody has turned it again, the number was 0 then.
        age == Age::present(word) || age.count(word) == 0
    }

    /// As [`drained`](Self::drained), but blocks the calling OS thread, at most that long.
    /// Returns whether nothing is in flight.
    #[must_use]
    pub fn drained_within(&self, timeout: Duration) -> bool {
        let begin = Instant::now();
        let mut sleepers = self.lock();
        while !self.is_settled() {
            let Some(rest) = timeout.checked_sub(begin.elapsed()).filter(|rest| !rest.is_zero())
            else {
                break;
            };
            *sleepers += 1;
            let slept = self.empty.wait_timeout(sleepers, rest);
            sleepers = slept.unwrap_or_else(PoisonError::into_inner).0;
            *sleepers -= 1;
        }
        drop(sleepers);
        self.in_flight() == 0
    }

    /// Enters without a guard; the caller pairs it with [`count_down`](Self::count_down).
    pub(crate) fn try_count_up(&self) -> Option<Age> {
        // Acquire: what was done before the last `open` or turn is visible to who enters after it.
        self.word
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |word| {
                (word & CLOSED == 0).then_some(word + Age::present(word).unit())
            })
            .ok()
            .map(Age::present)
    }

    /// Leaves; pairs with one successful [`try_count_up`](Self::try_count_up).
    pub(crate) fn count_down(&self, age: Age) {
        // Release: what was done under the permit is visible to who finds the number 0.
        let after = self.word.fetch_sub(age.unit(), Ordering::Release) - age.unit();
        let drained = after & (CLOSED | COUNTS) == CLOSED;
        let passed = age != Age::present(after) && age.count(after) == 0;
        if drained || passed {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        if self.anybody_sleeps() {
            self.empty.notify_all();
        }
        self.left.notify_waiters();
    }

    /// Whether some thread is to be woken, after a change of the word: that is a system call, and
    /// usually there is none.
    ///
    /// A waiter holds the mutex from its look at the word until it sleeps; so after this it either
    /// sleeps and was counted or has seen the change.
    fn anybody_sleeps(&self) -> bool {
        *self.lock() > 0
    }

    /// Whether a closer need not wait: nothing in flight, or not closed.
    fn is_settled(&self) -> bool {
        let word = self.word.load(Ordering::Acquire);
        word & CLOSED == 0 || word & COUNTS == 0
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a gate should never do.
#[cfg(feature = "fault-injection")]
impl InFlight {
    /// Gives out permits that nobody counts while it is closed, until it is opened.
    fn leak(&self) {
        self.leaks.store(true, Ordering::Relaxed);
        if self.anybody_sleeps() {
            self.opened.notify_all();
        }
    }

    fn leak_through(&self) -> Option<Permit<'static>> {
        static UNCOUNTED: std::sync::LazyLock<InFlight> = std::sync::LazyLock::new(InFlight::new);
        if self.leaks.load(Ordering::Relaxed) { UNCOUNTED.try_enter() } else { None }
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight")
            .field("closed", &self.is_closed())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

/// Leave to do something; ends when it is dropped.
#[derive(Debug)]
#[must_use = "the permit ends when it is dropped"]
pub struct Permit<'a> {
    of: &'a InFlight,
    age: Age,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.of.count_down(self.age);
    }
}

/// Which accesses a [`Gate`] closes or opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Those that touch a peer's memory.
    Peer,
    /// Those that touch RAM only.
    Ram,
    /// Both.
    All,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peer => "peer DMA",
            Self::Ram => "RAM DMA",
            Self::All => "all DMA",
        })
    }
}

/// DMA in flight did not end within the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{scope}: {in_flight} accesses still in flight after {budget:?}")]
pub struct DrainTimeout {
    /// What was to be closed.
    pub scope: Scope,
    /// How many accesses of it were in flight at the end.
    pub in_flight: u64,
    /// How long was waited.
    pub budget: Duration,
}

/// What all DMA of a device passes; see the [module](self).
#[derive(Debug, Default)]
pub struct Gate {
    peer: InFlight,
    ram: InFlight,
}

impl Gate {
    /// Open for everything.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Accesses that touch a peer's memory.
    #[must_use]
    pub fn peer(&self) -> &InFlight {
        &self.peer
    }

    /// Accesses that touch RAM only.
    #[must_use]
    pub fn ram(&self) -> &InFlight {
        &self.ram
    }

    /// Lets no more accesses of that scope begin and waits until none is in flight. What is
    /// closed already stays closed. Completes without yielding if nothing is in flight.
    ///
    /// # Errors
    ///
    /// [`DrainTimeout`] if accesses are still in flight after `budget`. Then, and if the future
    /// is dropped half-way, what this call closed is open again.
    pub async fn close(&self, scope: Scope, budget: Duration) -> Result<(), DrainTimeout> {
        let reopen = Reopen {
            peer: self.peer_in(scope).filter(|peer| peer.close()),
            ram: self.ram_in(scope).filter(|ram| ram.close()),
        };
        // Usually nothing is in flight, and there is nothing to wait for.
        if self.in_flight(scope) > 0 && !self.drained_in(scope, budget).await {
            let in_flight = self.in_flight(scope);
            return Err(DrainTimeout { scope, in_flight, budget });
        }
        reopen.disarm();
        Ok(())
    }

    /// Waits until nothing of a scope that is closed is in flight; false if that took too long.
    fn drained_in(
        &self,
        scope: Scope,
        budget: Duration,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        let drained = async move {
            if let Some(peer) = self.peer_in(scope) {
                peer.drained().await;
            }
            if let Some(ram) = self.ram_in(scope) {
                ram.drained().await;
            }
        };
        Box::pin(async move { tokio::time::timeout(budget, drained).await.is_ok() })
    }

    /// Waits until every access that is in flight now has ended; others may begin meanwhile. See
    /// [`InFlight::passed`].
    pub async fn passed(&self) {
        self.peer.passed().await;
        self.ram.passed().await;
    }

    /// As [`passed`](Self::passed), but blocks the calling OS thread, at most that long. Returns
    /// whether all that were in flight have ended.
    #[must_use]
    pub fn passed_within(&self, timeout: Duration) -> bool {
        let begin = Instant::now();
        self.peer.passed_within(timeout)
            && self.ram.passed_within(timeout.saturating_sub(begin.elapsed()))
    }

    /// Lets accesses of that scope begin again and wakes those that wait.
    pub fn open(&self, scope: Scope) {
        // RAM first: nobody gets through for peers while RAM is closed.
        if let Some(ram) = self.ram_in(scope) {
            ram.open();
        }
        if let Some(peer) = self.peer_in(scope) {
            peer.open();
        }
    }

    /// How many accesses of that scope are in flight.
    #[must_use]
    pub fn in_flight(&self, scope: Scope) -> u64 {
        let count = |of: Option<&InFlight>| of.map_or(0, InFlight::in_flight);
        count(self.peer_in(scope)) + count(self.ram_in(scope))
    }

    /// Holds nobody back any more while it is closed, and looks closed all the same, until it is
    /// opened.
    #[cfg(feature = "fault-injection")]
    pub(crate) fn leak(&self) {
        self.peer.leak();
        self.ram.leak();
    }

    /// Whether it holds nobody back although it is closed.
    #[cfg(feature = "fault-injection")]
    pub(crate) fn leaks(&self) -> bool {
        self.peer.is_closed() && !self.peer.holds_back()
    }

    fn peer_in(&self, scope: Scope) -> Option<&InFlight> {
        matches!(scope, Scope::Peer | Scope::All).then_some(&self.peer)
    }

    fn ram_in(&self, scope: Scope) -> Option<&InFlight> {
        matches!(scope, Scope::Ram | Scope::All).then_some(&self.ram)
    }
}

/// Opens again what a [`Gate::close`] closed, unless it succeeded.
struct Reopen<'a> {
    peer: Option<&'a InFlight>,
    ram: Option<&'a InFlight>,
}

impl Reopen<'_> {
    fn disarm(mut self) {
        self.peer = None;
        self.ram = None;
    }
}

impl Drop for Reopen<'_> {
    fn drop(&mut self) {
        for closed in [self.ram.take(), self.peer.take()].into_iter().flatten() {
            closed.open();
        }
    }
}

#[cfg(test)]
mod tests;
