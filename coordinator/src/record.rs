//! The record of a machine whose device processes outlive their coordinator: what a later
//! coordinator must know to take the machine over, and to fence what it cannot reach.
//!
//! Here are the contents and their checks alone; [`control_directory`](crate::control_directory)
//! has the file. The format is in `docs/take-over.md`.

use serde::{Deserialize, Serialize};
use standstill_protocol::message::{MAX_FDS, MAX_NAME, Term};
use std::collections::BTreeSet;
use std::path::Path;
use thiserror::Error;
use uuid::Uuid;

/// The version of the format that this program writes, and the only one that it reads.
pub const RECORD_VERSION: u32 = 1;
/// The largest record that is read, in bytes.
pub const MAX_RECORD: usize = 8 * 1024 * 1024;
/// The longest path of a Unix socket, in bytes.
pub const MAX_SOCKET_PATH: usize = 107;

/// What ends the name of a device's socket.
const SOCKET_SUFFIX: &str = ".sock";

/// A machine whose device processes outlive their coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The kernel's boot id: processes of another boot are gone, whatever their numbers are.
    pub boot: Uuid,
    /// The machine's name.
    pub machine: String,
    /// Its UUID, which its devices know too.
    pub uuid: Uuid,
    /// The term of the coordinator that wrote this; at least 1.
    pub term: u64,
    /// That coordinator.
    pub coordinator: ProcessIdentity,
    /// Every device process that may be alive.
    pub devices: Vec<DeviceRecord>,
}

/// Which process: a number that is used again never has the same start time within one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its process id.
    pub pid: u32,
    /// When it began, in clock ticks since the boot: field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

/// One device process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its name in the machine.
    pub name: String,
    /// How often it was started.
    pub incarnation: u64,
    /// Its process.
    pub process: ProcessIdentity,
    /// The files whose locks prove that nothing of the process is left; at most 16.
    pub backing_files: Vec<FileRecord>,
}

/// A backing file, to be found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Where it was when it was recorded; `null` if its path is no UTF-8 and cannot be written.
    pub path: Option<String>,
    /// Its `st_dev`.
    pub device: u64,
    /// Its `st_ino`.
    pub inode: u64,
}

/// What is wrong with the contents of a record.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It is larger than any record can be.
    #[error("more than {MAX_RECORD} bytes")]
    TooLarge,
    /// It is not the JSON that it should be: cut off, damaged, or a field is missing.
    #[error("not the JSON of a machine record")]
    Json(#[source] serde_json::Error),
    /// It was written by another version of this program.
    #[error("format version {found}, expected {RECORD_VERSION}")]
    Version {
        /// What it has.
        found: u32,
    },
    /// A number or text is impossible.
    #[error("{field} is {found}, expected {expected}")]
    Field {
        /// Which one.
        field: String,
        /// What it is.
        found: String,
        /// What it could be.
        expected: &'static str,
    },
    /// A device is there twice.
    #[error("device {name:?} is there twice")]
    Twice {
        /// Its name.
        name: String,
    },
}

/// A name of a device cannot be the name of its socket.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SocketNameError {
    /// It is no name of a file.
    #[error(
        "device name {name:?} cannot name a socket: expected 1 to {MAX_NAME} bytes without '/' and \
         NUL that do not begin with '.'"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The path would be too long.
    #[error("socket path {path:?} has {length} bytes, expected at most {MAX_SOCKET_PATH}")]
    TooLong {
        /// The path.
        path: String,
        /// Its length in bytes.
        length: usize,
    },
}

/// The name of a device's socket in the control directory at that path.
///
/// # Errors
///
/// [`SocketNameError`] if the device's name cannot be one, or the whole path would be too long for
/// a socket.
pub fn socket_name(directory: &Path, device: &str) -> Result<String, SocketNameError> {
    // A leading dot: '.', '..', and files that a person does not see.
    let usable = !device.is_empty()
        && device.len() <= MAX_NAME
        && !device.starts_with('.')
        && !device.contains(['/', '\0']);
    if !usable {
        return Err(SocketNameError::Name { name: device.to_owned() });
    }
    let name = format!("{device}{SOCKET_SUFFIX}");
    let path = directory.join(&name);
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return Err(SocketNameError::TooLong { path: path.display().to_string(), length });
    }
    Ok(name)
}

