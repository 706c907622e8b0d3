//! The driver of a virtio block device, over vhost-user: the same one for every device that is
//! measured.
//!
//! One queue and one thread. It sleeps on the eventfd of the queue when there is nothing to do, as a
//! guest does that waits for interrupts.

#![expect(unsafe_code, reason = "the device is given pointers to the buffers")]

use super::program::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

/// Longer than any request takes.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) writes: bool,
    pub(crate) order: Order,
    /// Length of a request in bytes.
    pub(crate) length: usize,
    /// How many requests are under way.
    pub(crate) depth: usize,
}

/// Which places are read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Random,
    Sequential,
}

/// A disk, connected.
pub(crate) struct Driver {
    // Before the transport, in whose memory it is.
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completion: Arc<EventFd>,
    buffers: MmapRegion,
    random: fastrand::Rng,
    /// The next place in order.
    next: u64,
    size: u64,
    _transport: Box<VirtioBlkTransport>,
}

impl Driver {
    /// Connects to the device at a socket, a disk of that size in bytes, and asks for at most so many
    /// requests of that length at a time.
    pub(crate) fn connect(
        socket: &Path,
        size: u64,
        most: usize,
        length: usize,
    ) -> Result<Self, Failure> {
        let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        // A driver that does not flush would make a writethrough cache of it.
        let features = features.bits() | VirtioBlkFeatureFlags::FLUSH.bits();
        let path = socket.to_str().ok_or("the path of a socket is no text")?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, features)?);
        // A request has three descriptors.
        let entries = u16::try_from((3 * most).next_power_of_two())?;
        let queue = VirtioBlkQueue::setup_queues(&mut *transport, 1, entries)?;
        let queue = queue.into_iter().next().ok_or("a device without queues")?;
        let memory = File::from(memfd_create("buffers", MemfdFlags::CLOEXEC)?);
        ftruncate(&memory, (most * length) as u64)?;
        let fd = memory.as_raw_fd();
        let buffers =
            MmapRegion::from_file(FileOffset::new(memory.try_clone()?, 0), most * length)?;
        transport.map_mem_region(buffers.as_ptr() as usize, buffers.size(), fd, 0)?;
        Ok(Self {
            queue,
            notifier: transport.get_submission_notifier(0),
            completion: transport.get_completion_fd(0),
            buffers,
            random: fastrand::Rng::with_seed(1),
            next: 0,
            size,
            _transport: transport,
        })
    }

    /// Keeps that many requests under way for as long as is said, and returns how many a second ended.
    pub(crate) fn run(&mut self, load: Load, time: Duration) -> Result<f64, Failure> {
        let begin = Instant::now();
        let mut under_way = 0;
        let mut done = 0_u64;
        for slot in 0..load.depth {
            self.submit(load, slot)?;
            under_way += 1;
        }
        self.notify()?;
        let mut slots = Vec::with_capacity(load.depth);
        while under_way > 0 {
            self.wait_long()?;
            self.take(&mut slots)?;
            done += slots.len() as u64;
            under_way -= slots.len();
            if begin.elapsed() < time {
                for slot in slots.drain(..) {
                    self.submit(load, slot)?;
                    under_way += 1;
                }
                self.notify()?;
            }
            slots.clear();
        }
        Ok(done as f64 / begin.elapsed().as_secs_f64())
    }

    /// Asks for as many requests as the load says, all at once.
    pub(crate) fn begin(&mut self, load: Load) -> Result<(), Failure> {
        (0..load.depth).try_for_each(|slot| self.submit(load, slot))?;
        self.notify()
    }

    /// Waits until that many have ended, and returns when the last one of them did.
    pub(crate) fn end(&mut self, mut requests: usize) -> Result<Instant, Failure> {
        let mut slots = Vec::new();
        while requests > 0 {
            self.wait_long()?;
            self.take(&mut slots)?;
            requests -= slots.len();
            slots.clear();
        }
        Ok(Instant::now())
    }

    /// One more request; its buffer is that of the slot.
    fn submit(&mut self, load: Load, slot: usize) -> Result<(), Failure> {
        let places = self.size / load.length as u64;
        let place = match load.order {
            Order::Random => self.random.u64(..places),
            Order::Sequential => {
                self.next = (self.next + 1) % places;
                self.next
            }
        };
        let (offset, at) = (place * load.length as u64, slot * load.length);
        if at + load.length > self.buffers.size() {
            return Err("there is no such buffer".into());
        }
        // SAFETY: within the mapping, as was just seen.
        let buffer = unsafe { self.buffers.as_ptr().add(at) };
        if load.writes {
            // SAFETY: the buffer is mapped as long as the queue, which is dropped before it, and nobody
            // looks into it.
            unsafe { self.queue.write_raw(offset, buffer, load.length, slot) }?;
        } else {
            // SAFETY: as for the write.
            unsafe { self.queue.read_raw(offset, buffer, load.length, slot) }?;
        }
        Ok(())
    }

    fn notify(&mut self) -> Result<(), Failure> {
        if self.queue.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }

    /// How many requests have ended; waits so long if none has.
    pub(crate) fn look(&mut self, within: Duration) -> Result<usize, Failure> {
        self.wait(&Timespec::try_from(within)?)?;
        let mut slots = Vec::new();
        self.take(&mut slots)?;
        Ok(slots.len())
    }

    /// Returns once something has ended, or the time is over; false if nothing has.
    fn wait(&mut self, within: &Timespec) -> Result<bool, Failure> {
        self.queue.set_used_notif_enabled(true);
        let mut has_ended = self.queue.completions().has_next();
        while !has_ended {
            // SAFETY: it is open as long as it is borrowed.
            let fd = unsafe { BorrowedFd::borrow_raw(self.completion.as_raw_fd()) };
            if poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(within))? == 0 {
                break;
            }
            self.completion.read()?;
            has_ended = self.queue.completions().has_next();
        }
        self.queue.set_used_notif_enabled(false);
        Ok(has_ended)
    }

    /// Returns once something has ended.
    fn wait_long(&mut self) -> Result<(), Failure> {
        if self.wait(&PATIENCE)? { Ok(()) } else { Err("a request does not end".into()) }
    }

    /// The slots of what has ended.
    fn take(&mut self, slots: &mut Vec<usize>) -> Result<(), Failure> {
        for completion in self.queue.completions() {
            if completion.ret != 0 {
                return Err(format!("a request has failed: {}", completion.ret).into());
            }
            slots.push(completion.context);
        }
        Ok(())
    }
}
