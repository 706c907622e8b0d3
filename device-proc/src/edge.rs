//! The edge of a stop: what was sent to the device before it takes effect before it.
//!
//! Two threads take what comes to a device from outside: the transport's takes messages out of a
//! socket, the doorbells' takes signals out of eventfds. Each has a [`Station`] here. Before the
//! control thread lets a stop's hook run, it [drains](Edge::drain) both: each executes what had
//! arrived by then, one snapshot of it, so that a client that goes on sending cannot prolong it.
//!
//! # The proof that there is nothing
//!
//! Usually nothing is under way, and then nobody is to be woken: a stop costs one system call for
//! each source that there is. A thread says that it is *idle* before it waits in poll(2), which
//! takes nothing out of anything, and says that it is *busy* before it takes something out. So if
//! the control thread finds a thread idle, then its source empty, and then the thread still in the
//! same idleness, nothing was under way when it looked at the source. The word of a station counts
//! its changes, so that another idleness is not taken for the same.
//!
//! If there is no such proof, the control thread asks ([`Station::ask`]), and the thread says when
//! it is [done](Station::done). A thread that waits for the control thread itself (for the answer to
//! what its client wants) could not, and one that waits until its client reads would take as long as
//! the client likes: it says so ([`Station::waiting`]) and counts as drained, since it does nothing to
//! the device meanwhile, and what comes behind that waits for its end.
//!
//! # After the stop
//!
//! A thread that keeps something until the start (a posted write that cannot be refused, a doorbell
//! that is not read) says so with [`Station::keep`] and looks once more whether it still has to
//! before it sleeps; the control thread opens the accesses and looks after that whether anybody keeps
//! something ([`Edge::started`]). One of the two sees the other. While a *lease* holds the data
//! socket ([`Edge::hold`]) nothing is read from it at all.

#![forbid(unsafe_code)]

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::Notify;

/// What the low bits of [`Station::word`] say; the others count.
const STATE: u64 = 0b11;
const IDLE: u64 = 0;
const BUSY: u64 = 1;
const WAITING: u64 = 2;
const COUNT: u64 = STATE + 1;

/// The threads that take what comes to a device from outside, as the control side sees them.
#[derive(Debug, Default)]
pub(crate) struct Edge {
    socket: OnceLock<Arc<Station>>,
    doorbells: OnceLock<Arc<Station>>,
    /// A lease holds the data socket.
    held: AtomicBool,
    /// How often that began.
    holds: AtomicU64,
    /// How often the device's contents were replaced; what was kept for others is void.
    contents: AtomicU64,
    /// The client has stopped the device itself.
    stopped_by_client: AtomicBool,
}

impl Edge {
    /// There is a transport from now on; the first one counts.
    pub(crate) fn set_socket(&self, station: Arc<Station>) {
        // There is one transport in a process.
        let _ = self.socket.set(station);
    }

    /// There are doorbells from now on; the first ones count.
    pub(crate) fn set_doorbells(&self, station: Arc<Station>) {
        // As above.
        let _ = self.doorbells.set(station);
    }

    fn stations(&self) -> impl Iterator<Item = &Arc<Station>> {
        self.socket.get().into_iter().chain(self.doorbells.get())
    }

    /// Whether nothing is under way that was sent before this call.
    pub(crate) fn is_quiet(&self) -> bool {
        self.stations().all(|station| station.is_quiet())
    }

    /// Waits until what was sent before this call has taken effect. Completes at once, without
    /// yielding, if nothing is under way. May be dropped at any time.
    pub(crate) async fn drain(&self) {
        let late: Vec<_> = self
            .stations()
            .filter(|station| !station.is_quiet())
            .map(|station| (station, station.ask()))
            .collect();
        for (station, request) in late {
            station.drained(request).await;
        }
    }

    /// From now on nothing is read from the data socket, but for what is still to be drained.
    pub(crate) fn hold(&self) {
        self.holds.fetch_add(1, Ordering::SeqCst);
        self.held.store(true, Ordering::SeqCst);
    }

    /// How often a lease has held the data socket; whoever compares sees that one has come and gone.
    pub(crate) fn holds(&self) -> u64 {
        self.holds.load(Ordering::SeqCst)
    }

    /// Whether a lease holds the data socket.
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    /// The data socket is read again. Whoever keeps something looks whether it has to any longer.
    /// Call it after the accesses were opened.
    pub(crate) fn started(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.stations().for_each(|station| station.look_again());
    }

    /// The data socket is read again, although the device was not started.
    pub(crate) fn let_go(&self) {
        if self.is_held() {
            self.started();
        }
    }

    /// The client has brought the device where it is stopped, or has not; whatever the coordinator
    /// did.
    pub(crate) fn set_stopped_by_client(&self, stopped: bool) {
        // Whoever has asked for it looks when it was answered.
        self.stopped_by_client.store(stopped, Ordering::Release);
    }

    /// Whether the client has to start the device before it can run.
    pub(crate) fn is_stopped_by_client(&self) -> bool {
        self.stopped_by_client.load(Ordering::Acquire)
    }

    /// The device has other contents than those that its client has sent something to.
    pub(crate) fn replaced(&self) {
        self.contents.fetch_add(1, Ordering::SeqCst);
    }

    /// How often that was; whoever keeps something compares.
    pub(crate) fn contents(&self) -> u64 {
        self.contents.load(Ordering::SeqCst)
    }
}

