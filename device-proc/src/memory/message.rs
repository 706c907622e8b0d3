//! DMA by messages: what lies in a window without a file is read and written by asking the client.
//!
//! The transport lends the map its connection ([`MemoryMap::connect`]) for as long as it lasts, and
//! implements [`MessageDma`] with the commands `DMA_READ` and `DMA_WRITE`. To the device such a
//! window is like any other, only slower.
//!
//! **Never inside an access handler.** A VMM may serve these messages on the thread that waits for
//! the answer to its access: QEMU does. A handler that asked it would wait until both have given
//! up. So the transport marks its thread while it is in a handler ([`Handling`]), and there such a
//! transaction is an error ([`DmaError::InHandler`]) at once.
//!
//! **Bounded.** One call of an [`Access`](super::Access) waits for at most [`MESSAGE_PATIENCE`],
//! however many messages it needs. When the client wants one of the transaction's windows back
//! (`DMA_UNMAP`), no further message is sent for it, and what was asked is not waited for any more: a
//! client may answer nothing before it has its window back. QEMU does not, and stands still meanwhile.
//!
//! **A transaction with such a window counts as a peer's**: a stop waits, in its first phase, for
//! the answers to what was asked, and nothing is asked after it.
//!
//! Pages that are written this way are the client's to log: it knows of each of them.

#![forbid(unsafe_code)]

use super::dma::{Held, Spans};
use super::span::DmaError;
use super::{MemoryMap, Shared};
use rustix::io::Errno;
use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use thiserror::Error;
use vm_memory::{Bytes, VolatileSlice};

/// How long one call of an [`Access`](super::Access) asks the client. Less than what a client waits
/// for `DMA_UNMAP` or `DEVICE_RESET`, which themselves wait for the transactions in flight.
pub const MESSAGE_PATIENCE: Duration = Duration::from_secs(3);

/// The most bytes that a copy has in hand.
const BUFFER: usize = 64 << 10;

/// How to ask a client to read and write its memory, for as long as it is connected.
///
/// Calls come from the device's threads, several at the same time, and block them. When the client
/// has gone, those that wait and all later ones fail at once with [`MessageError::Gone`].
pub trait MessageDma: Send + Sync {
    /// The most bytes of one message: the client's `max_data_xfer_size`. 0 counts as 1.
    fn max_transfer(&self) -> usize;

    /// Reads `to.len()` bytes, 1 to [`max_transfer`](Self::max_transfer), from the client's memory.
    ///
    /// # Errors
    ///
    /// [`MessageError`]; [`TimedOut`](MessageError::TimedOut) when the deadline has come, whatever
    /// becomes of the message, and [`Unmapping`](MessageError::Unmapping) when it is not wanted any
    /// more.
    fn read(&self, iova: u64, to: &mut [u8], wait: Patience<'_>) -> Result<(), MessageError>;

    /// Writes `from.len()` bytes, 1 to [`max_transfer`](Self::max_transfer), to the client's memory,
    /// and waits until the client has done so.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    fn write(&self, iova: u64, from: &[u8], wait: Patience<'_>) -> Result<(), MessageError>;

    /// Some of what is waited for may not be wanted any more: each call looks at its
    /// [`Patience`] again. Never waits.
    fn look_again(&self);
}

/// How long to wait for the client.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    deadline: Instant,
    spans: &'a Spans,
}

impl fmt::Debug for Patience<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Patience").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Patience<'_> {
    /// Until then.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it is wanted: not once the client wants a window of the transaction back. That it has
    /// changed is told by [`MessageDma::look_again`].
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        !self.spans.iter().any(Held::is_unmapping)
    }
}

/// Why the client did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MessageError {
    /// It said no.
    #[error("the client refused")]
    Refused(#[source] Errno),
    /// It said nothing in time.
    #[error("no answer from the client in time")]
    TimedOut,
    /// It is not there any more.
    #[error("the client has gone")]
    Gone,
    /// It wants a window of the transaction back.
    #[error("the client is unmapping a window of the transaction")]
    Unmapping,
    /// It resets the device.
    #[error("the client resets the device")]
    Resetting,
}

thread_local! {
    /// How many [`Handling`] there are on this thread.
    static HANDLING: Cell<u32> = const { Cell::new(0) };
}

/// While it exists, this thread is inside an access handler: a transaction that needs messages fails
/// here with [`DmaError::InHandler`]. May be nested.
#[derive(Debug)]
#[must_use = "the handler ends when it is dropped"]
pub struct Handling {
    /// It is about one thread.
    _not_send: PhantomData<*const ()>,
}

impl Handling {
    /// The calling thread enters a handler.
    pub fn begin() -> Self {
        HANDLING.set(HANDLING.get().saturating_add(1));
        Self { _not_send: PhantomData }
    }
}

impl Drop for Handling {
    fn drop(&mut self) {
        HANDLING.set(HANDLING.get().saturating_sub(1));
    }
}

fn is_handling() -> bool {
    HANDLING.get() > 0
}

/// A client that can be asked.
pub(super) struct Link {
    client: Arc<dyn MessageDma>,
    gone: AtomicBool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("gone", &self.gone).finish_non_exhaustive()
    }
}

/// The client of one IOVA map, if it can be asked.
#[derive(Debug, Default)]
pub(super) struct Messages {
    link: RwLock<Option<Arc<Link>>>,
}

