//! Sizes, limits, and bytes that are no message.

#![forbid(unsafe_code)]

mod arbitrary;

use super::*;
use crate::dirty::LayoutError;
use crate::message::*;
use crate::migration::{MigrationFlags, MigrationState};
use uuid::Uuid;

const VERSION: u16 = 1;

fn packet<M: Message>(message: &M) -> Vec<u8> {
    let mut buffer = [0; MAX_PACKET];
    let length = encode(message, VERSION, &mut buffer).expect("within all limits");
    buffer[..length].to_vec()
}

fn command() -> CoordinatorMessage {
    CoordinatorMessage::Command(Command {
        term: Term(1),
        epoch: Epoch(2),
        phase: Phase::Stop,
        target: MigrationState::Stop,
        budget_ns: 3,
        lease_ns: 4,
    })
}

fn reached(counters: usize) -> DeviceMessage {
    let counter = Counter { kind: CounterKind::Written, index: 1, value: 2 };
    DeviceMessage::Reached(Reached {
        term: Term(1),
        epoch: Epoch(2),
        phase: Phase::Stop,
        state: MigrationState::Stop,
        timings: Timings::default(),
        evidence: Evidence { memory_hash: None, counters: vec![counter; counters] },
    })
}

fn hello() -> Hello {
    Hello {
        versions: VersionRange { min: 1, max: 2 },
        kind: "k".into(),
        program_version: "v".into(),
        capabilities: Capabilities {
            migration: MigrationFlags::ALL,
            peer_dma: PeerDma::Possible,
            progress: true,
            dirty_tracking: true,
            fault_injection: true,
        },
        machine: None,
        term: Term(0),
        epoch: Epoch(0),
        state: MigrationState::Running,
        backing_files: 0,
        memory: Vec::new(),
    }
}

fn refused(text: String) -> DeviceMessage {
    DeviceMessage::Refused(Refused {
        term: Term(1),
        epoch: Epoch(2),
        phase: Phase::Load,
        state: MigrationState::Error,
        refusal: Refusal { kind: RefusalKind::Stream, text },
    })
}

// --- sizes and limits -----------------------------------------------------------------------

#[test]
fn a_command_stays_small() {
    assert_eq!(packet(&command()).len(), 52);
}

#[test]
fn the_longest_messages_fit_in_a_packet() {
    assert!(packet(&reached(MAX_COUNTERS)).len() <= MAX_PACKET);
    assert!(packet(&refused("x".repeat(MAX_TEXT))).len() <= MAX_PACKET);
}

#[test]
fn what_breaks_a_limit_is_not_sent() {
    fn error<M: Message>(message: &M) -> LimitError {
        match encode(message, VERSION, &mut [0; MAX_PACKET]) {
            Err(EncodeError::Limit { source, .. }) => source,
            other => panic!("expected a limit, got {other:?}"),
        }
    }
    assert_eq!(error(&reached(MAX_COUNTERS + 1)), LimitError::Counters { count: 65 });
    // Far beyond the packet too: a limit, not a panic.
    assert_eq!(error(&reached(100_000)), LimitError::Counters { count: 100_000 });
    let limit = LimitError::Text { field: "text", length: 513, limit: MAX_TEXT };
    assert_eq!(error(&refused("x".repeat(513))), limit);
    let limit = LimitError::Text { field: "kind", length: 65, limit: MAX_NAME };
    assert_eq!(error(&DeviceMessage::Hello(Hello { kind: "k".repeat(65), ..hello() })), limit);
    let limit = LimitError::Fds { field: "backing_files", count: 17, min: 0, max: 16 };
    assert_eq!(error(&DeviceMessage::Hello(Hello { backing_files: 17, ..hello() })), limit);
    let memory = |ram_fds, dirty_page_size| {
        let (term, sequence) = (Term(1), 1);
        CoordinatorMessage::Memory(MemoryDeclaration { term, sequence, ram_fds, dirty_page_size })
    };
    for (page_size, max) in [(0, 16), (4096, 8)] {
        for count in [0, u8::try_from(max + 1).unwrap(), 255] {
            let limit = LimitError::Fds { field: "ram_fds", count, min: 1, max };
            assert_eq!(error(&memory(count, page_size)), limit);
        }
    }
    for page_size in [1, 2048, 4097, 1 << 31] {
        let limit = LimitError::PageSize(LayoutError::PageSize(page_size));
        assert_eq!(error(&memory(1, page_size)), limit);
    }
    for (min, max) in [(2, 1), (0, 1), (0, 0)] {
        let versions = VersionRange { min, max };
        let reject = Reject { versions, reason: String::new() };
        assert_eq!(error(&CoordinatorMessage::Reject(reject)), LimitError::Versions(versions));
    }
    let CoordinatorMessage::Command(stop) = command() else { unreachable!() };
    let lease = Command { phase: Phase::Start, ..stop };
    let limit = LimitError::Lease { phase: Phase::Start, lease_ns: 4 };
    assert_eq!(error(&CoordinatorMessage::Command(lease)), limit);
}

