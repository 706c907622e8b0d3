//! What a vfio-user server reads: a stream of bytes and fds from a hostile client.
//!
//! The first four bytes say whether the others are the stream itself or bodies to which headers are
//! made, in which pieces it comes, and with which of them fds do.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_fuzz::memory::{Counting, used_by};
use standstill_fuzz::vfio_user::{Next, encode_request, null, stream_of};
use standstill_vfio_user::framing::{Framer, FramingError, FramingLimits};
use standstill_vfio_user::wire::{Header, Limits, Request};
use std::os::fd::AsRawFd;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LIMITS: Limits = Limits { max_data_xfer_size: 4096 };
const FDS: usize = 3;
/// What reading a stream may cost: the buffer of a framer, and each message once more.
const HEAP: usize = 512 << 10;
/// An input may be so long; a message is bounded by this and by the limits.
const MOST: usize = 32 << 10;

fuzz_target!(|input: &[u8]| {
    let Some((&[kind, piece, other_piece, fds], bytes)) = input.split_first_chunk::<4>() else {
        return;
    };
    let bytes = bytes.get(..MOST).unwrap_or(bytes);
    let stream = if kind & 1 == 0 { bytes.to_vec() } else { stream_of(bytes) };
    let lowest = null().as_raw_fd();
    let (_, usage) = used_by(|| {
        let some = take_apart(&stream, piece, fds);
        // Fds come with a piece, so they are compared only where the pieces are the same.
        let others = take_apart(&stream, other_piece, 0);
        assert_eq!(some.len(), others.len());
        for (one, other) in some.iter().zip(&others) {
            match (one, other) {
                (Taken::Message(header, body, _), Taken::Message(same, equal, 0)) => {
                    assert_eq!((header, body), (same, equal));
                }
                (
                    Taken::Wrong(FramingError::TooManyFds { header, .. }),
                    Taken::Message(same, _, 0) | Taken::Wrong(FramingError::Type { header: same }),
                ) => assert_eq!(header, same),
                (one, other) => assert_eq!(one, other),
            }
        }
        some.iter().for_each(judge);
    });
    assert!(usage.peak <= HEAP + 8 * stream.len(), "{} bytes of the heap", usage.peak);
    assert_eq!(usage.left, 0, "bytes of the heap are left");
    assert_eq!(null().as_raw_fd(), lowest, "an fd is left");
});

/// What came out of a stream.
#[derive(Debug, PartialEq)]
enum Taken {
    Message(Header, Vec<u8>, usize),
    Wrong(FramingError),
}

/// Reads a stream in pieces of this length, some of which have fds.
fn take_apart(stream: &[u8], piece: u8, fds: u8) -> Vec<Taken> {
    let limits = FramingLimits { max_message: LIMITS.max_message(), max_fds: FDS };
    let mut framer = Framer::new(limits);
    let mut taken = Vec::new();
    let mut next = Next(fds);
    for mut piece in stream.chunks(usize::from(piece) * 16 + 1) {
        let mut with: Vec<_> = (0..next.count()).map(|_| null()).collect();
        while !piece.is_empty() {
            let space = framer.space();
            let count = space.len().min(piece.len());
            space[..count].copy_from_slice(&piece[..count]);
            piece = &piece[count..];
            framer.received(count, with.drain(..));
        }
        loop {
            let ready = framer.is_ready();
            match framer.next_message() {
                Ok(Some(message)) => {
                    assert!(ready && message.fds.len() <= FDS);
                    assert_eq!(message.header.body_size(), Some(message.body.len()));
                    assert_eq!(message.header.kind(), Some(message.kind));
                    let fds = message.fds.len();
                    taken.push(Taken::Message(message.header, message.body.to_vec(), fds));
                }
                Ok(None) => {
                    assert!(!ready);
                    break;
                }
                Err(error) => {
                    assert!(ready && error.to_string().len() < 200);
                    let goes_on = error.is_in_step();
                    taken.push(Taken::Wrong(error));
                    if !goes_on {
                        return taken;
                    }
                }
            }
        }
    }
    taken
}

/// A request that is accepted is within its limits, and is the same when it is sent again.
fn judge(taken: &Taken) {
    let Taken::Message(header, body, fds) = taken else { return };
    let request = match Request::decode(header.command, body, *fds, LIMITS) {
        Ok(request) => request,
        Err(error) => {
            assert!((1..4096).contains(&error.errno().number()));
            let text = error.to_string();
            assert!(!text.is_empty() && text.len() < 400, "{text}");
            return;
        }
    };
    let mut again = Vec::new();
    encode_request(&request, &mut again);
    let decoded = Request::decode(header.command, &again, *fds, LIMITS);
    assert_eq!(decoded.as_ref(), Ok(&request));
    assert!(again.len() <= body.len().max(300) + 200, "{request:?}");
}
