//! Bytes that claim to be a message or a saved state.
//!
//! The first byte says what they are taken for; the others are a packet, or what follows the header
//! of one, or a state.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::{Deserialize, Serialize};
use standstill_fuzz::memory::{Counting, used_by};
use standstill_protocol::codec::{
    DecodeError, HEADER, MAGIC, MAX_PACKET, MAX_STATE, Message, decode, decode_state, encode,
    encode_state,
};
use standstill_protocol::message::{CoordinatorMessage, DeviceMessage, MAX_FDS};
use std::collections::VecDeque;
use std::error::Error;
use std::fmt::Debug;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a packet may cost to read, whatever lengths it claims.
const PACKET_COST: usize = 4 * MAX_PACKET;
/// What a state may cost to read: a length is believed up to the limit of all states.
const STATE_COST: usize = 3 * MAX_STATE;
/// No error says more than this about bytes that somebody else chose.
const LONGEST_ERROR: usize = 1024;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    let version = u16::from(kind >> 4 & 3);
    match kind & 7 {
        0 => packet::<CoordinatorMessage>(bytes, version),
        1 => packet::<DeviceMessage>(bytes, version),
        2 => packet::<CoordinatorMessage>(&with_header(bytes, version), version),
        3 => packet::<DeviceMessage>(&with_header(bytes, version), version),
        4 => packet::<CoordinatorMessage>(&with_header(bytes, 0), version),
        5 => packet::<DeviceMessage>(&with_header(bytes, 0), version),
        _ => state(bytes),
    }
});

fn with_header(payload: &[u8], version: u16) -> Vec<u8> {
    let mut packet = MAGIC.to_vec();
    packet.extend(version.to_le_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

fn packet<M: Message + PartialEq + Debug>(bytes: &[u8], version: u16) {
    let (decoded, usage) = used_by(|| decode::<M>(bytes, version));
    assert!(usage.peak <= PACKET_COST, "reading takes {} bytes of the heap", usage.peak);
    let message = match decoded {
        Ok(message) => message,
        Err(error) => return says_what_is_wrong(&error, bytes.len()),
    };
    assert!(bytes.len() <= MAX_PACKET);
    assert!(message.fd_count() <= MAX_FDS, "{message:?}");
    assert_eq!(message.validate(), Ok(()), "{message:?}");

    // One message has one form, and no other bytes mean it.
    let mut buffer = [0; MAX_PACKET];
    let (length, usage) = used_by(|| encode(&message, version, &mut buffer));
    let length = length.unwrap_or_else(|error| panic!("{message:?} cannot be sent: {error}"));
    assert_eq!(usage.peak, 0, "writing takes nothing of the heap");
    assert_eq!(&buffer[..length], bytes, "{message:?}");

    // It ends where it ends.
    assert!(decode::<M>(&bytes[..length - 1], version).is_err(), "without its last byte");
    if let Some(longer) = buffer.get(..=length) {
        let longer = decode::<M>(longer, version);
        assert!(matches!(longer, Err(DecodeError::TrailingBytes { count: 1, .. })), "{longer:?}");
    }
    // Only the handshake is understood by those who speak another version.
    let elsewhere = decode::<M>(bytes, version + 1);
    assert_eq!(elsewhere.is_ok(), message.is_handshake(), "{elsewhere:?}");
}

/// Of everything that devices have in their states.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    registers: [u32; 4],
    name: String,
    queue: VecDeque<Entry>,
    memory: Vec<u8>,
    shape: Option<Shape>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Entry(u64, i16, bool);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Shape {
    None,
    Letter(char),
    Lists { inner: Vec<Vec<u16>> },
}

fn state(bytes: &[u8]) {
    let (decoded, usage) = used_by(|| decode_state::<State>(bytes));
    let bound = STATE_COST + 8 * bytes.len();
    assert!(usage.peak <= bound, "reading takes {} bytes of the heap", usage.peak);
    match decoded {
        Ok(state) => assert_eq!(encode_state(&state).ok().as_deref(), Some(bytes), "{state:?}"),
        Err(error) => says_what_is_wrong(&error, bytes.len()),
    }
}

/// An error is short, and what it says of the bytes is so.
fn says_what_is_wrong(error: &DecodeError, there: usize) {
    let text = error.to_string();
    assert!(!text.is_empty() && text.len() <= LONGEST_ERROR, "{text}");
    match error {
        DecodeError::Empty => assert_eq!(there, 0),
        DecodeError::ShortHeader { length } => assert!(*length == there && there < HEADER),
        DecodeError::TooLong { length } => assert!(*length == there && there > MAX_PACKET),
        DecodeError::TrailingBytes { count, length } => assert_eq!(count + length, there),
        DecodeError::Payload { offset, length, source } => {
            assert!(*length == there && *offset <= there, "{text}");
            assert!(source.source().is_some(), "{text}");
        }
        _ => {}
    }
}
