//! Processes must be gone: ended, and reaped by whoever started them.

#![expect(clippy::panic, reason = "a check fails by a panic")]

use crate::trace::{Trace, What};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use standstill_coordinator::Status;
use standstill_coordinator::record::ProcessIdentity;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How often a process is looked at that is to be reaped, which no fd tells.
const INTERVAL: Duration = Duration::from_millis(2);

/// Processes, most of them children of this one, held by pidfds, so that a pid that is used again deceives nobody.
#[derive(Debug, Default)]
pub struct Processes(Vec<Process>);

#[derive(Debug)]
struct Process {
    name: String,
    pid: u32,
    /// `None` if it was gone when it was first looked at.
    pidfd: Option<OwnedFd>,
}

impl Processes {
    /// The device processes of a machine.
    ///
    /// # Panics
    ///
    /// As [`of_trace`](Self::of_trace).
    #[must_use]
    pub fn of(status: &Status) -> Self {
        let devices = status.devices.iter();
        Self::new(devices.filter_map(|device| Some((device.name.clone(), device.pid?))))
    }

    /// The device processes that ever wrote to a trace.
    ///
    /// # Panics
    ///
    /// If the system refuses a pidfd for another reason than that there is no such process.
    #[must_use]
    pub fn of_trace(trace: &Trace) -> Self {
        let began = |what| {
            if let What::Began { pid } = what { Some(pid) } else { None }
        };
        let entries = trace.entries().into_iter();
        Self::new(entries.filter_map(|entry| Some((entry.who, began(entry.what)?))))
    }

    /// None yet; some are [added](Self::add).
    #[must_use]
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    fn new(processes: impl Iterator<Item = (String, u32)>) -> Self {
        let watch = |(name, pid): (String, u32)| {
            let known = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let Some(known) = known else { panic!("{name} has the impossible pid {pid}") };
            let pidfd = match pidfd_open(known, PidfdFlags::empty()) {
                Ok(pidfd) => Some(pidfd),
                Err(Errno::SRCH) => None,
                Err(error) => panic!("no pidfd for {name} (pid {pid}): {error}"),
            };
            Process { name, pid, pidfd }
        };
        Self(processes.map(watch).collect())
    }

    /// Adds a process.
    ///
    /// # Panics
    ///
    /// As [`of_trace`](Self::of_trace).
    pub fn add(&mut self, name: &str, process: Pid) {
        let pid = process.as_raw_pid().unsigned_abs();
        self.0.extend(Self::new([(name.to_owned(), pid)].into_iter()).0);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Only those of these names.
    #[must_use]
    pub fn only(mut self, names: &[&str]) -> Self {
        self.0.retain(|process| names.contains(&process.name.as_str()));
        self
    }

    /// Names of those that live or are zombies.
    #[must_use]
    pub fn left(&self) -> Vec<&str> {
        self.0.iter().filter(|p| !p.is_gone()).map(|p| p.name.as_str()).collect()
    }

    /// Checks that all end and are reaped within that time.
    ///
    /// # Panics
    ///
    /// If one is not; the message says which and what it is doing.
    pub async fn assert_gone_within(&self, time: Duration) {
        let end = Instant::now() + time;
        loop {
            let Some(process) = self.0.iter().find(|process| !process.is_gone()) else {
                return;
            };
            let Process { name, pid, .. } = process;
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            assert!(Instant::now() < end, "{name} (pid {pid}) is left after {time:?}: {state}");
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

impl Process {
    /// True if it has ended and was reaped.
    fn is_gone(&self) -> bool {
        let Some(pidfd) = &self.pidfd else {
            return true;
        };
        // Looks without taking: a child, living or a zombie, can be waited for.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        // One that is no child (any more) was reaped, or is reaped by another one: it has ended then.
        matches!(waitid(WaitId::PidFd(pidfd.as_fd()), options), Err(Errno::CHILD)) && ended(pidfd)
    }
}

/// Whether a process has ended, also one that is no child.
fn ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now)), Ok(1))
}

/// SIGKILL for a process that a record names, unless that has ended and another one has its number.
pub(crate) fn kill_recorded(process: ProcessIdentity) -> io::Result<()> {
    let known = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    let known = known.ok_or(io::ErrorKind::InvalidData)?;
    // First the pidfd: whose start is read then, it is the same process.
    let pidfd = pidfd_open(known, PidfdFlags::empty())?;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid))?;
    // Field 22; the name, field 2, may have spaces and parentheses in it.
    let start = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19));
    if start.and_then(|start| start.parse().ok()) == Some(process.start_time) {
        pidfd_send_signal(&pidfd, Signal::KILL)?;
    }
    Ok(())
}

/// Whether a process stands by a signal, by its `/proc/<pid>/stat`.
pub(crate) fn stands(stat: &str) -> bool {
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn child() -> (std::process::Child, Processes) {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let processes = Processes::new([("cat".to_owned(), child.id())].into_iter());
        (child, processes)
    }

    #[test]
    fn a_process_is_left_while_it_lives_and_as_a_zombie_and_gone_when_it_is_reaped() {
        let (mut child, processes) = child();
        assert_eq!(processes.left(), ["cat"]);
        child.kill().unwrap();
        assert_eq!(processes.left(), ["cat"], "nobody has reaped it");
        child.wait().unwrap();
        assert!(processes.left().is_empty());
    }

    #[test]
    fn a_process_of_somebody_else_is_left_while_it_lives() {
        let parent = std::os::unix::process::parent_id();
        let processes = Processes::new([("parent".to_owned(), parent)].into_iter());
        assert_eq!(processes.left(), ["parent"]);
    }

    #[test]
    fn a_recorded_process_is_killed_and_another_one_of_its_number_is_not() {
        let (mut child, _processes) = child();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let start = stat.rsplit(')').next().unwrap().split_whitespace().nth(19).unwrap();
        let start_time: u64 = start.parse().unwrap();
        let (pid, other) = (child.id(), start_time + 1);
        kill_recorded(ProcessIdentity { pid, start_time: other }).unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        kill_recorded(ProcessIdentity { pid, start_time }).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        kill_recorded(ProcessIdentity { pid, start_time }).unwrap_err();
    }

    #[tokio::test]
    #[should_panic(expected = "cat (pid")]
    async fn a_process_that_is_left_is_named() {
        let (_child, processes) = child();
        // Its pipe ends, and so does it, when this test unwinds.
        processes.assert_gone_within(Duration::from_millis(20)).await;
    }
}
