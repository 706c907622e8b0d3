//! A frontend with the driver behind it: the rings are built by hand, in a memfd.
//!
//! Every call of the frontend has a deadline, after which its connection is cut: the crate has none.

use crate::child::{PATIENCE, until};
use fastrand::Rng;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Error, Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Descriptors of each ring.
pub(crate) const SIZE: u16 = 16;
/// Room for one ring and its buffers.
const RING: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x3000;
/// Where the data of requests of a block device is.
const BLOCKS: u64 = 0x3400;
/// The most of them that are under way at a time: they have three descriptors each.
const MOST_BLOCKS: u16 = 5;
/// What a driver accepts: version 1.
pub(crate) const ACCEPTED: u64 = 1 << 32;

/// The memory of a guest, with its rings: what stays when device and frontend go.
pub(crate) struct Memory {
    pub(crate) file: File,
    memory: GuestMemoryMmap,
    /// How many requests were put into each ring.
    pushed: Vec<u16>,
}

impl Memory {
    pub(crate) fn new(queues: usize) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        let size = RING * queues as u64;
        file.set_len(size).unwrap();
        let backing = Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let size = usize::try_from(size).unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), size, backing)]);
        Self { file, memory: memory.unwrap(), pushed: vec![0; queues] }
    }

    /// A copy, as a migration makes one.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self { pushed: self.pushed.clone(), ..Self::new(self.pushed.len()) };
        let mut bytes = vec![0; usize::try_from(RING).unwrap() * self.pushed.len()];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        copy.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        copy
    }

    /// Puts one more request into a ring.
    pub(crate) fn push(&mut self, queue: usize) {
        let base = RING * queue as u64;
        let index = self.pushed[queue];
        let slot = u64::from(index % SIZE);
        let descriptor = base + 16 * slot;
        let put_u64 = |value: u64, at| self.memory.write_obj(value, GuestAddress(at)).unwrap();
        put_u64(base + BUFFERS + 64 * slot, descriptor);
        // 64 bytes, for the device to write.
        put_u64(64 | 2 << 32, descriptor + 8);
        let slot_of_avail = GuestAddress(base + AVAIL + 4 + 2 * slot);
        self.memory.write_obj(u16::try_from(slot).unwrap(), slot_of_avail).unwrap();
        self.pushed[queue] = index.wrapping_add(1);
        let at = GuestAddress(base + AVAIL + 2);
        self.memory.store(self.pushed[queue], at, Ordering::Release).unwrap();
    }

    /// Puts one more request of a block device into a ring: its type, a sector, and 512 bytes that are
    /// written there, or read from there into their place.
    pub(crate) fn push_block(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8; 512]) {
        let base = RING * queue as u64;
        let index = self.pushed[queue];
        let place = index % MOST_BLOCKS;
        let header = base + BUFFERS + 32 * u64::from(place);
        let block = base + BLOCKS + 512 * u64::from(place);
        let put = |bytes: &[u8], at| self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        put(&u64::from(kind).to_le_bytes(), header);
        put(&sector.to_le_bytes(), header + 8);
        put(&[0xff], header + 16);
        put(data, block);
        let head = 3 * place;
        let from_device = if kind == 0 { 2 } else { 0 };
        let parts = [(header, 16, 1), (block, 512, 1 | from_device), (header + 16, 1, 2)];
        for (number, (addr, len, flags)) in (head..).zip(parts) {
            let descriptor = base + 16 * u64::from(number);
            put(&addr.to_le_bytes(), descriptor);
            let next = u64::from(number + 1) << 48;
            put(&(len | flags << 32 | next).to_le_bytes(), descriptor + 8);
        }
        put(&head.to_le_bytes(), base + AVAIL + 4 + 2 * u64::from(index % SIZE));
        self.pushed[queue] = index.wrapping_add(1);
        let at = GuestAddress(base + AVAIL + 2);
        self.memory.store(self.pushed[queue], at, Ordering::Release).unwrap();
    }

    /// The status and the data of a request of a block device, by its place in the order of pushing.
    pub(crate) fn block(&self, queue: usize, request: u16) -> (u8, [u8; 512]) {
        let base = RING * queue as u64;
        let place = u64::from(request % MOST_BLOCKS);
        let status = self.memory.read_obj(GuestAddress(base + BUFFERS + 32 * place + 16)).unwrap();
        let mut block = [0; 512];
        self.memory.read_slice(&mut block, GuestAddress(base + BLOCKS + 512 * place)).unwrap();
        (status, block)
    }

    /// As if the device had used a ring that far.
    pub(crate) fn set_used(&self, queue: usize, used: u16) {
        let at = GuestAddress(RING * queue as u64 + USED + 2);
        self.memory.store(used, at, Ordering::Release).unwrap();
    }

    /// How far the device has used a ring.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        let at = GuestAddress(RING * queue as u64 + USED + 2);
        self.memory.load(at, Ordering::Acquire).unwrap()
    }

    /// The number in the buffer of a request, by its place in the order of pushing.
    pub(crate) fn number(&self, queue: usize, request: u16) -> u32 {
        let slot = u64::from(request % SIZE);
        self.memory.read_obj(GuestAddress(RING * queue as u64 + BUFFERS + 64 * slot)).unwrap()
    }

    /// Writes anything to some place of the rings.
    pub(crate) fn scribble(&self, random: &mut Rng) {
        let ring = RING * random.u64(..self.pushed.len() as u64);
        let part = [0, AVAIL, USED, BUFFERS][random.usize(..4)];
        let at = GuestAddress(ring + part + random.u64(..64));
        self.memory.write_slice(&random.u32(..).to_le_bytes(), at).unwrap();
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        let region = self.memory.find_region(GuestAddress(0)).unwrap();
        VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()
    }
}

