//! The lock of an image that is had only while a ring is started, and who else has it.

#![forbid(unsafe_code)]

use super::image::ImageError;
use crate::vhost_user::Claim;
use rustix::fs::{FlockOperation, Mode, OFlags, fstat, major, minor, open};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the kernel lists locks, and how much of that is looked at.
const LOCKS: &str = "/proc/locks";
const MOST_BYTES: u64 = 1 << 20;

/// See the [module](self). It belongs to the open file that all I/O goes through: after the death of
/// this process the kernel keeps it for what is in flight.
#[derive(Clone)]
pub(super) struct ImageLock {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
}

impl Claim for ImageLock {
    fn try_take(&self) -> io::Result<bool> {
        match rustix::fs::flock(&*self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn give_back(&self) {
        if let Err(error) = rustix::fs::flock(&*self.file, FlockOperation::NonBlockingUnlock) {
            tracing::error!(path = %self.path.display(), %error, "the image stays locked");
        }
    }

    fn describe(&self) -> String {
        format!("{} is locked by {}", self.path.display(), others(&self.file))
    }
}

impl ImageLock {
    /// Whether it can be had at all, whoever has it now: requests would wait for ever.
    pub(super) fn check(&self) -> Result<(), ImageError> {
        let taken = self.try_take().map_err(|source| ImageError::File {
            path: self.path.clone(),
            what: "lock it",
            source,
        })?;
        if taken {
            self.give_back();
        }
        Ok(())
    }
}

/// Opens the file that stands for the process, and makes it if it is not there.
pub(super) fn open_proof(path: &Path) -> Result<File, ImageError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::RUSR | Mode::WUSR);
    file.map(File::from).map_err(|errno| ImageError::File {
        path: path.to_owned(),
        what: "open it, whose lock is to stand for the process",
        source: errno.into(),
    })
}

/// Who has a file locked, in words.
fn others(file: &File) -> String {
    let known = || -> io::Result<Vec<u32>> {
        let stat = fstat(file)?;
        let mut table = String::new();
        File::open(LOCKS)?.take(MOST_BYTES).read_to_string(&mut table)?;
        Ok(holders(&table, (major(stat.st_dev), minor(stat.st_dev)), stat.st_ino))
    };
    let name = |pid: u32| match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim_end()),
        // Its last writes are under way, or it lives where its name cannot be read.
        Err(_) => format!("process {pid}"),
    };
    match known() {
        Ok(pids) if !pids.is_empty() => {
            pids.into_iter().map(name).collect::<Vec<_>>().join(" and ")
        }
        Ok(_) => "somebody who is not known here".into(),
        Err(error) => format!("somebody; who, cannot be read: {error}"),
    }
}

/// The processes that have a file locked by `flock`, as `/proc/locks` says; see `proc_locks(5)`.
fn holders(table: &str, device: (u32, u32), inode: u64) -> Vec<u32> {
    let pid = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        // Those that only wait for a lock have an arrow before it.
        if words.next() != Some("FLOCK") {
            return None;
        }
        let pid = words.nth(2)?;
        let mut place = words.next()?.splitn(3, ':');
        let mut number = |radix| u64::from_str_radix(place.next()?, radix).ok();
        let found = (number(16)?, number(16)?, number(10)?);
        let is_it = found == (device.0.into(), device.1.into(), inode);
        pid.parse().ok().filter(|pid| is_it && *pid > 0)
    };
    table.lines().filter_map(pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "\
1: POSIX  ADVISORY  READ  11 fe:00:7 128 128
2: FLOCK  ADVISORY  WRITE 22 fe:00:7 0 EOF
2: -> FLOCK  ADVISORY  WRITE 33 fe:00:7 0 EOF
3: FLOCK  ADVISORY  READ  44 fe:00:8 0 EOF
4: FLOCK  ADVISORY  READ  55 fe:00:8 0 EOF
5: FLOCK  ADVISORY  WRITE 66 00:2a:7 0 EOF
6: OFDLCK ADVISORY  WRITE -1 fe:00:9 0 EOF
7: FLOCK  ADVISORY  WRITE -1 fe:00:9 0 EOF
";

    #[test]
    fn the_table_tells_who_has_a_file_locked_and_not_who_waits() {
        assert_eq!(holders(TABLE, (0xfe, 0), 7), [22]);
        assert_eq!(holders(TABLE, (0xfe, 0), 8), [44, 55]);
        assert_eq!(holders(TABLE, (0, 0x2a), 7), [66]);
        assert_eq!(holders(TABLE, (0xfe, 0), 9), [0; 0], "in a namespace that is not seen");
        assert_eq!(holders(TABLE, (0xfe, 1), 7), [0; 0]);
    }

    fn image() -> (ImageLock, ImageLock) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open =
            || ImageLock { file: Arc::new(file.reopen().unwrap()), path: file.path().to_owned() };
        (open(), open())
    }

    #[test]
    fn one_of_two_has_it_and_the_other_one_says_so() {
        let (first, second) = image();
        assert!(first.try_take().unwrap() && first.try_take().unwrap());
        assert!(!second.try_take().unwrap());
        let (text, pid) = (second.describe(), std::process::id());
        let begin = format!("{} is locked by process {pid} (", second.path.display());
        // Some file systems have other numbers there than stat(2) tells.
        assert!(text.starts_with(&begin) || text.contains("somebody"), "{text}");
        first.give_back();
        assert!(second.try_take().unwrap() && !first.try_take().unwrap());
    }

    #[test]
    fn the_file_that_stands_for_a_process_is_made_once_and_no_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proof");
        drop(open_proof(&path).unwrap());
        fs::write(&path, "kept").unwrap();
        drop(open_proof(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let error = open_proof(&link).unwrap_err().to_string();
        assert!(error.starts_with(&link.display().to_string()), "{error}");
    }

    proptest! {
        #[test]
        fn any_table_is_read(table in "[0-9a-f:>A-Z -]{0,80}\n?.{0,20}") {
            for pid in holders(&table, (0xfe, 0), 7) {
                prop_assert!(table.contains(&pid.to_string()));
            }
        }
    }
}
