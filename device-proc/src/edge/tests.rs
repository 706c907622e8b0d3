use super::*;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

fn edge() -> (Edge, Arc<Station>) {
    let (edge, station) = (Edge::default(), Station::new().unwrap());
    edge.set_socket(Arc::clone(&station));
    (edge, station)
}

/// Whether it is done without waiting.
fn is_done_at_once(edge: &Edge) -> bool {
    let mut drain = Box::pin(edge.drain());
    drain.as_mut().poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
}

#[test]
fn nobody_is_waited_for_where_nobody_takes_anything() {
    let edge = Edge::default();
    assert!(edge.is_quiet() && is_done_at_once(&edge));
    let (edge, station) = edge_idle();
    assert!(edge.is_quiet() && is_done_at_once(&edge));
    assert_eq!(station.request(), None, "nobody was asked");
}

fn edge_idle() -> (Edge, Arc<Station>) {
    let (edge, station) = edge();
    station.idle();
    (edge, station)
}

#[test]
fn what_is_in_the_socket_of_an_idle_thread_is_seen() {
    let (edge, station) = edge_idle();
    let (ours, theirs) = UnixStream::pair().unwrap();
    station.take_from_socket(&Arc::new(ours.into()));
    assert!(edge.is_quiet());
    (&theirs).write_all(&[0]).unwrap();
    assert!(!edge.is_quiet() && !is_done_at_once(&edge));
    assert!(station.request().is_some(), "the thread is asked");
}

#[test]
fn what_was_rung_is_seen() {
    let (edge, station) = (Edge::default(), Station::new().unwrap());
    edge.set_doorbells(Arc::clone(&station));
    let bells = [0, 1].map(|_| Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap()));
    station.take_from_eventfds(&bells);
    station.idle();
    assert!(edge.is_quiet());
    rustix::io::write(&*bells[1], &1_u64.to_ne_bytes()).unwrap();
    assert!(!edge.is_quiet());
}

#[test]
fn a_busy_thread_is_asked_once_and_done_when_it_says_so() {
    let (edge, station) = edge();
    let mut drain = Box::pin(edge.drain());
    let mut context = Context::from_waker(Waker::noop());
    assert!(drain.as_mut().poll(&mut context).is_pending());
    let request = station.request().unwrap();
    let looked = poll(&mut [PollFd::new(&station.alarm(), PollFlags::IN)], None);
    assert_eq!(looked, Ok(1), "it is woken from its poll");
    station.looked_up();
    station.done(request);
    assert!(drain.as_mut().poll(&mut context).is_ready());
    assert_eq!(station.request(), None);
}

#[test]
fn a_thread_that_waits_for_somebody_else_counts_as_drained() {
    let (edge, station) = edge();
    let mut drain = Box::pin(edge.drain());
    let mut context = Context::from_waker(Waker::noop());
    assert!(drain.as_mut().poll(&mut context).is_pending());
    station.waiting();
    assert!(drain.as_mut().poll(&mut context).is_ready());
    assert!(edge.is_quiet());
    station.busy();
    assert!(!edge.is_quiet());
}

#[test]
fn what_a_thread_need_not_do_any_more_is_not_asked_of_it_after_the_stop() {
    for quiet in [Station::waiting, Station::idle] {
        let (edge, station) = edge();
        let mut drain = Box::pin(edge.drain());
        let mut context = Context::from_waker(Waker::noop());
        assert!(drain.as_mut().poll(&mut context).is_pending());
        let request = station.request().unwrap();
        quiet(&station);
        // It says so without having seen that it was asked: the control side sees it by itself.
        station.told.notify_waiters();
        assert!(drain.as_mut().poll(&mut context).is_ready());
        station.busy();
        assert_eq!(station.request(), None);
        assert!(station.is_done(request));
    }
}

