//! A virtio block device over vhost-user: a disk whose blocks are those of a file.
//!
//! [`VhostUserBlk`] is a backend of the crate `vhost-user-backend`, made to stand still: each request
//! passes the [`PopGate`] that it was built with, and what was taken out of a ring is answered in the
//! order of the ring, whatever finishes when. So the used index of a ring is always a clean boundary,
//! and a device process that was killed is followed by one that goes on there.
//!
//! | | |
//! |---|---|
//! | requests | read, write, flush, get-id, discard, write-zeroes |
//! | rings | split; indirect descriptors, event index; one thread for each queue |
//! | cache mode | writeback; writethrough for a driver that does not flush |
//! | I/O | the page cache is read and written at once; all else goes through `io_uring`, or is waited for where the kernel gives none |
//!
//! What a guest puts into a ring is not trusted: a request that makes no sense fails, or is handed back
//! without an answer where there is no room for one, and a ring that makes none is not served any more.
//!
//! # Its lock
//!
//! An image that is written to is locked exclusively (`flock`), which proves, when its device process
//! was killed, that nothing of it is under way any more. One that is only read may be locked by
//! several devices at once; but with direct I/O it is locked exclusively as well, since such reads go
//! on writing to guest memory after their process has ended.
//!
//! It is locked as long as the process lives, or only while a ring is started ([`Lock`]), for devices
//! that hand a disk over to each other. In that case no two of them ever have I/O under way at a time:
//! a device has the lock from before it pops its first request until the last one is answered, through
//! the open file that its I/O goes through; and for what a killed one has left the kernel keeps it. But
//! whether it is free says nothing of one certain process any more. So that process has another file
//! locked as long as it lives, which is part of each of its `io_uring`s: the kernel lets go of that when
//! the last request of these has ended.

#![deny(unsafe_code)]

mod buffers;
mod config;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod image;
mod lock;
mod request;
mod state;
mod uring;
mod window;
mod work;

pub use image::ImageError;

use crate::device::{DeviceError, StateVersion};
use crate::vhost_user::{PopGate, SaveState, VhostUser, Workers};
use config::ConfigSpace;
use engine::{Engine, Parts};
use image::Image;
use lock::ImageLock;
use state::Identity;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use thiserror::Error;
use uring::Ring;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringRwLock};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use work::{Mode, SERIAL};

/// What the device is called.
pub const KIND: &str = "vhost-user-blk";
/// The most queues: each has a thread, and the threads are told apart by a mask of 64 bits.
pub const MAX_QUEUES: u16 = 64;
/// The most requests of a ring.
pub const MAX_QUEUE_SIZE: usize = 1024;
/// The longest serial number in bytes.
pub const MAX_SERIAL: usize = SERIAL;

/// Size of a sector in bytes: the unit of the protocol, whatever the size of the disk's blocks.
const SECTOR: u32 = 512;

/// Guest memory with the log of dirty pages.
type Memory = GuestMemoryMmap<BitmapMmapRegion>;
type Vring = VringRwLock<GuestMemoryAtomic<Memory>>;

/// When an image is locked. One that is only read through the page cache is locked shared, as long as the
/// process lives, whatever is said here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lock {
    /// As long as the device process lives.
    Process,
    /// While a ring is started: what a device has to say that takes part in a live migration, at either
    /// end. Requests wait while another process has the lock.
    Rings {
        /// A file for this device alone, beside its socket for example. It is made if it is not there,
        /// stays, and is locked as long as the device process lives: that is what a fence waits for.
        proof: PathBuf,
    },
}

/// How a disk is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// The image: a file or a block device; its size is the disk's.
    pub file: PathBuf,
    /// Number of request queues, 1 to [`MAX_QUEUES`]; each has a thread.
    pub queues: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// The page cache is passed by (`O_DIRECT`). The disk's blocks have the size that the file needs
    /// then.
    pub direct: bool,
    /// The serial number that a guest sees; at most [`MAX_SERIAL`] bytes.
    pub serial: String,
    /// How long each request waits before it is begun, for experiments with a slow disk.
    pub delay: Duration,
    /// Do without `io_uring`, also where there is one.
    pub without_io_uring: bool,
    /// When the image is locked.
    pub lock: Lock,
}

impl BlockConfig {
    /// A disk of this image: one queue, read and written through the page cache, without a serial
    /// number and without delays, locked as long as its process lives.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            queues: 1,
            read_only: false,
            direct: false,
            serial: String::new(),
            delay: Duration::ZERO,
            without_io_uring: false,
            lock: Lock::Process,
        }
    }
}

