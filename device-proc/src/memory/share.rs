//! How many of the process's mappings a client's windows may have: some stay for everything else.
//!
//! A process has a bounded number of mappings (`vm.max_map_count`). Each window with a file is one.
//! Without any left no thread can be made, and the process ends when it needs one.

#![forbid(unsafe_code)]

use super::MAX_WINDOWS;
use std::sync::LazyLock;

/// How many stay free, or half of all where that is less: stacks of threads, the heap, libraries.
const RESERVE: usize = 4096;

/// What the kernel allows if nobody has changed it (`DEFAULT_MAX_MAP_COUNT`).
const USUAL: usize = 65_530;

/// The most windows with a file, if each takes so many mappings.
pub(super) fn most_with_file(mappings_each: usize) -> usize {
    static LIMIT: LazyLock<usize> = LazyLock::new(|| {
        let text = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(USUAL)
    });
    share(*LIMIT, mappings_each)
}

fn share(limit: usize, mappings_each: usize) -> usize {
    ((limit - RESERVE.min(limit / 2)) / mappings_each.max(1)).min(MAX_WINDOWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_stays_for_others_however_many_there_are() {
        assert_eq!(
            [0, 1, 100, 8192, 65_530].map(|limit| share(limit, 1)),
            [0, 1, 50, 4096, 61_434]
        );
        assert_eq!(share(65_530, 2), 30_717);
        assert_eq!(share(usize::MAX, 2), MAX_WINDOWS);
    }
}
