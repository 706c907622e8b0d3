//! A runtime directory of its own for each test, and what runs in it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take that is not measured.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Two copy engines and those lines.
pub(crate) fn two_engines(lines: &str) -> String {
    format!(
        r#"
name = "vm0"
{lines}
[[device]]
name = "engine0"
kind = "copy-engine"
socket = "engine0.sock"
memory = "64KiB"

[[device]]
name = "engine1"
kind = "copy-engine"
socket = "engine1.sock"
memory = "64KiB"
"#
    )
}

/// A folder in which machines live.
pub(crate) struct Place {
    pub(crate) folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        // Short: sockets' paths are.
        Self { folder: tempfile::Builder::new().prefix("op").tempdir_in("/tmp").unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where machines live.
    pub(crate) fn runtime(&self) -> PathBuf {
        self.path("rt")
    }

    /// Writes a file into the folder.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// The command, with this place as its runtime directory.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_standstill"));
        command
            .args(args)
            .env("STANDSTILL_RUNTIME_DIR", self.runtime())
            .env("RUST_LOG", "info")
            .env_remove("STANDSTILL_MACHINE")
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn ask(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must end with this status; returns what it wrote, to standard output
    /// first.
    #[track_caller]
    pub(crate) fn expect(&self, code: i32, args: &[&str]) -> String {
        let output = self.ask(args);
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        text
    }

    /// What a command that must succeed says with `--json`.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let output = self.ask(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Begins to run a machine.
    pub(crate) fn begin(&self, args: &[&str]) -> Running {
        self.spawn(self.command(&[&["run"], args].concat()))
    }

    pub(crate) fn spawn(&self, mut command: Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = child.stderr.take();
        let control = self.runtime().join("vm0/control/machine.json");
        Running { child, stdout, stderr, control }
    }

    /// Runs a machine of that text and waits until it is up.
    pub(crate) fn run(&self, text: &str) -> Running {
        let file = self.write("vm0.toml", text);
        let mut running = self.begin(&[file.to_str().unwrap()]);
        running.is_up();
        running
    }

    /// The pid of a device that is alive.
    #[track_caller]
    pub(crate) fn pid_of(&self, device: &str) -> u64 {
        Self::pid_in(&self.json(&["status"]), device)
    }

    #[track_caller]
    fn pid_in(status: &Value, device: &str) -> u64 {
        let devices = status["devices"].as_array().unwrap();
        let found = devices.iter().find(|found| found["name"] == device);
        found.unwrap_or_else(|| panic!("no {device} in {status}"))["pid"].as_u64().unwrap()
    }

    /// A pidfd of a device that is alive.
    #[track_caller]
    pub(crate) fn device(&self, name: &str) -> OwnedFd {
        pidfd(self.pid_of(name))
    }

    /// The same of a machine that is not the only one.
    #[track_caller]
    pub(crate) fn device_of(&self, machine: &str, name: &str) -> OwnedFd {
        pidfd(Self::pid_in(&self.json(&["status", "-m", machine]), name))
    }

    /// Waits until the status of the machine is as it should be.
    #[track_caller]
    pub(crate) fn status_until(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut status = self.json(&["status"]);
        while !fits(&status) {
            assert!(Instant::now() < deadline, "never {what}: {status}");
            status = self.json(&["status"]);
        }
        status
    }

    /// Talks to the machine without the command.
    pub(crate) fn connect(&self) -> Raw {
        Raw::connect(&self.runtime().join("vm0/operator.sock"))
    }
}

/// A `standstill run`.
pub(crate) struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: Option<ChildStderr>,
    /// Where its devices are recorded.
    control: PathBuf,
}

/// How a `standstill run` ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Running {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits until it says where operators are welcome; returns what it said until then.
    #[track_caller]
    pub(crate) fn is_up(&mut self) -> String {
        let mut said = String::new();
        while !said.contains("operators: ") {
            if self.stdout.read_line(&mut said).unwrap() == 0 {
                let mut errors = String::new();
                self.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
                panic!("it ended: {said}{errors}");
            }
        }
        said
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn ends(mut self) -> Ended {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        // It writes while it ends, and must not wait for us.
        let mut stderr = self.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).map(|_| text)
        });
        assert!(gone(&pidfd, PATIENCE), "it goes on");
        let status = self.child.wait().unwrap();
        let mut stdout = String::new();
        self.stdout.read_to_string(&mut stdout).unwrap();
        Ended { status, stdout, stderr: errors.join().unwrap().unwrap() }
    }

    /// Kills it and waits for its end; its devices may live on.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // Its devices are the next one's.
        self.control = PathBuf::new();
    }

    /// Its devices are not its own any more.
    pub(crate) fn gives_up_its_devices(&mut self) {
        self.control = PathBuf::new();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only if a test has failed is anything left of it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let Ok(record) = std::fs::read(&self.control) else { return };
        let Ok(record) = serde_json::from_slice::<Value>(&record) else { return };
        for device in record["devices"].as_array().into_iter().flatten() {
            let pid = device["process"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
            if let Some(pid) = pid.and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// A pidfd of a process that is alive.
#[track_caller]
pub(crate) fn pidfd(pid: u64) -> OwnedFd {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    pidfd_open(pid, PidfdFlags::empty()).unwrap()
}

pub(crate) fn send(pidfd: &OwnedFd, signal: Signal) {
    pidfd_send_signal(pidfd, signal).unwrap();
}

/// Waits until at most one of these has not ended, and returns that one's place.
#[track_caller]
pub(crate) fn last_of(runs: &[Running]) -> usize {
    let pidfd = |run: &Running| pidfd_open(run.pid(), PidfdFlags::empty()).unwrap();
    let mut left: Vec<_> = runs.iter().map(pidfd).enumerate().collect();
    let deadline = Instant::now() + PATIENCE;
    while left.len() > 1 {
        let within = Timespec::try_from(deadline.saturating_duration_since(Instant::now()));
        let mut fds: Vec<_> = left.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)).collect();
        assert!(poll(&mut fds, Some(&within.unwrap())).unwrap() > 0, "{} go on", left.len());
        let ended: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ended = ended.into_iter();
        left.retain(|_| !ended.next().unwrap_or_default());
    }
    left.first().expect("none goes on").0
}

/// Whether a process ends within that time.
pub(crate) fn gone(pidfd: &OwnedFd, within: Duration) -> bool {
    let within = Timespec::try_from(within).unwrap();
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&within)).unwrap() == 1
}

/// A connection to an operator socket, with nothing in between.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    reader: BufReader<UnixStream>,
    pub(crate) greeting: Value,
}

impl Raw {
    #[track_caller]
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let mut raw = Self { stream, reader, greeting: Value::Null };
        raw.greeting = raw.line().unwrap();
        raw
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Writes a line that is a request.
    pub(crate) fn send(&mut self, id: u64, request: &str, with: &Value) {
        let line = serde_json::json!({ "id": id, "request": request, "with": with });
        self.write(format!("{line}\n").as_bytes());
    }

    /// The next line; `None` at the end.
    #[track_caller]
    pub(crate) fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The next line with that number.
    #[track_caller]
    pub(crate) fn answer(&mut self, id: u64) -> Value {
        loop {
            let line = self.line().unwrap();
            if line["id"] == id {
                return line;
            }
        }
    }
}
