//! Reads what an armed device process says that it does.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read};
use standstill_protocol::channel::Readiness;
use standstill_protocol::fault::{Fault, JournalLine};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The longest line in bytes; none that is one is longer.
const LONGEST: usize = 64;
/// How much is read at once, in bytes.
const PIECE: usize = 512;

/// The journal of faults that a device process was armed with by one call.
///
/// Its lines come out of a pipe: first [`JournalLine::Armed`], then one [`JournalLine::Fired`]
/// before each thing that is done. A line that finds the pipe full (64 KiB) is lost; the process
/// does not wait. Nothing more than a piece of a line is kept here, whatever the process writes.
#[derive(Debug)]
pub struct Journal {
    pipe: OwnedFd,
    faults: Vec<Fault>,
    /// What was read and not given out.
    unread: Vec<u8>,
    /// Made when it is waited for under tokio.
    watch: Option<Readiness<OwnedFd>>,
}

/// There is no next line.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The process is gone, or has done all that it was armed with; all lines were read.
    #[error("the journal has ended")]
    Ended,
    /// None came in time.
    #[error("the journal has no line within {0:?}")]
    Late(Duration),
    /// What the process wrote is no line of a journal.
    #[error("this is no line of a journal: {0:?}")]
    Foreign(String),
    /// The pipe cannot be read or waited for.
    #[error("the journal cannot be read")]
    Io(#[from] io::Error),
}

impl Journal {
    pub(super) fn new(pipe: OwnedFd, faults: Vec<Fault>) -> Self {
        Self { pipe, faults, unread: Vec::new(), watch: None }
    }

    /// What the process was armed with. A line that a fault has fired names it by its place here.
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// The next line, if it is there already. Never waits.
    ///
    /// # Errors
    ///
    /// [`JournalError`], but not [`JournalError::Late`].
    pub fn try_next(&mut self) -> Result<Option<JournalLine>, JournalError> {
        loop {
            if let Some(line) = take_line(&mut self.unread)? {
                return Ok(Some(line));
            }
            if !read_more(&self.pipe, &mut self.unread)? {
                return Ok(None);
            }
        }
    }

    /// Waits for the next line. Cancel safe.
    ///
    /// # Errors
    ///
    /// As [`try_next`](Self::try_next); [`JournalError::Io`] also outside a tokio runtime.
    pub async fn next(&mut self) -> Result<JournalLine, JournalError> {
        if self.watch.is_none() {
            self.watch = Some(Readiness::new(self.pipe.try_clone()?)?);
        }
        loop {
            if let Some(line) = take_line(&mut self.unread)? {
                return Ok(line);
            }
            // Made above.
            let Some(watch) = &self.watch else { continue };
            let ready = watch.readable().await?;
            if !read_more(ready.get_ref(), &mut self.unread)? {
                ready.clear();
            }
        }
    }

    /// Waits for the next line, at most that long; blocks the calling thread.
    ///
    /// # Errors
    ///
    /// [`JournalError`].
    pub fn next_within(&mut self, timeout: Duration) -> Result<JournalLine, JournalError> {
        // None: further away than a clock can say, so for ever.
        let end = Instant::now().checked_add(timeout);
        loop {
            if let Some(line) = self.try_next()? {
                return Ok(line);
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(JournalError::Late(timeout));
            }
            // Beyond the kernel's seconds is for ever.
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.pipe, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
    }
}

/// Takes the first line out of what was read; `None` if there is no whole one.
fn take_line(unread: &mut Vec<u8>) -> Result<Option<JournalLine>, JournalError> {
    let Some(end) = unread.iter().take(LONGEST + 1).position(|&byte| byte == b'\n') else {
        if unread.len() > LONGEST {
            return Err(foreign(&std::mem::take(unread)));
        }
        return Ok(None);
    };
    let line: Vec<u8> = unread.drain(..=end).take(end).collect();
    let read = std::str::from_utf8(&line).ok().and_then(JournalLine::parse);
    read.map(Some).ok_or_else(|| foreign(&line))
}

/// Reads a piece; false if there is nothing yet.
fn read_more(pipe: &OwnedFd, unread: &mut Vec<u8>) -> Result<bool, JournalError> {
    let mut piece = [0; PIECE];
    loop {
        match read(pipe, &mut piece) {
            Ok(0) if unread.is_empty() => return Err(JournalError::Ended),
            Ok(0) => return Err(foreign(&std::mem::take(unread))),
            Ok(length) => {
                unread.extend_from_slice(&piece[..length]);
                return Ok(true);
            }
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
    }
}

fn foreign(bytes: &[u8]) -> JournalError {
    let first = bytes.get(..LONGEST).unwrap_or(bytes);
    JournalError::Foreign(String::from_utf8_lossy(first).into_owned())
}

#[cfg(test)]
mod tests {
    use super::super::journal as both_ends;
    use super::*;
    use rustix::io::write;

    const PATIENCE: Duration = Duration::from_secs(30);
    const FIRED: JournalLine = JournalLine::Fired { index: 1, occurrence: 2, at_ns: 3 };

    #[test]
    fn lines_are_given_out_one_by_one_however_they_come() {
        let (mut journal, device) = both_ends(&[]).unwrap();
        assert!(matches!(journal.try_next(), Ok(None)));
        write(&device, b"armed 2\nfired 1 2").unwrap();
        assert_eq!(journal.next_within(PATIENCE).unwrap(), JournalLine::Armed(2));
        assert!(matches!(journal.try_next(), Ok(None)), "half a line is none");
        let late = journal.next_within(Duration::from_millis(1));
        assert!(matches!(late, Err(JournalError::Late(_))));
        write(&device, b" 3\n").unwrap();
        assert_eq!(journal.try_next().unwrap(), Some(FIRED));
        drop(device);
        assert!(matches!(journal.next_within(PATIENCE), Err(JournalError::Ended)));
    }

    #[tokio::test]
    async fn lines_can_be_waited_for_in_a_task() {
        let (mut journal, device) = both_ends(&[]).unwrap();
        let waiting = tokio::spawn(async move {
            (journal.next().await.unwrap(), journal.next().await.unwrap_err())
        });
        tokio::task::yield_now().await;
        write(&device, b"fired 1 2 3\n").unwrap();
        drop(device);
        let (line, error) = waiting.await.unwrap();
        assert_eq!(line, FIRED);
        assert!(matches!(error, JournalError::Ended), "{error}");
    }

    #[test]
    fn whatever_a_process_writes_costs_no_more_than_a_line() {
        let (mut journal, device) = both_ends(&[]).unwrap();
        let mut written = 0;
        while let Ok(length) = write(&device, &[b'x'; 4096]) {
            written += length;
        }
        assert!(written >= 1 << 16, "the pipe is full");
        while let Err(error) = journal.try_next() {
            assert!(matches!(error, JournalError::Foreign(_)), "{error}");
            assert!(error.to_string().len() < 2 * LONGEST, "{error}");
            assert!(journal.unread.capacity() <= 2 * PIECE);
        }
        for other in [&b"\n"[..], b"armed\n", b"\xff\n", b"fired 1 2\n"] {
            write(&device, other).unwrap();
            assert!(matches!(journal.try_next(), Err(JournalError::Foreign(_))));
        }
        write(&device, b"armed 1").unwrap();
        drop(device);
        let torn = journal.try_next();
        assert!(matches!(torn, Err(JournalError::Foreign(line)) if line == "armed 1"));
        assert!(matches!(journal.try_next(), Err(JournalError::Ended)));
    }
}
