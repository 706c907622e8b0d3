//! Real children: `sh`, `sleep`, and `flock` and `setpriv` of util-linux.

use super::*;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;

/// Longer than anything here takes, on a loaded machine too.
const LONG: Duration = Duration::from_secs(20);

fn shell(script: &str) -> ProcessSpec {
    ProcessSpec::new("/bin/sh").args(["-c", script])
}

fn sleeper() -> ProcessSpec {
    ProcessSpec::new("sleep").arg("1000")
}

/// Starts a process whose control socket nobody holds.
fn start(spec: &ProcessSpec) -> DeviceProcess {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    Spawner::new().unwrap().spawn(spec, theirs.into()).unwrap()
}

fn stderr_lines(process: &mut DeviceProcess) -> impl Iterator<Item = String> + use<> {
    let stderr = File::from(process.take_stderr().unwrap());
    BufReader::new(stderr).lines().map(Result::unwrap)
}

/// Runs a script to its end and returns what it wrote.
fn output(spec: &ProcessSpec) -> String {
    let mut process = start(spec);
    let lines: Vec<String> = stderr_lines(&mut process).collect();
    assert_eq!(process.wait_exit(LONG).unwrap(), Some(Exit::Code(0)));
    lines.join("\n")
}

fn is_gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

fn killed() -> Exit {
    Exit::Signal { signal: 9, core_dumped: false }
}

fn backing(path: &Path) -> BackingFile {
    BackingFile::reopen(File::open(path).unwrap().into()).unwrap()
}

/// Polls a fence whose process must end now.
fn poll_after_exit(fence: &mut Fence, process: &mut DeviceProcess) -> FenceProgress {
    assert!(wait_readable(process.pidfd(), LONG).unwrap(), "the process did not end");
    fence.poll(process)
}

fn proven(progress: FenceProgress) -> FenceProof {
    match progress {
        FenceProgress::Proven(proof) => proof,
        other => panic!("expected a proof, got {other:?}"),
    }
}

#[test]
fn a_normal_exit_is_reaped_with_its_status() {
    let mut process = start(&shell("exit 3"));
    assert_eq!(process.wait_exit(LONG).unwrap(), Some(Exit::Code(3)));
    assert!(is_gone(process.pid()));
    // The answer stays, and signals go nowhere.
    assert_eq!(process.try_reap().unwrap(), Some(Exit::Code(3)));
    process.kill().unwrap();
    assert_eq!(process.exit(), Some(Exit::Code(3)));
}

#[test]
fn a_living_process_is_neither_readable_nor_reaped() {
    let mut process = start(&sleeper());
    assert!(!wait_readable(process.pidfd(), Duration::ZERO).unwrap());
    assert_eq!(process.try_reap().unwrap(), None);
    assert_eq!(process.wait_exit(Duration::from_millis(20)).unwrap(), None);
    assert_eq!(process.exit(), None);
}

#[test]
fn a_signal_is_named_as_the_end() {
    let mut process = start(&sleeper());
    process.signal(Signal::TERM).unwrap();
    let exit = process.wait_exit(LONG).unwrap().unwrap();
    assert_eq!(exit, Exit::Signal { signal: 15, core_dumped: false });
    assert_eq!(exit.to_string(), "killed by signal 15 (SIGTERM)");
}

#[test]
fn ends_are_described_for_a_person() {
    assert_eq!(Exit::Code(3).to_string(), "exited with status 3");
    assert_eq!(
        Exit::Signal { signal: 11, core_dumped: true }.to_string(),
        "killed by signal 11 (SIGSEGV), core dumped"
    );
    assert_eq!(Exit::Signal { signal: 40, core_dumped: false }.to_string(), "killed by signal 40");
    assert_eq!(Exit::Unknown.to_string(), "ended with unknown status");
    assert!(Exit::Code(0).success() && !Exit::Code(1).success() && !killed().success());
}

