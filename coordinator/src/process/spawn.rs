//! Starts device processes, all from one permanent thread.
//!
//! A device process asks for SIGKILL at the end of its parent (`PR_SET_PDEATHSIG`), and the kernel
//! takes "parent" to be the *thread* that started it. So every process is started by one thread
//! that lives as long as this program: a static owns its work queue.
//!
//! Processes are started by `posix_spawn`, which does not copy the page tables of a VMM with
//! gigabytes of guest memory as `fork` would.

use super::DeviceProcess;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags};
use nix::sys::signal::SigSet;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use thiserror::Error;

/// How long the start of one process may take: a program may lie where the kernel does not get at it.
const LONGEST_START: Duration = Duration::from_secs(30);
/// How often the thread looks after processes that did not end within their grace.
const REAP_INTERVAL: Duration = Duration::from_millis(100);
/// How often it looks after children that live on although their machine was dropped.
const SPARED_INTERVAL: Duration = Duration::from_secs(2);

/// Which program to start, and how.
///
/// ```
/// use standstill_coordinator::process::ProcessSpec;
///
/// let spec = ProcessSpec::new("/usr/bin/my-device").args(["--queues", "4"]).env("RUST_LOG", "info");
/// assert_eq!(spec.arguments().len(), 2);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSpec {
    program: PathBuf,
    args: Vec<OsString>,
    /// `None`: it is not inherited.
    env: Vec<(OsString, Option<OsString>)>,
}

impl ProcessSpec {
    /// A program without arguments, in this program's environment. A name without a slash is
    /// looked up in this program's `PATH`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), args: Vec::new(), env: Vec::new() }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds an environment variable, or replaces an inherited one.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), Some(value.into())));
        self
    }

    /// Does not let the program inherit an environment variable.
    #[must_use]
    pub fn env_remove(mut self, name: impl Into<OsString>) -> Self {
        self.env.push((name.into(), None));
        self
    }

    /// Another program with other arguments, in the same environment.
    #[must_use]
    pub fn replaced<A: Into<OsString>>(
        mut self,
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        self.program = program.into();
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Environment variables of its own, in the order in which they were said; without a value, that it
    /// does not inherit.
    #[must_use]
    pub fn environment(&self) -> &[(OsString, Option<OsString>)] {
        &self.env
    }

    /// The arguments, without the program's own name.
    #[must_use]
    pub fn arguments(&self) -> &[OsString] {
        &self.args
    }
}

/// A process could not be started. Nothing of it is left.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// The kernel did not execute the program: it is not there, not executable, …
    #[error("cannot start {}: {source}", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// This program lacks something that the start needs, such as file descriptors.
    #[error("cannot make the {what} for {}: {source}", program.display())]
    Resource {
        /// The program.
        program: PathBuf,
        /// What could not be made.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A string of the [`ProcessSpec`] cannot be passed on: it holds a NUL byte, or it names an
    /// environment variable and is empty or holds `=`.
    #[error("cannot start {}: {what} {text:?} cannot be passed to a program", program.display())]
    Text {
        /// The program.
        program: PathBuf,
        /// What the string is.
        what: &'static str,
        /// The string.
        text: OsString,
    },
    /// The thread that starts processes cannot be made.
    #[error("cannot make the thread that starts device processes: {source}")]
    Thread {
        /// Why not.
        source: io::Error,
    },
    /// The kernel has not executed the program in time, or is still at an earlier one: it cannot be read
    /// from where it lies, for example. A process that comes of it all the same is ended.
    #[error("{} was not started within {time:?}", program.display())]
    Timeout {
        /// The program.
        program: PathBuf,
        /// How long that was waited for.
        time: Duration,
    },
    /// The thread that starts processes does not exist here (any more). Threads do not survive a
    /// `fork`: make a new [`Spawner`] after it.
    #[error("cannot start {}: the thread that starts device processes is gone", program.display())]
    ThreadGone {
        /// The program.
        program: PathBuf,
    },
}

/// Starts device processes. All of them share one thread, which lives until this program ends.
#[derive(Clone, Debug)]
pub struct Spawner {
    thread: SpawnThread,
}

impl Spawner {
    /// The spawner of this program. The first call makes its thread.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Thread`].
    pub fn new() -> Result<Self, SpawnError> {
        let thread = SpawnThread::get().map_err(|source| SpawnError::Thread { source })?;
        Ok(Self { thread })
    }

    /// Starts a process and returns as soon as the program is executed, after 30 seconds at the latest.
    ///
    /// Its standard input is `stdin`, of which this program keeps no copy; its standard output is
    /// `/dev/null`; its standard error is a pipe that the [`DeviceProcess`] holds. It has a process
    /// group of its own, no blocked signals, and the default action for each signal.
    ///
    /// # Errors
    ///
    /// Every [`SpawnError`] but `Thread`.
    pub fn spawn(&self, spec: &ProcessSpec, stdin: OwnedFd) -> Result<DeviceProcess, SpawnError> {
        self.spawn_within(spec, stdin, LONGEST_START)
    }

