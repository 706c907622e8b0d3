//! A stream of bytes and file descriptors to whole messages. No I/O.
//!
//! A Unix stream socket keeps no borders: a message may come in pieces, many may come at once.
//! Whoever reads the socket reads into [`Framer::space`], tells how much came and with which fds
//! ([`Framer::received`]), and takes whole messages out ([`Framer::next_message`]) until there are
//! no more. How the stream was cut makes no difference.
//!
//! **Fds belong to the message in which their segment ends.** Linux ends a receive with the segment
//! that had fds, so these are never behind what else came; a sender may pass them with any segment
//! of their message, not only with the first. (Who sends several messages by one `sendmsg` with fds
//! gives them to the last one.)
//!
//! **What is wrong is one of two kinds** ([`FramingError::is_in_step`]). A message of a type that
//! does not exist, or with more fds than were agreed, is refused and the next one follows. A message
//! with an impossible size leaves nobody knowing where the next one begins: refuse it and close.
//!
//! Memory is bounded by the longest message, and grows only as bytes come.
//!
//! ```
//! use standstill_vfio_user::framing::{Framer, FramingLimits};
//! use standstill_vfio_user::wire::{Command, Header};
//!
//! let mut message = Vec::new();
//! Header::command(1, Command::Reset).encode_message(&mut message, 0, |_| ());
//!
//! let mut framer = Framer::new(FramingLimits { max_message: 4096, max_fds: 1 });
//! for byte in message {
//!     assert!(framer.next_message().unwrap().is_none());
//!     framer.space()[0] = byte;
//!     framer.received(1, []);
//! }
//! let message = framer.next_message().unwrap().unwrap();
//! assert_eq!((message.header.id, message.body), (1, &[][..]));
//! ```

#[cfg(test)]
mod tests;

use crate::wire::{Errno, HEADER_SIZE, Header, Kind};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use thiserror::Error;

/// Room that is kept for what can be read at once; messages longer than this make it grow.
const ROOM: usize = 64 << 10;

/// What a peer may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramingLimits {
    /// Size of the longest message in bytes, header included.
    pub max_message: u32,
    /// The most fds with one message.
    pub max_fds: usize,
}

/// Takes a stream apart. See the [module](self).
#[derive(Debug)]
pub struct Framer {
    limits: FramingLimits,
    /// Initialised throughout; what came is from `start` to `end`.
    buffer: Vec<u8>,
    /// Where the next message begins.
    start: usize,
    /// Where the last message begins, which is not complete.
    last: usize,
    end: usize,
    /// Where the buffer begins in the whole stream.
    base: u64,
    /// Fds, by where their messages begin in the stream.
    fds: VecDeque<(u64, OwnedFd)>,
    /// How many fds of one message were too many, and where it begins in the stream.
    surplus: VecDeque<(u64, usize)>,
}

/// A whole message.
#[derive(Debug)]
pub struct Message<'a> {
    /// Its header.
    pub header: Header,
    /// What the header says: no type that does not exist.
    pub kind: Kind,
    /// All after the header.
    pub body: &'a [u8],
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// A message that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FramingError {
    /// Smaller than a header, or larger than the longest message: the stream is out of step.
    #[error(
        "a message of {} bytes for command {}; {HEADER_SIZE} to {limit} are possible",
        header.size, header.command
    )]
    Size {
        /// Its header.
        header: Header,
        /// The longest message.
        limit: u32,
    },
    /// Neither a command nor a reply.
    #[error("a message of no type: flags {:#x} with command {}", header.flags, header.command)]
    Type {
        /// Its header.
        header: Header,
    },
    /// More fds than were agreed. They are closed.
    #[error("{count} fds with command {}; {limit} were agreed", header.command)]
    TooManyFds {
        /// Its header.
        header: Header,
        /// How many came.
        count: usize,
        /// How many may come.
        limit: usize,
    },
    /// The stream ended within a message.
    #[error("the stream ended after {received} bytes of a message")]
    Truncated {
        /// How many bytes of it there were.
        received: usize,
    },
}

impl FramingError {
    /// Whether the next message can be taken. If not, the connection is of no more use.
    #[must_use]
    pub fn is_in_step(&self) -> bool {
        matches!(self, Self::Type { .. } | Self::TooManyFds { .. })
    }

    /// The header of what is to be answered; `None` if nobody waits for it.
    #[must_use]
    pub fn answer(&self) -> Option<Header> {
        match self {
            Self::Size { header, .. } | Self::Type { header } | Self::TooManyFds { header, .. } => {
                header.wants_reply().then(|| header.refusal(Errno::EINVAL))
            }
            Self::Truncated { .. } => None,
        }
    }
}

impl Framer {
    /// For the beginning of a stream.
    #[must_use]
    pub fn new(limits: FramingLimits) -> Self {
        Self {
            limits,
            buffer: vec![0; ROOM],
            start: 0,
            last: 0,
            end: 0,
            base: 0,
            fds: VecDeque::new(),
            surplus: VecDeque::new(),
        }
    }

    /// What the peer may send.
    #[must_use]
    pub fn limits(&self) -> FramingLimits {
        self.limits
    }

