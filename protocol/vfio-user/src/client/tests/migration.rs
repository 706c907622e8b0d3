//! States, streams, dirty pages.

use super::*;
use crate::wire::feature::{
    FEATURE_MIG_DEVICE_STATE, FEATURE_PROBE, FEATURE_SET, encode_data_size, encode_flags,
    encode_state,
};
use crate::wire::{Feature, LoggingStart, MigData};
use proptest::prelude::*;
use standstill_protocol::migration::{MigrationFlags, MigrationState};

const LIMIT: u32 = 1 << 20;

impl Peer {
    fn expect_feature(&mut self) -> (Header, Feature, Vec<u8>) {
        let (header, body, _) = self.expect(Command::DeviceFeature);
        (header, Feature::decode(&body, u32::MAX).expect("a feature"), body)
    }

    /// Hears a question for a feature and answers with what `encode` appends.
    fn serve_feature(&mut self, expected: &Feature, encode: impl FnOnce(&mut Vec<u8>)) {
        let (header, feature, _) = self.expect_feature();
        assert_eq!(&feature, expected);
        let mut answer = Vec::new();
        encode(&mut answer);
        self.answer(&header, &answer);
    }
}

#[test]
fn flags_states_and_sizes_are_asked_for() {
    let script = |peer: &mut Peer| {
        peer.serve_feature(&Feature::GetMigration, |out| encode_flags(MigrationFlags::ALL, out));
        peer.serve_feature(&Feature::GetState, |out| encode_state(MigrationState::PreCopyP2p, out));
        peer.serve_feature(&Feature::GetDataSize, |out| encode_data_size(77, out));
        let (header, feature, body) = peer.expect_feature();
        assert_eq!(feature, Feature::SetState(MigrationState::StopCopy));
        peer.answer(&header, &body);
        for yes in [true, false] {
            let (header, feature, body) = peer.expect_feature();
            let (operations, number) = (FEATURE_SET, FEATURE_MIG_DEVICE_STATE);
            assert_eq!(feature, Feature::Probe { feature: number, operations });
            assert_eq!(body, words(&[8, u32::from(number) | FEATURE_SET | FEATURE_PROBE]));
            if yes {
                peer.answer(&header, &body);
            } else {
                peer.refuse(&header, 22, &[]);
            }
        }
    };
    session(script, |client| {
        assert_eq!(client.migration_flags().expect("flags"), MigrationFlags::ALL);
        assert_eq!(client.migration_state().expect("a state"), MigrationState::PreCopyP2p);
        assert_eq!(client.state_size().expect("a size"), 77);
        client.set_migration_state(MigrationState::StopCopy).expect("set");
        for yes in [true, false] {
            let probe = client.probe(FEATURE_MIG_DEVICE_STATE, FEATURE_SET);
            assert_eq!(probe.expect("an answer"), yes);
        }
    });
}

/// libvfio-user sends the request back with its refusal.
#[test]
fn after_a_state_that_was_not_reached_the_device_is_asked() {
    let script = |peer: &mut Peer| {
        let (header, _, body) = peer.expect_feature();
        peer.refuse(&header, 22, &body);
        peer.serve_feature(&Feature::GetState, |out| encode_state(MigrationState::Error, out));
        let (header, _, _) = peer.expect_feature();
        peer.refuse(&header, 0, &[]);
        let (header, _, _) = peer.expect_feature();
        peer.refuse(&header, 5, &[]);
    };
    session(script, |client| {
        let error = client.set_migration_state(MigrationState::Stop).expect_err("refused");
        assert_eq!(error.source.errno(), Some(Errno::EINVAL));
        assert_eq!(error.now.expect("asked"), MigrationState::Error);
        let error = client.set_migration_state(MigrationState::Stop).expect_err("refused");
        assert_eq!(error.now.expect_err("not even that").errno(), Some(Errno::EIO));
    });
}

/// Serves the device's state, `step` bytes at a time, until it has said that there is no more.
fn serve_state(peer: &mut Peer, state: &[u8], pad: bool) {
    let mut left = state;
    loop {
        let (header, body, _) = peer.expect(Command::MigDataRead);
        let asked = MigData::decode_read(&body, LIMIT).expect("a question").size;
        let count = left.len().min(usize::try_from(asked).expect("small"));
        let mut answer = Vec::new();
        MigData::encode_reply(&left[..count], asked, pad, &mut answer);
        peer.answer(&header, &answer);
        left = &left[count..];
        if count < usize::try_from(asked).expect("small") {
            break;
        }
    }
}

