use super::*;
use crate::wire::Command;
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};

const LIMITS: FramingLimits = FramingLimits { max_message: 300_000, max_fds: 3 };

/// An fd that is known by the size of its file.
fn fd(name: u64) -> OwnedFd {
    let fd = memfd_create("fd", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, name).expect("a size");
    fd
}

fn names(fds: &[OwnedFd]) -> Vec<i64> {
    fds.iter().map(|fd| fstat(fd).expect("a file").st_size).collect()
}

fn message(id: u16, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let header = Header::command(id, Command::RegionWrite);
    header.encode_message(&mut out, 0, |out| out.extend_from_slice(body));
    out
}

/// Hands over all of `bytes`, as if they were read in pieces that fit.
fn feed(framer: &mut Framer, mut bytes: &[u8], fds: Vec<OwnedFd>) {
    let mut fds = Some(fds);
    while !bytes.is_empty() {
        let space = framer.space();
        let count = space.len().min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        bytes = &bytes[count..];
        let with = if bytes.is_empty() { fds.take() } else { None };
        framer.received(count, with.unwrap_or_default());
    }
}

type Taken = (u16, Vec<u8>, Vec<i64>);

/// All that can be taken out, up to an error.
fn take(framer: &mut Framer) -> Result<Vec<Taken>, FramingError> {
    let mut taken = Vec::new();
    while framer.is_ready() {
        let message = framer.next_message()?.expect("ready");
        taken.push((message.header.id, message.body.to_vec(), names(&message.fds)));
    }
    assert!(framer.next_message()?.is_none(), "not ready");
    Ok(taken)
}

/// Where a message's fds come: with the piece of it that has this share of its bytes before its end.
type Sent = (Vec<u8>, Option<(u64, prop::sample::Index)>);

fn sent() -> impl Strategy<Value = Sent> {
    let size = prop_oneof![8 => 0..40_usize, 1 => 60_000..70_000_usize, 1 => Just(200_000)];
    let body = (size, any::<u8>()).prop_map(|(size, fill)| vec![fill; size]);
    (body, prop::option::of((1..1000_u64, any::<prop::sample::Index>())))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// However a stream is cut, the same messages come out, each with its fd.
    #[test]
    fn cuts_make_no_difference(
        sent in vec(sent(), 1..12),
        cuts in vec(any::<prop::sample::Index>(), 0..40),
        greedy in any::<bool>(),
    ) {
        let mut stream = Vec::new();
        let mut segment_ends = Vec::new();
        let mut expected: Vec<Taken> = Vec::new();
        for (id, (body, fd)) in (0..).zip(&sent) {
            let begin = stream.len();
            stream.extend(message(id, body));
            if let Some((name, place)) = fd {
                let end = begin + 1 + place.index(stream.len() - begin);
                segment_ends.push((end, Some(*name)));
            }
            let names = fd.iter().map(|(name, _)| i64::try_from(*name).expect("small"));
            expected.push((id, body.clone(), names.collect()));
        }
        // The kernel ends a read where a segment with fds ends; other reads end anywhere.
        segment_ends.extend(cuts.iter().map(|cut| (1 + cut.index(stream.len()), None)));
        segment_ends.push((stream.len(), None));
        segment_ends.sort_by_key(|(end, name)| (*end, name.is_none()));

        let mut framer = Framer::new(LIMITS);
        let mut taken = Vec::new();
        let mut at = 0;
        for (end, name) in segment_ends {
            if end > at {
                feed(&mut framer, &stream[at..end], name.map(fd).into_iter().collect());
                at = end;
            } else if name.is_some() {
                // Two messages cannot end a segment in the same place.
                unreachable!("fds without bytes");
            }
            // Whoever takes at once and whoever lets them gather gets the same.
            if greedy {
                taken.extend(take(&mut framer).expect("in step"));
            }
        }
        taken.extend(take(&mut framer).expect("in step"));
        prop_assert_eq!(taken, expected);
        prop_assert_eq!(framer.finish(), Ok(()));
    }

    /// Whatever bytes come, there is an end, and the buffer is bounded.
    #[test]
    fn any_bytes_are_taken_or_refused(
        bytes in vec(any::<u8>(), 0..4000),
        cut in 1..500_usize,
    ) {
        let limits = FramingLimits { max_message: 1000, max_fds: 1 };
        let mut framer = Framer::new(limits);
        for piece in bytes.chunks(cut) {
            feed(&mut framer, piece, Vec::new());
            loop {
                match framer.next_message() {
                    Ok(Some(message)) => prop_assert!(message.body.len() <= 1000 - HEADER_SIZE),
                    Ok(None) => break,
                    Err(error) if error.is_in_step() => {}
                    Err(error) => {
                        let again = framer.next_message().expect_err("out of step for good");
                        prop_assert_eq!(error, again);
                        return Ok(());
                    }
                }
            }
        }
    }
}

