//! What goes to the coordinator, in order.
//!
//! Usually a message is sent at once. Where the coordinator's queue is full it waits here,
//! together with all that comes after it, until there is room: an answer is never lost. The place
//! is bounded; a coordinator that lets it fill up does not read at all.

use standstill_protocol::channel::{AsyncChannel, DeviceEnd, FromFdError, SendError};
use standstill_protocol::message::DeviceMessage;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// The most messages that wait.
pub(super) const MOST_WAITING: usize = 256;

/// A message to the coordinator was not sent and never will be.
#[derive(Debug, Error)]
pub enum OutboxError {
    /// The coordinator does not read.
    #[error("the coordinator does not read: more than {MOST_WAITING} messages wait for it")]
    Full,
    /// The channel failed.
    #[error("the control channel failed")]
    Send(#[from] SendError),
    /// The control channel's socket could not be duplicated.
    #[error("the control channel cannot be watched for room")]
    Watch(#[source] io::Error),
    /// What was duplicated is not what it was.
    #[error("the control channel cannot be watched for room")]
    Duplicate(#[from] FromFdError),
}

pub(super) struct Outbox {
    channel: Arc<DeviceEnd>,
    /// Told if a message that had to wait could not be sent in the end.
    failed: Arc<dyn Fn(OutboxError) + Send + Sync>,
    /// How many messages wait: the sending task's to count down.
    waiting: Arc<AtomicUsize>,
    /// Made when it is needed for the first time.
    queue: Option<Queue>,
}

/// The way to the sending task, which ends when this is dropped: it may wait for a coordinator that
/// does not read, and has a reference to the connection.
#[derive(Debug)]
struct Queue {
    sender: mpsc::Sender<DeviceMessage>,
    task: AbortHandle,
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Outbox {
    /// `failed` is told if a message that had to wait could not be sent in the end.
    pub(super) fn new(
        channel: Arc<DeviceEnd>,
        failed: impl Fn(OutboxError) + Send + Sync + 'static,
    ) -> Self {
        Self { channel, failed: Arc::new(failed), waiting: Arc::default(), queue: None }
    }

    /// Sends now if that is possible, and otherwise later; always in order. Never waits.
    pub(super) fn send(&mut self, message: DeviceMessage) -> Result<(), OutboxError> {
        if self.waiting.load(Ordering::Acquire) == 0 {
            match self.channel.try_send(&message, &[]) {
                Err(SendError::WouldBlock) => {}
                sent => return Ok(sent?),
            }
        }
        self.send_later(message)
    }

    #[cold]
    fn send_later(&mut self, message: DeviceMessage) -> Result<(), OutboxError> {
        let queue = match &self.queue {
            Some(queue) => queue,
            None => self.queue.insert(self.start()?),
        };
        self.waiting.fetch_add(1, Ordering::AcqRel);
        queue.sender.try_send(message).map_err(|_| OutboxError::Full)
    }

    /// Where it sends to.
    #[cfg(feature = "fault-injection")]
    pub(super) fn channel(&self) -> &DeviceEnd {
        &self.channel
    }

    /// Sends now or not at all. True if it was sent.
    pub(super) fn try_send(&self, message: &DeviceMessage) -> Result<bool, OutboxError> {
        if self.waiting.load(Ordering::Acquire) != 0 {
            return Ok(false);
        }
        match self.channel.try_send(message, &[]) {
            Err(SendError::WouldBlock) => Ok(false),
            sent => Ok(sent.map(|()| true)?),
        }
    }

    /// The task that sends what waits. It has a registration of its own with the runtime: the
    /// actor's is for reading.
    fn start(&self) -> Result<Queue, OutboxError> {
        let failed = Arc::clone(&self.failed);
        let second = self.channel.as_fd().try_clone_to_owned().map_err(OutboxError::Watch)?;
        let second = DeviceEnd::from_fd(second)?;
        second.set_version(self.channel.version());
        let second = AsyncChannel::new(second).map_err(OutboxError::Watch)?;
        let (sender, mut waiting) = mpsc::channel(MOST_WAITING);
        let count = Arc::clone(&self.waiting);
        let task = tokio::spawn(async move {
            while let Some(message) = waiting.recv().await {
                if let Err(error) = second.send(&message, &[]).await {
                    failed(error.into());
                    return;
                }
                count.fetch_sub(1, Ordering::AcqRel);
            }
        });
        Ok(Queue { sender, task: task.abort_handle() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_protocol::channel::CoordinatorEnd;
    use standstill_protocol::message::{Heartbeat, MemoryAccepted};
    use std::time::Duration;

    fn pair() -> (CoordinatorEnd, Outbox) {
        let (coordinator, device) = CoordinatorEnd::pair().unwrap();
        let device = DeviceEnd::from_fd(device).unwrap();
        coordinator.set_version(1);
        device.set_version(1);
        let failed = |error| panic!("{error}");
        (coordinator, Outbox::new(Arc::new(device), failed))
    }

    fn numbered(sequence: u64) -> DeviceMessage {
        DeviceMessage::MemoryAccepted(MemoryAccepted { sequence })
    }

    #[tokio::test]
    async fn what_finds_no_room_waits_and_keeps_its_order() {
        let (coordinator, mut outbox) = pair();
        let mut sent = 0;
        while outbox.waiting.load(Ordering::Acquire) < 3 {
            outbox.send(numbered(sent)).unwrap();
            sent += 1;
        }
        let beat = Heartbeat { sequence: 0, progress: 0, pending: false, dropped_logs: 0 };
        assert!(!outbox.try_send(&DeviceMessage::Heartbeat(beat)).unwrap(), "dropped, not queued");

        let received = tokio::task::spawn_blocking(move || {
            let next = || coordinator.recv(Duration::from_secs(10)).unwrap().message;
            (0..sent).map(|_| next()).collect::<Vec<_>>()
        });
        let expected: Vec<_> = (0..sent).map(numbered).collect();
        assert_eq!(received.await.unwrap(), expected);
    }

    #[tokio::test]
    async fn a_coordinator_that_never_reads_is_given_up() {
        let (_coordinator, mut outbox) = pair();
        let error = (0..100_000).find_map(|i| outbox.send(numbered(i)).err()).unwrap();
        assert!(matches!(error, OutboxError::Full), "{error}");
    }
}