/// Where a thread takes from.
#[derive(Debug, Default)]
enum Source {
    /// Nowhere: nobody is there.
    #[default]
    Nobody,
    Socket(Arc<OwnedFd>),
    Eventfds(Vec<Arc<OwnedFd>>),
}

impl Source {
    /// Whether something can be taken. What cannot be looked at counts as something.
    fn has_some(&self) -> bool {
        match self {
            Self::Nobody => false,
            Self::Socket(socket) => rustix::io::ioctl_fionread(socket) != Ok(0),
            Self::Eventfds(fds) if fds.is_empty() => false,
            Self::Eventfds(fds) => {
                let mut fds: Vec<_> =
                    fds.iter().map(|fd| PollFd::new(&**fd, PollFlags::IN)).collect();
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                poll(&mut fds, Some(&now)) != Ok(0)
            }
        }
    }
}

/// One thread that takes what comes from outside; see the [module](self).
#[derive(Debug)]
pub(crate) struct Station {
    /// [`IDLE`], [`BUSY`] or [`WAITING`], and how often it has changed.
    word: AtomicU64,
    source: Mutex<Source>,
    /// The latest request to drain, and the latest one that was done.
    asked: AtomicU64,
    finished: AtomicU64,
    told: Notify,
    /// It keeps something until the start, and sleeps.
    keeps: AtomicBool,
    /// Readable when it should look up from its poll.
    alarm: OwnedFd,
}

impl Station {
    /// A thread that is busy and has nothing to take from.
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let alarm = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            word: AtomicU64::new(BUSY),
            source: Mutex::default(),
            asked: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            told: Notify::new(),
            keeps: AtomicBool::new(false),
            alarm,
        }))
    }

    /// It takes from this socket from now on.
    pub(crate) fn take_from_socket(&self, socket: &Arc<OwnedFd>) {
        *self.source() = Source::Socket(Arc::clone(socket));
    }

    /// It takes from these eventfds from now on.
    pub(crate) fn take_from_eventfds(&self, fds: &[Arc<OwnedFd>]) {
        *self.source() = Source::Eventfds(fds.to_vec());
    }

    /// It takes from nowhere any more.
    pub(crate) fn take_from_nobody(&self) {
        *self.source() = Source::Nobody;
    }

    /// It is about to wait in poll(2), and has nothing left of what it has taken.
    pub(crate) fn idle(&self) {
        self.change(IDLE);
    }

    /// It is about to take something.
    pub(crate) fn busy(&self) {
        self.change(BUSY);
    }

    /// It is about to wait for the control side, or for its client, and does nothing to the device
    /// until it is busy again.
    pub(crate) fn waiting(&self) {
        self.change(WAITING);
        // Who asks after this sees the word.
        self.done(self.asked.load(Ordering::SeqCst));
    }

    fn change(&self, state: u64) {
        let count = self.word.load(Ordering::Relaxed) & !STATE;
        // One thread changes it.
        self.word.store(count.wrapping_add(COUNT) | state, Ordering::SeqCst);
    }

    /// The proof of the [module](self).
    pub(crate) fn is_quiet(&self) -> bool {
        let before = self.word.load(Ordering::SeqCst);
        match before & STATE {
            IDLE => !self.source().has_some() && self.word.load(Ordering::SeqCst) == before,
            WAITING => true,
            _ => false,
        }
    }

    /// Asks it to execute what has arrived. Returns the number of the request.
    fn ask(&self) -> u64 {
        let request = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        self.ring();
        request
    }

    async fn drained(&self, mut request: u64) {
        loop {
            // Made before the looks: from now on a wake-up is not missed.
            let told = self.told.notified();
            if self.is_done(request) {
                return;
            }
            if self.is_quiet() {
                // It is not to do after the stop what it was asked for before it. It can have seen the
                // request already, but then it is busy.
                self.done(request);
                if self.is_quiet() {
                    return;
                }
                request = self.ask();
            }
            told.await;
        }
    }

    /// Whether that request was done, by whomever.
    pub(crate) fn is_done(&self, request: u64) -> bool {
        self.finished.load(Ordering::SeqCst) >= request
    }

    /// The latest request, if it is not done.
    pub(crate) fn request(&self) -> Option<u64> {
        let asked = self.asked.load(Ordering::SeqCst);
        (asked != self.finished.load(Ordering::SeqCst)).then_some(asked)
    }

    /// What had arrived when this request was seen was executed.
    pub(crate) fn done(&self, request: u64) {
        if self.finished.fetch_max(request, Ordering::SeqCst) < request {
            self.told.notify_waiters();
        }
    }

    /// It keeps something and is about to sleep, if it still has to after this.
    pub(crate) fn keep(&self) {
        self.keeps.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Something may have changed for it, if it keeps something.
    fn look_again(&self) {
        fence(Ordering::SeqCst);
        if self.keeps.swap(false, Ordering::SeqCst) {
            self.ring();
        }
    }

    /// Wakes it from its poll.
    pub(crate) fn ring(&self) {
        match rustix::io::write(&self.alarm, &1_u64.to_ne_bytes()) {
            // A counter that is full is readable.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::warn!(%error, "a thread of the transport is not woken"),
        }
    }

    /// What is readable when it should look up from its poll.
    pub(crate) fn alarm(&self) -> BorrowedFd<'_> {
        self.alarm.as_fd()
    }

    /// It has looked up.
    pub(crate) fn looked_up(&self) {
        // It cannot be read when nobody has rung.
        let _ = rustix::io::read(&self.alarm, &mut [0_u8; 8]);
    }

    fn source(&self) -> MutexGuard<'_, Source> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
