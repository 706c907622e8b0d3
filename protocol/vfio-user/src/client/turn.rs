//! Something that one thread uses at a time, with a deadline for those that wait.

use crate::Deadline;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Like a mutex; but it can be waited for until a deadline.
#[derive(Debug)]
pub(super) struct Turn<T> {
    place: Mutex<Place<T>>,
    free: Condvar,
}

#[derive(Debug)]
struct Place<T> {
    /// Not there while somebody uses it.
    value: Option<T>,
    waiting: usize,
}

/// Gives the value back, whatever happens.
struct Guard<'a, T> {
    turn: &'a Turn<T>,
    value: Option<T>,
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        let mut place = self.turn.lock();
        place.value = self.value.take();
        let waiting = place.waiting;
        drop(place);
        if waiting > 0 {
            self.turn.free.notify_one();
        }
    }
}

impl<T> Turn<T> {
    pub(super) fn new(value: T) -> Self {
        Self { place: Mutex::new(Place { value: Some(value), waiting: 0 }), free: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Place<T>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses it; `None` if others have done so until the deadline.
    pub(super) fn with<R>(
        &self,
        deadline: &mut Deadline,
        run: impl FnOnce(&mut T, &mut Deadline) -> R,
    ) -> Option<R> {
        let mut place = self.lock();
        while place.value.is_none() {
            if deadline.is_over() {
                // One of those that wait may have been woken for nothing.
                self.free.notify_one();
                return None;
            }
            place.waiting += 1;
            place = match deadline.left() {
                Some(left) => {
                    let woken = self.free.wait_timeout(place, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.free.wait(place).unwrap_or_else(PoisonError::into_inner),
            };
            place.waiting -= 1;
        }
        let value = place.value.take();
        drop(place);
        let mut guard = Guard { turn: self, value };
        guard.value.as_mut().map(|value| run(value, deadline))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    fn at_once() -> Deadline {
        Deadline::within(Duration::ZERO)
    }

    #[test]
    fn one_at_a_time_and_none_is_forgotten() {
        let turn = Turn::new(0_u64);
        let mut deadline = Deadline::from(Instant::now() + Duration::from_secs(30));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut deadline = deadline;
                    for _ in 0..1000 {
                        turn.with(&mut deadline, |count, _| *count += 1).expect("in time");
                    }
                });
            }
        });
        assert_eq!(turn.with(&mut deadline, |count, _| *count), Some(4000));
    }

    #[test]
    fn whoever_waits_too_long_is_told() {
        let turn = Turn::new(());
        let (taken, is_taken) = mpsc::channel();
        let (done, is_done) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let turn = &turn;
            scope.spawn(move || {
                turn.with(&mut at_once(), |(), _| {
                    taken.send(()).expect("heard");
                    is_done.recv().expect("told");
                })
            });
            is_taken.recv().expect("taken");
            let mut soon = Deadline::within(Duration::from_millis(5));
            assert_eq!(turn.with(&mut soon, |(), _| ()), None);
            done.send(()).expect("heard");
        });
        assert_eq!(turn.with(&mut at_once(), |(), _| ()), Some(()));
    }

    #[test]
    fn a_panic_gives_it_back() {
        let turn = Turn::new(1);
        let run = || turn.with(&mut at_once(), |_, _| panic!("as asked"));
        let _: Result<Option<()>, _> = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        assert_eq!(turn.with(&mut at_once(), |value, _| *value), Some(1));
    }
}
