use super::*;

const COUNTS: IrqCounts = IrqCounts { intx: 1, msi: 0, msix: 4 };

/// One request of the table: flags, index, start, count, data bytes, fds.
type Row = (u32, u32, u32, u32, usize, usize);

fn check((flags, index, start, count, data, fds): Row) -> Result<IrqRequest, IrqError> {
    validate(&SetIrqs { argsz: SET_IRQS_SIZE, flags, index, start, count }, data, fds, COUNTS)
}

#[test]
fn each_acceptable_request_means_what_the_specification_says() {
    use IrqOperation::*;
    use Selection::{All, ByData};
    let msix = IrqIndex::Msix;
    let rows: [(Row, IrqIndex, Range<u32>, IrqOperation); 15] = [
        ((DATA_NONE | ACTION_TRIGGER, 2, 0, 0, 0, 0), msix, 0..0, Disable),
        ((DATA_NONE | ACTION_TRIGGER, 0, 0, 0, 0, 0), IrqIndex::Intx, 0..0, Disable),
        ((DATA_NONE | ACTION_TRIGGER, 2, 1, 3, 0, 0), msix, 1..4, Fire(All)),
        ((DATA_BOOL | ACTION_TRIGGER, 2, 0, 4, 4, 0), msix, 0..4, Fire(ByData)),
        ((DATA_EVENTFD | ACTION_TRIGGER, 2, 0, 4, 0, 4), msix, 0..4, Install),
        ((DATA_EVENTFD | ACTION_TRIGGER, 2, 3, 1, 0, 1), msix, 3..4, Install),
        ((DATA_EVENTFD | ACTION_TRIGGER, 2, 0, 4, 0, 0), msix, 0..4, Remove),
        ((DATA_EVENTFD | ACTION_TRIGGER, 3, 0, 1, 0, 1), IrqIndex::Error, 0..1, Install),
        ((DATA_EVENTFD | ACTION_TRIGGER, 4, 0, 1, 0, 1), IrqIndex::Request, 0..1, Install),
        ((DATA_NONE | ACTION_TRIGGER, 3, 0, 1, 0, 0), IrqIndex::Error, 0..1, Fire(All)),
        ((DATA_NONE | ACTION_MASK, 0, 0, 1, 0, 0), IrqIndex::Intx, 0..1, Mask(All)),
        ((DATA_BOOL | ACTION_MASK, 2, 0, 2, 2, 0), msix, 0..2, Mask(ByData)),
        ((DATA_NONE | ACTION_UNMASK, 0, 0, 1, 0, 0), IrqIndex::Intx, 0..1, Unmask(All)),
        ((DATA_BOOL | ACTION_UNMASK, 2, 2, 2, 2, 0), msix, 2..4, Unmask(ByData)),
        ((DATA_NONE | ACTION_UNMASK, 2, 0, 4, 0, 0), msix, 0..4, Unmask(All)),
    ];
    for (row, index, range, operation) in rows {
        let request = check(row).expect("acceptable");
        assert_eq!(request, IrqRequest { index, range, operation }, "{row:?}");
    }
}

