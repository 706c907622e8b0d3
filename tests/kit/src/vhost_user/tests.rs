//! Against a device that is written here, byte by byte.

use super::*;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(50);

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    (folder, socket)
}

fn options(deadline: Duration) -> FrontendOptions {
    FrontendOptions { deadline, ..FrontendOptions::default() }
}

/// What a device publishes as used: the first descriptor of a request, and the next index.
fn publish(guest: &Guest, head: u32, index: u16) {
    let used = guest.place(0).unwrap().used;
    let slot = u64::from((index - 1) % 16);
    guest.memory().write_obj(head, GuestAddress(used + 4 + 8 * slot)).unwrap();
    guest.memory().store(index, GuestAddress(used + 2), Ordering::Release).unwrap();
}

/// Reads the header of a message; its number.
fn request(stream: &mut UnixStream) -> u32 {
    let mut header = [0; 12];
    stream.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    stream.read_exact(&mut body).unwrap();
    word(0)
}

#[test]
fn nobody_who_listens_is_waited_for_so_long() {
    let (_folder, socket) = folder();
    let guest = Guest::new(1).unwrap();
    let error = Frontend::connect_with(&socket, &guest, &options(SHORT)).unwrap_err();
    assert!(matches!(error, VhostUserError::Connect { within: SHORT, .. }), "{error}");
    // A device whose queue of frontends is full: connect(2) itself would wait for ever.
    let listener = UnixListener::bind(&socket).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let error = Frontend::connect_with(&socket, &guest, &options(SHORT)).unwrap_err();
    assert!(matches!(error, VhostUserError::Connect { .. }), "{error}");
}

#[test]
fn a_call_that_is_not_answered_ends_at_its_deadline_and_says_which_it_was() {
    let (_folder, socket) = folder();
    let listener = UnixListener::bind(&socket).unwrap();
    let device = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let asked = [request(&mut stream), request(&mut stream)];
        // Until the frontend has cut it.
        stream.read_to_end(&mut Vec::new()).unwrap();
        asked
    });
    let guest = Guest::new(1).unwrap();
    let begin = Instant::now();
    let error = Frontend::connect_with(&socket, &guest, &options(SHORT)).unwrap_err();
    assert!(begin.elapsed() >= SHORT);
    assert!(
        matches!(error, VhostUserError::Deadline { call: "GET_FEATURES", within: SHORT }),
        "{error}"
    );
    assert_eq!(device.join().unwrap(), [3, 1], "SET_OWNER is not answered");
}

#[test]
fn the_end_of_a_device_is_no_deadline_and_what_it_lacks_is_named() {
    let (_folder, socket) = folder();
    let listener = UnixListener::bind(&socket).unwrap();
    let device = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.shutdown(Shutdown::Both).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        request(&mut stream);
        request(&mut stream);
        let header = [1_u32, 1 | 1 << 2, 8].map(u32::to_le_bytes).concat();
        let answer = [&header[..], &(1_u64 << 30).to_le_bytes()].concat();
        stream.write_all(&answer).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    });
    let guest = Guest::new(1).unwrap();
    let error = Frontend::connect_with(&socket, &guest, &options(LONG)).unwrap_err();
    assert!(matches!(error, VhostUserError::Call { .. }), "{error}");
    let error = Frontend::connect_with(&socket, &guest, &options(LONG)).unwrap_err();
    assert!(
        matches!(error, VhostUserError::NotOffered { missing: VERSION_1, offered: 0x4000_0000 }),
        "{error}"
    );
    device.join().unwrap();
}

#[test]
fn each_request_is_answered_once_and_whatever_else_a_device_says_is_an_error() {
    let mut guest = Guest::new(1).unwrap();
    let requests = [(); 3].map(|()| guest.push(0, &[Part::Writable(8)]).unwrap());
    assert_eq!(requests[2], RequestId { queue: 0, number: 2 });
    // In any order.
    publish(&guest, 2, 1);
    publish(&guest, 0, 2);
    let answers = guest.take_answers(0).unwrap();
    let answered: Vec<_> = answers.iter().map(|answer| answer.request).collect();
    assert_eq!(answered, [requests[2], requests[0]]);
    assert_eq!(answers[0].data, [[0xee; 8]], "nobody has written to it");
    assert_eq!((guest.outstanding(0).unwrap(), guest.room(0).unwrap()), (1, 15));

    let broken = |guest: &mut Guest, head, index| {
        publish(guest, head, index);
        match guest.take_answers(0).unwrap_err() {
            VhostUserError::Used { what, .. } => what,
            other => panic!("{other}"),
        }
    };
    let mut twice = guest.copy().unwrap();
    assert_eq!(broken(&mut twice, 2, 3), "the entry of index 2 is 2, which it does not have");
    let mut never = guest.copy().unwrap();
    assert!(broken(&mut never, 0x1_0001, 3).ends_with("is 65537, which it does not have"));
    let mut more = guest.copy().unwrap();
    let text = broken(&mut more, 1, 4);
    assert_eq!(text, "its index goes from 2 to 4, and it has 1 requests");
    publish(&guest, 1, 3);
    assert_eq!(guest.wait_all(0, LONG).unwrap().len(), 1);
}

