//! QMP, QEMU's control socket: commands with deadlines, and the events that come meanwhile.
//!
//! A small client of our own, which blocks. What it is for asks for little (a line of JSON there, a line
//! back), and for three things that the crate `qapi` does not have: a command that has no answer in time
//! costs its connection and nothing else, an event that was not known when the client was built is
//! an event like others, and all that was said can be shown when a test fails.

use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long QEMU may take to answer a command. It answers at once, unless its main loop is blocked: by
/// a device that does not answer for 5 s, by a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest line, in bytes.
const MAX_LINE: usize = 4 << 20;
/// The most events that are kept until somebody waits for them.
const MAX_EVENTS: usize = 1000;
/// The most lines of the conversation that are kept.
const MAX_SAID: usize = 1000;

/// A QMP command was not executed, or an event did not come.
#[derive(Debug, Error)]
pub enum QmpError {
    /// QEMU refuses.
    #[error("QEMU refuses {command}: {class}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// The class of the error, such as `GenericError`.
        class: String,
        /// The reason, for people.
        description: String,
    },
    /// It does not answer, or the event does not come.
    #[error("QEMU has not sent {what} within {within:?}")]
    Late {
        /// What was waited for.
        what: String,
        /// How long.
        within: Duration,
    },
    /// What it sends is no QMP.
    #[error("QEMU sends no QMP: {0}")]
    Malformed(String),
    /// The connection has ended, mostly with QEMU.
    #[error("the QMP connection has ended before {what}")]
    Ended {
        /// What was waited for.
        what: String,
    },
    /// The connection was given up when a command had no answer in time.
    #[error("the QMP connection was given up before: {0}")]
    GivenUp(String),
}

/// A QMP connection.
#[derive(Debug)]
pub struct Qmp {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stream: UnixStream,
    /// What has come and is not taken yet.
    buffer: Vec<u8>,
    /// Events that nobody has taken yet.
    events: VecDeque<Value>,
    /// The conversation.
    said: VecDeque<String>,
    /// Why nothing more can be said.
    given_up: Option<String>,
    next_id: u64,
}

impl Qmp {
    /// Negotiates on a connection that QEMU has just made.
    ///
    /// # Errors
    ///
    /// If the other end does not greet as QEMU does, in time.
    pub fn new(stream: UnixStream) -> Result<Self, QmpError> {
        let state = State {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            said: VecDeque::new(),
            given_up: None,
            next_id: 1,
        };
        let qmp = Self { state: Mutex::new(state) };
        let mut state = qmp.lock();
        let greeting = state.message("its greeting", Instant::now() + PATIENCE, PATIENCE)?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed(Value::Object(greeting).to_string()));
        }
        drop(state);
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executes a command with its arguments (an object), and gives what it returns. Waits for up to
    /// a minute.
    ///
    /// # Errors
    ///
    /// If QEMU refuses or does not answer. After a command without an answer the connection is of
    /// no use any more.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, PATIENCE)
    }

    /// As [`execute`](Self::execute), with a deadline.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn execute_within(
        &self,
        command: &str,
        arguments: &Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let mut state = self.lock();
        if let Some(why) = &state.given_up {
            return Err(QmpError::GivenUp(why.clone()));
        }
        let result = state.execute(command, arguments, within);
        if let Err(error) = &result
            && !matches!(error, QmpError::Refused { .. })
        {
            state.given_up = Some(error.to_string());
        }
        result
    }

    /// Waits for an event of that name, such as `DEVICE_DELETED`, and gives it. One that came since
    /// the connection was made, and that nobody has taken, counts.
    ///
    /// # Errors
    ///
    /// If none comes in that time, or the connection ends.
    pub fn wait_for(&self, event: &str, within: Duration) -> Result<Value, QmpError> {
        let what = format!("the event {event}");
        let end = Instant::now() + within;
        let mut state = self.lock();
        loop {
            let place = state.events.iter().position(|known| known["event"] == event);
            if let Some(event) = place.and_then(|place| state.events.remove(place)) {
                return Ok(event);
            }
            if let Some(why) = &state.given_up {
                return Err(QmpError::GivenUp(why.clone()));
            }
            let message = state.message(&what, end, within)?;
            state.keep(message)?;
        }
    }

    /// The conversation, a line for each command, answer and event. Does not wait; the oldest of very
    /// many lines are forgotten.
    #[must_use]
    pub fn text(&self) -> String {
        let mut state = self.lock();
        // Events that came since the last command.
        while state.given_up.is_none() {
            let Ok(message) = state.message("more", Instant::now(), Duration::ZERO) else { break };
            if state.keep(message).is_err() {
                break;
            }
        }
        state.said.iter().fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "{line}");
            text
        })
    }
}

