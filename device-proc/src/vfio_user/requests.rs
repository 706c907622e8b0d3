//! What this end asks of the client: `DMA_READ` and `DMA_WRITE`.
//!
//! The device's threads send over the client's connection and wait; the transport's thread finds
//! the replies among what it receives and hands each to whoever waits for it, by its id. A reply
//! that nobody waits for is dropped: an id is not used again before its reply has come, so that a
//! late one is never taken for another.

use super::link::{LinkError, Outgoing};
use crate::memory::{MessageDma, MessageError, Patience};
use rustix::io::Errno;
use standstill_vfio_user::wire::{Command, DmaAccess, Header, Kind};
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The most requests without a reply, waited for or not. A client that leaves so many unanswered is
/// asked no more.
const MOST: usize = 4096;

/// The requests of one connection.
#[derive(Debug)]
pub(super) struct Requests {
    outgoing: Arc<Outgoing>,
    /// The most bytes of one transfer.
    limit: u32,
    pending: Mutex<Pending>,
    /// Something in there has changed that somebody waits for.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    gone: bool,
    /// The client waits for the end of a reset, and may answer nothing before it.
    resetting: bool,
    next: u16,
    sent: HashMap<u16, Sent>,
}

#[derive(Debug)]
struct Sent {
    command: Command,
    access: DmaAccess,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Somebody waits for the reply.
    Awaited,
    /// Nobody does any more.
    GivenUp,
    /// It has come: the data of a read.
    Answered(Result<Vec<u8>, Errno>),
}

impl Requests {
    pub(super) fn new(outgoing: Arc<Outgoing>, limit: u32) -> Self {
        Self { outgoing, limit, pending: Mutex::default(), changed: Condvar::new() }
    }

    /// The client has gone: whoever waits need not.
    pub(super) fn gone(&self) {
        self.pending().gone = true;
        self.changed.notify_all();
    }

    /// The client resets the device, or has done so: meanwhile whoever waits need not, and nothing is
    /// asked.
    pub(super) fn set_resetting(&self, resetting: bool) {
        self.pending().resetting = resetting;
        self.changed.notify_all();
    }

    /// Takes a reply.
    pub(super) fn answer(&self, header: &Header, kind: Kind, body: &[u8]) {
        let mut pending = self.pending();
        let id = header.id;
        let Some(sent) = pending.sent.get_mut(&id) else {
            return tracing::debug!(id, command = header.command, "a reply that nobody waits for");
        };
        if header.command != sent.command.number() || matches!(sent.state, State::Answered(_)) {
            return tracing::debug!(id, command = header.command, "a reply to something else");
        }
        if matches!(sent.state, State::GivenUp) {
            pending.sent.remove(&id);
            return;
        }
        sent.state = State::Answered(match kind {
            Kind::Refused(errno) => Err(Errno::from_raw_os_error(
                errno.number().try_into().unwrap_or(Errno::IO.raw_os_error()),
            )),
            _ => self.read_reply(sent.command, sent.access, body),
        });
        drop(pending);
        self.changed.notify_all();
    }

    fn read_reply(&self, command: Command, due: DmaAccess, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let decoded = match command {
            Command::DmaRead => DmaAccess::decode_with_data(body, self.limit),
            _ => DmaAccess::decode_plain(body, self.limit).map(|access| (access, &[][..])),
        };
        match decoded {
            Ok((access, data)) if access == due => Ok(data.to_vec()),
            _ => Err(Errno::PROTO),
        }
    }

    /// Sends a request and waits for its reply: the data of a read.
    fn call(
        &self,
        command: Command,
        access: DmaAccess,
        data: &[u8],
        patience: Patience<'_>,
    ) -> Result<Vec<u8>, MessageError> {
        let id = self.register(command, access)?;
        let mut message = Vec::new();
        Header::command(id, command).encode_message(&mut message, 0, |body| {
            access.encode(body);
            body.extend_from_slice(data);
        });
        if let Err(error) = self.outgoing.send_by(&message, &[], Some(patience.deadline())) {
            self.pending().sent.remove(&id);
            let text = crate::log::with_causes(&error);
            tracing::warn!(error = text, "{command} is not sent");
            return Err(match error {
                LinkError::Late => MessageError::TimedOut,
                _ => MessageError::Gone,
            });
        }
        self.wait(id, patience)
    }

    /// A free id for a request that is about to be sent.
    fn register(&self, command: Command, access: DmaAccess) -> Result<u16, MessageError> {
        let mut pending = self.pending();
        if pending.gone {
            return Err(MessageError::Gone);
        }
        if pending.resetting {
            return Err(MessageError::Resetting);
        }
        if pending.sent.len() >= MOST {
            return Err(MessageError::TimedOut);
        }
        // There are fewer than there are ids.
        while pending.sent.contains_key(&pending.next) {
            pending.next = pending.next.wrapping_add(1);
        }
        let id = pending.next;
        pending.next = id.wrapping_add(1);
        pending.sent.insert(id, Sent { command, access, state: State::Awaited });
        Ok(id)
    }

    fn wait(&self, id: u16, patience: Patience<'_>) -> Result<Vec<u8>, MessageError> {
        let mut pending = self.pending();
        loop {
            let (gone, resetting) = (pending.gone, pending.resetting);
            match pending.sent.get_mut(&id) {
                Some(Sent { state: State::Answered(_), .. }) => {
                    return match pending.sent.remove(&id).map(|sent| sent.state) {
                        Some(State::Answered(answer)) => answer.map_err(MessageError::Refused),
                        _ => Err(MessageError::Gone),
                    };
                }
                Some(_) if gone => {
                    pending.sent.remove(&id);
                    return Err(MessageError::Gone);
                }
                Some(sent) => {
                    let rest = patience.deadline().saturating_duration_since(Instant::now());
                    let given_up = if resetting {
                        Some(MessageError::Resetting)
                    } else if !patience.is_wanted() {
                        Some(MessageError::Unmapping)
                    } else {
                        rest.is_zero().then_some(MessageError::TimedOut)
                    };
                    if let Some(why) = given_up {
                        sent.state = State::GivenUp;
                        return Err(why);
                    }
                    let slept = self.changed.wait_timeout(pending, rest);
                    pending = slept.unwrap_or_else(PoisonError::into_inner).0;
                }
                None => return Err(MessageError::Gone),
            }
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MessageDma for Requests {
    fn max_transfer(&self) -> usize {
        usize::try_from(self.limit).unwrap_or(usize::MAX)
    }

    fn read(&self, iova: u64, to: &mut [u8], wait: Patience<'_>) -> Result<(), MessageError> {
        let access = DmaAccess { address: iova, count: to.len() as u64 };
        let data = self.call(Command::DmaRead, access, &[], wait)?;
        // As many as were asked for: that was compared.
        to.copy_from_slice(data.get(..to.len()).ok_or(MessageError::Refused(Errno::PROTO))?);
        Ok(())
    }

    fn write(&self, iova: u64, from: &[u8], wait: Patience<'_>) -> Result<(), MessageError> {
        let access = DmaAccess { address: iova, count: from.len() as u64 };
        self.call(Command::DmaWrite, access, from, wait).map(|_| ())
    }

    fn look_again(&self) {
        // Whoever has not seen it sleeps by now.
        drop(self.pending());
        self.changed.notify_all();
    }
}
