//! The pidfd of a socket's peer: `SO_PEERPIDFD`, which the crates do not know yet.

use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `SO_PEERPIDFD` of `<asm-generic/socket.h>`, Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// A pidfd of the process that made the other end; close-on-exec.
pub(super) fn pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: RawFd = -1;
    let mut size = SIZE;
    // SAFETY: the socket is open as long as it is borrowed; the kernel writes at most `size` bytes
    // to `fd`, which is alive and as long, and the new size to `size`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            std::ptr::from_mut(&mut fd).cast(),
            &raw mut size,
        )
    };
    Errno::result(result)?;
    // SAFETY: after its success the kernel has installed a new fd, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(clippy::cast_possible_truncation, reason = "4 bytes")]
const SIZE: libc::socklen_t = size_of::<RawFd>() as libc::socklen_t;
