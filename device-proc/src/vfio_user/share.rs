//! How many of the process's fds a client may have: some stay for those of the coordinator.
//!
//! What a client makes the process keep (the files behind its windows, its eventfds) is refused beyond
//! that, and closed again. Nothing is counted for it: a new fd has the lowest number that is free, so
//! its number says how many there are at least.

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::os::fd::{AsRawFd, OwnedFd};

/// How many stay free, or half of all where that is less. More than what a client's messages have
/// between them before they are carried out.
const RESERVE: u64 = 256;

/// Refuses fds that leave too few for others.
///
/// # Errors
///
/// EMFILE.
pub(super) fn check(fds: &[OwnedFd]) -> Result<(), Errno> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let most = share(limit);
    let is_beyond = |fd: &OwnedFd| u64::try_from(fd.as_raw_fd()).is_ok_and(|number| number >= most);
    if fds.iter().any(is_beyond) {
        tracing::warn!(limit, "a client's fds are refused: too few are free");
        return Err(Errno::MFILE);
    }
    Ok(())
}

/// How many of so many.
fn share(limit: u64) -> u64 {
    limit - RESERVE.min(limit / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_stays_for_others_however_many_there_are() {
        assert_eq!([0, 1, 100, 512, 1024].map(share), [0, 1, 50, 256, 768]);
        assert_eq!(share(u64::MAX), u64::MAX - 256);
    }
}
