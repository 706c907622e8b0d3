//! Interrupt lines of a device: INTx, MSI and MSI-X (and the error and request lines of VFIO), each an
//! eventfd that the client has installed.
//!
//! The device raises interrupts ([`Interrupts::raise`],
//! [`Interrupts::raise_msi`], [`Interrupts::set_intx`]); the runtime
//! installs eventfds for the client ([`Interrupts::set_irqs`]) and freezes and thaws the whole.
//!
//! **None is lost.** While frozen, an interrupt is latched. After the thaw it is raised on the
//! eventfd that is installed *then*, at least once; as long as none is installed, it stays
//! latched. [`Interrupts::latched`] is part of a device's saved state. INTx works by level: what
//! counts is whether the line is asserted.
//!
//! **Some were never meant to arrive**: a vector that is raised while it runs and has no
//! eventfd is dropped, as VFIO does. A masked vector is latched until it is unmasked. INTx masks
//! itself when it is raised (`VFIO_IRQ_INFO_AUTOMASKED`) and is raised again when it is unmasked
//! while the line is still asserted.
//!
//! A device that raises an interrupt for a DMA transaction should do so before it drops the
//! [`Access`](crate::memory::Access): then the stop of the device, which waits for that, has
//! either seen it raised or finds it latched.

#![forbid(unsafe_code)]

mod eventfd;

pub use eventfd::SetIrqsError;
pub use standstill_vfio_user::wire::irq::{
    ACTION_MASK, ACTION_TRIGGER, ACTION_UNMASK, DATA_BOOL, DATA_EVENTFD, DATA_NONE, IrqCounts,
    IrqError, IrqIndex, IrqOperation, IrqRequest, SET_IRQS_SIZE, Selection, SetIrqs, validate,
};

use crate::gate::{InFlight, Permit};
use eventfd::EventFd;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;

/// The most MSI-X vectors that PCI knows.
pub const MAX_MSIX_VECTORS: u16 = 2048;
/// The most MSI vectors that PCI knows.
pub const MAX_MSI_VECTORS: u16 = 32;

/// The interrupts of one device. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Interrupts {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Counts those being raised; closed while frozen.
    raising: InFlight,
    /// Held for bookkeeping only, never across a system call.
    lines: Mutex<Lines>,
}

/// All lines, by index.
#[derive(Debug)]
struct Lines {
    has_intx: bool,
    intx: Line,
    /// Whether the device asserts INTx.
    intx_asserted: bool,
    msi: Vec<Line>,
    msix: Vec<Line>,
    error: Line,
    request: Line,
    /// Sum over all lines of what was raised.
    raised: u64,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            has_intx: true,
            intx: Line::default(),
            intx_asserted: false,
            msi: Vec::new(),
            msix: Vec::new(),
            error: Line::default(),
            request: Line::default(),
            raised: 0,
        }
    }
}

#[derive(Debug, Default)]
struct Line {
    eventfd: Option<Arc<EventFd>>,
    masked: bool,
    /// Wants to be raised when it is possible.
    latched: bool,
    raised: u64,
}

/// Why a line is to be raised.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// The device or the client just asked for it.
    New,
    /// It was latched before.
    Latched,
}

/// Interrupts that wait to be raised; part of a device's saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latched {
    /// Whether INTx is asserted.
    pub intx: bool,
    /// MSI-X vectors, ascending; at most [`MAX_MSIX_VECTORS`].
    pub msix: Vec<u16>,
    /// MSI vectors, ascending; at most [`MAX_MSI_VECTORS`].
    pub msi: Vec<u16>,
}

impl Latched {
    /// Whether each vector is there once, in its place: there is one way to write the same.
    pub(crate) fn is_in_order(&self) -> bool {
        let ascend = |vectors: &[u16]| vectors.is_sorted_by(|one, next| one < next);
        ascend(&self.msix) && ascend(&self.msi)
    }
}

