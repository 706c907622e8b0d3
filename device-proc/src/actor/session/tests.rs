use super::*;
use crate::actor::scripted::{Scripted, info, put_together};
use crate::actor::stream::Saver;
use crate::actor::stream::apart::Kept;
use crate::device::{Bar, Pass};
use std::os::fd::OwnedFd;

const MEMORY: u64 = 8 << 20;
/// Does not run out.
const PATIENCE: Duration = Duration::from_secs(30);
/// Runs out.
const NO_PATIENCE: Duration = Duration::from_millis(50);

fn device() -> Arc<Parts<Scripted>> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    let device = Scripted { contents: Mutex::new(b"state".to_vec()), ..Scripted::default() };
    put_together(device, info().bar(2, Bar::memory(MEMORY, OwnedFd::from(file))).pre_copy())
}

fn moved(parts: &Parts<Scripted>, to: MigrationState) {
    parts.client_stream.moved(to);
}

fn read(parts: &Arc<Parts<Scripted>>, length: usize) -> Result<Vec<u8>, Errno> {
    let mut data = vec![0; length];
    let length = parts.client_stream.read(parts, &mut data, PATIENCE)?;
    data.truncate(length);
    Ok(data)
}

/// Reads until nothing is left now.
fn drain(parts: &Arc<Parts<Scripted>>, at_a_time: usize) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let some = read(parts, at_a_time).unwrap();
        all.extend(&some);
        if some.len() < at_a_time {
            return all;
        }
    }
}

/// Reads all of the first pass. (A read is also short if the machine is slow.)
fn first_pass(parts: &Arc<Parts<Scripted>>) -> Vec<u8> {
    let mut all = Vec::new();
    while parts.client_stream.size(parts).initial > 0 {
        all.extend(drain(parts, 1 << 20));
    }
    all
}

/// What is written out of band.
fn out_of_band(parts: &Parts<Scripted>, passes: usize) -> Vec<u8> {
    let mut to = Kept::default();
    let mut saver = Saver::new(parts);
    (0..passes).for_each(|_| saver.pre_copy(parts, &mut to).unwrap());
    saver.finish(parts, &mut to).unwrap();
    to.0
}

fn load_in_band(parts: &Arc<Parts<Scripted>>, stream: &[u8]) -> Result<(), Refusal> {
    moved(parts, MigrationState::Resuming);
    for piece in stream.chunks(100_000) {
        parts.client_stream.write(parts, piece, PATIENCE).unwrap();
    }
    commit(parts)
}

fn commit(parts: &Parts<Scripted>) -> Result<(), Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ended = runtime.block_on(parts.client_stream.commit());
    moved(parts, MigrationState::Stop);
    ended
}

#[test]
fn the_stream_is_the_same_in_band_and_out_of_band() {
    for at_a_time in [777, 1 << 20] {
        let source = device();
        moved(&source, MigrationState::StopCopy);
        let stream = drain(&source, at_a_time);
        assert!(stream == out_of_band(&source, 0));
        assert_eq!(read(&source, 100), Ok(vec![]), "that was all");
    }
    let source = device();
    moved(&source, MigrationState::PreCopy);
    let mut stream = first_pass(&source);
    moved(&source, MigrationState::PreCopyP2p);
    moved(&source, MigrationState::StopCopy);
    stream.extend(drain(&source, 1 << 20));
    assert!(stream == out_of_band(&source, 1));

    let target = device();
    *target.device.contents.lock().unwrap() = vec![0; 5];
    load_in_band(&target, &stream).unwrap();
    assert_eq!(*target.device.contents.lock().unwrap(), b"state");
}

#[test]
fn a_pass_that_is_not_read_to_its_end_is_no_obstacle() {
    let source = device();
    moved(&source, MigrationState::PreCopy);
    let mut stream = read(&source, 1_000_000).unwrap();
    assert_eq!(stream.len(), 1_000_000);
    moved(&source, MigrationState::StopCopy);
    stream.extend(drain(&source, 1 << 20));
    let target = device();
    load_in_band(&target, &stream).unwrap();
}

