//! Channels over real socket pairs.

#![forbid(unsafe_code)]

mod hostile;
mod waiting;

use super::*;
use crate::message::*;
use crate::migration::{MigrationFlags, MigrationState};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// Both ends, after the handshake.
fn connected() -> (CoordinatorEnd, DeviceEnd) {
    let (coordinator, device) = CoordinatorEnd::pair().unwrap();
    let device = DeviceEnd::from_fd(device).unwrap();
    coordinator.set_version(1);
    device.set_version(1);
    (coordinator, device)
}

fn command(phase: Phase, epoch: u64) -> CoordinatorMessage {
    CoordinatorMessage::Command(Command {
        term: Term(1),
        epoch: Epoch(epoch),
        phase,
        target: MigrationState::Stop,
        budget_ns: 1_000_000,
        lease_ns: 0,
    })
}

fn heartbeat(sequence: u64) -> DeviceMessage {
    DeviceMessage::Heartbeat(Heartbeat { sequence, progress: 0, pending: false, dropped_logs: 0 })
}

fn hello(backing_files: u8) -> DeviceMessage {
    DeviceMessage::Hello(Hello {
        versions: VERSIONS,
        kind: "test".into(),
        program_version: "1".into(),
        capabilities: Capabilities {
            migration: MigrationFlags::ALL,
            peer_dma: PeerDma::RamOnly,
            progress: false,
            dirty_tracking: false,
            fault_injection: false,
        },
        machine: None,
        term: Term(0),
        epoch: Epoch(0),
        state: MigrationState::Running,
        backing_files,
        memory: Vec::new(),
    })
}

/// A file that exists nowhere else in this process: by it the process's open fds are counted, as
/// other tests open and close theirs meanwhile.
struct Marked {
    file: OwnedFd,
    name: PathBuf,
}

impl Marked {
    fn new(name: &str) -> Self {
        let file =
            rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        Self { file, name }
    }

    /// How many fds of this process are this file.
    fn open_fds(&self) -> usize {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
        fds.filter(|fd| std::fs::read_link(fd).is_ok_and(|target| target == self.name)).count()
    }
}

fn identity(fd: &impl AsFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd).unwrap();
    (stat.st_dev, stat.st_ino)
}

fn is_close_on_exec(fd: &impl AsFd) -> bool {
    fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC)
}

#[test]
fn messages_arrive_in_order_in_both_directions() {
    let (coordinator, device) = connected();
    for epoch in 1..=3 {
        coordinator.try_send(&command(Phase::Stop, epoch), &[]).unwrap();
        device.try_send(&heartbeat(epoch), &[]).unwrap();
    }
    for epoch in 1..=3 {
        let received = device.try_recv().unwrap().unwrap();
        assert_eq!(received.message, command(Phase::Stop, epoch));
        assert!(received.fds.is_empty());
        assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(epoch));
    }
    assert!(device.try_recv().unwrap().is_none());
    assert!(coordinator.try_recv().unwrap().is_none());
}

#[test]
fn a_pair_is_close_on_exec_at_both_ends() {
    let (coordinator, device) = CoordinatorEnd::pair().unwrap();
    assert!(is_close_on_exec(&coordinator));
    assert!(is_close_on_exec(&device));
}

#[test]
fn a_channel_from_an_inherited_fd_becomes_close_on_exec() {
    let (_coordinator, device) = CoordinatorEnd::pair().unwrap();
    fcntl_setfd(&device, FdFlags::empty()).unwrap();
    let device = DeviceEnd::from_fd(device).unwrap();
    assert!(is_close_on_exec(&device));
}

#[test]
fn a_channel_is_made_of_nothing_but_a_unix_seqpacket_socket() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(DeviceEnd::from_fd(file.into()), Err(FromFdError::NotASocket)));

    let (stream, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let error = DeviceEnd::from_fd(stream.into()).unwrap_err();
    assert!(matches!(error, FromFdError::WrongSocket { family: 1, kind: 1 }), "{error}");

    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let error = DeviceEnd::from_fd(udp.into()).unwrap_err();
    assert!(matches!(error, FromFdError::WrongSocket { family: 2, kind: 2 }), "{error}");
}

#[test]
fn fds_pass_as_the_same_file_and_close_on_exec() {
    let (coordinator, device) = connected();
    let files: Vec<Marked> = (0..MAX_FDS).map(|n| Marked::new(&format!("pass-{n}"))).collect();
    let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(|marked| marked.file.as_fd()).collect();
    device.try_send(&hello(16), &borrowed).unwrap();

    let received = coordinator.try_recv().unwrap().unwrap();
    assert_eq!(received.message, hello(16));
    assert_eq!(received.fds.len(), MAX_FDS);
    for (sent, got) in files.iter().zip(&received.fds) {
        assert_eq!(identity(&sent.file), identity(got));
        assert!(is_close_on_exec(got));
        assert_eq!(sent.open_fds(), 2);
    }
    drop(received);
    assert!(files.iter().all(|marked| marked.open_fds() == 1));
}

