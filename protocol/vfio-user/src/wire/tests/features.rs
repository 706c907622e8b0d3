//! `DEVICE_FEATURE`: what is refused, and the replies.

use super::*;
use crate::wire::feature::*;
use standstill_protocol::migration::{MigrationFlags, MigrationState};

fn decode(argsz: u32, flags: u32, data: &[u8]) -> Result<Feature, WireError> {
    let mut body = words(&[argsz, flags]);
    body.extend(data);
    Feature::decode(&body, LIMITS.max_message())
}

#[test]
fn operations_go_with_their_features() {
    let both = FEATURE_GET | FEATURE_SET;
    let data = long_words(&[4096, 0, 0, 0, 0]);
    for number in 0..20_u16 {
        let possible = operations(number);
        for operation in [0, FEATURE_GET, FEATURE_SET, both] {
            let flags = u32::from(number) | operation;
            let probe = decode(8, flags | FEATURE_PROBE, &[]);
            let known = possible != 0 && operation & !possible == 0;
            assert_eq!(probe.is_ok(), known, "probe of {flags:#x}: {probe:?}");
            if known {
                let feature = Feature::Probe { feature: number, operations: operation };
                assert_eq!(probe, Ok(feature));
            }
            // Without a probe one operation, and not two.
            let plain = decode(4096, flags, &data);
            if !known || operation == 0 || operation == both {
                let unknown = WireError::UnknownFeature { feature: number, flags };
                assert_eq!(plain, Err(unknown), "{flags:#x}");
            }
        }
    }
}

#[test]
fn flags_that_do_not_exist_are_refused() {
    for bit in 19..32 {
        let flags = u32::from(FEATURE_MIGRATION) | FEATURE_GET | 1 << bit;
        assert_eq!(decode(16, flags, &[]), Err(WireError::Flags { what: "DEVICE_FEATURE", flags }));
    }
}

#[test]
fn argsz_has_room_for_the_request_and_its_reply() {
    let state = words(&[1, 0]);
    let start = long_words(&[4096, 1, 0x1000, 0x1000]);
    let report = long_words(&[0, 65 * 4096, 4096]);
    for (number, operation, data, needed) in [
        (FEATURE_MIGRATION, FEATURE_GET, &[][..], 16),
        (FEATURE_MIG_DEVICE_STATE, FEATURE_GET, &[], 16),
        (FEATURE_MIG_DEVICE_STATE, FEATURE_SET, &state, 16),
        (FEATURE_DMA_LOGGING_START, FEATURE_SET, &start, 40),
        (FEATURE_DMA_LOGGING_STOP, FEATURE_SET, &[], 8),
        (FEATURE_DMA_LOGGING_REPORT, FEATURE_GET, &report, 8 + 24 + 16),
        (FEATURE_MIG_DATA_SIZE, FEATURE_GET, &[], 16),
    ] {
        let flags = u32::from(number) | operation;
        assert!(decode(needed, flags, data).is_ok(), "{number}");
        let short = decode(needed - 1, flags, data);
        assert!(matches!(short, Err(WireError::Argsz { .. })), "{number}: {short:?}");
    }
}

#[test]
fn only_states_that_a_client_can_ask_for_are_set() {
    let flags = u32::from(FEATURE_MIG_DEVICE_STATE) | FEATURE_SET;
    for value in 0..=9 {
        let set = decode(16, flags, &words(&[value, 0]));
        match MigrationState::from_value(value) {
            None | Some(MigrationState::Error) => {
                let field = WireError::Field {
                    what: "DEVICE_FEATURE",
                    field: "state",
                    value: value.into(),
                };
                assert_eq!(set, Err(field));
            }
            Some(state) => assert_eq!(set, Ok(Feature::SetState(state))),
        }
    }
    // A body that ends before the state, or within it.
    for size in 0..8 {
        let set = decode(16, flags, &[0; 8][..size]);
        assert!(matches!(set, Err(WireError::Short { .. })), "{size}: {set:?}");
    }
}

