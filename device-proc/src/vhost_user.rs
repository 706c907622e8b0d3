//! The transport for vhost-user: any backend of the `vhost-user-backend` crate as a device process.
//!
//! [`serve_vhost_user`] runs a backend with the crate's own message loop and threads, under the
//! lifecycle of a device process: it stops and starts with its machine, in two phases, whatever VMM is
//! at the other end of its socket. A backend needs no change for it.
//!
//! ```no_run
//! use standstill_device_proc::ServeOptions;
//! use standstill_device_proc::vhost_user::{Backend, VhostUser, serve_vhost_user};
//!
//! fn run<B: Backend>(backend: B) -> Result<(), Box<dyn std::error::Error>> {
//!     let build = || Ok(VhostUser::new("rng", backend).stateless());
//!     Ok(serve_vhost_user(ServeOptions::new("/run/vm/rng.sock"), build)?)
//! }
//! ```
//!
//! # When it stands still
//!
//! A request is in flight from before it is taken out of its ring until the guest is signalled. The
//! device is quiet when nothing is in flight and nothing is taken out any more: that is what
//! [`PopGate`] decides. Requests that wait in their rings stay there, and are found when it starts: every
//! started ring gets a kick then.
//!
//! | a backend that | says | and its requests are in flight |
//! |---|---|---|
//! | does all within `handle_event` | nothing | as long as that takes |
//! | does some of it later | [`holds_permits`](VhostUser::holds_permits) | as long as it holds a [`Popped`] for each |
//!
//! The frontend can stop rings as well (`GET_VRING_BASE`), before, after and while the coordinator stops
//! the device. Either waits for what is in flight, and the device runs when neither stops it.
//!
//! # What is different from the crate alone
//!
//! - An error of `handle_event` would end its thread in silence. Here the rings stop, it is logged, and the
//!   coordinator is told; likewise a ring that cannot be served as the frontend has set it up.
//! - `GET_VRING_BASE`, `RESET_DEVICE` and the end of a connection wait for what is in flight. If that does
//!   not end, the process does ([`drain_deadline`](VhostUser::drain_deadline)).
//! - Frontends can come and go; the socket is there only while one of them would be answered.
//! - The guest is signalled once after a ring is started and after each start of the device.
//! - Features that the crate does not serve are not offered, whatever the backend says.
//!
//! `docs/vhost-user.md` says more, and what a VMM has to do with it.

mod claim;
mod config;
mod core;
mod device;
mod fail_stop;
mod kick;
mod offer;
mod pop_gate;
mod rings;
mod served;
mod server;
mod state;
mod transfers;

pub use crate::serve::serve_vhost_user;
pub(crate) use claim::Claim;
pub use pop_gate::{PopGate, Popped};

use self::core::{Core, Facts};
use crate::device::{DeviceInfo, PciIdentity, StateVersion};
use crate::memory::MemoryMap;
use crate::serve::Built;
use device::VhostUserDevice;
use offer::Offer;
use served::Served;
use standstill_protocol::migration::MigrationFlags;
use std::any::TypeId;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use thiserror::Error;
use vhost_user_backend::bitmap::BitmapReplace;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// The most queues: threads have bit masks of them.
pub const MOST_QUEUES: usize = 64;

/// How long requests in flight may take to end, unless it is said.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// A frontend's memory.
type Memory<B> = GuestMemoryAtomic<GuestMemoryMmap<<B as VhostUserBackend>::Bitmap>>;

/// A backend that can be served: any [`VhostUserBackend`], also behind `Arc`, and any
/// [`VhostUserBackendMut`](vhost_user_backend::VhostUserBackendMut) behind `Mutex` or `RwLock`.
///
/// With [`BitmapMmapRegion`](vhost_user_backend::bitmap::BitmapMmapRegion) as its bitmap, and
/// `LOG_SHMFD` among its protocol features, the pages that it writes are logged for the frontend's
/// migration.
pub trait Backend:
    VhostUserBackend<
        Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
        Vring: Clone + Send + Sync + 'static,
    > + 'static
{
}

