//! The memory of a guest and its driver: what stays when a device and a frontend go.

use super::error::VhostUserError;
use super::ring::{Ring, RingLayout, RingPlace};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How long a device may take from the answer to the signal that says so; long, since tests run on busy
/// machines.
const SIGNAL: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 5_000 });

/// One part of a request: what one descriptor describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// Bytes for the device to read.
    Readable(&'a [u8]),
    /// Room for that many bytes, for the device to write; 0xee is there before.
    Writable(usize),
}

impl Part<'_> {
    pub(super) const fn len(&self) -> usize {
        match self {
            Self::Readable(bytes) => bytes.len(),
            Self::Writable(length) => *length,
        }
    }
}

/// Names a request of a [`Guest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId {
    /// The queue that it was put into.
    pub queue: usize,
    /// How many were put there before it.
    pub number: u64,
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {} of queue {}", self.number, self.queue)
    }
}

/// A request that the device has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub request: RequestId,
    /// How many bytes the device says that it has written.
    pub written: u32,
    /// What is in the writable parts now, each as a whole.
    pub data: Vec<Vec<u8>>,
}

/// The memory of a guest, with one ring for each queue of a device, and what the driver knows of them.
///
/// The driver believes nothing: an entry of a used ring that is none of its requests, or one that was
/// answered already, is an error. So each request that is [waited for](Self::wait) was answered exactly once.
#[derive(Debug)]
pub struct Guest {
    file: File,
    offset: u64,
    memory: GuestMemoryMmap,
    layout: RingLayout,
    rings: Vec<Driven>,
}

#[derive(Debug)]
struct Driven {
    ring: Ring,
    kick: Watched,
    call: Watched,
}

/// An eventfd that can be waited for.
#[derive(Debug)]
struct Watched {
    eventfd: Arc<EventFd>,
    epoll: Epoll,
}

