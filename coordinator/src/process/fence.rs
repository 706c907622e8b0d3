//! Proof that a device process is gone.
//!
//! An exit is not enough: writes that a killed process had handed to the kernel (`O_DIRECT`
//! through `io_uring`) reach the disk up to a tenth of a second after it was reaped. The kernel keeps the
//! open file description for them, and with it the `flock` that the device holds on each of its
//! backing files. So the proof is: SIGKILL, exit seen and reaped, and then an exclusive `flock` of
//! our own on each backing file.
//!
//! What keeps a device's lock alive beyond its end: a process that inherited the fd, and a message
//! with the fd that nobody has received. Read the control socket to its end, or close it, once the
//! process has ended.

use super::{DeviceProcess, Exit};
use crate::record::FileRecord;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use standstill_protocol::channel::close_at_once;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use thiserror::Error;

/// A file or block device that a device process writes to, opened anew, so that our lock on it is
/// another one than the device's.
#[derive(Debug)]
pub struct BackingFile {
    file: OwnedFd,
    /// Where it was when it was opened, if that can be told.
    path: Option<PathBuf>,
    device: u64,
    inode: u64,
}

/// An fd cannot serve as a backing file.
#[derive(Debug, Error)]
pub enum BackingFileError {
    /// It is something else than a regular file or a block device; nothing else can be locked or
    /// reopened without side effects.
    #[error("backing file is a {found}, expected a regular file or a block device")]
    Kind {
        /// What it is.
        found: &'static str,
    },
    /// Its kind cannot be found out.
    #[error("cannot examine backing file: {source}")]
    Examine {
        /// Why not.
        source: io::Error,
    },
    /// It cannot be opened again for reading through `/proc/self/fd`.
    #[error("cannot reopen backing file {device:#x}:{inode} for reading: {source}")]
    Reopen {
        /// Its `st_dev`.
        device: u64,
        /// Its `st_ino`.
        inode: u64,
        /// Why not.
        source: io::Error,
    },
    /// It was recorded by another coordinator without its path.
    #[error("recorded backing file {device:#x}:{inode} has no path by which it could be found")]
    NoPath {
        /// Its `st_dev`.
        device: u64,
        /// Its `st_ino`.
        inode: u64,
    },
    /// It was recorded by another coordinator, and there is no such file any more.
    #[error("cannot open recorded backing file {path}: {source}")]
    Open {
        /// Where it was.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// It was recorded by another coordinator, and another file is there now.
    #[error(
        "recorded backing file {path} is file {}:{} now, expected {}:{}",
        found.0, found.1, expected.0, expected.1
    )]
    Changed {
        /// Where it was.
        path: String,
        /// `st_dev` and `st_ino` of what is there.
        found: (u64, u64),
        /// Those of the backing file.
        expected: (u64, u64),
    },
}

impl BackingFile {
    /// Opens a file that another coordinator has recorded, if it is still the same one.
    ///
    /// # Errors
    ///
    /// [`BackingFileError`].
    pub fn find(record: &FileRecord) -> Result<Self, BackingFileError> {
        let FileRecord { path, device, inode } = record;
        let expected = (*device, *inode);
        let Some(path) = path else {
            return Err(BackingFileError::NoPath { device: expected.0, inode: expected.1 });
        };
        let file = rustix::fs::open(path, REOPEN, Mode::empty())
            .map_err(|errno| BackingFileError::Open { path: path.clone(), source: errno.into() })?;
        let found = examine(&file)?;
        if found != expected {
            let path = path.clone();
            return Err(BackingFileError::Changed { path, found, expected });
        }
        let (device, inode) = found;
        Ok(Self { file, path: Some(path.into()), device, inode })
    }

    /// What a later coordinator needs to find the file again.
    #[must_use]
    pub fn record(&self) -> FileRecord {
        let path = self.path.as_deref().and_then(|path| path.to_str()).map(str::to_owned);
        FileRecord { path, device: self.device, inode: self.inode }
    }

