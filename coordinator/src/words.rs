//! What device processes say for people. It is shown in terminals and logs, and a hostile device must
//! not write there whatever it likes: no line of its own, no colour, no cursor movement.

use crate::logs::clean;
use standstill_protocol::message::{DeviceEvent, Hello, Refused};

/// The greeting with texts that can be shown.
pub(crate) fn hello(hello: Hello) -> Hello {
    let (kind, program_version) = (clean(&hello.kind), clean(&hello.program_version));
    Hello { kind, program_version, ..hello }
}

/// The refusal with a text that can be shown.
pub(crate) fn refused(mut refused: Refused) -> Refused {
    refused.refusal.text = clean(&refused.refusal.text);
    refused
}

/// The event with a text that can be shown.
pub(crate) fn event(event: DeviceEvent) -> DeviceEvent {
    match event {
        DeviceEvent::Failed(why) => DeviceEvent::Failed(clean(&why)),
        event => event,
    }
}
