//! The directory in which a machine whose devices outlive their coordinator can be found: a
//! listening socket for each device process, and the [record](crate::record).
//!
//! Whoever changes the record has the directory locked (`flock` on the directory itself: no file
//! that a shutdown would have to remove under those who wait for it), and only for reading,
//! changing and writing it. A wait for that lock is bounded: its holder may be stopped for ever.

use crate::identity::{boot_id, is_alive};
use crate::record::{
    DeviceRecord, MAX_RECORD, MachineRecord, ProcessIdentity, RecordError, SocketNameError,
    socket_name,
};
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::geteuid;
use standstill_protocol::channel::bind;
use standstill_protocol::message::Term;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

/// The record's name in the directory.
pub const RECORD_FILE: &str = "machine.json";
/// What it is called while it is written.
const NEW_RECORD_FILE: &str = "machine.json.new";
/// How long the lock is waited for.
pub const LOCK_WAIT: Duration = Duration::from_secs(2);

/// What is wrong with a control directory.
#[derive(Debug, Error)]
pub enum ControlDirectoryError {
    /// The system refused something.
    #[error("cannot {what} {}", path.display())]
    System {
        /// What.
        what: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is there and is no directory, or the record is no file.
    #[error("{} is no {expected}", path.display())]
    Kind {
        /// Which one.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// It, or the record, belongs to another user.
    #[error("{} belongs to user {owner}, expected {expected}", path.display())]
    Owner {
        /// Which one.
        path: PathBuf,
        /// To whom it belongs.
        owner: u32,
        /// To whom it should: the user of this program.
        expected: u32,
    },
    /// Others may write to it: whoever can put a socket there is a device.
    #[error("{} may be written by others (mode {mode:03o}), expected {expected:03o}", path.display())]
    Writable {
        /// Which one.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// What it should be at most.
        expected: u32,
    },
    /// Somebody else has it locked, for longer than a change of the record takes.
    #[error("{} was locked by another coordinator for {waited:?}", path.display())]
    Locked {
        /// Which one.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// There is no record: nothing that could be taken over.
    #[error("{} is missing: no machine has been left here", path.display())]
    NoRecord {
        /// Where it should be.
        path: PathBuf,
    },
    /// The record cannot be used.
    #[error("{} is no usable record", path.display())]
    Record {
        /// Which one.
        path: PathBuf,
        /// Why not.
        source: RecordError,
    },
    /// A device's name cannot name its socket.
    #[error(transparent)]
    SocketName(#[from] SocketNameError),
    /// A machine lives here.
    #[error(
        "{} has the record of machine {machine:?}, of which process {pid} ({who}) is alive: take it \
         over or end it", path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The machine's name.
        machine: String,
        /// A process of it that is alive.
        pid: u32,
        /// Which one it is: a device's name, or `its coordinator`.
        who: String,
    },
    /// The record is of the time before the last boot: no process of the machine is left.
    #[error("{} was written before the last boot: nothing is left of machine {machine:?}", path.display())]
    OtherBoot {
        /// The record.
        path: PathBuf,
        /// The machine's name.
        machine: String,
    },
    /// Another coordinator has taken the machine over.
    #[error("the machine was taken over: {} has term {found}, this coordinator {ours}", path.display())]
    Superseded {
        /// The record.
        path: PathBuf,
        /// The term that it has.
        found: Term,
        /// This coordinator's term.
        ours: Term,
    },
}

/// What an earlier coordinator has left in a control directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// The record.
    pub record: MachineRecord,
    /// True if that coordinator is alive (it may hang).
    pub coordinator_alive: bool,
    /// The names of the devices whose processes are alive.
    pub alive: Vec<String>,
}

/// Looks for a machine in a control directory and changes nothing. `None` if there is no directory
/// or no record, or the record was written before the last boot. Blocks.
///
/// # Errors
///
/// [`ControlDirectoryError`] if it cannot be used.
pub fn left_behind(directory: &Path) -> Result<Option<LeftBehind>, ControlDirectoryError> {
    if matches!(directory.try_exists(), Ok(false)) {
        return Ok(None);
    }
    let Some(record) = ControlDirectory::open(directory)?.read()? else { return Ok(None) };
    let boot = boot_id().map_err(|source| ControlDirectoryError::System {
        what: "examine",
        path: "/proc/sys/kernel/random/boot_id".into(),
        source,
    })?;
    if record.boot != boot {
        return Ok(None);
    }
    let devices = record.devices.iter().filter(|device| is_alive(device.process));
    Ok(Some(LeftBehind {
        coordinator_alive: is_alive(record.coordinator),
        alive: devices.map(|device| device.name.clone()).collect(),
        record,
    }))
}

/// A control directory that is there and belongs to this program's user alone.
#[derive(Debug)]
pub(crate) struct ControlDirectory {
    path: PathBuf,
    fd: OwnedFd,
}

/// The directory is locked as long as this lives.
#[derive(Debug)]
pub(crate) struct Locked<'a> {
    directory: &'a ControlDirectory,
    lock: OwnedFd,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Closing is not enough: a child that is being spawned has a copy of the fd for a moment.
        let _ = rustix::fs::flock(&self.lock, FlockOperation::NonBlockingUnlock);
    }
}

