//! Our client with the server of the crate `vfio_user`, within what that can do.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use standstill_vfio_user::client::{Client, ClientError};
use standstill_vfio_user::wire::{
    DMA_READABLE, DMA_WRITABLE, DmaMap, Errno, IrqInfo as OurIrqInfo, PCI_IRQS, PCI_REGIONS,
    REGION_MAPPABLE, REGION_READABLE, REGION_WRITABLE, SparseArea as OurSparseArea,
};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;
use vfio_bindings::bindings::vfio::{vfio_region_info, vfio_region_sparse_mmap_area};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The region that is memory, and its size.
const MEMORY: u32 = 2;
const SIZE: usize = 4 << 20;

/// What the backend was told.
#[derive(Debug, PartialEq)]
enum Told {
    Map { flags: u32, offset: u64, address: u64, size: u64, file: Option<u64> },
    Unmap { address: u64, size: u64 },
    Reset,
    Irqs { index: u32, flags: u32, start: u32, count: u32, fds: usize },
}

/// A region of memory; the others read as their number. Writes 1 to eventfds that it is given.
struct Backend {
    memory: Vec<u8>,
    told: Sender<Told>,
}

impl Backend {
    fn tell(&self, told: Told) {
        self.told.send(told).expect("heard");
    }
}

fn place(offset: u64, size: usize) -> Result<std::ops::Range<usize>, io::Error> {
    let start = usize::try_from(offset).ok().filter(|start| start + size <= SIZE);
    start.map(|start| start..start + size).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), io::Error> {
        if region == MEMORY {
            data.copy_from_slice(&self.memory[place(offset, data.len())?]);
        } else {
            data.fill(u8::try_from(region).expect("small"));
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        if region != MEMORY {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.memory[place(offset, data.len())?].copy_from_slice(data);
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> Result<(), io::Error> {
        let file = fd.map(|file| file.metadata().expect("a file").len());
        self.tell(Told::Map { flags: flags.bits(), offset, address, size, file });
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> Result<(), io::Error> {
        self.tell(Told::Unmap { address, size });
        Ok(())
    }

    fn reset(&mut self) -> Result<(), io::Error> {
        self.tell(Told::Reset);
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> Result<(), io::Error> {
        self.tell(Told::Irqs { index, flags, start, count, fds: fds.len() });
        fds.iter().try_for_each(|mut fd| fd.write_all(&1_u64.to_ne_bytes()))
    }
}

fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_create("memory", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, size).expect("a size");
    fd
}

fn regions(memory: &OwnedFd) -> Vec<ServerRegion> {
    let region = |index| {
        let (flags, size) = match index {
            MEMORY => (REGION_READABLE | REGION_WRITABLE | REGION_MAPPABLE, SIZE as u64),
            7 => (REGION_READABLE | REGION_WRITABLE, 256),
            _ => (0, 0),
        };
        let region_info =
            vfio_region_info { argsz: 32, flags, index, cap_offset: 0, size, offset: 0 };
        let areas = [(0x1000, 0x2000), (0x8000, 0x1000)];
        let area =
            |(offset, size)| SparseArea { area: vfio_region_sparse_mmap_area { offset, size } };
        let mappable = index == MEMORY;
        ServerRegion {
            region_info,
            sparse_areas: if mappable { areas.map(area).to_vec() } else { Vec::new() },
            mmap_fd: mappable.then(|| memory.as_raw_fd()),
        }
    };
    (0..PCI_REGIONS).map(region).collect()
}

/// Runs a client against the crate's server.
fn session(run: impl FnOnce(Client, Receiver<Told>)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("device.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let (told, hears) = channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let memory = memfd(SIZE as u64);
            let irqs = (0..PCI_IRQS).map(|index| IrqInfo { index, flags: 1, count: 4 }).collect();
            let server = Server::from_owned_fd(listener.into(), true, irqs, regions(&memory));
            let mut backend = Backend { memory: vec![0; SIZE], told };
            server.run(&mut backend).expect("served to the end");
        });
        let client = Client::builder().timeout(PATIENCE).connect(&path).expect("a client");
        run(client, hears);
    });
}

#[test]
fn what_the_device_is_like() {
    session(|client, _hears| {
        assert_eq!(client.version(), (0, 0));
        let info = client.device_info().expect("an answer");
        assert!(info.is_pci() && info.is_resettable());
        assert_eq!((info.num_regions, info.num_irqs), (PCI_REGIONS, PCI_IRQS));
        for index in 0..PCI_REGIONS {
            let region = client.region_info(index).expect("a region");
            assert_eq!(region.info.index, index);
            assert_eq!(region.fd.is_some(), index == MEMORY);
            if index == MEMORY {
                assert_eq!(region.info.size, SIZE as u64);
                let areas = [(0x1000, 0x2000), (0x8000, 0x1000)];
                let area = |(offset, size)| OurSparseArea { offset, size };
                assert_eq!(region.info.sparse, Some(areas.map(area).to_vec()));
                let file = fstat(region.fd.expect("its file")).expect("a file");
                assert_eq!(file.st_size, i64::try_from(SIZE).expect("small"));
            }
        }
        let irq = client.irq_info(2).expect("an answer");
        assert_eq!(irq, OurIrqInfo { flags: 1, index: 2, count: 4 });
    });
}

