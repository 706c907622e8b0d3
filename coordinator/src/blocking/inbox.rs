//! What the machine's thread leaves for the program's threads: a bounded queue that can be waited for
//! by a thread, and by an event loop through an fd.

use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// What was in an inbox.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken<T> {
    /// The oldest item.
    Item(T),
    /// So many items were lost here: they did not fit.
    Missed(u64),
    /// Nothing by then.
    Late,
    /// Nothing, and nothing will come.
    Closed,
}

/// A bounded queue. What does not fit pushes the oldest out, which is counted.
#[derive(Debug)]
pub(super) struct Inbox<T> {
    queue: Mutex<Queue<T>>,
    changed: Condvar,
    /// Made when it is first asked for.
    fd: OnceLock<OwnedFd>,
    room: usize,
    /// The process whose threads fill it; in a fork of it nobody does.
    process: u32,
}

#[derive(Debug)]
struct Queue<T> {
    items: VecDeque<T>,
    missed: u64,
    closed: bool,
    /// The fd can be read.
    raised: bool,
}

impl<T> Inbox<T> {
    pub(super) fn new(room: usize) -> Self {
        let queue = Queue { items: VecDeque::new(), missed: 0, closed: false, raised: false };
        Self {
            queue: Mutex::new(queue),
            changed: Condvar::new(),
            fd: OnceLock::new(),
            room,
            process: std::process::id(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, item: T) {
        let mut queue = self.lock();
        queue.items.push_back(item);
        if queue.items.len() > self.room {
            queue.items.pop_front();
            queue.missed += 1;
        }
        self.tell(&mut queue);
        drop(queue);
        self.changed.notify_one();
    }

    /// Nothing will come any more.
    pub(super) fn close(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        self.tell(&mut queue);
        drop(queue);
        self.changed.notify_all();
    }

    /// Takes the oldest item, waiting for it until then; `None` for ever. After a fork there is
    /// nothing to wait for.
    pub(super) fn take(&self, until: Option<Instant>) -> Taken<T> {
        // Before the lock: whoever had it at the fork is not here to let go of it.
        if self.process != std::process::id() {
            return Taken::Closed;
        }
        let mut queue = self.lock();
        while !queue.is_ready() {
            let unpoisoned = PoisonError::into_inner;
            queue = match until {
                None => self.changed.wait(queue).unwrap_or_else(unpoisoned),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Taken::Late;
                    }
                    let waited = self.changed.wait_timeout(queue, left);
                    waited.map_or_else(|poisoned| poisoned.into_inner().0, |(queue, _)| queue)
                }
            };
        }
        let taken = match std::mem::take(&mut queue.missed) {
            0 => queue.items.pop_front().map_or(Taken::Closed, Taken::Item),
            missed => Taken::Missed(missed),
        };
        self.tell(&mut queue);
        taken
    }

    /// True if [`take`](Self::take) would not wait.
    pub(super) fn is_ready(&self) -> bool {
        self.lock().is_ready()
    }

    /// Readable while [`is_ready`](Self::is_ready).
    pub(super) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        let mut queue = self.lock();
        if self.fd.get().is_none() {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let _ = self.fd.set(fd);
            self.tell(&mut queue);
        }
        let fd = self.fd.get().ok_or_else(|| io::Error::other("the fd was just made"))?;
        Ok(fd.as_fd())
    }

    /// Has the fd say what is so.
    fn tell(&self, queue: &mut Queue<T>) {
        let Some(fd) = self.fd.get() else { return };
        let ready = queue.is_ready();
        if ready == queue.raised {
            return;
        }
        // Neither can fail: the counter is 0 or 1.
        if ready {
            let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
        } else {
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
        queue.raised = ready;
    }
}

impl<T> Queue<T> {
    fn is_ready(&self) -> bool {
        self.closed || self.missed > 0 || !self.items.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::sync::Arc;
    use std::time::Duration;

    fn readable(inbox: &Inbox<u32>) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(inbox.fd().unwrap(), PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn its_fd_is_readable_while_something_is_there_and_for_ever_once_it_is_closed() {
        let inbox = Inbox::new(8);
        inbox.push(1);
        assert!(readable(&inbox), "it was there before the fd");
        inbox.push(2);
        assert_eq!(inbox.take(None), Taken::Item(1));
        assert!(readable(&inbox));
        assert_eq!(inbox.take(None), Taken::Item(2));
        assert!(!readable(&inbox) && !inbox.is_ready());
        inbox.push(3);
        inbox.close();
        assert_eq!(inbox.take(None), Taken::Item(3));
        assert!(readable(&inbox));
        assert_eq!([inbox.take(None), inbox.take(None)], [Taken::Closed, Taken::Closed]);
        assert!(readable(&inbox));
    }

    #[test]
    fn what_does_not_fit_pushes_the_oldest_out_and_is_counted_once() {
        let inbox = Inbox::new(2);
        (1..=5).for_each(|item| inbox.push(item));
        assert_eq!(inbox.take(None), Taken::Missed(3));
        assert_eq!(inbox.take(None), Taken::Item(4));
        assert_eq!(inbox.take(None), Taken::Item(5));
        assert_eq!(inbox.take(Some(Instant::now())), Taken::Late);
    }

    #[test]
    fn after_a_fork_nothing_is_waited_for() {
        let mut inbox = Inbox::new(2);
        inbox.push(1);
        inbox.process = std::os::unix::process::parent_id();
        let _held_at_the_fork = inbox.lock();
        assert_eq!(inbox.take(None), Taken::Closed);
    }

    #[test]
    fn a_wait_ends_with_an_item_with_the_close_and_with_its_time() {
        let inbox = Arc::new(Inbox::new(2));
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(inbox.take(Some(soon)), Taken::Late);
        assert!(Instant::now() >= soon);
        let waits = |inbox: &Arc<Inbox<u32>>| {
            let inbox = Arc::clone(inbox);
            std::thread::spawn(move || inbox.take(None))
        };
        let waiting = waits(&inbox);
        inbox.push(7);
        assert_eq!(waiting.join().unwrap(), Taken::Item(7));
        let waiting = [waits(&inbox), waits(&inbox)];
        inbox.close();
        for waiting in waiting {
            assert_eq!(waiting.join().unwrap(), Taken::Closed);
        }
    }
}
