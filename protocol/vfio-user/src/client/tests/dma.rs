//! The server's commands.

use super::*;
use crate::wire::DmaAccess;
use std::sync::Mutex;

/// 64 KiB from address 0, which several can hold.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn new() -> Self {
        Self(Arc::new(Mutex::new((0..=255).cycle().take(64 << 10).collect())))
    }

    fn with(&self, iova: u64, size: usize, run: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let start = usize::try_from(iova).map_err(|_| Errno::ENODEV)?;
        let mut memory = self.0.lock().expect("no panic");
        run(memory.get_mut(start..start + size).ok_or(Errno::ENODEV)?);
        Ok(())
    }
}

impl DmaTarget for Memory {
    fn read(&mut self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.with(iova, data.len(), |memory| data.copy_from_slice(memory))
    }

    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.with(iova, data.len(), |memory| memory.copy_from_slice(data))
    }
}

fn access(address: u64, count: u64) -> Vec<u8> {
    let mut body = Vec::new();
    DmaAccess { address, count }.encode(&mut body);
    body
}

impl Peer {
    fn dma_read(&mut self, id: u16, address: u64, count: u64) {
        self.say(&Header::command(id, Command::DmaRead), &access(address, count), &[]);
    }

    fn dma_write(&mut self, id: u16, address: u64, data: &[u8]) {
        let body = [&access(address, data.len() as u64), data].concat();
        self.say(&Header::command(id, Command::DmaWrite), &body, &[]);
    }

    /// The next message is the good answer to a command of the server; its body.
    fn expect_answer(&mut self, id: u16, command: Command) -> Vec<u8> {
        let (header, body, _) = self.hear();
        assert_eq!((header.id, header.command), (id, command.number()));
        assert_eq!(header.kind(), Some(Kind::Done));
        body
    }

    fn expect_refusal(&mut self, id: u16, errno: Errno) {
        let (header, body, _) = self.hear();
        assert_eq!((header.id, header.kind()), (id, Some(Kind::Refused(errno))));
        assert!(body.is_empty());
    }
}

fn builder() -> Builder {
    Client::builder().timeout(PATIENCE).dma(Memory::new())
}

#[test]
fn it_is_served_while_nobody_calls() {
    let (done, is_done) = mpsc::channel();
    let script = move |peer: &mut Peer| {
        peer.dma_read(7, 0x10, 4);
        let body = peer.expect_answer(7, Command::DmaRead);
        assert_eq!(body, [access(0x10, 4), vec![0x10, 0x11, 0x12, 0x13]].concat());
        peer.dma_write(8, 0x11, &[1, 2]);
        assert_eq!(peer.expect_answer(8, Command::DmaWrite), access(0x11, 2));
        peer.dma_read(9, 0x10, 4);
        assert_eq!(peer.expect_answer(9, Command::DmaRead)[16..], [0x10, 1, 2, 0x13]);
        done.send(()).expect("heard");
    };
    session_of(builder(), script, |_client| is_done.recv_timeout(PATIENCE).expect("served"));
}

#[test]
fn it_is_served_between_a_request_and_its_answer() {
    let script = |peer: &mut Peer| {
        for id in 0..100 {
            let (header, body, _) = peer.expect(Command::RegionRead);
            // Also by a command with the id of the request that waits.
            for id in [id, header.id] {
                peer.dma_read(id, 0x20, 2);
                let data = peer.expect_answer(id, Command::DmaRead);
                assert_eq!(data[16..], [0x20, 0x21]);
            }
            peer.answer(&header, &read_answer(&body, 3));
        }
    };
    session_of(builder(), script, |client| {
        for _ in 0..100 {
            assert_eq!(read_4(&client).expect("read"), [3; 4]);
        }
    });
}

/// In the gaps of a busy client, and during a call that takes long.
#[test]
fn it_is_served_at_any_time() {
    let script = |peer: &mut Peer| {
        for round in 0..200_u16 {
            peer.serve_read(1);
            peer.dma_read(round, 0, 1);
            // The answer, and perhaps the next request before it.
            let mut heard = vec![peer.hear(), peer.hear()];
            heard.sort_by_key(|(header, _, _)| header.command);
            let (reset, answer) = (heard.pop().expect("two"), heard.pop().expect("two"));
            assert_eq!(reset.0.command, Command::Reset.number());
            assert_eq!(answer.0.command, Command::DmaRead.number());
            peer.dma_write(round, 0, &[7]);
            peer.expect_answer(round, Command::DmaWrite);
            peer.answer(&reset.0, &[]);
        }
    };
    session_of(builder(), script, |client| {
        for _ in 0..200 {
            read_4(&client).expect("read");
            client.reset().expect("reset");
        }
    });
}

