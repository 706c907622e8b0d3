//! The client's state stream, in band: what the transport reads of it and writes to it, piece by
//! piece, with a thread between the transport and the device's hooks.
//!
//! The control side opens, moves on and ends a [`Session`] as the client's state changes
//! ([`ClientStream::moved`]); the transport reads or writes it and never waits longer than it
//! says. The session's thread is started with the first byte that the client asks for or brings.
//! It does what the coordinator's `Save` and `Load` do, so the bytes are the same; what it has
//! written and nobody has read, or the other way round, is in a buffer of [`ROOM`] bytes.
//!
//! **Nothing left now.** While the device runs a stream is written in passes. A read that comes to
//! the end of a pass is short; the next one begins another pass. Looking for what has changed takes
//! time, and the transport has other things to do: a read in PRE_COPY waits for [`PASS_PATIENCE`]
//! at most, and is short if nothing was found by then. While a stop waits for the transport
//! ([`ClientStream::hurry`]) it does not wait, and begins no pass. In STOP_COPY a short read is the stream's end: a
//! read that waits longer than [`STARVING`] while nothing but unchanged memory is found is given padding.
//!
//! **A hook that hangs** keeps the session's thread, and nothing else: reads and writes end with
//! ETIMEDOUT and take nothing, a commit fails, and the threads of later sessions wait for it
//! ([`Turn`](super::turn::Turn)) and end with their session.

mod thread;

use super::parts::Parts;
use super::stream::{Progress, StreamError};
use crate::device::Device;
use crate::log;
use rustix::io::Errno;
use standstill_protocol::message::{Refusal, RefusalKind};
use standstill_protocol::migration::MigrationState;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// The most bytes that wait in a session. More than one message of the client has.
const ROOM: usize = 2 << 20;

/// How long a read waits while a running device is looked through.
const PASS_PATIENCE: Duration = Duration::from_millis(200);

/// How long a read in STOP_COPY waits before padding is written for it.
const STARVING: Duration = Duration::from_secs(1);

/// How much there is to be saved, about, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MigrationSize {
    /// What would have to be read in STOP_COPY if the device were stopped now.
    pub(crate) stop_copy: u64,
    /// What is left of the first pass.
    pub(crate) initial: u64,
    /// What had changed since, as far as is known.
    pub(crate) dirty: u64,
}

/// The client's state stream, while one is open.
#[derive(Debug, Default)]
pub(crate) struct ClientStream {
    session: Mutex<Option<Arc<Session>>>,
    /// How many stops wait for the transport, which reads.
    hurries: AtomicUsize,
}

/// While it exists, reads in PRE_COPY do not wait.
#[derive(Debug)]
#[must_use = "the hurry ends when it is dropped"]
pub(crate) struct Hurry<'a>(&'a ClientStream);

impl Drop for Hurry<'_> {
    fn drop(&mut self) {
        self.0.hurries.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Which way a stream goes, and how far the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    PreCopy,
    StopCopy,
    Resuming,
}

impl Stage {
    fn of(state: MigrationState) -> Option<Self> {
        match state {
            MigrationState::PreCopy | MigrationState::PreCopyP2p => Some(Self::PreCopy),
            MigrationState::StopCopy => Some(Self::StopCopy),
            MigrationState::Resuming => Some(Self::Resuming),
            _ => None,
        }
    }

    fn is_saving(self) -> bool {
        self != Self::Resuming
    }
}

/// One state stream.
#[derive(Debug)]
struct Session {
    state: Mutex<SessionState>,
    /// Something is different now.
    changed: Condvar,
    /// The outcome is there.
    decided: Notify,
}

#[derive(Debug)]
struct SessionState {
    stage: Stage,
    /// It has a thread.
    started: bool,
    /// Nobody wants the stream any more.
    closed: bool,
    bytes: VecDeque<u8>,
    /// Saving: since when a read waits.
    reading_since: Option<Instant>,
    /// Saving: how many passes have ended.
    passes: u64,
    /// Saving: the pass has ended.
    idle: bool,
    /// Saving: the client knows that, and a read of it begins the next.
    is_short: bool,
    /// Saving: the device was reset since the last pass.
    start_over: bool,
    /// Saving: what is left.
    progress: Option<Arc<Progress>>,
    /// Loading: no more comes.
    input_ended: bool,
    /// How it has ended.
    outcome: Option<Result<(), String>>,
}

