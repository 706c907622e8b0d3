//! Messages that have come while another one was carried out, and wait for their turn.

use standstill_vfio_user::framing::{FramingError, Message};
use standstill_vfio_user::wire::{Command, Header, Kind};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// How many messages wait at most.
const MOST: usize = 1024;
/// How many bytes they have at most, but for one message.
const MOST_BYTES: u64 = 1 << 20;

/// How many fds come with them at most, but for one message: they are missing elsewhere.
const MOST_FDS: usize = 64;

/// A message of its own.
#[derive(Debug)]
pub(super) struct Waiting {
    header: Header,
    kind: Kind,
    body: Box<[u8]>,
    fds: Vec<OwnedFd>,
}

impl Waiting {
    pub(super) fn new(message: Message<'_>) -> Self {
        let Message { header, kind, body, fds } = message;
        Self { header, kind, body: body.into(), fds }
    }

    /// As it has come; the fds are in there.
    pub(super) fn message(&mut self) -> Message<'_> {
        let fds = std::mem::take(&mut self.fds);
        Message { header: self.header, kind: self.kind, body: &self.body, fds }
    }

    /// How many bytes it has, header included.
    pub(super) fn size(&self) -> u64 {
        self.header.size.into()
    }

    /// Whether it writes, and nobody waits for an answer.
    pub(super) fn is_posted_write(&self) -> bool {
        let command = Command::from_number(self.header.command);
        let writes = matches!(command, Some(Command::RegionWrite | Command::RegionWriteMulti));
        writes && self.kind == Kind::Posted
    }
}

/// What waits, in the order in which it has come.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    messages: VecDeque<Result<Waiting, FramingError>>,
    bytes: u64,
    fds: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// How many bytes there are, headers included.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nothing more is to be read. Behind a message that leaves the stream out of step there
    /// is nothing more.
    pub(super) fn is_full(&self) -> bool {
        let is_last = |message: &Result<Waiting, FramingError>| {
            message.as_ref().is_err_and(|error| !error.is_in_step())
        };
        self.messages.len() >= MOST
            || self.bytes >= MOST_BYTES
            || self.fds >= MOST_FDS
            || self.messages.back().is_some_and(is_last)
    }

    pub(super) fn push(&mut self, message: Result<Waiting, FramingError>) {
        self.bytes += size(&message);
        self.fds += fds(&message);
        self.messages.push_back(message);
    }

    pub(super) fn pop(&mut self) -> Option<Result<Waiting, FramingError>> {
        let message = self.messages.pop_front()?;
        self.bytes -= size(&message);
        self.fds -= fds(&message);
        Some(message)
    }
}

fn size(message: &Result<Waiting, FramingError>) -> u64 {
    match message {
        Ok(waiting) => waiting.size(),
        Err(error) => refused_size(error),
    }
}

fn fds(message: &Result<Waiting, FramingError>) -> usize {
    message.as_ref().map_or(0, |waiting| waiting.fds.len())
}

/// How many bytes of the stream a message had that is refused.
pub(super) fn refused_size(error: &FramingError) -> u64 {
    match error {
        FramingError::Type { header } | FramingError::TooManyFds { header, .. } => {
            header.size.into()
        }
        FramingError::Size { .. } | FramingError::Truncated { .. } => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn waiting(fds: usize) -> Result<Waiting, FramingError> {
        let header = Header::command(1, Command::DmaMap);
        let fds = (0..fds).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
        Ok(Waiting::new(Message { header, kind: Kind::Command, body: &[], fds }))
    }

    #[test]
    fn fds_fill_it_too_and_are_counted_until_they_are_taken() {
        let mut backlog = Backlog::default();
        (0..3).for_each(|_| backlog.push(waiting(16)));
        backlog.push(waiting(15));
        assert!(!backlog.is_full());
        backlog.push(waiting(1));
        assert!(backlog.is_full());
        let Some(Ok(mut first)) = backlog.pop() else { panic!("the first of five") };
        assert_eq!(first.message().fds.len(), 16);
        assert!(!backlog.is_full());
    }
}