#[test]
fn logging_needs_pages_and_ranges_that_can_be() {
    let flags = u32::from(FEATURE_DMA_LOGGING_START) | FEATURE_SET;
    let start = |page_size, count: u64, ranges: &[u64]| {
        let mut data = long_words(&[page_size, count]);
        data.extend(long_words(ranges));
        decode(4096, flags, &data)
    };
    // No range at all means everything.
    assert!(start(4096, 0, &[]).is_ok());
    assert!(start(4096, 1, &[0, 4096]).is_ok());
    assert!(matches!(start(0, 0, &[]), Err(WireError::Field { .. })));
    assert!(matches!(start(4095, 0, &[]), Err(WireError::Field { .. })));
    assert!(matches!(start(4096, 1, &[0, 0]), Err(WireError::Range { .. })));
    assert!(matches!(start(4096, 1, &[u64::MAX, 2]), Err(WireError::Range { .. })));
    assert!(matches!(start(4096, 2, &[0, 4096]), Err(WireError::Short { .. })));
    assert!(matches!(start(4096, u32::MAX.into(), &[0, 4096]), Err(WireError::Short { .. })));
}

#[test]
fn a_stop_with_the_body_of_a_start_is_taken() {
    let flags = u32::from(FEATURE_DMA_LOGGING_STOP) | FEATURE_SET;
    assert_eq!(decode(24, flags, &long_words(&[4096, 0])), Ok(Feature::StopLogging));
}

#[test]
fn a_report_is_about_pages_that_can_be_and_no_longer_than_a_message() {
    let flags = u32::from(FEATURE_DMA_LOGGING_REPORT) | FEATURE_GET;
    let report =
        |iova, length, page_size| decode(u32::MAX, flags, &long_words(&[iova, length, page_size]));
    for shift in 0..64 {
        assert!(report(0, 1 << shift, 1 << shift).is_ok());
    }
    for page_size in [0, 3, 4095, u64::MAX] {
        assert!(matches!(report(0, 4096, page_size), Err(WireError::Field { .. })));
    }
    assert!(matches!(report(0, 0, 4096), Err(WireError::Range { .. })));
    assert!(matches!(report(1, u64::MAX, 4096), Err(WireError::Argsz { .. })));
    assert!(matches!(report(2, u64::MAX, 4096), Err(WireError::Range { .. })));
    assert!(matches!(report(0, u64::MAX, 1), Err(WireError::Argsz { .. })));
    assert!(matches!(report(0, 1 << 40, 4096), Err(WireError::TooLong { .. })));
}

#[test]
fn replies() {
    for state in MigrationState::ALL {
        let body = bytes(|out| encode_state(state, out));
        assert_eq!(decode_state_reply(&body), Ok(state));
        assert!(decode_state_reply(&body[..15]).is_err());
    }
    for flags in [1, 3, 5, 7].map(|flags| MigrationFlags::new(flags).expect("legal")) {
        let body = bytes(|out| encode_flags(flags, out));
        assert_eq!(decode_flags_reply(&body), Ok(flags));
    }
    for flags in [0, 2, 4, 6, 8, u64::MAX] {
        let mut body = words(&[16, 1]);
        body.extend(long_words(&[flags]));
        assert!(matches!(decode_flags_reply(&body), Err(WireError::Field { .. })));
    }
    let mut body = words(&[16, 2, 8, 0]);
    assert!(matches!(decode_state_reply(&body), Err(WireError::Field { .. })));
    body.truncate(8);
    assert!(matches!(decode_data_size_reply(&body), Err(WireError::Short { .. })));
    let body = bytes(|out| encode_data_size(u64::MAX, out));
    assert_eq!(decode_data_size_reply(&body), Ok(u64::MAX));
    let start = LoggingStart { page_size: 8192, ranges: vec![(0, 8192)] };
    assert_eq!(LoggingStart::decode_reply(&bytes(|out| start.encode(out))), Ok(8192));
    let start = LoggingStart { page_size: 8191, ..start };
    assert!(LoggingStart::decode_reply(&bytes(|out| start.encode(out))).is_err());
}

#[test]
fn a_report_that_answers_another_question_is_refused() {
    let report = LoggingReport { iova: 0x1000, length: 0x3000, page_size: 0x1000 };
    let mut body = bytes(|out| report.encode(out));
    body.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(report.decode_reply(&body), Ok(&[5, 0, 0, 0, 0, 0, 0, 0][..]));
    assert!(matches!(report.decode_reply(&body[..39]), Err(WireError::DataLength { .. })));
    for other in [
        LoggingReport { iova: 0x2000, ..report },
        LoggingReport { length: 0x2000, ..report },
        LoggingReport { page_size: 0x2000, ..report },
    ] {
        assert!(matches!(other.decode_reply(&body), Err(WireError::Field { .. })));
    }
}
