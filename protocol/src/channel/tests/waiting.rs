//! Timeouts, and waiting under tokio.

#![forbid(unsafe_code)]

use super::*;
use rustix::event::{EventfdFlags, eventfd};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// Far longer than anything here takes: reached only by a test that fails.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(20);

fn fill(coordinator: &CoordinatorEnd) -> usize {
    let mut sent = 0;
    while coordinator.try_send(&command(Phase::Stop, sent), &[]).is_ok() {
        sent += 1;
    }
    usize::try_from(sent).unwrap()
}

#[test]
fn receiving_gives_up_after_its_timeout() {
    let (coordinator, _device) = connected();
    for timeout in [Duration::ZERO, SHORT] {
        let begin = Instant::now();
        let error = coordinator.recv(timeout).unwrap_err();
        assert!(matches!(error, RecvError::TimedOut { timeout: t } if t == timeout), "{error}");
        assert!(begin.elapsed() >= timeout);
        assert!(begin.elapsed() < LONG);
    }
}

#[test]
fn sending_gives_up_after_its_timeout() {
    let (coordinator, _device) = connected();
    fill(&coordinator);
    let begin = Instant::now();
    let error = coordinator.send(&command(Phase::Stop, 1), &[], SHORT).unwrap_err();
    assert!(matches!(error, SendError::TimedOut { timeout: SHORT }), "{error}");
    assert!(begin.elapsed() >= SHORT);
}

#[test]
fn what_is_there_is_received_even_without_time() {
    let (coordinator, device) = connected();
    device.try_send(&heartbeat(1), &[]).unwrap();
    assert_eq!(coordinator.recv(Duration::ZERO).unwrap().message, heartbeat(1));
}

#[test]
fn receiving_waits_for_a_message_and_for_the_end() {
    let (coordinator, device) = connected();
    let sender = std::thread::spawn(move || {
        // Blocks until the other thread has asked, so that most runs really wait.
        device.recv(LONG).unwrap();
        device.send(&heartbeat(7), &[], LONG).unwrap();
    });
    coordinator.send(&command(Phase::Stop, 1), &[], LONG).unwrap();
    assert_eq!(coordinator.recv(Duration::MAX).unwrap().message, heartbeat(7));
    assert!(matches!(coordinator.recv(Duration::MAX), Err(RecvError::Disconnected)));
    sender.join().unwrap();
}

#[test]
fn sending_waits_until_the_peer_reads() {
    let (coordinator, device) = connected();
    let queued = fill(&coordinator);
    let reader = std::thread::spawn(move || {
        for _ in 0..=queued {
            device.recv(LONG).unwrap();
        }
        device.try_recv().unwrap().is_none()
    });
    coordinator.send(&command(Phase::Stop, 0), &[], LONG).unwrap();
    assert!(reader.join().unwrap());
}

/// Runs a future on a runtime like that of a device process, bounded.
fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime
        .block_on(async { tokio::time::timeout(LONG, future).await })
        .expect("a wake-up was lost")
}

#[test]
fn a_registration_needs_a_runtime_and_an_fd_that_can_be_watched() {
    let (coordinator, _device) = connected();
    assert!(AsyncChannel::new(coordinator).is_err());
    run(async {
        let regular = std::fs::File::open("/proc/self/exe").unwrap();
        let error = Readiness::new(regular).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    });
}

#[test]
fn an_async_channel_sends_receives_and_ends() {
    run(async {
        let (coordinator, device) = connected();
        let coordinator = AsyncChannel::new(coordinator).unwrap();
        let device = AsyncChannel::new(device).unwrap();
        let file = Marked::new("async");
        let echo = async {
            let received = device.recv().await.unwrap();
            assert_eq!(received.message, command(Phase::Save, 1));
            assert_eq!(identity(&received.fds[0]), identity(&file.file));
            device.send(&heartbeat(1), &[]).await.unwrap();
        };
        let ask = async {
            coordinator.send(&command(Phase::Save, 1), &[file.file.as_fd()]).await.unwrap();
            assert_eq!(coordinator.recv().await.unwrap().message, heartbeat(1));
        };
        tokio::join!(ask, echo);
        drop(device);
        assert!(matches!(coordinator.recv().await, Err(RecvError::Disconnected)));
    });
}

