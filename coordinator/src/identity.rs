//! Which process is meant, and of which boot: numbers of processes come again.

use crate::record::ProcessIdentity;
use rustix::io::Errno;
use std::io;
use uuid::Uuid;

/// The running system's boot id.
pub(crate) fn boot_id() -> io::Result<Uuid> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    text.trim().parse().map_err(io::Error::other)
}

/// When a process began: field 22 of `/proc/<pid>/stat`. A process that is gone is `NotFound`.
pub(crate) fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).map_err(|error| {
        // Gone between the opening and the reading.
        match error.raw_os_error() {
            Some(code) if code == Errno::SRCH.raw_os_error() => io::ErrorKind::NotFound.into(),
            _ => error,
        }
    })?;
    // The second field is the program's name in parentheses, which may hold anything.
    let after_name = stat.iter().rposition(|&byte| byte == b')').map_or(0, |at| at + 1);
    let fields = String::from_utf8_lossy(&stat[after_name..]);
    let field = fields.split_ascii_whitespace().nth(22 - 3);
    field
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// Which process this pid is now.
pub(crate) fn identity(pid: u32) -> io::Result<ProcessIdentity> {
    Ok(ProcessIdentity { pid, start_time: start_time(pid)? })
}

/// True if that very process is there (a zombie is).
pub(crate) fn is_alive(process: ProcessIdentity) -> bool {
    start_time(process.pid).is_ok_and(|start_time| start_time == process.start_time)
}