impl State {
    fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let end = Instant::now() + within;
        let id = self.next_id;
        self.next_id += 1;
        let what = format!("an answer to {command}");
        let line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        self.note(format!("-> {line}"));
        self.stream
            .set_write_timeout(Some(within.max(Duration::from_millis(1))))
            .and_then(|()| self.stream.write_all(format!("{line}\n").as_bytes()))
            .map_err(|error| failed(&error, &what, within))?;
        loop {
            let mut message = self.message(&what, end, within)?;
            // An error before it has read the id has none.
            let mine = message.get("id").is_none_or(|known| *known == id);
            if let Some(error) = message.get("error").filter(|_| mine) {
                let word = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    class: word("class"),
                    description: word("desc"),
                });
            }
            if mine && let Some(value) = message.remove("return") {
                return Ok(value);
            }
            self.keep(message)?;
        }
    }

    /// Keeps an event until somebody waits for it.
    fn keep(&mut self, message: Map<String, Value>) -> Result<(), QmpError> {
        if !message.contains_key("event") {
            return Err(QmpError::Malformed(Value::Object(message).to_string()));
        }
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Value::Object(message));
        Ok(())
    }

    /// The next message.
    fn message(
        &mut self,
        what: &str,
        end: Instant,
        within: Duration,
    ) -> Result<Map<String, Value>, QmpError> {
        let line = self.line(what, end, within)?;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        self.note(format!("<- {text}"));
        match serde_json::from_str(text) {
            Ok(Value::Object(message)) => Ok(message),
            _ => Err(QmpError::Malformed(text.to_owned())),
        }
    }

    fn line(&mut self, what: &str, end: Instant, within: Duration) -> Result<Vec<u8>, QmpError> {
        let mut looked_at = 0;
        // A look at what is there already does not wait; whoever trickles gets no more time.
        let mut late = false;
        loop {
            let rest = self.buffer.get(looked_at..).unwrap_or_default();
            if let Some(place) = rest.iter().position(|&byte| byte == b'\n') {
                return Ok(self.buffer.drain(..=looked_at + place).collect());
            }
            looked_at = self.buffer.len();
            if looked_at > MAX_LINE {
                return Err(QmpError::Malformed("a line without an end".to_owned()));
            }
            if late {
                return Err(QmpError::Late { what: what.to_owned(), within });
            }
            late = Instant::now() >= end;
            // Zero would be for ever.
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let mut bytes = [0; 4096];
            let read = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut bytes));
            match read {
                Ok(0) => return Err(QmpError::Ended { what: what.to_owned() }),
                Ok(read) => self.buffer.extend_from_slice(bytes.get(..read).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(&error, what, within)),
            }
        }
    }

    fn note(&mut self, line: String) {
        if self.said.len() >= MAX_SAID {
            self.said.pop_front();
        }
        self.said.push_back(line);
    }
}

fn failed(error: &io::Error, what: &str, within: Duration) -> QmpError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            QmpError::Late { what: what.to_owned(), within }
        }
        _ => QmpError::Ended { what: format!("{what} ({error})") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    const LONG: Duration = Duration::from_secs(30);

    /// A QMP whose other end says these lines, one batch after each command.
    fn qmp(
        batches: &'static [&'static str],
    ) -> (Result<Qmp, QmpError>, std::thread::JoinHandle<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || {
            let mut commands = BufReader::new(theirs.try_clone().unwrap()).lines();
            theirs.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").unwrap();
            for batch in [&"{\"return\": {}, \"id\": 1}\r\n"].into_iter().chain(batches) {
                let Some(Ok(_)) = commands.next() else { return };
                theirs.write_all(batch.as_bytes()).unwrap();
            }
            // Silent, until the client goes.
            commands.for_each(drop);
        });
        (Qmp::new(ours), other)
    }

    #[test]
    fn answers_are_found_among_events_and_events_are_kept() {
        let (qmp, other) = qmp(&[
            "{\"event\": \"NEW_FANGLED\"}\n{\"return\": {\"running\": true}, \"id\": 2}\n{\"event\": \"STOP\"}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such device\"}, \"id\": 3}\n",
        ]);
        let qmp = qmp.unwrap();
        assert_eq!(qmp.execute("query-status", &json!({})).unwrap()["running"], true);
        let error = qmp.execute("device_del", &json!({ "id": "a" })).unwrap_err().to_string();
        assert_eq!(error, "QEMU refuses device_del: GenericError: no such device");
        assert_eq!(qmp.wait_for("STOP", LONG).unwrap()["event"], "STOP");
        assert_eq!(qmp.wait_for("NEW_FANGLED", LONG).unwrap()["event"], "NEW_FANGLED");
        let error = qmp.wait_for("STOP", Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, QmpError::Late { .. }), "{error}");
        let text = qmp.text();
        assert!(text.contains("device_del") && text.contains("<- {\"event\": \"STOP\"}"), "{text}");
        drop(qmp);
        other.join().unwrap();
    }

    #[test]
    fn a_command_without_an_answer_costs_the_connection() {
        let (qmp, other) = qmp(&[]);
        let qmp = qmp.unwrap();
        let late = qmp.execute_within("stop", &json!({}), Duration::from_millis(20)).unwrap_err();
        assert_eq!(late.to_string(), "QEMU has not sent an answer to stop within 20ms");
        let error = qmp.execute("cont", &json!({})).unwrap_err();
        assert!(matches!(error, QmpError::GivenUp(_)), "{error}");
        drop(qmp);
        other.join().unwrap();
    }

    #[test]
    fn what_is_no_qmp_is_refused_and_an_end_is_told() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"SSH-2.0\r\n").unwrap();
        assert!(matches!(Qmp::new(ours).unwrap_err(), QmpError::Malformed(_)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Qmp::new(ours).unwrap_err(), QmpError::Ended { .. }));
    }
}
