//! The runtime directory: where machines live while they run, and how they are found.
//!
//! ```text
//! /run/user/1000/standstill/     or /run/standstill for root, or --runtime-dir
//! └── vm0/                       one for each machine, 0700
//!     ├── operator.sock          0600, of whoever runs the machine
//!     ├── run.lock               locked by the `standstill run` that has the machine; its pid
//!     ├── control/               what a later coordinator needs (docs/take-over.md)
//!     ├── added/                 devices that were added while it ran
//!     ├── vm-ran                 there while a pause has stopped a VM that ran
//!     ├── engine0.sock           data sockets, if the machine file says so
//!     └── disk0.sock.lock        locked as long as the device process lives, if it needs that
//! ```

use crate::machine_file::checks::somebody_listens;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use standstill::coordinator::control_directory::left_behind;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The operator socket's name in a machine's folder.
pub(crate) const OPERATOR_SOCKET: &str = "operator.sock";
/// The folder of what a later coordinator needs.
pub(crate) const CONTROL: &str = "control";
/// The lock of whoever runs the machine.
const LOCK: &str = "run.lock";
/// How long another process may take to take its places: a few system calls.
const TURN: Duration = Duration::from_secs(2);
/// How soon it is looked again.
const TURN_RETRY: Duration = Duration::from_millis(5);
/// The folder of devices that were added.
const ADDED: &str = "added";
/// There while a pause has stopped a VM that ran.
const VM_RAN: &str = "vm-ran";
/// The largest text of an added device that is read back, in bytes.
const MAX_ADDED: u64 = 1024 * 1024;