impl MachineRecord {
    /// Reads a record's bytes, which may be anybody's.
    ///
    /// # Errors
    ///
    /// [`RecordError`] names what is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        /// Whatever else another version has.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }

        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLarge);
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(RecordError::Json)?;
        if version != RECORD_VERSION {
            return Err(RecordError::Version { found: version });
        }
        let record: Self = serde_json::from_slice(bytes).map_err(RecordError::Json)?;
        record.check()?;
        Ok(record)
    }

    /// The bytes of the file, for a program and a person.
    ///
    /// # Errors
    ///
    /// Those of [`parse`](Self::parse): nothing is written that could not be read.
    pub fn to_bytes(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        let mut bytes = serde_json::to_vec_pretty(self).map_err(RecordError::Json)?;
        bytes.push(b'\n');
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLarge);
        }
        Ok(bytes)
    }

    /// The term of the coordinator that wrote this.
    #[must_use]
    pub fn term(&self) -> Term {
        Term(self.term)
    }

    /// What it says of that device.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&DeviceRecord> {
        self.devices.iter().find(|device| device.name == name)
    }

    fn check(&self) -> Result<(), RecordError> {
        let wrong = |field: String, found: String, expected| {
            Err(RecordError::Field { field, found, expected })
        };
        if self.version != RECORD_VERSION {
            return Err(RecordError::Version { found: self.version });
        }
        // The last one is kept free: whoever takes over needs a higher one.
        if self.term == 0 || self.term == u64::MAX {
            return wrong("term".into(), self.term.to_string(), "1 to 2^64 - 2");
        }
        let mut names = BTreeSet::new();
        for (at, device) in self.devices.iter().enumerate() {
            let DeviceRecord { name, incarnation, process, backing_files } = device;
            // Its path is checked where it is used.
            if socket_name(Path::new(""), name).is_err() {
                return wrong(
                    format!("devices[{at}].name"),
                    format!("{name:?}"),
                    "a socket's name",
                );
            }
            if !names.insert(name) {
                return Err(RecordError::Twice { name: name.clone() });
            }
            if *incarnation == 0 {
                return wrong(format!("incarnation of {name:?}"), "0".into(), "1 or more");
            }
            if process.pid == 0 || i32::try_from(process.pid).is_err() {
                return wrong(format!("pid of {name:?}"), process.pid.to_string(), "1 to 2^31 - 1");
            }
            if backing_files.len() > MAX_FDS {
                let found = backing_files.len().to_string();
                return wrong(format!("number of backing files of {name:?}"), found, "0 to 16");
            }
            for path in backing_files.iter().filter_map(|file| file.path.as_deref()) {
                if !path.starts_with('/') || path.contains('\0') {
                    let field = format!("path of a backing file of {name:?}");
                    return wrong(field, format!("{path:?}"), "an absolute path");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> MachineRecord {
        let process = ProcessIdentity { pid: 12, start_time: 345 };
        let file = |path: Option<&str>| FileRecord {
            path: path.map(str::to_owned),
            device: 0x801,
            inode: 77,
        };
        let device = |name: &str, files: Vec<FileRecord>| DeviceRecord {
            name: name.into(),
            incarnation: 2,
            process,
            backing_files: files,
        };
        MachineRecord {
            version: RECORD_VERSION,
            boot: Uuid::from_u128(1),
            machine: "vm0".into(),
            uuid: Uuid::from_u128(2),
            term: 3,
            coordinator: ProcessIdentity { pid: 11, start_time: 300 },
            devices: vec![
                device("nic0", vec![]),
                device("disk0", vec![file(Some("/srv/disk.img")), file(None)]),
            ],
        }
    }

    #[test]
    fn a_record_survives_its_way_through_the_file() {
        let bytes = record().to_bytes().unwrap();
        assert_eq!(MachineRecord::parse(&bytes).unwrap(), record());
    }

    #[test]
    fn a_record_that_is_cut_off_anywhere_is_refused() {
        let bytes = record().to_bytes().unwrap();
        let whole = bytes.trim_ascii_end().len();
        for end in 0..whole {
            assert!(MachineRecord::parse(&bytes[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn what_is_impossible_is_named() {
        type Change = fn(&mut MachineRecord);
        let cases: [(Change, &str); 9] = [
            (|r| r.version = 2, "format version 2, expected 1"),
            (|r| r.term = 0, "term is 0"),
            (|r| r.term = u64::MAX, "term is 18446744073709551615"),
            (|r| r.devices[1].name = "nic0".into(), "\"nic0\" is there twice"),
            (|r| r.devices[0].name = "../nic".into(), "devices[0].name is \"../nic\""),
            (|r| r.devices[0].incarnation = 0, "incarnation of \"nic0\" is 0"),
            (|r| r.devices[0].process.pid = 0, "pid of \"nic0\" is 0"),
            (|r| r.devices[0].process.pid = u32::MAX, "pid of \"nic0\" is 4294967295"),
            (
                |r| r.devices[1].backing_files[0].path = Some("disk.img".into()),
                "path of a backing file of \"disk0\" is \"disk.img\"",
            ),
        ];
        for (change, expected) in cases {
            let mut changed = record();
            change(&mut changed);
            let bytes = serde_json::to_vec(&changed).unwrap();
            let error = MachineRecord::parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
            assert!(changed.to_bytes().is_err(), "{expected}: it is not written either");
        }
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let deep = "[".repeat(100_000);
        for text in ["", "null", "[]", "{}", "{\"version\":1}", "{\"version\":-1}", &deep] {
            let error = MachineRecord::parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, RecordError::Json(_)), "{error}");
        }
        let error = MachineRecord::parse(&vec![b' '; MAX_RECORD + 1]).unwrap_err();
        assert!(matches!(error, RecordError::TooLarge), "{error}");
    }

    #[test]
    fn names_that_are_no_file_names_and_paths_that_are_too_long_are_refused() {
        let run = Path::new("/run/vm0");
        assert_eq!(socket_name(run, "nic0").unwrap(), "nic0.sock");
        for name in ["", ".", "..", ".hidden", "a/b", "/", "nul\0", &"x".repeat(65)] {
            let error = socket_name(run, name).unwrap_err();
            assert!(matches!(error, SocketNameError::Name { .. }), "{name:?}: {error}");
        }
        let long = format!("/{}", "d".repeat(MAX_SOCKET_PATH - "/".len() - "/n.sock".len()));
        assert_eq!(socket_name(Path::new(&long), "n").unwrap(), "n.sock");
        let error = socket_name(Path::new(&long), "nn").unwrap_err();
        let expected = MAX_SOCKET_PATH + 1;
        assert!(matches!(error, SocketNameError::TooLong { length, .. } if length == expected));
    }
}
