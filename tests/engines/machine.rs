//! A machine of three engines that write into each other's memory: what it is, its coordinator in a
//! process of its own, and its clients, which outlive that.

use crate::driver::{Engine, MEMORY};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, pidfd_send_signal,
    waitid,
};
use standstill::coordinator::{
    Deadlines, DeviceSpec, LossPolicy, Machine, MachineBuilder, MachineError, RestartPolicy,
};
use standstill::device_proc::devices::copy_engine::{Descriptor, FLAG_SEQUENCE, FLAG_STAMP};
use standstill::device_proc::memory::SharedMemory;
use standstill::protocol::channel::CoordinatorEnd;
use standstill::protocol::message::{DeviceMessage, Hello};
use standstill::protocol::migration::MigrationState;
use standstill_testkit::deadlines_of;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Tells this program to be the coordinator of the machine that is in it.
pub(crate) const DESCRIPTION_VARIABLE: &str = "STANDSTILL_TEST_ENGINES";
pub(crate) const ENGINES: usize = 3;
/// Longer than anything here takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

const RAM: u64 = 1 << 32;
const BARS: u64 = 1 << 40;
const PAGE: u64 = 4096;
/// What an engine has in guest RAM: a page for its ring, a page that it copies.
const SLOT: u64 = 2 * PAGE;

/// What is told to the coordinator that is lost.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Description {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    /// The file of guest RAM.
    ram: PathBuf,
    /// How long the second engine takes to become quiet, in milliseconds.
    pub(crate) slow_prepare: u64,
    /// How long it takes to stop.
    pub(crate) slow_stop: u64,
}

impl Description {
    pub(crate) fn device(&self, number: usize) -> String {
        format!("{}-engine{number}", self.name)
    }

    pub(crate) fn socket(&self, number: usize) -> PathBuf {
        self.folder.join(format!("data{number}.sock"))
    }

    /// Where a later coordinator finds the machine.
    pub(crate) fn directory(&self) -> PathBuf {
        self.folder.join("vm")
    }

    /// The machine, to be started or taken over.
    pub(crate) fn builder(&self) -> MachineBuilder {
        MachineBuilder::new(&self.name).deadlines(deadlines()).devices((0..ENGINES).map(|number| {
            let slow = |time| if number == 1 { time } else { 0 };
            DeviceSpec::new(self.device(number), env!("CARGO_BIN_EXE_standstill"))
                .args(["device", "copy-engine"])
                .arg(format!("--memory={MEMORY}"))
                .arg(format!("--slow-prepare={}ms", slow(self.slow_prepare)))
                .arg(format!("--slow-stop={}ms", slow(self.slow_stop)))
                .arg("--socket")
                .arg(self.socket(number))
                .on_loss(LossPolicy::Restart(RestartPolicy::default()))
        }))
    }
}

/// Deadlines that never run out.
pub(crate) fn deadlines() -> Deadlines {
    deadlines_of(LONG)
}