/// A frontend, connected.
pub(crate) struct Guest {
    frontend: Frontend,
    stream: UnixStream,
    pub(crate) memory: Memory,
    pub(crate) kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

impl Guest {
    /// Connects, and starts no ring yet.
    pub(crate) fn connect(socket: &Path, memory: Memory) -> Self {
        let stream = connect(socket);
        let frontend = Frontend::from_stream(stream.try_clone().unwrap(), 64);
        let eventfds = || memory.pushed.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
        let (kicks, calls) = (eventfds().collect(), eventfds().collect());
        let mut guest = Self { frontend, stream, memory, kicks, calls };
        let region = guest.memory.region();
        guest.ask(|frontend| frontend.set_owner().unwrap());
        let offered = guest.ask(|frontend| frontend.get_features().unwrap());
        assert_eq!(offered & ACCEPTED, ACCEPTED);
        let protocol = guest.ask(|frontend| frontend.get_protocol_features().unwrap());
        guest.ask(|frontend| {
            frontend.set_protocol_features(protocol).unwrap();
            // Every call is answered from now on, also with an error.
            frontend.set_features(ACCEPTED | 1 << 30).unwrap();
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            frontend.set_mem_table(&[region]).unwrap();
        });
        guest
    }

    /// Connects and starts all rings, from the beginning.
    pub(crate) fn start(socket: &Path, queues: usize) -> Self {
        let mut guest = Self::connect(socket, Memory::new(queues));
        for queue in 0..queues {
            guest.start_ring(queue, 0);
        }
        guest
    }