#[test]
fn each_unacceptable_request_is_refused_for_its_reason() {
    type IsReason = fn(&IrqError) -> bool;
    let bad_flags: IsReason = |error| matches!(error, IrqError::BadFlags { .. });
    let bad_range: IsReason = |error| matches!(error, IrqError::BadRange { .. });
    let no_index: IsReason = |error| matches!(error, IrqError::NoIndex { .. });
    let not_maskable: IsReason = |error| matches!(error, IrqError::NotMaskable { .. });
    let bad_disable: IsReason = |error| matches!(error, IrqError::BadDisable { .. });
    let bad_fds: IsReason = |error| matches!(error, IrqError::BadFds { .. });
    let bad_data: IsReason = |error| matches!(error, IrqError::BadData { .. });
    let rows: [(Row, IsReason); 32] = [
        ((0, 2, 0, 1, 0, 0), bad_flags),
        ((DATA_NONE, 2, 0, 1, 0, 0), bad_flags),
        ((ACTION_TRIGGER, 2, 0, 1, 0, 0), bad_flags),
        ((DATA_NONE | DATA_BOOL | ACTION_TRIGGER, 2, 0, 1, 1, 0), bad_flags),
        ((DATA_BITS | ACTION_TRIGGER, 2, 0, 1, 1, 1), bad_flags),
        ((DATA_NONE | ACTION_MASK | ACTION_UNMASK, 2, 0, 1, 0, 0), bad_flags),
        ((DATA_NONE | ACTION_BITS, 2, 0, 1, 0, 0), bad_flags),
        ((DATA_NONE | ACTION_TRIGGER | 1 << 6, 2, 0, 1, 0, 0), bad_flags),
        ((u32::MAX, 2, 0, 1, 0, 0), bad_flags),
        ((DATA_NONE | ACTION_TRIGGER, 5, 0, 1, 0, 0), no_index),
        ((DATA_NONE | ACTION_TRIGGER, u32::MAX, 0, 1, 0, 0), no_index),
        ((DATA_NONE | ACTION_TRIGGER, 1, 0, 1, 0, 0), bad_range),
        ((DATA_NONE | ACTION_TRIGGER, 1, 0, 0, 0, 0), bad_range),
        ((DATA_NONE | ACTION_TRIGGER, 2, 4, 1, 0, 0), bad_range),
        ((DATA_NONE | ACTION_TRIGGER, 2, 3, 2, 0, 0), bad_range),
        ((DATA_NONE | ACTION_TRIGGER, 2, 1, u32::MAX, 0, 0), bad_range),
        ((DATA_NONE | ACTION_TRIGGER, 2, u32::MAX, 1, 0, 0), bad_range),
        ((DATA_NONE | ACTION_TRIGGER, 0, 0, 2, 0, 0), bad_range),
        ((DATA_EVENTFD | ACTION_TRIGGER, 3, 0, 2, 0, 2), bad_range),
        ((DATA_EVENTFD | ACTION_TRIGGER, 4, 1, 1, 0, 1), bad_range),
        ((DATA_NONE | ACTION_MASK, 3, 0, 1, 0, 0), not_maskable),
        ((DATA_NONE | ACTION_UNMASK, 4, 0, 1, 0, 0), not_maskable),
        ((DATA_NONE | ACTION_TRIGGER, 2, 1, 0, 0, 0), bad_disable),
        ((DATA_NONE | ACTION_MASK, 2, 0, 0, 0, 0), bad_disable),
        ((DATA_BOOL | ACTION_TRIGGER, 2, 0, 0, 0, 0), bad_disable),
        ((DATA_EVENTFD | ACTION_TRIGGER, 2, 0, 0, 0, 0), bad_disable),
        ((DATA_NONE | ACTION_TRIGGER, 2, 0, 1, 0, 1), bad_fds),
        ((DATA_EVENTFD | ACTION_TRIGGER, 2, 0, 2, 0, 1), bad_fds),
        ((DATA_EVENTFD | ACTION_TRIGGER, 2, 0, 1, 0, 2), bad_fds),
        ((DATA_BOOL | ACTION_TRIGGER, 2, 0, 2, 1, 0), bad_data),
        ((DATA_BOOL | ACTION_TRIGGER, 2, 0, 2, 3, 0), bad_data),
        ((DATA_NONE | ACTION_TRIGGER, 2, 0, 2, 2, 0), bad_data),
    ];
    for (row, is_reason) in rows {
        let error = check(row).expect_err("not acceptable");
        assert!(is_reason(&error), "{row:?}: {error}");
        assert_eq!(error.errno(), Errno::EINVAL);
    }
}

#[test]
fn a_request_shorter_than_its_fixed_part_is_refused() {
    let flags = DATA_NONE | ACTION_TRIGGER;
    let request = SetIrqs { argsz: 19, flags, index: 2, start: 0, count: 0 };
    assert!(matches!(validate(&request, 0, 0, COUNTS), Err(IrqError::TooShort { argsz: 19 })));
}

#[test]
fn masking_by_eventfd_is_not_offered() {
    for action in [ACTION_MASK, ACTION_UNMASK] {
        let error = check((DATA_EVENTFD | action, 0, 0, 1, 0, 1)).expect_err("not offered");
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
    }
}
