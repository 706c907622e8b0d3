//! What is saved of a disk beside its rings: what tells whether another disk is the same one. There is
//! nothing in a disk that its driver could have changed.

#![forbid(unsafe_code)]

use super::work::SERIAL;
use serde::{Deserialize, Serialize};
use standstill_protocol::codec::{DecodeError, EncodeError, decode_state, encode_state};
use std::io::{self, Read, Write};
use thiserror::Error;

/// The most bytes of a saved state; it has some 50.
const MOST_BYTES: u64 = 256;

/// What makes two disks the same disk to a guest, as far as that can be known: what is in their
/// blocks nobody compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// In bytes.
    pub(super) size: u64,
    /// Size of a block in bytes.
    pub(super) block: u32,
    pub(super) read_only: bool,
    pub(super) serial: [u8; SERIAL],
}

/// A saved state is none for this disk.
#[derive(Debug, Error)]
pub(super) enum StateError {
    #[error("the disk's state cannot be encoded")]
    Encode(#[from] EncodeError),
    #[error("the disk's state cannot be decoded")]
    Decode(#[from] DecodeError),
    #[error("the disk's state cannot be read or written")]
    Io(#[from] io::Error),
    #[error("the disk's state has more than {MOST_BYTES} bytes")]
    TooLong,
    #[error("saved was a disk of {saved} bytes, this one has {here}")]
    Size { saved: u64, here: u64 },
    #[error("saved was a disk with blocks of {saved} bytes, those of this one have {here}")]
    Block { saved: u32, here: u32 },
    #[error("saved was a disk that {}, this one {}", can(!saved), can(!here))]
    ReadOnly { saved: bool, here: bool },
    #[error(
        "saved was the disk with the serial number {:?}, this one has {:?}",
        text(saved),
        text(here)
    )]
    Serial { saved: [u8; SERIAL], here: [u8; SERIAL] },
}

fn can(be_written: bool) -> &'static str {
    if be_written { "can be written" } else { "is read-only" }
}

fn text(serial: &[u8; SERIAL]) -> String {
    String::from_utf8_lossy(serial).trim_end_matches('\0').to_owned()
}

/// Writes the state of a disk.
pub(super) fn save(identity: Identity, to: &mut dyn Write) -> Result<(), StateError> {
    Ok(to.write_all(&encode_state(&identity)?)?)
}

/// Reads what [`save`] wrote, to the end, and checks that it is for this disk.
pub(super) fn load(here: Identity, from: &mut dyn Read) -> Result<(), StateError> {
    let mut bytes = Vec::new();
    from.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(StateError::TooLong);
    }
    let saved: Identity = decode_state(&bytes)?;
    if saved.size != here.size {
        return Err(StateError::Size { saved: saved.size, here: here.size });
    }
    if saved.block != here.block {
        return Err(StateError::Block { saved: saved.block, here: here.block });
    }
    if saved.read_only != here.read_only {
        return Err(StateError::ReadOnly { saved: saved.read_only, here: here.read_only });
    }
    if saved.serial != here.serial {
        return Err(StateError::Serial { saved: saved.serial, here: here.serial });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: Identity = Identity {
        size: 1 << 20,
        block: 512,
        read_only: false,
        serial: *b"standstill-0001\0\0\0\0\0",
    };

    fn saved(identity: Identity) -> Vec<u8> {
        let mut bytes = Vec::new();
        save(identity, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_same_disk_takes_it() {
        load(DISK, &mut &saved(DISK)[..]).unwrap();
    }

    #[test]
    fn another_disk_is_refused_with_a_text_that_says_what_differs() {
        let refusal = |other: Identity| load(DISK, &mut &saved(other)[..]).unwrap_err().to_string();
        let size = refusal(Identity { size: 1 << 21, ..DISK });
        assert_eq!(size, "saved was a disk of 2097152 bytes, this one has 1048576");
        let block = refusal(Identity { block: 4096, ..DISK });
        assert_eq!(block, "saved was a disk with blocks of 4096 bytes, those of this one have 512");
        let read_only = refusal(Identity { read_only: true, ..DISK });
        assert_eq!(read_only, "saved was a disk that is read-only, this one can be written");
        let serial = refusal(Identity { serial: [b'x'; SERIAL], ..DISK });
        let expected = "saved was the disk with the serial number \"xxxxxxxxxxxxxxxxxxxx\", \
            this one has \"standstill-0001\"";
        assert_eq!(serial, expected);
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let good = saved(DISK);
        for end in 0..good.len() {
            assert!(load(DISK, &mut &good[..end]).is_err(), "{end} bytes");
        }
        let more = [good.as_slice(), &[0]].concat();
        assert!(matches!(load(DISK, &mut &more[..]), Err(StateError::Decode(_))));
        assert!(matches!(load(DISK, &mut io::repeat(0)), Err(StateError::TooLong)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_state_of_this_disk_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..80),
            at: prop::sample::Index,
            byte: u8,
        ) {
            let _ = load(DISK, &mut &bytes[..]);
            let mut changed = saved(DISK);
            let at = at.index(changed.len());
            changed[at] = byte;
            if load(DISK, &mut &changed[..]).is_ok() {
                prop_assert_eq!(saved(DISK), changed);
            }
        }
    }
}