    /// The connection itself, for what no frontend says.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// One call, within the deadline.
    pub(crate) fn ask<T>(&mut self, call: impl FnOnce(&mut Frontend) -> T) -> T {
        let (done, wait) = sync_channel::<()>(0);
        let stream = self.stream.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if wait.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    // It may be gone already.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            });
            let answer = call(&mut self.frontend);
            drop(done);
            answer
        })
    }

    pub(crate) fn offered(&mut self) -> (u64, VhostUserProtocolFeatures) {
        self.ask(|frontend| {
            (frontend.get_features().unwrap(), frontend.get_protocol_features().unwrap())
        })
    }

    /// Starts a ring at an index, as QEMU does.
    pub(crate) fn start_ring(&mut self, queue: usize, base: u16) {
        let (kick, call) =
            (self.kicks[queue].try_clone().unwrap(), self.calls[queue].try_clone().unwrap());
        let at = self.memory.region().userspace_addr + RING * queue as u64;
        self.ask(|frontend| {
            let config = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: at,
                used_ring_addr: at + USED,
                avail_ring_addr: at + AVAIL,
                log_addr: None,
            };
            frontend.set_vring_call(queue, &call).unwrap();
            frontend.set_vring_num(queue, SIZE).unwrap();
            frontend.set_vring_base(queue, base).unwrap();
            frontend.set_vring_addr(queue, &config).unwrap();
            frontend.set_vring_kick(queue, &kick).unwrap();
            frontend.set_vring_enable(queue, true).unwrap();
        });
    }

    /// Starts all rings where they are, after a reset.
    pub(crate) fn start_again(&mut self) {
        self.ask(|frontend| frontend.set_features(ACCEPTED | 1 << 30).unwrap());
        for queue in 0..self.kicks.len() {
            self.start_ring(queue, self.memory.used(queue));
        }
    }

    /// Stops a ring; where it was.
    pub(crate) fn stop_ring(&mut self, queue: usize) -> u16 {
        let base = self.ask(|frontend| {
            frontend.set_vring_enable(queue, false).unwrap();
            frontend.get_vring_base(queue).unwrap()
        });
        u16::try_from(base).unwrap()
    }

    /// Has the pages logged that the device writes.
    pub(crate) fn log_dirty(&mut self, log: &File) {
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.metadata().unwrap().len(),
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        self.ask(|frontend| {
            frontend.set_log_base(0, Some(region)).unwrap();
            frontend.set_features(ACCEPTED | 1 << 30 | 1 << 26).unwrap();
        });
    }

    pub(crate) fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.ask(|frontend| frontend.get_config(0, 8, flags, &[0; 8]).unwrap().1)
    }

    pub(crate) fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        let set = |frontend: &mut Frontend| {
            frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, data)
        };
        self.ask(set).map_err(|error| match error {
            vhost::Error::VhostUserProtocol(error) => error,
            other => panic!("{other}"),
        })
    }

    /// Puts one more request into a ring, and kicks.
    pub(crate) fn push(&mut self, queue: usize) {
        self.memory.push(queue);
        self.kicks[queue].write(1).unwrap();
    }

    /// As [`push`](Self::push), for a block device.
    pub(crate) fn push_block(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8; 512]) {
        self.memory.push_block(queue, kind, sector, data);
        self.kicks[queue].write(1).unwrap();
    }

    /// Waits, as a guest does, for signals until the device has used a ring that far.
    pub(crate) fn wait_used(&self, queue: usize, used: u16) {
        let begin = Instant::now();
        while self.memory.used(queue) != used {
            let found = self.memory.used(queue);
            let left = PATIENCE.saturating_sub(begin.elapsed());
            assert!(
                is_readable(&self.calls[queue], left),
                "no signal: the device has used {found} of ring {queue}, not {used}"
            );
            // The next look at the ring decides.
            let _ = self.calls[queue].read();
        }
    }

    /// Returns once the device has seen all kicks of a ring so far, and has come back for another.
    pub(crate) fn settle(&self, queue: usize) {
        for _ in 0..2 {
            self.kicks[queue].write(1).unwrap();
            let kick = &self.kicks[queue];
            until("the kick is seen", || !is_readable(kick, Duration::ZERO));
        }
    }

    /// Whether the device has signalled since this was asked last.
    pub(crate) fn was_signalled(&self, queue: usize) -> bool {
        self.calls[queue].read().is_ok()
    }

    /// The frontend goes; the guest's memory stays.
    pub(crate) fn disconnect(self) -> Memory {
        self.memory
    }
}

/// Whether an eventfd can be read, within that time.
fn is_readable(eventfd: &EventFd, within: Duration) -> bool {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), event).unwrap();
    let milliseconds = i32::try_from(within.as_millis()).unwrap();
    epoll.wait(milliseconds, &mut [EpollEvent::default()]).unwrap() == 1
}

/// Connects once the device listens.
fn connect(socket: &Path) -> UnixStream {
    let mut stream = None;
    until("the device listens", || {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    stream.unwrap()
}