#[test]
fn who_keeps_something_is_woken_by_the_start_and_nobody_else() {
    let (edge, station) = edge();
    let is_rung = || {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&station.alarm(), PollFlags::IN)], Some(&now)) == Ok(1)
    };
    edge.hold();
    edge.started();
    assert!(!is_rung() && !edge.is_held());
    station.keep();
    edge.started();
    assert!(is_rung());
    station.looked_up();
    edge.started();
    assert!(!is_rung(), "once");
}

/// A thread that takes bytes out of a socket as the transport does, and counts them.
fn taker(station: Arc<Station>, socket: Arc<OwnedFd>, taken: Arc<AtomicUsize>) -> JoinHandle<()> {
    let mut hot = true;
    let take = move || {
        let mut buffer = [0; 3];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(&*socket, &mut buffer, flags) {
            Ok((0, _)) => None,
            Ok((count, _)) => {
                // Between this and that it is not in the socket and has had no effect.
                std::thread::yield_now();
                taken.fetch_add(count, Ordering::SeqCst);
                Some(true)
            }
            Err(_) => Some(false),
        }
    };
    let polled = move |station: &Station, socket: BorrowedFd<'_>| {
        let alarm = station.alarm();
        let mut both = [PollFd::new(&alarm, PollFlags::IN), PollFd::new(&socket, PollFlags::IN)];
        poll(&mut both, None).unwrap();
        if !both[0].revents().is_empty() {
            station.looked_up();
        }
    };
    std::thread::spawn(move || {
        let source = match &*station.source() {
            Source::Socket(socket) => Arc::clone(socket),
            _ => panic!("no socket"),
        };
        loop {
            if let Some(request) = station.request() {
                let end = rustix::io::ioctl_fionread(&source).unwrap();
                let mut looks = end;
                while looks > 0 {
                    match take() {
                        None => return,
                        Some(true) => looks -= 1,
                        Some(false) => break,
                    }
                }
                station.done(request);
            }
            if !hot {
                station.idle();
                polled(&station, source.as_fd());
                station.busy();
            }
            match take() {
                None => return,
                Some(some) => hot = some,
            }
        }
    })
}

#[tokio::test]
async fn whatever_was_sent_before_a_drain_has_been_taken_after_it() {
    let (edge, station) = edge();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let ours = Arc::new(OwnedFd::from(ours));
    station.take_from_socket(&ours);
    let taken = Arc::<AtomicUsize>::default();
    let thread = taker(Arc::clone(&station), ours, Arc::clone(&taken));
    let mut sent = 0;
    let mut at_once = 0;
    for round in 0..20_000_usize {
        for _ in 0..round % 4 {
            (&theirs).write_all(&vec![0; 1 + round % 5]).unwrap();
            sent += 1 + round % 5;
        }
        if round % 3 == 0 {
            std::thread::yield_now();
        }
        at_once += usize::from(edge.is_quiet());
        edge.drain().await;
        assert_eq!(taken.load(Ordering::SeqCst), sent, "round {round}");
    }
    assert!(at_once > 0, "a thread that has nothing to do is never woken");
    drop(theirs);
    station.ring();
    thread.join().unwrap();
}

#[test]
fn a_thread_that_takes_something_during_the_look_is_not_quiet() {
    let (edge, station) = edge();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    station.take_from_socket(&Arc::new(OwnedFd::from(ours)));
    let edge = Arc::new(edge);
    for round in 0..500 {
        station.idle();
        // The look at the socket waits for this.
        let source = station.source();
        let begun = Arc::<AtomicUsize>::default();
        let looking = {
            let (edge, begun) = (Arc::clone(&edge), Arc::clone(&begun));
            std::thread::spawn(move || {
                begun.store(1, Ordering::SeqCst);
                edge.is_quiet()
            })
        };
        while begun.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        for _ in 0..round % 50 {
            std::thread::yield_now();
        }
        // What was in the socket is in the thread's hands now, and the socket is empty.
        station.busy();
        drop(source);
        assert!(!looking.join().unwrap(), "round {round}");
    }
}
