//! Windows, interrupts, and the fds that come with them.

use super::client::{Client, REGION_READ, VERSION, access, message, version};
use super::fds::names;
use super::wire::greeted;
use crate::fields;
use crate::vfio_user::rig::Rig;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::fs::read_link;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const GET_INFO: u16 = 4;
const SET_IRQS: u16 = 8;
const RESET: u16 = 13;

const EINVAL: u32 = 22;
const ENOENT: u32 = 2;
const EEXIST: u32 = 17;
const EOPNOTSUPP: u32 = 95;

pub(super) fn map_body(flags: u32, offset: u64, iova: u64, size: u64) -> Vec<u8> {
    fields!(32_u32, flags, offset, iova, size)
}

fn unmap_body(argsz: u32, flags: u32, iova: u64, size: u64) -> Vec<u8> {
    fields!(argsz, flags, iova, size)
}

pub(super) fn ram(size: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file.into()
}

#[test]
fn windows_are_mapped_and_unmapped_by_the_rules() {
    let (rig, mut client) = greeted();
    let ram = ram(1 << 20);
    let (some, none) = ([ram.as_fd()], [] as [BorrowedFd<'_>; 0]);
    let mut map = |fds: &[BorrowedFd<'_>], body: &[u8]| client.call_with(DMA_MAP, body, fds);
    assert_eq!(map(&some, &map_body(3, 0, 0x1000, 0x2000)), Ok(vec![]));
    assert_eq!(map(&some, &map_body(3, 0, 0x1000, 0x2000)), Ok(vec![]), "the same once more");
    assert_eq!(map(&some, &map_body(1, 0, 0x1000, 0x2000)), Err(EEXIST), "other rights");
    assert_eq!(map(&some, &map_body(3, 0, 0x2000, 0x2000)), Err(EEXIST), "overlaps");
    assert_eq!(map(&none, &map_body(3, 0, 0x1000, 0x2000)), Err(EEXIST), "no file");
    assert_eq!(map(&none, &map_body(1, 0, 0x8000, 0x1000)), Ok(vec![]));
    for (fds, body, errno) in [
        (&some[..], map_body(3, 0, 0x10_0000, 0), EINVAL),
        (&some, map_body(3, 0, 0x10_0001, 0x1000), EINVAL),
        (&some, map_body(3, 1, 0x10_0000, 0x1000), EINVAL),
        (&some, map_body(3, 0, 0x10_0000, 0x1001), EINVAL),
        (&some, map_body(3, 0, u64::MAX - 0xfff, 0x2000), EINVAL),
        (&some, map_body(3, 1 << 20, 0x10_0000, 0x1000), EINVAL),
        (&some, map_body(0x10, 0, 0x10_0000, 0x1000), EINVAL),
        (&some, map_body(3 | 8, 0, 0x10_0000, 0x1000), EOPNOTSUPP),
        (&none, map_body(3 | 4, 0, 0x10_0000, 0x1000), EINVAL),
        (&none, map_body(3, 0x1000, 0x10_0000, 0x1000), EINVAL),
        (&some, fields!(31_u32, 3_u32, 0_u64, 0x10_0000_u64, 0x1000_u64), EINVAL),
        (&some, vec![0; 31], EINVAL),
        (&[ram.as_fd(), ram.as_fd()], map_body(3, 0, 0x10_0000, 0x1000), EINVAL),
    ] {
        assert_eq!(map(fds, &body), Err(errno), "{} fds, {body:?}", fds.len());
    }
    assert_eq!(map(&some, &map_body(3 | 4, 0, 0x10_0000, 0x1000)), Ok(vec![]), "by mmap");
    assert_eq!(rig.parts.memory.windows(), 3);

    let mut unmap = |body: &[u8]| client.call(DMA_UNMAP, body);
    for (body, errno) in [
        (unmap_body(24, 0, 0x1000, 0x1000), ENOENT),
        (unmap_body(24, 0, 0x2000, 0x1000), ENOENT),
        (unmap_body(24, 0, 0x4000, 0x1000), ENOENT),
        (unmap_body(24, 0, 0x1000, 0), EINVAL),
        (unmap_body(23, 0, 0x1000, 0x2000), EINVAL),
        (unmap_body(24, 2, 0x1000, 0x2000), EINVAL),
        (unmap_body(24, 2, 0, 0x2000), EINVAL),
        (unmap_body(24, 3, 0, 0), EINVAL),
        (unmap_body(24, 4, 0x1000, 0x2000), EINVAL),
        (vec![24, 0, 0, 0], EINVAL),
    ] {
        assert_eq!(unmap(&body), Err(errno), "{body:?}");
    }
    let body = unmap_body(24, 0, 0x1000, 0x2000);
    assert_eq!(unmap(&body), Ok(body.clone()));
    assert_eq!(unmap(&body), Err(ENOENT));
    let all = unmap_body(24, 2, 0, 0);
    assert_eq!(unmap(&all), Ok(all.clone()));
    assert_eq!(unmap(&all), Ok(all.clone()), "nothing is everything");
    assert_eq!(rig.parts.memory.windows(), 0);
    drop(client);
}

#[test]
fn an_unmapping_waits_for_dma_in_flight() {
    use crate::memory::Span;
    let (rig, mut client) = greeted();
    client.call_with(DMA_MAP, &map_body(3, 0, 0, 0x1000), &[ram(4096).as_fd()]).unwrap();
    let dma = rig.device().handles.dma.clone();
    let access = dma.access(&[Span::write(0, 8)]).unwrap();
    client.send(&message(1, DMA_UNMAP, 0, &unmap_body(24, 0, 0, 0x1000)), &[]);
    let moment = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    let looked = poll(&mut [PollFd::new(&client.stream, PollFlags::IN)], Some(&moment));
    assert_eq!(looked, Ok(0), "it is in use");
    drop(access);
    assert!(client.receive().result().is_ok());
    drop(client);
}

pub(super) fn eventfds<const N: usize>() -> [OwnedFd; N] {
    std::array::from_fn(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap())
}

pub(super) fn raised(eventfd: &OwnedFd) -> bool {
    rustix::io::read(eventfd, &mut [0; 8]).is_ok()
}

#[test]
fn interrupts_are_set_by_the_rules() {
    let (_rig, mut client) = greeted();
    let body = |flags: u32, index: u32, start: u32, count: u32, data: &[u8]| {
        let argsz = 20 + u32::try_from(data.len()).unwrap();
        let mut body = fields!(argsz, flags, index, start, count);
        body.extend(data);
        body
    };
    let fds: [OwnedFd; 4] = eventfds();
    let some: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut set = |body: &[u8], fds: &[BorrowedFd<'_>]| client.call_with(SET_IRQS, body, fds);
    assert_eq!(set(&body(4 | 32, 2, 0, 4, &[]), &some), Ok(vec![]));
    assert_eq!(set(&body(1 | 32, 2, 1, 2, &[]), &[]), Ok(vec![]));
    assert_eq!([0, 1, 2, 3].map(|at| raised(&fds[at])), [false, true, true, false]);
    assert_eq!(set(&body(2 | 32, 2, 0, 4, &[1, 0, 0, 255]), &[]), Ok(vec![]));
    assert_eq!([0, 1, 2, 3].map(|at| raised(&fds[at])), [true, false, false, true]);
    assert_eq!(set(&body(2 | 8, 2, 0, 2, &[0, 1]), &[]), Ok(vec![]), "masks the second");
    assert_eq!(set(&body(1 | 32, 2, 0, 2, &[]), &[]), Ok(vec![]));
    assert_eq!([0, 1].map(|at| raised(&fds[at])), [true, false]);
    assert_eq!(set(&body(1 | 16, 2, 1, 1, &[]), &[]), Ok(vec![]));
    assert!(raised(&fds[1]), "it is raised when it is unmasked");
    assert_eq!(set(&body(4 | 32, 2, 0, 1, &[]), &[]), Ok(vec![]), "removes one");
    assert_eq!(set(&body(1 | 32, 2, 0, 1, &[]), &[]), Ok(vec![]));
    assert!(!raised(&fds[0]));
    assert_eq!(set(&body(1 | 32, 2, 0, 0, &[]), &[]), Ok(vec![]), "disables all");

    for (wrong, fds) in [
        (body(1, 2, 0, 1, &[]), &some[..0]),
        (body(32, 2, 0, 1, &[]), &some[..0]),
        (body(1 | 2 | 32, 2, 0, 1, &[1]), &some[..0]),
        (body(1 | 8 | 16, 2, 0, 1, &[]), &some[..0]),
        (body(1 | 32 | 64, 2, 0, 1, &[]), &some[..0]),
        (body(1 | 32, 5, 0, 1, &[]), &some[..0]),
        (body(1 | 32, 2, 4, 1, &[]), &some[..0]),
        (body(1 | 32, 2, 4, 0, &[]), &some[..0]),
        (body(1 | 32, 2, 3, 2, &[]), &some[..0]),
        (body(1 | 32, 2, 1, u32::MAX, &[]), &some[..0]),
        (body(1 | 32, 2, u32::MAX, 2, &[]), &some[..0]),
        (body(1 | 8, 3, 0, 1, &[]), &some[..0]),
        (body(1 | 16, 4, 0, 1, &[]), &some[..0]),
        (body(1 | 32, 3, 0, 2, &[]), &some[..0]),
        (body(1 | 32, 2, 1, 0, &[]), &some[..0]),
        (body(2 | 32, 2, 0, 0, &[]), &some[..0]),
        (body(4 | 32, 2, 0, 0, &[]), &some[..0]),
        (body(1 | 8, 2, 0, 0, &[]), &some[..0]),
        (body(1 | 32, 2, 0, 1, &[]), &some[..1]),
        (body(2 | 32, 2, 0, 1, &[1]), &some[..1]),
        (body(4 | 32, 2, 0, 2, &[]), &some[..1]),
        (body(4 | 32, 2, 0, 2, &[]), &some[..3]),
        (body(2 | 32, 2, 0, 2, &[1]), &some[..0]),
        (body(2 | 32, 2, 0, 2, &[1; 3]), &some[..0]),
        (fields!(19_u32, 33_u32, 2_u32, 0_u32, 1_u32), &some[..0]),
        (vec![0; 19], &some[..0]),
    ] {
        assert_eq!(set(&wrong, fds), Err(EINVAL), "{} fds, {wrong:?}", fds.len());
    }
    let file = ram(4096);
    assert_eq!(set(&body(4 | 32, 2, 0, 1, &[]), &[file.as_fd()]), Err(EINVAL), "no eventfd");
    drop(client);
}

#[test]
fn fds_with_any_part_of_a_message_are_taken_and_too_many_refused() {
    let (rig, mut client) = greeted();
    let ram = ram(1 << 20);
    let map = message(5, DMA_MAP, 0, &map_body(3, 0, 0, 0x1000));
    client.send(&map[..20], &[]);
    client.send(&map[20..], &[ram.as_fd()]);
    assert!(client.receive().result().is_ok(), "with the second segment");
    assert_eq!(rig.parts.memory.windows(), 1);

    let fds = vec![ram.as_fd(); 16];
    assert_eq!(client.call_with(REGION_READ, &access(7, 0, 4), &fds), Err(EINVAL), "none is due");
    assert_eq!(client.call_with(GET_INFO, &[0; 16], &fds[..1]), Err(EINVAL));
    client.post(RESET, &[]);
    assert!(client.read(7, 0).is_ok());
    drop(client);

    let mut client = Client::greeted(rig.connect());
    client.send(&message(6, GET_INFO, 0, &[0; 16]), &[ram.as_fd(); 30]);
    client.assert_closed();
    let mut client = Client::greeted(rig.connect());
    let own = read_link(format!("/proc/self/fd/{}", ram.as_raw_fd())).unwrap();
    assert_eq!(names().iter().filter(|name| **name == own).count(), 1, "only ours is left");
    assert!(client.read(7, 0).is_ok());
    drop(client);
}

#[test]
fn so_many_windows_with_a_file_are_promised_and_no_more_are_mapped() {
    const ENOSPC: u32 = 28;
    let rig = Rig::new();
    rig.parts.memory.set_most_with_file(3);
    let mut client = Client::raw(rig.connect());
    let reply = client.call(VERSION, &version("{}")).unwrap();
    assert!(String::from_utf8_lossy(&reply).contains(r#""max_dma_maps":3"#));
    let ram = ram(0x1000);
    let (some, none) = ([ram.as_fd()], [] as [BorrowedFd<'_>; 0]);
    let window = |number: u64| map_body(3, 0, number * 0x1000, 0x1000);
    for number in 0..3 {
        assert_eq!(client.call_with(DMA_MAP, &window(number), &some), Ok(vec![]));
    }
    assert_eq!(client.call_with(DMA_MAP, &window(3), &some), Err(ENOSPC));
    assert_eq!(client.call_with(DMA_MAP, &window(2), &some), Ok(vec![]), "the same once more");
    assert_eq!(client.call_with(DMA_MAP, &window(9), &none), Ok(vec![]), "it takes no mapping");
    client.call(DMA_UNMAP, &unmap_body(24, 0, 0, 0x1000)).unwrap();
    assert_eq!(client.call_with(DMA_MAP, &window(3), &some), Ok(vec![]));
    assert_eq!(client.call_with(DMA_MAP, &window(4), &some), Err(ENOSPC));
    client.call(DMA_UNMAP, &unmap_body(24, 2, 0, 0)).unwrap();
    assert_eq!(client.call_with(DMA_MAP, &window(4), &some), Ok(vec![]));
    drop(client);
}
