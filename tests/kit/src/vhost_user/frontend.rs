//! One connection to a device, as a VMM has it, with a deadline on every call.

use super::error::VhostUserError;
use super::guest::{Guest, system};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

/// The virtio feature `VIRTIO_F_VERSION_1`, which every driver here needs.
pub const VERSION_1: u64 = 1 << 32;
/// The virtio feature `VIRTIO_F_EVENT_IDX`: device and driver say at which index they want to hear of each
/// other.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;

/// The deadline of a call unless said otherwise; long, since tests run on busy machines.
const DEADLINE: Duration = Duration::from_secs(30);
/// How often it is looked for a socket that is not there.
const INTERVAL: Duration = Duration::from_millis(1);
/// Size of the pages of a log in bytes.
const LOGGED_PAGE: u64 = 4096;

/// Where a ring is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// At the index of its used ring: as QEMU does after the loss of a device, and anybody does where the
    /// device has answered everything that it has taken.
    Used,
    /// At the index of its available ring: as Cloud Hypervisor does after the loss of a device. What was
    /// taken and not answered is lost if the device does not know better.
    Avail,
    /// At that index.
    At(u16),
}

/// How a frontend connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendOptions {
    /// The virtio features that the driver needs. [`VERSION_1`] is always among them.
    pub needs: u64,
    /// Those that it takes where they are offered.
    pub takes: u64,
    /// How long each call may take, that of connecting too.
    pub deadline: Duration,
}

impl Default for FrontendOptions {
    /// A driver that needs nothing more, and calls that may take 30 s.
    fn default() -> Self {
        Self { needs: VERSION_1, takes: 0, deadline: DEADLINE }
    }
}

/// A frontend that is connected to a device. Dropping it closes the connection, as the end of a VMM does.
///
/// Every call has a deadline, after which the connection is cut (`shutdown(2)`) and the call gives
/// [`VhostUserError::Deadline`]; then there is nothing more to be done with this frontend, as after any
/// error of the connection.
pub struct Frontend {
    frontend: vhost::vhost_user::Frontend,
    stream: UnixStream,
    deadline: Duration,
    accepted: u64,
    protocol: VhostUserProtocolFeatures,
}

impl std::fmt::Debug for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let accepted = format_args!("{:#x}", self.accepted);
        f.debug_struct("Frontend").field("accepted", &accepted).finish_non_exhaustive()
    }
}

impl Frontend {
    /// Connects as soon as a device listens there, accepts what every driver needs and all protocol features,
    /// and tells the device its guest's memory. No ring is started.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Connect`] if nobody listens within the deadline, [`VhostUserError::NotOffered`], and
    /// as [`call`](Self::call).
    pub fn connect(socket: &Path, guest: &Guest) -> Result<Self, VhostUserError> {
        Self::connect_with(socket, guest, &FrontendOptions::default())
    }

