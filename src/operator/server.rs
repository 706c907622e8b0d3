//! The end of `standstill run`: listens, knows who may come, and does what is asked.

use super::connection::{self, Responder};
use super::history::{History, timestamp};
use super::message::{
    Body, Code, Greeting, Line, PROTOCOL, Problem, RemoveReply, ReportsReply, Request,
    ShutdownReply, StatusReply, VmStatus, line,
};
use crate::explain::explain;
use crate::machine_file::checks::{Beginning, open_ram};
use crate::machine_file::{MachineFile, Orphan, Places, Problems};
use crate::run::directory::{AddedDevice, MachineDirectory};
use rustix::fs::{AtFlags, CWD, Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::geteuid;
use serde::Serialize;
use standstill::coordinator::status::JsonStatus;
use standstill::coordinator::{Machine, MachineError};
use standstill::protocol::transition::MachineState;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

/// How many clients may be connected.
pub(crate) const MAX_CLIENTS: usize = 32;
/// Clients that may wait to be taken.
const BACKLOG: i32 = 16;
/// How long clients may take to read their last answers when the machine has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a client that is sent away may take to read why.
const REFUSAL: Duration = Duration::from_millis(100);
/// What goes wrong for a moment, such as no free file descriptor, is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// QEMU waits so long for the answer to an access of its guest.
const LEASE_LIMIT: Duration = Duration::from_secs(5);

/// What to do about a machine that is held.
pub(crate) const ADVICE_HELD: &str = "`standstill report` says what is not proven. If the VM does not \
                                      run elsewhere and nothing of a lost device can still write: \
                                      `standstill accept-hold`, then `standstill resume`";

/// What an operator can do with one machine.
pub(crate) struct Operator {
    pub(crate) machine: Machine,
    pub(crate) history: History,
    pub(crate) file: MachineFile,
    /// The runtime directory of all machines.
    pub(crate) runtime: PathBuf,
    pub(crate) directory: Arc<MachineDirectory>,
    pub(crate) endings: mpsc::Sender<Ending>,
    /// Where the VM is, if the machine has one.
    pub(crate) vm: Option<watch::Receiver<VmStatus>>,
}

/// A client wants the machine to end.
pub(crate) struct Ending {
    /// The device processes are left for a later coordinator.
    pub(crate) keep: bool,
    /// Where the client waits.
    pub(crate) reply: oneshot::Sender<Result<ShutdownReply, Problem>>,
}

/// The listening operator socket. Dropping it removes the socket, unless another one has taken its
/// place, and ends all connections.
pub(crate) struct Server {
    path: PathBuf,
    identity: (u64, u64),
    closing: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Listens at `path` in the place of whatever is there: whoever calls this has the machine.
    pub(crate) fn start(path: PathBuf, operator: Arc<Operator>) -> io::Result<Self> {
        let (listener, identity) = listen(&path)?;
        let (closing, closed) = watch::channel(false);
        let task = tokio::spawn(accept(listener, operator, closed));
        Ok(Self { path, identity, closing, task })
    }

    /// Takes nobody any more and waits, not for long, until everybody has their answers.
    pub(crate) async fn finish(mut self) {
        let _ = self.closing.send(true);
        if tokio::time::timeout(LAST_WORDS, &mut self.task).await.is_err() {
            tracing::debug!("some clients have not read their last answers");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let there = rustix::fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW);
        let ours = there.is_ok_and(|there| (there.st_dev, there.st_ino) == self.identity);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "removing the operator socket");
        }
    }
}

/// Binds beside the place and moves the socket there: no moment has none, and none has another mode
/// than 0600. Tells which file it is: what is at the place a moment later may be another one's.
fn listen(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    // Of this process alone: several may take the machine over at once. No longer than the place.
    let new = path.with_file_name(format!("new.{}", std::process::id()));
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before bind: the file then never has another mode.
    fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(&new)?)?;
    rustix::net::listen(&fd, BACKLOG)?;
    let status = rustix::fs::statat(CWD, &new, AtFlags::SYMLINK_NOFOLLOW)?;
    std::fs::rename(&new, path)?;
    Ok((UnixListener::from_std(fd.into())?, (status.st_dev, status.st_ino)))
}