#[test]
fn a_process_that_somebody_else_reaped_has_ended_with_unknown_status() {
    let mut process = start(&shell("exit 0"));
    rustix::process::waitid(WaitId::PidFd(process.pidfd()), WaitIdOptions::EXITED).unwrap();
    assert_eq!(process.try_reap().unwrap(), Some(Exit::Unknown));
}

#[test]
fn dropping_a_process_kills_and_reaps_it() {
    let process = start(&sleeper());
    let pid = process.pid();
    assert!(!is_gone(pid));
    drop(process);
    assert!(is_gone(pid));
}

#[test]
fn dropping_an_ended_process_leaves_no_zombie() {
    let process = start(&shell("exit 0"));
    let pid = process.pid();
    assert!(wait_readable(process.pidfd(), LONG).unwrap());
    assert!(!is_gone(pid), "it must be a zombie until it is reaped");
    drop(process);
    assert!(is_gone(pid));
}

#[test]
fn a_process_that_outlives_its_owner_is_reaped_by_the_spawning_thread() {
    let mut process = start(&sleeper());
    spawn::reap_later(process.pid);
    process.kill().unwrap();
    assert!(wait_readable(process.pidfd(), LONG).unwrap());
    // The thread looks after its dead after each job, before it takes the next one.
    start(&sleeper());
    start(&sleeper());
    assert!(is_gone(process.pid()));
    // As in Drop, the pid is no longer this value's.
    process.exit = Some(Exit::Unknown);
}

#[test]
fn the_control_socket_is_standard_input_and_no_copy_stays_here() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let spec = ProcessSpec::new("/bin/sh").args(["-c", "echo hello >&0; exec sleep 1000"]);
    let mut process = Spawner::new().unwrap().spawn(&spec, theirs.into()).unwrap();
    let mut greeting = [0; 6];
    ours.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"hello\n");
    process.kill().unwrap();
    process.wait_exit(LONG).unwrap().unwrap();
    ours.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(ours.read(&mut greeting).unwrap(), 0);
}

#[test]
fn a_process_leads_a_group_of_its_own() {
    let process = start(&sleeper());
    assert_eq!(rustix::process::getpgid(Some(process.pid)).unwrap(), process.pid);
}

#[test]
fn standard_output_leads_nowhere() {
    let process = start(&sleeper());
    let target = std::fs::read_link(format!("/proc/{}/fd/1", process.pid())).unwrap();
    assert_eq!(target, Path::new("/dev/null"));
}

#[test]
fn no_signal_is_blocked_or_ignored() {
    // This program ignores SIGPIPE, as every Rust program does. 32 and 33 belong to the C library,
    // which leaves them ignored in what it spawns.
    const INTERNAL: u64 = 0b11 << 31;
    let masks = output(&shell("sed -nE 's/^Sig(Blk|Ign):[[:space:]]*//p' /proc/self/status >&2"));
    let masks: Vec<u64> =
        masks.lines().map(|mask| u64::from_str_radix(mask, 16).unwrap() & !INTERNAL).collect();
    assert_eq!(masks, [0, 0]);
}

#[test]
fn variables_are_added_to_the_inherited_environment() {
    let spec = shell("echo \"$STANDSTILL_TEST ${PATH:+inherited}\" >&2")
        .env("STANDSTILL_TEST", "first")
        .env("STANDSTILL_TEST", "second");
    assert_eq!(output(&spec), "second inherited");
}

#[test]
fn a_missing_program_is_named() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let spec = ProcessSpec::new("/nowhere/device");
    let error = Spawner::new().unwrap().spawn(&spec, theirs.into()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot start /nowhere/device: No such file or directory (os error 2)"
    );
    let SpawnError::Program { source, .. } = error else { panic!("unexpected {error:?}") };
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_file_that_is_not_executable_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let spec = ProcessSpec::new(file.path());
    let error = Spawner::new().unwrap().spawn(&spec, theirs.into()).unwrap_err();
    let SpawnError::Program { program, source } = error else { panic!("unexpected {error:?}") };
    assert_eq!(program, file.path());
    assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
    // The failed start has closed the child's end.
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

