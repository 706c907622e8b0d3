//! Requests in flight, in the order in which the driver made them available.
//!
//! They may finish in any order; they leave in that one. So the used index of a ring is a clean
//! boundary: everything before it is done and nothing behind it was told, and whoever has to go on
//! after a crash goes on there.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

/// The place of a request in its order: the first is 0, the next 1.
pub(super) type Sequence = u64;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Window<T> {
    entries: VecDeque<Entry<T>>,
    /// Of the first entry, or the one to come.
    first: Sequence,
}

#[derive(Debug)]
struct Entry<T> {
    request: T,
    finished: bool,
}

impl<T> Window<T> {
    /// Empty, with memory for so many.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { entries: VecDeque::with_capacity(capacity), first: 0 }
    }

    /// Takes the next request in.
    pub(super) fn push(&mut self, request: T) -> Sequence {
        let sequence = self.end();
        self.entries.push_back(Entry { request, finished: false });
        sequence
    }

    /// The place of the next request to come.
    pub(super) fn end(&self) -> Sequence {
        self.first.wrapping_add(self.entries.len() as u64)
    }

    /// A request that is not finished.
    pub(super) fn get_mut(&mut self, sequence: Sequence) -> Option<&mut T> {
        let entry = self.entry(sequence).filter(|entry| !entry.finished)?;
        Some(&mut entry.request)
    }

    /// Takes a request for finished. Returns false if it was before, or is not there.
    pub(super) fn finish(&mut self, sequence: Sequence) -> bool {
        match self.entry(sequence) {
            Some(entry) if !entry.finished => {
                entry.finished = true;
                true
            }
            _ => false,
        }
    }

    /// The first request, if it is finished.
    pub(super) fn pop_finished(&mut self) -> Option<T> {
        if !self.has_finished() {
            return None;
        }
        let entry = self.entries.pop_front()?;
        self.first = self.first.wrapping_add(1);
        Some(entry.request)
    }

    /// Whether [`pop_finished`](Self::pop_finished) has something to return.
    pub(super) fn has_finished(&self) -> bool {
        self.entries.front().is_some_and(|entry| entry.finished)
    }

    /// How many requests are in it, finished ones included.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn entry(&mut self, sequence: Sequence) -> Option<&mut Entry<T>> {
        let index = usize::try_from(sequence.wrapping_sub(self.first)).ok()?;
        self.entries.get_mut(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_finishes_early_waits_for_what_came_before() {
        let mut window = Window::with_capacity(4);
        let [first, second] = ["first", "second"].map(|name| window.push(name));
        assert!(window.finish(second));
        assert!(!window.has_finished());
        assert_eq!(window.pop_finished(), None);
        assert_eq!(window.len(), 2);
        assert!(window.finish(first));
        assert_eq!(window.pop_finished(), Some("first"));
        assert_eq!(window.pop_finished(), Some("second"));
        assert_eq!((window.pop_finished(), window.len()), (None, 0));
    }

    #[test]
    fn nothing_finishes_twice_and_nothing_that_is_not_there() {
        let mut window = Window::with_capacity(1);
        let only = window.push(());
        assert!(!window.finish(only + 1) && !window.finish(only.wrapping_sub(1)));
        assert!(window.get_mut(only).is_some());
        assert!(window.finish(only) && !window.finish(only));
        assert!(window.get_mut(only).is_none());
        assert!(window.pop_finished().is_some());
        assert!(!window.finish(only));
    }

    proptest! {
        /// Whatever finishes when: all leave, each once, in the order in which they came.
        #[test]
        fn order_is_kept(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..200)) {
            let mut window = Window::with_capacity(2);
            let (mut open, mut came, mut left) = (Vec::new(), 0_u64, 0_u64);
            for (arrives, which) in steps {
                if arrives || open.is_empty() {
                    prop_assert_eq!(window.push(came), came);
                    open.push(came);
                    came += 1;
                } else {
                    let sequence = open.swap_remove(which.index(open.len()));
                    prop_assert_eq!(window.get_mut(sequence).copied(), Some(sequence));
                    prop_assert!(window.finish(sequence));
                }
                while let Some(request) = window.pop_finished() {
                    prop_assert_eq!(request, left);
                    prop_assert!(!open.contains(&request));
                    left += 1;
                }
                prop_assert_eq!(window.len() as u64, came - left);
                // What is first is open, else it had left.
                prop_assert!(window.len() == 0 || open.contains(&left));
            }
        }
    }
}
