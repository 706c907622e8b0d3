//! From standard input to a welcome.

use super::{EXIT_NOT_WELCOMED, EXIT_ORPHANED, EXIT_PROTOCOL, EXIT_REJECTED, ServeError};
use crate::actor::control::Newcomer;
use crate::actor::introduction::{Facts, Introduction};
use crate::log;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use standstill_protocol::channel::{DeviceEnd, FromFdError, RecvError, SendError};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, OrphanPolicy, VERSIONS, VersionRange,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;
use thiserror::Error;

/// How long the coordinator may take to answer the greeting.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long an earlier incarnation's writes may take to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// The device was not welcomed.
#[derive(Debug, Error)]
pub enum GreetingError {
    /// Standard input is a control channel, but cannot be used.
    #[error("the control channel on standard input cannot be used")]
    Channel(#[from] FromFdError),
    /// The greeting could not be sent.
    #[error("the greeting cannot be sent")]
    Send(#[source] SendError),
    /// No answer came.
    #[error("the coordinator did not answer the greeting within {PATIENCE:?}")]
    Silence,
    /// The coordinator went away before it had answered.
    #[error("the coordinator is gone before it has answered the greeting")]
    Gone,
    /// What came is no message.
    #[error("the answer to the greeting breaks the protocol")]
    Protocol(#[source] RecvError),
    /// Another message came.
    #[error("something else than Welcome or Reject came in answer to the greeting")]
    Unexpected,
    /// The coordinator speaks another version than was offered.
    #[error("the coordinator speaks version {chosen}, offered was {VERSIONS}")]
    Version {
        /// What it chose.
        chosen: u16,
    },
    /// The coordinator rejected the device.
    #[error("the coordinator (versions {versions}) rejected the device: {reason}")]
    Rejected {
        /// The versions that it speaks.
        versions: VersionRange,
        /// Why.
        reason: String,
    },
    /// The process's parent is not its coordinator any more.
    #[error("the parent process is {parent}, the coordinator was {coordinator}")]
    Orphaned {
        /// The present parent.
        parent: i32,
        /// Who made the control channel.
        coordinator: i32,
    },
}

impl GreetingError {
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Silence => EXIT_NOT_WELCOMED,
            Self::Gone | Self::Orphaned { .. } | Self::Send(SendError::Disconnected) => {
                EXIT_ORPHANED
            }
            Self::Rejected { .. } => EXIT_REJECTED,
            Self::Channel(_)
            | Self::Send(_)
            | Self::Protocol(_)
            | Self::Unexpected
            | Self::Version { .. } => EXIT_PROTOCOL,
        }
    }
}

/// Takes the control channel from standard input, if there is one, and leaves `/dev/null` there.
pub(super) fn take_control_channel() -> Result<Option<DeviceEnd>, ServeError> {
    let stdin = io::stdin();
    let is_channel = sockopt::socket_type(&stdin) == Ok(SocketType::SEQPACKET)
        && sockopt::socket_domain(&stdin) == Ok(AddressFamily::UNIX);
    if !is_channel {
        return Ok(None);
    }
    let setup = |errno: Errno| ServeError::setup("standard input", errno);
    // Above the three standard ones.
    let socket = fcntl_dupfd_cloexec(&stdin, 3).map_err(setup)?;
    let null = open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(setup)?;
    nix::unistd::dup2_stdin(&null)
        .map_err(|errno| ServeError::setup("standard input", io::Error::from(errno)))?;
    // Until the coordinator has said that the device may live without it.
    die_with_parent(true)?;
    Ok(Some(DeviceEnd::from_fd(socket).map_err(GreetingError::from)?))
}

fn die_with_parent(die: bool) -> Result<(), ServeError> {
    set_parent_process_death_signal(die.then_some(Signal::KILL))
        .map_err(|errno| ServeError::setup("PR_SET_PDEATHSIG", errno))
}

/// Locks the backing files for as long as the process lives. An earlier incarnation's last writes
/// may still hold the lock: waits for them, bounded.
pub(super) fn lock(files: &[OwnedFd]) -> Result<(), ServeError> {
    let failed = |error| ServeError::setup("the lock of a backing file", error);
    for file in files {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => continue,
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        let file = file.try_clone().map_err(failed)?;
        let (locked, wait) = sync_channel(1);
        // Left behind if it is too late: the process ends then.
        std::thread::spawn(move || locked.send(flock(&file, FlockOperation::LockExclusive)));
        match wait.recv_timeout(LOCK_PATIENCE) {
            Ok(result) => result.map_err(|errno| failed(errno.into()))?,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
        }
    }
    Ok(())
}

/// Greets the coordinator and waits for its welcome.
pub(super) fn exchange(
    introduction: &Introduction,
    channel: DeviceEnd,
) -> Result<Newcomer, ServeError> {
    let (hello, files) = introduction
        .hello(Facts::AT_FIRST)
        .map_err(|error| ServeError::setup("a backing file for the coordinator", error))?;
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let hello = DeviceMessage::Hello(hello);
    #[cfg(feature = "fault-injection")]
    let times = crate::fault::wire::greet(&channel, &hello, true);
    #[cfg(not(feature = "fault-injection"))]
    let times = 1;
    for _ in 0..times {
        channel.send(&hello, &fds, PATIENCE).map_err(GreetingError::Send)?;
    }
    drop(files);
    let received = channel.recv(PATIENCE).map_err(|error| match error {
        RecvError::TimedOut { .. } => GreetingError::Silence,
        RecvError::Disconnected => GreetingError::Gone,
        error => GreetingError::Protocol(error),
    })?;
    let welcome = match received.message {
        CoordinatorMessage::Welcome(welcome) => welcome,
        CoordinatorMessage::Reject(reject) => {
            let (versions, reason) = (reject.versions, reject.reason);
            return Err(GreetingError::Rejected { versions, reason }.into());
        }
        _ => return Err(GreetingError::Unexpected.into()),
    };
    if !(VERSIONS.min..=VERSIONS.max).contains(&welcome.version) {
        return Err(GreetingError::Version { chosen: welcome.version }.into());
    }
    channel.set_version(welcome.version);
    match welcome.orphan {
        OrphanPolicy::Keep => die_with_parent(false)?,
        OrphanPolicy::Exit => check_parent(&channel)?,
    }
    log::knows(welcome.term, welcome.epoch);
    // Who this is, and in which term, the coordinator's log and the line itself say.
    tracing::info!(machine = %welcome.machine, "welcomed");
    Ok(Newcomer { channel, welcome, fds: received.fds })
}

/// The death of a parent that died before it was asked for is not told any more.
fn check_parent(channel: &DeviceEnd) -> Result<(), ServeError> {
    let credentials = channel
        .peer_credentials()
        .map_err(|error| ServeError::setup("the coordinator's credentials", error))?;
    let parent = getppid().map_or(0, Pid::as_raw_pid);
    if parent != credentials.pid {
        return Err(GreetingError::Orphaned { parent, coordinator: credentials.pid }.into());
    }
    Ok(())
}
