//! A coordinator in a process of its own, so that a test can kill it, or stop it and let it go on.
//!
//! The program is `pilot`, built with this package. It starts a machine that keeps its device
//! processes and does what it is told on its standard input; when that ends, so does the machine.

#![expect(clippy::panic, reason = "a check fails by a panic")]

use crate::outside::SmallDisk;
use crate::plan::Policy;
use crate::programs::Program;
use crate::script::{RogueError, Script};
use serde::{Deserialize, Serialize};
use standstill_coordinator::{Deadlines, DeviceSpec, MachineBuilder, Presence};
use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// How long a pilot is waited for: far more than it needs.
const PATIENCE: Duration = Duration::from_secs(60);
/// The status with which a pilot ends whose machine was taken over.
pub const SUPERSEDED: u8 = 7;

/// What a pilot's machine is. It travels as JSON, in the program's one argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Course {
    /// The control directory; without one the devices end with the pilot.
    pub directory: Option<PathBuf>,
    /// The devices that follow a script, each with its name.
    pub devices: Vec<Script>,
    /// Devices of any programs.
    #[serde(default)]
    pub programs: Vec<CourseDevice>,
    /// The deadline of each phase.
    pub phase: Duration,
    /// Every other deadline.
    pub other: Duration,
    /// What the machine does about a failure.
    #[serde(default)]
    pub policy: Policy,
}

/// A device of any program. It travels as the rest of a course does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CourseDevice {
    /// The name of the device.
    pub name: String,
    /// Its program.
    pub program: PathBuf,
    /// The program's arguments.
    pub arguments: Vec<OsString>,
    /// Environment variables that it has of its own; without a value, that it does not inherit.
    #[serde(default)]
    pub environment: Vec<(OsString, Option<OsString>)>,
}

impl From<&DeviceSpec> for CourseDevice {
    /// Its name, program, arguments and environment; nothing else of it.
    fn from(device: &DeviceSpec) -> Self {
        let process = device.process();
        Self {
            name: device.name().to_owned(),
            program: process.program().to_owned(),
            arguments: process.arguments().to_vec(),
            environment: process.environment().to_vec(),
        }
    }
}

impl CourseDevice {
    fn spec(&self) -> DeviceSpec {
        let spec = DeviceSpec::new(&self.name, &self.program);
        let spec = spec.args(self.arguments.iter().cloned());
        self.environment.iter().cloned().fold(spec, |spec, (name, value)| match value {
            Some(value) => spec.env(name, value),
            None => spec.env_remove(name),
        })
    }
}

impl Course {
    /// The machine, to be started or taken over.
    ///
    /// # Errors
    ///
    /// If the program of the devices is not there.
    pub fn builder(&self) -> Result<MachineBuilder, RogueError> {
        let Self { directory, devices, programs, phase, other, policy } = self;
        let specs = devices.iter().map(Script::spec).collect::<Result<Vec<_>, _>>()?;
        let deadlines = Deadlines {
            hello: *other,
            first_phase: *phase,
            second_phase: *phase,
            undo: *other,
            fence: *other,
            memory: *other,
            ..Deadlines::default()
        };
        let builder = MachineBuilder::new("vm")
            .deadlines(deadlines)
            .presence(Presence::Optional)
            .devices(specs)
            .devices(programs.iter().map(CourseDevice::spec));
        let builder = policy.apply(builder);
        Ok(match directory {
            Some(directory) => builder.keep(directory),
            None => builder,
        })
    }
}

/// A signal that a test sends to a pilot.
pub use rustix::process::Signal;

/// A pilot does not do what it is told.
#[derive(Debug, Error)]
pub(crate) enum PilotError {
    /// Its standard input is closed.
    #[error("the pilot cannot be told {what:?}")]
    Tell {
        /// What it was to be told.
        what: String,
        /// Why it was not.
        source: io::Error,
    },
    /// It has ended.
    #[error("the pilot ended before it said {expected:?}: {heard:?}")]
    Ended {
        /// What it was to say.
        expected: String,
        /// What it has said.
        heard: Vec<String>,
    },
    /// It says nothing, or something else.
    #[error("the pilot has not said {expected:?}: {heard:?}")]
    Silent {
        /// What it was to say.
        expected: String,
        /// What it has said.
        heard: Vec<String>,
    },
    /// It does not end.
    #[error("the pilot does not end: {0:?}")]
    Lasts(Vec<String>),
    /// It is gone.
    #[error("the pilot cannot be signalled")]
    Signal(#[source] io::Error),
    /// Its end cannot be seen.
    #[error("the pilot cannot be waited for")]
    Wait(#[source] io::Error),
}

/// What a test says of a pilot that fails it.
fn unwrap<T>(result: Result<T, PilotError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{}", crate::chain(&error)),
    }
}

/// A running `pilot`. Dropping it kills it, but not the device processes that outlive it.
pub struct Pilot {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: UnboundedReceiver<String>,
    heard: Vec<String>,
}

impl fmt::Debug for Pilot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pilot").field("pid", &self.child.id()).field("heard", &self.heard).finish()
    }
}

