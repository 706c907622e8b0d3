//! Guests: how they are described, and how a test deals with one that runs.

use super::Qemu;
use super::console::{Console, Log};
use super::cpio::Archive;
use super::modules::{Module, ModuleError};
use super::program::{ProgramFileError, pack};
use super::qmp::{Qmp, QmpError};
use super::run::wait;
use super::spawn::spawn;
use crate::chain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::process::Pid;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tempfile::TempDir;
use thiserror::Error;

/// RAM of a guest that says nothing of it, in bytes.
const RAM: u64 = 256 << 20;
/// How long QEMU may take to start. It connects to all its devices before it makes the QMP socket
/// of use.
const START: Duration = Duration::from_secs(60);
/// How long QEMU may take to end when it was told to.
const QUIT: Duration = Duration::from_secs(30);

/// Something about a guest does not work.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A file that belongs to it cannot be made.
    #[error("{what} of the guest: {source}")]
    Io {
        /// What.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A program for it cannot be packed.
    #[error("a program for the guest cannot be packed")]
    Program(#[from] ProgramFileError),
    /// A module for it cannot be had.
    #[error("a module for the guest cannot be had")]
    Module(#[from] ModuleError),
    /// QEMU does not start.
    #[error("QEMU does not start ({}): {stderr}", .status.map_or("it did not end".to_owned(), |s| s.to_string()))]
    Start {
        /// How it ended, if it did.
        status: Option<ExitStatus>,
        /// What it said.
        stderr: String,
    },
    /// Something did not come in time.
    #[error("waited {within:?} in vain for {waited_for}")]
    Late {
        /// What.
        waited_for: String,
        /// How long.
        within: Duration,
    },
    /// QEMU has ended.
    #[error("QEMU has ended before {waited_for}")]
    Ended {
        /// What was waited for.
        waited_for: String,
    },
    /// The guest's kernel has come to an end.
    #[error("the guest's kernel has panicked before {waited_for}: {line}")]
    Panic {
        /// What was waited for.
        waited_for: String,
        /// What it said.
        line: String,
    },
    /// It does not move.
    #[error("the guest does not move, its migration has {status}: {why}")]
    Migration {
        /// How it ended.
        status: String,
        /// What QEMU says.
        why: String,
    },
    /// A QMP command failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl GuestError {
    fn io(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// A file that the guest has.
#[derive(Debug)]
enum GuestFile {
    Content { path: String, content: Vec<u8>, permissions: u32 },
    Program { path: String, of: PathBuf },
}

/// Describes a guest; see the [module](super).
#[derive(Debug)]
pub struct GuestBuilder<'a> {
    qemu: &'a Qemu,
    memory: u64,
    /// Its RAM is QEMU's own.
    anonymous: bool,
    /// It comes from another QEMU.
    incoming: bool,
    processors: u32,
    /// Each is two arguments: an option and its value.
    options: Vec<(&'static str, OsString)>,
    /// How many devices have a PCI Express port of their own.
    ports: u32,
    modules: Vec<String>,
    files: Vec<GuestFile>,
    init: String,
}

impl<'a> GuestBuilder<'a> {
    pub(super) fn new(qemu: &'a Qemu) -> Self {
        let (options, modules, files) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            qemu,
            memory: RAM,
            anonymous: false,
            incoming: false,
            processors: 1,
            options,
            ports: 0,
            modules,
            files,
            init: String::new(),
        }
    }

    /// How much RAM it has, in bytes: whole MiB, 256 MiB if nothing is said.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Its RAM is memory of QEMU's process that nobody else can map: vfio-user devices reach it by
    /// messages to QEMU (`DMA_READ`, `DMA_WRITE`). [`Guest::memory`] is an empty file then.
    #[must_use]
    pub fn anonymous_memory(mut self) -> Self {
        self.anonymous = true;
        self
    }

    /// It does not boot, but waits for a guest that is described in the same way and is sent to it
    /// ([`Guest::begin_to_receive`]).
    #[must_use]
    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    /// How many processors it has: 1 if nothing is said.
    #[must_use]
    pub fn processors(mut self, processors: u32) -> Self {
        self.processors = processors;
        self
    }

    /// A device that a process serves over vfio-user at this socket. It has a PCI Express port of its
    /// own, named `<id>-port`, so that it can be unplugged (`device_del` of this id).
    #[must_use]
    pub fn vfio_user(mut self, id: &str, socket: &Path) -> Self {
        let port = format!("{id}-port");
        self.ports += 1;
        // Slots of a machine have numbers, which QEMU does not choose by itself.
        let number = self.ports;
        let device =
            json!({ "driver": "pcie-root-port", "id": port, "chassis": number, "slot": number });
        self.device(&device).device(&json!({
            "driver": "vfio-user-pci",
            "id": id,
            "bus": port,
            "socket": { "type": "unix", "path": socket.to_string_lossy() },
        }))
    }

    /// A disk that a process serves over vhost-user at this socket, `/dev/vda` if it is the first. QEMU
    /// connects again where the process is lost.
    #[must_use]
    pub fn vhost_user_blk(self, id: &str, socket: &Path, queues: u16) -> Self {
        let channel = format!("{id}-channel");
        // A comma in a path is written twice.
        let path = socket.to_string_lossy().replace(',', ",,");
        self.module("virtio_blk")
            .module("virtio_pci")
            .option("-chardev", format!("socket,id={channel},path={path},reconnect-ms=100"))
            .device(&json!({
                "driver": "vhost-user-blk-pci",
                "id": id,
                "chardev": channel,
                "num-queues": queues,
            }))
    }

    /// Any device, by the properties that QEMU's `-device` takes as JSON.
    #[must_use]
    pub fn device(self, properties: &Value) -> Self {
        self.option("-device", properties.to_string())
    }

    /// Any other option of QEMU with its value: a `-chardev`, a `-drive`, an `-object`.
    #[must_use]
    pub fn option(mut self, option: &'static str, value: impl Into<OsString>) -> Self {
        self.options.push((option, value.into()));
        self
    }

    /// Has the guest load a kernel module, after those that were named before, and after those that it
    /// needs. One that the kernel has built in is not loaded.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// Gives the guest a file with these permissions.
    #[must_use]
    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>, permissions: u32) -> Self {
        let (path, content) = (path.to_owned(), content.into());
        self.files.push(GuestFile::Content { path, content, permissions });
        self
    }

    /// Gives the guest a program of this machine, with the shared libraries that it needs: any program
    /// that cargo has built will do, also the running test itself (`std::env::current_exe()`).
    #[must_use]
    pub fn program(mut self, path: &str, of: impl Into<PathBuf>) -> Self {
        self.files.push(GuestFile::Program { path: path.to_owned(), of: of.into() });
        self
    }

    /// What the guest does when it is up, as a script for busybox's shell, as root and on the console.
    /// `/proc`, `/sys` and `/dev` are mounted, modules are loaded. Where the script ends, the guest turns
    /// itself off, and QEMU ends.
    #[must_use]
    pub fn init(mut self, script: &str) -> Self {
        script.clone_into(&mut self.init);
        self
    }

    /// Starts QEMU, and returns when it answers; the guest is not up then.
    ///
    /// # Errors
    ///
    /// If something that the guest is to have cannot be had, or QEMU does not start within a minute.
    pub fn start(self) -> Result<Guest, GuestError> {
        let folder = tempfile::Builder::new().prefix("guest-").tempdir();
        let folder = folder.map_err(GuestError::io("the folder"))?;
        let initramfs = folder.path().join("initramfs");
        self.write_initramfs(&initramfs)?;
        let shared = if self.anonymous { 0 } else { self.memory };
        let memory = memory(shared).map_err(GuestError::io("the RAM"))?;
        let socket = folder.path().join("qmp");
        // QEMU connects, so that there is no time at which it could not be connected to.
        let listener = UnixListener::bind(&socket).map_err(GuestError::io("the QMP socket"))?;
        let mut command = self.qemu.command();
        let ram = if self.anonymous {
            format!("memory-backend-ram,id=ram,size={},share=off", self.memory)
        } else {
            let (pid, fd) = (std::process::id(), memory.as_raw_fd());
            let path = format!("/proc/{pid}/fd/{fd}");
            format!("memory-backend-file,id=ram,size={},mem-path={path},share=on", self.memory)
        };
        command
            .args(["-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "max"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-smp", &self.processors.to_string(), "-m", &format!("{}B", self.memory)])
            .args(["-object", &ram])
            .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
            .arg("-qmp")
            .arg(format!("unix:{},server=off", socket.display()))
            .arg("-kernel")
            .arg(&self.qemu.kernel)
            .arg("-initrd")
            .arg(&initramfs)
            // A kernel that panics stands, for the test to find what it said. Whether its timer ticks it
            // does not check: on a busy machine it may not, for a moment.
            .args(["-append", "console=ttyS0 panic=0 quiet no_timer_check"]);
        if self.qemu.ends_with_parent {
            command.args(["-run-with", "exit-with-parent=on"]);
        }
        if self.incoming {
            command.args(["-incoming", "defer"]);
        }
        for (option, value) in &self.options {
            command.arg(option).arg(value);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = spawn(command).map_err(GuestError::io("the QEMU process"))?;
        Guest::of(Process(child), &listener, memory, folder)
    }

    fn write_initramfs(&self, path: &Path) -> Result<(), GuestError> {
        let failed = GuestError::io("the initramfs");
        let modules = self.qemu.modules.load(&self.modules)?;
        let mut archive = Archive::new(BufWriter::new(File::create(path).map_err(&failed)?));
        let mut libraries = Vec::new();
        for file in &self.files {
            match file {
                GuestFile::Content { path, content, permissions } => {
                    archive.file(path, content, *permissions).map_err(&failed)?;
                }
                GuestFile::Program { path, of } => {
                    let (content, needed) = pack(of)?;
                    archive.file(path, &content, 0o755).map_err(&failed)?;
                    libraries.extend(needed);
                }
            }
        }
        libraries.sort();
        libraries.dedup();
        let busybox = fs::read(&self.qemu.busybox).map_err(&failed)?;
        let fill = |archive: &mut Archive<_>| {
            for (path, content) in &libraries {
                archive.file(path, content, 0o755)?;
            }
            for folder in ["proc", "sys", "dev", "tmp", "bin", "sbin", "usr/bin", "usr/sbin"] {
                archive.folder(folder)?;
            }
            // The console of the first program, before /dev is mounted.
            archive.character_device("dev/console", (5, 1))?;
            archive.file("bin/busybox", &busybox, 0o755)?;
            archive.symlink("bin/sh", "busybox")?;
            for Module { name, content } in &modules {
                archive.file(&format!("modules/{name}.ko"), content, 0o644)?;
            }
            archive.file("init", first_program(&modules).as_bytes(), 0o755)?;
            archive.file("script", self.init.as_bytes(), 0o644)
        };
        fill(&mut archive).and_then(|()| archive.finish()).map(drop).map_err(failed)
    }
}

/// The script that the kernel starts.
fn first_program(modules: &[Module]) -> String {
    let mut script = String::from(
        "#!/bin/sh\n\
         export PATH=/usr/bin:/usr/sbin:/bin:/sbin\n\
         /bin/busybox --install -s\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         mount -t devtmpfs devtmpfs /dev\n",
    );
    for Module { name, .. } in modules {
        script.push_str(&format!(
            "insmod /modules/{name}.ko || echo 'module {name} is not loaded'\n"
        ));
    }
    script.push_str("sh /script\npoweroff -f\n");
    script
}

fn memory(bytes: u64) -> io::Result<File> {
    let memory = File::from(rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
    memory.set_len(bytes)?;
    Ok(memory)
}

/// QEMU's process, which is killed and reaped with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail if it was reaped already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest that runs. Dropping it ends QEMU; in a test that fails it prints all that the guest and QEMU
/// have said.
pub struct Guest {
    process: Mutex<Process>,
    pid: Pid,
    console: Console,
    stderr: Arc<Log>,
    qmp: Qmp,
    memory: File,
    /// Removed at the end.
    _folder: TempDir,
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Guest {
    fn of(
        mut process: Process,
        listener: &UnixListener,
        memory: File,
        folder: TempDir,
    ) -> Result<Self, GuestError> {
        let pipe = || GuestError::Io { what: "a pipe", source: io::ErrorKind::BrokenPipe.into() };
        let child = &mut process.0;
        let pid = Pid::from_child(child);
        let stderr = Log::of(child.stderr.take().ok_or_else(pipe)?);
        let (output, input) = (child.stdout.take(), child.stdin.take());
        let console = Console::new(output.ok_or_else(pipe)?, input.ok_or_else(pipe)?);
        let console = console.map_err(|errno| GuestError::io("the console")(errno.into()))?;
        let qmp = match connection(listener, child).map(|stream| stream.map(Qmp::new)) {
            Ok(Some(Ok(qmp))) => qmp,
            // It ends with an error of its own, or is killed here; either way it has said why.
            other => {
                let status = wait(child, Duration::from_secs(1)).ok().flatten();
                drop(process);
                stderr.wait_for_end(QUIT);
                let mut stderr = stderr.text();
                if let Ok(Some(Err(error))) = other {
                    stderr.push_str(&chain(&error));
                }
                return Err(GuestError::Start { status, stderr });
            }
        };
        let process = Mutex::new(process);
        Ok(Self { process, pid, console, stderr, qmp, memory, _folder: folder })
    }

    /// Its serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The control socket of its QEMU.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Its RAM, which QEMU shares with device processes: to be declared to the coordinator, and to be
    /// looked at. Below the hole for PCI devices an offset is the guest's physical address. Empty if
    /// the RAM is [anonymous](GuestBuilder::anonymous_memory).
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// The process of QEMU.
    #[must_use]
    pub fn process(&self) -> Pid {
        self.pid
    }

    /// Stops its processors (QMP `stop`).
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn stop(&self) -> Result<(), GuestError> {
        self.qmp.execute("stop", &json!({}))?;
        Ok(())
    }

    /// Lets its processors go on (QMP `cont`).
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn go_on(&self) -> Result<(), GuestError> {
        self.qmp.execute("cont", &json!({}))?;
        Ok(())
    }

    /// Resets it, as its reset button would (QMP `system_reset`); returns when QEMU has begun.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn reset(&self) -> Result<(), GuestError> {
        self.qmp.execute("system_reset", &json!({}))?;
        Ok(())
    }

    /// Unplugs a device and waits until the guest has let it go.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`], and if the guest does not let it go in that time.
    pub fn unplug(&self, id: &str, within: Duration) -> Result<(), GuestError> {
        self.qmp.execute("device_del", &json!({ "id": id }))?;
        loop {
            // The ports and other devices have events of their own.
            let event = self.qmp.wait_for("DEVICE_DELETED", within)?;
            if event["data"]["device"] == id {
                return Ok(());
            }
        }
    }

    /// Waits until the guest has turned itself off, or QEMU has ended otherwise.
    ///
    /// # Errors
    ///
    /// If it does not end in that time.
    pub fn wait(&self, within: Duration) -> Result<ExitStatus, GuestError> {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let status = wait(&mut process.0, within).map_err(GuestError::io("the QEMU process"))?;
        status.ok_or_else(|| GuestError::Late { waited_for: "the end of QEMU".to_owned(), within })
    }

    /// Ends QEMU as QMP `quit` does, and checks that it ends well.
    ///
    /// # Errors
    ///
    /// If it does not end within half a minute, or with a failure.
    pub fn end(self) -> Result<(), GuestError> {
        self.qmp.execute("quit", &json!({}))?;
        let status = self.wait(QUIT)?;
        if status.success() {
            return Ok(());
        }
        let waited_for = format!("an orderly end: {status}\n{}", self.stderr.text());
        Err(GuestError::Ended { waited_for })
    }

    /// All that the guest has said on its console, that was said by QMP, and that QEMU has said: for the
    /// message of a test that fails.
    #[must_use]
    pub fn transcript(&self) -> String {
        format!(
            "--- console\n{}\n--- QMP\n{}--- QEMU\n{}",
            self.console.text(),
            self.qmp.text(),
            self.stderr.text(),
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = process.0.try_wait();
            // Before it is killed, so that its last words are there, and what it has said only then.
            let _ = process.0.kill();
            self.console.log().wait_for_end(QUIT);
            self.stderr.wait_for_end(QUIT);
            drop(process);
            #[expect(clippy::print_stderr, reason = "the output of a test that fails")]
            {
                eprintln!("{}\nQEMU: {ended:?}", self.transcript());
            }
        }
    }
}

/// The connection that QEMU makes; `None` if it makes none before it ends or the time is over.
fn connection(listener: &UnixListener, child: &Child) -> io::Result<Option<UnixStream>> {
    let pidfd =
        rustix::process::pidfd_open(Pid::from_child(child), rustix::process::PidfdFlags::empty())?;
    let within = Timespec::try_from(START).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
    while poll(&mut fds, Some(&within)) == Err(rustix::io::Errno::INTR) {}
    let comes = fds.first().is_some_and(|fd| !fd.revents().is_empty());
    if comes { listener.accept().map(|(stream, _)| Some(stream)) } else { Ok(None) }
}