impl Guest {
    /// Memory of its own, a memfd, with that many rings of the usual [layout](RingLayout).
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Layout`] if there are no rings, or more than 64; and if the system has no memory
    /// or no eventfds.
    pub fn new(queues: usize) -> Result<Self, VhostUserError> {
        Self::with_layout(queues, RingLayout::default())
    }

    /// As [`new`](Self::new), with rings of that layout.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_layout(queues: usize, layout: RingLayout) -> Result<Self, VhostUserError> {
        let made = memfd_create("guest", MemfdFlags::CLOEXEC);
        let file = File::from(made.map_err(|error| system("make guest memory")(error.into()))?);
        file.set_len(layout.size(queues)).map_err(system("make guest memory"))?;
        Self::in_file(file, 0, queues, layout)
    }

    /// As [`with_layout`](Self::with_layout), in a part of some guest memory: `offset` is in bytes, a
    /// multiple of the page size, and [`RingLayout::size`] bytes follow it, all 0. For the device guest
    /// memory is that part alone, and begins at the guest address 0.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and if the file is too short or cannot be mapped.
    pub fn in_file(
        file: File,
        offset: u64,
        queues: usize,
        layout: RingLayout,
    ) -> Result<Self, VhostUserError> {
        if !layout.is_possible(queues) {
            let RingLayout { descriptors, buffer } = layout;
            return Err(VhostUserError::Layout { queues, descriptors, buffer });
        }
        let what = "map guest memory";
        let backing = FileOffset::new(file.try_clone().map_err(system(what))?, offset);
        let size = usize::try_from(layout.size(queues));
        let size = size.map_err(|error| system(what)(io::Error::other(error)))?;
        let regions = [(GuestAddress(0), size, Some(backing))];
        let memory = GuestMemoryMmap::from_ranges_with_files(regions)
            .map_err(|error| VhostUserError::Memory(error.into()))?;
        let driven = |queue| Driven::new(Ring::new(queue, layout));
        let rings = (0..queues).map(driven).collect::<Result<_, _>>()?;
        Ok(Self { file, offset, memory, layout, rings })
    }

    /// Another guest with the same bytes in its memory and the same requests under way, as a migration
    /// makes one. No device may be at work in this one.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn copy(&self) -> Result<Self, VhostUserError> {
        let mut copy = Self::with_layout(self.rings.len(), self.layout)?;
        let what = "copy guest memory";
        let size = usize::try_from(self.layout.size(self.rings.len()));
        let mut bytes = vec![0; size.map_err(|error| system(what)(io::Error::other(error)))?];
        self.file.read_exact_at(&mut bytes, self.offset).map_err(system(what))?;
        copy.file.write_all_at(&bytes, 0).map_err(system(what))?;
        for (own, theirs) in copy.rings.iter_mut().zip(&self.rings) {
            own.ring = theirs.ring.clone();
        }
        Ok(copy)
    }

    /// The file that its memory is in: to be declared as RAM, and to be looked at.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Its memory as it is mapped here, for what no driver does.
    #[must_use]
    pub const fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// How many queues it has.
    #[must_use]
    pub const fn queues(&self) -> usize {
        self.rings.len()
    }

    /// Where a ring is in its memory.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`].
    pub fn place(&self, queue: usize) -> Result<RingPlace, VhostUserError> {
        Ok(self.driven(queue)?.ring.place)
    }

    /// Puts a request into a ring, and tells nobody. What the device reads comes before what it writes.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Full`] if there are not enough free descriptors, [`VhostUserError::Length`] if a
    /// part is longer than a buffer or there is none, [`VhostUserError::NoQueue`].
    pub fn push(&mut self, queue: usize, parts: &[Part<'_>]) -> Result<RequestId, VhostUserError> {
        let (memory, driven) = self.split(queue)?;
        driven.ring.push(memory, parts)
    }

    /// Kicks a ring, whether or not there is something in it.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`], and if the eventfd cannot be written to.
    pub fn kick(&self, queue: usize) -> Result<(), VhostUserError> {
        match self.driven(queue)?.kick.eventfd.write(1) {
            // It is as full as can be: the device has been told.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            written => written.map_err(system("kick a ring")),
        }
    }

    /// Kicks a ring as a driver does: if something was pushed since the last time, and the device wants to
    /// be told. Returns whether it was.
    ///
    /// # Errors
    ///
    /// As [`kick`](Self::kick).
    pub fn notify(&mut self, queue: usize) -> Result<bool, VhostUserError> {
        let (memory, driven) = self.split(queue)?;
        let wants = driven.ring.wants_kick(memory)?;
        if wants {
            self.kick(queue)?;
        }
        Ok(wants)
    }

    /// Does one request: pushes it, tells the device, and waits for its answer. Other answers that come
    /// meanwhile are kept.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push) and [`wait`](Self::wait).
    pub fn request(
        &mut self,
        queue: usize,
        parts: &[Part<'_>],
        within: Duration,
    ) -> Result<Completion, VhostUserError> {
        let request = self.push(queue, parts)?;
        self.answer_to(request, within)
    }

    /// Tells the device, and waits for that answer.
    pub(super) fn answer_to(
        &mut self,
        request: RequestId,
        within: Duration,
    ) -> Result<Completion, VhostUserError> {
        let queue = request.queue;
        self.notify(queue)?;
        let begin = Instant::now();
        let mut others = Vec::new();
        let answered = loop {
            let left = within.saturating_sub(begin.elapsed());
            match self.wait(queue, 1, left) {
                Ok(completions) => others.extend(completions),
                Err(error) => break Err(error),
            }
            if let Some(at) = others.iter().position(|other| other.request == request) {
                break Ok(others.remove(at));
            }
        };
        let kept = &mut self.split(queue)?.1.ring.kept;
        others.append(kept);
        *kept = others;
        answered
    }

    /// The answers that have come since the last time, in the order in which the device gave them.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Used`] if the device breaks the ring, [`VhostUserError::NoQueue`].
    pub fn take_answers(&mut self, queue: usize) -> Result<Vec<Completion>, VhostUserError> {
        let (memory, driven) = self.split(queue)?;
        driven.ring.collect(memory)?;
        Ok(std::mem::take(&mut driven.ring.kept))
    }

    /// Waits, as a guest does, for signals until that many answers have come; there may be more.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Unanswered`] if they do not come within that time, [`VhostUserError::Unsignalled`]
    /// if they do and are not signalled, and as [`take_answers`](Self::take_answers). The answers that have
    /// come are kept.
    pub fn wait(
        &mut self,
        queue: usize,
        wanted: usize,
        within: Duration,
    ) -> Result<Vec<Completion>, VhostUserError> {
        let begin = Instant::now();
        let (memory, driven) = self.split(queue)?;
        let Driven { ring, call, .. } = driven;
        loop {
            ring.want_signal(memory)?;
            let news = ring.collect(memory)?;
            if ring.kept.len() >= wanted {
                return Ok(std::mem::take(&mut ring.kept));
            }
            // What was asked for is the signal of the next one after those.
            let left = within.saturating_sub(begin.elapsed());
            // A device that only signals is not waited for any longer.
            if news > 0 || (call.take_within(left)? && !left.is_zero()) {
                continue;
            }
            // The last answer may have come at the last moment, and its signal a moment later.
            let news = ring.collect(memory)?;
            let answered = ring.kept.len();
            if answered < wanted {
                return Err(VhostUserError::Unanswered { queue, wanted, answered, within });
            }
            if news > 0 && !call.take_within(SIGNAL)? {
                return Err(VhostUserError::Unsignalled { queue, answered, within });
            }
        }
    }

    /// Waits until every request of a queue is answered; all answers that were not taken yet.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_all(
        &mut self,
        queue: usize,
        within: Duration,
    ) -> Result<Vec<Completion>, VhostUserError> {
        let ring = &self.driven(queue)?.ring;
        let wanted = ring.kept.len() + ring.outstanding();
        self.wait(queue, wanted, within)
    }

    /// Whether the device has signalled since this was asked last, or waited for.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`].
    pub fn was_signalled(&self, queue: usize) -> Result<bool, VhostUserError> {
        Ok(self.driven(queue)?.call.take())
    }

    /// Whether the device has yet to take a kick.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`], and if the eventfd cannot be looked at.
    pub fn has_kick(&self, queue: usize) -> Result<bool, VhostUserError> {
        self.driven(queue)?.kick.is_readable_within(Duration::ZERO)
    }

    /// How many requests of a queue are not answered, as far as answers were taken.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`].
    pub fn outstanding(&self, queue: usize) -> Result<usize, VhostUserError> {
        Ok(self.driven(queue)?.ring.outstanding())
    }

    /// How many parts there is room for, as far as answers were taken.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`].
    pub fn room(&self, queue: usize) -> Result<usize, VhostUserError> {
        Ok(self.driven(queue)?.ring.free())
    }

    /// The index of a queue's available ring: how many requests were pushed, modulo 2¹⁶.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`].
    pub fn avail(&self, queue: usize) -> Result<u16, VhostUserError> {
        Ok(self.driven(queue)?.ring.avail)
    }

    /// The index of a queue's used ring, as the device has published it.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`].
    pub fn used(&self, queue: usize) -> Result<u16, VhostUserError> {
        self.driven(queue)?.ring.used(&self.memory)
    }

    /// The region that frontends tell.
    pub(super) fn region(&self) -> Result<VhostUserMemoryRegionInfo, VhostUserError> {
        let no_region = || VhostUserError::Memory("it has no region".into());
        let region = self.memory.find_region(GuestAddress(0)).ok_or_else(no_region)?;
        VhostUserMemoryRegionInfo::from_guest_region(region)
            .map_err(|error| VhostUserError::Memory(error.into()))
    }

    pub(super) const fn descriptors(&self) -> u16 {
        self.layout.descriptors
    }

    pub(super) const fn buffer(&self) -> usize {
        self.layout.buffer as usize
    }

    /// The eventfds of a ring that is to be started: kick and call. A kick that nobody has taken is
    /// forgotten: whoever starts a ring looks into it.
    pub(super) fn begin(
        &mut self,
        queue: usize,
        event_idx: bool,
    ) -> Result<(Arc<EventFd>, Arc<EventFd>), VhostUserError> {
        let (_, driven) = self.split(queue)?;
        driven.ring.event_idx = event_idx;
        driven.kick.take();
        Ok((Arc::clone(&driven.kick.eventfd), Arc::clone(&driven.call.eventfd)))
    }

    fn driven(&self, queue: usize) -> Result<&Driven, VhostUserError> {
        let queues = self.rings.len();
        self.rings.get(queue).ok_or(VhostUserError::NoQueue { queue, queues })
    }

    fn split(&mut self, queue: usize) -> Result<(&GuestMemoryMmap, &mut Driven), VhostUserError> {
        let queues = self.rings.len();
        let driven = self.rings.get_mut(queue).ok_or(VhostUserError::NoQueue { queue, queues })?;
        Ok((&self.memory, driven))
    }
}

impl Driven {
    fn new(ring: Ring) -> Result<Self, VhostUserError> {
        let watched = || Watched::new().map_err(system("make an eventfd"));
        Ok(Self { ring, kick: watched()?, call: watched()? })
    }
}

impl Watched {
    fn new() -> io::Result<Self> {
        let eventfd = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)?;
        Ok(Self { eventfd, epoll })
    }

    /// Makes it 0; whether it was something else.
    fn take(&self) -> bool {
        self.eventfd.read().is_ok()
    }

    /// As [`take`](Self::take), as soon as it is something else.
    fn take_within(&self, within: Duration) -> Result<bool, VhostUserError> {
        Ok(self.is_readable_within(within)? && self.take())
    }

    fn is_readable_within(&self, within: Duration) -> Result<bool, VhostUserError> {
        let begin = Instant::now();
        loop {
            let left = within.saturating_sub(begin.elapsed());
            // Whole milliseconds, and none too few.
            let left = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
            match self.epoll.wait(left, &mut [EpollEvent::default()]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                found => {
                    return found.map(|found| found > 0).map_err(system("wait for an eventfd"));
                }
            }
        }
    }
}

pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> VhostUserError {
    move |source| VhostUserError::System { what, source }
}