impl Messages {
    /// Whom to ask for a window without memory.
    #[cold]
    pub(super) fn link(&self, iova: u64) -> Result<Arc<Link>, DmaError> {
        if is_handling() {
            return Err(DmaError::InHandler { iova });
        }
        let link = self.link.read().unwrap_or_else(PoisonError::into_inner);
        link.clone().ok_or(DmaError::NoMemory { iova })
    }

    /// Windows were closed: whoever waits for the client looks whether they are its own.
    pub(super) fn look_again(&self) {
        let link = self.link.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(link) = link {
            link.client.look_again();
        }
    }

    fn replace(&self, link: Option<Arc<Link>>) {
        let mut present = self.link.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = std::mem::replace(&mut *present, link) {
            old.gone.store(true, Ordering::Release);
        }
    }
}

impl MemoryMap {
    /// From now on this client is asked for what lies in windows without a file, in place of the
    /// one before, until what is returned is dropped.
    #[must_use = "the client counts as gone when it is dropped"]
    pub fn connect(&self, client: Arc<dyn MessageDma>) -> MessageLink {
        let link = Arc::new(Link { client, gone: AtomicBool::new(false) });
        self.shared.messages.replace(Some(Arc::clone(&link)));
        MessageLink { shared: Arc::clone(&self.shared), link }
    }
}

/// A connected client; see [`MemoryMap::connect`]. Drop it before the windows are
/// [unmapped](MemoryMap::unmap_all) for a client that has gone: that waits for the transactions in
/// flight, which then fail soon.
#[derive(Debug)]
pub struct MessageLink {
    shared: Arc<Shared>,
    link: Arc<Link>,
}

impl Drop for MessageLink {
    fn drop(&mut self) {
        self.link.gone.store(true, Ordering::Release);
        let messages = &self.shared.messages.link;
        let mut present = messages.write().unwrap_or_else(PoisonError::into_inner);
        present.take_if(|present| Arc::ptr_eq(present, &self.link));
    }
}

/// Where a part of a span is.
pub(super) enum Place<'a> {
    /// In mapped memory.
    Mapped(VolatileSlice<'a>),
    /// At this IOVA of the client, which has to be asked.
    Asked(u64),
}

/// One call's messages to the client.
pub(super) struct Exchange<'a> {
    link: &'a Link,
    /// Of the transaction.
    spans: &'a Spans,
    deadline: Instant,
    /// Of one message, in bytes.
    most: usize,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(link: &'a Link, spans: &'a Spans) -> Self {
        let most = link.client.max_transfer().max(1);
        Self { link, spans, deadline: Instant::now() + MESSAGE_PATIENCE, most }
    }

    pub(super) fn read(&self, mut iova: u64, to: &mut [u8]) -> Result<(), DmaError> {
        for part in to.chunks_mut(self.most) {
            let len = part.len() as u64;
            self.one(iova, len, |client, wait| client.read(iova, part, wait))?;
            iova = iova.wrapping_add(len);
        }
        Ok(())
    }

    pub(super) fn write(&self, mut iova: u64, from: &[u8]) -> Result<(), DmaError> {
        for part in from.chunks(self.most) {
            let len = part.len() as u64;
            self.one(iova, len, |client, wait| client.write(iova, part, wait))?;
            iova = iova.wrapping_add(len);
        }
        Ok(())
    }

    /// Copies `len` bytes between places of which at least one has to be asked for.
    pub(super) fn copy(
        &self,
        from: &Place<'_>,
        to: &Place<'_>,
        len: usize,
    ) -> Result<(), DmaError> {
        let mut buffer = vec![0; len.min(BUFFER)];
        let count = len.div_ceil(BUFFER);
        // As memmove: what is still to be read is not written over.
        let is_backward = matches!((from, to), (Place::Asked(from), Place::Asked(to)) if to > from);
        for number in 0..count {
            let at = BUFFER * if is_backward { count - 1 - number } else { number };
            let Some(part) = buffer.get_mut(..BUFFER.min(len - at)) else { continue };
            // In mapped memory nothing can fail: both places have `len` bytes.
            match from {
                Place::Mapped(memory) => drop(memory.read_slice(part, at)),
                Place::Asked(iova) => self.read(iova + at as u64, part)?,
            }
            match to {
                Place::Mapped(memory) => drop(memory.write_slice(part, at)),
                Place::Asked(iova) => self.write(iova + at as u64, part)?,
            }
        }
        Ok(())
    }

    /// One message, if it may still be sent.
    fn one(
        &self,
        iova: u64,
        len: u64,
        message: impl FnOnce(&dyn MessageDma, Patience<'_>) -> Result<(), MessageError>,
    ) -> Result<(), DmaError> {
        if is_handling() {
            return Err(DmaError::InHandler { iova });
        }
        let wait = Patience { deadline: self.deadline, spans: self.spans };
        let result = if self.link.gone.load(Ordering::Acquire) {
            Err(MessageError::Gone)
        } else if !wait.is_wanted() {
            Err(MessageError::Unmapping)
        } else if Instant::now() >= self.deadline {
            Err(MessageError::TimedOut)
        } else {
            message(&*self.link.client, wait)
        };
        result.map_err(|source| DmaError::Message { iova, len, source })
    }
}
