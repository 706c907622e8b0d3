use super::*;
use standstill_protocol::message::Refused;
use standstill_protocol::message::{Phase, Term};

#[test]
fn long_texts_are_cut_between_characters() {
    let refused = Refused {
        term: Term(1),
        epoch: Epoch(1),
        phase: Phase::Stop,
        state: MigrationState::Running,
        refusal: Refusal {
            kind: RefusalKind::Device,
            text: format!("x{}", "ä".repeat(MAX_TEXT)),
        },
    };
    let DeviceMessage::Refused(cut) = clipped(DeviceMessage::Refused(refused)) else {
        panic!("another message");
    };
    assert_eq!(cut.refusal.text.len(), MAX_TEXT - 1);
    assert!(cut.refusal.text.ends_with('ä'));
}
