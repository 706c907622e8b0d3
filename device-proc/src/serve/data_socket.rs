//! The data socket of a process, which some transports close and open again.

use crate::vfio_user::ListenError;
use crate::vfio_user::listener::Listener;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The data socket of a process. All clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct DataSocket(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    path: PathBuf,
    listener: Option<Listener>,
    /// The process ends: nobody listens again.
    has_ended: bool,
}

impl DataSocket {
    /// Listens at that path.
    pub(super) fn bind(path: &Path) -> Result<Self, ListenError> {
        let listener = Some(Listener::bind(path)?);
        let state = State { path: path.to_owned(), listener, has_ended: false };
        Ok(Self(Arc::new(Mutex::new(state))))
    }

    /// Listens, if nobody does, and gives out a duplicate of the socket.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        let mut state = self.state();
        if state.has_ended {
            return Err(io::Error::other("the process is ending"));
        }
        let listener = match state.listener.take() {
            Some(listener) => listener,
            None => Listener::bind(&state.path).map_err(io::Error::other)?,
        };
        state.listener.insert(listener).fd().try_clone()
    }

    /// Nobody listens, and the socket's file is gone. Duplicates are the caller's to close.
    pub(crate) fn close(&self) {
        self.state().listener = None;
    }

    /// The same, for good.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.listener = None;
        state.has_ended = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn who_connects_while_it_is_closed_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.sock");
        let socket = DataSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        socket.close();
        assert!(UnixStream::connect(&path).is_err() && !path.exists());
        let duplicate = socket.open().unwrap();
        UnixStream::connect(&path).unwrap();
        drop(duplicate);
        socket.end();
        assert!(socket.open().is_err() && !path.exists());
    }
}
