//! A small disk, which is full when a test wants it to be. Needs no root.
//!
//! The program gets a mount namespace of its own (`unshare(1)` of util-linux, with a user namespace
//! where it may not mount otherwise), in which a tmpfs of a few pages is over one folder. Nobody else
//! sees it; a test fills it and frees it from outside, through `/proc/<pid>/root`. Where the system
//! lets it have none of that, the program does not start, and standard error says why.
//!
//! ```
//! use standstill_testkit::outside::SmallDisk;
//! use std::process::Command;
//!
//! let folder = tempfile::tempdir()?;
//! let disk = SmallDisk::new(folder.path(), 16 << 10);
//! // Writes more than there is room for.
//! let mut dd = Command::new("dd");
//! dd.args(["if=/dev/zero", "bs=4k", "count=10"]).arg(format!("of={}/file", folder.path().display()));
//! assert!(!disk.command(&dd).status()?.success());
//! assert!(!folder.path().join("file").exists());
//! # Ok::<_, std::io::Error>(())
//! ```

use rustix::process::Pid;
use standstill_coordinator::DeviceSpec;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What fills the disk.
const FILLER: &str = "filler";
/// How much it grows by at a time, in bytes.
const BLOCK: usize = 4096;
/// What makes the namespaces, mounts the disk and becomes the program; its arguments are the size, the
/// folder, the program and what the program is given. Whether there are namespaces is tried first:
/// `unshare` does not say that it was they that were refused.
const SCRIPT: &str = r#"
as=; unshare --mount true </dev/null 2>/dev/null || as='--user --map-root-user'
unshare $as --mount true </dev/null || {
    echo "a small disk needs a mount namespace, as root or with a user namespace" >&2; exit 125; }
exec unshare $as --mount sh -c '
    mount -t tmpfs -o size="$1",mode=0700 small "$2" || {
        echo "a small disk needs a tmpfs, which cannot be mounted over $2" >&2; exit 125; }
    shift 2; exec "$@"' sh "$@"
"#;

/// A disk of a few pages over one folder, for one program and what that starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmallDisk {
    folder: PathBuf,
    bytes: u64,
}

impl SmallDisk {
    /// A disk of that size, in bytes (whole pages), over that folder, which must be there.
    pub fn new(folder: impl Into<PathBuf>, bytes: u64) -> Self {
        Self { folder: folder.into(), bytes }
    }

    /// The arguments of `sh` with which a program has the disk.
    fn arguments(&self, program: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = ["-c", SCRIPT, "sh"].map(OsString::from).into();
        arguments.push(self.bytes.to_string().into());
        arguments.push(self.folder.clone().into());
        arguments.push(program.into());
        arguments
    }

    /// The same command with the disk. Of the command count the program, its arguments, environment
    /// and working directory.
    #[must_use]
    pub fn command(&self, of: &Command) -> Command {
        let mut command = Command::new("sh");
        command.args(self.arguments(Path::new(of.get_program()))).args(of.get_args());
        for (name, value) in of.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        if let Some(folder) = of.get_current_dir() {
            command.current_dir(folder);
        }
        command
    }

    /// The same device with the disk. Its process is the one that the coordinator knows.
    #[must_use]
    pub fn wrap(&self, device: DeviceSpec) -> DeviceSpec {
        device.launched_by(|process| {
            let given = process.arguments().to_vec();
            let arguments = self.arguments(process.program()).into_iter().chain(given);
            process.replaced("sh", arguments)
        })
    }

    /// Fills the disk that a running process has, to the last page. How much that took, in bytes.
    ///
    /// # Errors
    ///
    /// If the process has no such disk (yet), or it cannot be written to for another reason than that
    /// it is full.
    pub fn fill(&self, process: Pid) -> io::Result<u64> {
        let path = self.filler(process);
        let mut file = File::options().create(true).append(true).open(path)?;
        let mut written = 0;
        loop {
            match file.write(&[0x5a; BLOCK]) {
                Ok(length) => written += length as u64,
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(written),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if written > self.bytes {
                return Err(io::Error::other("there is no small disk in that place"));
            }
        }
    }

    /// Frees what [`fill`](Self::fill) has filled.
    ///
    /// # Errors
    ///
    /// If it was not filled, or the process is gone.
    pub fn free(&self, process: Pid) -> io::Result<()> {
        std::fs::remove_file(self.filler(process))
    }

    fn filler(&self, process: Pid) -> PathBuf {
        let root = format!("/proc/{}/root", process.as_raw_pid());
        let folder = self.folder.strip_prefix("/").unwrap_or(&self.folder);
        Path::new(&root).join(folder).join(FILLER)
    }
}
