//! What becomes of the fds that a client sends, and of those that it gets.

use super::client::{Client, message};
use super::edge::{NO_LEASE, bells, rang, ring, until};
use crate::edge::Station;
use crate::fields;
use crate::vfio_user::link::Outgoing;
use crate::vfio_user::rig::{Deed, Rig};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

const DMA_MAP: u16 = 2;
const GET_INFO: u16 = 4;

/// The names of this process's fds. Other tests open some, too.
pub(super) fn names() -> Vec<PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    // One that was closed meanwhile has no name.
    fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok()).collect()
}

fn count(name: &str) -> usize {
    names().iter().filter(|path| path.to_string_lossy().contains(name)).count()
}

#[test]
fn fds_of_messages_that_are_refused_are_closed() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let name = format!("stray-{}", std::process::id());
    let file = memfd_create(&name, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 8192).unwrap();
    for _ in 0..50 {
        let ten = [file.as_fd(); 10];
        assert_eq!(
            client.call_with(GET_INFO, &fields!(16_u32, 0_u32, 0_u32, 0_u32), &ten),
            Err(22)
        );
        assert_eq!(client.call_with(99, &[], &ten), Err(22));
        let map = fields!(32_u32, 3_u32, 0_u64, 0x800_u64, 4096_u64);
        assert_eq!(client.call_with(DMA_MAP, &map, &[file.as_fd()]), Err(22));
        client.send(&message(7, GET_INFO, 0x10, &[]), &ten);
    }
    assert!(client.read(7, 0).is_ok());
    assert_eq!(count(&name), 1, "only ours is left");
    drop(client);
}

#[test]
fn replies_carry_as_many_fds_as_any_client_takes() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let outgoing = Outgoing::new(Arc::new(ours.into()), Station::new().unwrap());
    let file = tempfile::tempfile().unwrap();
    for count in [1, 17, 64, 253] {
        let fds = vec![file.as_fd(); count];
        outgoing.send(&message(1, GET_INFO, 1, &[]), &fds).unwrap();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let mut bytes = [0; 64];
        let into = &mut [IoSliceMut::new(&mut bytes)];
        recvmsg(&theirs, into, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        let came = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.count(),
            _ => 0,
        });
        assert_eq!(came.sum::<usize>(), count);
    }
}

/// What the kernel calls an eventfd, whoever has an fd of it.
fn identity(number: i32) -> Option<String> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    info.lines().find(|line| line.starts_with("eventfd-id:")).map(String::from)
}

/// How many fds of this process are that eventfd.
fn copies(fd: &OwnedFd) -> usize {
    let ours = identity(fd.as_raw_fd()).unwrap();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = fds.filter_map(|fd| fd.unwrap().file_name().to_str()?.parse::<i32>().ok());
    numbers.filter(|number| identity(*number).as_ref() == Some(&ours)).count()
}

#[test]
fn doorbells_that_were_rung_go_with_their_client_and_what_was_rung_stays() {
    let rig = Rig::new();
    // From now on somebody waits for clients.
    drop(Client::greeted(rig.connect()));
    rig.stop(2, NO_LEASE);
    let mut all = Vec::new();
    for _ in 0..20 {
        let mut client = Client::greeted(rig.connect());
        let theirs = bells(&mut client);
        ring(&theirs[1]);
        drop(client);
        all.extend(theirs);
    }
    let client = Client::greeted(rig.connect());
    // The thread that listens to them may have some in hand for a moment.
    until("only ours are left", || all.iter().all(|fd| copies(fd) == 1));
    assert!(rang(&rig).is_empty());
    rig.start(3);
    until("it is told", || rang(&rig) == [1]);
    rig.stop(4, NO_LEASE);
    assert_eq!(rang(&rig), [1], "once");
    rig.start(5);
    drop(client);
}

#[test]
fn what_a_client_rings_before_it_goes_is_told_before_a_stop() {
    let rig = Rig::new();
    for epoch in 1..40 {
        let mut client = Client::greeted(rig.connect());
        let theirs = bells(&mut client);
        ring(&theirs[0]);
        drop(client);
        rig.stop(2 * epoch, NO_LEASE);
        let rung = rang(&rig).len();
        assert_eq!(rung, usize::try_from(epoch).unwrap());
        let deeds = rig.device().deeds();
        let stop = deeds.iter().rposition(|deed| *deed == Deed::Stopped).unwrap();
        assert!(deeds[..stop].iter().filter(|deed| matches!(deed, Deed::Rang(_))).count() == rung);
        rig.start(2 * epoch + 1);
    }
}
