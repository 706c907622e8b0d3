//! Whether this coordinator may still end device processes that are to outlive it.
//!
//! A coordinator that was stopped and woken up does not know that another one has taken its
//! machine over, and its deadlines have passed. So whoever sends SIGKILL asks here first, and here
//! the record is read again. What is left is the time between the reading and the signal: a
//! coordinator that is stopped exactly there ends a device that is another one's by then. That
//! device is lost, and seen to be; it is never in a wrong state.

use crate::control_directory::{ControlDirectory, ControlDirectoryError};
use standstill_protocol::message::Term;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// One coordinator's right to the device processes of one machine.
#[derive(Debug)]
pub(crate) struct Custody {
    directory: ControlDirectory,
    uuid: Uuid,
    term: Term,
    kept: AtomicBool,
    superseded: OnceLock<Term>,
}

impl Custody {
    pub(crate) fn new(directory: ControlDirectory, uuid: Uuid, term: Term) -> Self {
        Self { directory, uuid, term, kept: AtomicBool::new(false), superseded: OnceLock::new() }
    }

    pub(crate) fn directory(&self) -> &ControlDirectory {
        &self.directory
    }

    pub(crate) fn term(&self) -> Term {
        self.term
    }

    /// From now on the processes live on when their owner here is dropped.
    pub(crate) fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// From now on they end with it again.
    pub(crate) fn give_up(&self) {
        self.kept.store(false, Ordering::Release);
    }

    /// Whether they live on when their owner here is dropped.
    pub(crate) fn spares(&self) -> bool {
        self.kept.load(Ordering::Acquire) || self.superseded().is_some()
    }

    /// The term of the coordinator that has the machine now, as far as was found out.
    pub(crate) fn superseded(&self) -> Option<Term> {
        self.superseded.get().copied()
    }

    /// Another coordinator has the machine, whatever the record says.
    pub(crate) fn supersede(&self, term: Term) {
        // Whoever was first has said the same.
        let _ = self.superseded.set(term);
    }

    /// Whether the machine is still this coordinator's. Reads the record; once it was not, it never
    /// is again.
    ///
    /// # Errors
    ///
    /// [`ControlDirectoryError::Superseded`] if it is not; others if that cannot be found out.
    pub(crate) fn check(&self) -> Result<(), ControlDirectoryError> {
        let result = match self.superseded() {
            Some(found) => Err(self.directory.superseded(found, self.term)),
            None => self.directory.check_term(self.uuid, self.term),
        };
        if let Err(ControlDirectoryError::Superseded { found, .. }) = &result {
            self.supersede(*found);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{boot_id, identity};
    use crate::process::{DeviceProcess, Fence, FenceProgress, ProcessSpec, Spawner};
    use crate::record::{MachineRecord, RECORD_VERSION};
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use std::time::Duration;

    /// A process that reads its standard input to the end, under a custody of term 1.
    fn process(directory: ControlDirectory, uuid: Uuid) -> (DeviceProcess, OwnedFd) {
        let (stdin, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let spawner = Spawner::new().unwrap();
        let mut process = spawner.spawn(&ProcessSpec::new("cat"), stdin).unwrap();
        process.place_under(Arc::new(Custody::new(directory, uuid, Term(1))));
        (process, ours)
    }

    #[test]
    fn nobody_is_killed_by_one_who_is_superseded_or_cannot_know() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let write = |term| {
            let record = MachineRecord {
                version: RECORD_VERSION,
                boot: boot_id().unwrap(),
                machine: "vm".into(),
                uuid: Uuid::from_u128(1),
                term,
                coordinator: identity(std::process::id()).unwrap(),
                devices: Vec::new(),
            };
            let directory = ControlDirectory::create(&path).unwrap();
            directory.lock().unwrap().write(&record).unwrap();
            directory
        };
        for superseded in [true, false] {
            let (mut process, stdin) = process(write(1), Uuid::from_u128(1));
            if superseded {
                write(2);
            } else {
                std::fs::remove_file(path.join("machine.json")).unwrap();
            }
            let mut fence = Fence::begin(&process, Vec::new());
            for _ in 0..3 {
                let progress = fence.poll(&mut process);
                assert!(matches!(progress, FenceProgress::WaitingForExit), "{progress:?}");
                assert!(fence.obstacle().is_some());
            }
            assert_eq!(process.wait_exit(Duration::from_millis(50)).unwrap(), None);
            let custody = process.custody().unwrap();
            assert_eq!(custody.superseded(), superseded.then_some(Term(2)));
            // Once superseded it stays so, whatever the record says.
            write(1);
            assert_eq!(process.kill().is_err(), superseded);
            if superseded {
                drop(stdin);
            }
            assert!(process.wait_exit(Duration::from_secs(20)).unwrap().is_some());
        }
    }

    #[test]
    fn a_process_that_is_kept_lives_on_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let directory = ControlDirectory::create(&folder.path().join("vm")).unwrap();
        let (process, stdin) = process(directory, Uuid::nil());
        process.custody().unwrap().keep();
        let pidfd = process.pidfd().try_clone_to_owned().unwrap();
        drop(process);
        let ended = |time: Duration| {
            let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            let time = rustix::event::Timespec::try_from(time).unwrap();
            rustix::event::poll(&mut fds, Some(&time)).unwrap() > 0
        };
        assert!(!ended(Duration::from_millis(50)));
        drop(stdin);
        assert!(ended(Duration::from_secs(20)));
    }
}
