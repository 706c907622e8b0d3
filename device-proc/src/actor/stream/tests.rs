use super::*;
use crate::actor::scripted::{Scripted, parts};
use crate::interrupt::Latched;
use proptest::prelude::*;

fn saved() -> Vec<u8> {
    let parts = parts(&[]);
    let latched = Latched { intx: true, msix: Vec::new() };
    parts.interrupts.restore(&latched).unwrap();
    parts.config().write(4, &[6]).unwrap();
    let mut state = Vec::new();
    save(&parts, &mut state).unwrap();
    state
}

fn refusal(bytes: &[u8]) -> StreamError {
    load(&parts(&[]), bytes).unwrap_err()
}

/// With a checksum that fits what comes before it.
fn sealed(mut state: Vec<u8>) -> Vec<u8> {
    state.truncate(state.len() - 8);
    let mut sum = checksum();
    sum.write(&state);
    state.extend(sum.finish().to_le_bytes());
    state
}

#[test]
fn what_was_saved_is_taken_over_and_no_byte_more() {
    let mut stream = saved();
    stream.extend(b"the next device's");
    let mut from = stream.as_slice();
    let parts = parts(&[]);
    load(&parts, &mut from).unwrap();
    assert_eq!(from, b"the next device's");
    assert!(parts.interrupts.latched().intx);
    assert_eq!(parts.config().bytes()[4], 6);
}

#[test]
fn every_truncation_is_refused() {
    let state = saved();
    for length in 0..state.len() {
        let error = refusal(&state[..length]);
        assert!(matches!(error, StreamError::Short), "{length} bytes: {error}");
    }
}

#[test]
fn the_bytes_are_as_documented() {
    let state = saved();
    assert_eq!(&state[..12], b"STANDSTL\x01\x00\x08\x00");
    assert_eq!(&state[12..20], b"scripted");
    assert_eq!(state[20], CONFIG);
    assert_eq!(state[21..25], 256_u32.to_le_bytes());
    assert_eq!(state[state.len() - 9], TRAILER);
}

#[test]
fn other_versions_and_long_pieces_are_named() {
    let mut newer = saved();
    newer[8] = 2;
    assert_eq!(refusal(&newer).to_string(), "state stream of version 2, expected 1");
    let mut long = saved();
    long[21..25].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(refusal(&long), StreamError::Piece { section: CONFIG, length: u32::MAX }));
    let mut section = saved();
    section[20] = DEVICE;
    let error = refusal(&section);
    assert!(matches!(error, StreamError::Section { found: DEVICE, expected: CONFIG }));
}

#[test]
fn data_that_the_device_does_not_read_is_refused() {
    let mut state = saved();
    // The device's section is empty and the last one: its end, the trailer, the checksum.
    let at = state.len() - 9 - 4;
    state.splice(at..at, [1, 0, 0, 0, 7]);
    let error = refusal(&sealed(state));
    assert!(matches!(error, StreamError::TooLong { section: DEVICE, .. }), "{error}");
}

proptest! {
    #[test]
    fn no_damage_is_taken_over_and_none_panics(at in 0usize..333, flip in 1u8..=255) {
        let mut state = saved();
        let at = at % state.len();
        state[at] ^= flip;
        prop_assert!(load(&parts(&[]), state.as_slice()).is_err());
    }

    #[test]
    fn sealed_nonsense_does_not_panic(
        at in 0usize..300,
        bytes in prop::collection::vec(any::<u8>(), 1..16),
    ) {
        let mut state = saved();
        let end = (at + bytes.len()).min(state.len());
        let at = at.min(end);
        state.splice(at..end, bytes);
        let _: Result<(), _> = load::<Scripted>(&parts(&[]), sealed(state).as_slice());
    }
}