impl Pilot {
    /// Starts a pilot and waits until its machine runs.
    ///
    /// # Errors
    ///
    /// If the program is not there, or cannot be started.
    ///
    /// # Panics
    ///
    /// If its machine does not start.
    pub async fn start(course: &Course) -> io::Result<Self> {
        let mut pilot = Self::begin(course, None)?;
        pilot.hear("started").await;
        Ok(pilot)
    }

    /// Starts a pilot, whose machine may not start; on a small disk, if one is given. Its
    /// [first line](Self::hear) is `started`, or it ends.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn begin(course: &Course, disk: Option<&SmallDisk>) -> io::Result<Self> {
        let arguments = vec![serde_json::to_string(course)?.into()];
        let mut command = Program::Pilot.command(arguments).map_err(io::Error::other)?;
        if let Some(disk) = disk {
            command = disk.command(&command);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let (send, lines) = unbounded_channel();
        std::thread::spawn(move || {
            for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
                let Ok(line) = line else { return };
                // The test may be over.
                let _ = send.send(line);
            }
        });
        Ok(Self { child, stdin, lines, heard: Vec::new() })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it something: `pause`, `resume`, `status`, `leave` (drop the machine and end),
    /// `shutdown`; `ram` and the path of a file, that this is guest RAM.
    ///
    /// # Panics
    ///
    /// If its standard input is closed.
    pub fn tell(&mut self, what: &str) {
        unwrap(self.try_tell(what));
    }

    /// As [`tell`](Self::tell), without a panic.
    pub(crate) fn try_tell(&mut self, what: &str) -> Result<(), PilotError> {
        let stdin = self.stdin.as_mut().ok_or_else(|| io::ErrorKind::BrokenPipe.into());
        let told = stdin.and_then(|stdin| writeln!(stdin, "{what}"));
        told.map_err(|source| PilotError::Tell { what: what.to_owned(), source })
    }

    /// Waits for a line of it that begins like this, and gives the line.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub async fn hear(&mut self, beginning: &str) -> String {
        unwrap(self.try_hear(beginning).await)
    }

    /// As [`hear`](Self::hear), without a panic.
    pub(crate) async fn try_hear(&mut self, beginning: &str) -> Result<String, PilotError> {
        loop {
            let line = tokio::time::timeout(PATIENCE, self.lines.recv()).await;
            let (expected, heard) = (beginning.to_owned(), self.heard.clone());
            let line = line.map_err(|_| PilotError::Silent { expected, heard })?;
            let (expected, heard) = (beginning.to_owned(), self.heard.clone());
            let line = line.ok_or(PilotError::Ended { expected, heard })?;
            self.heard.push(line.clone());
            if line.starts_with(beginning) {
                return Ok(line);
            }
        }
    }

    /// Sends it a signal.
    ///
    /// # Panics
    ///
    /// If it is gone.
    pub fn signal(&self, signal: Signal) {
        unwrap(self.try_signal(signal));
    }

    /// As [`signal`](Self::signal), without a panic.
    pub(crate) fn try_signal(&self, signal: Signal) -> Result<(), PilotError> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let sent = rustix::process::kill_process(pid, signal);
        sent.map_err(|error| PilotError::Signal(error.into()))
    }

    /// Stops it by SIGSTOP, and waits until it stands.
    ///
    /// # Panics
    ///
    /// If it is gone.
    pub async fn freeze(&self) {
        self.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.child.id());
        loop {
            let text = match std::fs::read_to_string(&stat) {
                Ok(text) => text,
                Err(error) => panic!("{stat} cannot be read: {error}"),
            };
            if crate::process::stands(&text) {
                return;
            }
            // Nothing tells whoever is not its tracer.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Kills it and waits until it is gone.
    ///
    /// # Panics
    ///
    /// If it cannot be waited for.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        if let Err(error) = self.child.wait() {
            panic!("the pilot cannot be waited for: {error}");
        }
    }

    /// Waits until it has ended by itself.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub async fn ended(&mut self) -> ExitStatus {
        unwrap(self.try_ended().await)
    }

    /// As [`ended`](Self::ended), without a panic.
    pub(crate) async fn try_ended(&mut self) -> Result<ExitStatus, PilotError> {
        // The end of its output comes first.
        while let Some(line) = tokio::time::timeout(PATIENCE, self.lines.recv())
            .await
            .map_err(|_| PilotError::Lasts(self.heard.clone()))?
        {
            self.heard.push(line);
        }
        self.child.wait().map_err(PilotError::Wait)
    }
}

impl Drop for Pilot {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
