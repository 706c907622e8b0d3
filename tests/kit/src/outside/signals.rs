//! Signals to a process, and their effect seen.
//!
//! A process that was sent SIGKILL or SIGSTOP runs on for a moment. These return when it does not.

#![expect(clippy::panic, reason = "a check fails by a panic")]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::time::{Duration, Instant};

/// How long a process may take to be where a signal puts it.
const PATIENCE: Duration = Duration::from_secs(30);

/// SIGKILL; returns when the process has ended. Somebody else may have to reap it. Blocks.
///
/// # Panics
///
/// If there is no such process, or it does not end within half a minute.
pub fn kill(process: Pid) {
    let pidfd = match pidfd_open(process, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(error) => panic!("process {process:?} cannot be killed: {error}"),
    };
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => panic!("process {process:?} cannot be killed: {error}"),
    }
    let seconds = i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX);
    let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout));
    assert!(matches!(ended, Ok(1)), "process {process:?} does not end: {ended:?}");
}

/// SIGSTOP; returns when no thread of the process runs any more. Blocks.
///
/// # Panics
///
/// If there is no such process, or it does not stand within half a minute.
#[expect(clippy::disallowed_methods, reason = "nothing tells whoever is not its parent")]
pub fn stop(process: Pid) {
    send(process, Signal::STOP);
    let stat = format!("/proc/{}/stat", process.as_raw_pid());
    let end = Instant::now() + PATIENCE;
    loop {
        match std::fs::read_to_string(&stat) {
            Ok(text) if crate::process::stands(&text) => return,
            Ok(text) => assert!(Instant::now() < end, "it does not stand: {text}"),
            Err(error) => panic!("{stat} cannot be read: {error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// SIGCONT.
///
/// # Panics
///
/// If there is no such process.
pub fn go_on(process: Pid) {
    send(process, Signal::CONT);
}

fn send(process: Pid, signal: Signal) {
    if let Err(error) = kill_process(process, signal) {
        panic!("process {process:?} cannot be sent {signal:?}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn each_returns_when_it_is_so() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
            stat.rsplit(')').next().unwrap().trim_start().chars().next().unwrap()
        };
        stop(pid);
        assert_eq!(state(), 'T');
        go_on(pid);
        assert_ne!(state(), 'T');
        kill(pid);
        assert_eq!(state(), 'Z');
        child.wait().unwrap();
    }
}
