//! Packets as they are, whatever is in them, and the fds that come along.

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use standstill_protocol::dirty::{Layout, MIN_PAGE_SIZE};
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

/// How many kinds of fds there are.
const KINDS: u8 = 8;
/// The size of what is declared to be RAM, in bytes.
const RAM: u64 = 1 << 20;

/// Sends one packet without waiting. False if there is no room or nobody reads.
///
/// # Panics
///
/// If the system refuses it for another reason.
pub fn send(socket: impl AsFd, packet: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match sendmsg(&socket, &[IoSlice::new(packet)], &mut control, flags) {
        Ok(_) => true,
        Err(Errno::AGAIN | Errno::PIPE | Errno::CONNRESET | Errno::PERM) => false,
        Err(error) => panic!("a packet of {} bytes: {error}", packet.len()),
    }
}

/// A file of each kind that may come along, for as long as the process lives.
fn kept() -> &'static [OwnedFd; 3] {
    static KEPT: OnceLock<[OwnedFd; 3]> = OnceLock::new();
    KEPT.get_or_init(|| {
        let file = |name, size| {
            let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
            let fd = fd.expect("a memfd");
            ftruncate(&fd, size).expect("its size");
            fd
        };
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let ram = file("ram", RAM);
        let layout = Layout::new(MIN_PAGE_SIZE, RAM).expect("pages of RAM");
        let bitmap = file("bitmap", layout.file_size());
        fcntl_add_seals(&bitmap, seals).expect("its seals");
        [ram, bitmap, file("state", 0)]
    })
}

/// An fd of that kind, of 8: RAM, a bitmap for it, a file for states, a pipe that was written to, a
/// pipe that nobody reads, a socket whose other end is closed, a file without end, and a file that
/// is like none of these.
///
/// # Panics
///
/// If no fds are left.
#[must_use]
pub fn fd(kind: u8) -> OwnedFd {
    match kind % KINDS {
        kind @ 0..=1 => copy(&kept()[usize::from(kind)]),
        2 => {
            let state = &kept()[2];
            rustix::fs::seek(state, rustix::fs::SeekFrom::Start(0)).expect("a file");
            copy(state)
        }
        3 => {
            let (reader, mut writer) = std::io::pipe().expect("a pipe");
            writer.write_all(b"STANDSTL\x01\x00\x08\x00scripted").expect("room in a pipe");
            reader.into()
        }
        4 => std::io::pipe().expect("a pipe").1.into(),
        5 => std::os::unix::net::UnixStream::pair().expect("sockets").0.into(),
        6 => std::fs::File::open("/dev/zero").expect("a device").into(),
        _ => std::fs::File::open("/dev/null").expect("a device").into(),
    }
}

fn copy(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().expect("an fd is left")
}

/// How many fds this process has open.
///
/// # Panics
///
/// If the system does not tell.
#[must_use]
pub fn open_fds() -> usize {
    kept();
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}
