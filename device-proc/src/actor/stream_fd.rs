//! Reading and writing a pipe, file or socket that another process chose, without ever waiting
//! longer than the budget or for longer than anybody wants it.
//!
//! The open file may be shared with that process, so it cannot be made non-blocking here. Instead
//! every call polls first and then moves no more than surely goes without waiting.

use super::budget::Budget;
use super::stream::Sink;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// A pipe that polls as writable takes that much at once (`PIPE_BUF` of Linux).
const PIPE_PIECE: usize = 4096;

/// What is at the other end decides how to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Socket,
    /// Pipes, and whatever else there is.
    Pipe,
}

/// The fd of a state stream; see the [module](self).
#[derive(Debug)]
pub(super) struct StreamFd {
    fd: OwnedFd,
    kind: Kind,
    budget: Budget,
}

impl StreamFd {
    pub(super) fn new(fd: OwnedFd, budget: Budget) -> io::Result<Self> {
        let kind = match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Socket => Kind::Socket,
            _ => Kind::Pipe,
        };
        Ok(Self { fd, kind, budget })
    }

    /// Fails once it is overtaken or the budget is used up; what is left of that.
    fn left(&self) -> io::Result<Duration> {
        if self.budget.overtaken().has_fired() {
            return Err(io::Error::other("overtaken by a later command"));
        }
        match self.budget.left() {
            Duration::ZERO => Err(ErrorKind::TimedOut.into()),
            left => Ok(left),
        }
    }

    /// Waits until the fd is ready, the budget is used up, or it is overtaken.
    fn wait(&self, events: PollFlags) -> io::Result<()> {
        let overtaken = self.budget.overtaken();
        loop {
            let wake = overtaken.fd()?;
            let left = self.left()?;
            let mut fds =
                [PollFd::new(&self.fd, events), PollFd::from_borrowed_fd(wake, PollFlags::IN)];
            // Beyond the kernel's seconds is for ever.
            match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(_) if !fds[0].revents().is_empty() => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for StreamFd {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        Ok(rustix::io::read(&self.fd, data)?)
    }
}

impl Write for StreamFd {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::OUT)?;
            let written = match self.kind {
                Kind::File => rustix::io::write(&self.fd, data),
                Kind::Socket => send(&self.fd, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
                Kind::Pipe => rustix::io::write(&self.fd, &data[..data.len().min(PIPE_PIECE)]),
            };
            match written {
                Err(Errno::AGAIN | Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for StreamFd {
    fn still_wanted(&self) -> io::Result<()> {
        self.left().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    fn budget(left: Duration) -> (Budget, Arc<super::super::budget::Overtaken>) {
        let overtaken = Arc::default();
        (Budget::new(Instant::now(), left, Arc::clone(&overtaken)), overtaken)
    }

    #[test]
    fn a_pipe_that_nobody_reads_ends_with_the_budget() {
        let (_reader, writer) = io::pipe().unwrap();
        let (budget, _) = budget(Duration::from_millis(20));
        let mut stream = StreamFd::new(writer.into(), budget).unwrap();
        let error = stream.write_all(&[0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_socket_that_nobody_reads_ends_when_it_is_overtaken() {
        let (_reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let (budget, overtaken) = budget(Duration::from_secs(60));
        let mut stream = StreamFd::new(writer.into(), budget).unwrap();
        let writing = std::thread::spawn(move || {
            loop {
                if let Err(error) = stream.write_all(&[0; 1 << 16]) {
                    break error.to_string();
                }
            }
        });
        overtaken.fire();
        assert_eq!(writing.join().unwrap(), "overtaken by a later command");
    }

    #[test]
    fn a_pipe_that_nobody_writes_ends_with_the_budget() {
        let (reader, _writer) = io::pipe().unwrap();
        let (budget, _) = budget(Duration::from_millis(20));
        let mut stream = StreamFd::new(reader.into(), budget).unwrap();
        assert_eq!(stream.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::TimedOut);
    }
}
