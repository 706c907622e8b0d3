//! Messages to bytes and back, within limits.
//!
//! A packet is at most [`MAX_PACKET`] bytes: a header of [`HEADER`] bytes, then the message.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | [`MAGIC`], the bytes `STST` |
//! | 4 | 2 | protocol version, little endian; 0 for `Hello`, `Welcome` and `Reject` |
//! | 6 | 2 | reserved, 0 |
//! | 8 | … | the message |
//!
//! The three messages of the handshake never change their layout, so they can be read before a
//! version was agreed on; every other message carries the version that was.
//!
//! This is the only module that knows which serializer makes the bytes (bincode: little endian,
//! integers of fixed width). `docs/protocol.md` describes them to the byte, with vectors that a
//! test compares, so that another implementation can take its place. Saved device state goes
//! through here too: [`encode_state`] and [`decode_state`].
//!
//! Bytes from another process never panic and never allocate more than a few times the packet.

#![forbid(unsafe_code)]

mod limits;
#[cfg(test)]
mod tests;

#[cfg(feature = "fault-injection")]
pub(crate) use limits::faults;
pub use limits::{LimitError, Message};
pub(crate) use limits::{counters, files};

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::de::read::Reader;
use bincode::serde::OwnedSerdeDecoder;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt;
use thiserror::Error;

/// The longest packet in bytes, header included.
pub const MAX_PACKET: usize = 4096;
/// The length of the header in bytes.
pub const HEADER: usize = 8;
/// The first four bytes of every packet.
pub const MAGIC: [u8; 4] = *b"STST";
/// The version in the header of a handshake message.
pub const HANDSHAKE_VERSION: u16 = 0;
/// The longest state that [`encode_state`] makes and [`decode_state`] reads, in bytes.
///
/// Meant for registers, queues and the like. Device memory is written beside it, raw.
pub const MAX_STATE: usize = 16 << 20;

/// The wire's encoding with a limit on what may be read.
type Encoding<const LIMIT: usize> = Configuration<LittleEndian, Fixint, Limit<LIMIT>>;

const fn encoding<const LIMIT: usize>() -> Encoding<LIMIT> {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<LIMIT>()
}

/// Why a message cannot be sent.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// It breaks a limit that the receiver would refuse it for.
    #[error("{message} cannot be sent: {source}")]
    Limit {
        /// The message's name.
        message: &'static str,
        /// Which limit.
        source: LimitError,
    },
    /// It is not one of the handshake, and no version was agreed on yet.
    #[error("{message} cannot be sent before a protocol version is agreed on")]
    NoVersion {
        /// The message's name.
        message: &'static str,
    },
    /// It does not fit in the room for it.
    #[error("{what} is longer than {limit} bytes")]
    TooLong {
        /// The message's name, or the state.
        what: &'static str,
        /// The room.
        limit: usize,
    },
    /// The serializer refused it.
    #[error("{what} cannot be encoded: {source}")]
    Payload {
        /// The message's name, or the state.
        what: &'static str,
        /// Why.
        source: PayloadError,
    },
}

/// Why bytes are not a message.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// There are none.
    #[error("empty packet")]
    Empty,
    /// There are fewer than a header has.
    #[error("packet of {length} bytes is shorter than its header of {HEADER}")]
    ShortHeader {
        /// How many there are.
        length: usize,
    },
    /// There are more than [`MAX_PACKET`].
    #[error("packet of {length} bytes is longer than {MAX_PACKET}")]
    TooLong {
        /// How many there are.
        length: usize,
    },
    /// They do not begin with [`MAGIC`].
    #[error("packet begins with {found:02x?} instead of {MAGIC:02x?}")]
    Magic {
        /// What they begin with.
        found: [u8; 4],
    },
    /// The header has a version that was not agreed on.
    #[error("packet of protocol version {found}, expected {expected} (or 0 for the handshake)")]
    Version {
        /// The version that was agreed on; 0 if none was.
        expected: u16,
        /// The header's version.
        found: u16,
    },
    /// The header's version does not fit the message: 0 belongs to the handshake and only to it.
    #[error("{message} with protocol version {found} in its header")]
    HandshakeVersion {
        /// The message's name.
        message: &'static str,
        /// The header's version.
        found: u16,
    },
    /// The header's last field is not 0.
    #[error("reserved field of the packet's header is {found:#06x} instead of 0")]
    Reserved {
        /// What it is.
        found: u16,
    },
    /// What follows the header is not a message.
    #[error("undecodable at byte {offset} of {length}: {source}")]
    Payload {
        /// Where reading ended, from the packet's (or the state's) beginning.
        offset: usize,
        /// The packet's (or the state's) length.
        length: usize,
        /// What was wrong there.
        source: PayloadError,
    },
    /// There are bytes after the message.
    #[error("{count} bytes left over after {length} that were understood")]
    TrailingBytes {
        /// How many are left over.
        count: usize,
        /// How many were understood, header included.
        length: usize,
    },
    /// The message breaks a limit.
    #[error("{message} breaks a limit: {source}")]
    Limit {
        /// The message's name.
        message: &'static str,
        /// Which limit.
        source: LimitError,
    },
}