/// A caller that takes its time between sending and reading: the service is back at the socket then,
/// and what the caller reads for it must get it away from there.
#[test]
fn it_is_served_when_a_slow_caller_reads_it() {
    let (begun, has_begun) = mpsc::channel();
    let script = move |peer: &mut Peer| {
        let (header, _, _) = peer.expect(Command::Reset);
        has_begun.recv_timeout(PATIENCE).expect("begun");
        peer.dma_read(1, 0, 1);
        peer.expect_answer(1, Command::DmaRead);
        peer.answer(&header, &[]);
    };
    session_of(builder(), script, |client| {
        let deadline = Instant::now() + PATIENCE;
        let exchange = client.exchange();
        let ticket =
            exchange.start(Command::Reset, &[], &[], &mut deadline.into(), |_| ()).expect("sent");
        while !exchange.service_is_at_socket() {
            assert!(Instant::now() < deadline, "the service never goes to the socket");
            thread::yield_now();
        }
        thread::scope(|scope| {
            let waits = scope.spawn(|| ticket.finish(&mut deadline.into(), |_, _| Ok(())));
            begun.send(()).expect("heard");
            waits.join().expect("no panic").expect("reset");
        });
    });
}

#[test]
fn errors_are_answered() {
    let script = |peer: &mut Peer| {
        let (header, _, _) = peer.expect(Command::Reset);
        peer.dma_read(1, 1 << 40, 4);
        peer.expect_refusal(1, Errno::ENODEV);
        peer.dma_read(2, 0, (1 << 20) + 1);
        peer.expect_refusal(2, Errno::E2BIG);
        peer.dma_write(3, 0xffff, &[1, 2]);
        peer.expect_refusal(3, Errno::ENODEV);
        for (id, command) in [(4, Command::RegionRead), (5, Command::Version)] {
            peer.say(&Header::command(id, command), &[0; 20], &[]);
            peer.expect_refusal(id, Errno::ENOSYS);
        }
        peer.say(&Header { command: 99, ..Header::command(6, Command::Reset) }, &[], &[]);
        peer.expect_refusal(6, Errno::ENOSYS);
        // Without an answer: it is done, and nothing is said.
        let body = [access(0x30, 1), vec![0xee]].concat();
        peer.say(&Header::posted(7, Command::DmaWrite), &body, &[]);
        peer.say(&Header::posted(8, Command::DmaWrite), &access(1 << 40, 0), &[]);
        peer.dma_read(9, 0x30, 1);
        assert_eq!(peer.expect_answer(9, Command::DmaRead)[16..], [0xee]);
        peer.answer(&header, &[]);
    };
    session_of(builder(), script, |client| client.reset().expect("reset"));
}

/// More than may be queued, and the answer of a caller behind them.
#[test]
fn a_flood_is_served_and_the_caller_gets_its_answer() {
    const FLOOD: u16 = 2000;
    let (done, is_done) = mpsc::channel();
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(theirs);
            peer.welcome(&capabilities());
            let (header, body, _) = peer.expect(Command::RegionRead);
            let Peer { mut receiver, mut sender } = peer;
            thread::scope(|scope| {
                scope.spawn(move || {
                    for id in 0..FLOOD {
                        let count = if id % 50 == 0 { 40_000 } else { 8 };
                        let dma = Header::command(id, Command::DmaWrite);
                        let body =
                            [access(0, count), vec![1; usize::try_from(count).expect("small")]]
                                .concat();
                        sender.send(&dma, &body, &[], Peer::deadline(), |_| ()).expect("sent");
                    }
                    let answer = read_answer(&body, 9);
                    sender
                        .send(&header.reply(), &answer, &[], Peer::deadline(), |_| ())
                        .expect("sent");
                });
                for id in 0..FLOOD {
                    let message = receiver.receive(Peer::deadline()).expect("an answer");
                    assert_eq!((message.header.id, message.kind), (id, Kind::Done));
                }
                done.send(()).expect("heard");
            });
        });
        let client = builder().start(ours).expect("a client");
        assert_eq!(read_4(&client).expect("read"), [9; 4]);
        is_done.recv_timeout(PATIENCE).expect("all are answered");
    });
}

/// What blocks until it is told.
struct Slow {
    begun: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
}

impl DmaTarget for Slow {
    fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        self.begun.send(()).expect("heard");
        self.go_on.recv_timeout(PATIENCE).expect("told");
        Ok(())
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
}

