//! Room for one packet, kept by each thread.
//!
//! A packet can have [`MAX_PACKET`] bytes, and nearly all have a hundred. Room on the stack would be
//! cleared for each of them: 64 cache lines, all of them cold in a process that has slept.

#![forbid(unsafe_code)]

use crate::codec::MAX_PACKET;
use std::cell::Cell;

thread_local! {
    /// Made when it is needed for the first time.
    static BUFFER: Cell<Option<Box<[u8; MAX_PACKET]>>> = const { Cell::new(None) };
}

/// Calls `work` with room for a packet, in which is anything.
pub(super) fn with_buffer<R>(work: impl FnOnce(&mut [u8; MAX_PACKET]) -> R) -> R {
    // Taken out meanwhile: whoever asks for it inside gets another one.
    let kept = BUFFER.try_with(Cell::take).ok().flatten();
    let mut buffer = kept.unwrap_or_else(|| Box::new([0; MAX_PACKET]));
    let result = work(&mut buffer);
    // Fails when the thread is ending, and then it is not needed any more.
    let _ = BUFFER.try_with(|place| place.set(Some(buffer)));
    result
}

#[cfg(test)]
mod tests {
    use super::with_buffer;

    #[test]
    fn room_is_kept_and_never_given_out_twice() {
        with_buffer(|outer| {
            outer[0] = 1;
            with_buffer(|inner| inner[0] = 2);
            assert_eq!(outer[0], 1);
        });
        let first = with_buffer(|buffer| std::ptr::from_ref(buffer).addr());
        let second = with_buffer(|buffer| std::ptr::from_ref(buffer).addr());
        assert_eq!(first, second);
    }
}