    /// Opens the file again and closes the received fd, which would keep the device's own lock
    /// alive.
    ///
    /// # Errors
    ///
    /// [`BackingFileError`]; the received fd is closed then, too.
    pub fn reopen(received: OwnedFd) -> Result<Self, BackingFileError> {
        let (device, inode) = match examine(&received) {
            Ok(found) => found,
            Err(error) => {
                close_at_once(received);
                return Err(error);
            }
        };
        let link = format!("/proc/self/fd/{}", received.as_raw_fd());
        let file = rustix::fs::open(&link, REOPEN, Mode::empty())
            .map_err(|errno| BackingFileError::Reopen { device, inode, source: errno.into() })?;
        // Of a file without a name it is one that leads nowhere, which is seen when it is needed.
        let path = std::fs::read_link(&link).ok();
        // Whatever else happens: as long as this one is open, the device's lock stays.
        drop(received);
        Ok(Self { file, path, device, inode })
    }

    /// Opens all of these again and closes the received fds.
    ///
    /// # Errors
    ///
    /// [`BackingFileError`] of the first that cannot serve. The others are closed without waiting:
    /// one that is a socket may linger for as long as its sender likes.
    pub fn reopen_all(received: Vec<OwnedFd>) -> Result<Vec<Self>, BackingFileError> {
        let mut files = Vec::with_capacity(received.len());
        let mut received = received.into_iter();
        while let Some(fd) = received.next() {
            match Self::reopen(fd) {
                Ok(file) => files.push(file),
                Err(error) => {
                    received.for_each(close_at_once);
                    return Err(error);
                }
            }
        }
        Ok(files)
    }

    /// True if somebody holds a lock on the file. A running device must, on each of its backing
    /// files: on an unlocked one a fence would prove nothing.
    ///
    /// # Errors
    ///
    /// Whatever `flock(2)` says, such as a file system that has no locks.
    pub fn is_locked(&self) -> io::Result<bool> {
        if self.try_lock()? {
            self.unlock();
            return Ok(false);
        }
        Ok(true)
    }

    /// False if somebody else holds a lock.
    fn try_lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn unlock(&self) {
        // Fails on no fd that could be locked, and does nothing to one that is not.
        let _ = rustix::fs::flock(&self.file, FlockOperation::NonBlockingUnlock);
    }
}

impl Drop for BackingFile {
    /// Closing is not enough: a child that is being spawned at this moment has a copy of the fd
    /// until it executes its program, and the lock would last as long.
    fn drop(&mut self) {
        self.unlock();
    }
}

/// How a backing file is opened: `O_NONBLOCK`, since a lease that somebody holds on the file must
/// not hold us up.
const REOPEN: OFlags =
    OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC).union(OFlags::NOCTTY);

/// Which file it is, if it can be a backing file.
fn examine(file: &OwnedFd) -> Result<(u64, u64), BackingFileError> {
    let status = rustix::fs::fstat(file)
        .map_err(|errno| BackingFileError::Examine { source: errno.into() })?;
    match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => Ok((status.st_dev, status.st_ino)),
        other => Err(BackingFileError::Kind { found: kind_name(other) }),
    }
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        _ => "file of unknown kind",
    }
}

/// A fence in progress. It never waits: call [`poll`](Self::poll) when the pidfd becomes readable,
/// and every few milliseconds while it answers [`FenceProgress::WaitingForLocks`].
#[derive(Debug)]
pub struct Fence {
    pid: u32,
    files: Vec<BackingFile>,
    obstacle: Option<io::Error>,
}

/// How far a [`Fence`] is.
#[derive(Debug)]
pub enum FenceProgress {
    /// The process has not ended yet.
    WaitingForExit,
    /// The process has ended and was reaped; something of it still has files locked.
    WaitingForLocks {
        /// How many of the backing files.
        held: usize,
    },
    /// Nothing of the process is left.
    Proven(FenceProof),
}

/// Nothing of a process is left. Holds the locks on its backing files: drop it before the next
/// incarnation starts, which waits for them.
#[derive(Debug)]
pub struct FenceProof {
    exit: Exit,
    files: Vec<BackingFile>,
}