#[test]
fn after_a_short_read_there_may_be_more() {
    let source = device();
    moved(&source, MigrationState::PreCopy);
    let all = source.client_stream.size(&source);
    assert_eq!((all.stop_copy, all.initial, all.dirty), (MEMORY + 5, MEMORY, 0));
    let mut stream = first_pass(&source);
    let none = source.client_stream.size(&source);
    assert_eq!((none.stop_copy, none.initial, none.dirty), (5, 0, 0));
    rustix::io::pwrite(source.bar_memory[2].as_ref().unwrap(), &[1], 1 << 20).unwrap();
    loop {
        let some = read(&source, 1 << 20).unwrap();
        stream.extend(&some);
        if !some.is_empty() {
            assert_eq!(some.len(), 65536 + 32);
            break;
        }
    }
    moved(&source, MigrationState::StopCopy);
    stream.extend(drain(&source, 1 << 20));
    let target = device();
    load_in_band(&target, &stream).unwrap();
    let mut byte = [0];
    rustix::io::pread(target.bar_memory[2].as_ref().unwrap(), &mut byte, 1 << 20).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn a_reset_while_it_is_saved_starts_the_device_over() {
    let source = device();
    let first = (Pass::First, b"before the reset".to_vec());
    *source.device.passes.lock().unwrap() = vec![first];
    moved(&source, MigrationState::PreCopy);
    let mut stream = first_pass(&source);
    *source.device.passes.lock().unwrap() = vec![(Pass::First, b"after".to_vec())];
    source.client_stream.start_over();
    moved(&source, MigrationState::StopCopy);
    stream.extend(drain(&source, 1 << 20));
    let target = device();
    load_in_band(&target, &stream).unwrap();
    assert_eq!(*target.device.passes.lock().unwrap(), [(Pass::First, b"after".to_vec())]);
}

#[test]
fn bad_states_are_refused_at_the_commit() {
    let stream = {
        let source = device();
        moved(&source, MigrationState::StopCopy);
        drain(&source, 1 << 20)
    };
    let text = |stream: &[u8]| load_in_band(&device(), stream).unwrap_err().text;
    assert_eq!(text(&[]), "the state stream ends too early");
    assert_eq!(text(&stream[..stream.len() - 1]), "the state stream ends too early");
    assert_eq!(text(&[stream.clone(), vec![0]].concat()), "the state stream goes on after its end");

    // What is found earlier is told to who writes, and again at the commit.
    let target = device();
    moved(&target, MigrationState::Resuming);
    while target.client_stream.write(&target, &[7; 4096], PATIENCE).is_ok() {}
    assert!(commit(&target).unwrap_err().text.starts_with("this is no state stream"));
}

#[test]
fn what_does_not_fit_the_state_is_refused() {
    let parts = device();
    for state in [MigrationState::Running, MigrationState::Stop, MigrationState::Resuming] {
        moved(&parts, state);
        assert_eq!(read(&parts, 1), Err(Errno::INVAL), "{state}");
    }
    for state in [MigrationState::Running, MigrationState::PreCopy, MigrationState::StopCopy] {
        moved(&parts, state);
        assert_eq!(parts.client_stream.write(&parts, &[0], PATIENCE), Err(Errno::INVAL), "{state}");
    }
    moved(&parts, MigrationState::Resuming);
    let long = parts.client_stream.write(&parts, &vec![0; ROOM + 1], PATIENCE);
    assert_eq!(long, Err(Errno::INVAL));
}

#[test]
fn a_hook_that_hangs_holds_nobody_up_and_loses_nothing() {
    let source = device();
    let whole = out_of_band(&source, 0);
    let held = source.device.hold.lock().unwrap();
    moved(&source, MigrationState::StopCopy);
    let mut stream = Vec::new();
    let mut data = vec![0; 100_000];
    let error = loop {
        match source.client_stream.read(&source, &mut data, NO_PATIENCE) {
            Ok(length) => stream.extend(&data[..length]),
            Err(error) => break error,
        }
    };
    assert_eq!(error, Errno::TIMEDOUT);

    // So does the next session, which waits for its turn.
    moved(&source, MigrationState::Stop);
    moved(&source, MigrationState::StopCopy);
    let waits = source.client_stream.read(&source, &mut data, NO_PATIENCE);
    assert_eq!(waits, Err(Errno::TIMEDOUT));
    drop(held);
    assert!(drain(&source, 100_000) == whole);
    assert!(whole.starts_with(&stream));
}

#[test]
fn a_device_that_takes_nothing_holds_nobody_up() {
    let target = device();
    let stream = out_of_band(&target, 0);
    let turn = target.loading.take(|| true);
    moved(&target, MigrationState::Resuming);
    let mut chunks = stream.chunks(1 << 20);
    let error =
        chunks.find_map(|piece| target.client_stream.write(&target, piece, NO_PATIENCE).err());
    assert_eq!(error, Some(Errno::TIMEDOUT));
    moved(&target, MigrationState::Error);
    drop(turn);
}

#[test]
fn a_session_that_has_ended_leaves_no_thread() {
    let source = device();
    let parts = Arc::downgrade(&source);
    moved(&source, MigrationState::PreCopy);
    read(&source, 10).unwrap();
    moved(&source, MigrationState::Running);
    moved(&source, MigrationState::Resuming);
    source.client_stream.write(&source, &[0; 8], PATIENCE).unwrap();
    moved(&source, MigrationState::Running);
    drop(source);
    let end = Instant::now() + PATIENCE;
    while parts.strong_count() > 0 {
        assert!(Instant::now() < end, "a thread still has the device");
        std::thread::yield_now();
    }
}

#[test]
fn while_a_stop_waits_for_the_transport_no_read_of_a_running_device_waits_or_begins_a_pass() {
    let source = device();
    moved(&source, MigrationState::PreCopy);
    let hurry = source.client_stream.hurry();
    assert_eq!(read(&source, 100), Ok(vec![]));
    assert_eq!(source.client_stream.size(&source).dirty, 0, "the first pass has not begun");
    drop(hurry);
    let mut stream = first_pass(&source);
    // Told that the pass has ended, the next read would begin another one.
    while !source.client_stream.session(true).unwrap().lock().idle {
        stream.extend(drain(&source, 1 << 20));
    }
    let passes = || source.client_stream.session(true).unwrap().lock().passes;
    let before = passes();
    {
        let _hurry = source.client_stream.hurry();
        stream.extend(drain(&source, 1 << 20));
        stream.extend(drain(&source, 1 << 20));
        let session = source.client_stream.session(true).unwrap();
        assert!(session.lock().idle);
    }
    assert_eq!(passes(), before);
    moved(&source, MigrationState::StopCopy);
    let hurry = source.client_stream.hurry();
    stream.extend(drain(&source, 1 << 20));
    drop(hurry);
    let target = device();
    *target.device.contents.lock().unwrap() = vec![0; 5];
    load_in_band(&target, &stream).unwrap();
    assert_eq!(*target.device.contents.lock().unwrap(), b"state");
}
