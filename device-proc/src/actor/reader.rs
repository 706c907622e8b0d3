//! The thread that reads the control channel, and does what a packet asks for.
//!
//! It blocks in the receive itself: a command costs one receive and one send, and no thread has to
//! wake another. A process that has slept is cold in the CPU's caches, and in a machine of many
//! devices that is what a phase costs: each task, timer or poll on the way of a command is paid by
//! every device.
//!
//! It shares the [`State`] with the actor, and has it for as long as one packet takes. So signs of
//! life, which the actor gives, cease when this thread hangs with a packet.

use super::control::ConnectionId;
use super::{ActorError, Shared, State};
use crate::device::Device;
use rustix::net::{Shutdown, shutdown};
use standstill_protocol::channel::{DeviceEnd, Received, RecvError, prefer_short_waits};
use standstill_protocol::message::CoordinatorMessage;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;

/// The reading thread of one connection; it ends soon after this is dropped.
#[derive(Debug)]
pub(super) struct Reader {
    channel: Arc<DeviceEnd>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Its receive ends. Nothing changes for the peer: what it was sent is still there, and the
        // end of the channel comes when the thread has let go of it.
        if let Err(error) = shutdown(&*self.channel, Shutdown::Read) {
            tracing::debug!(%error, "the end of a control channel");
        }
    }
}

impl Reader {
    /// Begins to read. To be called on the runtime on which tasks are to be started.
    pub(super) fn start<D: Device>(
        channel: Arc<DeviceEnd>,
        shared: Weak<Shared<D>>,
        id: ConnectionId,
    ) -> io::Result<Self> {
        // A fuzz target reads in the thread's place: every run of an input is the same.
        #[cfg(fuzzing)]
        if super::fuzzing::reads_in_place() {
            return Ok(Self { channel });
        }
        Self::spawn(Arc::clone(&channel), shared, id)?;
        Ok(Self { channel })
    }

    fn spawn<D: Device>(
        read: Arc<DeviceEnd>,
        shared: Weak<Shared<D>>,
        id: ConnectionId,
    ) -> io::Result<()> {
        let runtime = Handle::current();
        std::thread::Builder::new().name("control".into()).spawn(move || {
            // The device's own data threads may leave no CPU idle.
            if let Err(error) = prefer_short_waits() {
                tracing::debug!(%error, "no short waits for the control thread");
            }
            let _inside = runtime.enter();
            loop {
                let received = read.recv(Duration::MAX);
                // If the state is gone, so is the process.
                let Some(shared) = shared.upgrade() else { return };
                if !shared.lock().take(id, received) {
                    return;
                }
            }
        })?;
        Ok(())
    }
}

impl<D: Device> State<D> {
    /// Takes what came over a connection. False if nothing more is to be read from it.
    pub(super) fn take(
        &mut self,
        id: ConnectionId,
        received: Result<Received<CoordinatorMessage>, RecvError>,
    ) -> bool {
        // What is left of an earlier connection counts no more.
        if self.ended.is_none() || !self.is_present(id) {
            return false;
        }
        match received {
            Ok(received) => self.received(id, received),
            Err(RecvError::Disconnected) => {
                tracing::warn!("the coordinator has closed the control channel");
                self.disconnected();
            }
            Err(error) => self.lose(ActorError::Protocol(error)),
        }
        self.ended.is_some() && self.is_present(id)
    }
}
