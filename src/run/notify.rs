//! What the service manager gets to know (`sd_notify`); nothing happens without one.
//!
//! A thread of its own tells it, so that a service manager that does not read holds nothing up.

use sd_notify::NotifyState;
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// What a service manager sets for this process alone: devices do not inherit it.
pub(crate) const VARIABLES: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
];

/// How many notices may wait for a service manager that does not read; more are left out.
const WAITING: usize = 8;

/// Something to tell.
enum Notice {
    Ready(String),
    Status(String),
    Stopping(String),
    Alive,
}

/// The machine is up, and how it is.
pub(crate) fn ready(status: &str) {
    tell(Notice::Ready(status.to_owned()));
}

/// How the machine is.
pub(crate) fn status(status: &str) {
    tell(Notice::Status(status.to_owned()));
}

/// The machine ends.
pub(crate) fn stopping(status: &str) {
    tell(Notice::Stopping(status.to_owned()));
}

/// This process still does its work.
pub(crate) fn alive() {
    tell(Notice::Alive);
}

/// How often [`alive`] is to be said; twice as often as is asked for.
pub(crate) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|interval| interval / 2)
}

fn tell(notice: Notice) {
    static THREAD: OnceLock<Option<SyncSender<Notice>>> = OnceLock::new();
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    let Some(thread) = THREAD.get_or_init(teller) else { return };
    if let Err(TrySendError::Full(_)) = thread.try_send(notice) {
        tracing::debug!("the service manager does not read");
    }
}

/// The thread that tells; it ends with this process.
fn teller() -> Option<SyncSender<Notice>> {
    let (send, notices) = sync_channel(WAITING);
    let work = move || {
        for notice in notices {
            let told = match &notice {
                Notice::Ready(text) => {
                    sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(text)])
                }
                Notice::Status(text) => sd_notify::notify(&[NotifyState::Status(text)]),
                Notice::Stopping(text) => {
                    sd_notify::notify(&[NotifyState::Stopping, NotifyState::Status(text)])
                }
                Notice::Alive => sd_notify::notify(&[NotifyState::Watchdog]),
            };
            if let Err(error) = told {
                tracing::warn!(%error, "the service manager cannot be told");
            }
        }
    };
    match std::thread::Builder::new().name("notify".to_owned()).spawn(work) {
        Ok(_) => Some(send),
        Err(error) => {
            tracing::warn!(%error, "the service manager cannot be told");
            None
        }
    }
}
