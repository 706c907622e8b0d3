//! Reading and writing a pipe, file or socket that another process chose, without ever waiting
//! longer than the budget or for longer than anybody wants it.
//!
//! The open file may be shared with that process, so it cannot be made non-blocking here. A socket
//! is asked each time not to wait. A pipe is opened once more through `/proc/self/fd`, which makes
//! an open file of our own for the same pipe, and that one does not wait. Where that cannot be (no
//! `/proc`), every call polls first and then moves no more than surely goes without waiting.
//!
//! A pipe that is written to is made as large as an ordinary user may make it: its two ends then
//! meet less often.

use super::budget::Budget;
use super::stream::Sink;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::pipe::fcntl_setpipe_size;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

/// A pipe that polls as writable takes that much at once (`PIPE_BUF` of Linux).
const PIPE_PIECE: usize = 4096;

/// How large a pipe is made, in bytes: `/proc/sys/fs/pipe-max-size` of Linux where nobody has
/// changed it.
const PIPE_SIZE: usize = 1 << 20;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Save,
    Load,
}

/// What is at the other end decides how to read and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It does not wait, or not for another process.
    File,
    Socket,
    /// A pipe of which we have an open file of our own.
    Pipe,
    /// Pipes that could not be opened once more, and whatever else there is.
    Shared,
}

/// The fd of a state stream; see the [module](self).
#[derive(Debug)]
pub(super) struct StreamFd {
    fd: OwnedFd,
    kind: Kind,
    budget: Budget,
}

impl StreamFd {
    pub(super) fn new(fd: OwnedFd, direction: Direction, budget: Budget) -> io::Result<Self> {
        let (fd, kind) = match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
            FileType::RegularFile => (fd, Kind::File),
            FileType::Socket => (fd, Kind::Socket),
            FileType::Fifo => {
                if direction == Direction::Save
                    && let Err(error) = fcntl_setpipe_size(&fd, PIPE_SIZE)
                {
                    tracing::debug!(%error, "the pipe of a state stream stays as large as it is");
                }
                match open_once_more(&fd, direction) {
                    Ok(own) => (own, Kind::Pipe),
                    Err(error) => {
                        tracing::debug!(%error, "the pipe of a state stream cannot be opened again");
                        (fd, Kind::Shared)
                    }
                }
            }
            _ => (fd, Kind::Shared),
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

    /// Moves some bytes by a call that does not wait, and waits before it where it would.
    fn go(
        &self,
        events: PollFlags,
        mut some: impl FnMut(&OwnedFd, Kind) -> Result<usize, Errno>,
    ) -> io::Result<usize> {
        self.left()?;
        if self.kind == Kind::Shared {
            self.wait(events)?;
        }
        loop {
            match some(&self.fd, self.kind) {
                Err(Errno::AGAIN) => self.wait(events)?,
                Err(Errno::INTR) => {
                    self.left()?;
                }
                done => return Ok(done?),
            }
        }
    }
}

/// An open file of our own for the same pipe, which does not wait.
fn open_once_more(fd: &OwnedFd, direction: Direction) -> Result<OwnedFd, Errno> {
    let access = match direction {
        Direction::Save => OFlags::WRONLY,
        Direction::Load => OFlags::RDONLY,
    };
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
}

impl Read for StreamFd {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.go(PollFlags::IN, |fd, kind| match kind {
            Kind::Socket => recv(fd, &mut *data, RecvFlags::DONTWAIT).map(|(length, _)| length),
            Kind::File | Kind::Pipe | Kind::Shared => rustix::io::read(fd, &mut *data),
        })
    }
}

impl Write for StreamFd {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.go(PollFlags::OUT, |fd, kind| match kind {
            Kind::File | Kind::Pipe => rustix::io::write(fd, data),
            Kind::Socket => send(fd, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Shared => rustix::io::write(fd, &data[..data.len().min(PIPE_PIECE)]),
        })
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
        let mut stream = StreamFd::new(writer.into(), Direction::Save, budget).unwrap();
        let error = stream.write_all(&vec![0; 2 * PIPE_SIZE]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_socket_that_nobody_reads_ends_when_it_is_overtaken() {
        let (_reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let (budget, overtaken) = budget(Duration::from_secs(60));
        let mut stream = StreamFd::new(writer.into(), Direction::Save, budget).unwrap();
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
        let mut stream = StreamFd::new(reader.into(), Direction::Load, budget).unwrap();
        assert_eq!(stream.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::TimedOut);
    }

    /// A stream of this kind, whatever could be had.
    fn shared(stream: StreamFd) -> StreamFd {
        StreamFd { kind: Kind::Shared, ..stream }
    }

    #[test]
    fn the_other_owner_of_a_pipe_goes_on_waiting() {
        let (reader, writer) = io::pipe().unwrap();
        let other = writer.try_clone().unwrap();
        let (budget, _) = budget(Duration::from_secs(60));
        let stream = StreamFd::new(writer.into(), Direction::Save, budget).unwrap();
        assert_eq!(stream.kind, Kind::Pipe);
        let flags = rustix::fs::fcntl_getfl(&other).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
        drop((reader, stream));
    }

    #[test]
    fn what_is_written_is_read_whichever_way_it_goes() {
        type Wrap = fn(StreamFd) -> StreamFd;
        for (to, from) in
            [(shared as Wrap, shared as Wrap), (shared, |own| own), (|own| own, shared)]
        {
            let (reader, writer) = io::pipe().unwrap();
            let (budget, _) = budget(Duration::from_secs(60));
            let writer = StreamFd::new(writer.into(), Direction::Save, budget.clone());
            let reader = StreamFd::new(reader.into(), Direction::Load, budget);
            let (mut writer, mut reader) = (to(writer.unwrap()), from(reader.unwrap()));
            let sent: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
            let copy = sent.clone();
            let writing = std::thread::spawn(move || writer.write_all(&copy).unwrap());
            let mut received = Vec::new();
            reader.read_to_end(&mut received).unwrap();
            writing.join().unwrap();
            assert!(received == sent);
        }
    }

    #[test]
    fn a_pipe_whose_other_end_is_gone_is_told() {
        let (reader, writer) = io::pipe().unwrap();
        let (forever, _) = budget(Duration::from_secs(60));
        drop(reader);
        let mut stream = StreamFd::new(writer.into(), Direction::Save, forever).unwrap();
        assert_eq!(stream.write(&[0]).unwrap_err().kind(), ErrorKind::BrokenPipe);

        let (reader, writer) = io::pipe().unwrap();
        let (forever, _) = budget(Duration::from_secs(60));
        drop(writer);
        let mut stream = StreamFd::new(reader.into(), Direction::Load, forever).unwrap();
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    }
}