fn state_of(size: usize) -> Vec<u8> {
    (0..=255).cycle().take(size).collect()
}

#[test]
fn a_state_is_read_to_its_end_padded_or_not() {
    let transfer = usize::try_from(LIMIT).expect("small");
    for size in [0, 1, transfer - 1, transfer, transfer + 1, 3 * transfer] {
        for pad in [false, true] {
            let state = state_of(size);
            let read = session(
                |peer| serve_state(peer, &state, pad),
                |client| {
                    let mut read = Vec::new();
                    let count = client.read_state(&mut read, u64::MAX).expect("read");
                    assert_eq!(count, size as u64);
                    read
                },
            );
            assert!(read == state, "{size} bytes, padded {pad}");
        }
    }
}

#[test]
fn a_state_without_end_is_read_up_to_its_limit() {
    let script = |peer: &mut Peer| {
        while let Ok(message) = peer.receiver.receive(Peer::deadline()) {
            let header = message.header;
            let mut answer = Vec::new();
            MigData::encode_reply(&state_of(1 << 20), LIMIT, false, &mut answer);
            let sent = peer.sender.send(&header.reply(), &answer, &[], Peer::deadline(), |_| ());
            if sent.is_err() {
                break;
            }
        }
    };
    session(script, |client| {
        let error = client.read_state(&mut std::io::sink(), 5 << 20).expect_err("no end");
        assert!(matches!(error, StateStreamError::TooLong { limit }  if limit == 5 << 20));
    });
}

#[test]
fn a_stream_that_fails_says_where() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(Errno::ENOSPC.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let script = |peer: &mut Peer| {
        serve_state(peer, &state_of(10), false);
        let (header, _, _) = peer.expect(Command::MigDataRead);
        peer.refuse(&header, 22, &[]);
        let (header, _, _) = peer.expect(Command::MigDataRead);
        // More than was asked for.
        peer.answer(&header, &words(&[u32::MAX, LIMIT + 1]));
        let (header, _, _) = peer.expect(Command::MigDataWrite);
        peer.refuse(&header, 28, &[]);
    };
    session(script, |client| {
        let full = client.read_state(&mut Full, u64::MAX).expect_err("full");
        assert!(matches!(full, StateStreamError::Io { done: 10, .. }), "{full:?}");
        let refused = client.read_state(&mut Vec::new(), u64::MAX).expect_err("refused");
        assert!(matches!(refused, StateStreamError::Client { done: 0, .. }), "{refused:?}");
        let wrong = client.read_state(&mut Vec::new(), u64::MAX).expect_err("too much");
        let StateStreamError::Client { source: ClientError::Reply { .. }, .. } = wrong else {
            panic!("{wrong:?}");
        };
        let refused = client.write_state(&mut &[1, 2, 3][..]).expect_err("refused");
        assert!(matches!(refused, StateStreamError::Client { done: 3, .. }), "{refused:?}");
    });
}

#[test]
fn a_state_is_written_to_its_end() {
    for size in [0, 1, 1 << 20, (2 << 20) + 7] {
        let state = state_of(size);
        let (arrived, arrives) = mpsc::channel();
        let script = move |peer: &mut Peer| {
            while let Ok(message) = peer.receiver.receive(Peer::deadline()) {
                let data = MigData::decode_data(message.body, LIMIT).expect("data");
                arrived.send(data.to_vec()).expect("heard");
                let reply = message.header.reply();
                peer.sender.send(&reply, &[], &[], Peer::deadline(), |_| ()).expect("sent");
            }
        };
        session(script, |client| {
            let count = client.write_state(&mut &state[..]).expect("written");
            assert_eq!(count, size as u64);
        });
        assert!(arrives.iter().flatten().eq(state));
    }
}