/// Saved interrupts that this device does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("interrupt {vector} of index {index:?}: this device has {vectors}")]
pub struct NoVector {
    /// Of which index.
    pub index: IrqIndex,
    /// Which one.
    pub vector: u32,
    /// How many there are.
    pub vectors: usize,
}

impl Interrupts {
    /// INTx only; see [`set_counts`](Self::set_counts).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how many interrupts the device has; at most [`MAX_MSI_VECTORS`] and
    /// [`MAX_MSIX_VECTORS`] count. The runtime does so once, when it knows the device. What was
    /// installed or latched is gone.
    pub fn set_counts(&self, counts: IrqCounts) {
        let fresh = |vectors: u16| {
            std::iter::repeat_with(Line::default).take(usize::from(vectors)).collect()
        };
        let lines = Lines {
            has_intx: counts.intx > 0,
            msi: fresh(counts.msi.min(MAX_MSI_VECTORS)),
            msix: fresh(counts.msix.min(MAX_MSIX_VECTORS)),
            ..Lines::default()
        };
        let old = std::mem::replace(&mut *self.lines(), lines);
        drop(old);
    }

    /// Raises an MSI-X vector. Never waits: while frozen or masked it is latched, without an
    /// eventfd or beyond the device's vectors it is dropped.
    pub fn raise(&self, vector: u16) {
        self.raise_line(IrqIndex::Msix, u32::from(vector));
    }

    /// Raises an MSI vector, as [`raise`](Self::raise) does an MSI-X one. A client that has fewer of
    /// them enabled than the device has installs no eventfd for the others.
    pub fn raise_msi(&self, vector: u16) {
        self.raise_line(IrqIndex::Msi, u32::from(vector));
    }

    /// Asserts INTx or takes it back. Never waits. A device without INTx has nothing to assert.
    pub fn set_intx(&self, asserted: bool) {
        let mut lines = self.lines();
        let asserted = asserted && lines.has_intx;
        let was = std::mem::replace(&mut lines.intx_asserted, asserted);
        lines.intx.latched &= asserted;
        drop(lines);
        if asserted && !was {
            self.raise_line(IrqIndex::Intx, 0);
        }
    }

    /// Tells the client that the device has failed. Never waits.
    pub fn report_error(&self) {
        self.raise_line(IrqIndex::Error, 0);
    }

    /// How many interrupts were raised on eventfds since this was made.
    #[must_use]
    pub fn raised(&self) -> u64 {
        self.lines().raised
    }

    /// How many of them by that MSI-X vector.
    #[must_use]
    pub fn raised_by(&self, vector: u16) -> u64 {
        self.lines().msix.get(usize::from(vector)).map_or(0, |line| line.raised)
    }

    /// Carries out a request of the client, with `data` for `DATA_BOOL` and the fds that came
    /// with it. Works while frozen, too; what it fires is then latched.
    ///
    /// # Errors
    ///
    /// [`SetIrqsError`]; nothing has changed then.
    pub fn set_irqs(
        &self,
        request: &SetIrqs,
        data: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), SetIrqsError> {
        let counts = self.lines().counts();
        let IrqRequest { index, range, operation } =
            validate(request, data.len(), fds.len(), counts)?;
        // Looked at outside the lock, and all of them before any is installed.
        let eventfds = fds.into_iter().map(EventFd::new).collect::<Result<Vec<_>, _>>()?;
        let selected = |selection: Selection| {
            range.clone().enumerate().filter(move |(at, _)| match selection {
                Selection::All => true,
                Selection::ByData => data.get(*at).is_some_and(|byte| *byte != 0),
            })
        };
        match operation {
            IrqOperation::Disable => {
                let lines = 0..index.count(counts);
                lines.for_each(|at| self.install(index, at, None));
            }
            IrqOperation::Remove => range.for_each(|at| self.install(index, at, None)),
            IrqOperation::Install => {
                for (at, eventfd) in range.zip(eventfds) {
                    self.install(index, at, Some(eventfd));
                }
            }
            IrqOperation::Fire(which) => {
                selected(which).for_each(|(_, at)| self.raise_line(index, at));
            }
            IrqOperation::Mask(which) => {
                let mut lines = self.lines();
                for (_, at) in selected(which) {
                    if let Ok(line) = lines.line(index, at) {
                        line.masked = true;
                    }
                }
            }
            IrqOperation::Unmask(which) => {
                selected(which).for_each(|(_, at)| self.unmask(index, at));
            }
        }
        Ok(())
    }

