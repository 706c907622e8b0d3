//! DMA by messages, with a client that is played here.

use super::*;
use rustix::io::Errno;
use std::sync::Condvar;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where the client's memory begins.
const BASE: u64 = 0x30000;

/// A client with 1 MiB of memory.
struct Client {
    memory: Mutex<Vec<u8>>,
    /// IOVA, length and whether it was a write, in the order they came.
    asked: Mutex<Vec<(u64, usize, bool)>>,
    most: usize,
    refuses: Option<Errno>,
    /// While it is silent, messages wait for the deadline or until it has gone.
    silent: AtomicBool,
    gone: Mutex<bool>,
    changed: Condvar,
}

impl Client {
    fn new(most: usize) -> Self {
        Self {
            memory: Mutex::new(vec![0; 1 << 20]),
            asked: Mutex::default(),
            most,
            refuses: None,
            silent: AtomicBool::new(false),
            gone: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    fn silent() -> Arc<Self> {
        let client = Self::new(4096);
        client.silent.store(true, Ordering::Relaxed);
        Arc::new(client)
    }

    fn leave(&self) {
        *self.gone.lock().expect("no panic") = true;
        self.changed.notify_all();
    }

    fn wait_until_asked(&self) {
        while self.asked.lock().expect("no panic").is_empty() {
            thread::yield_now();
        }
    }

    fn message(
        &self,
        message: (u64, usize, bool),
        wait: Patience<'_>,
        act: impl FnOnce(&mut [u8]),
    ) -> Result<(), MessageError> {
        let (iova, len, _) = message;
        assert!(len > 0 && len <= self.most.max(1), "{len} bytes in one message");
        self.asked.lock().expect("no panic").push(message);
        if self.silent.load(Ordering::Relaxed) {
            let rest = wait.deadline().saturating_duration_since(Instant::now());
            let gone = self.gone.lock().expect("no panic");
            let waits = |gone: &mut bool| !*gone && wait.is_wanted();
            let (gone, _) = self.changed.wait_timeout_while(gone, rest, waits).expect("");
            return Err(if *gone {
                MessageError::Gone
            } else if wait.is_wanted() {
                MessageError::TimedOut
            } else {
                MessageError::Unmapping
            });
        }
        if let Some(errno) = self.refuses {
            return Err(MessageError::Refused(errno));
        }
        let at = usize::try_from(iova - BASE).expect("small");
        act(&mut self.memory.lock().expect("no panic")[at..at + len]);
        Ok(())
    }
}

impl MessageDma for Client {
    fn max_transfer(&self) -> usize {
        self.most
    }

    fn read(&self, iova: u64, to: &mut [u8], wait: Patience<'_>) -> Result<(), MessageError> {
        self.message((iova, to.len(), false), wait, |memory| to.copy_from_slice(memory))
    }

    fn write(&self, iova: u64, from: &[u8], wait: Patience<'_>) -> Result<(), MessageError> {
        self.message((iova, from.len(), true), wait, |memory| memory.copy_from_slice(from))
    }

    fn look_again(&self) {
        drop(self.gone.lock().expect("no panic"));
        self.changed.notify_all();
    }
}

fn failed(result: Result<(), DmaError>) -> MessageError {
    match result {
        Err(DmaError::Message { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_window_without_a_file_is_read_and_written_by_messages() {
    let (map, ram, _peer) = machine();
    let client = Arc::new(Client::new(16));
    let link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    let spans = [Span::read_write(0x30ff8, 0x30), Span::read_write(0x10ff0, 0x30)];
    let access = dma.access(&spans).expect("access");
    assert_eq!(access.class(), WindowClass::Peer);
    access.write(0, 1, b"a message of more than sixteen bytes").expect("written");
    assert_eq!(
        *client.asked.lock().expect("no panic"),
        [(0x30ff9, 16, true), (0x31009, 16, true), (0x31019, 4, true)]
    );
    let mut text = [0; 4];
    access.read(0, 33, &mut text).expect("read");
    assert_eq!(&text, b"ytes");
    access.copy(0, 1).expect("copied");
    let mut bytes = [0; 9];
    ram.read(0xff1, &mut bytes).expect("inside");
    assert_eq!(&bytes, b"a message");
    access.store_u64(1, 0, 0x1122).expect("stored");
    access.copy(1, 0).expect("copied back");
    assert_eq!(access.load_u64(0, 0), Ok(0x1122));
    access.store_u64(0, 8, 0x0102_0304_0506_0708).expect("stored");
    access.read(0, 8, &mut text).expect("read");
    assert_eq!(text, [8, 7, 6, 5], "little endian");
    // Nothing is asked for what is refused here, or has no length.
    client.asked.lock().expect("no panic").clear();
    access.read(0, 0x30, &mut []).expect("nothing to read");
    for outside in [
        access.load_u64(0, 4).map(drop),
        access.store_u64(0, 0x30, 0),
        access.read(0, u64::MAX, &mut [0]),
        access.write(0, 0x2f, &[0; 2]),
    ] {
        assert!(matches!(outside, Err(DmaError::OutsideSpan { .. })), "{outside:?}");
    }
    assert!(client.asked.lock().expect("no panic").is_empty());
    drop(access);
    drop(link);
    let error = dma.access(&spans).expect_err("the client has gone");
    assert_eq!(error, DmaError::NoMemory { iova: 0x30ff8 });
}

#[test]
fn copies_in_the_clients_memory_may_overlap() {
    let map = empty();
    map.map(window(BASE, 1 << 20), None).expect("recorded");
    let client = Arc::new(Client::new(0x3000));
    let _link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let pattern: Vec<u8> = (0..200_000_u32).map(|at| at.to_le_bytes()[at as usize % 3]).collect();
    for (from, to) in [(0, 10), (70_000, 0), (5, 300_000), (9, 9), (0, 65_537)] {
        client.memory.lock().expect("no panic")[from..from + pattern.len()]
            .copy_from_slice(&pattern);
        let (len, from, to) = (pattern.len() as u64, BASE + from as u64, BASE + to as u64);
        let dma = map.dma();
        let access = dma.access(&[Span::read(from, len), Span::write(to, len)]).expect("access");
        access.copy(0, 1).expect("copied");
        let at = usize::try_from(to - BASE).expect("small");
        assert!(client.memory.lock().expect("no panic")[at..at + pattern.len()] == pattern);
    }
}

#[test]
fn a_refusal_carries_the_clients_errno() {
    let (map, _ram, _peer) = machine();
    let client = Client { refuses: Some(Errno::NODEV), ..Client::new(64) };
    let _link = map.connect(Arc::new(client));
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x30000, 8)]).expect("access");
    let error = access.store_u64(0, 0, 1).expect_err("refused");
    let source = MessageError::Refused(Errno::NODEV);
    assert_eq!(error, DmaError::Message { iova: 0x30000, len: 8, source });
    let cause = std::error::Error::source(&error).and_then(std::error::Error::source);
    assert_eq!(cause.and_then(|cause| cause.downcast_ref()), Some(&Errno::NODEV));
}

#[test]
fn nothing_is_asked_inside_an_access_handler() {
    let (map, _ram, _peer) = machine();
    let client = Arc::new(Client::new(64));
    let _link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    let spans = [Span::read(0x10000, 8), Span::write(0x30000, 8)];
    let refused = DmaError::InHandler { iova: 0x30000 };
    let begun_before = dma.access(&spans).expect("access");
    let handling = Handling::begin();
    {
        let _nested = Handling::begin();
        assert_eq!(dma.try_access(&spans).expect_err("in a handler"), refused);
    }
    assert_eq!(dma.access(&spans).expect_err("in a handler"), refused);
    assert_eq!(begun_before.copy(0, 1), Err(refused));
    drop(begun_before);
    drop(dma.access(&spans[..1]).expect("mapped memory needs no message"));
    // Where it would wait for the gate, too, it does not wait.
    map.gate().peer().close();
    assert_eq!(dma.access(&spans).expect_err("in a handler"), refused);
    map.gate().peer().open();
    thread::scope(|scope| {
        let other = scope.spawn(|| dma.access(&spans).and_then(|access| access.copy(0, 1)));
        assert_eq!(other.join().expect("no panic"), Ok(()), "another thread is in none");
    });
    assert_eq!(client.asked.lock().expect("no panic").len(), 1);
    drop(handling);
    assert_eq!(dma.access(&spans).and_then(|access| access.copy(0, 1)), Ok(()));
}

#[test]
fn what_waits_when_the_client_goes_fails_at_once() {
    let (map, _ram, _peer) = machine();
    let client = Client::silent();
    let link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    thread::scope(|scope| {
        let read = scope.spawn(|| {
            let access = dma.access(&[Span::read(0x30000, 0x4000)]).expect("access");
            (access.read(0, 0, &mut [0; 0x4000]), access.load_u64(0, 0).map(drop))
        });
        client.wait_until_asked();
        // As a transport does it: the link, who waits, and then the windows.
        drop(link);
        client.leave();
        assert_eq!(map.unmap_all(LONG), Ok(()));
        let (pending, later) = read.join().expect("no panic");
        assert_eq!((failed(pending), failed(later)), (MessageError::Gone, MessageError::Gone));
    });
    assert_eq!(client.asked.lock().expect("no panic").len(), 1, "nothing is asked after it");
}

#[test]
fn another_client_takes_the_place_of_the_one_before() {
    let (map, _ram, _peer) = machine();
    let (one, two) = (Arc::new(Client::new(64)), Arc::new(Client::new(64)));
    let old = map.connect(Arc::clone(&one) as Arc<dyn MessageDma>);
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x30000, 8)]).expect("access");
    let _new = map.connect(Arc::clone(&two) as Arc<dyn MessageDma>);
    assert_eq!(failed(access.store_u64(0, 0, 1)), MessageError::Gone, "its own is gone");
    drop(access);
    drop(old);
    let access = dma.access(&[Span::write(0x30000, 8)]).expect("the new one is still there");
    access.store_u64(0, 0, 2).expect("stored");
    assert_eq!(two.asked.lock().expect("no panic").len(), 1);
    assert_eq!(one.asked.lock().expect("no panic").len(), 0);
}

