//! Holds whoever comes, in this process or another one, until a test opens it.
//!
//! A gate is a FIFO whose writing end the test holds; who waits polls the reading end for the
//! hang-up. So a wait ends at once, costs nothing, and can be one of several in a `poll`.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A closed gate. Dropping it opens it, so that a failed test leaves nobody behind.
#[derive(Debug)]
pub struct Gate {
    path: PathBuf,
    _writer: OwnedFd,
    _folder: TempDir,
}

impl Gate {
    /// A new gate, closed.
    ///
    /// # Errors
    ///
    /// If the FIFO cannot be made.
    pub fn closed() -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("gate");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        let writer = open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { path, _writer: writer, _folder: folder })
    }

    /// The key by which others wait here.
    #[must_use]
    pub fn key(&self) -> GateKey {
        GateKey(self.path.clone())
    }

    /// Lets everybody go who waits or will come.
    pub fn open(self) {}
}

impl Drop for Gate {
    fn drop(&mut self) {
        // First the name, then the writing end: who finds the name will see the hang-up.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Names a gate, also to another process.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GateKey(PathBuf);

impl GateKey {
    /// Where the gate is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// An fd that has a hang-up (POLLHUP) once the gate is open; `None` if it is already.
    ///
    /// # Errors
    ///
    /// If the FIFO cannot be opened for another reason than that it is gone.
    pub fn watch(&self) -> io::Result<Option<GateWatch>> {
        match open(&self.0, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Some(GateWatch(fd))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Blocks this thread until the gate is open.
    ///
    /// # Errors
    ///
    /// As [`watch`](Self::watch).
    pub fn wait(&self) -> io::Result<()> {
        let Some(watch) = self.watch()? else {
            return Ok(());
        };
        loop {
            let mut fds = [PollFd::new(&watch, PollFlags::empty())];
            match poll(&mut fds, None) {
                Ok(_) if fds[0].revents().contains(PollFlags::HUP) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The reading end of a gate that was closed when it was made.
#[derive(Debug)]
pub struct GateWatch(OwnedFd);

impl AsFd for GateWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_gate_holds_until_it_is_opened_and_nobody_who_comes_later() {
        let gate = Gate::closed().unwrap();
        let key = gate.key();
        let (done, ended) = mpsc::channel();
        let waiter = {
            let key = key.clone();
            std::thread::spawn(move || done.send(key.wait()))
        };
        assert!(ended.recv_timeout(Duration::from_millis(50)).is_err(), "it did not hold");
        gate.open();
        assert!(ended.recv_timeout(Duration::from_secs(10)).unwrap().is_ok());
        waiter.join().unwrap().unwrap();
        key.wait().unwrap();
    }
}