#[test]
fn what_breaks_a_limit_is_not_accepted() {
    // A refusal's text begins after header, tag, term, epoch, phase, state, kind.
    let mut bytes = packet(&refused("x".repeat(MAX_TEXT)));
    let length_at = HEADER + 4 + 8 + 8 + 4 + 4 + 4;
    bytes[length_at..length_at + 8].copy_from_slice(&513_u64.to_le_bytes());
    bytes.push(b'x');
    let error = decode::<DeviceMessage>(&bytes, VERSION).unwrap_err();
    assert!(matches!(
        error,
        DecodeError::Limit { message: "Refused", source: LimitError::Text { length: 513, .. } }
    ));

    let mut bytes = packet(&reached(MAX_COUNTERS));
    let length_at = bytes.len() - MAX_COUNTERS * 16 - 8;
    bytes[length_at..length_at + 8].copy_from_slice(&65_u64.to_le_bytes());
    bytes.extend([0; 16]);
    let error = decode::<DeviceMessage>(&bytes, VERSION).unwrap_err();
    let DecodeError::Payload { source, .. } = error else { panic!("{error:?}") };
    assert_eq!(source.to_string(), "65 counters, at most 64 are allowed");

    let mut bytes = packet(&DeviceMessage::Hello(hello()));
    // The count is followed by the length of an empty list.
    let count_at = bytes.len() - 9;
    bytes[count_at] = 200;
    let error = decode::<DeviceMessage>(&bytes, VERSION).unwrap_err();
    assert!(matches!(error, DecodeError::Limit { source: LimitError::Fds { count: 200, .. }, .. }));
}

#[test]
fn illegal_migration_flags_are_refused_with_their_value() {
    let good = packet(&DeviceMessage::Hello(hello()));
    // After header, tag, two versions, and two texts of one byte.
    let flags_at = HEADER + 4 + 2 + 2 + 9 + 9;
    assert_eq!(good[flags_at], 7, "the flags are not where this test believes them");
    for flags in [4_u64, 6, 8, 9, 15, 1 << 32 | 1, u64::MAX] {
        let mut bytes = good.clone();
        bytes[flags_at..flags_at + 8].copy_from_slice(&flags.to_le_bytes());
        let error = decode::<DeviceMessage>(&bytes, VERSION).unwrap_err();
        let DecodeError::Payload { offset, source, .. } = error else { panic!("{error:?}") };
        assert_eq!(offset, flags_at + 8);
        assert!(source.to_string().contains(&format!("{flags:#x}")), "{source}");
    }
}

// --- the header -----------------------------------------------------------------------------

#[test]
fn each_field_of_the_header_is_checked() {
    let good = packet(&command());
    let refuse = |bytes: &[u8]| decode::<CoordinatorMessage>(bytes, VERSION).unwrap_err();

    assert!(matches!(refuse(&[]), DecodeError::Empty));
    for length in 1..HEADER {
        let error = refuse(&good[..length]);
        assert!(matches!(error, DecodeError::ShortHeader { length: l } if l == length));
    }
    let long = vec![0; MAX_PACKET + 1];
    assert!(matches!(refuse(&long), DecodeError::TooLong { length: 4097 }));

    let mut bytes = good.clone();
    bytes[3] = b'!';
    assert!(matches!(refuse(&bytes), DecodeError::Magic { found } if &found == b"STS!"));

    let mut bytes = good.clone();
    bytes[4] = 2;
    assert!(matches!(refuse(&bytes), DecodeError::Version { expected: 1, found: 2 }));

    let mut bytes = good;
    bytes[7] = 1;
    assert!(matches!(refuse(&bytes), DecodeError::Reserved { found: 0x100 }));
}

#[test]
fn only_the_handshake_passes_before_a_version_is_agreed_on() {
    let mut buffer = [0; MAX_PACKET];
    let error = encode(&command(), 0, &mut buffer).unwrap_err();
    assert!(matches!(error, EncodeError::NoVersion { message: "Command" }));
    let error = decode::<CoordinatorMessage>(&packet(&command()), 0).unwrap_err();
    assert!(matches!(error, DecodeError::Version { expected: 0, found: 1 }));

    // A Hello is the same packet in both modes.
    let hello = DeviceMessage::Hello(hello());
    let length = encode(&hello, 0, &mut buffer).unwrap();
    assert_eq!(buffer[..length], packet(&hello));
    assert_eq!(decode::<DeviceMessage>(&buffer[..length], 0).unwrap(), hello);
    assert_eq!(decode::<DeviceMessage>(&buffer[..length], VERSION).unwrap(), hello);
}

#[test]
fn the_headers_version_must_fit_the_message() {
    let mut bytes = packet(&command());
    bytes[4] = 0;
    for version in [0, VERSION] {
        let error = decode::<CoordinatorMessage>(&bytes, version).unwrap_err();
        let DecodeError::HandshakeVersion { message: "Command", found: 0 } = error else {
            panic!("{error:?}")
        };
    }
    let mut bytes = packet(&DeviceMessage::Hello(hello()));
    bytes[4] = 1;
    let error = decode::<DeviceMessage>(&bytes, VERSION).unwrap_err();
    assert!(matches!(error, DecodeError::HandshakeVersion { message: "Hello", found: 1 }));
}