#[test]
fn what_was_asked_is_not_waited_for_once_the_client_wants_a_window_back() {
    let (map, _ram, _peer) = machine();
    let client = Client::silent();
    let _link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    // The window that is asked for, another one of the transaction, and all.
    let takes: [fn(&MemoryMap) -> bool; 3] = [
        |map| map.unmap(0x10000, 4 * PAGE, LONG).is_ok(),
        |map| map.unmap(0x30000, 4 * PAGE, LONG).is_ok(),
        |map| map.unmap_all(LONG).is_ok(),
    ];
    for (take, first) in takes.into_iter().zip([Some(0x10000), None, None]) {
        thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let message = Span::read(0x30000, 8);
                let spans =
                    first.map_or(vec![message], |first| vec![message, Span::read(first, 8)]);
                let access = dma.access(&spans).expect("access");
                failed(access.read(0, 0, &mut [0; 8]))
            });
            client.wait_until_asked();
            assert!(take(&map), "nobody uses it any more");
            assert_eq!(reading.join().expect("no panic"), MessageError::Unmapping);
        });
        client.asked.lock().expect("no panic").clear();
        if !map.shared.windows().iter().any(|window| window.spec.iova == 0x30000) {
            map.map(window(0x30000, 4 * PAGE), None).expect("mapped again");
        }
    }
}