    fn spawn_within(
        &self,
        spec: &ProcessSpec,
        stdin: OwnedFd,
        time: Duration,
    ) -> Result<DeviceProcess, SpawnError> {
        let image = Image::new(spec)?;
        let gone = || SpawnError::ThreadGone { program: spec.program.clone() };
        if self.thread.owner != std::process::id() {
            return Err(gone());
        }
        let (reply, answer) = mpsc::sync_channel(1);
        let job = Job::Spawn { image, stdin, reply };
        self.thread.jobs.send(job).map_err(|_| gone())?;
        answer.recv_timeout(time).map_err(|error| match error {
            RecvTimeoutError::Disconnected => gone(),
            // The answer goes nowhere, and with it the process.
            RecvTimeoutError::Timeout => {
                SpawnError::Timeout { program: spec.program.clone(), time }
            }
        })?
    }
}

/// Leaves a killed process, which is not reaped yet, to the spawning thread.
pub(super) fn reap_later(pid: Pid) {
    // Without the thread the process stays a zombie until this program ends: nothing to be done.
    if let Ok(thread) = SpawnThread::get() {
        let _ = thread.jobs.send(Job::Reap(pid));
    }
}

/// Leaves a process that lives on, and may be a child, to the spawning thread.
pub(super) fn reap_when_it_ends(pidfd: OwnedFd) {
    if let Ok(thread) = SpawnThread::get() {
        let _ = thread.jobs.send(Job::Spared(pidfd));
    }
}

/// The way to the spawning thread, and whose thread it is.
#[derive(Clone, Debug)]
struct SpawnThread {
    jobs: Sender<Job>,
    owner: u32,
}

/// This program's spawning thread. It holds a sender for ever, so the thread never ends.
static THREAD: Mutex<Option<SpawnThread>> = Mutex::new(None);

impl SpawnThread {
    fn get() -> io::Result<Self> {
        let mut slot = THREAD.lock().unwrap_or_else(PoisonError::into_inner);
        let owner = std::process::id();
        // A copy from before a fork has no thread behind it.
        if let Some(thread) = slot.as_ref().filter(|thread| thread.owner == owner) {
            return Ok(thread.clone());
        }
        let (jobs, queue) = mpsc::channel();
        std::thread::Builder::new().name("standstill-spawn".into()).spawn(move || work(&queue))?;
        Ok(slot.insert(Self { jobs, owner }).clone())
    }
}

enum Job {
    Spawn {
        image: Image,
        stdin: OwnedFd,
        reply: mpsc::SyncSender<Result<DeviceProcess, SpawnError>>,
    },
    Reap(Pid),
    Spared(OwnedFd),
}