/// What is wrong with a runtime directory.
#[derive(Debug, Error)]
pub(crate) enum DirectoryError {
    /// Nobody has said where it is.
    #[error("there is no runtime directory: XDG_RUNTIME_DIR is not set, and this user is not root")]
    Unknown,
    /// The system refused something.
    #[error("cannot {what} {}", path.display())]
    System {
        /// What.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others may write to it.
    #[error("{} belongs to user {owner} and has mode {mode:03o}, expected user {expected} and 700", path.display())]
    Foreign {
        /// Which one.
        path: PathBuf,
        /// To whom it belongs.
        owner: u32,
        /// To whom it should.
        expected: u32,
        /// Its mode.
        mode: u32,
    },
    /// Another `standstill run` has the machine.
    #[error("machine {machine:?} is run by another process{}", pid.map(|pid| format!(" ({pid})")).unwrap_or_default())]
    Running {
        /// Its name.
        machine: String,
        /// The process, if it has written its number down.
        pid: Option<u32>,
    },
}

fn system(what: &'static str, path: &Path, source: impl Into<io::Error>) -> DirectoryError {
    DirectoryError::System { what, path: path.to_owned(), source: source.into() }
}

/// The directory of all machines: what was asked for, or the user's own.
pub(crate) fn runtime_directory(asked: Option<&Path>) -> Result<PathBuf, DirectoryError> {
    if let Some(path) = asked {
        return std::path::absolute(path).map_err(|error| system("find", path, error));
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(path) if path.is_absolute() => Ok(path.join("standstill")),
        _ if geteuid().is_root() => Ok("/run/standstill".into()),
        _ => Err(DirectoryError::Unknown),
    }
}

/// The machines that have an operator socket, by name.
pub(crate) fn machines(runtime: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(runtime) else { return Vec::new() };
    let mut names: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().join(OPERATOR_SOCKET).exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// A machine's folder, locked by this process.
#[derive(Debug)]
pub(crate) struct MachineDirectory {
    path: PathBuf,
    machine: String,
    lock: File,
}

/// A device that was added while the machine ran, to be found by a later coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AddedDevice {
    /// Its name.
    pub(crate) name: String,
    /// Its keys.
    pub(crate) toml: String,
    /// Where its relative paths begin.
    pub(crate) directory: PathBuf,
}

impl MachineDirectory {
    /// Makes the folder and locks it. With `take`, a lock that somebody has is taken away: that
    /// process has hung, or learns from its devices that another coordinator has the machine.
    pub(crate) fn claim(runtime: &Path, machine: &str, take: bool) -> Result<Self, DirectoryError> {
        let make = |path: &Path| match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(system("make directory", path, error))
            }
            _ => Ok(()),
        };
        make(runtime)?;
        check_parent(runtime)?;
        let path = runtime.join(machine);
        make(&path)?;
        check_owner(&path)?;
        let lock = lock(&path, machine, take)?;
        Ok(Self { path, machine: machine.to_owned(), lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the operator socket is.
    pub(crate) fn operator_socket(&self) -> PathBuf {
        self.path.join(OPERATOR_SOCKET)
    }

    /// Where a later coordinator looks.
    pub(crate) fn control(&self) -> PathBuf {
        self.path.join(CONTROL)
    }

    /// Writes an added device down.
    pub(crate) fn remember(&self, device: &AddedDevice) -> Result<(), DirectoryError> {
        let folder = self.path.join(ADDED);
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(system("make directory", &folder, error));
            }
            _ => {}
        }
        let path = self.added_file(&device.name);
        let new = path.with_extension("new");
        let text = serde_json::to_vec_pretty(device).map_err(|e| system("write", &path, e))?;
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|error| system("write", &path, error))
    }

    /// Forgets an added device, if there is one of that name.
    pub(crate) fn forget(&self, device: &str) {
        // One that is not there was not added.
        let _ = std::fs::remove_file(self.added_file(device));
    }

    /// Where it is written down that a pause has stopped a VM that ran.
    pub(crate) fn vm_ran(&self) -> PathBuf {
        self.path.join(VM_RAN)
    }

    /// Forgets all added devices, and the VM.
    pub(crate) fn forget_all(&self) {
        let _ = std::fs::remove_file(self.vm_ran());
        let _ = std::fs::remove_dir_all(self.path.join(ADDED));
    }

    fn added_file(&self, device: &str) -> PathBuf {
        added_file(&self.path, device)
    }

    /// Whether this process still has the lock, or another one has taken it away.
    pub(crate) fn is_ours(&self) -> bool {
        same_file(&self.lock, &self.path.join(LOCK))
    }

    /// Waits, not for long, until nobody else takes a place in the folder. The turn ends when what is
    /// returned is dropped.
    pub(crate) async fn turn(&self) -> Result<OwnedFd, DirectoryError> {
        let failed = |errno: Errno| system("lock", &self.path, errno);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(&self.path, flags, Mode::empty()).map_err(failed)?;
        let deadline = Instant::now() + TURN;
        loop {
            match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(folder),
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    tokio::time::sleep(TURN_RETRY).await;
                }
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// Locks the folder again for whoever has the machine now. Of several processes that take one over,
    /// the one that comes last to the record has it, and another one may have come last to the lock.
    /// False if another coordinator has it. To be called in one's [`turn`](Self::turn), in which the
    /// places of whoever has the machine are taken: so nobody takes one who has lost it meanwhile.
    pub(crate) fn keep(&mut self) -> Result<bool, DirectoryError> {
        // A machine whose devices end with their coordinator has no record, and no rivals.
        if let Ok(Some(left)) = left_behind(&self.control())
            && left.record.coordinator.pid != std::process::id()
        {
            return Ok(false);
        }
        if !self.is_ours() {
            self.lock = lock(&self.path, &self.machine, true)?;
        }
        Ok(true)
    }

    /// Removes what is left of a machine that has ended.
    pub(crate) fn remove(&self) {
        if !self.is_ours() {
            return;
        }
        self.forget_all();
        // Left if the devices could not be proven gone.
        let _ = std::fs::remove_dir(self.control());
        self.remove_dead_sockets();
        self.remove_free_locks();
        let _ = std::fs::remove_file(self.path.join(LOCK));
        // Left if somebody still serves a socket there, or something else was put there.
        if let Err(error) = std::fs::remove_dir(&self.path) {
            tracing::debug!(machine = self.machine, %error, "the machine's folder is left");
        }
    }

    /// Removes the files beside sockets whose lock stands for a device process, where there is none.
    fn remove_free_locks(&self) {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return };
        let end = Instant::now() + TURN;
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            let is_lock = path.extension().is_some_and(|extension| extension == "lock");
            let is_own = path.file_name().is_some_and(|name| name == LOCK);
            let is_file = || path.symlink_metadata().is_ok_and(|found| found.is_file());
            if is_lock
                && !is_own
                && is_file()
                && becomes_free(&path, end.saturating_duration_since(Instant::now()))
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::debug!(path = %path.display(), %error, "a lock's file is left");
            }
        }
    }

    /// Removes the sockets that nobody serves: a device that is killed leaves its own.
    fn remove_dead_sockets(&self) {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return };
        for entry in entries.filter_map(Result::ok) {
            let path = entry.path();
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            if is_socket
                && matches!(somebody_listens(&path), Ok(false))
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::debug!(path = %path.display(), %error, "a socket is left");
            }
        }
    }
}

