mod features;
mod layout;
mod refusals;
mod round_trips;
mod version;

use super::*;

/// What `encode` appends.
fn bytes(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

/// A body of 32-bit words.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A body of 64-bit words.
fn long_words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

const LIMITS: Limits = Limits { max_data_xfer_size: 1 << 20 };

fn request(command: Command, body: &[u8]) -> Result<Request<'_>, WireError> {
    Request::decode(command.number(), body, 0, LIMITS)
}
