//! Hooks that run a command.

use crate::machine_file::HookEntry;
use crate::machine_file::hook::Command;
use standstill::coordinator::{Hook, LocalError};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{ChildStderr, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long the last words of a command are waited for; a process that it left behind may have the
/// pipe.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How many of the last lines an error shows.
const LINES: usize = 5;
/// The longest of them, in bytes.
const MAX_LINE: u64 = 1024;

/// Runs one command when the machine stops and another one when it starts. It takes as long as they
/// do: the hook's deadline is the coordinator's, and a command is never killed in the middle of its
/// work.
#[derive(Debug)]
pub(crate) struct CommandHook {
    machine: String,
    name: String,
    stop: Option<Command>,
    start: Option<Command>,
}

impl CommandHook {
    pub(crate) fn new(machine: &str, hook: &HookEntry) -> Self {
        Self {
            machine: machine.to_owned(),
            name: hook.name.value.clone(),
            stop: hook.stop.clone(),
            start: hook.start.clone(),
        }
    }

    fn run(&self, command: Option<&Command>, moment: &str) -> Result<(), LocalError> {
        let Some(Command { program, args }) = command else { return Ok(()) };
        let program = &program.value;
        let mut process = std::process::Command::new(program);
        process
            .args(args)
            .env("STANDSTILL_MACHINE", &self.machine)
            .env("STANDSTILL_HOOK", &self.name)
            .env("STANDSTILL_MOMENT", moment)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C is for `standstill run` alone.
            .process_group(0);
        for name in super::notify::VARIABLES {
            process.env_remove(name);
        }
        let mut child = process
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        tracing::debug!(hook = self.name, moment, pid = child.id(), "command started");
        let words = child.stderr.take().map(|stderr| last_words(stderr, self.name.clone()));
        let status = child.wait()?;
        if status.success() {
            return Ok(());
        }
        let words = words.and_then(|words| words.recv_timeout(LAST_WORDS).ok()).unwrap_or_default();
        let words = if words.is_empty() { words } else { format!(": {words}") };
        Err(format!("{} ended with {status}{words}", program.display()).into())
    }
}

impl Hook for CommandHook {
    fn stop(&mut self) -> Result<(), LocalError> {
        self.run(self.stop.as_ref(), "stop")
    }

    fn start(&mut self) -> Result<(), LocalError> {
        self.run(self.start.as_ref(), "start")
    }
}

/// Reads what a command writes to standard error into the log, on a thread of its own; sends the
/// last lines when it is over.
fn last_words(stderr: ChildStderr, hook: String) -> mpsc::Receiver<String> {
    let (send, words) = mpsc::sync_channel(1);
    let read = move || {
        let mut lines = VecDeque::new();
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        // What is longer is shown in pieces.
        while matches!(reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line).trim_end().escape_debug().to_string();
            tracing::info!(hook, "{text}");
            if lines.len() == LINES {
                lines.pop_front();
            }
            lines.push_back(text);
            line.clear();
        }
        // Nobody waits for them if the command did its work.
        let _ = send.try_send(Vec::from(lines).join("; "));
    };
    // Without the thread there are no last words.
    let _ = thread::Builder::new().name("hook-stderr".into()).spawn(read);
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_file::fields::Placed;

    fn hook(script: &str) -> CommandHook {
        let command = Command {
            program: Placed { value: "sh".into(), span: 0..0 },
            args: vec!["-c".into(), script.into()],
        };
        CommandHook {
            machine: "vm0".into(),
            name: "vcpus".into(),
            stop: Some(command),
            start: None,
        }
    }

    #[test]
    fn a_command_knows_what_it_is_called_for() {
        let script =
            "test $STANDSTILL_MACHINE-$STANDSTILL_HOOK-$STANDSTILL_MOMENT = vm0-vcpus-stop";
        hook(script).stop().unwrap();
        hook("false").start().unwrap();
    }

    #[test]
    fn a_signal_of_the_terminal_does_not_end_a_command_in_the_middle_of_its_work() {
        // Of a process that leads its group, the group has its number.
        let script = "read -r _ _ _ _ group _ < /proc/$$/stat; test $group = $$";
        hook(script).stop().unwrap();
    }

    #[test]
    fn an_error_has_the_status_and_the_last_words() {
        let error =
            hook("seq 1 9 >&2; echo 'no such VM' >&2; exit 3").stop().unwrap_err().to_string();
        assert!(error.contains("exit status: 3: 6; 7; 8; 9; no such VM"), "{error}");
    }

    #[test]
    fn a_process_that_the_command_leaves_behind_holds_nobody_up() {
        let began = std::time::Instant::now();
        let error = hook("sleep 20 & exit 1").stop().unwrap_err().to_string();
        assert!(error.contains("exit status: 1"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let mut hook = hook("");
        if let Some(command) = &mut hook.stop {
            command.program.value = "/nowhere/tool".into();
        }
        assert!(hook.stop().unwrap_err().to_string().contains("/nowhere/tool"));
    }
}