/// What was written down of a device that was added, in that machine's folder.
pub(crate) fn added_device(folder: &Path, device: &str) -> Option<AddedDevice> {
    let mut text = Vec::new();
    let file = File::open(added_file(folder, device)).ok()?;
    file.take(MAX_ADDED).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

fn added_file(folder: &Path, device: &str) -> PathBuf {
    folder.join(ADDED).join(format!("{device}.json"))
}

/// Whether it is this user's, and nobody else may write to it.
fn check_owner(path: &Path) -> Result<(), DirectoryError> {
    let status: Stat = rustix::fs::stat(path).map_err(|errno| system("examine", path, errno))?;
    let (owner, expected) = (status.st_uid, geteuid().as_raw());
    let mode = status.st_mode & 0o7777;
    if FileType::from_raw_mode(status.st_mode) != FileType::Directory {
        return Err(system("use", path, Errno::NOTDIR));
    }
    if owner != expected || mode & 0o022 != 0 {
        return Err(DirectoryError::Foreign { path: path.to_owned(), owner, expected, mode });
    }
    Ok(())
}

/// Whether nobody else can put another folder in the place of a machine's: the directory is this
/// user's or root's, and others cannot write to it, or only with the sticky bit (as in /tmp).
fn check_parent(path: &Path) -> Result<(), DirectoryError> {
    let status: Stat = rustix::fs::stat(path).map_err(|errno| system("examine", path, errno))?;
    let (owner, expected) = (status.st_uid, geteuid().as_raw());
    let mode = status.st_mode & 0o7777;
    let foreign = owner != expected && owner != 0;
    if foreign || (mode & 0o022 != 0 && mode & 0o1000 == 0) {
        return Err(DirectoryError::Foreign { path: path.to_owned(), owner, expected, mode });
    }
    Ok(())
}

fn lock(folder: &Path, machine: &str, take: bool) -> Result<File, DirectoryError> {
    let path = folder.join(LOCK);
    let failed = |errno: Errno| system("lock", &path, errno);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mode = Mode::RUSR | Mode::WUSR;
    let open = |path: &Path| rustix::fs::open(path, flags, mode);
    let locked = |fd: &OwnedFd| rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive);
    // Somebody else may put another file there between the opening and the locking.
    for _ in 0..100 {
        let file = open(&path).map_err(failed)?;
        match locked(&file) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) if take => {
                let new = folder.join(format!("{LOCK}.{}", std::process::id()));
                let file = open(&new).map_err(failed)?;
                locked(&file).map_err(failed)?;
                std::fs::rename(&new, &path).map_err(|error| system("replace", &path, error))?;
                return Ok(write_pid(File::from(file)));
            }
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = File::from(file).take(20).read_to_string(&mut text);
                let pid = text.trim().parse().ok();
                return Err(DirectoryError::Running { machine: machine.to_owned(), pid });
            }
            Err(errno) => return Err(failed(errno)),
        }
        let file = File::from(file);
        if same_file(&file, &path) {
            return Ok(write_pid(file));
        }
    }
    Err(failed(Errno::AGAIN))
}

