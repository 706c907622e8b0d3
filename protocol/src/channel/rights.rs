//! Whether a socket takes file descriptors: `SO_PASSRIGHTS`, which the crates do not know yet.

use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SO_PASSRIGHTS` of `<asm-generic/socket.h>`, Linux 6.16.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Makes the kernel refuse messages with fds to this socket.
pub(super) fn refuse(socket: BorrowedFd<'_>) -> io::Result<()> {
    let off: libc::c_int = 0;
    // SAFETY: the fd is open as long as `socket` is borrowed; the kernel reads as many bytes as it
    // is told of `off`, which is alive and as long.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            std::ptr::from_ref(&off).cast(),
            SIZE,
        )
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

#[expect(clippy::cast_possible_truncation, reason = "4 bytes")]
const SIZE: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;