/// A disk that cannot be made.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The image is none.
    #[error("the image cannot be used")]
    Image(#[from] ImageError),
    /// None, or more than [`MAX_QUEUES`].
    #[error("{0} queues are not 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// Longer than [`MAX_SERIAL`] bytes, or with a NUL.
    #[error("the serial number {0:?} has more than {MAX_SERIAL} bytes, or a NUL")]
    Serial(String),
    /// An fd cannot be duplicated.
    #[error("an fd cannot be duplicated")]
    Fd(#[source] io::Error),
}

/// The device. See the [module](self).
pub struct VhostUserBlk {
    image: Arc<Image>,
    /// The image's lock if it is had while a ring is started, and what is locked as long as the process
    /// lives then.
    shared: Option<Shared>,
    config: ConfigSpace,
    identity: Identity,
    engines: Vec<Mutex<Engine>>,
    /// That of the present connection.
    memory: RwLock<Option<GuestMemoryAtomic<Memory>>>,
    acked_features: AtomicU64,
}

struct Shared {
    lock: ImageLock,
    proof: File,
}

impl std::fmt::Debug for VhostUserBlk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostUserBlk").field("config", &self.config).finish_non_exhaustive()
    }
}

impl VhostUserBlk {
    /// Opens the image and makes the device. `pops` has as many queues as the device.
    ///
    /// The image is not locked yet, unless it is only read: give [`backing_file`](Self::backing_file)
    /// to the runtime. With [`Lock::Rings`] that is not the image, which [`device`](Self::device) alone
    /// sees to.
    ///
    /// # Errors
    ///
    /// [`BlockError`].
    pub fn build(config: &BlockConfig, pops: &PopGate) -> Result<Self, BlockError> {
        let queues = config.queues;
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(BlockError::Queues(queues));
        }
        let serial = serial(&config.serial)?;
        let image = Arc::new(Image::open(&config.file, config.read_only, config.direct)?);
        let shared = match &config.lock {
            Lock::Rings { proof } if image.is_exclusive() => {
                let lock = ImageLock { file: Arc::clone(&image.file), path: config.file.clone() };
                lock.check()?;
                Some(Shared { lock, proof: lock::open_proof(proof)? })
            }
            Lock::Rings { .. } | Lock::Process => None,
        };
        let engine = |queue: u16| {
            Mutex::new(Engine::new(Parts {
                queue: queue.into(),
                image: Arc::clone(&image),
                ring: ring(config, &image, shared.as_ref().map(|shared| &shared.proof)),
                pops: pops.clone(),
                serial,
                delay: config.delay,
                max_requests: MAX_QUEUE_SIZE,
            }))
        };
        let engines = (0..queues).map(engine).collect();
        let disk = image.disk;
        let space =
            ConfigSpace { size: disk.size, block: disk.block, queues, read_only: disk.read_only };
        let identity =
            Identity { size: disk.size, block: disk.block, read_only: disk.read_only, serial };
        Ok(Self {
            image,
            shared,
            config: space,
            identity,
            engines,
            memory: RwLock::new(None),
            acked_features: AtomicU64::new(0),
        })
    }

    /// Opens the image and makes the device, as [`serve_vhost_user`] takes it.
    ///
    /// [`serve_vhost_user`]: crate::vhost_user::serve_vhost_user
    ///
    /// ```no_run
    /// use standstill_device_proc::ServeOptions;
    /// use standstill_device_proc::devices::vhost_user_blk::{BlockConfig, VhostUserBlk};
    /// use standstill_device_proc::vhost_user::serve_vhost_user;
    ///
    /// fn run() -> Result<(), Box<dyn std::error::Error>> {
    ///     let disk = BlockConfig::new("/srv/vm/disk.img");
    ///     Ok(serve_vhost_user(ServeOptions::new("/run/vm/disk.sock"), || VhostUserBlk::device(&disk))?)
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`BlockError`].
    pub fn device(config: &BlockConfig) -> Result<VhostUser<Arc<Self>>, DeviceError> {
        let pops = PopGate::new(config.queues.into());
        let disk = Arc::new(Self::build(config, &pops).map_err(DeviceError::new)?);
        let backing_file = disk.backing_file().map_err(DeviceError::new)?;
        let completions = disk.completions().map_err(DeviceError::new)?;
        let lock = disk.shared.as_ref().map(|shared| shared.lock.clone());
        let device = VhostUser::new(KIND, disk)
            .holds_permits(pops)
            .completes_in_order()
            .saves_state(StateVersion::default())
            .listens(move |_, workers| listen(&completions, workers));
        let device = match lock {
            Some(lock) => device.claims(lock),
            None => device,
        };
        Ok(match backing_file {
            Some(file) => device.backing_file(file),
            None => device,
        })
    }

    /// The file whose lock proves that a killed device process has ended all that it did, if there is
    /// one: the image, or the file of [`Lock::Rings`]. See the [module](self#its-lock).
    ///
    /// # Errors
    ///
    /// If the fd cannot be duplicated.
    pub fn backing_file(&self) -> Result<Option<OwnedFd>, BlockError> {
        let file = match &self.shared {
            Some(shared) => Some(&shared.proof),
            None => self.image.is_exclusive().then_some(&*self.image.file),
        };
        file.map(|file| file.try_clone().map(OwnedFd::from)).transpose().map_err(BlockError::Fd)
    }

    /// For each queue an fd to be polled by the queue's thread: when it is readable, `handle_event` is
    /// to be called with any event number beyond those of the queues. `None` for a queue that needs
    /// none.
    ///
    /// # Errors
    ///
    /// If an fd cannot be duplicated.
    pub fn completions(&self) -> Result<Vec<Option<OwnedFd>>, BlockError> {
        let of = |engine: &Mutex<Engine>| {
            let fd = engine_of(engine).completions().map(|fd| fd.try_clone_to_owned());
            fd.transpose().map_err(BlockError::Fd)
        };
        self.engines.iter().map(of).collect()
    }

    /// What is written must be stable before it is answered: the driver does not know that it could
    /// flush. The virtio specification, section 5.2.6.2.
    fn is_write_through(&self) -> bool {
        self.acked_features.load(Ordering::Relaxed) & 1 << VIRTIO_BLK_F_FLUSH == 0
    }

    fn restart(&self) {
        self.engines.iter().for_each(|engine| engine_of(engine).restart());
    }
}