    /// As [`connect`](Self::connect), with these options.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub fn connect_with(
        socket: &Path,
        guest: &Guest,
        options: &FrontendOptions,
    ) -> Result<Self, VhostUserError> {
        let FrontendOptions { needs, takes, deadline } = *options;
        let stream = connect_within(socket, deadline)?;
        let own = stream.try_clone().map_err(system("duplicate a socket"))?;
        let mut frontend = Self {
            frontend: vhost::vhost_user::Frontend::from_stream(own, guest.queues() as u64),
            stream,
            deadline,
            accepted: 0,
            protocol: VhostUserProtocolFeatures::empty(),
        };
        frontend.call("SET_OWNER", |frontend| frontend.set_owner())?;
        let offered = frontend.offered_features()?;
        let missing = (needs | VERSION_1) & !offered;
        if missing != 0 {
            return Err(VhostUserError::NotOffered { missing, offered });
        }
        if offered & PROTOCOL_FEATURES != 0 {
            let protocol = frontend.offered_protocol_features()?;
            let set = |frontend: &mut vhost::vhost_user::Frontend| {
                frontend.set_protocol_features(protocol)
            };
            frontend.call("SET_PROTOCOL_FEATURES", set)?;
            frontend.protocol = protocol;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                // Every call is answered from now on, also with an error.
                frontend.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        let optional = (takes | PROTOCOL_FEATURES) & offered;
        frontend.accept(needs | VERSION_1 | optional)?;
        frontend.set_memory(guest)?;
        Ok(frontend)
    }

    /// Tells the device the virtio features that the driver has accepted, `VHOST_USER_F_PROTOCOL_FEATURES`
    /// among them: once more after a reset, for instance.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn accept(&mut self, features: u64) -> Result<(), VhostUserError> {
        self.call("SET_FEATURES", |frontend| frontend.set_features(features))?;
        self.accepted = features;
        Ok(())
    }

    /// The virtio features that the driver has accepted.
    #[must_use]
    pub const fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The protocol features that both have.
    #[must_use]
    pub const fn protocol(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// The virtio features that the device offers.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn offered_features(&mut self) -> Result<u64, VhostUserError> {
        self.call("GET_FEATURES", |frontend| frontend.get_features())
    }

    /// The protocol features that the device offers, of those that the crate `vhost` knows.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn offered_protocol_features(
        &mut self,
    ) -> Result<VhostUserProtocolFeatures, VhostUserError> {
        self.call("GET_PROTOCOL_FEATURES", VhostUserFrontend::get_protocol_features)
    }

    /// Tells the device a guest's memory, in place of what it was told before.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn set_memory(&mut self, guest: &Guest) -> Result<(), VhostUserError> {
        let region = guest.region()?;
        self.call("SET_MEM_TABLE", |frontend| frontend.set_mem_table(&[region]).map(drop))
    }

    /// Starts a ring, as QEMU does.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::NoQueue`], and as [`call`](Self::call).
    pub fn start_ring(
        &mut self,
        guest: &mut Guest,
        queue: usize,
        base: Base,
    ) -> Result<(), VhostUserError> {
        self.set_up_ring(guest, queue, base)?;
        self.enable_ring(queue, true)
    }

    /// All of [`start_ring`](Self::start_ring) but the last message, [`enable_ring`](Self::enable_ring).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_up_ring(
        &mut self,
        guest: &mut Guest,
        queue: usize,
        base: Base,
    ) -> Result<(), VhostUserError> {
        let base = match base {
            Base::Used => guest.used(queue)?,
            Base::Avail => guest.avail(queue)?,
            Base::At(index) => index,
        };
        let (kick, call) = guest.begin(queue, self.accepted & EVENT_IDX != 0)?;
        let (place, descriptors) = (guest.place(queue)?, guest.descriptors());
        let at = |address| guest.region().map(|region| region.userspace_addr + address);
        let config = VringConfigData {
            queue_max_size: descriptors,
            queue_size: descriptors,
            flags: 0,
            desc_table_addr: at(place.descriptors)?,
            used_ring_addr: at(place.used)?,
            avail_ring_addr: at(place.avail)?,
            log_addr: None,
        };
        self.call("SET_VRING_CALL", |frontend| frontend.set_vring_call(queue, &call))?;
        self.call("SET_VRING_NUM", |frontend| frontend.set_vring_num(queue, descriptors))?;
        self.call("SET_VRING_BASE", |frontend| frontend.set_vring_base(queue, base))?;
        self.call("SET_VRING_ADDR", |frontend| frontend.set_vring_addr(queue, &config))?;
        self.call("SET_VRING_KICK", |frontend| frontend.set_vring_kick(queue, &kick))
    }

    /// Starts all rings.
    ///
    /// # Errors
    ///
    /// As [`start_ring`](Self::start_ring).
    pub fn start_rings(&mut self, guest: &mut Guest, base: Base) -> Result<(), VhostUserError> {
        (0..guest.queues()).try_for_each(|queue| self.start_ring(guest, queue, base))
    }

    /// Has the device look at a ring's kicks, or not. What it has taken goes on.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn enable_ring(&mut self, queue: usize, enable: bool) -> Result<(), VhostUserError> {
        self.call("SET_VRING_ENABLE", |frontend| frontend.set_vring_enable(queue, enable))
    }

    /// Stops a ring, as QEMU does; the index at which the device would go on.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn stop_ring(&mut self, queue: usize) -> Result<u16, VhostUserError> {
        self.enable_ring(queue, false)?;
        let base = self.call("GET_VRING_BASE", |frontend| frontend.get_vring_base(queue))?;
        u16::try_from(base).map_err(|_| VhostUserError::Call {
            call: "GET_VRING_BASE",
            source: vhost::Error::InvalidQueue,
        })
    }

    /// Resets the device: all rings are stopped, and no features are accepted.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn reset(&mut self) -> Result<(), VhostUserError> {
        self.call("RESET_DEVICE", VhostUserFrontend::reset_device)
    }

    /// Reads from the configuration space.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, VhostUserError> {
        let room = vec![0; length as usize];
        let flags = VhostUserConfigFlags::WRITABLE;
        self.call("GET_CONFIG", |frontend| frontend.get_config(offset, length, flags, &room))
            .map(|(_, data)| data)
    }

    /// Writes to the configuration space, as a driver does.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), VhostUserError> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.call("SET_CONFIG", |frontend| frontend.set_config(offset, flags, data))
    }

    /// Has the pages logged that the device writes to, as for a migration, from now on.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn log_dirty(&mut self, log: &DirtyLog) -> Result<(), VhostUserError> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.size,
            mmap_offset: 0,
            mmap_handle: log.file.as_raw_fd(),
        };
        self.call("SET_LOG_BASE", |frontend| frontend.set_log_base(0, Some(region)))?;
        self.accept(self.accepted | LOG_ALL)
    }

    /// Whether the device is still there, as far as its socket says.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)) == Ok(0)
    }

    /// The connection itself, for what no frontend says.
    #[must_use]
    pub const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Any call of the frontend of the crate `vhost`, within the deadline. `name` is what it is called where
    /// it fails.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Deadline`] if it is not answered in time, [`VhostUserError::Call`] if it fails.
    pub fn call<T>(
        &mut self,
        name: &'static str,
        call: impl FnOnce(&mut vhost::vhost_user::Frontend) -> Result<T, vhost::Error>,
    ) -> Result<T, VhostUserError> {
        let (stream, within) = (&self.stream, self.deadline);
        let (done, wait) = sync_channel::<()>(0);
        let late = AtomicBool::new(false);
        let is_late = &late;
        // The crate takes a timeout of the socket for a reason to try again: only an end is believed.
        let answer = std::thread::scope(|scope| {
            scope.spawn(move || {
                if wait.recv_timeout(within) == Err(RecvTimeoutError::Timeout) {
                    is_late.store(true, Ordering::Relaxed);
                    // It may be gone already.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            });
            let answer = call(&mut self.frontend);
            drop(done);
            answer
        });
        match answer {
            Ok(answer) => Ok(answer),
            Err(_) if late.load(Ordering::Relaxed) => {
                Err(VhostUserError::Deadline { call: name, within })
            }
            Err(source) => Err(VhostUserError::Call { call: name, source }),
        }
    }
}

/// A log of the pages of a guest's memory that a device has written to.
#[derive(Debug)]
pub struct DirtyLog {
    file: File,
    size: u64,
}

impl DirtyLog {
    /// A log for that guest, with nothing in it.
    ///
    /// # Errors
    ///
    /// If the system has no memory.
    pub fn new(guest: &Guest) -> Result<Self, VhostUserError> {
        use rustix::fs::{MemfdFlags, memfd_create};
        let what = "make a log of dirty pages";
        let made = memfd_create("dirty-log", MemfdFlags::CLOEXEC);
        let file = File::from(made.map_err(|error| system(what)(error.into()))?);
        // A bit for each page, in whole pages.
        let bits = guest.region()?.memory_size.div_ceil(LOGGED_PAGE);
        let size = bits.div_ceil(8).next_multiple_of(LOGGED_PAGE);
        file.set_len(size).map_err(system(what))?;
        Ok(Self { file, size })
    }

    /// The pages that were written to: guest addresses divided by 4096, in order.
    ///
    /// # Errors
    ///
    /// If the log cannot be read.
    pub fn pages(&self) -> Result<Vec<u64>, VhostUserError> {
        use std::os::unix::fs::FileExt;
        let what = "read a log of dirty pages";
        let size = usize::try_from(self.size);
        let mut bits = vec![0; size.map_err(|error| system(what)(io::Error::other(error)))?];
        self.file.read_exact_at(&mut bits, 0).map_err(system(what))?;
        let of_byte = |(at, byte): (u64, &u8)| {
            let byte = *byte;
            (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| 8 * at + bit)
        };
        Ok((0..).zip(&bits).flat_map(of_byte).collect())
    }
}

/// Connects as soon as somebody listens there and has room, which the call itself would wait for without
/// an end.
fn connect_within(path: &Path, within: Duration) -> Result<UnixStream, VhostUserError> {
    let failed = |source| VhostUserError::Connect { path: path.to_owned(), within, source };
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    let begin = Instant::now();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.map_err(|error| failed(error.into()))?;
        let error = match connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false).map_err(failed)?;
                return Ok(stream);
            }
            Err(error) => io::Error::from(error),
        };
        let comes = [ErrorKind::NotFound, ErrorKind::ConnectionRefused, ErrorKind::WouldBlock];
        if !comes.contains(&error.kind()) || begin.elapsed() >= within {
            return Err(failed(error));
        }
        // Nobody tells when a socket comes.
        std::thread::park_timeout(INTERVAL);
    }
}
