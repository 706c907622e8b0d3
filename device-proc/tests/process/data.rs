//! What a client sees while the device is stopped and started.

use crate::child::{Device, PATIENCE, until};
use crate::client::{Client, ErrorReply};
use crate::copy::IOVA;
use crate::probe::{COPY, COPY_SIZE, MEMORY_SIZE, NUMBER, RAISE};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use standstill_device_proc::memory::SharedMemory;
use standstill_protocol::message::{DeviceEvent, DeviceMessage, Phase};
use standstill_protocol::migration::MigrationState as S;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// EINVAL.
const REFUSED: ErrorReply = ErrorReply(22);
/// EEXIST.
const EXISTS: ErrorReply = ErrorReply(17);

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn is_raised(eventfd: &OwnedFd) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(eventfd, PollFlags::IN)], Some(&now)) == Ok(1)
}

fn wait_raised(eventfd: &OwnedFd) {
    let patience = PATIENCE.try_into().unwrap();
    assert_eq!(poll(&mut [PollFd::new(eventfd, PollFlags::IN)], Some(&patience)), Ok(1));
}

#[test]
fn registers_are_out_of_reach_while_stopped_and_work_after_the_start() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 11).unwrap();
    client.write_u32(2, 0, 12).unwrap();

    device.go(1, Phase::PrepareStop, S::RunningP2p);
    client.write_u32(0, NUMBER, 21).unwrap();
    device.go(1, Phase::Stop, S::Stop);
    assert_eq!(client.write_u32(0, NUMBER, 31), Err(REFUSED));
    assert_eq!(client.read_u32(0, NUMBER), Err(REFUSED));
    assert_eq!(client.write_u32(2, 0, 32), Err(REFUSED));
    let id = client.read_u32(7, 0).unwrap();
    assert_eq!(id, 0x0001_1af4, "configuration space is served");
    client.write_u32(7, 0x10, 0xffff_ffff).unwrap();
    assert_eq!(client.read_u32(7, 0x10), Ok(0xffff_f000));

    device.go(2, Phase::PrepareStart, S::RunningP2p);
    assert_eq!(client.read_u32(0, NUMBER), Ok(21), "what was refused was not done");
    device.go(2, Phase::Start, S::Running);
    assert_eq!(client.read_u32(2, 0), Ok(12));
    client.write_u32(0, NUMBER, 41).unwrap();
    assert_eq!(client.read_u32(0, NUMBER), Ok(41));
}

#[test]
fn invariant_3_an_interrupt_while_stopped_is_raised_on_the_eventfd_installed_at_the_start() {
    let device = Device::welcomed("raise-when-stopped");
    let mut client = Client::connect(&device.socket());
    let first = new_eventfd();
    client.install_msix(&[first.as_fd()]).unwrap();
    device.pause(1);
    let second = new_eventfd();
    client.install_msix(&[second.as_fd()]).unwrap();
    assert!(!is_raised(&first) && !is_raised(&second));
    device.resume(2);
    wait_raised(&second);
    assert!(!is_raised(&first));
}

#[test]
fn an_interrupt_while_running_is_raised_at_once() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    let vectors = [new_eventfd(), new_eventfd()];
    client.install_msix(&[vectors[0].as_fd(), vectors[1].as_fd()]).unwrap();
    client.write_u32(0, RAISE, 1).unwrap();
    assert!(is_raised(&vectors[1]) && !is_raised(&vectors[0]));
}

#[test]
fn a_client_that_comes_back_finds_the_device_as_it_was() {
    let device = Device::welcomed("");
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(1 << 16).unwrap();
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 7).unwrap();
    client.dma_map(0, 1 << 16, ram.as_fd()).unwrap();
    assert_eq!(client.dma_map(0, 1 << 15, ram.as_fd()), Err(EXISTS), "overlap");
    assert_eq!(device.next(), DeviceMessage::Event(DeviceEvent::ClientConnected));
    drop(client);
    assert_eq!(device.next(), DeviceMessage::Event(DeviceEvent::ClientDisconnected));

    let mut client = Client::connect(&device.socket());
    assert_eq!(client.read_u32(0, NUMBER), Ok(7));
    client.dma_map(0, 1 << 15, ram.as_fd()).expect("the windows went with the first client");
    assert_eq!(device.next(), DeviceMessage::Event(DeviceEvent::ClientConnected));
}

#[test]
fn accesses_outside_their_region_are_refused() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    let size = MEMORY_SIZE;
    for (region, offset, count) in [
        (0, 4096, 4),
        (0, 4094, 4),
        (0, u64::MAX, 4),
        (1, 0, 4),
        (2, size - 2, 4),
        (2, 0, u32::try_from(size).unwrap() + 1),
        (6, 0, 4),
        (7, 254, 4),
        (8, 0, 4),
    ] {
        let found = client.read(region, offset, count);
        assert_eq!(found, Err(REFUSED), "region {region}, {count} bytes at {offset:#x}");
    }
    assert!(client.read(9, 0, 4).is_err(), "no such region");
    assert_eq!(client.read(0, 0, 3), Err(REFUSED), "no width of a register");
    assert_eq!(client.read(2, 0, u32::try_from(size).unwrap()).unwrap().len(), 256 << 10);
    assert_eq!(client.read(7, 0, 256).unwrap().len(), 256);
}