/// The coordinator that is lost: does what it is told, line by line.
pub(crate) fn be_a_coordinator(description: &str) {
    let description: Description = serde_json::from_str(description).unwrap();
    let (send, mut orders) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        // Ends with the channel.
        std::io::stdin().lines().map_while(Result::ok).all(|line| send.send(line).is_ok())
    });
    let mut stdout = std::io::stdout();
    let mut say = |what: &str| writeln!(stdout, "\nthe machine {what}").unwrap();
    let coordinate = async {
        let ram = File::options().read(true).write(true).open(&description.ram).unwrap();
        let machine = description.builder().keep(description.directory()).start().await.unwrap();
        machine.declare_ram(&ram).await.unwrap();
        say("runs");
        while let Some(order) = orders.recv().await {
            assert_eq!(order, "pause");
            match machine.pause().await {
                Ok(stopped) => {
                    stopped.leave_stopped();
                    say("stands");
                }
                Err(error) => say(&format!("is not mine: {}", machine_error(&error))),
            }
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(coordinate);
}

/// How a pause ended.
fn machine_error(error: &MachineError) -> String {
    match error {
        MachineError::Transition(report) => format!("{:?}", report.outcome),
        error => panic!("{error}"),
    }
}

/// A coordinator in a process of its own.
pub(crate) struct Coordinator {
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Coordinator {
    fn start(description: &Description) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "first_coordinator", "--nocapture"])
            .env(DESCRIPTION_VARIABLE, serde_json::to_string(description).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut coordinator = Self { process, stdin, stdout: BufReader::new(stdout) };
        coordinator.hear("the machine runs");
        coordinator
    }

    pub(crate) fn tell(&mut self, what: &str) {
        writeln!(self.stdin, "{what}").unwrap();
    }

    /// Waits until it says that. Ends with it if it does not.
    pub(crate) fn hear(&mut self, what: &str) {
        let mut line = String::new();
        while line.trim_end() != what {
            line.clear();
            let read = self.stdout.read_line(&mut line).unwrap();
            assert_ne!(read, 0, "the coordinator has ended before {what:?}");
        }
    }

    /// SIGSTOP, and waits until it stands.
    pub(crate) fn freeze(&self) {
        let pid = Pid::from_child(&self.process);
        kill_process(pid, Signal::STOP).unwrap();
        waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).unwrap();
    }

    /// SIGCONT.
    pub(crate) fn wake(&self) {
        kill_process(Pid::from_child(&self.process), Signal::CONT).unwrap();
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // Both fail if it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The guest: its RAM, and a client of each engine. It lives on whatever becomes of coordinators.
pub(crate) struct Guest {
    pub(crate) description: Description,
    pub(crate) ram: SharedMemory,
    pub(crate) engines: Vec<Engine>,
    /// Removed at the end.
    _folder: TempDir,
}

impl Guest {
    /// A machine that is described and not started. The name is that of the test.
    pub(crate) fn new(name: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("engines-").tempdir_in("/tmp").unwrap();
        let ram = SharedMemory::create("guest-ram", ENGINES as u64 * SLOT).unwrap();
        let fd = ram.as_fd().as_raw_fd();
        let description = Description {
            name: name.to_owned(),
            folder: folder.path().to_owned(),
            ram: format!("/proc/{}/fd/{fd}", std::process::id()).into(),
            slow_prepare: 0,
            slow_stop: 0,
        };
        Self { description, ram, engines: Vec::new(), _folder: folder }
    }

    pub(crate) fn coordinator(&self) -> Coordinator {
        Coordinator::start(&self.description)
    }

    /// IOVA of an engine's memory.
    pub(crate) fn bar(number: usize) -> u64 {
        BARS + number as u64 * MEMORY
    }

    /// Connects to all engines and maps everything into everything.
    pub(crate) fn connect(&mut self) {
        let description = self.description.clone();
        self.connect_at(|number| description.socket(number));
    }

    /// The same at other paths than the engines' own.
    pub(crate) fn connect_at(&mut self, path: impl Fn(usize) -> PathBuf) {
        self.engines = (0..ENGINES).map(|number| Engine::connect(&path(number))).collect();
        for number in 0..ENGINES {
            self.wire(number);
        }
    }

    /// Connects to all engines, maps everything into everything, and sets them to work.
    pub(crate) fn set_to_work(&mut self) {
        self.connect();
        for number in 0..ENGINES {
            self.start(number);
        }
    }

    /// Maps everything into one engine.
    pub(crate) fn wire(&mut self, number: usize) {
        self.engines[number].map(RAM, &self.ram);
        for peer in (0..ENGINES).filter(|&peer| peer != number) {
            self.map_peer(number, peer);
        }
    }

    /// Maps the memory of a peer into an engine.
    pub(crate) fn map_peer(&mut self, number: usize, peer: usize) {
        let [engine, peer_engine] = self.engines.get_disjoint_mut([number, peer]).unwrap();
        engine.map(Self::bar(peer), &peer_engine.memory);
    }

    /// Writes the ring of an engine and starts it.
    pub(crate) fn start(&mut self, number: usize) {
        let slot = number as u64 * SLOT;
        let peers = (0..ENGINES).filter(|&peer| peer != number);
        let ring: Vec<_> = peers
            .map(|peer| Descriptor {
                source: RAM + slot + PAGE,
                destination: Self::bar(peer) + (1 + number as u64) * PAGE,
                len: 4096,
                flags: FLAG_SEQUENCE | FLAG_STAMP,
                sequence_iova: Self::bar(peer) + number as u64 * 8,
                vector: 0,
            })
            .collect();
        let bytes: Vec<_> = ring.iter().flat_map(Descriptor::to_bytes).collect();
        self.ram.write(slot, &bytes).unwrap();
        self.engines[number].start(RAM + slot, &ring);
    }

    /// The number of the last write of an engine into a peer's memory.
    pub(crate) fn written(&self, writer: usize, receiver: usize) -> u64 {
        self.engines[receiver].memory.load_u64(writer as u64 * 8).unwrap()
    }

    /// The number of the last write of each engine into each peer's memory: first the writer.
    pub(crate) fn mailboxes(&self) -> [[u64; ENGINES]; ENGINES] {
        std::array::from_fn(|writer| std::array::from_fn(|receiver| self.written(writer, receiver)))
    }

    /// Waits until each of these engines has written into every peer from now on.
    pub(crate) async fn assert_writing(&self, writers: &[usize]) {
        let all = || {
            writers.iter().flat_map(|&writer| {
                let receivers = (0..ENGINES).filter(move |&receiver| receiver != writer);
                receivers.map(move |receiver| (writer, receiver))
            })
        };
        let before: Vec<_> = all().map(|(w, r)| self.written(w, r)).collect();
        for ((writer, receiver), before) in all().zip(before) {
            let what = format!("engine{writer} writes into engine{receiver}");
            until(&what, || self.written(writer, receiver) != before).await;
            // The first one may have been half way.
            let before = self.written(writer, receiver);
            until(&what, || self.written(writer, receiver) != before).await;
        }
    }

    /// What is in all memory that an engine can write.
    pub(crate) fn sight(&self) -> Vec<u64> {
        self.engines.iter().map(|engine| engine.memory.hash()).chain([self.ram.hash()]).collect()
    }

    /// What an engine says to whoever connects: nothing is changed by that.
    pub(crate) fn hello(&self, number: usize) -> (Hello, CoordinatorEnd) {
        let device = self.description.device(number);
        let path = self.description.directory().join(format!("{device}.sock"));
        let channel = CoordinatorEnd::connect(&path).unwrap();
        match channel.recv(LONG).unwrap().message {
            DeviceMessage::Hello(hello) => (hello, channel),
            other => panic!("{other:?}"),
        }
    }

    /// Where all engines say that they are.
    pub(crate) fn states(&self) -> [MigrationState; ENGINES] {
        std::array::from_fn(|number| self.hello(number).0.state)
    }

    /// Waits until they say that they are there.
    pub(crate) async fn until_in(&self, states: [MigrationState; ENGINES]) {
        until(&format!("all are in {states:?}"), || self.states() == states).await;
    }

    /// Their processes.
    pub(crate) fn processes(&self) -> Processes {
        let pid = |number| self.hello(number).1.peer_credentials().unwrap().pid;
        Processes((0..ENGINES).map(|number| process(pid(number))).collect())
    }

    /// Nothing is left in the control directory.
    pub(crate) fn assert_directory_empty(&self) {
        let left: Vec<_> = std::fs::read_dir(self.description.directory()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Device processes, which end with this if a test fails.
pub(crate) struct Processes(Vec<OwnedFd>);

impl Processes {
    pub(crate) fn all_live(&self) -> bool {
        self.0.iter().all(|process| !ended(process, Duration::ZERO))
    }

    pub(crate) fn assert_all_end(&self) {
        for (number, process) in self.0.iter().enumerate() {
            assert!(ended(process, LONG), "engine{number} is left behind");
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for process in &self.0 {
            // Fails if it has ended, as it should have.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
}

/// The present process of a device.
pub(crate) async fn pid(machine: &Machine, device: usize) -> Pid {
    let pid = machine.status().await.unwrap().devices[device].pid.unwrap();
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

pub(crate) fn process(pid: i32) -> OwnedFd {
    pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()
}

fn ended(process: &OwnedFd, within: Duration) -> bool {
    let within = Timespec::try_from(within).unwrap();
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&within)).unwrap() > 0
}

/// Waits until something is so that nobody tells.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "not within {LONG:?}: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
