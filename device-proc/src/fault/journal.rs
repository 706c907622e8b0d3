//! Where a process writes what it does wrong, before it does it.

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::Errno;
use standstill_protocol::fault::JournalLine;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A pipe, or a file that is open for appending.
#[derive(Debug)]
pub(super) struct Journal(OwnedFd);

impl Journal {
    /// Nobody waits for whoever reads it: what finds no room is lost.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// Writes a line, whole or not at all.
    pub(super) fn write(&self, line: JournalLine) -> io::Result<()> {
        let line = format!("{line}\n");
        loop {
            match rustix::io::write(&self.0, line.as_bytes()) {
                Ok(written) if written == line.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Opens a file to append to.
pub(super) fn append_to(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::from_raw_mode(0o600))?)
}
