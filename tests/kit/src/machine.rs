//! Machines for tests: any device programs, with all that a test needs around them.
//!
//! A [`TestMachine`] is a [`Machine`] and what belongs to it: a folder with the data sockets, guest
//! RAM, a [trace](crate::trace), hooks and local devices that write to it, [relays](Relay) between the
//! coordinator and devices. Deadlines are so long that they never expire on a busy machine, except
//! those of devices that a test expects to miss them ([`impatient`](TestMachineBuilder::impatient)).
//!
//! ```standalone_crate
//! use standstill_coordinator::Slot;
//! use standstill_protocol::message::Phase;
//! use standstill_testkit::plan::{Moment, OutsideAction, Policy};
//! use standstill_testkit::{Script, TestMachine};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let machine = TestMachine::builder()?
//!     // Any program: .device("nic0", "/usr/bin/my-nic", |spec, socket| spec.arg(socket))
//!     .scripted("nic0", Script::honest())
//!     .scripted("disk0", Script::honest())
//!     .relay("disk0")
//!     .impatient("disk0")
//!     .hook("vcpus", Slot::Before)
//!     .policy(Policy::Rollback)
//!     .start()
//!     .await?;
//! machine.relay("disk0").arm(Moment::Command(Phase::Stop), 1, OutsideAction::StopMs(0))?;
//!
//! assert!(machine.pause().await.is_err(), "disk0 stands when it is told to stop");
//! assert_eq!(machine.relay("disk0").fired()?.len(), 1);
//! machine.end().await;
//! # Ok(())
//! # }
//! # fn main() -> Result<std::process::ExitCode, Box<dyn std::error::Error>> {
//! #     if let Some(exit) = standstill_testkit::programs::serve() {
//! #         return Ok(exit);
//! #     }
//! #     let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
//! #     runtime.block_on(example())?;
//! #     Ok(std::process::ExitCode::SUCCESS)
//! # }
//! ```

#![expect(clippy::panic, reason = "a check fails by a panic")]

