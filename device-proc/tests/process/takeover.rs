//! Later coordinators: who gets the device, when, and what is left to the one before.

use crate::child::{Device, PATIENCE, command, until, wait, welcome};
use crate::client::Client;
use crate::probe::{LET_GO, NUMBER};
use crate::state::Memory;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, getuid, kill_process, prlimit};
use standstill_device_proc::serve::EXIT_ORPHANED;
use standstill_protocol::channel::{CoordinatorEnd, RecvError, bind};
use standstill_protocol::message::{
    Command, CoordinatorMessage, DeviceEvent, DeviceMessage, Epoch, OrphanPolicy, Phase, Query,
    Term, Welcome,
};
use standstill_protocol::migration::MigrationState as S;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// Tells this program to be a stranger to the device that listens there.
pub(crate) const STRANGER_VARIABLE: &str = "STANDSTILL_TEST_STRANGER";

/// Tells this program to be the parent of a device process, and in which folder.
pub(crate) const PARENT_VARIABLE: &str = "STANDSTILL_TEST_PARENT";

/// All that comes on a connection until its end.
fn rest(channel: &CoordinatorEnd) -> Vec<DeviceMessage> {
    let mut all = Vec::new();
    loop {
        match channel.recv(PATIENCE) {
            Ok(received) => all.push(received.message),
            Err(RecvError::Disconnected) => return all,
            Err(error) => panic!("{error} after {all:?}"),
        }
    }
}

fn superseded(term: u64) -> DeviceMessage {
    DeviceMessage::Event(DeviceEvent::Superseded(Term(term)))
}

/// The device belongs to its present coordinator and does what that says.
fn assert_obeys(device: &Device, epoch: u64) {
    device.pause(epoch);
    device.resume(epoch + 1);
}

#[test]
fn an_idle_device_passes_to_the_coordinator_with_the_higher_term() {
    let mut device = Device::kept("", None);
    device.pause(3);
    let (candidate, hello) = device.connect();
    assert_eq!((hello.machine, hello.term), (Some(welcome(OrphanPolicy::Keep).machine), Term(1)));
    assert_eq!((hello.epoch, hello.state, hello.backing_files), (Epoch(3), S::Stop, 1));
    assert_eq!(hello.memory.len(), 1);
    drop(candidate);

    let old = device.take_over(2);
    assert_eq!(device.query(0).state, S::Stop, "nothing is started by a take-over");
    assert_eq!(rest(&old), [superseded(2)], "the last word, then the end");
    device.resume(1);
    assert_obeys(&device, 2);
    device.shut_down();
}

#[test]
fn what_the_old_coordinator_sends_afterwards_changes_nothing() {
    let mut device = Device::kept("", None);
    let old = device.take_over(5);
    assert_eq!(device.query(0).state, S::Running);
    let stop = CoordinatorMessage::Command(command(9, Phase::Stop, S::Stop));
    assert!(old.send(&stop, &[], PATIENCE).is_err(), "that connection is closed");
    // Nor does one of its term on the new connection.
    device.send(&stop);
    assert_eq!(device.query(1).state, S::Running);
    assert_obeys(&device, 1);
}

#[test]
fn a_take_over_overtakes_a_hook_that_waits() {
    let mut device = Device::kept("hold:prepare_stop", None);
    let mut client = Client::connect(&device.socket());
    device.command(4, Phase::PrepareStop, S::RunningP2p);
    assert_eq!(device.query(4).moving_to, Some(S::RunningP2p));
    let old = device.take_over(2);
    until("the hook is given up", || device.query(0).moving_to.is_none());
    assert_eq!(device.query(0).state, S::Running);
    assert_eq!(rest(&old), [superseded(2)], "the command is not answered");
    device.command(1, Phase::PrepareStop, S::RunningP2p);
    client.write_u32(0, LET_GO, 1).unwrap();
    let reached = device.reached();
    assert_eq!((reached.term, reached.epoch, reached.state), (Term(2), Epoch(1), S::RunningP2p));
}

