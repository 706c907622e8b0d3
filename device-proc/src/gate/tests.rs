use super::*;
use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread::{self, ScopedJoinHandle};

/// Longer than anything here takes; a wake-up that was lost fails the test instead of hanging it.
const LONG: Duration = Duration::from_secs(20);

fn poll_once<T>(future: impl Future<Output = T>) -> Poll<T> {
    pin!(future).poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn permits_are_counted_and_refused_while_closed() {
    let gate = InFlight::new();
    let first = gate.try_enter().expect("open");
    let second = gate.try_enter().expect("open");
    assert_eq!(gate.in_flight(), 2);
    assert!(gate.close());
    assert!(!gate.close(), "the second close changes nothing");
    assert!(gate.try_enter().is_none());
    drop(first);
    assert_eq!(gate.in_flight(), 1);
    drop(second);
    assert_eq!(gate.in_flight(), 0);
    assert!(gate.is_closed());
    assert!(gate.open());
    assert!(!gate.open(), "the second open changes nothing");
    assert!(gate.try_enter().is_some());
}

#[test]
fn draining_completes_at_once_if_nothing_is_in_flight() {
    let gate = InFlight::new();
    gate.close();
    assert_eq!(poll_once(gate.drained()), Poll::Ready(()));
    assert!(gate.drained_within(Duration::ZERO));
}

#[test]
fn draining_waits_for_the_last_permit() {
    let gate = InFlight::new();
    let (first, second) = (gate.try_enter(), gate.try_enter());
    gate.close();
    let mut drained = pin!(gate.drained());
    let mut context = Context::from_waker(Waker::noop());
    assert!(drained.as_mut().poll(&mut context).is_pending());
    drop(first);
    assert!(drained.as_mut().poll(&mut context).is_pending());
    assert!(!gate.drained_within(Duration::from_millis(1)));
    drop(second);
    assert!(drained.as_mut().poll(&mut context).is_ready());
    assert!(gate.drained_within(Duration::ZERO));
}

#[test]
fn opening_ends_the_wait_for_it_to_drain() {
    let gate = InFlight::new();
    let permit = gate.try_enter();
    gate.close();
    let mut drained = pin!(gate.drained());
    let mut context = Context::from_waker(Waker::noop());
    assert!(drained.as_mut().poll(&mut context).is_pending());
    gate.open();
    assert!(drained.as_mut().poll(&mut context).is_ready());
    drop(permit);
}

#[test]
fn entering_blocks_the_thread_until_it_opens() {
    let gate = InFlight::new();
    gate.close();
    let (entered, has_entered) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let permit = gate.enter();
            entered.send(gate.is_closed()).expect("the test waits");
            drop(permit);
        });
        assert!(has_entered.recv_timeout(Duration::from_millis(20)).is_err());
        gate.open();
        assert_eq!(has_entered.recv_timeout(LONG), Ok(false));
    });
}

/// How often the gate is closed and opened. Threads outnumber cores: a round can cost some of the
/// scheduler's time slices.
const ROUNDS: usize = 100;

/// Lets the threads of a test end, also if it fails.
struct End<'a> {
    done: &'a AtomicBool,
    gate: &'a InFlight,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        self.gate.open();
    }
}

/// Threads that enter, change a pair of numbers in two steps, and leave; between a close that has
/// drained and the next open the pair is consistent and stands still.
fn hammer(rounds: usize, block: bool, drain: impl Fn(&InFlight)) {
    let gate = InFlight::new();
    let done = AtomicBool::new(false);
    let (left, right) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let _end = End { done: &done, gate: &gate };
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let permit = if block { Some(gate.enter()) } else { gate.try_enter() };
                    if permit.is_some() {
                        left.fetch_add(1, Ordering::Relaxed);
                        std::hint::spin_loop();
                        right.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for _ in 0..rounds {
            gate.close();
            drain(&gate);
            let seen = left.load(Ordering::Relaxed);
            assert_eq!(gate.in_flight(), 0);
            assert_eq!(right.load(Ordering::Relaxed), seen, "somebody was still inside");
            thread::yield_now();
            assert_eq!(left.load(Ordering::Relaxed), seen, "somebody entered while closed");
            gate.open();
            let begin = Instant::now();
            while left.load(Ordering::Relaxed) == seen {
                assert!(begin.elapsed() < LONG, "nobody enters any more: a wake-up was lost");
                thread::yield_now();
            }
        }
    });
}

