//! Where a later coordinator finds a device process: a listening socket with a path.
//!
//! The coordinator of the time binds the path ([`bind`]) and passes the socket with its `Welcome`;
//! the device process listens on it ([`ControlListener`]). So the device needs no rights in the
//! file system, and `SO_PEERCRED` shows the device process to whoever connects: it shows whoever
//! called `listen(2)`.

use super::{CoordinatorEnd, DeviceEnd, FromFdError};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, listen,
    socket_with,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// How many coordinators may wait to be accepted.
const BACKLOG: i32 = 8;

/// Binds a socket for a device's [`Welcome`](crate::message::Welcome); it does not listen yet. A
/// socket of a process that is gone is replaced.
///
/// Who may connect is decided by the rights of the folder and of the socket: keep both to their
/// owner. The device checks the credentials besides.
///
/// # Errors
///
/// `AddrInUse` if somebody listens there, or the path is no socket; those of bind(2) otherwise, and
/// `InvalidInput` for a path of more than 107 bytes.
pub fn bind(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = seqpacket(SocketFlags::CLOEXEC)?;
    match rustix::net::bind(&socket, &address) {
        Ok(()) => return Ok(socket),
        Err(Errno::ADDRINUSE) => {}
        Err(errno) => return Err(errno.into()),
    }
    let probe = seqpacket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    // Refused: a socket that nobody listens on. A file of another kind is refused as well.
    match connect(&probe, &address) {
        Err(Errno::CONNREFUSED) if is_socket(path)? => {}
        _ => return Err(Errno::ADDRINUSE.into()),
    }
    std::fs::remove_file(path)?;
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

fn is_socket(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    Ok(std::fs::symlink_metadata(path)?.file_type().is_socket())
}

fn seqpacket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

impl CoordinatorEnd {
    /// Connects to a device process that listens there, without waiting.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` if nobody listens any more, `NotFound` if there is no such path,
    /// `WouldBlock` if too many wait already; those of connect(2) otherwise.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = seqpacket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self::over(socket))
    }
}

/// The socket on which a device process waits for a later coordinator.
#[derive(Debug)]
pub struct ControlListener(OwnedFd);

impl ControlListener {
    /// Begins to listen on a socket that came with a `Welcome`.
    ///
    /// # Errors
    ///
    /// [`FromFdError`] if it is no bound Unix `SOCK_SEQPACKET` socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, FromFdError> {
        // Checks the kind and sets close-on-exec.
        let socket = DeviceEnd::from_fd(fd)?.into_fd();
        rustix::io::ioctl_fionbio(&socket, true).map_err(FromFdError::io)?;
        listen(&socket, BACKLOG).map_err(FromFdError::io)?;
        Ok(Self(socket))
    }

    /// Accepts a connection without waiting; `None` if there is none. Check its
    /// [credentials](super::Channel::peer_credentials) before anything else.
    ///
    /// # Errors
    ///
    /// Those of accept4(2), such as `EMFILE`.
    pub fn try_accept(&self) -> io::Result<Option<DeviceEnd>> {
        loop {
            match accept_with(&self.0, SocketFlags::CLOEXEC) {
                Ok(socket) => return Ok(Some(DeviceEnd::over(socket))),
                Err(Errno::AGAIN) => return Ok(None),
                // The peer has changed its mind.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for ControlListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
