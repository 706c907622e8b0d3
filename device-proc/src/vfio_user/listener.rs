//! The data socket: its file, who may use it, and what to do about one that is there already.

use rustix::fs::{FileType, Mode, Stat, fchmod, stat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Clients that may wait while one is served.
const BACKLOG: i32 = 4;

/// The longest path of a Unix socket, in bytes.
pub(crate) const LONGEST_PATH: usize = 107;

/// The data socket cannot be made.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Unix sockets have short names.
    #[error("the socket path {path:?} has {length} bytes, at most {LONGEST_PATH} are possible")]
    TooLong {
        /// Where it was to be.
        path: PathBuf,
        /// The path's length in bytes.
        length: usize,
    },
    /// Somebody else serves there.
    #[error("another process serves on {path:?}")]
    InUse {
        /// Where it was to be.
        path: PathBuf,
    },
    /// Something else is there, and is left alone.
    #[error("{path:?} exists and is no socket")]
    NotASocket {
        /// Where it was to be.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on {path:?}")]
    Io {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A listening Unix socket at a path; the file is removed when this is dropped, unless somebody
/// else's has taken its place.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    identity: (u64, u64),
}

impl Listener {
    /// Listens at a path. The socket can be used by this user only (mode 0600). A socket file
    /// that nobody serves any more is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, ListenError> {
        let length = path.as_os_str().len();
        let at = || path.to_path_buf();
        if length > LONGEST_PATH {
            return Err(ListenError::TooLong { path: at(), length });
        }
        let failed = |errno: Errno| ListenError::Io { path: at(), source: errno.into() };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let fd = new_socket().map_err(failed)?;
        // Before bind: the file then never has another mode.
        fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        match bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path, &address)?;
                bind(&fd, &address).map_err(failed)?;
            }
            bound => bound.map_err(failed)?,
        }
        let identity = identity(&stat(path).map_err(failed)?);
        // Removes the file if it does not work out.
        let listener = Self { fd, path: at(), identity };
        listen(&listener.fd, BACKLOG).map_err(failed)?;
        Ok(listener)
    }

    /// The listening socket.
    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = stat(&self.path).is_ok_and(|found| identity(&found) == self.identity);
        if ours && let Err(error) = unlink(&self.path) {
            tracing::warn!(%error, path = ?self.path, "removing the data socket");
        }
    }
}

fn new_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

fn identity(found: &Stat) -> (u64, u64) {
    (found.st_dev, found.st_ino)
}

/// Removes what is at the path if it is a socket that nobody serves.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let at = || path.to_path_buf();
    let failed = |errno: Errno| ListenError::Io { path: at(), source: errno.into() };
    let found = stat(path).map_err(failed)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(ListenError::NotASocket { path: at() });
    }
    let probe = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(failed)?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => unlink(path).map_err(failed),
        // A full backlog is somebody's, too, and so is a socket of another type.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(ListenError::InUse { path: at() }),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn the_socket_is_private_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.sock");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _listener = Listener::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_that_is_served_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.sock");
        let _other = UnixListener::bind(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.sock");
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_path_that_is_too_long_is_named() {
        let path = PathBuf::from(format!("/{}", "x".repeat(200)));
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, ListenError::TooLong { length: 201, .. }), "{error}");
    }

    #[test]
    fn the_file_of_a_successor_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.sock");
        let first = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