#[test]
fn the_dirty_log_starts_with_the_page_size_of_the_server_and_stops() {
    let ranges = [(0x1000, 0x2000), (0x8000, 0x1000)];
    let script = |peer: &mut Peer| {
        let start = LoggingStart { page_size: 0x1000, ranges: ranges.to_vec() };
        peer.serve_feature(&Feature::StartLogging(start.clone()), |out| {
            LoggingStart { page_size: 0x2000, ..start }.encode(out);
        });
        let (header, feature, body) = peer.expect_feature();
        assert_eq!(feature, Feature::StopLogging);
        peer.answer(&header, &body);
    };
    session(script, |client| {
        assert_eq!(client.start_dirty_log(0x1000, &ranges).expect("started"), 0x2000);
        client.stop_dirty_log().expect("stopped");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// Of a range that takes several reports, too.
    #[test]
    fn dirty_pages_are_those_that_the_server_says(
        pages in prop_oneof![1..200_u64, 8_000_000..20_000_000_u64],
        marks in prop::collection::vec(any::<prop::sample::Index>(), 0..50),
        iova in (0..1_u64 << 40).prop_map(|page| page << 12),
    ) {
        let pages_of = usize::try_from(pages).expect("small");
        let marks: std::collections::BTreeSet<u64> =
            marks.iter().map(|mark| mark.index(pages_of) as u64).collect();
        let script = |peer: &mut Peer| {
            let mut at = iova;
            while at < iova + pages * 4096 {
                let (header, feature, _) = peer.expect_feature();
                let Feature::Report(report) = feature else { panic!("{feature:?}") };
                assert_eq!((report.iova, report.page_size), (at, 4096));
                let mut bits = vec![0; usize::try_from(report.bitmap_size()).expect("small")];
                for page in marks.iter().filter_map(|mark| (iova + mark * 4096).checked_sub(at)) {
                    let page = usize::try_from(page / 4096).expect("small");
                    if let Some(byte) = bits.get_mut(page / 8).filter(|_| page as u64 * 4096 < report.length) {
                        *byte |= 1 << (page % 8);
                    }
                }
                let mut answer = Vec::new();
                report.encode(&mut answer);
                answer.extend(bits);
                peer.answer(&header, &answer);
                at += report.length;
            }
        };
        session(script, |client| {
            let dirty = client.dirty_pages(iova, pages * 4096, 4096).expect("pages");
            assert_eq!(dirty.pages(), pages);
            let expected: Vec<_> = marks.iter().map(|mark| iova + mark * 4096).collect();
            assert_eq!(dirty.dirty().collect::<Vec<_>>(), expected);
        });
    }
}

#[test]
fn questions_that_cannot_be_are_not_sent() {
    session(Peer::expect_end, |client| {
        for (iova, size, page_size) in
            [(0, 0, 4096), (0, 4096, 0), (0, 4096, 4095), (u64::MAX, 2, 1)]
        {
            let pages = client.dirty_pages(iova, size, page_size);
            assert!(matches!(pages, Err(ClientError::Request { .. })), "{pages:?}");
            let pages = client.dma_unmap_dirty(iova, size, page_size);
            assert!(matches!(pages, Err(ClientError::Request { .. })), "{pages:?}");
        }
        let pages = client.dma_unmap_dirty(0, 1 << 40, 4096);
        assert!(matches!(pages, Err(ClientError::Request { .. })), "{pages:?}");
    });
}

#[test]
fn an_unmap_tells_the_dirty_pages() {
    use crate::wire::{DmaUnmap, Unmap};
    let script = |peer: &mut Peer| {
        for bits in [8, 9] {
            let (header, body, _) = peer.expect(Command::DmaUnmap);
            let unmap = DmaUnmap::decode(&body, LIMIT).expect("a request");
            let what =
                Unmap::Bitmap { iova: 0x1000, size: 0x3000, page_size: 0x1000, bitmap_size: 8 };
            assert_eq!(unmap, DmaUnmap { argsz: 48, what });
            peer.answer(&header, &[body, vec![5; bits]].concat());
        }
    };
    session(script, |client| {
        let dirty = client.dma_unmap_dirty(0x1000, 0x3000, 0x1000).expect("pages");
        assert_eq!(dirty.dirty().collect::<Vec<_>>(), [0x1000, 0x3000]);
        let wrong = client.dma_unmap_dirty(0x1000, 0x3000, 0x1000);
        assert!(matches!(wrong, Err(ClientError::Reply { .. })), "{wrong:?}");
    });
}
