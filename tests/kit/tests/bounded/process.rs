//! What the system says of this process.

use crate::fixture::LONG;
use std::time::Duration;

/// How many file descriptors it has open.
pub(crate) fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// How many threads it has.
pub(crate) fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// What is open, for messages.
pub(crate) fn names_of_fds() -> Vec<std::path::PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok()).collect()
}

/// Waits until it has no more of either than that. The actors of lost devices end on their own time,
/// and so do threads of the runtime: when they had nothing to do for 10 s.
pub(crate) async fn settled(fds: usize, threads_before: usize) {
    let settled = async {
        while open_fds() > fds || threads() > threads_before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(LONG, settled).await.is_err() {
        panic!("{fds} fds before, now {:#?}; {} threads", names_of_fds(), threads());
    }
}
