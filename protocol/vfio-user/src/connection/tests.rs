use super::*;
use crate::wire::{Command, HEADER_SIZE};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::{FdFlags, fcntl_getfd};
use std::io::{Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

const LIMITS: FramingLimits = FramingLimits { max_message: 4 << 20, max_fds: 4 };

fn soon() -> Deadline {
    Deadline::within(Duration::from_secs(30))
}

fn at_once() -> Deadline {
    Deadline::within(Duration::ZERO)
}

/// A connection, and the bare socket of its peer.
fn pair() -> (Receiver, Sender, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let (receiver, sender) = connect(ours, LIMITS).expect("a socket");
    (receiver, sender, theirs)
}

fn message(id: u16, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let header = Header::command(id, Command::RegionWrite);
    header.encode_message(&mut out, 0, |out| out.extend_from_slice(body));
    out
}

/// A file that is known by its size.
fn file(name: u64) -> OwnedFd {
    let fd = memfd_create("file", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, name).expect("a size");
    fd
}

fn names(fds: &[OwnedFd]) -> Vec<i64> {
    fds.iter().map(|fd| fstat(fd).expect("a file").st_size).collect()
}

/// Sends bytes with fds as a peer may that is not this module.
fn send_raw(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent, Ok(bytes.len()));
}

#[test]
fn a_message_comes_as_it_was_sent() {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let (_, mut sender) = connect(ours, LIMITS).expect("a socket");
    let (mut receiver, _) = connect(theirs, LIMITS).expect("a socket");
    let (one, two) = (file(1), file(2));
    let header = Header::command(7, Command::DmaMap);
    let fds = [one.as_fd(), two.as_fd()];
    sender.send(&header, b" and data", &fds, soon(), |body| body.extend(b"body")).expect("sent");
    let message = receiver.receive(soon()).expect("received");
    assert_eq!((message.header.id, message.body), (7, &b"body and data"[..]));
    assert_eq!(names(&message.fds), [1, 2]);
    for fd in &message.fds {
        assert_eq!(fcntl_getfd(fd), Ok(FdFlags::CLOEXEC));
    }
}

#[test]
fn a_message_is_one_packet_of_the_kernel() {
    let (_receiver, mut sender, mut peer) = pair();
    sender.send(&Header::command(7, Command::DmaMap), b"data", &[], soon(), |_| ()).expect("sent");
    let mut bytes = [0; 100];
    assert_eq!(peer.read(&mut bytes).expect("read"), HEADER_SIZE + 4);
}

#[test]
fn messages_that_wait_are_read_at_once() {
    let (mut receiver, _sender, mut peer) = pair();
    let three: Vec<u8> = (1..=3).flat_map(|id| message(id, b"body")).collect();
    peer.write_all(&three).expect("written");
    assert_eq!(receiver.receive(soon()).expect("the first").header.id, 1);
    for id in 2..=3 {
        let message = receiver.read_ahead().expect("in step").expect("read ahead");
        assert_eq!(message.header.id, id);
    }
    assert!(receiver.read_ahead().expect("in step").is_none());
    assert!(receiver.try_receive().expect("in step").is_none());
}

/// The rule by which fds are given to messages is the kernel's: a receive ends with the segment
/// that had fds.
#[test]
fn fds_are_never_behind_what_else_was_read() {
    let (mut receiver, _sender, peer) = pair();
    send_raw(&peer, &message(1, b"plain"), &[]);
    send_raw(&peer, &message(2, b"first"), &[file(1)]);
    send_raw(&peer, &message(3, b"plain"), &[]);
    send_raw(&peer, &message(4, b"second"), &[file(2), file(3)]);
    for (id, expected) in [(1, vec![]), (2, vec![1]), (3, vec![]), (4, vec![2, 3])] {
        let message = receiver.receive(soon()).expect("received");
        assert_eq!((message.header.id, names(&message.fds)), (id, expected));
    }
}

#[test]
fn header_body_and_fds_may_come_apart() {
    let bytes = message(1, b"the body");
    for (cut, with) in [(1, 0), (7, 1), (15, 0), (16, 1), (20, 0), (23, 1)] {
        let (mut receiver, _sender, peer) = pair();
        let pieces = [&bytes[..cut], &bytes[cut..]];
        for (at, piece) in pieces.into_iter().enumerate() {
            let fds = if at == with { vec![file(9)] } else { vec![] };
            assert!(receiver.try_receive().expect("in step").is_none());
            send_raw(&peer, piece, &fds);
        }
        let message = receiver.receive(soon()).expect("whole");
        assert_eq!((message.body, names(&message.fds)), (&b"the body"[..], vec![9]));
    }
}

#[test]
fn a_long_message_is_sent_whole_and_received_whole() {
    let (mut receiver, _sender, peer) = pair();
    let (_, mut sender) = connect(peer, LIMITS).expect("a socket");
    let data: Vec<u8> = (0..4 << 18).flat_map(u32::to_ne_bytes).take(3 << 20).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            let header = Header::command(1, Command::RegionWrite);
            let fd = file(5);
            let body = |body: &mut Vec<u8>| body.extend_from_slice(&data);
            sender.send(&header, &data[..1000], &[fd.as_fd()], soon(), body).expect("sent");
        });
        let message = receiver.receive(soon()).expect("received");
        assert!(
            message.body[..data.len()] == data[..] && message.body[data.len()..] == data[..1000]
        );
        assert_eq!(names(&message.fds), [5]);
    });
}

