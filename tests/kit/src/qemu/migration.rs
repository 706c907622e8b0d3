//! Guests that move from one QEMU to another, or into a file and out of it.
//!
//! The QEMU at the other end is described as the first one was, and as
//! [`incoming`](super::GuestBuilder::incoming). Its devices are served by processes of their own.

use super::guest::{Guest, GuestError};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

impl Guest {
    /// Begins to receive a guest: from whoever connects to a Unix socket (`unix:PATH`), or from a file
    /// (`file:PATH`).
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`](super::Qmp::execute).
    pub fn begin_to_receive(&self, uri: &str) -> Result<(), GuestError> {
        self.tell_migration()?;
        self.qmp().execute("migrate-incoming", &json!({ "uri": uri }))?;
        Ok(())
    }

    /// Begins to send this guest, which runs on until little of it is left: to a Unix socket
    /// (`unix:PATH`), or into a file (`file:PATH`).
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`](super::Qmp::execute).
    pub fn begin_to_send(&self, uri: &str) -> Result<(), GuestError> {
        self.tell_migration()?;
        self.qmp().execute("migrate", &json!({ "uri": uri }))?;
        Ok(())
    }

    /// How fast it is sent, in bytes for each second; at a rate that is low enough it never ends.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`](super::Qmp::execute).
    pub fn limit_migration(&self, rate: u64) -> Result<(), GuestError> {
        self.qmp().execute("migrate-set-parameters", &json!({ "max-bandwidth": rate }))?;
        Ok(())
    }

    /// Waits until the migration is at that point, such as `active` or `completed`.
    ///
    /// # Errors
    ///
    /// If it fails, or does not come there in that time.
    pub fn wait_for_migration(&self, point: &str, within: Duration) -> Result<(), GuestError> {
        let end = Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let event = self.qmp().wait_for("MIGRATION", left)?;
            let status = event["data"]["status"].as_str().unwrap_or_default();
            if status == point {
                return Ok(());
            }
            if ["completed", "failed", "cancelled"].contains(&status) {
                let why = self.qmp().execute("query-migrate", &json!({}))?;
                return Err(GuestError::Migration { status: status.to_owned(), why: text(&why) });
            }
        }
    }

    /// Moves it to a QEMU that waits for it, by a socket at this path. Returns when it runs there.
    ///
    /// # Errors
    ///
    /// If it does not move in that time.
    pub fn move_to(&self, to: &Self, socket: &Path, within: Duration) -> Result<(), GuestError> {
        let uri = format!("unix:{}", socket.display());
        to.begin_to_receive(&uri)?;
        self.begin_to_send(&uri)?;
        self.wait_for_migration("completed", within)?;
        to.goes_on_here(within)
    }

    /// Waits until a guest that was sent here runs.
    ///
    /// # Errors
    ///
    /// If it does not come in that time.
    pub fn goes_on_here(&self, within: Duration) -> Result<(), GuestError> {
        self.wait_for_migration("completed", within)?;
        self.qmp().wait_for("RESUME", within)?;
        Ok(())
    }

    /// Has QEMU say how far it is.
    fn tell_migration(&self) -> Result<(), GuestError> {
        let events = json!({ "capability": "events", "state": true });
        self.qmp().execute("migrate-set-capabilities", &json!({ "capabilities": [events] }))?;
        Ok(())
    }
}

fn text(why: &Value) -> String {
    why["error-desc"].as_str().map_or_else(|| why.to_string(), str::to_owned)
}