#[test]
fn text_that_cannot_be_passed_on_is_refused() {
    for (spec, expected) in [
        (ProcessSpec::new("a\0b"), "program"),
        (sleeper().arg("a\0b"), "argument"),
        (sleeper().env("", "x"), "environment variable"),
        (sleeper().env("A=B", "x"), "environment variable"),
        (sleeper().env("A", "x\0"), "environment variable"),
    ] {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        match Spawner::new().unwrap().spawn(&spec, theirs.into()) {
            Err(SpawnError::Text { what, .. }) => assert_eq!(what, expected),
            other => panic!("{spec:?}: unexpected {other:?}"),
        }
    }
}

#[test]
fn a_process_outlives_the_thread_that_asked_for_it() {
    // As a device does, it asks to be killed at the end of its parent; and then says so.
    const ARGS: [&str; 5] = ["--pdeathsig", "KILL", "sh", "-c", "echo ready >&2; exec sleep 1000"];

    let mut process = std::thread::spawn(|| {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let spawner = Spawner::new().unwrap();
        let spec = ProcessSpec::new("setpriv").args(ARGS);
        let mut process = spawner.spawn(&spec, theirs.into()).unwrap();
        assert_eq!(stderr_lines(&mut process).next().unwrap(), "ready");
        // Not before: the spawner may go, too, and the process has to live on.
        drop(spawner);
        process
    })
    .join()
    .unwrap();

    // The counter-test, started by the dying thread itself, shows that the kernel means it; and
    // that the time is over in which the other one could have been killed.
    let mut other = std::thread::spawn(|| {
        let mut other = std::process::Command::new("setpriv")
            .args(ARGS)
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = other.stderr.take().unwrap();
        assert_eq!(BufReader::new(stderr).lines().next().unwrap().unwrap(), "ready");
        other
    })
    .join()
    .unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&other.wait().unwrap()), Some(9));

    assert_eq!(process.wait_exit(Duration::from_millis(50)).unwrap(), None);
}

#[test]
fn a_fence_without_backing_files_is_proven_by_the_exit() {
    let mut process = start(&sleeper());
    let mut fence = Fence::begin(&process, Vec::new());
    let proof = proven(poll_after_exit(&mut fence, &mut process));
    assert_eq!((proof.exit(), proof.locks()), (killed(), 0));
    assert!(is_gone(process.pid()));
}

#[test]
fn a_stopped_process_can_be_fenced() {
    let mut process = start(&sleeper());
    process.signal(Signal::STOP).unwrap();
    let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
    rustix::process::waitid(WaitId::PidFd(process.pidfd()), stopped).unwrap().unwrap();
    let mut fence = Fence::begin(&process, Vec::new());
    assert_eq!(proven(poll_after_exit(&mut fence, &mut process)).exit(), killed());
}

#[test]
fn a_process_that_had_ended_before_keeps_its_own_status_in_the_proof() {
    let mut process = start(&shell("exit 7"));
    process.wait_exit(LONG).unwrap().unwrap();
    let mut fence = Fence::begin(&process, Vec::new());
    assert_eq!(proven(fence.poll(&mut process)).exit(), Exit::Code(7));
}

#[test]
fn a_lock_that_outlives_the_process_keeps_the_fence_from_being_proven() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // The sleeping grandchild inherits fd 9, and with it the lock.
    let script = "exec 9<\"$1\"; flock 9; sleep 1000 & echo $! >&2; wait";
    let spec = shell(script).arg("sh").arg(file.path());
    let mut process = start(&spec);
    let grandchild: i32 = stderr_lines(&mut process).next().unwrap().parse().unwrap();
    let grandchild = Pid::from_raw(grandchild).unwrap();
    let grandchild =
        rustix::process::pidfd_open(grandchild, rustix::process::PidfdFlags::empty()).unwrap();

    let backing_file = backing(file.path());
    assert!(backing_file.is_locked().unwrap());
    let mut fence = Fence::begin(&process, vec![backing_file]);
    let progress = poll_after_exit(&mut fence, &mut process);
    assert!(matches!(progress, FenceProgress::WaitingForLocks { held: 1 }), "{progress:?}");
    let progress = fence.poll(&mut process);
    assert!(matches!(progress, FenceProgress::WaitingForLocks { held: 1 }), "{progress:?}");
    assert!(fence.obstacle().is_none());
    assert!(is_gone(process.pid()));

    rustix::process::pidfd_send_signal(&grandchild, Signal::KILL).unwrap();
    assert!(wait_readable(grandchild.as_fd(), LONG).unwrap());
    let proof = proven(fence.poll(&mut process));
    assert_eq!((proof.exit(), proof.locks()), (killed(), 1));
}

