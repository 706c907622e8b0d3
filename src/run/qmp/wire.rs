//! The bytes of QMP: a line of JSON for each message. Whatever comes, it takes no more than a bounded
//! amount of memory and is a message or the end of the connection.

use qapi::Execute;
use qapi::qmp::QmpCommand;
use serde::Deserialize;
use serde_json::Value;
use std::io;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest line, in bytes. What is asked here has answers of some hundred.
pub(super) const MAX_LINE: usize = 256 << 10;
/// How much is read at once, in bytes.
const READ: usize = 4096;
/// How much of a line is shown that is no QMP, in characters.
const SHOWN: usize = 80;

/// Why nothing more comes.
#[derive(Debug, Error)]
pub(super) enum WireError {
    /// QEMU has ended, or has closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// The connection is broken.
    #[error("the connection is broken: {0}")]
    Io(#[from] io::Error),
    /// A line without an end.
    #[error("it sends a line of more than {MAX_LINE} bytes, which is no QMP")]
    TooLong,
    /// A line that is no message.
    #[error("it sends no QMP: {0}")]
    Malformed(String),
}

/// A message of QEMU: each field may be there, and others are nobody's business.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Message {
    /// The greeting.
    #[serde(rename = "QMP")]
    pub(super) greeting: Option<Value>,
    /// The name of an event.
    pub(super) event: Option<String>,
    /// The data of that event.
    #[serde(default)]
    pub(super) data: Value,
    /// The number of the command that this answers.
    #[serde(default)]
    pub(super) id: Value,
    /// What the command returns.
    #[serde(rename = "return")]
    pub(super) value: Option<Value>,
    /// Why the command was not executed.
    pub(super) error: Option<Refusal>,
}

/// Why QEMU does not execute a command.
#[derive(Debug, Deserialize, Error)]
#[error("{class}: {desc}")]
pub(super) struct Refusal {
    /// Such as `GenericError`.
    class: String,
    /// For people.
    desc: String,
}

/// Takes what comes apart into messages.
#[derive(Debug)]
pub(super) struct Reader<R> {
    from: R,
    buffer: Vec<u8>,
    /// How much of the buffer has no end of a line in it.
    looked_at: usize,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, buffer: Vec::new(), looked_at: 0 }
    }

    /// The next message. Nothing is lost if this is dropped before it has come.
    pub(super) async fn next(&mut self) -> Result<Message, WireError> {
        loop {
            let rest = self.buffer.get(self.looked_at..).unwrap_or_default();
            if let Some(place) = rest.iter().position(|&byte| byte == b'\n') {
                let end = self.looked_at + place;
                if end > MAX_LINE {
                    return Err(WireError::TooLong);
                }
                let message = parse(self.buffer.get(..end).unwrap_or_default());
                self.buffer.drain(..=end);
                self.looked_at = 0;
                return message;
            }
            self.looked_at = self.buffer.len();
            if self.looked_at > MAX_LINE {
                return Err(WireError::TooLong);
            }
            self.buffer.reserve(READ);
            if self.from.read_buf(&mut self.buffer).await? == 0 {
                return Err(WireError::Closed);
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Message, WireError> {
    serde_json::from_slice(line).map_err(|_| {
        let text: String = String::from_utf8_lossy(line).chars().take(SHOWN).collect();
        WireError::Malformed(format!("{text:?}"))
    })
}

/// A command with its number, as a line.
pub(super) fn line<C: QmpCommand>(command: C, id: u64) -> Vec<u8> {
    // Only maps with keys that are no text cannot be written, and there are none.
    let mut line = serde_json::to_vec(&Execute::with_id(command, id)).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(bytes: &[u8]) -> (Vec<Message>, WireError) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut reader = Reader::new(bytes);
            let mut messages = Vec::new();
            loop {
                match reader.next().await {
                    Ok(message) => messages.push(message),
                    Err(error) => return (messages, error),
                }
            }
        })
    }

    #[test]
    fn messages_are_told_apart_also_those_that_nobody_knew() {
        let (messages, end) = all(b"{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n\
              {\"event\": \"NEW_FANGLED\", \"data\": {\"a\": [1]}, \"extra\": 1}\r\n\
              {\"return\": {}, \"id\": 7}\n\
              {\"error\": {\"class\": \"NewFangled\", \"desc\": \"no\"}, \"id\": \"x\"}\n{\"half");
        assert!(messages[0].greeting.is_some());
        assert_eq!(messages[1].event.as_deref(), Some("NEW_FANGLED"));
        assert_eq!((messages[2].id.as_u64(), messages[2].value.is_some()), (Some(7), true));
        assert_eq!(messages[3].error.as_ref().unwrap().to_string(), "NewFangled: no");
        assert_eq!(messages.len(), 4);
        assert!(matches!(end, WireError::Closed), "{end}");
    }

    #[test]
    fn a_line_has_a_longest_length_with_and_without_its_end() {
        let mut line = vec![b' '; MAX_LINE - 2];
        line.extend(b"{}\n");
        assert_eq!(all(&line).0.len(), 1);
        line.insert(0, b' ');
        assert!(matches!(all(&line), (messages, WireError::TooLong) if messages.is_empty()));
        let endless = vec![b'['; 4 * MAX_LINE];
        assert!(matches!(all(&endless).1, WireError::TooLong));
    }

    #[test]
    fn what_is_no_qmp_is_shown_in_part_and_moves_no_cursor() {
        let bytes = [b"\x1b[31m".repeat(1000), b"\n".to_vec()].concat();
        let error = all(&bytes).1.to_string();
        assert!(error.starts_with("it sends no QMP: \"\\u{1b}[31m"), "{error}");
        assert!(error.len() < 1000);
    }

    #[test]
    fn a_command_is_a_line_with_its_number() {
        let line = line(qapi::qmp::query_status {}, 9);
        let value: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(
            value,
            serde_json::json!({ "execute": "query-status", "arguments": {}, "id": 9 })
        );
        assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = all(&bytes);
        }
    }
}