/// What the serializer says about a value or about bytes.
#[derive(Debug)]
pub struct PayloadError(Cause);

#[derive(Debug)]
enum Cause {
    Encode(bincode::error::EncodeError),
    Decode(bincode::error::DecodeError),
}

impl fmt::Display for PayloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use bincode::error::DecodeError as D;
        match &self.0 {
            Cause::Encode(error) => write!(f, "{error}"),
            Cause::Decode(error) => match error {
                D::UnexpectedEnd { additional } => {
                    write!(f, "the bytes end at least {additional} too early")
                }
                D::LimitExceeded => f.write_str("a length beyond the limit"),
                D::InvalidBooleanValue(found) => write!(f, "{found} where 0 or 1 is due"),
                D::UnexpectedVariant { type_name, found, .. } => {
                    write!(f, "{type_name} has no variant {found}")
                }
                D::Utf8 { inner } => write!(f, "text is not UTF-8: {inner}"),
                D::OtherString(text) => f.write_str(text),
                D::Other(text) => f.write_str(text),
                other => write!(f, "{other}"),
            },
        }
    }
}

impl std::error::Error for PayloadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0 {
            Cause::Encode(error) => Some(error),
            Cause::Decode(error) => Some(error),
        }
    }
}

/// Writes a message as a packet into `buffer` and gives its length.
///
/// `version` is the one that was agreed on, 0 before that; a handshake message is sent with 0 in
/// its header in any case. Nothing is allocated.
///
/// # Errors
///
/// [`EncodeError`] if the message breaks a limit, is not of the handshake while `version` is 0, or
/// is longer than the buffer. The buffer's contents are unspecified then.
pub fn encode<M: Message>(
    message: &M,
    version: u16,
    buffer: &mut [u8; MAX_PACKET],
) -> Result<usize, EncodeError> {
    let name = message.name();
    message.validate().map_err(|source| EncodeError::Limit { message: name, source })?;
    let header_version = match (message.is_handshake(), version) {
        (true, _) => HANDSHAKE_VERSION,
        (false, HANDSHAKE_VERSION) => return Err(EncodeError::NoVersion { message: name }),
        (false, agreed) => agreed,
    };
    let (header, payload) = buffer.split_at_mut(HEADER);
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&header_version.to_le_bytes());
    header[6..].copy_from_slice(&[0, 0]);
    let room = payload.len();
    let length = bincode::serde::encode_into_slice(message, payload, encoding::<MAX_PACKET>())
        .map_err(|error| match error {
            bincode::error::EncodeError::UnexpectedEnd => {
                EncodeError::TooLong { what: name, limit: room }
            }
            other => {
                EncodeError::Payload { what: name, source: PayloadError(Cause::Encode(other)) }
            }
        })?;
    Ok(HEADER + length)
}