#[test]
fn a_device_that_is_kept_stays_in_exactly_the_state_that_it_reached() {
    let mut device = Device::kept("hold:stop", None);
    let mut client = Client::connect(&device.socket());
    // Of its two arcs the second one waits.
    device.command(1, Phase::Stop, S::Stop);
    until("the first arc is done", || device.query(1).state == S::RunningP2p);
    let (lost, _unused) = CoordinatorEnd::pair().unwrap();
    drop(std::mem::replace(&mut device.channel, lost));
    until("it is served again", || client.write_u32(0, NUMBER, 7).is_ok());
    let (candidate, hello) = device.connect();
    assert_eq!((hello.state, hello.epoch), (S::RunningP2p, Epoch(1)));
    drop(candidate);
    device.take_over(2);
    let status = device.query(0);
    assert_eq!((status.state, status.moving_to), (S::RunningP2p, None));
    assert_eq!(client.read_u32(0, NUMBER), Ok(7));
    device.go(1, Phase::Start, S::Running);
}

#[test]
fn a_coordinator_that_breaks_the_protocol_counts_as_gone() {
    let mut device = Device::kept("", None);
    device.pause(1);
    rustix::net::send(&device.channel, b"hello there", rustix::net::SendFlags::NOSIGNAL).unwrap();
    assert_eq!(rest(&device.channel), []);
    device.take_over(2);
    assert_eq!(device.query(0).state, S::Stop);
    device.resume(1);
}

#[test]
fn a_term_that_is_not_higher_is_told_so_and_refused() {
    let mut device = Device::kept("", None);
    device.take_over(4);
    for term in [0, 1, 3, 4] {
        let (candidate, _) = device.connect();
        let low = Welcome { term: Term(term), ..welcome(OrphanPolicy::Keep) };
        candidate.send(&CoordinatorMessage::Welcome(low), &[], PATIENCE).unwrap();
        candidate.set_version(1);
        assert_eq!(rest(&candidate), [superseded(4)]);
    }
    assert_obeys(&device, 1);
}

#[test]
fn a_coordinator_of_another_machine_is_refused() {
    let mut device = Device::kept("", None);
    let (candidate, hello) = device.connect();
    let mut other = Welcome { term: Term(9), ..welcome(OrphanPolicy::Keep) };
    let text = other.machine.to_string().replace("00000000-", "00000001-");
    other.machine = text.parse().unwrap();
    assert_ne!(hello.machine, Some(other.machine));
    candidate.send(&CoordinatorMessage::Welcome(other), &[], PATIENCE).unwrap();
    assert_eq!(rest(&candidate), []);
    assert_obeys(&device, 1);
    device.take_over(2);
    assert_obeys(&device, 1);
}

#[test]
fn garbage_instead_of_a_welcome_ends_that_connection_only() {
    let mut device = Device::kept("", None);
    let (candidate, _) = device.connect();
    rustix::net::send(&candidate, b"hello there", rustix::net::SendFlags::NOSIGNAL).unwrap();
    assert_eq!(rest(&candidate), []);

    let (candidate, _) = device.connect();
    candidate.set_version(1);
    let early = CoordinatorMessage::Command(command(9, Phase::Stop, S::Stop));
    candidate.send(&early, &[], PATIENCE).unwrap();
    assert_eq!(rest(&candidate), []);

    let (candidate, _) = device.connect();
    let version = Welcome { version: 9, term: Term(9), ..welcome(OrphanPolicy::Keep) };
    candidate.send(&CoordinatorMessage::Welcome(version), &[], PATIENCE).unwrap();
    assert_eq!(rest(&candidate), []);
    assert_obeys(&device, 1);
    device.take_over(2);
    assert_obeys(&device, 1);
}

#[test]
fn one_that_says_nothing_does_not_keep_others_out_for_ever() {
    let mut device = Device::kept("", None);
    let (silent, _) = device.connect();
    let next = CoordinatorEnd::connect(&device.control_path()).unwrap();
    assert_obeys(&device, 1);
    let hello = next.recv(3 * PATIENCE).unwrap().message;
    assert!(matches!(hello, DeviceMessage::Hello(_)));
    assert_eq!(rest(&silent), []);
    drop(next);
    device.take_over(2);
    assert_obeys(&device, 1);
}