/// Calls do not wait for DMA that takes long, up to as much as may be queued.
#[test]
fn calls_go_on_while_dma_is_served() {
    let (begun, is_begun) = mpsc::channel();
    let (go_on, is_told) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    let slow = Slow { begun, go_on: is_told };
    let script = move |peer: &mut Peer| {
        peer.dma_read(1, 0, 4);
        (0..20).for_each(|byte| {
            peer.dma_write(2, 0, &[byte]);
            peer.serve_read(byte);
        });
        peer.expect_answer(1, Command::DmaRead);
        (0..20).for_each(|_| drop(peer.expect_answer(2, Command::DmaWrite)));
        done.send(()).expect("heard");
    };
    session_of(Client::builder().timeout(PATIENCE).dma(slow), script, |client| {
        is_begun.recv_timeout(PATIENCE).expect("begun");
        (0..20).for_each(|byte| assert_eq!(read_4(&client).expect("read"), [byte; 4]));
        go_on.send(()).expect("heard");
        is_done.recv_timeout(PATIENCE).expect("all are answered");
    });
}

/// With a queue that is full a call still ends at its deadline.
#[test]
fn a_deadline_holds_while_dma_does_not_get_on() {
    let (begun, is_begun) = mpsc::channel();
    let (go_on, is_told) = mpsc::channel();
    let (answered, is_answered) = mpsc::channel();
    let slow = Slow { begun, go_on: is_told };
    let script = move |peer: &mut Peer| {
        let (header, body, _) = peer.expect(Command::RegionRead);
        peer.dma_read(1, 0, 4);
        for _ in 0..300 {
            peer.say(&Header::posted(2, Command::DmaWrite), &[access(0, 1), vec![1]].concat(), &[]);
        }
        peer.answer(&header, &read_answer(&body, 1));
        peer.expect_answer(1, Command::DmaRead);
        answered.send(()).expect("heard");
        peer.serve_read(2);
    };
    session_of(Client::builder().timeout(PATIENCE).dma(slow), script, |client| {
        // Its answer is behind more than may be queued.
        let error = read_4(&client.with_timeout(Duration::from_millis(300)));
        assert!(matches!(error, Err(ClientError::Deadline { .. })), "{error:?}");
        is_begun.recv_timeout(PATIENCE).expect("begun");
        go_on.send(()).expect("heard");
        is_answered.recv_timeout(PATIENCE).expect("answered");
        assert_eq!(read_4(&client).expect("read"), [2; 4]);
    });
}

struct Panics;

impl DmaTarget for Panics {
    fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        panic!("as asked")
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
}

#[test]
fn a_panic_of_the_memory_ends_the_connection() {
    let script = |peer: &mut Peer| {
        peer.hear();
        peer.dma_read(1, 0, 4);
        peer.expect_end();
    };
    session_of(Client::builder().timeout(PATIENCE).dma(Panics), script, |client| {
        assert!(client.reset().expect_err("no answer").is_end());
        is_at_its_end(&client, |end| matches!(end, EndError::ServiceEnded));
    });
}

#[test]
fn with_the_last_client_the_connection_and_the_memory_go() {
    let memory = Memory::new();
    let held = Arc::clone(&memory.0);
    session_of(Client::builder().timeout(PATIENCE).dma(memory), Peer::expect_end, |client| {
        let other = client.with_timeout(Duration::ZERO);
        drop(client);
        assert_eq!(Arc::strong_count(&held), 2);
        drop(other);
        assert_eq!(Arc::strong_count(&held), 1);
    });
}

/// Tells which thread it runs on.
struct Who(mpsc::Sender<rustix::thread::Pid>);

impl DmaTarget for Who {
    fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        self.0.send(rustix::thread::gettid()).expect("heard");
        Ok(())
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
}

/// How often a thread has gone to sleep.
fn sleeps(thread: rustix::thread::Pid) -> u128 {
    let path = format!("/proc/self/task/{}/status", thread.as_raw_nonzero());
    let status = std::fs::read_to_string(path).expect("the thread");
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.expect("a count").trim().parse().expect("a number")
}

/// A busy client: the thread for DMA looks each millisecond, and is not woken by each answer.
#[test]
fn calls_do_not_wake_the_service() {
    const CALLS: u32 = 20_000;
    let (who, is_who) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    let script = move |peer: &mut Peer| {
        peer.dma_read(1, 0, 1);
        peer.expect_answer(1, Command::DmaRead);
        ready.send(()).expect("heard");
        (0..CALLS).for_each(|_| peer.serve_read(1));
    };
    session_of(Client::builder().timeout(PATIENCE).dma(Who(who)), script, |client| {
        let service = is_who.recv_timeout(PATIENCE).expect("served");
        is_ready.recv_timeout(PATIENCE).expect("answered");
        let (before, begin) = (sleeps(service), Instant::now());
        for _ in 0..CALLS {
            read_4(&client).expect("read");
        }
        let (slept, ticks) = (sleeps(service) - before, begin.elapsed().as_millis());
        assert!(slept <= 2 * ticks + 50, "{slept} times in {ticks} ms");
    });
}
