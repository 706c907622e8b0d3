//! Device processes as the kernel sees them: start one, watch it, end it, prove that it is gone.
//!
//! - [`Spawner`] starts a process from a [`ProcessSpec`]; its standard input is the control socket.
//! - [`DeviceProcess`] owns the process: its pidfd is readable once it has ended, and dropping the
//!   value kills and reaps it.
//! - [`Fence`] proves that nothing of a process is left, not even a write on its way to the disk.
//!
//! Nothing here is async and nothing waits without a bound: whoever owns an epoll fd registers
//! [`DeviceProcess::pidfd`] in it and asks again when it is readable.
#![forbid(unsafe_code)]

mod adopt;
mod fence;
mod spawn;
#[cfg(test)]
mod tests;

pub(crate) use adopt::{identity_behind, open as open_recorded};
pub use fence::{BackingFile, BackingFileError, Fence, FenceProgress, FenceProof};
pub use rustix::process::Signal;
pub use spawn::{ProcessSpec, SpawnError, Spawner};

use crate::custody::Custody;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long dropping a [`DeviceProcess`] waits for the end of the process that it killed.
pub const DROP_GRACE: Duration = Duration::from_secs(1);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// It ended by itself, with this status: 0 to 255.
    Code(i32),
    /// A signal ended it.
    Signal {
        /// The signal's number.
        signal: i32,
        /// True if the kernel wrote a core dump.
        core_dumped: bool,
    },
    /// It has ended and nobody can say how: something else in this program reaped it, or
    /// `SIGCHLD` is ignored here.
    Unknown,
}

impl Exit {
    /// True for status 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// True if SIGKILL ended it, from whomever that came.
    #[must_use]
    pub fn is_kill(self) -> bool {
        let kill = nix::sys::signal::Signal::SIGKILL as i32;
        matches!(self, Self::Signal { signal, .. } if signal == kill)
    }

    fn from_status(status: &WaitIdStatus) -> Self {
        if let Some(code) = status.exit_status() {
            Self::Code(code)
        } else if let Some(signal) = status.terminating_signal() {
            Self::Signal { signal, core_dumped: status.dumped() }
        } else {
            Self::Unknown
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal { signal, core_dumped } => {
                write!(f, "killed by signal {signal}")?;
                if let Ok(known) = nix::sys::signal::Signal::try_from(signal) {
                    write!(f, " ({known})")?;
                }
                if core_dumped { f.write_str(", core dumped") } else { Ok(()) }
            }
            Self::Unknown => f.write_str("ended with unknown status"),
        }
    }
}

/// A process that runs a device, and the duty to end it: a child, or one that another coordinator
/// has left behind, of which nobody here learns how it ends.
///
/// Dropping it fences in the small: SIGKILL, then a wait of at most [`DROP_GRACE`], then the reap.
/// A process that takes longer to die (it hangs in the kernel) is reaped later by the spawning
/// thread, so that no zombie stays. A drop does not wait for backing files: see [`Fence`].
///
/// One that is to outlive its coordinator lives on when it is dropped, and is not killed any more
/// once another coordinator has it.
#[derive(Debug)]
pub struct DeviceProcess {
    program: PathBuf,
    pid: Pid,
    pidfd: OwnedFd,
    stderr: Option<OwnedFd>,
    exit: Option<Exit>,
    /// If it is to outlive this program.
    custody: Option<Arc<Custody>>,
}

impl DeviceProcess {
    fn new(program: PathBuf, pid: Pid, pidfd: OwnedFd, stderr: OwnedFd) -> Self {
        Self { program, pid, pidfd, stderr: Some(stderr), exit: None, custody: None }
    }

    /// It is to outlive this program, as long as it is this program's.
    pub(crate) fn place_under(&mut self, custody: Arc<Custody>) {
        self.custody = Some(custody);
    }

    /// How this program holds a process that is to outlive it.
    pub(crate) fn custody(&self) -> Option<&Custody> {
        self.custody.as_deref()
    }

    /// The program as it was named in its [`ProcessSpec`].
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The process id. Once the process was reaped, the number may belong to another one.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// Readable, and for ever so, once the process has ended; for epoll.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The reading end of the process's standard error; `None` if it was taken before.
    ///
    /// It is in blocking mode. Whoever takes it must read it, or the process hangs in its next
    /// long message.
    pub fn take_stderr(&mut self) -> Option<OwnedFd> {
        self.stderr.take()
    }

    /// How the process ended, as far as [`try_reap`](Self::try_reap) has found out.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.exit
    }

    /// Sends SIGKILL, which ends a stopped process too. Does nothing to one that has ended.
    ///
    /// # Errors
    ///
    /// As [`signal`](Self::signal).
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends a signal through the pidfd, which cannot hit another process. Does nothing to a
    /// process that has ended.
    ///
    /// # Errors
    ///
    /// Whatever `pidfd_send_signal(2)` says, such as `EPERM` for a program with more rights than
    /// this one. Of a process that is to outlive this program also a
    /// [`ControlDirectoryError`](crate::control_directory::ControlDirectoryError), if another
    /// coordinator has it or that cannot be found out; nothing was sent then.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.exit.is_some() {
            return Ok(());
        }
        if let Some(custody) = &self.custody {
            custody.check().map_err(io::Error::other)?;
        }
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reaps the process if it has ended and says how; `None` while it lives. Never waits. Once it
    /// has ended, every call gives the same answer.
    ///
    /// # Errors
    ///
    /// Whatever `waitid(2)` or `poll(2)` say; neither is expected to fail.
    pub fn try_reap(&mut self) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            let id = WaitId::PidFd(self.pidfd.as_fd());
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            self.exit = match rustix::process::waitid(id, options) {
                Ok(status) => status.as_ref().map(Exit::from_status),
                // Not ours to reap (any more): the pidfd alone knows.
                Err(Errno::CHILD) => {
                    wait_readable(self.pidfd(), Duration::ZERO)?.then_some(Exit::Unknown)
                }
                Err(Errno::INTR) => None,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(self.exit)
    }

    /// Waits until the process has ended, at most that long, and reaps it; `None` if it lives on.
    /// It blocks the calling thread.
    ///
    /// # Errors
    ///
    /// As [`try_reap`](Self::try_reap).
    pub fn wait_exit(&mut self, timeout: Duration) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            wait_readable(self.pidfd(), timeout)?;
        }
        self.try_reap()
    }
}

impl AsFd for DeviceProcess {
    /// The [`pidfd`](DeviceProcess::pidfd).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd()
    }
}

impl Drop for DeviceProcess {
    fn drop(&mut self) {
        if self.exit.is_some() {
            return;
        }
        if self.custody.as_ref().is_some_and(|custody| custody.spares()) {
            if let Ok(pidfd) = self.pidfd.try_clone() {
                spawn::reap_when_it_ends(pidfd);
            }
            return;
        }
        if let Err(error) = self.kill() {
            tracing::error!(pid = self.pid(), %error, "a device process cannot be killed");
        }
        match self.wait_exit(DROP_GRACE) {
            Ok(Some(_)) => {}
            Ok(None) => {
                tracing::error!(pid = self.pid(), "a killed device process does not end");
                spawn::reap_later(self.pid);
            }
            Err(error) => {
                tracing::error!(pid = self.pid(), %error, "a device process cannot be waited for");
                spawn::reap_later(self.pid);
            }
        }
    }
}

/// Waits until the fd is readable, at most that long; false if it is not.
fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    // None: further away than a clock can say, so for ever.
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], left.as_ref())
        {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