#[test]
fn who_does_not_answer_and_who_does_not_signal_are_told_apart() {
    let mut guest = Guest::new(1).unwrap();
    guest.push(0, &[Part::Readable(b"x")]).unwrap();
    let error = guest.wait(0, 1, SHORT).unwrap_err();
    assert!(matches!(error, VhostUserError::Unanswered { answered: 0, .. }), "{error}");
    // One that is answered before anybody waits needs no signal.
    publish(&guest, 0, 1);
    assert_eq!(guest.wait(0, 1, SHORT).unwrap().len(), 1);
    // One that is answered while somebody waits does. When that is, nobody can say to a moment.
    guest.begin(0, true).unwrap();
    let at = GuestAddress(guest.place(0).unwrap().avail + 4 + 2 * 16);
    let unsignalled = |index: u16| {
        let request = guest.push(0, &[Part::Readable(b"x")]).unwrap();
        let memory = guest.memory().clone();
        let used = guest.place(0).unwrap().used;
        let waits = move || memory.load::<u16>(at, Ordering::Acquire).unwrap() == index;
        let memory = guest.memory().clone();
        let device = thread::spawn(move || {
            while !waits() {
                thread::yield_now();
            }
            thread::park_timeout(Duration::from_millis(index.into()));
            let head = u32::from(index % 16);
            let slot = GuestAddress(used + 4 + 8 * u64::from(index % 16));
            memory.write_obj(head, slot).unwrap();
            memory.store(index + 1, GuestAddress(used + 2), Ordering::Release).unwrap();
        });
        let waited = guest.wait(0, 1, SHORT);
        device.join().unwrap();
        assert_eq!(guest.used(0).unwrap(), index + 1, "{request}");
        guest.take_answers(0).unwrap();
        matches!(waited, Err(VhostUserError::Unsignalled { queue: 0, answered: 1, .. }))
    };
    assert!((1..1000).any(unsignalled));
}

#[test]
fn rings_go_round_and_parts_that_do_not_fit_are_refused() {
    let layout = RingLayout { descriptors: 4, buffer: 32 };
    let mut guest = Guest::with_layout(2, layout).unwrap();
    assert!(matches!(
        guest.push(0, &[Part::Writable(33)]),
        Err(VhostUserError::Length { length: 33, most: 32 })
    ));
    assert!(matches!(guest.push(0, &[]), Err(VhostUserError::Length { length: 0, .. })));
    assert!(matches!(guest.push(2, &[]), Err(VhostUserError::NoQueue { queue: 2, queues: 2 })));
    let write = BlockRequest::Write { sector: 1, data: vec![7; 40] };
    assert_eq!(write.parts(32), 4);
    let used = guest.place(1).unwrap().used;
    for index in (0..=u16::MAX).chain(0..1000) {
        guest.push_block(1, &write).unwrap();
        let full = guest.push(1, &[Part::Writable(1)]);
        assert!(matches!(full, Err(VhostUserError::Full { queue: 1, free: 0, needed: 1 })));
        let slot = u64::from(index % 4);
        guest.memory().write_obj(0_u32, GuestAddress(used + 4 + 8 * slot)).unwrap();
        let next = index.wrapping_add(1);
        guest.memory().store(next, GuestAddress(used + 2), Ordering::Release).unwrap();
        let answer = guest.take_answers(1).unwrap().pop().unwrap();
        let answer = BlockAnswer::of(answer).unwrap();
        assert_eq!(answer.status, BlockStatus::Unknown(0xee));
    }
    assert_eq!(guest.avail(1).unwrap(), guest.used(1).unwrap());
    for (queues, layout) in [
        (0, RingLayout::default()),
        (1, RingLayout { descriptors: 3, ..layout }),
        (1, RingLayout { buffer: 0, ..layout }),
    ] {
        let error = Guest::with_layout(queues, layout).unwrap_err();
        assert!(matches!(error, VhostUserError::Layout { .. }), "{error}");
    }
}
