//! Which pages the device writes, as its client asks.

use super::client::Client;
use crate::fields;
use crate::memory::Span;
use crate::vfio_user::rig::Rig;
use std::os::fd::{AsFd, OwnedFd};

const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const FEATURE: u16 = 16;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;
const START: u32 = 6;
const STOP: u32 = 7;
const REPORT: u32 = 8;

const EINVAL: u32 = 22;
const ENOENT: u32 = 2;

/// A client with 1 MiB at 0x10000.
fn with_window() -> (Rig, Client) {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    map(&mut client, 0x1_0000, 1 << 20);
    (rig, client)
}

fn map(client: &mut Client, iova: u64, size: u64) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let file = OwnedFd::from(file);
    let body = fields!(32_u32, 3_u32, 0_u64, iova, size);
    client.call_with(DMA_MAP, &body, &[file.as_fd()]).unwrap();
}

fn write(rig: &Rig, iova: u64) {
    let access = rig.device().handles.dma.access(&[Span::write(iova, 1)]).unwrap();
    access.write(0, 0, &[1]).unwrap();
}

fn start(page_size: u64, ranges: &[(u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(ranges.len()).unwrap();
    let mut body = fields!(24 + 16 * count, START | SET, page_size, count, 0_u32);
    ranges.iter().for_each(|(iova, length)| body.extend(fields!(*iova, *length)));
    body
}

fn stop() -> Vec<u8> {
    fields!(8_u32, STOP | SET)
}

fn report(client: &mut Client, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>, u32> {
    let bitmap = length.div_ceil(page_size).div_ceil(64) * 8;
    let argsz = u32::try_from(32 + bitmap).unwrap();
    let body = fields!(argsz, REPORT | GET, iova, length, page_size);
    let reply = client.call(FEATURE, &body)?;
    assert_eq!(reply[..32], body[..32], "what was asked for is repeated");
    assert_eq!(reply.len(), usize::try_from(argsz).unwrap());
    Ok(reply[32..].as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
}

#[test]
fn what_is_written_is_reported_once_in_pages_of_any_size() {
    let (rig, mut client) = with_window();
    write(&rig, 0x1_0000);
    assert_eq!(report(&mut client, 0x1_0000, 1 << 20, 4096), Err(EINVAL), "not started");
    let body = start(4096, &[]);
    assert_eq!(client.call(FEATURE, &body), Ok(body.clone()));
    assert_eq!(client.call(FEATURE, &body), Ok(body), "the same once more");
    assert_eq!(client.call(FEATURE, &start(8192, &[])), Err(EINVAL), "another size");
    assert_eq!(report(&mut client, 0x1_0000, 1 << 20, 4096), Ok(vec![0; 4]), "written before");

    write(&rig, 0x1_0000);
    write(&rig, 0x1_5123);
    write(&rig, 0x1_0000 + 64 * 4096);
    assert_eq!(report(&mut client, 0x1_0000, 1 << 20, 4096), Ok(vec![0b10_0001, 1, 0, 0]));
    assert_eq!(report(&mut client, 0x1_0000, 1 << 20, 4096), Ok(vec![0; 4]), "once");

    write(&rig, 0x1_5123);
    assert_eq!(report(&mut client, 0x1_4000, 0x2000, 4096), Ok(vec![0b10]), "a part");
    write(&rig, 0x1_5123);
    assert_eq!(report(&mut client, 0x1_0000, 1 << 20, 0x8000), Ok(vec![1]), "coarser");

    map(&mut client, 0x100_0000, 0x2000);
    write(&rig, 0x100_1000);
    assert_eq!(report(&mut client, 0x100_0000, 0x2000, 4096), Ok(vec![0b10]), "mapped later");

    assert_eq!(client.call(FEATURE, &stop()), Ok(stop()));
    assert_eq!(report(&mut client, 0x1_0000, 1 << 20, 4096), Err(EINVAL));
    drop(client);
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let (_rig, mut client) = with_window();
    client.call(FEATURE, &start(4096, &[(0x1_0000, 0x1000)])).unwrap();
    for body in [
        start(0, &[]),
        start(4097, &[]),
        start(4096, &[(0, 0)]),
        start(4096, &[(u64::MAX, 2)]),
        fields!(24_u32, START | SET, 4096_u64, 1_u32, 0_u32),
        fields!(24_u32, START | GET, 4096_u64, 0_u32, 0_u32),
        fields!(7_u32, STOP | SET),
        fields!(8_u32, STOP | GET),
        fields!(40_u32, REPORT | SET, 0_u64, 0x1000_u64, 4096_u64),
        fields!(39_u32, REPORT | GET, 0_u64, 0x1000_u64, 4096_u64),
        fields!(40_u32, REPORT | GET, 0_u64, 0x1000_u64, 0_u64),
        fields!(40_u32, REPORT | GET, 0_u64, 0x1000_u64, 4095_u64),
        fields!(40_u32, REPORT | GET, 0_u64, 0x1000_u64, 2048_u64),
        fields!(40_u32, REPORT | GET, 0_u64, 0_u64, 4096_u64),
        fields!(40_u32, REPORT | GET, u64::MAX, 0x1000_u64, 4096_u64),
        fields!(u32::MAX, REPORT | GET, 0_u64, u64::MAX, 4096_u64),
        fields!(32_u32, REPORT | GET, 0_u64, 0x1000_u64),
    ] {
        assert_eq!(client.call(FEATURE, &body), Err(EINVAL), "{body:?}");
    }
    drop(client);
}

#[test]
fn what_can_be_probed_is_repeated_and_all_of_it_has_to_be_there() {
    let (_rig, mut client) = with_window();
    for (feature, operations) in [
        (1, GET),
        (2, GET),
        (2, SET),
        (2, GET | SET),
        (2, 0),
        (6, SET),
        (7, SET),
        (8, GET),
        (9, GET),
    ] {
        let body = fields!(8_u32, feature | operations | PROBE);
        assert_eq!(client.call(FEATURE, &body), Ok(body.clone()), "{feature}");
    }
    for (feature, operations) in [(1, SET), (1, GET | SET), (6, GET), (8, SET), (3, SET), (0, 0)] {
        let body = fields!(8_u32, feature | operations | PROBE);
        assert_eq!(client.call(FEATURE, &body), Err(EINVAL), "{feature}");
    }
    for flags in [2 | GET | SET, 2, 2 | GET | 1 << 19] {
        let body = fields!(16_u32, flags, 2_u32, 0_u32);
        assert_eq!(client.call(FEATURE, &body), Err(EINVAL), "{flags:#x}");
    }
    drop(client);
}

#[test]
fn an_unmapping_can_report_what_was_written() {
    let (rig, mut client) = with_window();
    let unmap = |argsz: u32, page_size: u64, bitmap: u64| {
        fields!(argsz, 1_u32, 0x1_0000_u64, 1_u64 << 20, page_size, bitmap)
    };
    assert_eq!(client.call(DMA_UNMAP, &unmap(72, 4096, 32)), Err(EINVAL), "not started");
    client.call(FEATURE, &start(4096, &[])).unwrap();
    write(&rig, 0x1_3000);
    for wrong in [
        unmap(71, 4096, 32),
        unmap(72, 4096, 24),
        unmap(72, 4097, 32),
        unmap(72, 0, 32),
        unmap(u32::MAX, 4096, u64::MAX),
        unmap((1 << 20) + 1, 4096, 32),
        unmap(u32::MAX, 4096, (1 << 20) + 8),
        fields!(72_u32, 1_u32, 0x1_0000_u64, 1_u64 << 20),
        fields!(72_u32, 3_u32, 0_u64, 0_u64, 4096_u64, 32_u64),
    ] {
        assert_eq!(client.call(DMA_UNMAP, &wrong), Err(EINVAL), "{wrong:?}");
    }
    let other = fields!(72_u32, 1_u32, 0x1_1000_u64, 1_u64 << 19, 4096_u64, 32_u64);
    assert_eq!(client.call(DMA_UNMAP, &other), Err(ENOENT));
    let body = unmap(80, 4096, 40);
    let reply = client.call(DMA_UNMAP, &body).unwrap();
    assert_eq!(reply[..40], body);
    assert_eq!(reply[40..], fields!(0b1000_u64, 0_u64, 0_u64, 0_u64, 0_u64), "as long as was said");
    assert_eq!(rig.parts.memory.windows(), 0);
    drop(client);
}

#[test]
fn a_log_goes_with_its_client() {
    let (rig, mut client) = with_window();
    client.call(FEATURE, &start(4096, &[])).unwrap();
    drop(client);
    let mut client = Client::greeted(rig.connect());
    assert_eq!(report(&mut client, 0x1_0000, 1 << 20, 4096), Err(EINVAL));
    client.call(FEATURE, &start(8192, &[])).expect("as if there had been none");
    drop(client);
}