impl ClientStream {
    fn slot(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on no read in PRE_COPY waits: what the device has written already is all that there
    /// is.
    pub(crate) fn hurry(&self) -> Hurry<'_> {
        self.hurries.fetch_add(1, Ordering::SeqCst);
        let session = self.slot().clone();
        if let Some(session) = session {
            // Whoever has not seen it sleeps by now.
            drop(session.lock());
            session.changed.notify_all();
        }
        Hurry(self)
    }

    fn is_in_a_hurry(&self) -> bool {
        self.hurries.load(Ordering::SeqCst) > 0
    }

    fn session(&self, saving: bool) -> Result<Arc<Session>, Errno> {
        let session = self.slot().clone().ok_or(Errno::INVAL)?;
        let fits = session.lock().stage.is_saving() == saving;
        if fits { Ok(session) } else { Err(Errno::INVAL) }
    }

    /// The client's state has changed: opens, moves on or ends the stream. Says whether it has
    /// opened one that replaces what the device contains.
    pub(crate) fn moved(&self, to: MigrationState) -> bool {
        let mut slot = self.slot();
        let Some(stage) = Stage::of(to) else {
            if let Some(session) = slot.take() {
                session.close();
            }
            return false;
        };
        match &*slot {
            Some(session) if session.lock().stage.is_saving() == stage.is_saving() => {
                session.lock().stage = stage;
                session.changed.notify_all();
                false
            }
            _ => {
                if let Some(session) = slot.replace(Arc::new(Session::new(stage))) {
                    session.close();
                }
                stage == Stage::Resuming
            }
        }
    }

    /// The device was reset: what was saved of it counts no more.
    pub(crate) fn start_over(&self) {
        if let Some(session) = &*self.slot() {
            session.lock().start_over = true;
        }
    }

    /// The device is to be reset. Ends a stream that is being loaded, since what has come of it is
    /// not wanted any more, and one that is being saved of a stopped device, since a part of it may
    /// have been read already. Says whether a stream goes on: that of a device that runs.
    pub(crate) fn before_reset(&self) -> bool {
        let Some(session) = self.slot().clone() else { return false };
        let stage = session.lock().stage;
        match stage {
            Stage::PreCopy => return true,
            Stage::StopCopy => session.decide(Err(StreamError::Reset)),
            Stage::Resuming => {}
        }
        session.close();
        false
    }

    /// Reads what there is, up to `data.len()` bytes; see the [module](self).
    ///
    /// # Errors
    ///
    /// EINVAL if the client is not saving, EIO if the state cannot be saved, ETIMEDOUT if the device
    /// gives nothing in time; then nothing was read.
    pub(crate) fn read<D: Device>(
        &self,
        parts: &Arc<Parts<D>>,
        data: &mut [u8],
        patience: Duration,
    ) -> Result<usize, Errno> {
        let session = self.session(true)?;
        if self.is_in_a_hurry() && session.is_waiting_to_begin() {
            return Ok(0);
        }
        session.start(parts, thread::save)?;
        session.read(data, Instant::now(), patience, || self.is_in_a_hurry())
    }

    /// Writes all of `data`, or nothing.
    ///
    /// # Errors
    ///
    /// EINVAL if the client is not loading, the state is bad, or `data` is longer than [`ROOM`];
    /// ETIMEDOUT if the device does not take it in time.
    pub(crate) fn write<D: Device>(
        &self,
        parts: &Arc<Parts<D>>,
        data: &[u8],
        patience: Duration,
    ) -> Result<(), Errno> {
        let session = self.session(false)?;
        session.start(parts, thread::take_over)?;
        session.write(data, patience)
    }