#[test]
fn many_that_connect_cost_no_more_than_one() {
    let mut device = Device::kept("", None);
    // Its data side is up, too, and has opened what it needs.
    let _client = Client::connect(&device.socket());
    let open_fds = {
        let fds = format!("/proc/{}/fd", device.process.id());
        move || std::fs::read_dir(&fds).unwrap().count()
    };
    let before = open_fds();
    let (silent, _) = device.connect();
    let mut crowd = Vec::new();
    while let Ok(channel) = CoordinatorEnd::connect(&device.control_path()) {
        crowd.push(channel);
        assert!(crowd.len() < 100, "there is no end to those who may wait");
    }
    assert_obeys(&device, 1);
    assert!(open_fds() <= before + 2, "{} fds, {before} before", open_fds());
    // When they go, the next one gets through.
    drop((silent, crowd));
    device.take_over(2);
    assert_obeys(&device, 1);
    // Those who come and go without a word leave nothing behind either.
    for _ in 0..200 {
        drop(CoordinatorEnd::connect(&device.control_path()));
    }
    until("nothing is left of them", || open_fds() <= before);
}

#[test]
fn a_coordinator_that_does_not_read_is_left_behind() {
    let mut device = Device::kept("", None);
    let mut client = Client::connect(&device.socket());
    // More answers than its queue takes: some wait in the device process.
    for epoch in 0..450 {
        let query = Query { term: Term(1), epoch: Epoch(epoch) };
        device.send(&CoordinatorMessage::Query(query));
    }
    device.command(500, Phase::Stop, S::Stop);
    until("all of it was read", || client.write_u32(0, NUMBER, 1).is_err());
    let old = device.take_over(2);
    assert_eq!(device.query(0).state, S::Stop);
    device.resume(1);
    let left = rest(&old);
    // If there was room for the answer to the command, there was for the last word.
    let answered = left.iter().any(|message| matches!(message, DeviceMessage::Reached(_)));
    assert_eq!(left.last() == Some(&superseded(2)), answered, "{} messages", left.len());
    assert_eq!(left.len() > 450, answered, "{} messages", left.len());
}

#[test]
fn a_lease_outlives_its_coordinator() {
    let mut device = Device::kept("", None);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    let leased = Command { lease_ns: 500_000_000, ..command(1, Phase::Stop, S::Stop) };
    device.send(&CoordinatorMessage::Command(leased));
    assert_eq!(device.reached().state, S::Stop);
    device.take_over(2);
    until("the lease has run out", || device.query(0).state == S::RunningP2p);
    device.go(1, Phase::Start, S::Running);
}

#[test]
fn each_coordinator_has_heartbeats_of_its_own() {
    let mut device = Device::kept("", None);
    let beating = |term, heartbeat_ns| Welcome {
        term: Term(term),
        heartbeat_ns,
        ..welcome(OrphanPolicy::Keep)
    };
    let next_beat = |device: &Device| match device.next() {
        DeviceMessage::Heartbeat(beat) => beat.sequence,
        other => panic!("expected a heartbeat, got {other:?}"),
    };
    device.take_over_as(beating(2, 1_000_000), &[]);
    assert_eq!([next_beat(&device), next_beat(&device)], [0, 1]);
    device.take_over_as(beating(3, 2_000_000), &[]);
    assert_eq!([next_beat(&device), next_beat(&device)], [0, 1]);
    device.take_over_as(beating(4, 0), &[]);
    device.send(&CoordinatorMessage::Query(Query { term: Term(4), epoch: Epoch(1) }));
    assert!(matches!(device.next(), DeviceMessage::Status(_)), "no heartbeats");
}

#[test]
fn the_orphan_policy_is_that_of_the_latest_welcome() {
    let mut device = Device::kept("", None);
    let exit = Welcome { term: Term(2), ..welcome(OrphanPolicy::Exit) };
    let old = device.take_over_as(exit, &[]);
    assert_eq!(rest(&old), [superseded(2)]);
    drop(old);
    assert_obeys(&device, 1);
    let (lost, _unused) = CoordinatorEnd::pair().unwrap();
    drop(std::mem::replace(&mut device.channel, lost));
    assert_eq!(wait(&mut device.process).code(), Some(EXIT_ORPHANED.into()));
}