async fn accept(
    listener: UnixListener,
    operator: Arc<Operator>,
    mut closing: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closing.wait_for(|closing| *closing) => break,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "an operator cannot be taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(problem) = admit(&stream) {
            tracing::warn!(problem.message, "an operator is sent away");
            send_away(stream, problem).await;
            continue;
        }
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            let message = format!("{MAX_CLIENTS} clients are connected already");
            send_away(stream, problem(Code::Busy, message)).await;
            continue;
        };
        let (operator, closing) = (Arc::clone(&operator), closing.clone());
        connections.spawn(async move {
            connection::serve(stream, operator, closing).await;
            drop(place);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether that client may do anything: this user and root may.
fn admit(stream: &UnixStream) -> Result<(), Problem> {
    let ours = geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == ours || peer.uid() == 0 => Ok(()),
        Ok(peer) => {
            let message =
                format!("user {} may not operate this machine, {ours} and 0 may", peer.uid());
            Err(problem(Code::Refused, message))
        }
        Err(error) => Err(problem(Code::Refused, format!("nobody knows who you are: {error}"))),
    }
}

async fn send_away(mut stream: UnixStream, problem: Problem) {
    let line = line(&Line { id: None, body: Body::Error(problem) });
    // A new connection has room for a line; who does not read it is not waited for.
    let _ = tokio::time::timeout(REFUSAL, stream.write_all(&line)).await;
}

/// Whether a lease is one that a VMM lives with.
fn check_lease(lease: Duration) -> Result<(), Problem> {
    if lease.is_zero() {
        return Err(problem(Code::BadRequest, "a lease of no time at all is none: leave it out"));
    }
    if lease >= LEASE_LIMIT {
        let message = format!(
            "a lease of {} is too long: it must be shorter than {}, after which QEMU takes a device \
             that does not answer for broken",
            humantime::format_duration(lease),
            humantime::format_duration(LEASE_LIMIT),
        );
        return Err(problem(Code::BadRequest, message));
    }
    Ok(())
}

/// A problem without advice.
pub(crate) fn problem(code: Code, message: impl Into<String>) -> Problem {
    Problem { code, message: message.into(), advice: None, report: None }
}

fn ok(value: impl Serialize) -> Body {
    match serde_json::to_value(value) {
        Ok(value) => Body::Ok(value),
        Err(error) => Body::Error(problem(Code::Failed, error.to_string())),
    }
}

fn done(result: Result<(), Problem>) -> Body {
    result.map_or_else(Body::Error, |()| ok(serde_json::json!({})))
}

impl Responder for Operator {
    fn greeting(&self) -> Greeting {
        Greeting {
            protocol: PROTOCOL,
            program: concat!("standstill ", env!("CARGO_PKG_VERSION")).to_owned(),
            machine: self.file.name.clone(),
            pid: std::process::id(),
        }
    }

    fn history(&self) -> &History {
        &self.history
    }

    async fn answer(&self, request: Request) -> Body {
        match request {
            Request::Status {} => self.status().await.map_or_else(Body::Error, ok),
            Request::Pause { lease_ns } => self.pause(lease_ns).await.unwrap_or_else(Body::Error),
            Request::Resume {} => match self.machine.resume().await {
                Ok(report) => ok(&*self.history.report(&report)),
                Err(error) => Body::Error(self.problem(&error)),
            },
            Request::Cancel {} => done(self.told(self.machine.cancel().await)),
            Request::AcceptHold {} => done(self.told(self.machine.accept_hold().await)),
            Request::Shutdown { keep_devices } => {
                self.shutdown(keep_devices).await.map_or_else(Body::Error, ok)
            }
            Request::Add { toml, directory } => done(self.add(toml, directory).await),
            Request::Remove { device } => match self.machine.remove_device(&device).await {
                Ok(exit) => {
                    self.directory.forget(&device);
                    ok(RemoveReply { exit: exit.map(|exit| exit.to_string()) })
                }
                Err(error) => Body::Error(self.problem(&error)),
            },
            Request::Restart { device } => {
                done(self.told(self.machine.restart_device(&device).await))
            }
            Request::Report { last } => {
                let last = usize::try_from(last).unwrap_or(usize::MAX);
                ok(ReportsReply { reports: self.history.reports(last) })
            }
            Request::DeclareRam { path } => done(self.declare_ram(&path).await),
            Request::Events { .. } => {
                Body::Error(problem(Code::BadRequest, "events are not one answer"))
            }
        }
    }
}

impl Operator {
    fn told(&self, result: Result<(), MachineError>) -> Result<(), Problem> {
        result.map_err(|error| self.problem(&error))
    }

    /// Where the machine is.
    pub(crate) async fn status(&self) -> Result<StatusReply, Problem> {
        let status = self.machine.status().await.map_err(|error| self.problem(&error))?;
        Ok(StatusReply {
            status: JsonStatus::from(&status),
            since: timestamp(self.history.since),
            pid: std::process::id(),
            orphan: self.file.orphan.name().to_owned(),
            last: self.history.last(),
            vm: self.vm.as_ref().map(|vm| vm.borrow().clone()),
        })
    }

    async fn pause(&self, lease_ns: Option<u64>) -> Result<Body, Problem> {
        let stopped = match lease_ns.map(Duration::from_nanos) {
            None => self.machine.pause().await,
            Some(lease) => {
                check_lease(lease)?;
                self.machine.pause_leased(lease).await
            }
        };
        let stopped = stopped.map_err(|error| self.problem(&error))?;
        let reply = self.history.report(stopped.report());
        stopped.leave_stopped();
        Ok(ok(&*reply))
    }

    async fn shutdown(&self, keep: bool) -> Result<ShutdownReply, Problem> {
        if keep && self.file.orphan == Orphan::Exit {
            let message = "the devices of this machine end with their coordinator: its file says \
                           orphan = \"exit\"";
            return Err(problem(Code::Refused, message));
        }
        let (reply, answer) = oneshot::channel();
        let gone = || problem(Code::Gone, "the machine is ending already");
        self.endings.send(Ending { keep, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn add(&self, toml: String, directory: Option<PathBuf>) -> Result<(), Problem> {
        let directory = directory.unwrap_or_else(|| PathBuf::from("/"));
        if !directory.is_absolute() {
            let message = format!("{} is no absolute path", directory.display());
            return Err(problem(Code::BadRequest, message));
        }
        let mut problems = Problems::new("device", toml.clone());
        let places = Places { file: directory.clone(), runtime: self.runtime.clone() };
        let device = self.file.read_device(&toml, &places, &mut problems);
        if let Some(device) = &device {
            // Said first: its socket would be in the way, too.
            let name = &device.name.value;
            let status = self.machine.status().await.map_err(|error| self.problem(&error))?;
            if problems.is_empty() && status.devices.iter().any(|there| there.name == *name) {
                let message =
                    format!("adding device {name:?} is not possible: there is one of that name");
                let advice = "choose another name, or take that one out (`standstill remove`)";
                let code = Code::Refused;
                return Err(Problem { advice: Some(advice.to_owned()), ..problem(code, message) });
            }
        }
        let device = device.filter(|device| {
            if problems.is_empty() {
                device.check(Beginning::Start, self.directory.path(), &mut problems);
            }
            problems.is_empty()
        });
        let Some(device) = device else {
            return Err(problem(Code::BadDevice, problems.render(false)));
        };
        let spec = device.spec();
        let spec = spec.map_err(|error| problem(Code::Failed, error.to_string()))?;
        let name = device.name.value.clone();
        self.told(self.machine.add_device(spec).await)?;
        let added = AddedDevice { name, toml, directory };
        self.directory.remember(&added).map_err(|error| {
            let text = format!(
                "the device is added, and a later coordinator will not know it: {}",
                explain(&error)
            );
            problem(Code::Failed, text)
        })
    }

    async fn declare_ram(&self, path: &Path) -> Result<(), Problem> {
        if !path.is_absolute() {
            let message = format!("{} is no absolute path", path.display());
            return Err(problem(Code::BadRequest, message));
        }
        let file = open_ram(path).map_err(|error| {
            problem(
                Code::Refused,
                format!("{} cannot be declared as guest RAM: {error}", path.display()),
            )
        })?;
        self.told(self.machine.declare_ram(&file).await)
    }

    /// What a client is told about an error.
    fn problem(&self, error: &MachineError) -> Problem {
        let (code, advice) = match error {
            MachineError::Transition(_) => (Code::Transition, None),
            MachineError::State { under_way: Some(_), .. } => (
                Code::Refused,
                Some("wait for its end (`standstill status`), or give it up: `standstill cancel`"),
            ),
            MachineError::State { machine: MachineState::Held, .. } => {
                (Code::Refused, Some(ADVICE_HELD))
            }
            MachineError::State { .. } | MachineError::Device { .. } => (Code::Refused, None),
            MachineError::Plan { .. } | MachineError::TooMuchRam { .. } => (Code::Refused, None),
            MachineError::Missing { .. } => (
                Code::Refused,
                Some("bring it back (`standstill restart`), or take it out (`standstill remove`)"),
            ),
            MachineError::NoDevice { .. } => {
                (Code::Refused, Some("`standstill status` has the names of all devices"))
            }
            MachineError::NotHeld(_) | MachineError::Cancelled { .. } => (Code::Refused, None),
            MachineError::Unproven { .. } => (
                Code::Failed,
                Some("docs/failures.md says what to look for; it can be removed again"),
            ),
            MachineError::Superseded { .. } => (Code::Superseded, None),
            MachineError::Busy(_) => (Code::Busy, None),
            MachineError::Gone => (Code::Gone, None),
            _ => (Code::Failed, None),
        };
        let report = match error {
            MachineError::Transition(report) => {
                Some(Box::new((*self.history.report(report)).clone()))
            }
            _ => None,
        };
        Problem { code, message: explain(error), advice: advice.map(str::to_owned), report }
    }
}
