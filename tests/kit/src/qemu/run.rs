//! Programs that do something and end: with a bound, and with what they said when they fail.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use thiserror::Error;

/// The most that is read of what a program says, in bytes.
const MAX_OUTPUT: u64 = 64 << 20;
/// The most of it that is in an error, in bytes, its end.
const MAX_ERROR: usize = 4096;

/// A program has not done what it was to do.
#[derive(Debug, Error)]
pub enum RunError {
    /// It could not be started, or not be waited for.
    #[error("{program}: {source}")]
    Io {
        /// Which one.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// It was killed, since it had not ended in time.
    #[error("{command} has not ended within {within:?}; it said: {output}")]
    Late {
        /// Its command line.
        command: String,
        /// How long it had.
        within: Duration,
        /// The end of its output.
        output: String,
    },
    /// It failed.
    #[error("{command}: {status}; it said: {output}")]
    Failed {
        /// Its command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of its output.
        output: String,
    },
}

impl RunError {
    fn io(command: &Command) -> impl Fn(io::Error) -> Self + use<> {
        let program = command.get_program().to_string_lossy().into_owned();
        move |source| Self::Io { program: program.clone(), source }
    }
}

/// Runs a program to its end; gives its standard output.
pub(super) fn run(command: &mut Command, within: Duration) -> Result<Vec<u8>, RunError> {
    let failed = RunError::io(command);
    // Files, which take whatever a program says without a thread that reads.
    let mut stdout = tempfile::tempfile().map_err(&failed)?;
    let mut stderr = tempfile::tempfile().map_err(&failed)?;
    command.stdin(Stdio::null());
    command.stdout(stdout.try_clone().map_err(&failed)?);
    command.stderr(stderr.try_clone().map_err(&failed)?);
    let mut child = command.spawn().map_err(&failed)?;
    let status = match wait(&mut child, within) {
        Ok(Some(status)) => status,
        other => {
            child.kill().and_then(|()| child.wait()).map_err(&failed)?;
            other.map_err(&failed)?;
            let output = end_of(&mut stderr, &mut stdout).map_err(&failed)?;
            return Err(RunError::Late { command: line(command), within, output });
        }
    };
    if status.success() {
        return content(&mut stdout).map_err(&failed);
    }
    let output = end_of(&mut stderr, &mut stdout).map_err(&failed)?;
    Err(RunError::Failed { command: line(command), status, output })
}

/// Waits until a child has ended and reaps it; `None` if it has not in that time.
pub(super) fn wait(child: &mut Child, within: Duration) -> io::Result<Option<ExitStatus>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let within = Timespec::try_from(within).map_err(io::Error::other)?;
    // A signal that comes meanwhile makes it shorter, no more.
    match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&within)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => child.try_wait(),
        Err(error) => Err(error.into()),
    }
}

fn line(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn content(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(MAX_OUTPUT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn end_of(stderr: &mut File, stdout: &mut File) -> io::Result<String> {
    let mut output = content(stderr)?;
    if output.is_empty() {
        output = content(stdout)?;
    }
    let begin = output.len().saturating_sub(MAX_ERROR);
    Ok(String::from_utf8_lossy(&output[begin..]).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn the_output_of_a_program_that_succeeds() {
        assert_eq!(run(&mut shell("echo out; echo err >&2"), LONG).unwrap(), b"out\n");
    }

    #[test]
    fn a_program_that_fails_and_what_it_said() {
        let error = run(&mut shell("echo no room >&2; exit 3"), LONG).unwrap_err().to_string();
        assert!(error.contains("exit status: 3; it said: no room"), "{error}");
        let error = run(&mut Command::new("/no/such/program"), LONG).unwrap_err().to_string();
        assert!(error.starts_with("/no/such/program: "), "{error}");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let short = Duration::from_millis(50);
        let error = run(&mut shell("echo began; exec sleep 1000"), short).unwrap_err();
        assert!(matches!(error, RunError::Late { .. }), "{error}");
    }
}