/// The spawning thread.
fn work(queue: &Receiver<Job>) {
    // Killed, but not ended when their owners gave up waiting. Their pids cannot be reused before
    // they are reaped here.
    let mut dying: Vec<Pid> = Vec::new();
    // These live on, and may be reaped by whoever takes them over in this program.
    let mut spared: Vec<OwnedFd> = Vec::new();
    loop {
        let job = match (dying.is_empty(), spared.is_empty()) {
            (true, true) => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            (true, false) => queue.recv_timeout(SPARED_INTERVAL),
            (false, _) => queue.recv_timeout(REAP_INTERVAL),
        };
        match job {
            Ok(Job::Spawn { image, stdin, reply }) => {
                // If the caller is gone, the process is dropped with the answer, and so ends.
                let _ = reply.send(image.start(stdin, &mut dying));
            }
            Ok(Job::Reap(pid)) => dying.push(pid),
            Ok(Job::Spared(pidfd)) => spared.push(pidfd),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        dying.retain(|&pid| {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            matches!(
                rustix::process::waitid(WaitId::Pid(pid), options),
                Ok(None) | Err(Errno::INTR)
            )
        });
        spared.retain(|pidfd| {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let id = WaitId::PidFd(pidfd.as_fd());
            matches!(rustix::process::waitid(id, options), Ok(None) | Err(Errno::INTR))
        });
    }
}

/// A [`ProcessSpec`] as `posix_spawn` wants it.
struct Image {
    program: PathBuf,
    path: CString,
    /// With the program's name in front.
    args: Vec<CString>,
    /// `NAME=value`.
    env: Vec<CString>,
}

impl Image {
    fn new(spec: &ProcessSpec) -> Result<Self, SpawnError> {
        let refused = |what, text: &OsStr| SpawnError::Text {
            program: spec.program.clone(),
            what,
            text: text.to_owned(),
        };
        let c_string =
            |what, text: &OsStr| CString::new(text.as_bytes()).map_err(|_| refused(what, text));

        let path = c_string("program", spec.program.as_os_str())?;
        let mut args = vec![path.clone()];
        for arg in &spec.args {
            args.push(c_string("argument", arg)?);
        }

        let mut variables: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
        for (name, value) in &spec.env {
            if name.is_empty() || name.as_bytes().contains(&b'=') {
                return Err(refused("environment variable", name));
            }
            match value {
                Some(value) => drop(variables.insert(name.clone(), value.clone())),
                None => drop(variables.remove(name)),
            }
        }
        let mut env = Vec::with_capacity(variables.len());
        for (name, value) in variables {
            let mut entry = name.into_vec();
            entry.push(b'=');
            entry.extend_from_slice(value.as_bytes());
            env.push(c_string("environment variable", OsStr::from_bytes(&entry))?);
        }
        Ok(Self { program: spec.program.clone(), path, args, env })
    }

    /// Starts the process. One that was started and cannot be owned is killed and left in `dying`.
    fn start(self, stdin: OwnedFd, dying: &mut Vec<Pid>) -> Result<DeviceProcess, SpawnError> {
        let program = self.program;
        let lacks = |what| {
            let program = program.clone();
            move |errno: Errno| SpawnError::Resource { program, what, source: errno.into() }
        };

        let stdin = above_standard(stdin).map_err(lacks("standard input"))?;
        let stdout = rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(above_standard)
            .map_err(lacks("standard output"))?;
        let (stderr, writer) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(lacks("standard error pipe"))?;
        let writer = above_standard(writer).map_err(lacks("standard error pipe"))?;

        let standard = [stdin, stdout, writer];
        let pid = posix_spawn(&self.path, &self.args, &self.env, &standard)
            .map_err(|source| SpawnError::Program { program: program.clone(), source })?;
        drop(standard);

        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(DeviceProcess::new(program, pid, pidfd, stderr)),
            Err(errno) => {
                // Our own child, not reaped yet: the pid is still its own.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                dying.push(pid);
                Err(lacks("pidfd")(errno))
            }
        }
    }
}

/// The same, numbered above the standard fds and closed on exec, so that in the child no `dup2`
/// overwrites the source of the next and no copy is left.
fn above_standard(fd: OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3)
}

/// Executes a program with these three as its fds 0, 1 and 2.
fn posix_spawn(
    path: &CString,
    args: &[CString],
    env: &[CString],
    standard: &[OwnedFd; 3],
) -> io::Result<Pid> {
    let mut files = PosixSpawnFileActions::init()?;
    for (number, fd) in (0..).zip(standard) {
        files.add_dup2(fd.as_raw_fd(), number)?;
    }

    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETPGROUP
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
    )?;
    // 0: a group of its own.
    attributes.set_pgroup(nix::unistd::Pid::from_raw(0))?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_sigdefault(&SigSet::all())?;

    let pid = nix::spawn::posix_spawnp(path, &files, &attributes, args, env)?;
    Pid::from_raw(pid.as_raw()).ok_or_else(|| io::Error::other("posix_spawn gave no process id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spawner_from_before_a_fork_is_refused_instead_of_waiting_for_ever() {
        let (jobs, _queue) = mpsc::channel();
        let parent = std::os::unix::process::parent_id();
        let spawner = Spawner { thread: SpawnThread { jobs, owner: parent } };
        let stdin = std::fs::File::open("/dev/null").unwrap();
        let error = spawner.spawn(&ProcessSpec::new("true"), stdin.into()).unwrap_err();
        assert!(matches!(error, SpawnError::ThreadGone { .. }), "{error}");
    }

    #[test]
    fn a_start_that_takes_too_long_is_given_up_and_its_process_ends() {
        let (jobs, queue) = mpsc::channel();
        let owner = std::process::id();
        let spawner = Spawner { thread: SpawnThread { jobs, owner } };
        let stdin = std::fs::File::open("/dev/null").unwrap();
        let time = Duration::from_millis(20);
        let spec = ProcessSpec::new("sleep").arg("60");
        let error = spawner.spawn_within(&spec, stdin.into(), time).unwrap_err();
        assert!(matches!(error, SpawnError::Timeout { .. }), "{error}");
        // Now the thread comes to it after all.
        let Ok(Job::Spawn { image, stdin, reply }) = queue.recv() else { panic!("no job") };
        let process = image.start(stdin, &mut Vec::new()).unwrap();
        let pidfd = process.pidfd().try_clone_to_owned().unwrap();
        drop(reply.send(Ok(process)));
        assert!(super::super::wait_readable(pidfd.as_fd(), Duration::from_secs(30)).unwrap());
    }
}
