//! What a device uses: DMA transactions that pass the gate.

#![forbid(unsafe_code)]

use super::dirty::DirtyLogs;
use super::message::{Exchange, Link, Place};
use super::span::{AccessKind, DmaError, MAX_SPANS, Span, outside};
use super::window::Window;
use super::{Shared, WindowClass};
use crate::gate::{Age, InFlight, Permit};
#[cfg(feature = "fault-injection")]
use standstill_protocol::fault::Point;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::Bytes;

/// As many spans are kept without a heap allocation.
const INLINE_SPANS: usize = 4;

/// A device's access to guest RAM and to peers' memory. Clones are cheap and the same.
///
/// Each transaction names all that it will touch and takes one permit for it: a peer's if any of
/// it is a peer's memory, else one for RAM. While the gate is closed for it,
/// [`access`](Self::access) waits and [`try_access`](Self::try_access) fails.
#[derive(Clone, Debug)]
pub struct Dma {
    shared: Arc<Shared>,
}

impl Dma {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Begins a transaction; blocks the calling OS thread while the gate is closed for it.
    ///
    /// Meanwhile it holds neither a window nor a lock, and it looks the spans up again
    /// afterwards. Hold nothing that a register access, a stop or an unmapping waits for. Without
    /// spans it waits for a RAM permit: leave to change the device's state.
    ///
    /// What cannot be accessed counts as a peer's memory: an error, too, is told only while the
    /// gate is open for peers. So a stopped device learns nothing new.
    ///
    /// # Errors
    ///
    /// [`DmaError`] but not [`DmaError::Closed`]. [`DmaError::InHandler`] is told at once, whatever the
    /// gate does.
    pub fn access(&self, spans: &[Span]) -> Result<Access<'_>, DmaError> {
        #[cfg(feature = "fault-injection")]
        reach(spans, Point::Dma);
        let peer = self.shared.gate.peer();
        loop {
            // In here the references to windows come and go.
            let closed = match self.attempt(spans) {
                Ok(access) => return Ok(access),
                Err(Obstacle::Closed(gate)) => gate,
                Err(Obstacle::Error(error @ DmaError::InHandler { .. })) => return Err(error),
                Err(Obstacle::Error(_)) if peer.holds_back() => peer,
                Err(Obstacle::Error(error)) => return Err(error),
            };
            closed.wait_open();
        }
    }

    /// Begins a transaction if the gate is open for it; never waits.
    ///
    /// # Errors
    ///
    /// [`DmaError`]; [`DmaError::Closed`] if the gate is closed for it.
    pub fn try_access(&self, spans: &[Span]) -> Result<Access<'_>, DmaError> {
        #[cfg(feature = "fault-injection")]
        reach(spans, Point::Dma);
        self.attempt(spans).map_err(|obstacle| match obstacle {
            Obstacle::Closed(_) => DmaError::Closed,
            Obstacle::Error(error) => error,
        })
    }

    /// Whether the gate is open for transactions of every kind. It may change at any time.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let gate = &self.shared.gate;
        !gate.peer().is_closed() && !gate.ram().is_closed()
    }

    /// What is behind a range; `None` if no window contains all of it.
    #[must_use]
    pub fn classify(&self, iova: u64, len: u64) -> Option<WindowClass> {
        let last = iova.checked_add(len.checked_sub(1)?)?;
        let window = self.shared.window_at(iova)?;
        (last <= window.spec.last() && !window.users.is_closed()).then(|| window.class())
    }

    /// Looks the spans up, then takes the permit that they need.
    fn attempt(&self, spans: &[Span]) -> Result<Access<'_>, Obstacle<'_>> {
        if spans.len() > MAX_SPANS {
            return Err(DmaError::TooManySpans { spans: spans.len() }.into());
        }
        let mut held = Spans::default();
        let mut class = WindowClass::Ram;
        let mut link = None;
        for span in spans {
            let part = Held::new(&self.shared, span)?;
            if part.user.window.class() == WindowClass::Peer {
                class = WindowClass::Peer;
            }
            if !part.user.window.is_mapped() && link.is_none() {
                link = Some(self.shared.messages.link(span.iova)?);
            }
            held.push(part);
        }
        let gate = match class {
            WindowClass::Ram => self.shared.gate.ram(),
            WindowClass::Peer => self.shared.gate.peer(),
        };
        let permit = gate.try_enter().ok_or(Obstacle::Closed(gate))?;
        #[cfg(feature = "fault-injection")]
        reach(spans, Point::DmaInFlight);
        Ok(Access { spans: held, link, class, dirty: &self.shared.dirty, _permit: permit })
    }
}

/// Without spans it is no DMA. All that can be done there is done by the time this returns.
#[cfg(feature = "fault-injection")]
fn reach(spans: &[Span], point: Point) {
    if !spans.is_empty() {
        crate::fault::pass(point);
    }
}

/// Why a transaction does not begin now.
enum Obstacle<'a> {
    Closed(&'a InFlight),
    Error(DmaError),
}