#[test]
fn accesses_of_any_length() {
    session(|client, _hears| {
        let mut id = [0; 4];
        client.region_read(7, 0, &mut id).expect("read");
        assert_eq!(id, [7; 4]);
        // Longer than one transfer.
        let data: Vec<u8> = (0..=250).cycle().take(3 << 20).collect();
        client.region_write(MEMORY, 0x1234, &data).expect("written");
        let mut read = vec![0; data.len()];
        client.region_read(MEMORY, 0x1234, &mut read).expect("read");
        assert!(read == data);
        client.region_write_posted(MEMORY, 0, &[1, 2, 3, 4]).expect("sent");
        client.region_read(MEMORY, 0, &mut id).expect("read");
        assert_eq!(id, [1, 2, 3, 4]);
    });
}

#[test]
fn from_many_threads() {
    session(|client, _hears| {
        thread::scope(|scope| {
            for thread in 0..4_u8 {
                let client = &client;
                scope.spawn(move || {
                    for round in 0..200_u8 {
                        let at = u64::from(thread) * 64;
                        client.region_write(MEMORY, at, &[thread, round]).expect("written");
                        let mut read = [0; 2];
                        client.region_read(MEMORY, at, &mut read).expect("read");
                        assert_eq!(read, [thread, round]);
                    }
                });
            }
        });
    });
}

/// The crate answers errors without a number, but for one.
#[test]
fn refusals() {
    session(|client, _hears| {
        let errno = |result: Result<(), ClientError>| result.expect_err("refused").errno();
        assert_eq!(errno(client.region_write(0, 0, &[1])), Some(Errno::EIO));
        assert_eq!(errno(client.region_read(MEMORY, SIZE as u64, &mut [0])), Some(Errno::EIO));
        assert_eq!(errno(client.region_read(99, 0, &mut [0])), Some(Errno::EINVAL));
        assert_eq!(errno(client.region_info(99).map(drop)), Some(Errno::EINVAL));
        assert_eq!(errno(client.irq_info(99).map(drop)), Some(Errno::EINVAL));
        // It goes on.
        let mut id = [0; 4];
        client.region_read(7, 0, &mut id).expect("read");
        assert_eq!(id, [7; 4]);
    });
}

#[test]
fn memory_interrupts_and_reset() {
    session(|client, hears| {
        let hear = || hears.recv_timeout(PATIENCE).expect("told");
        let flags = DMA_READABLE | DMA_WRITABLE;
        let map = DmaMap { flags, offset: 0x1000, iova: 0x10_0000, size: 0x2000 };
        client.dma_map(&map, Some(memfd(0x5000).as_fd())).expect("mapped");
        let DmaMap { offset, iova: address, size, .. } = map;
        assert_eq!(hear(), Told::Map { flags, offset, address, size, file: Some(0x5000) });
        let map = DmaMap { flags: DMA_READABLE, offset: 0, iova: 0x20_0000, size: 0x1000 };
        client.dma_map(&map, None).expect("mapped");
        let DmaMap { flags, offset, iova: address, size } = map;
        assert_eq!(hear(), Told::Map { flags, offset, address, size, file: None });
        client.dma_unmap(0x10_0000, 0x2000).expect("unmapped");
        assert_eq!(hear(), Told::Unmap { address: 0x10_0000, size: 0x2000 });

        let eventfds = [(); 3].map(|()| eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"));
        let fds = eventfds.each_ref().map(AsFd::as_fd);
        client.irq_install(2, 1, &fds).expect("installed");
        let mut installed = 0;
        while installed < 3 {
            let Told::Irqs { index: 2, flags, start, count, fds } = hear() else {
                panic!("something else");
            };
            assert_eq!((flags, start), (4 | 32, 1 + installed));
            assert_eq!(usize::try_from(count).expect("small"), fds);
            installed += count;
        }
        for eventfd in &eventfds {
            let mut count = [0; 8];
            assert_eq!(rustix::io::read(eventfd, &mut count), Ok(8), "signalled");
        }
        client.irq_disable(2).expect("disabled");
        assert_eq!(hear(), Told::Irqs { index: 2, flags: 1 | 32, start: 0, count: 0, fds: 0 });

        client.reset().expect("reset");
        assert_eq!(hear(), Told::Reset);
    });
}