impl<B> Backend for B where
    B: VhostUserBackend<
            Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
            Vring: Clone + Send + Sync + 'static,
        > + 'static
{
}

/// A backend with state beside its rings that can be saved and loaded.
pub trait SaveState {
    /// Writes that state: whatever the driver can have changed, such as fields of the configuration
    /// space, and what tells that another process is the same device, such as the size of its disk.
    /// Nothing is in flight. Rings and accepted features are saved by the runtime.
    ///
    /// # Errors
    ///
    /// The state is not saved, and whoever wanted it is told.
    fn save(&self, to: &mut dyn Write) -> io::Result<()>;

    /// Reads what [`save`](Self::save) wrote, to the end, and checks it: it comes from another process.
    /// What was read takes effect only when this returns Ok.
    ///
    /// # Errors
    ///
    /// The state is not taken over, and whoever brought it is told; the text should say what differs.
    fn load(&self, from: &mut dyn Read) -> io::Result<()>;
}

impl<T: SaveState + ?Sized> SaveState for Arc<T> {
    fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        T::save(self, to)
    }

    fn load(&self, from: &mut dyn Read) -> io::Result<()> {
        T::load(self, from)
    }
}

/// [`SaveState`] for a backend behind a lock.
pub trait SaveStateMut {
    /// As [`SaveState::save`].
    ///
    /// # Errors
    ///
    /// As there.
    fn save(&mut self, to: &mut dyn Write) -> io::Result<()>;

    /// As [`SaveState::load`].
    ///
    /// # Errors
    ///
    /// As there.
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()>;
}

impl<T: SaveStateMut> SaveState for Mutex<T> {
    fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        self.lock().unwrap_or_else(PoisonError::into_inner).save(to)
    }

    fn load(&self, from: &mut dyn Read) -> io::Result<()> {
        self.lock().unwrap_or_else(PoisonError::into_inner).load(from)
    }
}

impl<T: SaveStateMut> SaveState for RwLock<T> {
    fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        self.write().unwrap_or_else(PoisonError::into_inner).save(to)
    }

    fn load(&self, from: &mut dyn Read) -> io::Result<()> {
        self.write().unwrap_or_else(PoisonError::into_inner).load(from)
    }
}

/// The hooks of [`SaveState`], for those that have them.
struct SavesState<B> {
    save: fn(&B, &mut dyn Write) -> io::Result<()>,
    load: fn(&B, &mut dyn Read) -> io::Result<()>,
}

/// A backend cannot be served as it describes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum VhostUserError {
    /// Threads have bit masks of queues.
    #[error("a backend has 1 to {MOST_QUEUES} queues, this one has {0}")]
    Queues(usize),
    /// Rings have 16-bit indexes.
    #[error("a queue has 1 to 32768 descriptors, this backend's have {0}")]
    QueueSize(usize),
    /// A queue is served by no thread, or by several.
    #[error("queue {queue} is served by {threads} threads, and not by one")]
    Threads {
        /// The queue.
        queue: usize,
        /// By how many.
        threads: usize,
    },
    /// Its gate is another device's.
    #[error("a gate for {gate} queues, the backend has {backend}")]
    Gate {
        /// For how many the gate is.
        gate: usize,
        /// How many there are.
        backend: usize,
    },
}

/// The threads that serve a connection; see [`VhostUser::listens`].
pub struct Workers<'a>(&'a dyn Register);

trait Register {
    fn register(&self, thread: usize, fd: &dyn AsRawFd, data: u64) -> io::Result<()>;
    fn threads(&self) -> usize;
}

impl<B: Backend> Register for Vec<Arc<VringEpollHandler<Served<B>>>> {
    fn register(&self, thread: usize, fd: &dyn AsRawFd, data: u64) -> io::Result<()> {
        let handler = self.get(thread).ok_or(io::ErrorKind::NotFound)?;
        handler.register_listener(fd.as_raw_fd(), EventSet::IN, data)
    }