    /// How much there is to be saved.
    pub(crate) fn size<D: Device>(&self, parts: &Parts<D>) -> MigrationSize {
        let device = parts.device.state_size();
        let whole = super::stream::memory_size(parts);
        let all = whole.saturating_add(device.running).saturating_add(device.stopped);
        let Ok(session) = self.session(true) else {
            return MigrationSize { stop_copy: all, initial: 0, dirty: 0 };
        };
        let state = session.lock();
        let waiting = state.bytes.len() as u64;
        let Some(progress) = &state.progress else {
            return MigrationSize { stop_copy: all, initial: all - device.stopped, dirty: 0 };
        };
        let (first, later) = if state.passes < 2 { (waiting, 0) } else { (0, waiting) };
        let initial = progress.unsent().saturating_add(first);
        let dirty = progress.changed().saturating_add(device.running).saturating_add(later);
        let stop_copy = initial.saturating_add(dirty).saturating_add(device.stopped);
        MigrationSize { stop_copy, initial, dirty }
    }

    /// What loads the stream is told that no more comes, and says whether all is well.
    ///
    /// # Errors
    ///
    /// What is wrong with the state.
    pub(crate) async fn commit(&self) -> Result<(), Refusal> {
        let Ok(session) = self.session(false) else { return Ok(()) };
        let ended = session.commit().await;
        ended.map_err(|text| Refusal { kind: RefusalKind::Stream, text })
    }
}