#[test]
fn nobody_is_inside_after_a_blocking_drain() {
    hammer(ROUNDS, false, |gate| {
        assert!(gate.drained_within(LONG), "a wake-up was lost");
    });
}

#[test]
fn nobody_is_inside_after_an_async_drain_and_all_wake_up_again() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime");
    hammer(ROUNDS, true, |gate| {
        let drained = async { tokio::time::timeout(LONG, gate.drained()).await };
        runtime.block_on(drained).expect("a wake-up was lost");
    });
}

#[tokio::test]
async fn closing_for_peers_leaves_ram_open() {
    let gate = Gate::new();
    gate.close(Scope::Peer, LONG).await.expect("nothing in flight");
    assert!(gate.peer().try_enter().is_none());
    assert!(gate.ram().try_enter().is_some());
    gate.close(Scope::All, LONG).await.expect("nothing in flight");
    assert!(gate.ram().try_enter().is_none());
    gate.open(Scope::Ram);
    assert!(gate.peer().try_enter().is_none());
    assert!(gate.ram().try_enter().is_some());
    gate.open(Scope::All);
    assert!(gate.peer().try_enter().is_some());
}

#[tokio::test]
async fn closing_for_peers_does_not_wait_for_ram() {
    let gate = Gate::new();
    let _ram = gate.ram().try_enter();
    gate.close(Scope::Peer, LONG).await.expect("no peer access in flight");
}

#[tokio::test]
async fn a_close_that_fails_opens_again_what_it_closed() {
    let gate = Gate::new();
    gate.close(Scope::Peer, LONG).await.expect("nothing in flight");
    let permit = gate.ram().try_enter();
    let budget = Duration::from_millis(5);
    let result = gate.close(Scope::All, budget).await;
    assert_eq!(result, Err(DrainTimeout { scope: Scope::All, in_flight: 1, budget }));
    assert!(!gate.ram().is_closed(), "this was closed by the call that failed");
    assert!(gate.peer().is_closed(), "this was closed before");
    drop(permit);
    gate.close(Scope::All, LONG).await.expect("nothing in flight");
}