impl ControlDirectory {
    /// Opens the directory; makes it if it is not there, for its owner alone.
    pub(crate) fn create(path: &Path) -> Result<Self, ControlDirectoryError> {
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => Self::open(path),
            Err(errno) => Err(system("make directory", path, errno)),
        }
    }

    /// Opens a directory that is there.
    pub(crate) fn open(path: &Path) -> Result<Self, ControlDirectoryError> {
        // Kept for the life of the machine, during which this program may go elsewhere.
        let path = std::path::absolute(path).map_err(|source| {
            let path = path.to_owned();
            ControlDirectoryError::System { what: "find directory", path, source }
        })?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOTDIR) => {
                return Err(ControlDirectoryError::Kind { path, expected: "directory" });
            }
            Err(errno) => return Err(system("open directory", &path, errno)),
        };
        let status = rustix::fs::fstat(&fd).map_err(|e| system("examine directory", &path, e))?;
        check_owner(&path, &status, 0o700)?;
        Ok(Self { path, fd })
    }

    fn record_path(&self) -> PathBuf {
        self.path.join(RECORD_FILE)
    }

    /// Where that device listens.
    pub(crate) fn socket_path(&self, device: &str) -> Result<PathBuf, SocketNameError> {
        Ok(self.path.join(socket_name(&self.path, device)?))
    }

    /// Binds the socket at which that device is to listen.
    pub(crate) fn bind(&self, device: &str) -> Result<OwnedFd, ControlDirectoryError> {
        let path = self.socket_path(device)?;
        bind(&path).map_err(|source| ControlDirectoryError::System {
            what: "bind socket",
            path,
            source,
        })
    }

    /// Removes that device's socket, if it is there.
    pub(crate) fn unbind(&self, device: &str) -> Result<(), ControlDirectoryError> {
        let path = self.socket_path(device)?;
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(ControlDirectoryError::System { what: "remove", path, source })
            }
            _ => Ok(()),
        }
    }

    /// Locks the directory for a change of the record. Blocks, at most [`LOCK_WAIT`].
    pub(crate) fn lock(&self) -> Result<Locked<'_>, ControlDirectoryError> {
        let failed = |errno| system("lock directory", &self.path, errno);
        // An open file description of its own: a lock belongs to one.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(&self.fd, ".", flags, Mode::empty()).map_err(failed)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Locked { directory: self, lock }),
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        // flock(2) has no deadline: a thread waits, and goes when it gets the lock too late.
        let (send, locked) = mpsc::sync_channel(1);
        let wait = move || {
            let result = loop {
                match rustix::fs::flock(&lock, FlockOperation::LockExclusive) {
                    Err(Errno::INTR) => {}
                    result => break result,
                }
            };
            if let Err(mpsc::SendError(Ok(lock))) = send.send(result.map(|()| lock)) {
                let _ = rustix::fs::flock(&lock, FlockOperation::NonBlockingUnlock);
            }
        };
        std::thread::Builder::new().name("standstill-lock".into()).spawn(wait).map_err(
            |source| ControlDirectoryError::System {
                what: "wait for the lock of",
                path: self.path.clone(),
                source,
            },
        )?;
        match locked.recv_timeout(LOCK_WAIT) {
            Ok(Ok(lock)) => Ok(Locked { directory: self, lock }),
            Ok(Err(errno)) => Err(failed(errno)),
            Err(_) => {
                let path = self.path.clone();
                Err(ControlDirectoryError::Locked { path, waited: LOCK_WAIT })
            }
        }
    }

    /// The record, if there is one. It is replaced as a whole, so no lock is needed.
    pub(crate) fn read(&self) -> Result<Option<MachineRecord>, ControlDirectoryError> {
        let path = self.record_path();
        // O_NONBLOCK: what is there may be a pipe.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.fd, RECORD_FILE, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(system("open", &path, errno)),
        };
        let status = rustix::fs::fstat(&file).map_err(|errno| system("examine", &path, errno))?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(ControlDirectoryError::Kind { path, expected: "regular file" });
        }
        check_owner(&path, &status, 0o600)?;
        let mut bytes = Vec::new();
        // One byte more shows what is too large.
        let limit = u64::try_from(MAX_RECORD).unwrap_or(u64::MAX).saturating_add(1);
        if let Err(source) = file.take(limit).read_to_end(&mut bytes) {
            return Err(ControlDirectoryError::System { what: "read", path, source });
        }
        let record = MachineRecord::parse(&bytes);
        record.map(Some).map_err(|source| ControlDirectoryError::Record { path, source })
    }

    /// The record; that there is none is an error.
    pub(crate) fn read_existing(&self) -> Result<MachineRecord, ControlDirectoryError> {
        self.read()?.ok_or_else(|| ControlDirectoryError::NoRecord { path: self.record_path() })
    }

    /// Whether that coordinator still has the machine.
    pub(crate) fn check_term(&self, uuid: Uuid, ours: Term) -> Result<(), ControlDirectoryError> {
        let record = self.read_existing()?;
        if record.uuid != uuid || record.term() > ours {
            return Err(self.superseded(record.term(), ours));
        }
        Ok(())
    }

    /// The error of a record of the time before the last boot.
    pub(crate) fn other_boot(&self, machine: &str) -> ControlDirectoryError {
        ControlDirectoryError::OtherBoot { path: self.record_path(), machine: machine.to_owned() }
    }

    /// The error of a coordinator whose machine another one has.
    pub(crate) fn superseded(&self, found: Term, ours: Term) -> ControlDirectoryError {
        ControlDirectoryError::Superseded { path: self.record_path(), found, ours }
    }
}