#[test]
fn every_queued_message_is_received_after_one_wake_up() {
    run(async {
        let (coordinator, device) = connected();
        let coordinator = AsyncChannel::new(coordinator).unwrap();
        // Several at once, then several more after the queue was drained to EAGAIN.
        for round in 0..3 {
            for sequence in 0..10 {
                device.try_send(&heartbeat(round * 10 + sequence), &[]).unwrap();
            }
            for sequence in 0..10 {
                let received = coordinator.recv().await.unwrap();
                assert_eq!(received.message, heartbeat(round * 10 + sequence));
            }
        }
    });
}

#[test]
fn a_drained_and_cleared_readiness_wakes_for_the_next_message() {
    run(async {
        let (coordinator, device) = connected();
        let readiness = Readiness::new(coordinator).unwrap();
        for round in 0..3 {
            device.try_send(&heartbeat(round), &[]).unwrap();
            device.try_send(&heartbeat(round), &[]).unwrap();
            let ready = readiness.readable().await.unwrap();
            assert!(ready.get_ref().try_recv().unwrap().is_some());
            // Not cleared, as more may be queued: ready again at once.
            drop(ready);
            let ready = readiness.readable().await.unwrap();
            assert!(ready.get_ref().try_recv().unwrap().is_some());
            assert!(ready.get_ref().try_recv().unwrap().is_none());
            ready.clear();
            assert!(is_pending(readiness.readable()), "cleared, and still ready");
        }
    });
}

#[test]
fn a_readiness_cleared_too_early_is_why_the_rule_exists() {
    run(async {
        let (coordinator, device) = connected();
        let readiness = Readiness::new(coordinator).unwrap();
        device.try_send(&heartbeat(1), &[]).unwrap();
        device.try_send(&heartbeat(2), &[]).unwrap();
        let ready = readiness.readable().await.unwrap();
        assert!(ready.get_ref().try_recv().unwrap().is_some());
        ready.clear();
        // One message is queued, and nobody says so.
        tokio::task::yield_now().await;
        assert!(is_pending(readiness.readable()));
        assert!(readiness.get_ref().try_recv().unwrap().is_some());
    });
}

#[test]
fn a_readiness_watches_other_fds_too() {
    run(async {
        let counter = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let readiness = Readiness::new(Arc::new(counter)).unwrap();
        assert!(is_pending(readiness.readable()));
        rustix::io::write(readiness.get_ref(), &1_u64.to_ne_bytes()).unwrap();
        let ready = readiness.readable().await.unwrap();
        rustix::io::read(ready.get_ref(), &mut [0; 8]).unwrap();
        ready.clear();
        assert!(is_pending(readiness.readable()));
    });
}

#[test]
fn async_sending_waits_until_the_peer_reads() {
    run(async {
        let (coordinator, device) = connected();
        let coordinator = AsyncChannel::new(coordinator).unwrap();
        let queued = fill(coordinator.channel());
        let message = command(Phase::Start, 0);
        let mut sending = pin!(coordinator.send(&message, &[]));
        let waker = Waker::from(Arc::new(Ignored));
        assert!(sending.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());

        let device = AsyncChannel::new(device).unwrap();
        let read = async {
            for _ in 0..queued {
                device.recv().await.unwrap();
            }
            assert_eq!(device.recv().await.unwrap().message, message);
        };
        let (sent, ()) = tokio::join!(sending, read);
        sent.unwrap();
    });
}

#[test]
fn a_dropped_receive_loses_no_message() {
    run(async {
        let (coordinator, device) = connected();
        let coordinator = AsyncChannel::new(coordinator).unwrap();
        for sequence in 0..10 {
            assert!(is_pending(coordinator.recv()));
            device.try_send(&heartbeat(sequence), &[]).unwrap();
            assert_eq!(coordinator.recv().await.unwrap().message, heartbeat(sequence));
        }
    });
}

struct Ignored;

impl Wake for Ignored {
    fn wake(self: Arc<Self>) {}
}

/// Polls once and drops.
fn is_pending<T>(future: impl Future<Output = T>) -> bool {
    let waker = Waker::from(Arc::new(Ignored));
    matches!(pin!(future).poll(&mut Context::from_waker(&waker)), Poll::Pending)
}
