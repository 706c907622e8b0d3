//! From bytes to lines, and from a line to something that may stand in our log.

use super::MAX_LINE;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::fmt::{self, Write as _};
use tracing::Level;

/// Cuts a stream of bytes into lines of at most [`MAX_LINE`] bytes.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
    /// True if more of it came than was kept.
    cut: bool,
}

impl Splitter {
    /// Hands out each line that ends in these bytes, without its end, and whether it was cut. Empty
    /// lines are left out.
    pub(super) fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8], bool)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            let kept = text.len().min(MAX_LINE - self.line.len());
            self.line.extend_from_slice(&text[..kept]);
            self.cut |= kept < text.len();
            if ended {
                self.finish(&mut each);
            }
        }
    }

    /// Hands out the line whose end has not come.
    pub(super) fn finish(&mut self, mut each: impl FnMut(&[u8], bool)) {
        let line = self.line.strip_suffix(b"\r").unwrap_or(&self.line);
        if !line.is_empty() {
            each(line, self.cut);
        }
        self.line.clear();
        self.cut = false;
    }
}

/// A line in a form that may stand in our log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rendered {
    pub(super) level: Level,
    /// The target of a JSON line.
    pub(super) target: Option<String>,
    /// The term and the epoch that the device knew, if it says so.
    pub(super) term: Option<u64>,
    pub(super) epoch: Option<u64>,
    /// The message with its fields, or the whole line.
    pub(super) text: String,
}

/// An event as `tracing-subscriber` writes it, as far as it concerns us; a device process of our
/// runtime adds what it knew.
#[derive(Deserialize)]
struct JsonLine {
    level: String,
    #[serde(default)]
    target: String,
    #[serde(default)]
    term: Option<u64>,
    #[serde(default)]
    epoch: Option<u64>,
    fields: Map<String, Value>,
}

impl Rendered {
    pub(super) fn new(line: &[u8]) -> Self {
        Self::from_json(line).unwrap_or_else(|| Self {
            level: Level::WARN,
            target: None,
            term: None,
            epoch: None,
            text: clean(&String::from_utf8_lossy(line)),
        })
    }

    fn from_json(line: &[u8]) -> Option<Self> {
        if line.first() != Some(&b'{') {
            return None;
        }
        let JsonLine { level, target, term, epoch, fields } = serde_json::from_slice(line).ok()?;
        let level = level.parse().ok()?;
        let mut text = match fields.get("message") {
            Some(Value::String(message)) => message.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        };
        // What begins with `log.` says where the line came from, and is not for an operator.
        let told = |key: &str| key != "message" && !key.starts_with("log.");
        for (key, value) in fields.iter().filter(|(key, _)| told(key)) {
            let space = if text.is_empty() { "" } else { " " };
            // Writing to a String cannot fail. JSON's quotes keep a value from looking like a field.
            let _ = write!(text, "{space}{key}={value}");
        }
        let (target, text) = (Some(clean(&target)), clean(&text));
        Some(Self { level, target, term, epoch, text })
    }
}

impl fmt::Display for Rendered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Some(target) => write!(f, "{} {target}: {}", self.level, self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// The text with escapes in place of characters that move the cursor, change the colour, end the
/// line or turn the direction of writing; at most [`MAX_LINE`] bytes of it.
pub(crate) fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(MAX_LINE));
    for character in text.chars() {
        let before = clean.len();
        if character != '\t' && (character.is_control() || turns_text(character)) {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
        if clean.len() > MAX_LINE {
            clean.truncate(before);
            break;
        }
    }
    clean
}

/// Line and paragraph separator, and the characters that change the direction of text.
fn turns_text(character: char) -> bool {
    matches!(
        character,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    )
}