#[test]
fn a_later_welcome_can_bring_another_place_to_be_found_at() {
    let mut device = Device::kept("", None);
    let second = device.control_path().with_extension("second");
    let listener = bind(&second).unwrap();
    let elsewhere = Welcome { term: Term(2), listener: true, ..welcome(OrphanPolicy::Keep) };
    device.take_over_as(elsewhere, &[listener.as_fd()]);
    drop(listener);
    device.query(0);
    until("nobody listens at the first one", || {
        CoordinatorEnd::connect(&device.control_path()).is_err()
    });
    let candidate = CoordinatorEnd::connect(&second).unwrap();
    let hello = candidate.recv(PATIENCE).unwrap().message;
    assert!(matches!(hello, DeviceMessage::Hello(hello) if hello.term == Term(2)));
}

#[test]
fn the_log_goes_on_in_the_pipe_of_the_next_coordinator() {
    let (first, pipe) = std::io::pipe().unwrap();
    let mut device = Device::kept("", Some(pipe.as_fd()));
    drop(pipe);
    let mut lines = BufReader::new(first).lines();
    assert!(lines.next().unwrap().unwrap().starts_with('{'), "JSON");
    // Nobody reads any more: lines are dropped, and that is all.
    drop(lines);
    assert_obeys(&device, 1);
    let lost = device.take_over(2);
    drop(lost);
    assert_obeys(&device, 1);

    let (second, pipe) = std::io::pipe().unwrap();
    let logged = Welcome { term: Term(3), log: true, ..welcome(OrphanPolicy::Keep) };
    device.take_over_as(logged, &[pipe.as_fd()]);
    drop(pipe);
    let mut lines = BufReader::new(second).lines();
    assert!(lines.any(|line| line.unwrap().contains("taken over by another coordinator")));
    device.shut_down();
}