    /// Other limits, from the next message on that is not complete: what was agreed.
    pub fn set_limits(&mut self, limits: FramingLimits) {
        self.limits = limits;
    }

    /// Where to read to; never empty. There is more of it when a long message has begun.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.base = self.base.wrapping_add(self.start as u64);
            (self.start, self.last, self.end) = (0, 0, 0);
        }
        let room = self.buffer.len() - self.end;
        // Of the message that is not complete: what it still needs, as far as that is known.
        let due = self.size_of_last().ok().flatten().unwrap_or(HEADER_SIZE);
        let missing = due.saturating_sub(self.end - self.last);
        if room == 0 || room < missing.min(ROOM) {
            self.make_room(missing);
        }
        &mut self.buffer[self.end..]
    }

    /// Moves what is there to the beginning; if that is not enough, lets the buffer grow, but no
    /// faster than what has come.
    fn make_room(&mut self, missing: usize) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.base = self.base.wrapping_add(self.start as u64);
        self.last -= self.start;
        self.end -= self.start;
        self.start = 0;
        if self.buffer.len() - self.end < missing.clamp(1, ROOM) {
            self.buffer.resize(self.end + missing.clamp(ROOM, self.end.max(ROOM)), 0);
        }
    }

    /// Notes that `count` bytes have come into [`space`](Self::space), and these fds with them.
    pub fn received(&mut self, count: usize, fds: impl IntoIterator<Item = OwnedFd>) {
        self.end = self.end.saturating_add(count).min(self.buffer.len());
        let mut at = self.last;
        // Forward to the message in which these bytes end.
        while let Ok(Some(size)) = self.size_of_last() {
            if self.end - self.last < size {
                break;
            }
            at = self.last;
            self.last += size;
        }
        if self.last < self.end {
            at = self.last;
        }
        let at = self.base.wrapping_add(at as u64);
        for fd in fds {
            let theirs = self.fds.iter().rev().take_while(|(message, _)| *message == at).count();
            if theirs < self.limits.max_fds {
                self.fds.push_back((at, fd));
            } else if let Some((_, more)) = self.surplus.back_mut().filter(|(of, _)| *of == at) {
                *more += 1;
            } else {
                self.surplus.push_back((at, 1));
            }
        }
    }

    /// Size of the message that is not complete, if its header is there.
    fn size_of_last(&self) -> Result<Option<usize>, FramingError> {
        let there = self.buffer.get(self.last..self.end).unwrap_or_default();
        let Some(header) = Header::decode(there) else {
            return Ok(None);
        };
        self.check_size(header).map(Some)
    }

    fn check_size(&self, header: Header) -> Result<usize, FramingError> {
        let limit = self.limits.max_message;
        let possible = header.body_size().is_some() && header.size <= limit;
        let size = usize::try_from(header.size).ok().filter(|_| possible);
        size.ok_or(FramingError::Size { header, limit })
    }

    /// Whether [`next_message`](Self::next_message) has something to say: a message, or an error.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some(header) = Header::decode(there) else {
            return false;
        };
        self.start < self.last || self.check_size(header).map_or(true, |size| there.len() >= size)
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    ///
    /// [`FramingError`]; if it is [in step](FramingError::is_in_step), its message has been taken
    /// out and closed, and the next call has the next one. If not, each call says the same.
    pub fn next_message(&mut self) -> Result<Option<Message<'_>>, FramingError> {
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some(header) = Header::decode(there) else {
            return Ok(None);
        };
        let size = match self.start < self.last {
            // It was found complete when it came, by the limits of then.
            true => header.body_size().map_or(HEADER_SIZE, |body| body + HEADER_SIZE),
            false => self.check_size(header)?,
        };
        if there.len() < size {
            return Ok(None);
        }
        let start = self.start;
        self.start += size;
        self.last = self.last.max(self.start);
        let (fds, surplus) = self.take_fds(self.base.wrapping_add(start as u64));
        if surplus > 0 {
            let (count, limit) = (fds.len() + surplus, fds.len());
            return Err(FramingError::TooManyFds { header, count, limit });
        }
        let Some(kind) = header.kind() else {
            return Err(FramingError::Type { header });
        };
        let body = &self.buffer[start + HEADER_SIZE..start + size];
        Ok(Some(Message { header, kind, body, fds }))
    }

    /// The fds of the message that begins at `at` in the stream, and how many more it had.
    fn take_fds(&mut self, at: u64) -> (Vec<OwnedFd>, usize) {
        let mut fds = Vec::new();
        while self.fds.front().is_some_and(|(of, _)| *of == at) {
            fds.extend(self.fds.pop_front().map(|(_, fd)| fd));
        }
        let surplus = match self.surplus.front() {
            Some((of, count)) if *of == at => {
                let count = *count;
                self.surplus.pop_front();
                count
            }
            _ => 0,
        };
        (fds, surplus)
    }

    /// How many bytes have come that no message was made of.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.end - self.start
    }

    /// The stream has ended.
    ///
    /// # Errors
    ///
    /// [`FramingError::Truncated`] if that was within a message.
    pub fn finish(&self) -> Result<(), FramingError> {
        match self.pending() {
            0 => Ok(()),
            received => Err(FramingError::Truncated { received }),
        }
    }
}