impl Locked<'_> {
    /// Replaces the record as a whole.
    pub(crate) fn write(&self, record: &MachineRecord) -> Result<(), ControlDirectoryError> {
        let Self { directory, .. } = self;
        let path = directory.record_path();
        let bytes = match record.to_bytes() {
            Ok(bytes) => bytes,
            Err(source) => return Err(ControlDirectoryError::Record { path, source }),
        };
        let failed = |source: io::Error| {
            let path = path.clone();
            ControlDirectoryError::System { what: "write", path, source }
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file =
            rustix::fs::openat(&directory.fd, NEW_RECORD_FILE, flags | OFlags::CLOEXEC, mode)
                .map(File::from)
                .map_err(|errno| failed(errno.into()))?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(failed)?;
        let fd = directory.fd.as_fd();
        rustix::fs::renameat(fd, NEW_RECORD_FILE, fd, RECORD_FILE)
            .and_then(|()| rustix::fs::fsync(fd))
            .map_err(|errno| failed(errno.into()))
    }

    /// Writes the first record of a new machine, unless another machine lives here.
    pub(crate) fn claim(&self, record: &MachineRecord) -> Result<(), ControlDirectoryError> {
        if let Some(found) = self.directory.read()?
            && found.boot == record.boot
        {
            let devices = found.devices.iter().map(|d| (d.name.clone(), d.process));
            let coordinator = ("its coordinator".to_owned(), found.coordinator);
            let alive = |(_, process): &(String, ProcessIdentity)| {
                *process != record.coordinator && is_alive(*process)
            };
            if let Some((who, process)) = devices.chain([coordinator]).find(alive) {
                let (path, machine) = (self.directory.path.clone(), found.machine);
                return Err(ControlDirectoryError::InUse { path, machine, pid: process.pid, who });
            }
        }
        self.write(record)
    }

    /// Removes the record and the sockets of a machine that has ended, unless another coordinator
    /// has it.
    pub(crate) fn remove(
        &self,
        uuid: Uuid,
        ours: Term,
        devices: &[DeviceRecord],
    ) -> Result<(), ControlDirectoryError> {
        let Self { directory, .. } = self;
        directory.check_term(uuid, ours)?;
        for DeviceRecord { name, .. } in devices {
            directory.unbind(name)?;
        }
        rustix::fs::unlinkat(&directory.fd, RECORD_FILE, AtFlags::empty())
            .map_err(|errno| system("remove", &directory.record_path(), errno))
    }
}

