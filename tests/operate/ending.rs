//! Signals, and what is left after them: nothing.

use crate::fixture::{PATIENCE, Place, gone, pidfd, send, two_engines};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

fn ends_cleanly_by(signal: Signal, lines: &str) {
    let place = Place::new();
    let running = place.run(&two_engines(lines));
    let devices = [place.device("engine0"), place.device("engine1")];
    running.signal(signal);
    let ended = running.ends();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(devices.iter().all(|device| gone(device, Duration::ZERO)));
    assert!(ended.stdout.contains("engine0 exited with status 0"), "{}", ended.stdout);
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn sigint_ends_every_device() {
    ends_cleanly_by(Signal::INT, "");
}

#[test]
fn sigterm_ends_every_device() {
    ends_cleanly_by(Signal::TERM, "orphan = \"exit\"");
}

/// How long it takes from the first signal to the end of a device that hangs, if a second one comes
/// as soon as the first was heard.
fn hurried() -> Duration {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let hung = place.device("engine0");
    let other = place.device("engine1");
    send(&hung, Signal::STOP);
    let began = Instant::now();
    running.signal(Signal::INT);
    // The first signal was heard when the other device has ended.
    assert!(gone(&other, Duration::from_secs(20)));
    running.signal(Signal::INT);
    assert!(gone(&hung, Duration::from_secs(20)));
    let took = began.elapsed();
    let ended = running.ends();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("engine0 killed by signal 9"), "{}", ended.stdout);
    took
}

#[test]
fn a_second_signal_hurries() {
    // Without one it is two seconds, always; on a machine that is busy it may be as long with one.
    let times: Vec<_> = (0..5).map(|_| hurried()).collect();
    assert!(times.iter().any(|took| *took < Duration::from_millis(1900)), "{times:?}");
}

#[test]
fn sigkill_takes_the_devices_of_a_machine_with_orphans_that_exit() {
    let place = Place::new();
    let running = place.run(&two_engines("orphan = \"exit\""));
    let devices = [place.device("engine0"), place.device("engine1")];
    running.signal(Signal::KILL);
    assert_eq!(running.ends().status.signal(), Some(9));
    assert!(devices.iter().all(|device| gone(device, Duration::from_secs(20))));
    // Nothing is left that would stand in the way.
    let _again = place.run(&two_engines("orphan = \"exit\""));
}

#[test]
fn a_machine_that_nobody_could_operate_leaves_no_device_behind() {
    let place = Place::new();
    let folder = place.runtime().join("vm0");
    for folder in [place.runtime(), folder.clone()] {
        std::fs::DirBuilder::new().mode(0o700).create(folder).unwrap();
    }
    // Somebody has the turn in the folder, and does not go.
    let turn = std::fs::File::open(&folder).unwrap();
    rustix::fs::flock(&turn, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let file = place.write("vm0.toml", &two_engines(""));
    let ended = place.begin(&[file.to_str().unwrap()]).ends();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("lock"), "{}", ended.stderr);
    assert!(!folder.join("control/machine.json").exists(), "{}", ended.stderr);
    drop(turn);
    // Nobody is in its way.
    let running = place.run(&two_engines(""));
    place.expect(0, &["shutdown"]);
    assert_eq!(running.ends().status.code(), Some(0));
}

#[test]
fn devices_that_end_with_their_coordinator_are_not_kept() {
    let place = Place::new();
    let _running = place.run(&two_engines("orphan = \"exit\""));
    let said = place.expect(1, &["shutdown", "--keep-devices"]);
    assert!(said.contains("orphan = \"exit\""), "{said}");
    assert_eq!(place.json(&["status"])["machine"], "running");
}

#[test]
fn a_machine_can_be_run_again_when_its_shutdown_has_returned() {
    let place = Place::new();
    for _ in 0..3 {
        let _running = place.run(&two_engines(""));
        place.expect(0, &["shutdown"]);
        assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
    }
}

/// A pipe that nobody reads, and in which there is no room any more.
fn full_pipe() -> (io::PipeReader, io::PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    let flags = fcntl_getfl(&writer).unwrap();
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    while (&writer).write(&[b'.'; 4096]).is_ok() {}
    while (&writer).write(b".").is_ok() {}
    fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

#[test]
fn output_that_nobody_reads_holds_up_neither_the_machine_nor_its_end() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines(""));
    let (_reader, writer) = full_pipe();
    let mut command = place.command(&["run", file.to_str().unwrap()]);
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !place.ask(&["status"]).status.success() {
        assert!(Instant::now() < deadline, "it never answers");
    }
    place.expect(0, &["pause"]);
    let pidfd = pidfd(child.id().into());
    place.expect(0, &["shutdown"]);
    let ended = gone(&pidfd, PATIENCE);
    // Nothing to be done about one that has ended.
    let _ = child.kill();
    let status = child.wait().unwrap();
    assert!(ended && status.success(), "{status}");
}

#[test]
fn an_error_that_nobody_reads_does_not_keep_the_process() {
    let place = Place::new();
    let file = place.write("vm0.toml", "name = 1");
    let (_reader, writer) = full_pipe();
    let mut command = place.command(&["run", file.to_str().unwrap()]);
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    let ended = gone(&pidfd(child.id().into()), PATIENCE);
    let _ = child.kill();
    assert_eq!((ended, child.wait().unwrap().code()), (true, Some(2)));
}