use crate::chain;
use crate::deadline::{deadlines_of, within};
use crate::outside::data::{DataRelay, Framing};
use crate::outside::{FaultyHook, HookFaults, Relay, RelayError, signals};
use crate::participant::{TracedHook, TracedLocal};
use crate::plan::{HookFault, Limit, Policy};
use crate::process::Processes;
use crate::script::{RogueError, Script};
use crate::trace::Trace;
use rustix::fs::MemfdFlags;
use rustix::process::Pid;
use standstill_coordinator::{
    DeviceSpec, Hook, HookSpec, LocalDevice, LossPolicy, Machine, MachineBuilder, MachineError,
    OnFailure, RestartPolicy, Slot, StartError,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use thiserror::Error;

/// The deadline of a device that is expected to miss it.
pub const SHORT: Duration = Duration::from_millis(600);
/// A deadline that never expires: everybody keeps it, also on a machine with ten times the load.
pub const LONG: Duration = Duration::from_secs(30);
/// How much guest RAM a machine has that says nothing of it, in bytes.
pub const RAM: u64 = 1 << 20;

/// A test machine cannot be made.
#[derive(Debug, Error)]
pub enum TestMachineError {
    /// A file that belongs to it cannot be made.
    #[error("{what} of the test machine: {source}")]
    Io {
        /// What.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The machine did not start.
    #[error("the machine does not start: {0}")]
    Start(#[from] StartError),
    /// Guest RAM was not accepted.
    #[error("guest RAM is not accepted: {0}")]
    Ram(#[source] MachineError),
    /// A relay cannot be made.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// A scripted device cannot be made.
    #[error(transparent)]
    Rogue(#[from] RogueError),
}

/// One device of a machine.
#[derive(Debug)]
struct Member {
    spec: DeviceSpec,
    relayed: bool,
}

/// Describes a machine for tests; see the [module](self).
pub struct TestMachineBuilder {
    folder: TempDir,
    trace: Trace,
    members: Vec<Member>,
    /// The first thing that went wrong; told at the start.
    failed: Option<TestMachineError>,
    builder: MachineBuilder,
    hooks: Vec<HookFaults>,
    ram: u64,
}

impl std::fmt::Debug for TestMachineBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestMachineBuilder").field("members", &self.members).finish_non_exhaustive()
    }
}

impl Policy {
    /// A machine that does this about a failure.
    #[must_use]
    pub fn apply(self, builder: MachineBuilder) -> MachineBuilder {
        match self {
            Self::Rollback => builder.on_failure(OnFailure::Rollback),
            Self::StayStopped => builder.on_failure(OnFailure::StayStopped),
            Self::ContinueWithout => builder.on_loss(LossPolicy::ContinueWithout),
            Self::Restart => builder.on_loss(LossPolicy::Restart(RestartPolicy::default())),
        }
    }
}

impl TestMachineBuilder {
    fn new() -> io::Result<Self> {
        let deadlines = deadlines_of(LONG);
        Ok(Self {
            // A socket's path is short.
            folder: tempfile::Builder::new().prefix("vm-").tempdir()?,
            trace: Trace::new()?,
            members: Vec::new(),
            failed: None,
            builder: MachineBuilder::new("vm").deadlines(deadlines),
            hooks: Vec::new(),
            ram: RAM,
        })
    }

    fn failed<T>(&mut self, result: Result<T, impl Into<TestMachineError>>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.failed.get_or_insert(error.into());
                None
            }
        }
    }

    /// Adds a device of that name, whatever its program is. What else there is to say of it is said
    /// with the path of its data socket.
    #[must_use]
    pub fn device(
        mut self,
        name: &str,
        program: impl Into<PathBuf>,
        describe: impl FnOnce(DeviceSpec, &Path) -> DeviceSpec,
    ) -> Self {
        let spec = describe(DeviceSpec::new(name, program), &socket(&self.folder, name));
        self.members.push(Member { spec, relayed: false });
        self
    }

    /// Adds a device that follows a script and writes to the trace.
    #[must_use]
    pub fn scripted(mut self, name: &str, script: Script) -> Self {
        let spec = script.device(name, &self.trace);
        if let Some(spec) = self.failed(spec) {
            self.members.push(Member { spec, relayed: false });
        }
        self
    }

    fn member(&mut self, name: &str) -> &mut Member {
        match self.members.iter_mut().find(|member| member.spec.name() == name) {
            Some(member) => member,
            None => panic!("the test machine has no device {name:?}"),
        }
    }

    fn change(mut self, name: &str, change: impl FnOnce(DeviceSpec) -> DeviceSpec) -> Self {
        let member = self.member(name);
        member.spec = change(member.spec.clone());
        self
    }

    /// Puts a [relay](Relay) between the coordinator and this device.
    ///
    /// # Panics
    ///
    /// If there is no such device (yet).
    #[must_use]
    pub fn relay(mut self, name: &str) -> Self {
        self.member(name).relayed = true;
        self
    }

    /// Puts a relay between the coordinator and every device that was added before.
    #[must_use]
    pub fn relays(mut self) -> Self {
        self.members.iter_mut().for_each(|member| member.relayed = true);
        self
    }

    /// This device is expected to miss deadlines: it has [`SHORT`] ones in both phases.
    ///
    /// # Panics
    ///
    /// As [`relay`](Self::relay).
    #[must_use]
    pub fn impatient(self, name: &str) -> Self {
        self.change(name, |spec| spec.deadlines(SHORT, SHORT))
    }

    /// The machine may run without this device.
    ///
    /// # Panics
    ///
    /// As [`relay`](Self::relay).
    #[must_use]
    pub fn optional(self, name: &str) -> Self {
        self.change(name, DeviceSpec::optional)
    }

    /// What the machine does about a failure.
    #[must_use]
    pub fn policy(self, policy: Policy) -> Self {
        self.describe(|builder| policy.apply(builder))
    }

    /// Adds a hook that writes to the trace when it is called and when it returns.
    #[must_use]
    pub fn hook(mut self, name: &str, slot: Slot) -> Self {
        let io = |source| TestMachineError::Io { what: "a hook", source };
        match TracedHook::new(name, &self.trace).map_err(io) {
            Ok(hook) => self.describe(|builder| builder.hook(HookSpec::new(name, slot), hook)),
            Err(error) => {
                self.failed.get_or_insert(error);
                self
            }
        }
    }

    /// Adds hooks that do what a plan says; their deadline is [`SHORT`].
    #[must_use]
    pub fn hook_faults(mut self, faults: &[HookFault]) -> Self {
        let io = |source| TestMachineError::Io { what: "a hook", source };
        let hooks = FaultyHook::of(faults, &self.trace).map_err(io);
        for (spec, hook, faults) in self.failed(hooks).into_iter().flatten() {
            self.hooks.push(faults);
            self = self.describe(|builder| builder.hook(spec.deadline(SHORT), hook));
        }
        self
    }

    /// Adds a hook of the test's own.
    #[must_use]
    pub fn own_hook(self, spec: HookSpec, hook: impl Hook) -> Self {
        self.describe(|builder| builder.hook(spec, hook))
    }

    /// Adds a device inside this process, which writes to the trace.
    #[must_use]
    pub fn local(mut self, name: &str) -> Self {
        let io = |source| TestMachineError::Io { what: "a local device", source };
        match TracedLocal::new(name, &self.trace).map_err(io) {
            Ok(local) => self.own_local(name, local),
            Err(error) => {
                self.failed.get_or_insert(error);
                self
            }
        }
    }

    /// Adds a device of the test's own inside this process.
    #[must_use]
    pub fn own_local(self, name: &str, device: impl LocalDevice) -> Self {
        self.describe(|builder| builder.local_device(name, device))
    }

    /// How much guest RAM is declared, in bytes; [`RAM`] by default, none if 0.
    #[must_use]
    pub fn ram(mut self, bytes: u64) -> Self {
        self.ram = bytes;
        self
    }

    /// Whatever else there is to say about the machine. Devices are added by
    /// [`device`](Self::device) alone.
    #[must_use]
    pub fn describe(mut self, change: impl FnOnce(MachineBuilder) -> MachineBuilder) -> Self {
        self.builder = change(self.builder);
        self
    }

    /// The trace, for a script of another machine or a hook of the test's own.
    #[must_use]
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Starts the machine, and declares its guest RAM.
    ///
    /// # Errors
    ///
    /// [`TestMachineError`]; nothing is left then.
    pub async fn start(self) -> Result<TestMachine, TestMachineError> {
        let Self { folder, trace, members, failed, mut builder, hooks, ram } = self;
        if let Some(error) = failed {
            return Err(error);
        }
        let mut relays = BTreeMap::new();
        for Member { mut spec, relayed } in members {
            if relayed {
                let relay = Relay::new()?;
                spec = relay.wrap(spec)?;
                relays.insert(spec.name().to_owned(), relay);
            }
            builder = builder.device(spec);
        }
        let memory = memory(ram).map_err(|source| TestMachineError::Io { what: "RAM", source })?;
        let machine = builder.start().await?;
        if ram > 0 {
            machine.declare_ram(&memory).await.map_err(TestMachineError::Ram)?;
        }
        Ok(TestMachine { machine, relays, trace, hooks, memory, folder })
    }
}

fn socket(folder: &TempDir, name: &str) -> PathBuf {
    folder.path().join(format!("{name}.sock"))
}

fn memory(bytes: u64) -> io::Result<File> {
    let memory = File::from(rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
    memory.set_len(bytes)?;
    Ok(memory)
}

/// A machine that runs, with what belongs to it; see the [module](self).
///
/// It is used as the [`Machine`] that it has. Dropping it ends all processes that belong to it.
#[derive(Debug)]
pub struct TestMachine {
    machine: Machine,
    relays: BTreeMap<String, Relay>,
    trace: Trace,
    hooks: Vec<HookFaults>,
    memory: File,
    folder: TempDir,
}

impl Deref for TestMachine {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl TestMachine {
    /// Describes a machine.
    ///
    /// # Errors
    ///
    /// If its folder or its trace cannot be made.
    pub fn builder() -> io::Result<TestMachineBuilder> {
        TestMachineBuilder::new()
    }

    /// What was told and answered, in one order, by scripted devices, hooks and local devices.
    #[must_use]
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Where the data socket of a device is.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        socket(&self.folder, name)
    }

    /// The folder of the data sockets. It is removed with the machine.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The relay of a device.
    ///
    /// # Panics
    ///
    /// If it has none.
    #[must_use]
    pub fn relay(&self, name: &str) -> &Relay {
        match self.relays.get(name) {
            Some(relay) => relay,
            None => panic!("the test machine has no relay for {name:?}"),
        }
    }

    /// A relay between a vfio-user device and its client, which connects to its
    /// [path](DataRelay::path).
    ///
    /// # Errors
    ///
    /// Those of [`DataRelay::start`]: one at a time for each device.
    pub fn data_relay(&self, name: &str) -> io::Result<DataRelay> {
        let listen = self.folder.path().join(format!("{name}.relay.sock"));
        DataRelay::start(&listen, &self.socket(name), Framing::VfioUser)
    }

    /// What has become of the faults of its hooks.
    #[must_use]
    pub fn hook_faults(&self) -> &[HookFaults] {
        &self.hooks
    }

    /// The present process of a device: its own, also behind a relay.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub async fn process(&self, name: &str) -> Pid {
        if let Some(relay) = self.relays.get(name) {
            return match relay.device() {
                Ok(Some(pid)) => pid,
                other => panic!("no process of {name:?} behind its relay: {other:?}"),
            };
        }
        let status = match self.machine.status().await {
            Ok(status) => status,
            Err(error) => panic!("no status: {error}"),
        };
        let device = status.devices.iter().find(|device| device.name == name);
        let pid = device.and_then(|device| i32::try_from(device.pid?).ok());
        match pid.and_then(Pid::from_raw) {
            Some(pid) => pid,
            None => panic!("no process of {name:?}: {status:?}"),
        }
    }

    /// All processes that the coordinator knows at present.
    ///
    /// # Panics
    ///
    /// If the machine has ended.
    pub async fn processes(&self) -> Processes {
        match self.machine.status().await {
            Ok(status) => Processes::of(&status),
            Err(error) => panic!("no status: {error}"),
        }
    }

    /// SIGKILL for the process of a device; returns when it has ended.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub async fn kill(&self, name: &str) {
        signals::kill(self.process(name).await);
    }

    /// SIGSTOP for the process of a device; returns when it stands.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub async fn stop(&self, name: &str) {
        signals::stop(self.process(name).await);
    }

    /// SIGCONT for the process of a device.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub async fn go_on(&self, name: &str) {
        signals::go_on(self.process(name).await);
    }

    /// Lets the process of a device have no more than that.
    ///
    /// # Panics
    ///
    /// If there is none, or the system refuses.
    pub async fn limit(&self, name: &str, limit: Limit) {
        if let Err(error) = limit.impose(self.process(name).await) {
            panic!("{name:?} cannot be limited to {limit:?}: {error}");
        }
    }

    /// Shuts the machine down and checks that nothing of it is left.
    ///
    /// # Panics
    ///
    /// If it does not end in time, or a process is left; the message has the trace.
    pub async fn end(self) {
        let mut known = self.processes().await;
        for relay in self.relays.values() {
            if let Ok(Some(device)) = relay.device() {
                known.add("a device behind a relay", device);
            }
        }
        let Self { machine, relays, trace, hooks, .. } = self;
        // A hook that does not return would not let the machine end.
        drop(hooks);
        if let Err(error) = within(LONG, "shutdown", machine.shutdown()).await {
            panic!("the machine does not shut down: {}\n{}", chain(&error), trace.text());
        }
        known.assert_gone_within(LONG).await;
        drop(relays);
    }
}