impl From<DmaError> for Obstacle<'_> {
    fn from(error: DmaError) -> Self {
        Self::Error(error)
    }
}

/// A reference to a window that keeps it from being unmapped.
#[derive(Debug)]
struct WindowUser {
    window: Arc<Window>,
    age: Age,
}

impl WindowUser {
    /// `None` if the window is being unmapped.
    fn new(window: Arc<Window>) -> Option<Self> {
        let age = window.users.try_count_up()?;
        Some(Self { window, age })
    }
}

impl Drop for WindowUser {
    fn drop(&mut self) {
        self.window.users.count_down(self.age);
    }
}

/// A span that was looked up: inside its window, and allowed.
#[derive(Debug)]
pub(super) struct Held {
    user: WindowUser,
    /// Where in the window, in bytes.
    offset: usize,
    len: usize,
    kind: AccessKind,
}

impl Held {
    fn new(shared: &Shared, span: &Span) -> Result<Self, DmaError> {
        let Span { iova, len, kind } = *span;
        let unmapped = DmaError::Unmapped { iova, len };
        let last = len.checked_sub(1).and_then(|more| iova.checked_add(more)).ok_or(unmapped)?;
        let user = shared.window_at(iova).and_then(WindowUser::new).ok_or(unmapped)?;
        let spec = &user.window.spec;
        if last > spec.last() {
            return Err(unmapped);
        }
        if (kind.reads() && !spec.readable) || (kind.writes() && !spec.writable) {
            return Err(DmaError::Forbidden { iova, kind });
        }
        let offset = usize::try_from(iova - spec.iova).map_err(|_| unmapped)?;
        let len = usize::try_from(len).map_err(|_| unmapped)?;
        Ok(Self { user, offset, len, kind })
    }

    /// Part of the span; `None` if it is not inside.
    fn place(&self, offset: usize, len: usize) -> Option<Place<'_>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        let offset = self.offset.checked_add(offset)?;
        let window = &self.user.window;
        match window.is_mapped() {
            true => window.slice(offset, len).map(Place::Mapped),
            false => Some(Place::Asked(window.spec.iova + offset as u64)),
        }
    }

    /// Whether the client wants the window back.
    pub(super) fn is_unmapping(&self) -> bool {
        self.user.window.users.is_closed()
    }
}

/// The spans of a transaction; the first few without a heap allocation.
#[derive(Debug, Default)]
pub(super) struct Spans {
    inline: [Option<Held>; INLINE_SPANS],
    len: usize,
    more: Vec<Held>,
}

impl Spans {
    fn push(&mut self, held: Held) {
        match self.inline.get_mut(self.len) {
            Some(slot) => *slot = Some(held),
            None => self.more.push(held),
        }
        self.len += 1;
    }

    fn get(&self, index: usize) -> Option<&Held> {
        match self.inline.get(index) {
            Some(slot) => slot.as_ref(),
            None => self.more.get(index - INLINE_SPANS),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Held> + Clone {
        self.inline.iter().flatten().chain(&self.more)
    }
}

/// A DMA transaction in progress. While it exists, its windows stay mapped and the gate does not
/// close; so drop it soon. Where writes are tracked, all that it named to be written counts as
/// written when it is dropped.
///
/// Spans are named by their index in the slice that it was begun with, places in them by their
/// offset in bytes. Guest and peers may change the memory at any time: what was read twice may
/// differ.
#[derive(Debug)]
#[must_use = "the transaction ends when it is dropped"]
pub struct Access<'a> {
    // Dropped in this order: a closer of the gate finds no window in use any more.
    spans: Spans,
    /// Whom to ask for windows without memory; there if a span lies in one.
    link: Option<Arc<Link>>,
    class: WindowClass,
    dirty: &'a DirtyLogs,
    _permit: Permit<'a>,
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        // Before the permit goes: when the gate has closed, all marks are made.
        if self.dirty.any() {
            self.mark();
        }
    }
}