impl Session {
    fn new(stage: Stage) -> Self {
        let state = SessionState {
            stage,
            started: false,
            closed: false,
            bytes: VecDeque::new(),
            reading_since: None,
            passes: 0,
            idle: false,
            is_short: false,
            start_over: false,
            progress: None,
            input_ended: false,
            outcome: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), decided: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, SessionState>) -> MutexGuard<'a, SessionState> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something is different, but not longer than until then.
    fn wait_until<'a>(
        &self,
        state: MutexGuard<'a, SessionState>,
        end: Instant,
    ) -> (MutexGuard<'a, SessionState>, bool) {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (state, false);
        }
        let waited = self.changed.wait_timeout(state, left);
        (waited.unwrap_or_else(PoisonError::into_inner).0, true)
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.bytes = VecDeque::new();
        drop(state);
        self.changed.notify_all();
        self.decided.notify_waiters();
    }

    fn is_open(&self) -> bool {
        !self.lock().closed
    }

    fn decide(&self, outcome: Result<(), StreamError>) {
        let outcome = outcome.map_err(|error| log::with_causes(&error));
        let mut state = self.lock();
        if let (Err(error), false) = (&outcome, state.closed) {
            tracing::warn!(error, "the client's state stream");
        }
        // What has come after a stream's end is no part of it.
        let outcome = outcome.and_then(|()| match state.stage {
            Stage::Resuming if !state.bytes.is_empty() => Err(StreamError::Long.to_string()),
            _ => Ok(()),
        });
        state.outcome = Some(outcome);
        drop(state);
        self.changed.notify_all();
        self.decided.notify_waiters();
    }

    /// Gives it a thread, if it has none.
    fn start<D: Device>(
        self: &Arc<Self>,
        parts: &Arc<Parts<D>>,
        work: fn(&Parts<D>, &Arc<Self>) -> Result<(), StreamError>,
    ) -> Result<(), Errno> {
        let mut state = self.lock();
        if state.started || state.closed {
            return Ok(());
        }
        let (session, parts) = (Arc::clone(self), Arc::clone(parts));
        let thread = Builder::new().name("state".into());
        let spawned = thread.spawn(move || {
            let outcome = work(&parts, &session);
            // Before anybody is told: whoever waits for the outcome may wait for the parts' end.
            drop(parts);
            session.decide(outcome);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread can be made for the client's state stream");
            return Err(Errno::AGAIN);
        }
        state.started = true;
        Ok(())
    }

    /// Whether the first pass has still to begin.
    fn is_waiting_to_begin(&self) -> bool {
        let state = self.lock();
        !state.started && state.stage == Stage::PreCopy
    }

    fn read(
        &self,
        data: &mut [u8],
        begin: Instant,
        patience: Duration,
        hurries: impl Fn() -> bool,
    ) -> Result<usize, Errno> {
        self.lock().reading_since = Some(begin);
        let read = self.read_some(data, begin, patience, hurries);
        self.lock().reading_since = None;
        read
    }

    fn read_some(
        &self,
        data: &mut [u8],
        begin: Instant,
        patience: Duration,
        hurries: impl Fn() -> bool,
    ) -> Result<usize, Errno> {
        let mut state = self.lock();
        if state.is_short && state.idle && state.stage == Stage::PreCopy && !hurries() {
            // The client was told that there was nothing left: it asks for more.
            state.idle = false;
            self.changed.notify_all();
        }
        state.is_short = false;
        let mut filled = 0;
        loop {
            if state.closed {
                let is_void = matches!(state.outcome, Some(Err(_)));
                return Err(if is_void { Errno::IO } else { Errno::INVAL });
            }
            filled += take(&mut state.bytes, &mut data[filled..]);
            if filled == data.len() {
                self.changed.notify_all();
                return Ok(filled);
            }
            match (&state.outcome, state.stage) {
                (Some(Err(_)), _) => return Err(Errno::IO),
                (Some(Ok(())), _) => return Ok(filled),
                (None, Stage::PreCopy) if state.idle => {
                    state.is_short = true;
                    return Ok(filled);
                }
                (None, _) => {}
            }
            self.changed.notify_all();
            let patience = match state.stage {
                Stage::PreCopy if hurries() => Duration::ZERO,
                Stage::PreCopy => patience.min(PASS_PATIENCE),
                _ => patience,
            };
            let waited;
            (state, waited) = self.wait_until(state, begin + patience);
            if waited {
                continue;
            }
            if state.stage == Stage::PreCopy {
                state.is_short = true;
                return Ok(filled);
            }
            // Short would be the end. What was taken is put back.
            for byte in data[..filled].iter().rev() {
                state.bytes.push_front(*byte);
            }
            return Err(Errno::TIMEDOUT);
        }
    }

    fn write(&self, data: &[u8], patience: Duration) -> Result<(), Errno> {
        if data.len() > ROOM {
            return Err(Errno::INVAL);
        }
        let end = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if state.closed || state.input_ended {
                return Err(Errno::INVAL);
            }
            match &state.outcome {
                None => {}
                Some(Ok(())) if data.is_empty() => return Ok(()),
                Some(Ok(())) => {
                    state.outcome = Some(Err(StreamError::Long.to_string()));
                    return Err(Errno::INVAL);
                }
                Some(Err(_)) => return Err(Errno::INVAL),
            }
            if data.len() <= ROOM - state.bytes.len() {
                state.bytes.extend(data);
                self.changed.notify_all();
                return Ok(());
            }
            let waited;
            (state, waited) = self.wait_until(state, end);
            if !waited {
                return Err(Errno::TIMEDOUT);
            }
        }
    }

    async fn commit(&self) -> Result<(), String> {
        {
            let mut state = self.lock();
            state.input_ended = true;
            if !state.started {
                return Err(StreamError::Short.to_string());
            }
        }
        self.changed.notify_all();
        loop {
            let decided = self.decided.notified();
            // Made before the look at the outcome: from now on the wake-up is not missed.
            let mut decided = std::pin::pin!(decided);
            decided.as_mut().enable();
            {
                let state = self.lock();
                if let Some(outcome) = &state.outcome {
                    return outcome.clone();
                }
                if state.closed {
                    return Err("the state stream was given up".into());
                }
            }
            decided.await;
        }
    }
}

/// Moves bytes from one to the other; how many.
fn take(from: &mut VecDeque<u8>, to: &mut [u8]) -> usize {
    let length = from.len().min(to.len());
    let (first, second) = from.as_slices();
    let of_first = length.min(first.len());
    to[..of_first].copy_from_slice(&first[..of_first]);
    to[of_first..length].copy_from_slice(&second[..length - of_first]);
    from.drain(..length);
    length
}

#[cfg(test)]
mod tests;