#[test]
fn a_size_that_cannot_be_is_the_end_of_the_stream() {
    for size in [0, 1, 15, LIMITS.max_message + 1, u32::MAX] {
        let header = Header { size, ..Header::command(9, Command::GetInfo) };
        let mut bytes = message(1, b"before");
        header.encode(&mut bytes);
        bytes.extend(message(2, b"after"));
        let mut framer = Framer::new(LIMITS);
        feed(&mut framer, &bytes, Vec::new());
        assert_eq!(framer.next_message().expect("the first").expect("whole").header.id, 1);
        for _ in 0..2 {
            let error = framer.next_message().expect_err("impossible");
            assert_eq!(error, FramingError::Size { header, limit: LIMITS.max_message });
            assert!(!error.is_in_step());
            assert_eq!(error.answer(), Some(header.refusal(Errno::EINVAL)));
        }
    }
}

#[test]
fn the_longest_message_is_taken_and_one_byte_more_is_not() {
    let longest = usize::try_from(LIMITS.max_message).expect("fits") - HEADER_SIZE;
    let mut framer = Framer::new(LIMITS);
    feed(&mut framer, &message(1, &vec![7; longest]), Vec::new());
    assert_eq!(take(&mut framer).expect("whole"), [(1, vec![7; longest], vec![])]);
    feed(&mut framer, &message(2, &vec![7; longest + 1]), Vec::new());
    assert!(matches!(framer.next_message(), Err(FramingError::Size { .. })));
}

#[test]
fn memory_grows_only_as_bytes_come() {
    let limits = FramingLimits { max_message: 64 << 20, max_fds: 1 };
    let mut framer = Framer::new(limits);
    let header = Header { size: limits.max_message, ..Header::command(1, Command::DmaMap) };
    let mut bytes = Vec::new();
    header.encode(&mut bytes);
    feed(&mut framer, &bytes, Vec::new());
    for _ in 0..3 {
        assert!(!framer.space().is_empty());
    }
    assert!(framer.buffer.len() <= 3 * ROOM, "{} bytes for a header", framer.buffer.len());
}

#[test]
fn a_type_that_does_not_exist_is_refused_and_the_next_message_follows() {
    for flags in [2, 3, 15] {
        let header = Header { size: 20, flags, ..Header::command(9, Command::GetInfo) };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        bytes.extend([0; 4]);
        bytes.extend(message(2, b"after"));
        let mut framer = Framer::new(LIMITS);
        feed(&mut framer, &bytes, Vec::new());
        let error = framer.next_message().expect_err("no type");
        assert_eq!(error, FramingError::Type { header });
        assert!(error.is_in_step());
        assert_eq!(take(&mut framer).expect("in step"), [(2, b"after".to_vec(), vec![])]);
    }
}

#[test]
fn fds_above_what_was_agreed_are_refused_and_the_next_message_has_its_own() {
    let mut framer = Framer::new(LIMITS);
    feed(&mut framer, &message(1, b"many")[..7], (1..=3).map(fd).collect());
    feed(&mut framer, &message(1, b"many")[7..], (4..=5).map(fd).collect());
    feed(&mut framer, &message(2, b"some"), (6..=8).map(fd).collect());
    let error = framer.next_message().expect_err("too many");
    assert!(matches!(error, FramingError::TooManyFds { count: 5, limit: 3, .. }), "{error}");
    assert!(error.is_in_step());
    assert_eq!(take(&mut framer).expect("in step"), [(2, b"some".to_vec(), vec![6, 7, 8])]);
}

#[test]
fn fds_that_come_without_end_are_not_kept() {
    let mut framer = Framer::new(LIMITS);
    let bytes = message(1, &[0; 100]);
    for byte in &bytes[..100] {
        feed(&mut framer, &[*byte], vec![fd(1), fd(2)]);
    }
    assert_eq!(framer.fds.len(), LIMITS.max_fds);
    assert_eq!(framer.surplus.len(), 1);
}

#[test]
fn what_waits_for_no_reply_gets_none() {
    for header in [
        Header { size: 3, ..Header::posted(1, Command::RegionWrite) },
        Header { size: 3, ..Header::command(1, Command::RegionWrite).reply() },
    ] {
        assert_eq!(FramingError::Size { header, limit: 100 }.answer(), None);
    }
    assert_eq!(FramingError::Truncated { received: 1 }.answer(), None);
}

#[test]
fn a_stream_that_ends_within_a_message_was_cut_short() {
    let bytes = message(1, b"body");
    for cut in 1..bytes.len() {
        let mut framer = Framer::new(LIMITS);
        feed(&mut framer, &bytes[..cut], Vec::new());
        assert!(framer.next_message().expect("in step").is_none());
        assert_eq!(framer.finish(), Err(FramingError::Truncated { received: cut }));
    }
}