/// Reads the message that a packet holds.
///
/// `version` is the one that was agreed on, 0 before that; then only messages of the handshake are
/// accepted. Memory is allocated for the message's texts and lists only.
///
/// # Errors
///
/// [`DecodeError`] for whatever is not exactly one message within all limits.
pub fn decode<M: Message>(packet: &[u8], version: u16) -> Result<M, DecodeError> {
    let length = packet.len();
    if length == 0 {
        return Err(DecodeError::Empty);
    }
    if length > MAX_PACKET {
        return Err(DecodeError::TooLong { length });
    }
    let Some((&[m0, m1, m2, m3, v0, v1, r0, r1], payload)) = packet.split_first_chunk::<HEADER>()
    else {
        return Err(DecodeError::ShortHeader { length });
    };
    let magic = [m0, m1, m2, m3];
    if magic != MAGIC {
        return Err(DecodeError::Magic { found: magic });
    }
    let found = u16::from_le_bytes([v0, v1]);
    if found != version && found != HANDSHAKE_VERSION {
        return Err(DecodeError::Version { expected: version, found });
    }
    let reserved = u16::from_le_bytes([r0, r1]);
    if reserved != 0 {
        return Err(DecodeError::Reserved { found: reserved });
    }
    let message: M = read_all::<M, MAX_PACKET>(payload, HEADER)?;
    let name = message.name();
    if message.is_handshake() != (found == HANDSHAKE_VERSION) {
        return Err(DecodeError::HandshakeVersion { message: name, found });
    }
    message.validate().map_err(|source| DecodeError::Limit { message: name, source })?;
    Ok(message)
}

/// A device's state as bytes, in the wire's encoding, without a header: the caller's container
/// says what device and version it is of.
///
/// # Errors
///
/// [`EncodeError`] if the value cannot be encoded or takes more than [`MAX_STATE`] bytes.
pub fn encode_state<T: Serialize>(state: &T) -> Result<Vec<u8>, EncodeError> {
    const WHAT: &str = "device state";
    let bytes = bincode::serde::encode_to_vec(state, encoding::<MAX_STATE>()).map_err(|error| {
        EncodeError::Payload { what: WHAT, source: PayloadError(Cause::Encode(error)) }
    })?;
    if bytes.len() > MAX_STATE {
        return Err(EncodeError::TooLong { what: WHAT, limit: MAX_STATE });
    }
    Ok(bytes)
}

/// Reads what [`encode_state`] made; every byte must be used.
///
/// # Errors
///
/// [`DecodeError`] for whatever is not exactly one `T` of at most [`MAX_STATE`] bytes.
pub fn decode_state<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    read_all::<T, MAX_STATE>(bytes, 0)
}

/// Reads one value that takes all of `bytes`, which begin `start` bytes into the packet.
fn read_all<T: DeserializeOwned, const LIMIT: usize>(
    bytes: &[u8],
    start: usize,
) -> Result<T, DecodeError> {
    let mut unread = Unread(bytes);
    let value = {
        let mut decoder = OwnedSerdeDecoder::from_reader(&mut unread, encoding::<LIMIT>());
        T::deserialize(decoder.as_deserializer())
    };
    let understood = start + bytes.len() - unread.0.len();
    match value {
        Ok(value) if unread.0.is_empty() => Ok(value),
        Ok(_) => Err(DecodeError::TrailingBytes { count: unread.0.len(), length: understood }),
        Err(error) => Err(DecodeError::Payload {
            offset: understood,
            length: start + bytes.len(),
            source: PayloadError(Cause::Decode(error)),
        }),
    }
}

/// What of the bytes was not read yet: tells where an undecodable packet went wrong.
struct Unread<'a>(&'a [u8]);

impl Reader for Unread<'_> {
    #[inline]
    fn read(&mut self, bytes: &mut [u8]) -> Result<(), bincode::error::DecodeError> {
        let Some((taken, rest)) = self.0.split_at_checked(bytes.len()) else {
            let additional = bytes.len() - self.0.len();
            return Err(bincode::error::DecodeError::UnexpectedEnd { additional });
        };
        bytes.copy_from_slice(taken);
        self.0 = rest;
        Ok(())
    }

    #[inline]
    fn peek_read(&mut self, n: usize) -> Option<&[u8]> {
        self.0.get(..n)
    }

    #[inline]
    fn consume(&mut self, n: usize) {
        self.0 = self.0.get(n..).unwrap_or_default();
    }
}
