//! Starting this test program as a device process, and speaking to it as a coordinator does.

use standstill_protocol::channel::{CoordinatorEnd, bind};
use standstill_protocol::message::{
    Abort, Command, CoordinatorMessage, DeviceMessage, Epoch, Hello, OrphanPolicy, Phase, Query,
    Reached, Refused, Shutdown, Status, Term, Welcome,
};
use standstill_protocol::migration::MigrationState;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Tells this program that it is a device process, and where its data socket is.
pub(crate) const SOCKET_VARIABLE: &str = "STANDSTILL_TEST_DEVICE_SOCKET";

/// Longer than anything takes here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A device process and the coordinator's end of its control channel.
pub(crate) struct Device {
    pub(crate) process: Child,
    pub(crate) channel: CoordinatorEnd,
    /// What the coordinator says that its term is.
    pub(crate) term: Term,
    folder: TempDir,
}

impl Device {
    /// Starts one that behaves as `script` says; see [`crate::probe`].
    pub(crate) fn start(script: &str) -> (Self, Hello) {
        let folder = tempfile::tempdir().unwrap();
        let (channel, stdin) = CoordinatorEnd::pair().unwrap();
        let process = spawn(&folder.path().join("data.sock"), script, stdin.into());
        let device = Self { process, channel, term: Term(1), folder };
        let DeviceMessage::Hello(hello) = device.next() else { panic!("no Hello") };
        (device, hello)
    }

    /// Starts one and welcomes it, without heartbeats.
    pub(crate) fn welcomed(script: &str) -> Self {
        let (device, _) = Self::start(script);
        device.send(&CoordinatorMessage::Welcome(welcome(OrphanPolicy::Exit)));
        device.channel.set_version(1);
        device
    }

    /// Starts one that is kept and can be taken over, with its log in a pipe if there is one.
    pub(crate) fn kept(script: &str, log: Option<BorrowedFd<'_>>) -> Self {
        let (device, _) = Self::start(script);
        let listener = bind(&device.control_path()).unwrap();
        let message = Welcome { listener: true, log: log.is_some(), ..welcome(OrphanPolicy::Keep) };
        let fds: Vec<_> = [Some(listener.as_fd()), log].into_iter().flatten().collect();
        device.send_with(&CoordinatorMessage::Welcome(message), &fds);
        device.channel.set_version(1);
        // Answered once it listens.
        device.query(0);
        device
    }

