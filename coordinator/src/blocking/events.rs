//! The events of a machine, for a program without async.

use super::inbox::{Inbox, Taken};
use super::thread::MachineThread;
use crate::events::MachineEvent;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// How many events a slow reader may be behind.
const ROOM: usize = 1024;

/// The events of a machine, from the call that gave this on; an iterator that ends with the machine.
///
/// A reader that falls more than 1024 events behind loses the oldest and is told how many, by
/// [`MachineEvent::Missed`].
#[derive(Debug)]
pub struct Events {
    inbox: Arc<Inbox<MachineEvent>>,
    task: AbortHandle,
}

impl Events {
    pub(super) fn of(thread: &MachineThread, events: crate::Events) -> Self {
        let inbox = Arc::new(Inbox::new(ROOM));
        let delivery = Delivery { events, inbox: Arc::clone(&inbox) };
        Self { inbox, task: thread.spawn(delivery.run()) }
    }

    /// Waits for the next event; `None` once the machine is gone and everything was read.
    pub fn recv(&mut self) -> Option<MachineEvent> {
        event(self.inbox.take(None)).ok()
    }

    /// Waits for the next event, at most that long.
    ///
    /// # Errors
    ///
    /// [`RecvTimeoutError::Timeout`] if there was none; [`RecvTimeoutError::Disconnected`] once the
    /// machine is gone and everything was read.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<MachineEvent, RecvTimeoutError> {
        // None: further away than a clock can say, so for ever.
        event(self.inbox.take(Instant::now().checked_add(timeout)))
    }

    /// The next event, if it is there already. Never waits.
    pub fn try_recv(&mut self) -> Option<MachineEvent> {
        event(self.inbox.take(Some(Instant::now()))).ok()
    }

    /// Readable while there is an event to read, and for ever once the machine is gone; for the
    /// program's own `epoll` or `poll`, level-triggered. Only to be polled: reading it would lose
    /// what it says.
    ///
    /// # Errors
    ///
    /// Whatever `eventfd(2)` says at the first call.
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.inbox.fd()
    }
}

fn event(taken: Taken<MachineEvent>) -> Result<MachineEvent, RecvTimeoutError> {
    match taken {
        Taken::Item(event) => Ok(event),
        Taken::Missed(events) => Ok(MachineEvent::Missed { events }),
        Taken::Late => Err(RecvTimeoutError::Timeout),
        Taken::Closed => Err(RecvTimeoutError::Disconnected),
    }
}

impl Iterator for Events {
    type Item = MachineEvent;

    /// As [`recv`](Events::recv).
    fn next(&mut self) -> Option<MachineEvent> {
        self.recv()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Brings events from the machine to the inbox.
struct Delivery {
    events: crate::Events,
    inbox: Arc<Inbox<MachineEvent>>,
}

impl Delivery {
    async fn run(mut self) {
        while let Some(event) = self.events.recv().await {
            self.inbox.push(event);
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        // The machine's thread may end before everything was brought.
        while let Some(event) = self.events.try_recv() {
            self.inbox.push(event);
        }
        self.inbox.close();
    }
}
