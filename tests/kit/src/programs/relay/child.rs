//! The device process of a relay, and what makes sure that it ends with the relay.

use super::Error;
use crate::outside::relay::LOCK;
use crate::plan::Limit;
use crate::programs::Program;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, getpid, kill_process,
    pidfd_open, pidfd_send_signal, setrlimit, waitid,
};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The argument that makes the relay's program a guard.
pub(super) const GUARD: &str = "guard";
/// How long an earlier incarnation may have its lock: it is fenced before another one is started,
/// and whoever has fenced it has the lock for a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// The running device process.
pub(super) struct Child {
    process: std::process::Child,
    pid: Pid,
    pidfd: OwnedFd,
    /// The process has it too; who can lock the file knows that both are gone.
    lock_path: PathBuf,
    _lock: File,
    _guard: std::process::Child,
}

impl Child {
    /// Starts the device process, with that control channel as its standard input.
    pub(super) fn start(
        folder: &Path,
        program: &OsStr,
        arguments: &[OsString],
        control: OwnedFd,
    ) -> Result<Self, Error> {
        let lock_path = folder.join(LOCK);
        let lock = locked(&lock_path)?;
        fcntl_setfd(&lock, FdFlags::empty())?;
        let process =
            Command::new(program).args(arguments).stdin(control).stdout(Stdio::null()).spawn();
        fcntl_setfd(&lock, FdFlags::CLOEXEC)?;
        let process = process.map_err(|error| format!("{}: {error}", program.display()))?;
        let pid = Pid::from_child(&process);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let this = pidfd_open(getpid(), PidfdFlags::empty())?;
        let guard = Program::Relay
            .command(vec![GUARD.into()])?
            .stdin(this)
            .stdout(Stdio::null())
            .stderr(pidfd.try_clone()?)
            .spawn()?;
        Ok(Self { process, pid, pidfd, lock_path, _lock: lock, _guard: guard })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Readable once it has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The file that shows that it lives, opened without its lock.
    pub(super) fn backing_file(&self) -> Result<OwnedFd, Error> {
        Ok(File::open(&self.lock_path)?.into())
    }

    /// SIGKILL, and waits until it has ended.
    pub(super) fn kill(&self) -> Result<(), Error> {
        self.signal_until(Signal::KILL, WaitIdOptions::EXITED)
    }

    /// SIGSTOP, and waits until it stands.
    pub(super) fn stop(&self) -> Result<(), Error> {
        self.signal_until(Signal::STOP, WaitIdOptions::STOPPED | WaitIdOptions::EXITED)
    }

    /// SIGCONT.
    pub(super) fn go_on(&self) -> Result<(), Error> {
        match pidfd_send_signal(&self.pidfd, Signal::CONT) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn signal_until(&self, signal: Signal, is: WaitIdOptions) -> Result<(), Error> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => {}
            Err(Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        loop {
            match waitid(WaitId::Pid(self.pid), is | WaitIdOptions::NOWAIT) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Lets it have no more than that.
    pub(super) fn limit(&self, limit: Limit) -> Result<(), Error> {
        limit.impose(self.pid)?;
        Ok(())
    }

    /// Waits for its end, and ends in the same way: by its signal, or with this status.
    pub(super) fn end_likewise(&mut self) -> Result<u8, Error> {
        let status = self.process.wait()?;
        let Some(signal) = status.signal() else {
            return Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1));
        };
        // One core dump is enough.
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
        if let Some(signal) = Signal::from_named_raw(signal) {
            kill_process(getpid(), signal)?;
        }
        // One that this program ignores.
        Ok(u8::try_from(128 + signal).unwrap_or(1))
    }
}

#[expect(clippy::disallowed_methods, reason = "a lock that is waited for has no end of the wait")]
fn locked(path: &Path) -> Result<File, Error> {
    let file = File::options().read(true).write(true).open(path)?;
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(format!("{}: {error}", path.display()).into()),
        }
    }
}

/// Kills a device process when its relay has ended. Standard input is a pidfd of the relay, standard
/// error one of the device.
pub(super) fn guard() -> Result<(), Error> {
    let (relay, device) = (io::stdin(), io::stderr());
    loop {
        let mut fds = [PollFd::new(&relay, PollFlags::IN), PollFd::new(&device, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [relay, device_ended] = [0, 1].map(|at| fds[at].revents().contains(PollFlags::IN));
        if device_ended {
            return Ok(());
        }
        if relay {
            return match pidfd_send_signal(&device, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => Ok(()),
                Err(error) => Err(error.into()),
            };
        }
    }
}