/// Whether a file is locked by nobody. What a process that has just ended has left of itself may keep a
/// lock for some milliseconds.
fn becomes_free(path: &Path, within: Duration) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let (free, wait) = sync_channel(1);
    // Left behind if somebody lives who has it.
    std::thread::spawn(move || free.send(file.lock().is_ok()));
    wait.recv_timeout(within).unwrap_or(false)
}

/// For people, and for error messages.
fn write_pid(mut file: File) -> File {
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    file
}

fn same_file(file: &File, path: &Path) -> bool {
    let there = rustix::fs::statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW);
    match (rustix::fs::fstat(file), there) {
        (Ok(ours), Ok(there)) => (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn one_process_has_a_machine_until_another_one_takes_it_away() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = MachineDirectory::claim(folder.path(), "vm0", false).unwrap();
        assert_eq!(first.path().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let error = MachineDirectory::claim(folder.path(), "vm0", false).unwrap_err();
        let us = std::process::id();
        assert!(
            matches!(&error, DirectoryError::Running { pid: Some(pid), .. } if *pid == us),
            "{error}"
        );
        let second = MachineDirectory::claim(folder.path(), "vm0", true).unwrap();
        assert!(!first.is_ours() && second.is_ours());
        // Who has lost it removes nothing.
        first.remove();
        assert!(second.path().exists());
        // Unless it has the machine all the same.
        assert!(first.keep().unwrap());
        assert!(first.is_ours() && !second.is_ours());
        let error = MachineDirectory::claim(folder.path(), "vm0", false).unwrap_err();
        assert!(matches!(error, DirectoryError::Running { .. }), "{error}");
        first.remove();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        MachineDirectory::claim(folder.path(), "vm0", false).unwrap();
    }

    #[test]
    fn a_folder_that_others_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm0");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        let error = MachineDirectory::claim(folder.path(), "vm0", false).unwrap_err();
        assert!(matches!(error, DirectoryError::Foreign { mode: 0o777, .. }), "{error}");
    }

    #[test]
    fn where_others_could_replace_a_machines_folder_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = folder.path().join("rt");
        std::fs::create_dir(&runtime).unwrap();
        let claim = |mode| {
            std::fs::set_permissions(&runtime, PermissionsExt::from_mode(mode)).unwrap();
            MachineDirectory::claim(&runtime, "vm0", false).map(|machine| machine.remove())
        };
        for mode in [0o700, 0o755, 0o1777] {
            claim(mode).unwrap();
        }
        for mode in [0o770, 0o777, 0o702] {
            let error = claim(mode).unwrap_err();
            assert!(matches!(error, DirectoryError::Foreign { .. }), "{error}");
        }
        if geteuid().is_root() {
            std::os::unix::fs::chown(&runtime, Some(65534), None).unwrap();
            let error = claim(0o700).unwrap_err();
            assert!(matches!(error, DirectoryError::Foreign { owner: 65534, .. }), "{error}");
        }
    }

    #[test]
    fn sockets_that_nobody_serves_go_with_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let machine = MachineDirectory::claim(folder.path(), "vm0", false).unwrap();
        let [dead, alive, file] =
            ["dead.sock", "alive.sock", "notes"].map(|name| machine.path().join(name));
        drop(UnixListener::bind(&dead).unwrap());
        let served = UnixListener::bind(&alive).unwrap();
        std::fs::write(&file, "mine").unwrap();
        machine.remove();
        assert!(!dead.exists() && alive.exists() && file.exists());
        drop(served);
        std::fs::remove_file(&file).unwrap();
        let machine = MachineDirectory::claim(folder.path(), "vm0", false).unwrap();
        machine.remove();
        assert!(!folder.path().join("vm0").exists());
    }

    #[test]
    fn added_devices_are_found_again_until_they_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let machine = MachineDirectory::claim(folder.path(), "vm0", false).unwrap();
        let device = AddedDevice {
            name: "nic0".into(),
            toml: "name = \"nic0\"".into(),
            directory: "/".into(),
        };
        machine.remember(&device).unwrap();
        assert_eq!(added_device(machine.path(), "nic0"), Some(device));
        assert_eq!(added_device(machine.path(), "nic1"), None);
        machine.forget("nic0");
        assert_eq!(added_device(machine.path(), "nic0"), None);
    }
}
