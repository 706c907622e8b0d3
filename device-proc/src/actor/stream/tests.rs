use super::super::parts::Parts;
use super::apart::{Apart, Kept};
use super::format::{DIGEST, HEADER, Header, MORE, OPTIONAL, PIECE, PREAMBLE, Tag};
use super::*;
use crate::actor::scripted::{Scripted, info, parts, put_together};
use crate::device::{Bar, DeviceInfo, Pass};
use crate::interrupt::Latched;
use proptest::prelude::*;
use standstill_protocol::migration::MigrationFlags;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

mod golden;

/// Three whole pieces and one of a page.
const MEMORY: u64 = 256 << 10;

fn memory(size: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file.into()
}

/// A device with two vectors and memory behind BAR 2, and state of its own.
fn with_memory(contents: &[u8], change: impl FnOnce(&mut DeviceInfo)) -> Arc<Parts<Scripted>> {
    let device = Scripted { contents: Mutex::new(contents.to_vec()), ..Scripted::default() };
    let mut info =
        info().bar(2, Bar::memory(MEMORY, memory(MEMORY))).msix_vectors(2).msi_vectors(4);
    change(&mut info);
    put_together(device, info)
}

fn poke(parts: &Parts<Scripted>, at: u64, bytes: &[u8]) {
    rustix::io::pwrite(parts.bar_memory[2].as_ref().unwrap(), bytes, at).unwrap();
}

fn peek(parts: &Parts<Scripted>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(MEMORY).unwrap()];
    rustix::io::pread(parts.bar_memory[2].as_ref().unwrap(), &mut *bytes, 0).unwrap();
    bytes
}

fn saved_of(parts: &Parts<Scripted>) -> Vec<u8> {
    let mut to = Kept::default();
    Saver::new(parts).finish(parts, &mut to).unwrap();
    to.0
}

fn saved() -> Vec<u8> {
    let parts = parts(&[]);
    parts.interrupts.restore(&Latched { intx: true, ..Latched::default() }).unwrap();
    parts.config().write(4, &[6]).unwrap();
    saved_of(&parts)
}

fn refusal(bytes: &[u8]) -> StreamError {
    load(&*parts(&[]), bytes).unwrap_err()
}

#[test]
fn what_was_saved_is_taken_over_and_no_byte_more() {
    let mut stream = saved();
    stream.extend(b"the next device's");
    let mut from = stream.as_slice();
    let parts = parts(&[]);
    load(&parts, &mut from).unwrap();
    assert_eq!(from, b"the next device's");
    assert!(parts.interrupts.latched().intx);
    assert_eq!(parts.config().bytes()[4], 6);
}

#[test]
fn a_device_with_everything_goes_on_elsewhere() {
    let contents: Vec<u8> = (0..150_000_u32).flat_map(u32::to_le_bytes).collect();
    let source = with_memory(&contents, |_| {});
    poke(&source, 65536 * 3 + 17, b"memory");
    source.msix()[3] = 9;
    source
        .interrupts
        .restore(&Latched { msix: vec![1], msi: vec![3], ..Latched::default() })
        .unwrap();
    let stream = saved_of(&source);
    let target = with_memory(&vec![0; contents.len()], |_| {});
    load(&target, stream.as_slice()).unwrap();
    assert_eq!(peek(&target), peek(&source));
    assert_eq!(target.interrupts.latched().msi, [3]);
    assert_eq!(*target.device.contents.lock().unwrap(), contents);
    assert_eq!(target.msix()[3], 9);
    assert_eq!(target.interrupts.latched().msix, [1]);
}

#[test]
fn every_truncation_is_refused() {
    let state = saved();
    for length in 0..state.len() {
        let error = refusal(&state[..length]);
        assert!(matches!(error, StreamError::Short), "{length} bytes: {error}");
    }
}

