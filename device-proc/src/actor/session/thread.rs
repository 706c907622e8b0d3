//! The thread of a session: it writes or reads the stream, and this is what the stream looks like to it.

use super::super::parts::Parts;
use super::super::stream::{Saver, Sink, StreamError, load};
use super::{ROOM, STARVING, Session, Stage, take};
use crate::device::Device;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;

/// The other end of a session's bytes, for the code that writes or reads a stream.
struct Bytes<'a>(&'a Session);

fn gone() -> io::Error {
    io::Error::new(ErrorKind::BrokenPipe, "the client has ended the state stream")
}

impl Write for Bytes<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Self(session) = self;
        let mut state = session.lock();
        loop {
            if state.closed {
                return Err(gone());
            }
            let length = data.len().min(ROOM - state.bytes.len());
            if length > 0 || data.is_empty() {
                state.bytes.extend(&data[..length]);
                session.changed.notify_all();
                return Ok(length);
            }
            state = session.wait(state);
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Bytes<'_> {
    fn still_wanted(&self) -> io::Result<()> {
        if self.0.is_open() { Ok(()) } else { Err(gone()) }
    }

    fn ends_pass(&self) -> bool {
        self.0.lock().stage != Stage::PreCopy
    }

    fn is_starving(&self) -> bool {
        let state = self.0.lock();
        let since = state.reading_since.filter(|_| state.stage == Stage::StopCopy);
        !state.closed && since.is_some_and(|since| since.elapsed() >= STARVING)
    }
}

impl Read for Bytes<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let Self(session) = self;
        let mut state = session.lock();
        loop {
            if state.closed {
                return Err(gone());
            }
            let length = take(&mut state.bytes, data);
            if length > 0 || data.is_empty() || state.input_ended {
                session.changed.notify_all();
                return Ok(length);
            }
            state = session.wait(state);
        }
    }
}

/// What the thread of a session that saves does.
pub(super) fn save<D: Device>(parts: &Parts<D>, session: &Arc<Session>) -> Result<(), StreamError> {
    let closed = || StreamError::Write(gone());
    let mut saver = Saver::new(parts);
    session.lock().progress = Some(Arc::clone(saver.progress()));
    let _turn = parts.saving.take(|| session.is_open()).ok_or_else(closed)?;
    loop {
        let stage = {
            let mut state = session.lock();
            if std::mem::take(&mut state.start_over) {
                saver.start_over();
            }
            state.stage
        };
        if stage == Stage::StopCopy {
            return saver.finish(parts, &mut Bytes(session));
        }
        saver.pre_copy(parts, &mut Bytes(session))?;
        let mut state = session.lock();
        state.idle = true;
        state.passes += 1;
        session.changed.notify_all();
        while state.idle && state.stage == Stage::PreCopy && !state.closed {
            state = session.wait(state);
        }
        if state.closed {
            return Err(closed());
        }
    }
}

/// What the thread of a session that loads does.
pub(super) fn take_over<D: Device>(
    parts: &Parts<D>,
    session: &Arc<Session>,
) -> Result<(), StreamError> {
    let turn = parts.loading.take(|| session.is_open());
    let _turn = turn.ok_or_else(|| StreamError::Read(gone()))?;
    load(parts, Bytes(session))
}
