//! Whatever a client writes to the operator socket, in pieces of any size.
//!
//! The first four bytes say how the client behaves and how long answers take; the others are what it
//! writes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::fuzzing::{Asked, Desk, LONGEST_REQUEST, Told, asked, serve, told};
use standstill_fuzz::memory::Counting;
use standstill_fuzz::session;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What one client may take of the heap: 8 requests under way and 16 answers that wait, of which
/// the longest are the problems of a device of 64 KiB that is wrong in every line.
const HEAP: usize = 64 << 20;
/// How many requests of one client may be under way.
const AT_ONCE: usize = 8;
/// Nobody waits longer than this for anything, by the clock of the runtime, which jumps.
const LONG: Duration = Duration::from_secs(600);

fuzz_target!(|input: &[u8]| {
    let Some((&[behaviour, piece, slow, quick], bytes)) = input.split_first_chunk::<4>() else {
        return;
    };
    let client = Client { behaviour, piece, turns: vec![slow & 31, quick & 3] };
    session::run(HEAP, client.talk(bytes));
});

/// How a client behaves.
struct Client {
    behaviour: u8,
    /// The longest piece that it writes at once.
    piece: u8,
    turns: Vec<u8>,
}

impl Client {
    async fn talk(&self, bytes: &[u8]) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let desk = Arc::new(Desk::new(self.turns.clone()));
        let (closing, closed) = watch::channel(false);
        let serving = tokio::spawn(serve(theirs, Arc::clone(&desk), closed));
        let (reader, writer) = ours.into_split();
        let mut unread = None;
        let answers = if self.is_patient() {
            tokio::join!(read(reader), self.write(writer, bytes, &desk, &closing)).0
        } else {
            self.write(writer, bytes, &desk, &closing).await;
            unread = Some(reader);
            Vec::new()
        };
        // It gives up by itself where nobody reads.
        let ended = tokio::time::timeout(LONG, serving).await;
        assert!(ended.is_ok_and(|ended| ended.is_ok()), "a connection does not end");
        drop(unread);
        assert!(desk.most_at_once() <= AT_ONCE, "{} at once", desk.most_at_once());
        if self.is_patient() {
            self.check(bytes, &answers, desk.begun());
        }
    }

    /// Most clients read what they are told.
    fn is_patient(&self) -> bool {
        self.behaviour & 3 != 3
    }

    /// Writes piece by piece, then closes, or the machine ends.
    async fn write(
        &self,
        mut writer: OwnedWriteHalf,
        bytes: &[u8],
        desk: &Desk,
        closing: &watch::Sender<bool>,
    ) {
        let longest = usize::from(self.piece) + 1;
        let mut size = longest;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(size.min(rest.len()));
            let written = tokio::time::timeout(LONG, writer.write_all(piece)).await;
            if !matches!(written, Ok(Ok(()))) {
                break;
            }
            // Pieces of all sizes up to the longest; between them the server has its turn, or not.
            size = size * 7 % longest + 1;
            rest = later;
            if size & 1 == 1 {
                tokio::task::yield_now().await;
            }
        }
        if self.machine_ends() {
            desk.end();
            let _ = closing.send(true);
            // The server says what it has to say and closes.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        drop(writer);
    }

    fn machine_ends(&self) -> bool {
        self.behaviour & 4 != 0
    }

    /// Each line has one answer, with its number; and nobody else has one.
    fn check(&self, bytes: &[u8], answers: &[u8], begun: usize) {
        let asked = Expected::of(bytes);
        let mut answers = answers.split_inclusive(|byte| *byte == b'\n');
        assert_eq!(answers.next().map(line), Some(Told::Greeting), "the first line");
        let (mut given, mut ends, mut nonsense) = (HashMap::new(), HashMap::new(), 0);
        for answer in answers {
            match line(answer) {
                Told::Greeting => panic!("a second greeting"),
                Told::Event(id) => assert!(asked.streams.contains_key(&id), "an event for {id}"),
                Told::End(id) => *ends.entry(id).or_insert(0) += 1,
                Told::Done(id) => *given.entry(Some(id)).or_insert(0) += 1,
                Told::Refused { id, nonsense: is } => {
                    nonsense += usize::from(is);
                    *given.entry(id).or_insert(0) += 1;
                }
            }
        }
        let streams =
            |id: Option<u64>| id.and_then(|id| asked.streams.get(&id)).copied().unwrap_or(0);
        for (id, count) in &given {
            let most = asked.answers.get(id).copied().unwrap_or(0) + streams(*id);
            assert!(*count <= most, "{count} answers to {id:?}, which was asked {most} times");
        }
        for (id, count) in ends {
            assert!(count <= streams(Some(id)), "{count} streams of events {id} have ended");
        }
        if self.machine_ends() {
            // It takes no further requests; those that were begun are answered.
            let answered = given.values().sum::<usize>();
            assert!(begun <= asked.once && begun + nonsense <= answered, "{begun} were begun");
            return;
        }
        assert_eq!((begun, nonsense), (asked.once, asked.nonsense), "begun, and none");
        for (id, count) in &asked.answers {
            let found = given.get(id).copied().unwrap_or(0);
            assert!(found >= *count, "{found} answers to {id:?}, which was asked {count} times");
        }
    }
}

/// What a client can expect for what it has written.
#[derive(Default)]
struct Expected {
    /// How many answers there must be, by number.
    answers: HashMap<Option<u64>, usize>,
    /// How many streams of events were asked for, by number.
    streams: HashMap<u64, usize>,
    /// How many requests have one answer.
    once: usize,
    /// How many lines are none.
    nonsense: usize,
}

impl Expected {
    fn of(bytes: &[u8]) -> Self {
        let mut expected = Self::default();
        for text in bytes.split_inclusive(|byte| *byte == b'\n') {
            let is_whole = text.ends_with(b"\n");
            let length = text.len() - usize::from(is_whole);
            if length > LONGEST_REQUEST {
                // The last one that is read.
                expected.nonsense += 1;
                *expected.answers.entry(None).or_default() += 1;
                break;
            }
            if !is_whole || text.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            match asked(text) {
                Asked::Nonsense(id) => {
                    expected.nonsense += 1;
                    *expected.answers.entry(id).or_default() += 1;
                }
                Asked::Once(id) => {
                    expected.once += 1;
                    *expected.answers.entry(Some(id)).or_default() += 1;
                }
                Asked::Events { id, .. } => *expected.streams.entry(id).or_default() += 1,
            }
        }
        expected
    }
}

async fn read(mut reader: OwnedReadHalf) -> Vec<u8> {
    let mut bytes = Vec::new();
    // An end by an error is one, too: the server does not read on after a line that is too long.
    let end = tokio::time::timeout(LONG, reader.read_to_end(&mut bytes)).await;
    assert!(end.is_ok(), "the server neither says anything nor goes");
    if !bytes.ends_with(b"\n") {
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        bytes.truncate(whole);
    }
    bytes
}

fn line(bytes: &[u8]) -> Told {
    let text = String::from_utf8_lossy(bytes);
    told(bytes).unwrap_or_else(|| panic!("no line of the protocol: {text:?}"))
}
