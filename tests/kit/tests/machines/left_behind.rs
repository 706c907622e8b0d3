//! What the tests of take-overs share: machines that a pilot has left behind.

use crate::fixture::{LONG, report_of};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use standstill_coordinator::error::MachineError;
use standstill_coordinator::{Machine, Outcome, TakenOver};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_testkit::plan::Policy;
use standstill_testkit::{Course, Entry, Pilot, Script, Trace, What, within};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

pub(crate) const NAMES: [&str; 3] = ["d0", "d1", "d2"];

/// A machine of three devices and where it is found.
pub(crate) struct Left {
    pub(crate) trace: Trace,
    pub(crate) course: Course,
    _folder: TempDir,
}

impl Left {
    /// Three devices that do what these scripts say, in a machine that is not started yet.
    pub(crate) fn new(scripts: impl FnOnce() -> [Script; 3]) -> Self {
        let trace = Trace::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let names = NAMES.iter();
        let devices = scripts().into_iter().zip(names).map(|(s, name)| s.named(name, &trace));
        let course = Course {
            directory: Some(folder.path().join("vm")),
            devices: devices.collect(),
            programs: Vec::new(),
            phase: LONG,
            other: LONG,
            policy: Policy::Rollback,
        };
        Self { trace, course, _folder: folder }
    }

    pub(crate) fn honest() -> Self {
        Self::new(|| [Script::honest(), Script::honest(), Script::honest()])
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.course.directory.clone().unwrap()
    }

    pub(crate) async fn pilot(&self) -> Pilot {
        Pilot::start(&self.course).await.unwrap()
    }

    pub(crate) async fn take_over(&self) -> TakenOver {
        let builder = self.course.builder().unwrap();
        within(LONG, "take-over", builder.take_over()).await.unwrap()
    }

    /// The process of a device.
    pub(crate) fn process(&self, name: &str) -> Process {
        let began = |entry: &Entry| match entry.what {
            What::Began { pid } if entry.who == name => Some(pid),
            _ => None,
        };
        Process::new(self.trace.entries().iter().rev().find_map(began).unwrap())
    }

    /// Checks that every device says that it is there, and that the machine says so too.
    pub(crate) async fn assert_all(
        &self,
        machine: &Machine,
        names: &[&str],
        state: MigrationState,
    ) {
        crate::fixture::assert_all_in(machine, &self.trace, names, state).await;
    }

    /// Checks that no device was told to start since it was taken over last.
    pub(crate) fn assert_nothing_started(&self) {
        let entries = self.trace.entries();
        for name in NAMES {
            let own: Vec<_> = entries.iter().filter(|entry| entry.who == name).collect();
            let over = own.iter().rposition(|e| matches!(e.what, What::TakenOver { .. }));
            let started = own[over.unwrap()..].iter().any(|entry| {
                matches!(
                    entry.what,
                    What::Received { phase: Phase::PrepareStart | Phase::Start, .. }
                )
            });
            assert!(!started, "{name} was started:\n{}", self.trace.text());
        }
    }

    /// Checks that no device ever got a command of another coordinator than its own.
    pub(crate) fn assert_no_stale(&self) {
        let entries = self.trace.entries();
        let stale = entries.iter().find(|entry| matches!(entry.what, What::Stale { .. }));
        assert!(stale.is_none(), "{stale:?}:\n{}", self.trace.text());
    }

    /// Ends the machine; nothing is left in its directory.
    pub(crate) async fn end(&self, machine: Machine) {
        within(LONG, "shutdown", machine.shutdown()).await.unwrap();
        let left: Vec<_> = std::fs::read_dir(self.directory()).unwrap().collect();
        assert!(left.is_empty(), "left in the directory: {left:?}");
    }
}

/// The owner of a machine that was taken over: resumes it if it is held, then pauses and resumes
/// it.
pub(crate) async fn owner_goes_on(machine: &Machine, held: bool) {
    if held {
        for error in [machine.pause().await.unwrap_err(), machine.resume().await.unwrap_err()] {
            assert!(matches!(error, MachineError::State { .. }), "{error}");
        }
        machine.accept_hold().await.unwrap();
        let report = within(LONG, "resume", machine.resume()).await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
    }
    let stopped = match within(LONG, "pause", machine.pause()).await {
        Ok(stopped) => stopped,
        Err(error) => panic!("{}", report_of(&error)),
    };
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    let report = within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
}

/// Any process, child or not.
pub(crate) struct Process(OwnedFd);

impl Process {
    pub(crate) fn new(pid: u32) -> Self {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        Self(pidfd_open(pid, PidfdFlags::empty()).unwrap())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.0, signal).unwrap();
    }

    /// Whether it ends within that time.
    pub(crate) async fn ends_within(&self, time: Duration) -> bool {
        let process = Self(self.0.try_clone().unwrap());
        tokio::task::spawn_blocking(move || process.ends_within_blocking(time)).await.unwrap()
    }

    /// As [`ends_within`](Self::ends_within), and nothing else happens in this test meanwhile.
    pub(crate) fn ends_within_blocking(&self, time: Duration) -> bool {
        let time = Timespec::try_from(time).unwrap();
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&time)).unwrap() > 0
    }

    pub(crate) async fn lives(&self) -> bool {
        !self.ends_within(Duration::ZERO).await
    }
}
