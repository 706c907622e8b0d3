//! Writes to the configuration space that wait for the start of the device. Pure.
//!
//! A frontend cannot be told to come again later: an error ends its connection. What it writes while
//! the device is stopped is kept and carried out, in order, when it runs; what it reads meanwhile has
//! these writes in it.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

/// The most writes that wait. A guest whose processors stand still writes nothing, so these are those
/// that were under way.
const MOST: usize = 64;

/// The writes that wait.
#[derive(Debug, Default)]
pub(super) struct Kept(VecDeque<(u32, Vec<u8>)>);

impl Kept {
    /// Keeps a write; false if there are too many.
    pub(super) fn keep(&mut self, offset: u32, data: &[u8]) -> bool {
        let has_room = self.0.len() < MOST;
        if has_room {
            self.0.push_back((offset, data.to_vec()));
        }
        has_room
    }

    /// The first of them.
    pub(super) fn next(&mut self) -> Option<(u32, Vec<u8>)> {
        self.0.pop_front()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Puts them into what was read from `offset` on.
    pub(super) fn overlay(&self, offset: u32, data: &mut [u8]) {
        for (at, bytes) in &self.0 {
            for (at, byte) in (u64::from(*at)..).zip(bytes) {
                let place = at.checked_sub(offset.into()).and_then(|at| usize::try_from(at).ok());
                if let Some(place) = place.and_then(|place| data.get_mut(place)) {
                    *place = *byte;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_can_be_read_and_comes_in_order() {
        let mut kept = Kept::default();
        assert!(kept.keep(2, &[1, 2, 3]) && kept.keep(4, &[9]));
        let mut data = [0; 4];
        kept.overlay(1, &mut data);
        assert_eq!(data, [0, 1, 2, 9]);
        kept.overlay(u32::MAX, &mut data);
        kept.overlay(100, &mut data);
        assert_eq!(data, [0, 1, 2, 9]);
        assert_eq!(kept.next(), Some((2, vec![1, 2, 3])));
        assert_eq!(kept.next(), Some((4, vec![9])));
        assert_eq!(kept.next(), None);
    }

    #[test]
    fn there_is_room_for_some() {
        let mut kept = Kept::default();
        assert!((0..MOST).all(|_| kept.keep(0, &[0])));
        assert!(!kept.keep(0, &[0]));
        kept.clear();
        assert!(kept.keep(0, &[0]));
    }
}
