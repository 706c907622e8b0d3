//! What device processes say for people. It is shown in terminals and logs, and a hostile device must
//! not write there whatever it likes: no line of its own, no colour, no cursor movement. Nor does it get
//! more room for escapes than for letters.

use crate::logs::clean;
use standstill_protocol::message::{DeviceEvent, Hello, MAX_TEXT, Refused};

/// The greeting with texts that can be shown.
pub(crate) fn hello(hello: Hello) -> Hello {
    let (kind, program_version) = (clean(&hello.kind), clean(&hello.program_version));
    Hello { kind, program_version, ..hello }
}

/// The refusal with a text that can be shown.
pub(crate) fn refused(mut refused: Refused) -> Refused {
    refused.refusal.text = short(&refused.refusal.text);
    refused
}

/// The event with a text that can be shown.
pub(crate) fn event(event: DeviceEvent) -> DeviceEvent {
    match event {
        DeviceEvent::Failed(why) => DeviceEvent::Failed(short(&why)),
        event => event,
    }
}

/// The text as it can be shown, and no longer than it may be where it travels.
fn short(text: &str) -> String {
    let mut text = clean(text);
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text.truncate(end.unwrap_or(0));
    // It may have had room for much more.
    text.shrink_to_fit();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_make_a_text_no_longer_than_letters_do() {
        let DeviceEvent::Failed(text) = event(DeviceEvent::Failed("\u{1b}".repeat(MAX_TEXT)))
        else {
            panic!("another event");
        };
        assert!(text.len() <= MAX_TEXT && text.starts_with("\\u{1b}\\u{1b}"), "{text}");
        let whole = "ä".repeat(MAX_TEXT / 2);
        assert_eq!(event(DeviceEvent::Failed(whole.clone())), DeviceEvent::Failed(whole));
    }
}