impl FenceProof {
    /// How the process ended.
    #[must_use]
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// How many locks on backing files were obtained.
    #[must_use]
    pub fn locks(&self) -> usize {
        self.files.len()
    }
}

impl Fence {
    /// Kills the process and begins to prove that it is gone, with the backing files that it sent
    /// in its Hello. A file that came twice counts once.
    ///
    /// Two devices may share a file only if the proof about the first is dropped before the second
    /// is to be proven.
    pub fn begin(process: &DeviceProcess, mut files: Vec<BackingFile>) -> Self {
        // Two open files of one inode would lock each other out.
        files.sort_by_key(|file| (file.device, file.inode));
        files.dedup_by_key(|file| (file.device, file.inode));
        let obstacle = process.kill().err();
        Self { pid: process.pid(), files, obstacle }
    }

    /// Goes as far as it can without waiting. To be called with the same process as
    /// [`begin`](Self::begin), and not any more once it was [`FenceProgress::Proven`].
    pub fn poll(&mut self, process: &mut DeviceProcess) -> FenceProgress {
        if process.pid() != self.pid {
            let text = format!("fence of process {} asked about {}", self.pid, process.pid());
            self.obstacle = Some(io::Error::new(io::ErrorKind::InvalidInput, text));
            return FenceProgress::WaitingForExit;
        }
        let exit = match process.try_reap() {
            Ok(Some(exit)) => exit,
            Ok(None) => {
                if self.obstacle.is_some() {
                    self.obstacle = process.kill().err();
                }
                return FenceProgress::WaitingForExit;
            }
            Err(error) => {
                self.obstacle = Some(error);
                return FenceProgress::WaitingForExit;
            }
        };

        self.obstacle = None;
        let mut held = 0;
        for file in &self.files {
            match file.try_lock() {
                Ok(true) => {}
                Ok(false) => held += 1,
                Err(error) => {
                    held += 1;
                    self.obstacle = Some(error);
                }
            }
        }
        if held > 0 {
            // All or nothing: two fences that each kept a part would wait for each other for ever.
            self.files.iter().for_each(BackingFile::unlock);
            return FenceProgress::WaitingForLocks { held };
        }
        FenceProgress::Proven(FenceProof { exit, files: std::mem::take(&mut self.files) })
    }

    /// What stands in the way other than a living process or a held lock: the last error of a
    /// system call. While it lasts, nothing is proven.
    #[must_use]
    pub fn obstacle(&self) -> Option<&io::Error> {
        self.obstacle.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    #[test]
    fn dropping_a_locked_file_unlocks_it_even_while_a_copy_of_its_fd_is_open() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || BackingFile::reopen(file.reopen().unwrap().into()).unwrap();
        let (locked, other) = (open(), open());
        // As in a child between its birth and the execution of its program.
        let _copy = locked.file.try_clone().unwrap();
        assert!(locked.try_lock().unwrap());
        assert!(other.is_locked().unwrap());
        drop(locked);
        assert!(!other.is_locked().unwrap());
    }

    /// Whoever closes the last fd of such a socket waits until its peer has read everything.
    #[test]
    fn no_socket_that_lingers_holds_up_whoever_refuses_it() {
        let linger = Duration::from_secs(20);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peers = Vec::new();
        let full = || {
            let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let peer = listener.accept().unwrap().0;
            rustix::net::sockopt::set_socket_linger(&socket, Some(linger)).unwrap();
            socket.set_nonblocking(true).unwrap();
            while socket.write(&[0; 65536]).is_ok() {}
            (OwnedFd::from(socket), peer)
        };
        let received: Vec<_> = (0..3)
            .map(|_| {
                let (socket, peer) = full();
                peers.push(peer);
                socket
            })
            .collect();
        let began = Instant::now();
        let error = BackingFile::reopen_all(received).unwrap_err();
        assert!(matches!(error, BackingFileError::Kind { found: "socket" }), "{error}");
        assert!(began.elapsed() < linger / 2, "{:?}", began.elapsed());
    }
}
