//! What this process has of the kernel: to see that nothing is left over.

use std::time::{Duration, Instant};

/// How long it may take until what is not needed any more is given back.
const PATIENCE: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(20);
/// How long nothing must have been given back.
const CALM: Duration = Duration::from_secs(2);

/// What this process has of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Open file descriptors.
    pub fds: u64,
    /// Threads.
    pub threads: u64,
}

impl Resources {
    /// What it has now. Zero of what the system does not tell.
    #[must_use]
    pub fn now() -> Self {
        let count =
            |folder: &str| std::fs::read_dir(folder).map_or(0, |entries| entries.count() as u64);
        // One of the fds is that of the folder.
        Self { fds: count("/proc/self/fd").saturating_sub(1), threads: count("/proc/self/task") }
    }

    /// What it has when it has no more than before, or, if there is no before, when it gives nothing back
    /// for a while; after a time what it then has.
    pub async fn settled(before: Option<Self>) -> Self {
        let end = Instant::now() + PATIENCE;
        let mut least = Self::now();
        let mut calm = Instant::now();
        loop {
            let now = Self::now();
            if now.fds < least.fds || now.threads < least.threads {
                (least, calm) = (now, Instant::now());
            }
            let enough = match before {
                Some(before) => now.fds <= before.fds && now.threads <= before.threads,
                None => calm.elapsed() >= CALM,
            };
            if enough || Instant::now() > end {
                return now;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_open_is_counted_and_what_is_given_back_is_not() {
        // Other tests of this program open and close files meanwhile: enough that it shows.
        let before = Resources::now();
        let files: Vec<_> =
            (0..200).map(|_| std::fs::File::open("/proc/self/stat").unwrap()).collect();
        let open = Resources::now();
        assert!(open.fds >= before.fds + 100, "{before:?} {open:?}");
        drop(files);
        let allowed = Resources { fds: before.fds + 100, threads: before.threads + 100 };
        let after = Resources::settled(Some(allowed)).await;
        assert!(after.fds < open.fds, "{after:?}");
    }
}