#[test]
fn a_message_with_another_number_of_fds_than_it_announces_is_not_sent() {
    let (coordinator, device) = connected();
    let file = Marked::new("count");
    let fd = file.file.as_fd();
    let too_many = [fd; MAX_FDS + 1];
    for (phase, fds) in [
        (Phase::Save, &[][..]),
        (Phase::Load, &[fd; 2]),
        (Phase::Stop, &[fd]),
        (Phase::Save, &too_many),
    ] {
        let error = coordinator.try_send(&command(phase, 1), fds).unwrap_err();
        assert!(
            matches!(error, SendError::Fds { given, .. } if given == fds.len()),
            "{phase} with {}: {error}",
            fds.len()
        );
    }
    coordinator.try_send(&command(Phase::Save, 1), &[fd]).unwrap();
    assert_eq!(device.try_recv().unwrap().unwrap().fds.len(), 1);
    assert!(device.try_recv().unwrap().is_none());
}

#[test]
fn a_frame_goes_to_many_and_equals_a_message_sent_alone() {
    let pairs: Vec<_> = (0..8).map(|_| connected()).collect();
    let message = command(Phase::PrepareStop, 9);
    let frame = Frame::new(&message, 1).unwrap();
    for (coordinator, device) in &pairs {
        coordinator.try_send_frame(&frame, &[]).unwrap();
        assert_eq!(device.try_recv().unwrap().unwrap().message, message);
    }
}

#[test]
fn a_frame_of_another_version_is_not_sent() {
    let (coordinator, device) = connected();
    let frame = Frame::new(&command(Phase::Stop, 1), 2).unwrap();
    let error = coordinator.try_send_frame(&frame, &[]).unwrap_err();
    assert!(matches!(error, SendError::FrameVersion { frame: 2, channel: 1 }));
    // A handshake message goes with every version.
    let reject = CoordinatorMessage::Reject(Reject { versions: VERSIONS, reason: "no".into() });
    coordinator.try_send_frame(&Frame::new(&reject, 2).unwrap(), &[]).unwrap();
    assert_eq!(device.try_recv().unwrap().unwrap().message, reject);
}

#[test]
fn only_the_handshake_passes_until_a_version_is_set() {
    let (coordinator, device) = CoordinatorEnd::pair().unwrap();
    let device = DeviceEnd::from_fd(device).unwrap();
    let error = device.try_send(&heartbeat(1), &[]).unwrap_err();
    assert!(matches!(error, SendError::Encode(EncodeError::NoVersion { message: "Heartbeat" })));
    device.try_send(&hello(0), &[]).unwrap();
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, hello(0));

    // A device that speaks before it was welcomed.
    device.set_version(1);
    device.try_send(&heartbeat(1), &[]).unwrap();
    let error = coordinator.try_recv().unwrap_err();
    assert!(matches!(
        error,
        RecvError::Decode(codec::DecodeError::Version { expected: 0, found: 1 })
    ));

    coordinator.set_version(1);
    device.try_send(&heartbeat(2), &[]).unwrap();
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(2));
}

#[test]
fn the_peers_credentials_are_those_of_who_made_the_pair() {
    let (coordinator, device) = connected();
    let this = PeerCredentials {
        pid: nix::unistd::getpid().as_raw(),
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
    };
    assert_eq!(device.peer_credentials().unwrap(), this);
    assert_eq!(coordinator.peer_credentials().unwrap(), this);
}

#[test]
fn whoever_listens_is_whom_a_later_coordinator_sees() {
    let folder = std::env::temp_dir().join(format!("standstill-listener-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("device.sock");
    let bound = bind(&path).unwrap();
    let refused = CoordinatorEnd::connect(&path).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "nobody listens yet");

    let listener = ControlListener::from_fd(bound).unwrap();
    assert!(listener.try_accept().unwrap().is_none());
    let coordinator = CoordinatorEnd::connect(&path).unwrap();
    let device = listener.try_accept().unwrap().unwrap();
    let here = i32::try_from(std::process::id()).unwrap();
    assert_eq!(coordinator.peer_credentials().unwrap().pid, here);
    assert_eq!(device.peer_credentials().unwrap().pid, here);
    let flags = fcntl_getfd(coordinator.peer_pidfd().unwrap()).unwrap();
    assert!(flags.contains(FdFlags::CLOEXEC));

    let taken = bind(&path).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse, "somebody listens there");
    drop(listener);
    let stale = bind(&path).expect("a socket that nobody listens on is replaced");
    drop(stale);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a file").unwrap();
    assert!(bind(&path).is_err(), "what is no socket is left alone");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    std::fs::remove_dir_all(&folder).unwrap();
}