#[test]
fn only_what_has_changed_is_sent_again() {
    let source = with_memory(b"state", |_| {});
    let mut stream = Kept::default();
    let mut saver = Saver::new(&source);
    assert_eq!(saver.progress().unsent(), MEMORY);
    saver.pre_copy(&source, &mut stream).unwrap();
    assert_eq!((saver.progress().unsent(), saver.progress().changed()), (0, 0));
    let first = stream.0.len();
    assert!(first > usize::try_from(MEMORY).unwrap());
    saver.pre_copy(&source, &mut stream).unwrap();
    assert_eq!(stream.0.len(), first, "nothing has changed");

    poke(&source, 65536, &[1]);
    saver.pre_copy(&source, &mut stream).unwrap();
    assert_eq!(stream.0.len(), first + HEADER + PIECE + DIGEST);
    assert_eq!(saver.progress().changed(), 65536);
    poke(&source, MEMORY - 1, &[2]);
    // There and back again is no change.
    poke(&source, 0, &[3]);
    poke(&source, 0, &[0]);
    saver.finish(&source, &mut stream).unwrap();
    let memory = Tag::memory(2);
    let sent = Apart::of(&stream.0).records;
    let sent: Vec<_> = sent.iter().filter(|(header, _)| header.tag == memory).collect();
    let at: Vec<_> = sent.iter().map(|(header, _)| header.at).collect();
    assert_eq!(at, [0, 65536, 131_072, 196_608, 65536, 196_608]);

    let target = with_memory(b"     ", |_| {});
    poke(&target, 5, b"what was there before");
    load(&target, stream.0.as_slice()).unwrap();
    assert_eq!(peek(&target), peek(&source));
    assert_eq!(*target.device.contents.lock().unwrap(), b"state");
}