#[test]
fn a_reset_by_the_client_is_for_running_devices() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 7).unwrap();
    client.reset().unwrap();
    assert_eq!(client.read_u32(0, NUMBER), Ok(0));
    device.pause(1);
    assert_eq!(client.reset(), Err(REFUSED));
    device.resume(2);
    client.reset().unwrap();
    client.write_u32(0, NUMBER, 8).expect("accesses are open again");
}

#[test]
fn the_msix_table_keeps_what_is_written() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    client.write_u32(5, 16, 0xfee0_0000).unwrap();
    assert_eq!(client.read_u32(5, 16), Ok(0xfee0_0000));
    assert_eq!(client.read_u32(5, 0), Ok(0));
}

#[test]
fn the_crates_own_client_sees_the_regions_and_maps_the_memory() {
    let device = Device::welcomed("");
    let mut client = vfio_user::Client::new(&device.socket()).unwrap();
    let region = client.region(2).unwrap();
    assert_eq!((region.size, region.sparse_areas.len()), (MEMORY_SIZE, 1));
    let mapped = region.file_offset.as_ref().expect("the fd came");
    assert_eq!(mapped.file().metadata().unwrap().len(), MEMORY_SIZE);
    assert!(client.region(0).unwrap().file_offset.is_none());
    assert_eq!(client.get_irq_info(2).unwrap().count, 2);
    client.region_write(0, NUMBER, &9_u32.to_le_bytes()).unwrap();
    let mut number = [0; 4];
    client.region_read(0, NUMBER, &mut number).unwrap();
    assert_eq!(u32::from_le_bytes(number), 9);
}

#[test]
fn the_crates_own_client_maps_windows_takes_interrupts_and_resets_and_goes() {
    let device = Device::welcomed("");
    let mut client = vfio_user::Client::new(&device.socket()).unwrap();
    let memory = SharedMemory::create("window", 4096).unwrap();
    client.dma_map(0, IOVA, 4096, memory.as_fd().as_raw_fd()).unwrap();
    let iova = u32::try_from(IOVA).unwrap();
    client.region_write(0, COPY, &iova.to_le_bytes()).unwrap();
    memory.store_u64(COPY_SIZE, 1).unwrap();
    let mut last = [0];
    until("the device has written", || {
        memory.read(COPY_SIZE - 1, &mut last).unwrap();
        last != [0]
    });
    // It waits until that has ended.
    client.dma_unmap(IOVA, 4096).unwrap();
    let other = SharedMemory::create("another window", 4096).unwrap();
    client.dma_map(0, IOVA, 4096, other.as_fd().as_raw_fd()).expect("there is room again");

    let vectors = [new_eventfd(), new_eventfd()];
    let fds = vectors.each_ref().map(AsRawFd::as_raw_fd);
    // VFIO_IRQ_SET_DATA_EVENTFD and VFIO_IRQ_SET_ACTION_TRIGGER.
    client.set_irqs(2, 4 | 32, 0, 2, &fds).unwrap();
    client.region_write(0, RAISE, &1_u32.to_le_bytes()).unwrap();
    assert!(is_raised(&vectors[1]) && !is_raised(&vectors[0]));

    client.region_write(0, NUMBER, &7_u32.to_le_bytes()).unwrap();
    client.reset().unwrap();
    let mut number = [9; 4];
    client.region_read(0, NUMBER, &mut number).unwrap();
    assert_eq!(number, [0; 4]);
    client.shutdown().unwrap();
    let mut next = Client::connect(&device.socket());
    next.dma_map(IOVA, 4096, memory.as_fd()).expect("its windows went with it");
}

#[test]
fn a_client_that_talks_nonsense_loses_its_connection_only() {
    let device = Device::welcomed("");
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 7).unwrap();
    client.send_raw(&[0xff; 64]);
    drop(client);
    let mut client = Client::connect(&device.socket());
    assert_eq!(client.read_u32(0, NUMBER), Ok(7));
    device.pause(1);
}

#[test]
fn a_greeting_that_cannot_be_taken_is_refused_and_ends_that_connection_only() {
    let device = Device::welcomed("");
    // VERSION of 18 bytes, and one whose text has no end.
    let short = [7, 0, 1, 0, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let endless = [7, 0, 1, 0, 22, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, b'{', b'}'];
    for bytes in [&short[..], &endless[..]] {
        let mut stream = std::os::unix::net::UnixStream::connect(device.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        std::io::Write::write_all(&mut stream, bytes).unwrap();
        let mut answer = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut answer).expect("the connection ends");
        assert_eq!(answer[8..], [0x21, 0, 0, 0, 22, 0, 0, 0], "EINVAL, and nothing else");
    }
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, NUMBER, 7).unwrap();
    device.pause(1);
}

#[test]
fn of_two_clients_at_once_one_is_served_and_the_other_when_that_has_gone() {
    let device = Device::welcomed("");
    let mut first = Client::connect(&device.socket());
    let path = device.socket();
    let (connected, wait) = std::sync::mpsc::channel();
    let second = std::thread::spawn(move || {
        let client = Client::connect(&path);
        connected.send(()).unwrap();
        client
    });
    for number in 0..50 {
        first.write_u32(0, NUMBER, number).unwrap();
        assert_eq!(first.read_u32(0, NUMBER), Ok(number));
    }
    assert!(wait.try_recv().is_err(), "no version for the second one yet");
    drop(first);
    let mut second = second.join().unwrap();
    assert_eq!(second.read_u32(0, NUMBER), Ok(49));
}