fn system(what: &'static str, path: &Path, errno: Errno) -> ControlDirectoryError {
    ControlDirectoryError::System { what, path: path.to_owned(), source: errno.into() }
}

/// Whether it belongs to this program's user, and nobody else may write to it.
fn check_owner(path: &Path, status: &Stat, expected: u32) -> Result<(), ControlDirectoryError> {
    let path = || path.to_owned();
    let user = geteuid().as_raw();
    if status.st_uid != user {
        let owner = status.st_uid;
        return Err(ControlDirectoryError::Owner { path: path(), owner, expected: user });
    }
    let mode = status.st_mode & 0o7777;
    if mode & 0o022 != 0 {
        return Err(ControlDirectoryError::Writable { path: path(), mode, expected });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::identity;
    use crate::record::RECORD_VERSION;
    use std::os::unix::fs::PermissionsExt;

    fn record(term: u64) -> MachineRecord {
        MachineRecord {
            version: RECORD_VERSION,
            boot: boot_id().unwrap(),
            machine: "vm0".into(),
            uuid: Uuid::from_u128(2),
            term,
            coordinator: identity(std::process::id()).unwrap(),
            devices: Vec::new(),
        }
    }

    #[test]
    fn a_directory_is_made_for_its_owner_alone_and_one_that_others_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm0");
        drop(ControlDirectory::create(&path).unwrap());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o770)).unwrap();
        let error = ControlDirectory::create(&path).unwrap_err();
        assert!(matches!(error, ControlDirectoryError::Writable { mode: 0o770, .. }), "{error}");
        let file = folder.path().join("file");
        File::create(&file).unwrap();
        let error = ControlDirectory::create(&file).unwrap_err();
        assert!(matches!(error, ControlDirectoryError::Kind { .. }), "{error}");
        if geteuid().is_root() {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
            std::os::unix::fs::chown(&path, Some(1234), None).unwrap();
            let error = ControlDirectory::create(&path).unwrap_err();
            assert!(matches!(error, ControlDirectoryError::Owner { owner: 1234, .. }), "{error}");
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let directory = ControlDirectory::create(&folder.path().join("vm0")).unwrap();
        assert!(directory.read().unwrap().is_none());
        assert!(matches!(directory.read_existing(), Err(ControlDirectoryError::NoRecord { .. })));
        for term in [1, 2] {
            directory.lock().unwrap().write(&record(term)).unwrap();
            assert_eq!(directory.read().unwrap(), Some(record(term)));
        }
        let uuid = record(1).uuid;
        directory.check_term(uuid, Term(2)).unwrap();
        for (uuid, term) in [(uuid, 1), (Uuid::from_u128(9), 2)] {
            let error = directory.check_term(uuid, Term(term)).unwrap_err();
            let superseded = directory.superseded(Term(2), Term(term));
            assert_eq!(error.to_string(), superseded.to_string());
        }
        directory.lock().unwrap().remove(uuid, Term(2), &[]).unwrap();
        assert_eq!(std::fs::read_dir(&directory.path).unwrap().count(), 0);
    }

    #[test]
    fn a_record_that_is_hostile_is_refused_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let directory = ControlDirectory::create(&folder.path().join("vm0")).unwrap();
        let path = directory.record_path();
        std::fs::write(&path, "{\"version\": 1, \"term\": ").unwrap();
        let error = directory.read().unwrap_err();
        assert!(matches!(&error, ControlDirectoryError::Record { .. }), "{error}");
        assert!(error.to_string().contains("machine.json"), "{error}");
        // A file of endless zeros that takes no room.
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let error = directory.read().unwrap_err();
        let too_large = |source: &RecordError| matches!(source, RecordError::TooLarge);
        assert!(
            matches!(&error, ControlDirectoryError::Record { source, .. } if too_large(source)),
            "{error}"
        );
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        let error = directory.read().unwrap_err();
        assert!(matches!(error, ControlDirectoryError::Writable { .. }), "{error}");
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let error = directory.read().unwrap_err();
        assert!(matches!(error, ControlDirectoryError::Kind { .. }), "{error}");
    }

    #[test]
    fn a_lock_that_is_never_released_is_waited_for_no_longer_than_the_bound() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm0");
        let (one, other) =
            (ControlDirectory::create(&path).unwrap(), ControlDirectory::open(&path).unwrap());
        let lock = one.lock().unwrap();
        let error = other.lock().unwrap_err();
        assert!(matches!(error, ControlDirectoryError::Locked { .. }), "{error}");
        // Who comes while it is held gets it when it is released.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| other.lock().map(drop));
            drop(lock);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn what_is_left_behind_is_seen_and_not_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm0");
        assert_eq!(left_behind(&path).unwrap(), None);
        let directory = ControlDirectory::create(&path).unwrap();
        assert_eq!(left_behind(&path).unwrap(), None);
        let mut found = record(1);
        for (name, start_time) in [("nic0", found.coordinator.start_time), ("disk0", 1)] {
            found.devices.push(DeviceRecord {
                name: name.into(),
                incarnation: 1,
                process: ProcessIdentity { start_time, ..found.coordinator },
                backing_files: Vec::new(),
            });
        }
        directory.lock().unwrap().write(&found).unwrap();
        let left = left_behind(&path).unwrap().unwrap();
        assert_eq!((left.coordinator_alive, left.alive), (true, vec!["nic0".to_owned()]));
        assert_eq!(left.record, found);
        found.boot = Uuid::nil();
        directory.lock().unwrap().write(&found).unwrap();
        assert_eq!(left_behind(&path).unwrap(), None);
    }

    #[test]
    fn a_directory_of_a_living_machine_is_not_claimed_by_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let directory = ControlDirectory::create(&folder.path().join("vm0")).unwrap();
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let mut living = record(1);
        living.devices.push(DeviceRecord {
            name: "nic0".into(),
            incarnation: 1,
            process: identity(child.id()).unwrap(),
            backing_files: Vec::new(),
        });
        let lock = directory.lock().unwrap();
        lock.claim(&living).unwrap();
        let error = lock.claim(&record(1)).unwrap_err();
        assert!(
            matches!(&error, ControlDirectoryError::InUse { who, .. } if who == "nic0"),
            "{error}"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        lock.claim(&record(1)).unwrap();
    }
}
