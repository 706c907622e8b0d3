//! However a demonstration ends, none of its device processes outlives it by a second.
//!
//! Each test takes a pidfd of every device process while the machine is at work, ends the
//! demonstration in its way, and waits on the pidfds.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::fs::read_to_string;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const DEVICES: usize = 4;
/// How long a device process may outlive the command.
const GRACE: Duration = Duration::from_secs(1);
/// How long the command itself may take to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A demonstration at work, and its device processes.
struct Demo {
    command: Child,
    stdout: BufReader<std::process::ChildStdout>,
    devices: Vec<OwnedFd>,
}

impl Demo {
    /// Starts it and waits until it says that its machine is connected.
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_standstill"))
            .args(["demo", "--devices", &DEVICES.to_string()])
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(command.stdout.take().unwrap());
        let mut headline = String::new();
        stdout.read_line(&mut headline).unwrap();
        assert!(headline.contains("copy engines"), "{headline:?}");
        let devices: Vec<_> = children(&command)
            .into_iter()
            .map(|pid| pidfd_open(pid, PidfdFlags::empty()).unwrap())
            .collect();
        assert_eq!(devices.len(), DEVICES, "device processes");
        Self { command, stdout, devices }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.command), signal).unwrap();
    }

    /// Waits for the end of the command and then for that of its devices; returns how the command
    /// ended and what it wrote to standard error.
    fn ends(mut self) -> (ExitStatus, String) {
        let command = pidfd_open(Pid::from_child(&self.command), PidfdFlags::empty()).unwrap();
        assert!(gone(&command, PATIENCE), "the command goes on");
        let status = self.command.wait().unwrap();
        let deadline = Instant::now() + GRACE;
        for (number, device) in self.devices.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(gone(device, left), "device process {number} is left behind");
        }
        let mut errors = String::new();
        self.command.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        (status, errors)
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Only if a test has failed is anything left of it.
        let _ = self.command.kill();
        let _ = self.command.wait();
        for device in &self.devices {
            let _ = pidfd_send_signal(device, Signal::KILL);
        }
    }
}

/// The children of all threads of a process.
fn children(of: &Child) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", of.id())).unwrap();
    tasks
        .filter_map(|task| read_to_string(task.ok()?.path().join("children")).ok())
        .flat_map(|text| {
            let pids = text.split_whitespace();
            pids.filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect::<Vec<_>>()
        })
        .collect()
}

/// Whether a process ends within that time.
fn gone(pidfd: &OwnedFd, within: Duration) -> bool {
    let within = Timespec::try_from(within).unwrap();
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&within)).unwrap() == 1
}

const FOR_EVER: [&str; 2] = ["--rounds", "1000000"];

#[test]
fn after_a_normal_end() {
    let mut demo = Demo::start(&["--rounds", "5"]);
    let mut rest = String::new();
    demo.stdout.read_to_string(&mut rest).unwrap();
    let (status, errors) = demo.ends();
    assert!(status.success(), "{rest}\n{errors}");
}

#[test]
fn after_sigint_and_the_exit_code_says_so() {
    let demo = Demo::start(&FOR_EVER);
    demo.signal(Signal::INT);
    let (status, errors) = demo.ends();
    assert_eq!(status.code(), Some(130), "{errors}");
    assert!(errors.contains("SIGINT"), "{errors}");
}

#[test]
fn after_sigterm_and_the_exit_code_says_so() {
    let demo = Demo::start(&FOR_EVER);
    demo.signal(Signal::TERM);
    let (status, errors) = demo.ends();
    assert_eq!(status.code(), Some(143), "{errors}");
}

#[test]
fn after_sigkill() {
    let demo = Demo::start(&FOR_EVER);
    demo.signal(Signal::KILL);
    let (status, _) = demo.ends();
    assert_eq!(status.signal(), Some(9));
}

#[test]
fn after_sigkill_with_a_device_that_is_sigstopped() {
    let demo = Demo::start(&FOR_EVER);
    pidfd_send_signal(&demo.devices[1], Signal::STOP).unwrap();
    demo.signal(Signal::KILL);
    let (status, _) = demo.ends();
    assert_eq!(status.signal(), Some(9));
}

#[test]
fn after_sigterm_with_a_device_that_is_sigstopped() {
    let demo = Demo::start(&FOR_EVER);
    pidfd_send_signal(&demo.devices[2], Signal::STOP).unwrap();
    let began = Instant::now();
    demo.signal(Signal::TERM);
    let (status, errors) = demo.ends();
    assert_eq!(status.code(), Some(143), "{errors}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn after_an_error_that_names_the_device() {
    let demo = Demo::start(&FOR_EVER);
    pidfd_send_signal(&demo.devices[0], Signal::KILL).unwrap();
    let (status, errors) = demo.ends();
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains("engine"), "{errors}");
}

#[test]
fn after_a_panic_in_the_middle_of_a_round() {
    let demo = Demo::start(&["--rounds", "1000000", "--panic-in-round", "3"]);
    let (status, errors) = demo.ends();
    assert_eq!(status.code(), Some(101), "{errors}");
    assert!(errors.contains("asked to panic in round 3"), "{errors}");
}
