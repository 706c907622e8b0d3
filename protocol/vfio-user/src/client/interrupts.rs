//! Interrupts.

use super::{Client, ClientError};
use crate::wire::irq::{
    ACTION_MASK, ACTION_TRIGGER, ACTION_UNMASK, DATA_EVENTFD, DATA_NONE, SET_IRQS_SIZE,
};
use crate::wire::{Command, IrqInfo, Query, SetIrqs, WireError};
use std::os::fd::BorrowedFd;

impl Client {
    /// How many interrupts an index has, and how they work.
    ///
    /// # Errors
    ///
    /// [`ClientError`], also for an answer about another index.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        const COMMAND: Command = Command::GetIrqInfo;
        let query = Query { argsz: u32::try_from(IrqInfo::SIZE).unwrap_or(0), index };
        let ask = |body: &mut Vec<u8>| query.encode(IrqInfo::SIZE, body);
        self.call(COMMAND, &[], ask, |body, _| {
            let info = IrqInfo::decode(body)?;
            let (what, value) = (COMMAND.name(), u64::from(info.index));
            let other = WireError::Field { what, field: "index", value };
            if info.index == index { Ok(info) } else { Err(other) }
        })
    }

    /// Any request for interrupts, with its data and fds as they are. Its `argsz` is made here.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn set_irqs(
        &self,
        request: &SetIrqs,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let argsz = SET_IRQS_SIZE.saturating_add(u32::try_from(data.len()).unwrap_or(u32::MAX));
        let request = SetIrqs { argsz, ..*request };
        let ask = |body: &mut Vec<u8>| request.encode(body);
        self.call_with_data(Command::SetIrqs, data, fds, ask, |_, _| Ok(()))
    }

    fn set(&self, flags: u32, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        let request = SetIrqs { argsz: 0, flags, index, start, count };
        self.set_irqs(&request, &[], &[])
    }

    /// Installs an eventfd for each interrupt from `start`. More of them than the server takes in
    /// one message go in several.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; with more than one message, some may have been installed.
    pub fn irq_install(
        &self,
        index: u32,
        start: u32,
        eventfds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let most = usize::try_from(self.server().max_msg_fds()).unwrap_or(1).max(1);
        let mut at = start;
        for some in eventfds.chunks(most) {
            let count = u32::try_from(some.len()).unwrap_or(u32::MAX);
            let flags = DATA_EVENTFD | ACTION_TRIGGER;
            let request = SetIrqs { argsz: 0, flags, index, start: at, count };
            self.set_irqs(&request, &[], some)?;
            at = at.saturating_add(count);
        }
        Ok(())
    }

    /// Removes the eventfds of some interrupts.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn irq_remove(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set(DATA_EVENTFD | ACTION_TRIGGER, index, start, count)
    }

    /// Removes all eventfds of an index.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn irq_disable(&self, index: u32) -> Result<(), ClientError> {
        self.set(DATA_NONE | ACTION_TRIGGER, index, 0, 0)
    }

    /// Has interrupts raised now.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn irq_trigger(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set(DATA_NONE | ACTION_TRIGGER, index, start, count)
    }

    /// Masks interrupts: what is raised meanwhile is kept.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn irq_mask(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set(DATA_NONE | ACTION_MASK, index, start, count)
    }

    /// Unmasks interrupts.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn irq_unmask(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set(DATA_NONE | ACTION_UNMASK, index, start, count)
    }
}
