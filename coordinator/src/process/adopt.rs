//! Device processes that another coordinator has left behind.

use super::{DeviceProcess, Exit, wait_readable};
use crate::custody::Custody;
use crate::identity::start_time;
use crate::record::ProcessIdentity;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

impl DeviceProcess {
    /// Takes charge of a process that is no child of this program. Its exit is seen through the
    /// pidfd, its status is never known.
    pub(crate) fn adopt(
        program: PathBuf,
        pid: u32,
        pidfd: OwnedFd,
        stderr: Option<OwnedFd>,
        custody: Arc<Custody>,
    ) -> io::Result<Self> {
        let pid = pid_of(pid)?;
        Ok(Self { program, pid, pidfd, stderr, exit: None, custody: Some(custody) })
    }

    /// Takes charge of a process by what was recorded of it, which may have ended since.
    pub(crate) fn adopt_recorded(
        program: PathBuf,
        process: ProcessIdentity,
        custody: Arc<Custody>,
    ) -> io::Result<Self> {
        match open(process)? {
            Some(pidfd) => Self::adopt(program, process.pid, pidfd, None, custody),
            None => {
                // In the place of a pidfd that could be read for ever.
                let ended = eventfd(1, EventfdFlags::CLOEXEC)?;
                let mut process = Self::adopt(program, process.pid, ended, None, custody)?;
                process.exit = Some(Exit::Unknown);
                Ok(process)
            }
        }
    }
}

/// The identity of the process behind a pidfd, of which `pid` is the number; `None` if it has
/// ended: the number may be another's by then.
pub(crate) fn identity_behind(pidfd: impl AsFd, pid: u32) -> io::Result<Option<ProcessIdentity>> {
    let start_time = match start_time(pid) {
        Ok(start_time) => start_time,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Looked at afterwards: while it is not readable, the number has been its own all the time.
    let ended = wait_readable(pidfd.as_fd(), Duration::ZERO)?;
    Ok((!ended).then_some(ProcessIdentity { pid, start_time }))
}

fn pid_of(pid: u32) -> io::Result<Pid> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// A pidfd of that very process; `None` if it has ended.
///
/// The pidfd is opened first: if the number belongs to the recorded process afterwards, it did so
/// when the pidfd was opened.
pub(crate) fn open(process: ProcessIdentity) -> io::Result<Option<OwnedFd>> {
    let pidfd = match pidfd_open(pid_of(process.pid)?, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    match start_time(process.pid) {
        Ok(found) => Ok((found == process.start_time).then_some(pidfd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