#[test]
fn a_proof_holds_its_locks_until_it_is_dropped() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut process = start(&sleeper());
    let mut fence = Fence::begin(&process, vec![backing(file.path())]);
    let proof = proven(poll_after_exit(&mut fence, &mut process));
    let next_incarnation = backing(file.path());
    assert!(next_incarnation.is_locked().unwrap());
    drop(proof);
    assert!(!next_incarnation.is_locked().unwrap());
}

#[test]
fn a_fence_holds_no_lock_while_one_is_missing() {
    let free = tempfile::NamedTempFile::new().unwrap();
    let taken = tempfile::NamedTempFile::new().unwrap();
    let holder = File::open(taken.path()).unwrap();
    rustix::fs::flock(&holder, FlockOperation::NonBlockingLockExclusive).unwrap();

    let mut process = start(&sleeper());
    let mut fence = Fence::begin(&process, vec![backing(free.path()), backing(taken.path())]);
    let progress = poll_after_exit(&mut fence, &mut process);
    assert!(matches!(progress, FenceProgress::WaitingForLocks { held: 1 }), "{progress:?}");
    assert!(!backing(free.path()).is_locked().unwrap());
    // Not by closing it: a child of another test may have a copy for a moment.
    rustix::fs::flock(&holder, FlockOperation::NonBlockingUnlock).unwrap();
    assert_eq!(proven(fence.poll(&mut process)).locks(), 2);
}

#[test]
fn a_file_that_comes_twice_does_not_lock_itself_out() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut process = start(&sleeper());
    let files = vec![backing(file.path()), backing(file.path())];
    let mut fence = Fence::begin(&process, files);
    assert_eq!(proven(poll_after_exit(&mut fence, &mut process)).locks(), 1);
}

#[test]
fn a_fence_is_not_proven_by_another_process() {
    let mut process = start(&sleeper());
    let mut other = start(&shell("exit 0"));
    other.wait_exit(LONG).unwrap().unwrap();
    let mut fence = Fence::begin(&process, Vec::new());
    assert!(matches!(fence.poll(&mut other), FenceProgress::WaitingForExit));
    assert!(fence.obstacle().is_some());
    proven(poll_after_exit(&mut fence, &mut process));
    assert!(fence.obstacle().is_none());
}

#[test]
fn reopening_does_not_keep_the_received_fd() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let received = File::open(file.path()).unwrap();
    rustix::fs::flock(&received, FlockOperation::NonBlockingLockExclusive).unwrap();
    let backing_file = BackingFile::reopen(received.into()).unwrap();
    // The last copy of the locked file is closed now, and its lock with it; but for the moment in
    // which a child of another test may have one, until it executes its program.
    let deadline = Instant::now() + Duration::from_secs(5);
    while backing_file.is_locked().unwrap() {
        assert!(Instant::now() < deadline, "the received fd is still open");
        std::thread::yield_now();
    }
}

#[test]
fn only_files_and_block_devices_are_backing_files() {
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let directory = tempfile::tempdir().unwrap();
    for (fd, expected) in [
        (pipe, "pipe"),
        (socket.into(), "socket"),
        (File::open(directory.path()).unwrap().into(), "directory"),
        (File::open("/dev/null").unwrap().into(), "character device"),
    ] {
        match BackingFile::reopen(fd) {
            Err(BackingFileError::Kind { found }) => assert_eq!(found, expected),
            other => panic!("{expected}: unexpected {other:?}"),
        }
    }
}