impl Access<'_> {
    /// Marks what may have been written.
    #[cold]
    fn mark(&self) {
        let written = self.spans.iter().filter(|held| held.kind.writes());
        self.dirty
            .mark(written.map(|held| (&*held.user.window, held.offset as u64, held.len as u64)));
    }

    /// [`WindowClass::Peer`] if any of the spans is a peer's memory.
    #[must_use]
    pub fn class(&self) -> WindowClass {
        self.class
    }

    /// Copies one whole span to another of the same length, at memory speed where both are mapped.
    /// They may overlap.
    ///
    /// # Errors
    ///
    /// [`DmaError::OutsideSpan`] if there is no such span, the lengths differ, or the spans were
    /// not named for this; and those of [`read`](Self::read) and [`write`](Self::write).
    pub fn copy(&self, from: usize, to: usize) -> Result<(), DmaError> {
        let len = self.spans.get(from).map_or(0, |held| held.len);
        let source = self.readable(from, 0, len)?;
        if self.spans.get(to).is_some_and(|held| held.len != len) {
            return Err(outside(to, 0, len));
        }
        match (source, self.writable(to, 0, len)?) {
            (Place::Mapped(source), Place::Mapped(target)) => {
                source.copy_to_volatile_slice(target);
                Ok(())
            }
            (source, target) => self.exchange(&source)?.copy(&source, &target, len),
        }
    }

    /// Reads a part of a span. Where it has to ask the client, this blocks the calling OS thread,
    /// for at most [`MESSAGE_PATIENCE`](super::MESSAGE_PATIENCE).
    ///
    /// # Errors
    ///
    /// [`DmaError::OutsideSpan`] if it is outside, or the span was not named to be read.
    /// [`DmaError::Message`] and [`DmaError::InHandler`] where the client has to be asked.
    pub fn read(&self, index: usize, offset: u64, to: &mut [u8]) -> Result<(), DmaError> {
        match self.readable(index, offset, to.len())? {
            Place::Mapped(place) => {
                place.copy_to(to);
                Ok(())
            }
            place @ Place::Asked(iova) => self.exchange(&place)?.read(iova, to),
        }
    }

    /// Writes a part of a span; blocks as [`read`](Self::read) does.
    ///
    /// # Errors
    ///
    /// [`DmaError::OutsideSpan`] if it is outside, or the span was not named to be written.
    /// [`DmaError::Message`] and [`DmaError::InHandler`] where the client has to be asked.
    pub fn write(&self, index: usize, offset: u64, from: &[u8]) -> Result<(), DmaError> {
        match self.writable(index, offset, from.len())? {
            Place::Mapped(place) => {
                place.copy_from(from);
                Ok(())
            }
            place @ Place::Asked(iova) => self.exchange(&place)?.write(iova, from),
        }
    }

    /// Loads a little-endian number atomically, with acquire ordering. Where it has to ask the
    /// client, it is one message of 8 bytes, which the client may read in parts.
    ///
    /// # Errors
    ///
    /// [`DmaError::OutsideSpan`] if it is outside, its IOVA is no multiple of 8, or the span was
    /// not named to be read. [`DmaError::Message`] and [`DmaError::InHandler`] where the client has
    /// to be asked.
    pub fn load_u64(&self, index: usize, offset: u64) -> Result<u64, DmaError> {
        let error = outside(index, offset, 8);
        match self.readable(index, offset, 8)? {
            Place::Mapped(place) => {
                place.load(0, Ordering::Acquire).map(u64::from_le).map_err(|_| error)
            }
            place @ Place::Asked(iova) if iova.is_multiple_of(8) => {
                let mut bytes = [0; 8];
                self.exchange(&place)?.read(iova, &mut bytes)?;
                Ok(u64::from_le_bytes(bytes))
            }
            Place::Asked(_) => Err(error),
        }
    }

    /// Stores a number in little endian atomically, with release ordering: who loads it with
    /// acquire ordering sees what was written before. Where it has to ask the client, it is one
    /// message of 8 bytes, which the client may write in parts.
    ///
    /// # Errors
    ///
    /// [`DmaError::OutsideSpan`] if it is outside, its IOVA is no multiple of 8, or the span was
    /// not named to be written. [`DmaError::Message`] and [`DmaError::InHandler`] where the client
    /// has to be asked.
    pub fn store_u64(&self, index: usize, offset: u64, value: u64) -> Result<(), DmaError> {
        let error = outside(index, offset, 8);
        match self.writable(index, offset, 8)? {
            Place::Mapped(place) => {
                place.store(value.to_le(), 0, Ordering::Release).map_err(|_| error)
            }
            place @ Place::Asked(iova) if iova.is_multiple_of(8) => {
                self.exchange(&place)?.write(iova, &value.to_le_bytes())
            }
            Place::Asked(_) => Err(error),
        }
    }

    /// Begins to ask the client. That one of the places needs it has been found out.
    #[cold]
    fn exchange(&self, place: &Place<'_>) -> Result<Exchange<'_>, DmaError> {
        let iova = match place {
            Place::Asked(iova) => *iova,
            Place::Mapped(_) => 0,
        };
        let link = self.link.as_deref().ok_or(DmaError::NoMemory { iova })?;
        Ok(Exchange::new(link, &self.spans))
    }

    fn readable(
        &self,
        index: usize,
        offset: impl TryInto<usize>,
        len: usize,
    ) -> Result<Place<'_>, DmaError> {
        self.part(index, offset, len, AccessKind::reads)
    }

    fn writable(
        &self,
        index: usize,
        offset: impl TryInto<usize>,
        len: usize,
    ) -> Result<Place<'_>, DmaError> {
        self.part(index, offset, len, AccessKind::writes)
    }

    fn part(
        &self,
        index: usize,
        offset: impl TryInto<usize>,
        len: usize,
        allowed: fn(AccessKind) -> bool,
    ) -> Result<Place<'_>, DmaError> {
        let offset = offset.try_into().unwrap_or(usize::MAX);
        self.spans
            .get(index)
            .filter(|held| allowed(held.kind))
            .and_then(|held| held.place(offset, len))
            .ok_or(outside(index, offset, len))
    }
}