#[test]
fn no_message_is_sent_for_a_window_that_the_client_wants_back() {
    let (map, _ram, _peer) = machine();
    let client = Client::silent();
    let _link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    thread::scope(|scope| {
        let spans = [Span::read(0x10000, 8), Span::read(0x30000, 0x4000)];
        let access = dma.access(&spans).expect("access");
        let unmap = scope.spawn(|| map.unmap(0x10000, 4 * PAGE, LONG));
        while dma.classify(0x10000, 8).is_some() {
            thread::yield_now();
        }
        assert_eq!(failed(access.read(1, 0, &mut [0; 8])), MessageError::Unmapping);
        drop(access);
        assert_eq!(unmap.join().expect("no panic"), Ok(()));
    });
    assert!(client.asked.lock().expect("no panic").is_empty());
}

#[tokio::test]
async fn a_stop_waits_for_the_answer_to_what_was_asked() {
    let (map, _ram, _peer) = machine();
    let client = Client::silent();
    let _link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    let store = thread::spawn(move || {
        dma.access(&[Span::write(0x30000, 8)]).and_then(|access| access.store_u64(0, 0, 1))
    });
    client.wait_until_asked();
    map.gate().close(Scope::Peer, SHORT).await.expect_err("it is in flight");
    let closed = map.gate().close(Scope::Peer, LONG);
    let leave = async { client.leave() };
    let (closed, ()) = tokio::join!(closed, leave);
    closed.expect("drained");
    assert_eq!(failed(store.join().expect("no panic")), MessageError::Gone);
}

#[test]
fn a_client_that_says_nothing_costs_a_bounded_time() {
    let (map, _ram, _peer) = machine();
    let client = Client::silent();
    let _link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x30000, 0x4000)]).expect("access");
    let began = Instant::now();
    // Four messages, and one deadline for all of them.
    assert_eq!(failed(access.write(0, 0, &[0; 0x4000])), MessageError::TimedOut);
    assert!(began.elapsed() >= MESSAGE_PATIENCE, "it had its time");
    assert_eq!(client.asked.lock().expect("no panic").len(), 1);
}

#[test]
fn a_client_that_takes_no_bytes_at_all_is_asked_for_one_at_a_time() {
    let (map, _ram, _peer) = machine();
    let client = Arc::new(Client::new(0));
    let _link = map.connect(Arc::clone(&client) as Arc<dyn MessageDma>);
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x30000, 3)]).expect("access");
    access.write(0, 0, &[1, 2, 3]).expect("written");
    assert_eq!(client.memory.lock().expect("no panic")[..4], [1, 2, 3, 0]);
}