#[test]
fn who_waits_while_nothing_has_changed_is_given_padding() {
    /// Wants to have this many bytes.
    struct Hungry(Kept, usize);
    impl Write for Hungry {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.write(data)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Sink for Hungry {
        fn still_wanted(&self) -> io::Result<()> {
            Ok(())
        }
        fn is_starving(&self) -> bool {
            self.0.0.len() < self.1
        }
    }
    let source = with_memory(b"state", |_| {});
    let mut saver = Saver::new(&source);
    let mut stream = Hungry(Kept::default(), 0);
    saver.pre_copy(&source, &mut stream).unwrap();
    let first = stream.0.0.len();
    stream.1 = first + 1_000_000;
    saver.finish(&source, &mut stream).unwrap();
    assert!(stream.0.0.len() > first + 1_000_000);
    let target = with_memory(b"     ", |_| {});
    load(&target, stream.0.0.as_slice()).unwrap();
}

fn passes(parts: &Parts<Scripted>, passes: &[(Pass, &[u8])]) {
    let passes = passes.iter().map(|(pass, some)| (*pass, some.to_vec())).collect();
    *parts.device.passes.lock().unwrap() = passes;
}

#[test]
fn a_device_saves_of_itself_while_it_runs() {
    let source = with_memory(b"state", |_| {});
    passes(&source, &[(Pass::First, &[1; 70_000]), (Pass::Later, &[2])]);
    let mut stream = Kept::default();
    let mut saver = Saver::new(&source);
    for _ in 0..3 {
        saver.pre_copy(&source, &mut stream).unwrap();
    }
    saver.finish(&source, &mut stream).unwrap();
    let target = with_memory(b"     ", |_| {});
    load(&target, stream.0.as_slice()).unwrap();
    let loaded = target.device.passes.lock().unwrap().clone();
    assert_eq!(loaded, [(Pass::First, vec![1; 70_000]), (Pass::Later, vec![2])]);
}

#[test]
fn a_device_with_passes_has_a_first_one_in_every_stream() {
    for (pre_copy, loaded) in [(false, Vec::new()), (true, vec![(Pass::First, vec![1])])] {
        let source = with_memory(b"state", |info| {
            if pre_copy {
                info.migration = MigrationFlags::ALL;
            }
        });
        passes(&source, &[(Pass::First, &[1])]);
        let target = with_memory(b"     ", |_| {});
        load(&target, saved_of(&source).as_slice()).unwrap();
        assert_eq!(*target.device.passes.lock().unwrap(), loaded);
    }
}

#[test]
fn a_reset_makes_void_what_a_device_has_saved_of_itself() {
    let source = with_memory(b"state", |_| {});
    for after_the_reset in [&[] as &[u8], &[3]] {
        passes(
            &source,
            &[(Pass::First, &[1]), (Pass::Later, &[2]), (Pass::First, after_the_reset)],
        );
        let mut stream = Kept::default();
        let mut saver = Saver::new(&source);
        saver.pre_copy(&source, &mut stream).unwrap();
        saver.pre_copy(&source, &mut stream).unwrap();
        saver.start_over();
        saver.finish(&source, &mut stream).unwrap();
        let target = with_memory(b"     ", |_| {});
        load(&target, stream.0.as_slice()).unwrap();
        let loaded = target.device.passes.lock().unwrap().clone();
        assert_eq!(loaded, [(Pass::First, after_the_reset.to_vec())]);
    }
}

#[test]
fn another_device_is_told_by_what_differs() {
    let stream = saved_of(&with_memory(b"state", |_| {}));
    let refused = |change: fn(&mut DeviceInfo), what: &str| {
        let target = with_memory(b"     ", change);
        let error = load(&target, stream.as_slice()).unwrap_err().to_string();
        assert_eq!(error, what);
        assert_eq!(peek(&target), vec![0; peek(&target).len()], "nothing was taken over");
    };
    refused(|info| info.kind = "camera".into(), r#"the state of a "scripted", this is a "camera""#);
    refused(
        |info| info.pci.device = 9,
        "the state of a device with device id 0x0002, this one has 0x0009",
    );
    refused(
        |info| info.pci.revision = 7,
        "the state of a device with class and revision 0x00000506, this one has 0x00000507",
    );
    refused(
        |info| info.msix_vectors = 3,
        "the state of a device with a number of MSI-X vectors of 2, this one has 3",
    );
    refused(
        |info| info.bars[2] = Some(Bar::memory(2 * MEMORY, memory(2 * MEMORY))),
        "the state of a device with a BAR 2 of 0x40000 bytes of memory, this one has 0x80000 bytes of memory",
    );
    refused(
        |info| info.bars[0] = Some(Bar::registers(4096)),
        "the state of a device with a BAR 0 of nothing, this one has 0x1000 bytes of registers",
    );
    refused(
        |info| info.state_version.major = 2,
        "the device's own state has version 1.0, expected 2.0",
    );
}

#[test]
fn other_versions_are_named() {
    let mut newer = saved();
    newer[8] = 3;
    assert_eq!(refusal(&newer).to_string(), "state stream of version 3.0, expected 2.0");
    let mut other = saved();
    other[0] = b'X';
    assert!(matches!(refusal(&other), StreamError::Magic(_)));
}

#[test]
fn what_a_newer_minor_version_adds_is_skipped() {
    let mut newer = Apart::of(&saved());
    newer.preamble[10] = 1;
    newer.records[0].1.extend(b"more of the identity");
    let end = newer.records.len();
    for at in [end, end - 1, 1] {
        newer.insert(at, 0x8000, OPTIONAL, b"something new");
    }
    load(&*parts(&[]), newer.sealed().as_slice()).unwrap();

    newer.preamble[10] = 0;
    let error = refusal(&newer.sealed());
    assert!(matches!(error, StreamError::Malformed { section: Tag::IDENTITY, .. }), "{error}");
}

#[test]
fn what_may_not_be_skipped_is_refused() {
    let mut newer = Apart::of(&saved());
    newer.preamble[10] = 1;
    newer.insert(1, 0x8000, 0, b"something new");
    let error = refusal(&newer.sealed()).to_string();
    assert_eq!(error, "record 0x8000 is not known here, and may not be skipped");
}

#[test]
fn state_that_the_device_does_not_read_is_refused_unless_it_is_newer() {
    let stream = saved_of(&with_memory(b"state", |info| info.state_version.minor = 1));
    let same = with_memory(b"st", |info| info.state_version.minor = 1);
    let error = load(&same, stream.as_slice()).unwrap_err();
    assert_eq!(error.to_string(), "device's state has more than the expected 2 bytes");
    let older = with_memory(b"st", |_| {});
    load(&older, stream.as_slice()).unwrap();
    assert_eq!(*older.device.contents.lock().unwrap(), b"st");
    let needs_more = with_memory(b"states", |_| {});
    let error = load(&needs_more, stream.as_slice()).unwrap_err();
    assert!(matches!(error, StreamError::Device(_)), "{error}");
}

#[test]
fn sections_that_are_missing_doubled_or_misplaced_are_refused() {
    let stream = Apart::of(&saved_of(&with_memory(b"state", |_| {})));
    let load = |stream: &Apart| {
        let target = with_memory(b"     ", |_| {});
        load(&target, stream.sealed().as_slice()).map_err(|error| error.to_string())
    };
    assert_eq!(load(&stream), Ok(()), "sealed as it was");

    let mut without = stream.clone();
    let second = without.find(Tag::memory(2)) + 1;
    without.records.remove(second);
    let missing = "memory of BAR 2: nothing was saved of the 65536 bytes at 0x10000";
    assert_eq!(load(&without), Err(missing.into()));

    let mut shifted = stream.clone();
    shifted.records[second].0.at += 1;
    assert!(
        load(&shifted).unwrap_err().contains("at 0x10001 where 65536 were expected at 0x10000")
    );
    let mut beyond = stream.clone();
    beyond.records[second].0.at = MEMORY;
    assert!(load(&beyond).unwrap_err().contains("where 0 were expected at 0x40000"));
    let mut far = stream.clone();
    far.records[second].0.at = u64::MAX - 0xffff;
    assert!(load(&far).is_err());

    let tags = stream.tags();
    for (at, tag) in tags.iter().enumerate() {
        if *tag == Tag::memory(2) {
            continue;
        }
        let mut without = stream.clone();
        without.records.remove(at);
        assert!(load(&without).is_err(), "without {tag}");
        let mut doubled = stream.clone();
        let record = doubled.records[at].clone();
        doubled.records.insert(at, record);
        assert!(load(&doubled).is_err(), "{tag} twice");
    }
    let mut foreign = stream.clone();
    foreign.insert(second, 0x11, 0, &[0; PIECE]);
    assert!(load(&foreign).unwrap_err().starts_with("memory of BAR 1 where"));
}

#[test]
fn records_that_claim_to_be_long_or_go_on_wrongly_are_refused() {
    let mut long = saved();
    long[PREAMBLE + 4..PREAMBLE + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        refusal(&long),
        StreamError::Piece { section: Tag::IDENTITY, length: u32::MAX }
    ));
    let stream = Apart::of(&saved_of(&with_memory(&[7; PIECE + 5], |_| {})));
    let load = |stream: &Apart| {
        let target = with_memory(&[0; PIECE + 5], |_| {});
        load(&target, stream.sealed().as_slice()).map_err(|error| error.to_string())
    };
    assert_eq!(load(&stream), Ok(()));
    let last = stream.records.len() - 1;
    assert_eq!(stream.records[last - 1].0.flags, MORE);
    let mut cut = stream.clone();
    cut.records[last - 1].0.flags = 0;
    assert!(load(&cut).is_err());
    let mut endless = stream.clone();
    endless.records[last].0.flags = MORE;
    assert_eq!(load(&endless), Err("end where device's state was expected".into()));
    let mut hole = stream.clone();
    hole.records[last].0.at += 1;
    assert!(load(&hole).unwrap_err().contains("at 0x10001"), "{:?}", load(&hole));
}

#[test]
fn a_record_that_is_left_out_or_moved_is_found_at_the_end() {
    let stream = saved_of(&with_memory(b"state", |_| {}));
    let apart = Apart::of(&stream);
    // One that is optional: nobody but the chain misses it.
    let mut with = apart.clone();
    with.insert(1, 0x8000, OPTIONAL, b"optional");
    let sealed = with.sealed();
    let begin = PREAMBLE + HEADER + apart.records[0].1.len() + DIGEST;
    let mut without = sealed.clone();
    without.drain(begin..begin + HEADER + 8 + DIGEST);
    let error = load(&with_memory(b"     ", |_| {}), without.as_slice()).unwrap_err();
    assert!(matches!(error, StreamError::Chain), "{error}");
}

proptest! {
    #[test]
    fn no_damage_is_taken_over_and_none_panics(at in 0usize..4096, flip in 1u8..=255) {
        let mut state = saved();
        let at = at % state.len();
        state[at] ^= flip;
        prop_assert!(load(&*parts(&[]), state.as_slice()).is_err());
    }

    #[test]
    fn sealed_nonsense_does_not_panic(
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), 0u16..0x20, 0u16..4, 0u64..200_000, prop::collection::vec(any::<u8>(), 0..80)),
            1..4,
        ),
    ) {
        let mut state = Apart::of(&saved_of(&with_memory(b"state", |_| {})));
        for (index, tag, flags, at, contents) in edits {
            let index = index.index(state.records.len());
            let header = Header { tag: Tag(tag), flags, length: 0, at };
            if at % 3 == 0 {
                state.records[index] = (header, contents);
            } else if at % 3 == 1 {
                state.records.insert(index, (header, contents));
            } else {
                state.records[index].1 = contents;
            }
        }
        let _: Result<(), _> = load(&with_memory(b"     ", |_| {}), state.sealed().as_slice());
    }

    #[test]
    fn memory_is_as_it_was_last_however_the_passes_fall(
        writes in prop::collection::vec((0..MEMORY - 8, any::<[u8; 8]>(), any::<bool>()), 0..24),
    ) {
        let source = with_memory(b"state", |_| {});
        let mut stream = Kept::default();
        let mut saver = Saver::new(&source);
        for (at, bytes, pass) in writes {
            poke(&source, at, &bytes);
            if pass {
                saver.pre_copy(&source, &mut stream).unwrap();
            }
        }
        saver.finish(&source, &mut stream).unwrap();
        let target = with_memory(b"     ", |_| {});
        load(&target, stream.0.as_slice()).unwrap();
        prop_assert_eq!(peek(&target), peek(&source));
    }
}