#[test]
fn nothing_in_time_is_told_and_the_next_one_comes() {
    let (mut receiver, _sender, mut peer) = pair();
    assert!(matches!(receiver.receive(at_once()), Err(ReceiveError::Deadline)));
    let bytes = message(1, b"late");
    peer.write_all(&bytes[..5]).expect("written");
    // Longer than a receive blocks, and shorter.
    for wait in [BLOCK + Duration::from_millis(20), Duration::from_millis(20)] {
        let begin = Instant::now();
        let error = receiver.receive(begin + wait).expect_err("nothing");
        assert!(matches!(error, ReceiveError::Deadline) && error.is_in_step());
        assert!(begin.elapsed() >= wait);
    }
    peer.write_all(&bytes[5..]).expect("written");
    assert_eq!(receiver.receive(soon()).expect("late").body, b"late");
}

#[test]
fn a_socket_that_does_not_block_is_waited_for() {
    let (ours, mut peer) = UnixStream::pair().expect("a socket pair");
    ours.set_nonblocking(true).expect("set");
    let (mut receiver, _sender) = connect(ours, LIMITS).expect("a socket");
    thread::scope(|scope| {
        scope.spawn(|| peer.write_all(&message(1, b"body")).expect("written"));
        assert_eq!(receiver.receive(Deadline::never()).expect("received").header.id, 1);
    });
}

#[test]
fn a_peer_that_takes_nothing_is_told_from_one_that_takes_a_part() {
    let (_receiver, mut sender, mut peer) = pair();
    let header = Header::posted(1, Command::RegionWrite);
    let mut sent = 0;
    let error = loop {
        match sender.send(&header, &[], &[], at_once(), |_| ()) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SendError::Deadline) && error.is_in_step());
    let mut byte = [0; HEADER_SIZE];
    for _ in 0..sent {
        peer.read_exact(&mut byte).expect("whole messages");
    }
    let data = vec![0; 3 << 20];
    let error = sender.send(&header, &data, &[], at_once(), |_| ()).expect_err("too long");
    assert!(matches!(error, SendError::Partial) && !error.is_in_step());
    // Not even what would fit.
    peer.set_nonblocking(true).expect("set");
    let mut rest = Vec::new();
    let _ = peer.read_to_end(&mut rest);
    let again = sender.send(&header, &[], &[], soon(), |_| ());
    assert!(matches!(again, Err(SendError::Partial)));
}

#[test]
fn the_end_of_the_stream_is_clean_or_within_a_message() {
    let (mut receiver, mut sender, mut peer) = pair();
    peer.write_all(&message(1, b"last")).expect("written");
    drop(peer);
    assert_eq!(receiver.receive(soon()).expect("the last").header.id, 1);
    assert!(matches!(receiver.receive(soon()), Err(ReceiveError::Closed)));
    // No signal ends this process.
    let sent = sender.send(&Header::command(1, Command::Reset), &[], &[], soon(), |_| ());
    assert!(matches!(sent, Err(SendError::Closed)));

    let (mut receiver, _sender, mut peer) = pair();
    peer.write_all(&message(1, b"last")[..9]).expect("written");
    peer.shutdown(Half::Write).expect("shut down");
    let error = receiver.receive(soon()).expect_err("cut short");
    let truncated = FramingError::Truncated { received: 9 };
    assert!(matches!(&error, ReceiveError::Framing(framing) if *framing == truncated), "{error}");
    assert!(!error.is_in_step());
}

#[test]
fn more_fds_than_agreed_are_lost_and_none_stays_open() {
    let (mut receiver, _sender, peer) = pair();
    let many: Vec<_> = (0..40).map(|name| file(1000 + name)).collect();
    send_raw(&peer, &message(1, b"flood"), &many);
    drop(many);
    let error = receiver.receive(soon()).expect_err("fds lost");
    assert!(matches!(error, ReceiveError::FdsLost) && !error.is_in_step());
    drop(receiver);
    // Whoever holds one of these files would be found here.
    let open = std::fs::read_dir("/proc/self/fd").expect("proc");
    let sizes = open.flatten().filter_map(|entry| entry.path().metadata().ok());
    assert_eq!(sizes.filter(|file| (1000..1040).contains(&file.len())).count(), 0);
}

#[test]
fn whoever_waits_is_woken_by_a_shutdown() {
    let (mut receiver, sender, _peer) = pair();
    thread::scope(|scope| {
        scope.spawn(|| sender.shutdown());
        assert!(matches!(receiver.receive(Deadline::never()), Err(ReceiveError::Closed)));
    });
}

/// A peer that goes on for as long as it is listened to, one byte at a time, each when the one before
/// was taken: whoever receives never finds nothing for long. `bytes` are its first ones.
pub(crate) fn trickle(mut peer: UnixStream, other_end: &OwnedFd, bytes: &[u8], stop: &AtomicBool) {
    let rest = std::iter::repeat(&0);
    for byte in bytes.iter().chain(rest) {
        while rustix::io::ioctl_fionread(other_end) != Ok(0) && !stop.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        if stop.load(Ordering::Relaxed) || peer.write_all(&[*byte]).is_err() {
            return;
        }
    }
}

#[test]
fn a_message_that_comes_byte_by_byte_has_no_more_time_than_another() {
    let short = Duration::from_millis(200);
    let deadlines: [fn(Duration) -> Deadline; 2] =
        [Deadline::within, |time| Deadline::from(Instant::now() + time)];
    for deadline in deadlines {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let other_end = OwnedFd::from(ours.try_clone().expect("another fd"));
        let (mut receiver, _sender) = connect(ours, LIMITS).expect("a socket");
        let long = message(1, &vec![0; (4 << 20) - HEADER_SIZE]);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| trickle(theirs, &other_end, &long, &stop));
            let begin = Instant::now();
            let error = receiver.receive(deadline(short)).map(|message| message.header);
            stop.store(true, Ordering::Relaxed);
            assert!(matches!(error, Err(ReceiveError::Deadline)), "{error:?}");
            assert!(begin.elapsed() >= short);
        });
    }
}