    /// From when this returns, no interrupt is raised until the [thaw](Self::thaw): they are
    /// latched. Completes without yielding if none is just being raised.
    pub async fn freeze(&self) {
        self.close();
        self.shared.raising.drained().await;
    }

    /// No interrupt begins to be raised until the [thaw](Self::thaw): they are latched. One that is
    /// just being raised is not waited for.
    pub(crate) fn close(&self) {
        self.shared.raising.close();
    }

    /// What is being raised counts here.
    #[cfg(test)]
    pub(crate) fn raising(&self) -> &InFlight {
        &self.shared.raising
    }

    /// Raises interrupts again, first those that were latched. Never waits.
    pub fn thaw(&self) {
        self.shared.raising.open();
        let counts = self.lines().counts();
        for index in IrqIndex::ALL {
            (0..index.count(counts)).for_each(|at| self.deliver_latched(index, at));
        }
    }

    /// Whether they are frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.shared.raising.is_closed()
    }

    /// What waits to be raised, to be saved with the device.
    #[must_use]
    pub fn latched(&self) -> Latched {
        let lines = self.lines();
        let latched = |lines: &[Line]| {
            let vectors = (0..MAX_MSIX_VECTORS).zip(lines);
            vectors.filter(|(_, line)| line.latched).map(|(vector, _)| vector).collect()
        };
        Latched { intx: lines.intx_asserted, msix: latched(&lines.msix), msi: latched(&lines.msi) }
    }

    /// Takes over what was saved, in place of what is latched now; the interrupts are raised at
    /// the next [thaw](Self::thaw). Call it while frozen.
    ///
    /// # Errors
    ///
    /// [`NoVector`] if the device has no such interrupt; nothing has changed then.
    pub fn restore(&self, latched: &Latched) -> Result<(), NoVector> {
        let mut lines = self.lines();
        let intx = latched.intx.then_some((IrqIndex::Intx, 0));
        let msi = latched.msi.iter().map(|vector| (IrqIndex::Msi, u32::from(*vector)));
        let msix = latched.msix.iter().map(|vector| (IrqIndex::Msix, u32::from(*vector)));
        let all: Vec<_> = intx.into_iter().chain(msi).chain(msix).collect();
        for (index, at) in &all {
            lines.line(*index, *at)?;
        }
        lines.clear();
        lines.intx_asserted = latched.intx;
        for (index, at) in all {
            lines.line(index, at)?.latched = true;
        }
        Ok(())
    }

    /// Forgets all that waits to be raised, and takes INTx back: the device was reset. Eventfds
    /// stay.
    pub fn reset(&self) {
        self.lines().clear();
    }

    /// Closes all eventfds and unmasks all lines: the client has gone. What is latched while
    /// frozen stays, for the next client.
    pub fn release(&self) {
        let frozen = self.is_frozen();
        let mut lines = self.lines();
        let keep_intx = lines.intx_asserted;
        let old: Vec<_> = lines
            .all()
            .map(|line| {
                line.masked = false;
                line.latched &= frozen;
                line.eventfd.take()
            })
            .collect();
        lines.intx.latched = keep_intx;
        drop(lines);
        // Closed without the lock.
        drop(old);
    }

    /// Raises one line, whatever index it belongs to, or latches it.
    fn raise_line(&self, index: IrqIndex, at: u32) {
        loop {
            if let Some(permit) = self.shared.raising.try_enter() {
                return self.raise_now(index, at, Why::New, &permit);
            }
            let mut lines = self.lines();
            // The thaw opens before it takes this lock and looks at the lines: so it either finds
            // this latch or is seen here.
            if self.is_frozen() {
                if let Ok(line) = lines.line(index, at) {
                    line.latched = true;
                }
                return;
            }
        }
    }

    /// Raises one line if it is latched and can be raised now.
    fn deliver_latched(&self, index: IrqIndex, at: u32) {
        if let Some(permit) = self.shared.raising.try_enter() {
            self.raise_now(index, at, Why::Latched, &permit);
        }
    }

    /// Raises one line, or finds out why not. The permit keeps the freeze waiting.
    fn raise_now(&self, index: IrqIndex, at: u32, why: Why, _permit: &Permit<'_>) {
        let mut lines = self.lines();
        let asserted = lines.intx_asserted;
        let Ok(line) = lines.line(index, at) else {
            return;
        };
        if why == Why::Latched && !line.latched {
            return;
        }
        let (Some(eventfd), false) = (line.eventfd.clone(), line.masked) else {
            line.latched = match (index, why) {
                // By level: raised for whoever comes or unmasks it while it is asserted.
                (IrqIndex::Intx, _) => asserted,
                (_, Why::Latched) => true,
                // One that waits already waits on.
                (_, Why::New) => line.latched || line.masked,
            };
            return;
        };
        line.latched = false;
        line.masked = index == IrqIndex::Intx;
        line.raised += 1;
        lines.raised += 1;
        drop(lines);
        eventfd.signal();
    }

    fn install(&self, index: IrqIndex, at: u32, eventfd: Option<EventFd>) {
        let frozen = self.is_frozen();
        let mut lines = self.lines();
        let asserted = lines.intx_asserted;
        let Ok(line) = lines.line(index, at) else {
            return;
        };
        // While frozen, and for INTx, what waits belongs to the eventfd that comes next.
        let removed = eventfd.is_none();
        let old = std::mem::replace(&mut line.eventfd, eventfd.map(Arc::new));
        if index == IrqIndex::Intx {
            line.masked = false;
            line.latched = asserted;
        } else if removed && !frozen {
            line.masked = false;
            line.latched = false;
        }
        drop(lines);
        drop(old);
        self.deliver_latched(index, at);
    }

    fn unmask(&self, index: IrqIndex, at: u32) {
        let mut lines = self.lines();
        let asserted = lines.intx_asserted;
        let Ok(line) = lines.line(index, at) else {
            return;
        };
        line.masked = false;
        if index == IrqIndex::Intx {
            line.latched = asserted;
        }
        drop(lines);
        self.deliver_latched(index, at);
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.shared.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    fn line(&mut self, index: IrqIndex, at: u32) -> Result<&mut Line, NoVector> {
        let vectors = usize::try_from(index.count(self.counts())).unwrap_or(0);
        match index {
            IrqIndex::Intx => Some(&mut self.intx).filter(|_| self.has_intx),
            IrqIndex::Msi => usize::try_from(at).ok().and_then(|at| self.msi.get_mut(at)),
            IrqIndex::Msix => usize::try_from(at).ok().and_then(|at| self.msix.get_mut(at)),
            IrqIndex::Error => Some(&mut self.error),
            IrqIndex::Request => Some(&mut self.request),
        }
        .ok_or(NoVector { index, vector: at, vectors })
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Line> {
        let single = [&mut self.intx, &mut self.error, &mut self.request];
        single.into_iter().chain(&mut self.msi).chain(&mut self.msix)
    }

    fn counts(&self) -> IrqCounts {
        let count = |lines: &[Line]| u16::try_from(lines.len()).unwrap_or(MAX_MSIX_VECTORS);
        IrqCounts { intx: self.has_intx.into(), msi: count(&self.msi), msix: count(&self.msix) }
    }

    fn clear(&mut self) {
        self.intx_asserted = false;
        self.all().for_each(|line| line.latched = false);
        self.intx.masked = false;
    }
}

#[cfg(test)]
mod tests;