// --- the payload ----------------------------------------------------------------------------

#[test]
fn bytes_after_the_message_are_refused_and_counted() {
    let mut bytes = packet(&command());
    bytes.extend([0; 3]);
    let error = decode::<CoordinatorMessage>(&bytes, VERSION).unwrap_err();
    assert!(matches!(error, DecodeError::TrailingBytes { count: 3, length: 52 }));
}

#[test]
fn a_truncated_message_tells_where_it_ends() {
    let bytes = packet(&command());
    // In the middle of the phase.
    let cut = HEADER + 4 + 8 + 8 + 2;
    let error = decode::<CoordinatorMessage>(&bytes[..cut], VERSION).unwrap_err();
    let DecodeError::Payload { offset, length, source } = error else { panic!("{error:?}") };
    assert_eq!((offset, length), (HEADER + 4 + 8 + 8, cut));
    assert_eq!(source.to_string(), "the bytes end at least 2 too early");
}

#[test]
fn unknown_tags_are_refused() {
    // The message's own tag, and a command's phase and target.
    let own = if cfg!(feature = "fault-injection") { 10_u32 } else { 9 };
    for (at, unknown) in [(HEADER, own), (HEADER + 20, 7), (HEADER + 24, 8)] {
        for tag in [unknown, 0x100, u32::MAX] {
            let mut bytes = packet(&command());
            bytes[at..at + 4].copy_from_slice(&tag.to_le_bytes());
            let error = decode::<CoordinatorMessage>(&bytes, VERSION).unwrap_err();
            assert!(
                matches!(error, DecodeError::Payload { offset, .. } if offset == at + 4),
                "tag {tag:#x} at {at}: {error:?}"
            );
        }
    }
}

#[test]
fn a_bool_and_an_option_are_0_or_1() {
    let good = packet(&DeviceMessage::Hello(hello()));
    let bool_at = HEADER + 4 + 2 + 2 + 9 + 9 + 8 + 4;
    let fields = "progress, dirty_tracking, fault_injection and the absent machine";
    assert_eq!(good[bool_at..bool_at + 4], [1, 1, 1, 0], "{fields}");
    for at in bool_at..bool_at + 4 {
        for found in [2, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = found;
            let error = decode::<DeviceMessage>(&bytes, VERSION).unwrap_err();
            assert!(
                matches!(error, DecodeError::Payload { offset, .. } if offset == at + 1),
                "{found} at {at}: {error:?}"
            );
        }
    }
}

#[test]
fn text_must_be_utf8() {
    let mut bytes = packet(&refused("x".into()));
    *bytes.last_mut().unwrap() = 0xff;
    let error = decode::<DeviceMessage>(&bytes, VERSION).unwrap_err();
    let DecodeError::Payload { source, .. } = error else { panic!("{error:?}") };
    assert!(source.to_string().contains("not UTF-8"), "{source}");
}

#[test]
fn a_machine_identity_has_16_bytes() {
    let with_machine = Hello { machine: Some(Uuid::from_u128(1)), ..hello() };
    let good = packet(&DeviceMessage::Hello(with_machine));
    let length_at = HEADER + 4 + 2 + 2 + 9 + 9 + 8 + 4 + 1 + 1 + 1 + 1;
    assert_eq!(good[length_at], 16);
    for length in [0_u64, 15, 17, u64::MAX] {
        let mut bytes = good.clone();
        bytes[length_at..length_at + 8].copy_from_slice(&length.to_le_bytes());
        assert!(decode::<DeviceMessage>(&bytes, VERSION).is_err(), "length {length}");
    }
}

// --- device state ---------------------------------------------------------------------------

#[test]
fn device_state_round_trips_and_must_be_whole() {
    let state = (7_u32, vec![1_u8, 2, 3], Some("queue".to_owned()));
    let bytes = encode_state(&state).unwrap();
    assert_eq!(decode_state::<(u32, Vec<u8>, Option<String>)>(&bytes).unwrap(), state);
    for length in 0..bytes.len() {
        let short = decode_state::<(u32, Vec<u8>, Option<String>)>(&bytes[..length]);
        assert!(matches!(short, Err(DecodeError::Payload { .. })), "{length}: {short:?}");
    }
    let mut long = bytes;
    long.push(0);
    let error = decode_state::<(u32, Vec<u8>, Option<String>)>(&long).unwrap_err();
    assert!(matches!(error, DecodeError::TrailingBytes { count: 1, .. }));
}

#[test]
fn device_state_beyond_its_limit_is_refused() {
    let error = encode_state(&"x".repeat(MAX_STATE)).unwrap_err();
    assert!(matches!(error, EncodeError::TooLong { limit: MAX_STATE, .. }));
    let error = decode_state::<String>(&u64::MAX.to_le_bytes()).unwrap_err();
    assert!(matches!(error, DecodeError::Payload { .. }));
}