impl SaveState for VhostUserBlk {
    /// Writes what tells that another disk is the same one.
    fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        state::save(self.identity, to).map_err(io::Error::other)
    }

    fn load(&self, from: &mut dyn Read) -> io::Result<()> {
        state::load(self.identity, from).map_err(io::Error::other)
    }
}

impl VhostUserBackend for VhostUserBlk {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.engines.len()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let rings = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
        let transport =
            VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        let bits = rings.into_iter().fold(0, |all, bit| all | 1 << bit);
        bits | transport.bits() | self.config.features()
    }

    fn acked_features(&self, features: u64) {
        self.acked_features.store(features, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.acked_features.store(0, Ordering::Relaxed);
        self.restart();
    }

    /// Nothing: each ring knows.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.read(offset, size)
    }

    /// Nothing can be written. Without an error, which would cost the guest its disk.
    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        tracing::debug!(offset, len = buf.len(), "a write to the configuration space is ignored");
        Ok(())
    }

    fn update_memory(&self, mem: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        *self.memory.write().unwrap_or_else(PoisonError::into_inner) = Some(mem);
        self.restart();
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.engines.len()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let flags = EventFlag::CLOEXEC | EventFlag::NONBLOCK;
        let made = new_event_consumer_and_notifier(flags);
        made.inspect_err(|error| tracing::error!(%error, "no eventfd")).ok()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let engine = usize::try_from(queue_index).ok().and_then(|index| self.engines.get(index));
        if let Some(engine) = engine {
            engine_of(engine).restart();
        }
        Ok(())
    }

    /// Serves the queue of the thread, whatever has happened to it.
    ///
    /// # Errors
    ///
    /// The ring cannot be used; said once, until it begins anew.
    fn handle_event(
        &self,
        _device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        // One queue for each thread, so one ring.
        let (Some(engine), Some(vring)) = (self.engines.get(thread_id), vrings.first()) else {
            return Ok(());
        };
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(memory) = memory else { return Ok(()) };
        let mode = Mode { write_through: self.is_write_through() };
        engine_of(engine).run(vring, &memory, mode).map_err(io::Error::other)
    }
}

/// Has each queue's thread hear of its completions.
fn listen(completions: &[Option<OwnedFd>], workers: &Workers<'_>) -> io::Result<()> {
    // Any number beyond those of the queues and of the event that ends a thread.
    let event = completions.len() as u64 + 1;
    let mut of_threads = completions.iter().enumerate();
    of_threads.try_for_each(|(thread, fd)| match fd {
        Some(fd) => workers.listen(thread, fd, event),
        None => Ok(()),
    })
}

/// One for each queue, or none.
fn ring(config: &BlockConfig, image: &Image, proof: Option<&File>) -> Option<Ring> {
    if config.without_io_uring {
        tracing::info!("without io_uring, as was asked for");
        return None;
    }
    let ring = Ring::new(Arc::clone(&image.file), config.delay, proof);
    ring.inspect_err(|error| {
        tracing::warn!(%error, "there is no io_uring: each queue does one request after the other");
    })
    .ok()
}

fn serial(text: &str) -> Result<[u8; SERIAL], BlockError> {
    let mut serial = [0; SERIAL];
    let place = serial.get_mut(..text.len()).filter(|_| !text.contains('\0'));
    place.ok_or_else(|| BlockError::Serial(text.to_owned()))?.copy_from_slice(text.as_bytes());
    Ok(serial)
}

fn engine_of(engine: &Mutex<Engine>) -> MutexGuard<'_, Engine> {
    engine.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