#[test]
fn a_kept_device_without_a_coordinator_still_ends_when_it_is_told_to() {
    let mut device = Device::kept("", None);
    let (lost, _unused) = CoordinatorEnd::pair().unwrap();
    drop(std::mem::replace(&mut device.channel, lost));
    let pid = Pid::from_raw(i32::try_from(device.process.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(wait(&mut device.process).code(), Some(0));
}

#[test]
fn a_save_that_nobody_reads_does_not_hold_a_take_over_up() {
    // More than a pipe takes.
    let memory = Memory::new(4 << 20);
    let mut device = Device::kept(&memory.word(), None);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.go(1, Phase::Stop, S::StopCopy);
    let (_reader, writer) = std::io::pipe().unwrap();
    let save = CoordinatorMessage::Command(command(2, Phase::Save, S::StopCopy));
    device.send_with(&save, &[writer.as_fd()]);
    assert_eq!(device.query(2).moving_to, Some(S::StopCopy));
    let old = device.take_over(2);
    until("the save is given up", || device.query(0).moving_to.is_none());
    assert_eq!(device.query(0).state, S::StopCopy);
    assert_eq!(rest(&old), [superseded(2)]);
    device.resume(1);
}

#[test]
fn half_a_load_is_left_to_the_next_coordinator_as_an_error() {
    let mut device = Device::kept("", None);
    device.pause(1);
    let (reader, _writer) = std::io::pipe().unwrap();
    let load = CoordinatorMessage::Command(command(2, Phase::Load, S::Stop));
    device.send_with(&load, &[reader.as_fd()]);
    assert_eq!(device.query(2).moving_to, Some(S::Stop));
    let (lost, _unused) = CoordinatorEnd::pair().unwrap();
    drop(std::mem::replace(&mut device.channel, lost));
    device.take_over(2);
    until("the load is given up", || device.query(0).moving_to.is_none());
    assert_eq!(device.query(0).state, S::Error);
    device.go(1, Phase::Reset, S::Stop);
    device.resume(2);
}

/// CPU time of a process so far, in clock ticks of 10 ms.
fn cpu_ticks(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // Behind the name, which may contain anything: fields 14 and 15 of proc(5).
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_device_without_free_fds_neither_spins_nor_forgets_who_waits() {
    let device = Device::kept("", None);
    // Who serves clients has all fds that it needs to begin: it was the last to be set up.
    let _client = Client::connect(&device.socket());
    let pid = Pid::from_raw(i32::try_from(device.process.id()).unwrap()).unwrap();
    let none = Rlimit { current: Some(0), ..getrlimit(Resource::Nofile) };
    let usual = prlimit(Some(pid), Resource::Nofile, none).unwrap();
    let candidate = CoordinatorEnd::connect(&device.control_path()).unwrap();
    let before = cpu_ticks(device.process.id());
    let nothing = candidate.recv(Duration::from_secs(1));
    assert!(matches!(nothing, Err(RecvError::TimedOut { .. })), "{nothing:?}");
    let used = cpu_ticks(device.process.id()) - before;
    assert!(used < 30, "{used} ticks of CPU time in a second of waiting");
    assert_obeys(&device, 1);
    prlimit(Some(pid), Resource::Nofile, usual).unwrap();
    let hello = candidate.recv(PATIENCE).unwrap().message;
    assert!(matches!(hello, DeviceMessage::Hello(_)));
}

/// Starts a device that is to end with this process, as its parent; lives until its standard input
/// ends.
pub(crate) fn be_a_parent(folder: &Path) {
    let (channel, stdin) = CoordinatorEnd::pair().unwrap();
    let mut child = crate::child::spawn(&folder.join("data.sock"), "", stdin.into());
    channel.recv(PATIENCE).unwrap();
    let listener = bind(&folder.join("control.sock")).unwrap();
    let exit = Welcome { listener: true, ..welcome(OrphanPolicy::Exit) };
    channel.send(&CoordinatorMessage::Welcome(exit), &[listener.as_fd()], PATIENCE).unwrap();
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
fn a_device_that_was_taken_over_does_not_end_with_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let mut parent = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "parent", "--nocapture", "--test-threads=1"])
        .env(PARENT_VARIABLE, folder.path())
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let path = folder.path().join("control.sock");
    let mut connected = None;
    until("the device listens", || {
        connected = CoordinatorEnd::connect(&path).ok();
        connected.is_some()
    });
    let channel = connected.unwrap();
    let hello = channel.recv(PATIENCE).unwrap().message;
    assert!(matches!(hello, DeviceMessage::Hello(_)));
    let device = Pid::from_raw(channel.peer_credentials().unwrap().pid).unwrap();
    let exit = Welcome { term: Term(2), ..welcome(OrphanPolicy::Exit) };
    channel.send(&CoordinatorMessage::Welcome(exit), &[], PATIENCE).unwrap();
    channel.set_version(1);
    let query = |epoch| {
        let query = Query { term: Term(2), epoch: Epoch(epoch) };
        channel.send(&CoordinatorMessage::Query(query), &[], PATIENCE).unwrap();
        assert!(matches!(channel.recv(PATIENCE).unwrap().message, DeviceMessage::Status(_)));
    };
    query(1);
    parent.kill().unwrap();
    parent.wait().unwrap();
    // A signal would have come before the parent could be waited for.
    query(2);
    drop(channel);
    let pidfd = rustix::process::pidfd_open(device, rustix::process::PidfdFlags::empty());
    if let Ok(pidfd) = pidfd {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        let patience = PATIENCE.try_into().unwrap();
        assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "it ends with its coordinator");
    }
}

/// Another user connects, or, where this user cannot become another one, the same.
pub(crate) fn be_a_stranger(path: &Path) {
    let root = getuid().is_root();
    if root {
        let nobody = nix::unistd::Uid::from_raw(65_534);
        nix::unistd::setresuid(nobody, nobody, nobody).unwrap();
    }
    let channel = CoordinatorEnd::connect(path).unwrap();
    match channel.recv(PATIENCE) {
        Ok(received) => assert!(!root && matches!(received.message, DeviceMessage::Hello(_))),
        Err(error) => assert!(root && matches!(error, RecvError::Disconnected), "{error}"),
    }
}

#[test]
fn another_user_is_not_even_greeted() {
    let mut device = Device::kept("", None);
    // The first obstacle, the rights of the path, is out of the way here.
    let path = device.control_path();
    let all = std::fs::Permissions::from_mode(0o777);
    for open in [path.parent().unwrap(), &path] {
        std::fs::set_permissions(open, all.clone()).unwrap();
    }
    let mut stranger = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "stranger", "--nocapture", "--test-threads=1"])
        .env(STRANGER_VARIABLE, &path)
        .spawn()
        .unwrap();
    let status = wait(&mut stranger);
    assert!(status.success(), "{status}");
    device.take_over(2);
    assert_obeys(&device, 1);
}