    fn threads(&self) -> usize {
        self.len()
    }
}

impl fmt::Debug for Workers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("threads", &self.0.threads()).finish()
    }
}

impl Workers<'_> {
    /// Calls `handle_event` with the event `data` on a thread while this fd is readable. Numbers up to
    /// the number of queues are taken, and those above 65,535 do not arrive whole.
    ///
    /// # Errors
    ///
    /// If there is no such thread, the number is taken, or the system refuses.
    pub fn listen(&self, thread: usize, fd: impl AsFd, data: u64) -> io::Result<()> {
        self.0.register(thread, &fd.as_fd(), data)
    }

    /// How many threads there are: one for each of the backend's `queues_per_thread`.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.0.threads()
    }
}

/// What a backend does with the threads of a new connection.
type Listen<B> = Box<dyn Fn(&B, &Workers<'_>) -> io::Result<()> + Send>;

/// A backend and what its author says of it. See the [module](self).
pub struct VhostUser<B> {
    kind: String,
    backend: B,
    pops: Option<PopGate>,
    completes_in_order: bool,
    drain_deadline: Duration,
    receives: Vec<usize>,
    is_stateless: bool,
    state: Option<SavesState<B>>,
    state_version: StateVersion,
    listen: Option<Listen<B>>,
    backing_files: Vec<OwnedFd>,
    claim: Option<Box<dyn Claim>>,
}

impl<B> fmt::Debug for VhostUser<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUser").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl<B: Backend> VhostUser<B> {
    /// A backend that does all that it does within `handle_event`. `kind` is what the device is called,
    /// 1 to 64 bytes.
    pub fn new(kind: impl Into<String>, backend: B) -> Self {
        Self {
            kind: kind.into(),
            backend,
            pops: None,
            completes_in_order: false,
            drain_deadline: DRAIN_DEADLINE,
            receives: Vec::new(),
            is_stateless: false,
            state: None,
            state_version: StateVersion::default(),
            listen: None,
            backing_files: Vec::new(),
            claim: None,
        }
    }

    /// Requests go on after `handle_event` has returned: it passes this gate before each pop, and holds
    /// what that gives for as long as the request is in flight. `handle_event` is called then also while
    /// the device is stopped, since requests may have to be completed there.
    #[must_use]
    pub fn holds_permits(self, pops: PopGate) -> Self {
        Self { pops: Some(pops), ..self }
    }

    /// It publishes used entries in the order in which it has popped the requests, whatever finishes
    /// first. Then all requests before the used index are done and none behind it, and a ring goes on
    /// there after the backend has died, also under a frontend that would begin with what was never
    /// popped. What was done and not published is done twice: reads, writes and the like can be.
    #[must_use]
    pub fn completes_in_order(self) -> Self {
        Self { completes_in_order: true, ..self }
    }

    /// How long requests in flight may take to end when the frontend stops a ring, resets the device or
    /// goes; 30 s otherwise. After that the process aborts: it can neither tell the frontend that the ring
    /// is stopped nor let it go on.
    #[must_use]
    pub fn drain_deadline(self, deadline: Duration) -> Self {
        Self { drain_deadline: deadline, ..self }
    }

    /// The entries of this queue wait for the world, such as for packets. Of all other queues an entry
    /// that is not used for longer than the coordinator's patience, while nothing else is done, means that
    /// the device hangs.
    #[must_use]
    pub fn receives(mut self, queue: usize) -> Self {
        self.receives.push(queue);
        self
    }

    /// It has no state beside its rings, so it can be saved and loaded.
    #[must_use]
    pub fn stateless(self) -> Self {
        Self { is_stateless: true, ..self }
    }

    /// Its state can be saved and loaded, in the version that is given: another major version is
    /// refused, as it is for any device ([`StateVersion`]).
    #[must_use]
    pub fn saves_state(self, version: StateVersion) -> Self
    where
        B: SaveState,
    {
        let hooks = SavesState { save: B::save, load: B::load };
        Self { state: Some(hooks), state_version: version, ..self }
    }

    /// It has fds of its own that its threads are to listen to. The threads are new ones for each
    /// frontend: this is called before it is accepted, with nothing in flight.
    #[must_use]
    pub fn listens(
        self,
        listen: impl Fn(&B, &Workers<'_>) -> io::Result<()> + Send + 'static,
    ) -> Self {
        Self { listen: Some(Box::new(listen)), ..self }
    }

    /// Adds a backing file; see [`DeviceInfo::backing_files`](field@DeviceInfo::backing_files).
    #[must_use]
    pub fn backing_file(mut self, file: impl Into<OwnedFd>) -> Self {
        self.backing_files.push(file.into());
        self
    }

    /// It needs that to itself while a ring is started. For backends with permits of their own: the
    /// events of fds that they listen to come also while nothing may be popped.
    pub(crate) fn claims(self, claim: impl Claim) -> Self {
        Self { claim: Some(Box::new(claim)), ..self }
    }

    /// The device, how it is described, and its transport.
    pub(crate) fn put_together(
        self,
        memory: MemoryMap,
    ) -> Result<Built<VhostUserDevice<B>>, VhostUserError> {
        let backend = self.backend;
        let workers = workers(&backend)?;
        let queues = backend.num_queues();
        let holds_permits = self.pops.is_some();
        let pops = self.pops.unwrap_or_else(|| PopGate::new(queues));
        if pops.queues() != queues {
            return Err(VhostUserError::Gate { gate: pops.queues(), backend: queues });
        }
        let has_state = self.is_stateless || self.state.is_some();
        // The bitmap of those that have none.
        let logs = TypeId::of::<B::Bitmap>() != TypeId::of::<()>();
        let (features, protocol) = (backend.features(), backend.protocol_features());
        let offer = Offer::of(features, protocol, logs, has_state);
        let facts = Facts {
            holds_permits,
            completes_in_order: self.completes_in_order,
            drain_deadline: self.drain_deadline,
            receives: self.receives,
            state: self.state,
        };
        // It is no PCI device to its frontend: this is the vendor of all virtio devices.
        let mut info = DeviceInfo::new(self.kind, PciIdentity::new(0x1af4, 0)).without_intx();
        info.state_version = self.state_version;
        info.backing_files = self.backing_files;
        info.migration =
            if has_state { MigrationFlags::STOP_COPY_P2P } else { MigrationFlags::NO_STATE_P2P };
        let core = Arc::new(Core::new(backend, facts, pops.clone(), offer, workers, self.claim));
        let device = VhostUserDevice::new(Arc::clone(&core), memory);
        let listen = self.listen;
        let transport =
            move |socket, parts, actor| server::start(&core, parts, actor, socket, listen);
        let (pops, transport) = (Some(pops), Box::new(transport));
        // Nobody sees what it writes to RAM.
        Ok(Built { device, info, raw: None, pops, dirty_tracking: false, transport })
    }
}

/// Which queues each of a backend's threads serves.
fn workers(backend: &impl VhostUserBackend) -> Result<Vec<Vec<usize>>, VhostUserError> {
    let (queues, size) = (backend.num_queues(), backend.max_queue_size());
    if !(1..=MOST_QUEUES).contains(&queues) {
        return Err(VhostUserError::Queues(queues));
    }
    if !(1..=32768).contains(&size) {
        return Err(VhostUserError::QueueSize(size));
    }
    let of_mask = |mask: u64| (0..queues).filter(|queue| mask >> queue & 1 == 1).collect();
    let workers: Vec<Vec<usize>> = backend.queues_per_thread().into_iter().map(of_mask).collect();
    for queue in 0..queues {
        let threads = workers.iter().filter(|served| served.contains(&queue)).count();
        if threads != 1 {
            return Err(VhostUserError::Threads { queue, threads });
        }
    }
    Ok(workers)
}