    /// Where later coordinators find it.
    pub(crate) fn control_path(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    /// Connects as a later coordinator, and is greeted.
    pub(crate) fn connect(&self) -> (CoordinatorEnd, Hello) {
        let mut connected = None;
        until("there is room for one more", || {
            connected = match CoordinatorEnd::connect(&self.control_path()) {
                Ok(channel) => Some(channel),
                Err(error) if error.kind() == ErrorKind::WouldBlock => None,
                Err(error) => panic!("{error}"),
            };
            connected.is_some()
        });
        let channel = connected.unwrap();
        let DeviceMessage::Hello(hello) = channel.recv(PATIENCE).unwrap().message else {
            panic!("no Hello");
        };
        (channel, hello)
    }

    /// Takes the device over with this term; the old connection, if that is still open.
    pub(crate) fn take_over(&mut self, term: u64) -> CoordinatorEnd {
        self.take_over_as(Welcome { term: Term(term), ..welcome(OrphanPolicy::Keep) }, &[])
    }

    pub(crate) fn take_over_as(
        &mut self,
        message: Welcome,
        fds: &[BorrowedFd<'_>],
    ) -> CoordinatorEnd {
        let (channel, _) = self.connect();
        self.term = message.term;
        channel.send(&CoordinatorMessage::Welcome(message), fds, PATIENCE).unwrap();
        channel.set_version(1);
        std::mem::replace(&mut self.channel, channel)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("data.sock")
    }

    pub(crate) fn send(&self, message: &CoordinatorMessage) {
        self.send_with(message, &[]);
    }

    pub(crate) fn send_with(&self, message: &CoordinatorMessage, fds: &[BorrowedFd<'_>]) {
        self.channel.send(message, fds, PATIENCE).unwrap();
    }

    pub(crate) fn next(&self) -> DeviceMessage {
        self.channel.recv(PATIENCE).unwrap().message
    }

    /// The next answer; events and heartbeats on the way are skipped.
    pub(crate) fn answer(&self) -> DeviceMessage {
        self.answer_within(PATIENCE)
    }

    pub(crate) fn answer_within(&self, patience: Duration) -> DeviceMessage {
        loop {
            match self.channel.recv(patience).unwrap().message {
                DeviceMessage::Event(_) | DeviceMessage::Heartbeat(_) => {}
                message => return message,
            }
        }
    }

    pub(crate) fn command(&self, epoch: u64, phase: Phase, target: MigrationState) {
        let command = Command { term: self.term, ..command(epoch, phase, target) };
        self.send(&CoordinatorMessage::Command(command));
    }

    pub(crate) fn reached(&self) -> Reached {
        match self.answer() {
            DeviceMessage::Reached(reached) => reached,
            other => panic!("expected Reached, got {other:?}"),
        }
    }

    pub(crate) fn refused(&self) -> Refused {
        match self.answer() {
            DeviceMessage::Refused(refused) => refused,
            other => panic!("expected Refused, got {other:?}"),
        }
    }

    /// Sends a command and checks that it leads where it should.
    pub(crate) fn go(&self, epoch: u64, phase: Phase, target: MigrationState) -> Reached {
        self.command(epoch, phase, target);
        let reached = self.reached();
        let found = (reached.term, reached.epoch, reached.phase, reached.state);
        assert_eq!(found, (self.term, Epoch(epoch), phase, target));
        reached
    }

    /// Both phases of a stop.
    pub(crate) fn pause(&self, epoch: u64) {
        self.go(epoch, Phase::PrepareStop, MigrationState::RunningP2p);
        self.go(epoch, Phase::Stop, MigrationState::Stop);
    }

    /// Both phases of a start.
    pub(crate) fn resume(&self, epoch: u64) {
        self.go(epoch, Phase::PrepareStart, MigrationState::RunningP2p);
        self.go(epoch, Phase::Start, MigrationState::Running);
    }

    pub(crate) fn abort(&self, epoch: u64) {
        self.send(&CoordinatorMessage::Abort(Abort { term: self.term, epoch: Epoch(epoch) }));
    }

    pub(crate) fn query(&self, epoch: u64) -> Status {
        self.send(&CoordinatorMessage::Query(Query { term: self.term, epoch: Epoch(epoch) }));
        match self.answer() {
            DeviceMessage::Status(status) => status,
            other => panic!("expected Status, got {other:?}"),
        }
    }

    pub(crate) fn shut_down(mut self) {
        let grace_ns = 1_000_000_000;
        self.send(&CoordinatorMessage::Shutdown(Shutdown { term: self.term, grace_ns }));
        let status = wait(&mut self.process);
        assert_eq!(status.code(), Some(0), "{status}");
        assert!(!self.socket().exists(), "the data socket goes with its process");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts this program as a device process.
pub(crate) fn spawn(socket: &Path, script: &str, stdin: Stdio) -> Child {
    program(socket, script, stdin).spawn().unwrap()
}

/// This program as a device process that is still to be started.
pub(crate) fn program(socket: &Path, script: &str, stdin: Stdio) -> std::process::Command {
    let mut program = std::process::Command::new(std::env::current_exe().unwrap());
    program
        .args(["--exact", "device_process", "--nocapture", "--test-threads=1"])
        .env(SOCKET_VARIABLE, socket)
        .env(crate::probe::SCRIPT_VARIABLE, script)
        .env("RUST_LOG", "debug")
        .stdin(stdin)
        .stdout(Stdio::null());
    program
}

/// Waits for a process to end, not for ever.
pub(crate) fn wait(process: &mut Child) -> ExitStatus {
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
    let pidfd: OwnedFd =
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let ended = rustix::event::poll(
        &mut [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)],
        Some(&PATIENCE.try_into().unwrap()),
    );
    if ended != Ok(1) {
        process.kill().unwrap();
        panic!("the device process did not end within {PATIENCE:?}");
    }
    process.wait().unwrap()
}

/// Waits until something is so, looking again and again.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

pub(crate) fn welcome(orphan: OrphanPolicy) -> Welcome {
    Welcome {
        version: 1,
        machine: Default::default(),
        name: "probe".into(),
        incarnation: 1,
        term: Term(1),
        epoch: Epoch(0),
        heartbeat_ns: 0,
        orphan,
        listener: false,
        log: false,
    }
}

pub(crate) fn command(epoch: u64, phase: Phase, target: MigrationState) -> Command {
    Command {
        term: Term(1),
        epoch: Epoch(epoch),
        phase,
        target,
        budget_ns: 10_000_000_000,
        lease_ns: 0,
    }
}
