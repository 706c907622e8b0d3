//! `SET_DEVICE_STATE_FD` and `CHECK_DEVICE_STATE`: the state that a frontend carries itself.
//!
//! It is the same stream that `Save` writes and `Load` reads ([docs/state-format.md]); the transfer
//! goes on beside the connection, on a thread of its own.
//!
//! [docs/state-format.md]: https://github.com/standstill-vmm/standstill/blob/main/docs/state-format.md

#![forbid(unsafe_code)]

use crate::actor::parts::Parts;
use crate::actor::transfer::{Direction, transfer};
use crate::device::Device;
use std::fs::File;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;
use vhost::vhost_user::message::VhostTransferStateDirection;

/// How long a transfer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The transfer that goes on, or was not asked about yet.
#[derive(Debug, Default)]
pub(super) struct Transfers(Mutex<Option<Receiver<Result<(), String>>>>);

impl Transfers {
    /// Begins one, unless the last one goes on: each has a thread and two fds. An error is a text.
    pub(super) fn begin<D: Device>(
        &self,
        parts: &Arc<Parts<D>>,
        direction: VhostTransferStateDirection,
        file: File,
    ) -> Result<(), String> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wait) = &*last
            && matches!(wait.try_recv(), Err(TryRecvError::Empty))
        {
            return Err("another transfer goes on".into());
        }
        let direction = match direction {
            VhostTransferStateDirection::SAVE => Direction::Save,
            VhostTransferStateDirection::LOAD => Direction::Load,
        };
        let (done, wait) = sync_channel(1);
        let parts = Arc::clone(parts);
        let work = move || {
            // The end of the file is what the frontend waits for: `transfer` drops it.
            let result = transfer(&parts, direction, file.into(), PATIENCE);
            // The frontend may never ask.
            let _ = done.send(result);
        };
        Builder::new()
            .name("device-state".into())
            .spawn(work)
            .map_err(|error| error.to_string())?;
        *last = Some(wait);
        Ok(())
    }

    /// Waits for the end of the last one. An error is a text.
    pub(super) fn wait(&self) -> Result<(), String> {
        let wait = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let wait = wait.ok_or("no transfer was begun")?;
        wait.recv_timeout(PATIENCE).unwrap_or_else(|_| Err("the transfer did not end".into()))
    }
}
