//! The requests that have no answer yet, by id. No I/O.

use super::error::{ClientError, EndError};
use crate::wire::{Command, Errno, Header, Kind};
use std::os::fd::OwnedFd;
use std::thread::Thread;

/// The most requests without an answer.
pub(super) const MAX_PENDING: usize = 1024;

/// The requests that have no answer yet.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Few at a time, so they are looked through.
    entries: Vec<Entry>,
    next_id: u16,
}

#[derive(Debug)]
struct Entry {
    id: u16,
    command: Command,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Its caller waits, or will; the thread if it sleeps.
    Wanted(Option<Thread>),
    /// It was answered.
    Answered(Answer),
    /// Its caller has given up; the answer is still to come.
    GivenUp,
}

/// An answer that somebody else has received.
#[derive(Debug)]
pub(super) struct Answer {
    /// What it says.
    pub(super) outcome: Result<(), Errno>,
    /// Its body.
    pub(super) body: Vec<u8>,
    /// What came with it.
    pub(super) fds: Vec<OwnedFd>,
}

/// What a reply is an answer to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum For {
    /// A request that somebody waits for.
    Wanted,
    /// A request that was given up: nothing is to be done.
    GivenUp,
}

impl Pending {
    /// A new request; its id.
    pub(super) fn begin(&mut self, command: Command) -> Result<u16, ClientError> {
        if self.entries.len() >= MAX_PENDING {
            return Err(ClientError::Busy { command, pending: self.entries.len() });
        }
        // There are more ids than entries.
        while self.entries.iter().any(|entry| entry.id == self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.entries.push(Entry { id, command, state: State::Wanted(None) });
        Ok(id)
    }

    fn find(&mut self, id: u16) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    /// What the reply with this header is an answer to.
    ///
    /// # Errors
    ///
    /// [`EndError`] if it is an answer to nothing: the server is not to be trusted.
    pub(super) fn look_up(&mut self, header: &Header) -> Result<For, EndError> {
        let (id, command) = (header.id, header.command);
        let Some(at) = self.entries.iter().position(|entry| entry.id == id) else {
            return Err(EndError::StrayReply { id, command });
        };
        let expected = self.entries[at].command;
        if command != expected.number() {
            return Err(EndError::WrongCommand { id, command, expected });
        }
        match self.entries[at].state {
            State::Wanted(_) => Ok(For::Wanted),
            // Its id can be used again.
            State::GivenUp => {
                self.entries.swap_remove(at);
                Ok(For::GivenUp)
            }
            State::Answered(_) => Err(EndError::StrayReply { id, command }),
        }
    }

    /// Keeps an answer for whoever waits; the thread to wake.
    pub(super) fn answer(&mut self, id: u16, answer: Answer) -> Option<Thread> {
        let entry = self.find(id)?;
        match std::mem::replace(&mut entry.state, State::Answered(answer)) {
            State::Wanted(thread) => thread,
            State::Answered(_) | State::GivenUp => None,
        }
    }

    /// Takes the answer of a request, if it was kept. The request is over then.
    pub(super) fn take(&mut self, id: u16) -> Option<Answer> {
        let answered = |entry: &Entry| entry.id == id && matches!(entry.state, State::Answered(_));
        let at = self.entries.iter().position(answered)?;
        match self.entries.swap_remove(at).state {
            State::Answered(answer) => Some(answer),
            State::Wanted(_) | State::GivenUp => None,
        }
    }

    /// The request is over: its answer was received by its caller, or it was never sent.
    pub(super) fn remove(&mut self, id: u16) {
        self.entries.retain(|entry| entry.id != id);
    }

    /// Nobody waits for the answer any more.
    pub(super) fn give_up(&mut self, id: u16) {
        let answered = |entry: &Entry| matches!(entry.state, State::Answered(_));
        match self.find(id) {
            Some(entry) if answered(entry) => self.remove(id),
            Some(entry) => entry.state = State::GivenUp,
            None => {}
        }
    }

    /// The caller of a request goes to sleep, or is awake again.
    pub(super) fn set_sleeper(&mut self, id: u16, thread: Option<Thread>) {
        if let Some(Entry { state: State::Wanted(sleeper), .. }) = self.find(id) {
            *sleeper = thread;
        }
    }

    /// One of the callers that sleep, the one that has waited longest first.
    pub(super) fn sleeper(&self) -> Option<Thread> {
        self.entries.iter().find_map(|entry| match &entry.state {
            State::Wanted(thread) => thread.clone(),
            _ => None,
        })
    }

    /// All callers that sleep.
    pub(super) fn sleepers(&self) -> impl Iterator<Item = &Thread> {
        self.entries.iter().filter_map(|entry| match &entry.state {
            State::Wanted(thread) => thread.as_ref(),
            _ => None,
        })
    }
}

/// What a reply says; `None` for a command.
pub(super) fn outcome(kind: Kind) -> Option<Result<(), Errno>> {
    match kind {
        Kind::Done => Some(Ok(())),
        Kind::Refused(errno) => Some(Err(errno)),
        Kind::Command | Kind::Posted => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(id: u16, command: Command) -> Header {
        Header::command(id, command).reply()
    }

    fn answer() -> Answer {
        Answer { outcome: Ok(()), body: vec![7], fds: vec![] }
    }

    #[test]
    fn a_reply_goes_to_its_request() {
        let mut pending = Pending::default();
        let read = pending.begin(Command::RegionRead).expect("room");
        let reset = pending.begin(Command::Reset).expect("room");
        assert_ne!(read, reset);
        assert_eq!(pending.look_up(&reply(reset, Command::Reset)).expect("its own"), For::Wanted);
        assert!(pending.answer(reset, answer()).is_none(), "nobody sleeps");
        assert!(pending.take(read).is_none());
        assert_eq!(pending.take(reset).expect("answered").body, [7]);
        assert!(pending.take(reset).is_none(), "it is over");
    }

    #[test]
    fn a_reply_to_nothing_is_the_end() {
        let mut pending = Pending::default();
        let id = pending.begin(Command::RegionRead).expect("room");
        let stray = pending.look_up(&reply(id + 1, Command::RegionRead));
        assert!(matches!(stray, Err(EndError::StrayReply { .. })), "{stray:?}");
        let wrong = pending.look_up(&reply(id, Command::RegionWrite));
        assert!(matches!(wrong, Err(EndError::WrongCommand { command: 10, .. })), "{wrong:?}");
        // A second answer to the same request.
        pending.answer(id, answer());
        let again = pending.look_up(&reply(id, Command::RegionRead));
        assert!(matches!(again, Err(EndError::StrayReply { .. })), "{again:?}");
    }

    #[test]
    fn the_id_of_a_request_that_was_given_up_is_used_again_when_its_answer_has_come() {
        let mut pending = Pending::default();
        let late = pending.begin(Command::RegionRead).expect("room");
        pending.give_up(late);
        for _ in 0..=u16::MAX {
            let id = pending.begin(Command::Reset).expect("room");
            assert_ne!(id, late);
            pending.remove(id);
        }
        let header = reply(late, Command::RegionRead);
        assert_eq!(pending.look_up(&header).expect("known"), For::GivenUp);
        assert!(matches!(pending.look_up(&header), Err(EndError::StrayReply { .. })));
        // Given up when it has been answered already.
        let id = pending.begin(Command::Reset).expect("room");
        pending.answer(id, answer());
        pending.give_up(id);
        assert!(pending.entries.is_empty());
    }

    #[test]
    fn there_are_not_more_than_so_many() {
        let mut pending = Pending::default();
        for _ in 0..MAX_PENDING {
            let id = pending.begin(Command::Reset).expect("room");
            pending.give_up(id);
        }
        let full = pending.begin(Command::Reset);
        assert!(matches!(full, Err(ClientError::Busy { pending: MAX_PENDING, .. })), "{full:?}");
    }

    #[test]
    fn only_those_that_sleep_and_wait_are_woken() {
        let mut pending = Pending::default();
        let ids: Vec<_> = (0..3).map(|_| pending.begin(Command::Reset).expect("room")).collect();
        assert!(pending.sleeper().is_none());
        pending.set_sleeper(ids[1], Some(std::thread::current()));
        pending.set_sleeper(ids[2], Some(std::thread::current()));
        assert_eq!(pending.sleepers().count(), 2);
        assert!(pending.answer(ids[1], answer()).is_some());
        pending.give_up(ids[2]);
        assert!(pending.sleeper().is_none());
    }
}
