//! How long something may take, and whether anybody still wants it.

use rustix::event::{EventfdFlags, eventfd};
use std::future::{Future, pending, poll_fn};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Says to whoever works on a command that it was overtaken. Fires at most once.
#[derive(Debug, Default)]
pub(super) struct Overtaken {
    fired: AtomicBool,
    waiting: Notify,
    /// For threads that wait in poll(2); made on first use, since most commands need none.
    readable: OnceLock<OwnedFd>,
}

impl Overtaken {
    pub(super) fn fire(&self) {
        self.fired.store(true, Ordering::SeqCst);
        self.waiting.notify_waiters();
        if let Some(fd) = self.readable.get()
            && let Err(error) = rustix::io::write(fd, &1_u64.to_ne_bytes())
        {
            // It counts one event at most, so it cannot be full.
            tracing::warn!(%error, "a state stream is not told that it was overtaken");
        }
    }

    pub(super) fn has_fired(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }

    async fn wait(&self) {
        // Made before the look at the flag: from now on the wake-up is not missed.
        let waiting = self.waiting.notified();
        if !self.has_fired() {
            waiting.await;
        }
    }

    /// An fd that is readable once this has fired. Check [`has_fired`](Self::has_fired) after
    /// getting it.
    pub(super) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(fd) = self.readable.get() {
            return Ok(fd.as_fd());
        }
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(self.readable.get_or_init(|| fd).as_fd())
    }
}

/// What is left of a command's deadline.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    /// `None` if that time is beyond what the clock can say.
    end: Option<Instant>,
    overtaken: Arc<Overtaken>,
}

/// Something was given up before it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GivenUp {
    /// Its budget is used up.
    Late,
    /// A later command or an abort wants something else.
    Overtaken,
}

impl Budget {
    pub(super) fn new(from: Instant, budget: Duration, overtaken: Arc<Overtaken>) -> Self {
        Self { end: from.checked_add(budget), overtaken }
    }

    /// That much from now on, and nobody can give it up.
    pub(super) fn grace(grace: Duration) -> Self {
        Self::new(Instant::now(), grace, Arc::default())
    }

    pub(super) fn left(&self) -> Duration {
        self.left_at(Instant::now())
    }

    /// What was left then.
    pub(super) fn left_at(&self, then: Instant) -> Duration {
        self.end.map_or(Duration::MAX, |end| end.saturating_duration_since(then))
    }

    pub(super) fn overtaken(&self) -> &Overtaken {
        &self.overtaken
    }

    /// Waits for something as long as the budget lasts. What is ready at once counts, whatever is
    /// left of the budget.
    pub(super) async fn bound<T>(&self, work: impl Future<Output = T>) -> Result<T, GivenUp> {
        let late = async {
            match self.end {
                Some(end) => tokio::time::sleep_until(end.into()).await,
                None => pending().await,
            }
        };
        let given_up = || {
            Box::pin(async {
                tokio::select! {
                    biased;
                    () = self.overtaken.wait() => GivenUp::Overtaken,
                    () = late => GivenUp::Late,
                }
            })
        };
        unless(work, given_up).await
    }

    /// As [`bound`](Self::bound), for work that keeps the time itself.
    pub(super) async fn unless_overtaken<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, GivenUp> {
        let given_up = || {
            Box::pin(async {
                self.overtaken.wait().await;
                GivenUp::Overtaken
            })
        };
        unless(work, given_up).await
    }
}

/// Does the work, and gives it up when that says so. Usually the work is ready at once: then
/// nothing is made that could give it up, and while it is not, that is kept apart, so that the
/// future of a command is small.
async fn unless<T, G: Future<Output = GivenUp> + Unpin>(
    work: impl Future<Output = T>,
    given_up: impl FnOnce() -> G,
) -> Result<T, GivenUp> {
    let mut work = pin!(work);
    if let Poll::Ready(done) = poll_fn(|context| Poll::Ready(work.as_mut().poll(context))).await {
        return Ok(done);
    }
    tokio::select! {
        biased;
        done = work => Ok(done),
        given_up = given_up() => Err(given_up),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(milliseconds: u64) -> Budget {
        Budget::new(Instant::now(), Duration::from_millis(milliseconds), Arc::default())
    }

    #[tokio::test]
    async fn what_is_ready_counts_even_without_budget() {
        assert_eq!(budget(0).bound(async { 7 }).await, Ok(7));
    }

    #[tokio::test]
    async fn a_budget_ends() {
        assert_eq!(budget(1).bound(pending::<()>()).await, Err(GivenUp::Late));
    }

    #[tokio::test]
    async fn firing_gives_up_what_waits_and_what_waits_later() {
        let budget = budget(60_000);
        let (outcome, ()) = tokio::join!(budget.bound(pending::<()>()), async {
            budget.overtaken().fire();
        });
        assert_eq!(outcome, Err(GivenUp::Overtaken));
        let again = budget.unless_overtaken(pending::<()>()).await;
        assert_eq!(again, Err(GivenUp::Overtaken));
    }

    #[test]
    fn a_budget_beyond_the_clock_never_ends() {
        let budget = Budget::new(Instant::now(), Duration::MAX, Arc::default());
        assert_eq!(budget.left(), Duration::MAX);
    }
}
