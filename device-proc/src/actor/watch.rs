//! Tells the actor that the control channel has packets, once until it has looked.

use super::Message;
use super::control::ConnectionId;
use ractor::ActorRef;
use standstill_protocol::channel::{DeviceEnd, Readiness};
use std::io;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// The task that waits for packets; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    handled: mpsc::Sender<bool>,
    task: AbortHandle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It has a reference to the channel, which would stay open until the peer says something.
        self.task.abort();
    }
}

impl Watch {
    pub(super) fn start(
        channel: Arc<DeviceEnd>,
        actor: ActorRef<Message>,
        id: ConnectionId,
    ) -> io::Result<Self> {
        let readiness = Readiness::new(channel)?;
        let (handled, mut answers) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            loop {
                let ready = match readiness.readable().await {
                    Ok(ready) => ready,
                    Err(error) => {
                        // The runtime is shutting down, and the process with it.
                        tracing::debug!(%error, "the control channel is watched no more");
                        return;
                    }
                };
                if actor.cast(Message::Readable(id)).is_err() {
                    return;
                }
                match answers.recv().await {
                    Some(true) => ready.clear(),
                    // There may be more: ready at once, but others had their turn.
                    Some(false) => tokio::task::yield_now().await,
                    None => return,
                }
            }
        });
        Ok(Self { handled, task: task.abort_handle() })
    }

    /// The actor has looked; `emptied` if nothing was left.
    pub(super) fn handled(&self, emptied: bool) {
        // There is room: one answer for each message, and the task takes it before it casts again.
        let _ = self.handled.try_send(emptied);
    }
}
