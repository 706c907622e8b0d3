//! The serial console of a guest, by lines.

use super::GuestError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use std::collections::VecDeque;
use std::io::Read;
use std::process::ChildStdin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most lines that are kept; older ones are forgotten, and counted.
const MAX_LINES: usize = 20_000;
/// The longest line, in bytes; what is longer is cut into several.
const MAX_LINE: usize = 8192;
/// How long the guest may take to read what is written.
const WRITE: Duration = Duration::from_secs(30);
/// With this in a line a kernel ends.
const KERNEL_PANIC: &str = "Kernel panic - not syncing";

/// Lines that come from somewhere, up to an end.
#[derive(Debug, Default)]
pub(super) struct Log {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<String>,
    /// How many lines there were before the first of these.
    forgotten: usize,
    /// What has come of a line that is not at its end.
    unfinished: Vec<u8>,
    ended: bool,
}

impl State {
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.unfinished.push(byte);
            }
            if byte == b'\n' || self.unfinished.len() >= MAX_LINE {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.unfinished).trim_end_matches('\r').to_owned();
        self.unfinished.clear();
        if self.lines.len() >= MAX_LINES {
            self.lines.pop_front();
            self.forgotten += 1;
        }
        self.lines.push_back(line);
    }
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all that comes, on a thread of its own, which ends with it.
    pub(super) fn of(mut from: impl Read + Send + 'static) -> Arc<Self> {
        let log = Arc::new(Self::default());
        let reader = Arc::clone(&log);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let read = match from.read(&mut bytes) {
                    Ok(read) => read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(_) => 0,
                };
                let mut state = reader.lock();
                state.add(bytes.get(..read).unwrap_or_default());
                if read == 0 {
                    state.end_line_if_begun();
                    state.ended = true;
                }
                drop(state);
                reader.more.notify_all();
                if read == 0 {
                    return;
                }
            }
        });
        log
    }

    /// All that is kept, and the beginning of a line, if any.
    pub(super) fn text(&self) -> String {
        let state = self.lock();
        let mut text = String::new();
        if state.forgotten > 0 {
            text = format!("({} earlier lines)\n", state.forgotten);
        }
        for line in &state.lines {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(&String::from_utf8_lossy(&state.unfinished));
        text
    }

    /// Waits until no more comes, at most that long.
    pub(super) fn wait_for_end(&self, within: Duration) {
        let (state, _) = self
            .more
            .wait_timeout_while(self.lock(), within, |state| !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
    }
}

impl State {
    fn end_line_if_begun(&mut self) {
        if !self.unfinished.is_empty() {
            self.end_line();
        }
    }
}

/// The serial console of a guest.
#[derive(Debug)]
pub struct Console {
    log: Arc<Log>,
    /// How many lines were read already, those that were passed over included.
    read: Mutex<usize>,
    input: Mutex<ChildStdin>,
}

impl Console {
    pub(super) fn new(
        output: impl Read + Send + 'static,
        input: ChildStdin,
    ) -> Result<Self, Errno> {
        // A guest that does not read must not block whoever writes.
        ioctl_fionbio(&input, true)?;
        Ok(Self { log: Log::of(output), read: Mutex::new(0), input: Mutex::new(input) })
    }

    /// Waits for a line that has `text` in it, and gives that line. Lines before it are passed
    /// over, and not looked at again.
    ///
    /// # Errors
    ///
    /// If none comes in that time, if the guest's kernel panics, or if QEMU ends.
    pub fn wait_for(&self, text: &str, within: Duration) -> Result<String, GuestError> {
        let waited = || format!("a line with {text:?} on the console");
        let end = Instant::now() + within;
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.log.lock();
        loop {
            let known = state.forgotten + state.lines.len();
            for number in (*read).max(state.forgotten)..known {
                *read = number + 1;
                let Some(line) = state.lines.get(number - state.forgotten) else { break };
                if line.contains(text) {
                    return Ok(line.clone());
                }
                if line.contains(KERNEL_PANIC) {
                    return Err(GuestError::Panic { waited_for: waited(), line: line.clone() });
                }
            }
            if state.ended {
                return Err(GuestError::Ended { waited_for: waited() });
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GuestError::Late { waited_for: waited(), within });
            }
            let more = self.log.more.wait_timeout(state, left);
            state = more.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Passes over all lines that have come: what is [waited for](Self::wait_for) next comes after now.
    pub fn catch_up(&self) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.log.lock();
        *read = state.forgotten + state.lines.len();
    }

    /// Writes a line to the guest.
    ///
    /// # Errors
    ///
    /// If the guest does not read it within half a minute, or QEMU has ended.
    pub fn write(&self, line: &str) -> Result<(), GuestError> {
        let what = || format!("the guest to read {line:?}");
        let end = Instant::now() + WRITE;
        let bytes = [line.as_bytes(), b"\n"].concat();
        let mut left = bytes.as_slice();
        let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        while !left.is_empty() {
            match rustix::io::write(&*input, left) {
                Ok(written) => left = left.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let time = end.saturating_duration_since(Instant::now());
                    if time.is_zero() {
                        return Err(GuestError::Late { waited_for: what(), within: WRITE });
                    }
                    let time = Timespec::try_from(time).ok();
                    // However it ends, the next write shows what is so.
                    let _ = poll(&mut [PollFd::new(&*input, PollFlags::OUT)], time.as_ref());
                }
                Err(_) => return Err(GuestError::Ended { waited_for: what() }),
            }
        }
        Ok(())
    }

    /// All that has come, whether it was waited for or not. The oldest of very many lines are
    /// forgotten.
    #[must_use]
    pub fn text(&self) -> String {
        self.log.text()
    }

    pub(super) fn log(&self) -> &Log {
        &self.log
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    const LONG: Duration = Duration::from_secs(30);

    fn console(script: &str) -> (Child, Console) {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (output, input) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
        (child, Console::new(output, input).unwrap())
    }

    #[test]
    fn lines_are_found_in_their_order_and_each_once() {
        let (mut child, console) = console("printf 'one 1\\r\\ntwo 1\\none 2\\nlast'");
        assert_eq!(console.wait_for("one", LONG).unwrap(), "one 1");
        assert_eq!(console.wait_for("one", LONG).unwrap(), "one 2");
        assert_eq!(console.wait_for("last", LONG).unwrap(), "last");
        let error = console.wait_for("one", LONG).unwrap_err();
        assert!(matches!(error, GuestError::Ended { .. }), "{error}");
        assert_eq!(console.text(), "one 1\ntwo 1\none 2\nlast\n");
        child.wait().unwrap();
    }

    #[test]
    fn what_is_written_is_read_and_a_line_that_does_not_come_is_late() {
        let (mut child, console) = console("read line; echo \"heard $line\"; read line");
        console.write("hello").unwrap();
        console.wait_for("heard hello", LONG).unwrap();
        let error = console.wait_for("more", Duration::from_millis(20)).unwrap_err();
        let text = "waited 20ms in vain for a line with \"more\" on the console";
        assert_eq!(error.to_string(), text);
        console.write("").unwrap();
        child.wait().unwrap();
        let error = console.write("nobody").unwrap_err();
        assert!(matches!(error, GuestError::Ended { .. }), "{error}");
    }

    #[test]
    fn what_was_passed_over_is_not_found() {
        let (mut child, console) = console("echo a 1; echo b; read line; echo a 2");
        console.wait_for("b", LONG).unwrap();
        console.write("").unwrap();
        child.wait().unwrap();
        console.log().wait_for_end(LONG);
        console.catch_up();
        let error = console.wait_for("a", LONG).unwrap_err();
        assert!(matches!(error, GuestError::Ended { .. }), "{error}");
    }

    #[test]
    fn a_kernel_that_panics_is_not_waited_for() {
        let (mut child, console) = console("echo 'Kernel panic - not syncing: no init'; read line");
        let error = console.wait_for("ready", LONG).unwrap_err().to_string();
        assert!(error.contains("no init"), "{error}");
        console.write("").unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn long_lines_are_cut_and_old_ones_forgotten() {
        let mut state = State::default();
        state.add(&[b'x'; MAX_LINE + 3]);
        state.add(b"\n");
        assert_eq!(state.lines, ["x".repeat(MAX_LINE), "xxx".to_owned()]);
        for _ in 0..MAX_LINES {
            state.add(b"line\n");
        }
        assert_eq!((state.lines.len(), state.forgotten), (MAX_LINES, 2));
    }
}