#[tokio::test]
async fn a_close_that_is_given_up_opens_again_what_it_closed() {
    let gate = Gate::new();
    let _permit = gate.peer().try_enter();
    {
        let mut close = pin!(gate.close(Scope::All, LONG));
        assert!(close.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert!(gate.ram().is_closed());
    }
    assert!(!gate.ram().is_closed());
    assert!(!gate.peer().is_closed());
}

#[test]
fn what_is_in_flight_passes_while_others_come_and_go() {
    let gate = InFlight::new();
    let old = gate.try_enter();
    let mut passed = pin!(gate.passed());
    let mut context = Context::from_waker(Waker::noop());
    assert!(passed.as_mut().poll(&mut context).is_pending());
    let young = gate.try_enter();
    assert_eq!(gate.in_flight(), 2);
    drop(gate.try_enter());
    assert!(passed.as_mut().poll(&mut context).is_pending());
    drop(old);
    assert!(passed.as_mut().poll(&mut context).is_ready(), "the young one is not waited for");
    assert!(poll_once(gate.passed()).is_pending(), "now it is");
    drop(young);
    assert!(poll_once(gate.passed()).is_ready());
    assert!(poll_once(gate.passed()).is_ready());
    assert_eq!(gate.in_flight(), 0);
}

#[test]
fn a_second_wait_begins_when_the_first_age_has_passed() {
    let gate = InFlight::new();
    let old = gate.try_enter();
    let mut context = Context::from_waker(Waker::noop());
    let (mut first, mut second) = (pin!(gate.passed()), pin!(gate.passed()));
    assert!(first.as_mut().poll(&mut context).is_pending());
    let young = gate.try_enter();
    assert!(second.as_mut().poll(&mut context).is_pending());
    drop(old);
    assert!(second.as_mut().poll(&mut context).is_pending(), "it waits for the young one");
    assert!(first.as_mut().poll(&mut context).is_ready());
    drop(young);
    assert!(second.as_mut().poll(&mut context).is_ready());
}

#[test]
fn a_thread_waits_for_what_is_in_flight_and_no_longer_than_it_wants() {
    let gate = InFlight::new();
    assert!(gate.passed_within(Duration::ZERO), "nothing is");
    let old = gate.try_enter();
    assert!(!gate.passed_within(Duration::from_millis(5)));
    let young = gate.try_enter();
    thread::scope(|scope| {
        // Its turn comes when the old one has left: then it waits for the young one.
        let waiters: Vec<_> = (0..2).map(|_| scope.spawn(|| gate.passed_within(LONG))).collect();
        assert!(!waiters.iter().any(ScopedJoinHandle::is_finished));
        drop(old);
        assert!(!gate.passed_within(Duration::from_millis(5)));
        drop(young);
        for waiter in waiters {
            assert!(waiter.join().expect("no panic"), "a wake-up was lost");
        }
    });
    assert!(gate.passed_within(Duration::ZERO));
}

#[test]
fn closing_and_passing_do_not_disturb_each_other() {
    let gate = InFlight::new();
    let (old, mut context) = (gate.try_enter(), Context::from_waker(Waker::noop()));
    let mut passed = pin!(gate.passed());
    assert!(passed.as_mut().poll(&mut context).is_pending());
    let young = gate.try_enter();
    gate.close();
    let mut drained = pin!(gate.drained());
    assert!(drained.as_mut().poll(&mut context).is_pending());
    drop(old);
    assert!(passed.as_mut().poll(&mut context).is_ready());
    assert!(drained.as_mut().poll(&mut context).is_pending());
    drop(young);
    assert!(drained.as_mut().poll(&mut context).is_ready());
    assert_eq!(poll_once(gate.passed()), Poll::Ready(()), "closed, nothing is in flight");
    gate.open();
    assert!(gate.try_enter().is_some());
}

/// Threads look at a flag when they leave and count those who have not seen it; whoever has raised
/// the flag and waited for all to pass finds that number unchanged for ever.
#[test]
fn after_all_have_passed_everybody_sees_what_was_done_before() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime");
    let gate = InFlight::new();
    let done = AtomicBool::new(false);
    let rounds: Vec<_> = (0..ROUNDS).map(|_| (AtomicBool::new(false), AtomicU64::new(0))).collect();
    thread::scope(|scope| {
        let _end = End { done: &done, gate: &gate };
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let permit = gate.try_enter();
                    std::hint::spin_loop();
                    for (flag, unseen) in &rounds {
                        if !flag.load(Ordering::Relaxed) {
                            unseen.fetch_add(1, Ordering::Relaxed);
                            break;
                        }
                    }
                    drop(permit);
                }
            });
        }
        for (number, (flag, unseen)) in rounds.iter().enumerate() {
            flag.store(true, Ordering::Relaxed);
            if number % 2 == 0 {
                let passed = async { tokio::time::timeout(LONG, gate.passed()).await };
                runtime.block_on(passed).expect("a wake-up was lost");
            } else {
                assert!(gate.passed_within(LONG), "a wake-up was lost");
            }
            let seen = unseen.load(Ordering::Relaxed);
            thread::yield_now();
            assert_eq!(unseen.load(Ordering::Relaxed), seen, "somebody had not seen the flag");
        }
    });
}
