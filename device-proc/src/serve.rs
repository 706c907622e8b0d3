//! The entry point of every device process.
//!
//! ```no_run
//! use standstill_device_proc::device::{Device, DeviceError, DeviceInfo, Handles};
//! use standstill_device_proc::{ServeOptions, serve};
//! use std::process::ExitCode;
//!
//! type Build<D> = fn(Handles) -> Result<(D, DeviceInfo), DeviceError>;
//! fn run<D: Device>(build: Build<D>) -> ExitCode {
//!     match serve(ServeOptions::new("/run/vm/engine.sock"), build) {
//!         Ok(()) => ExitCode::SUCCESS,
//!         Err(error) => {
//!             tracing::error!(%error, "device process");
//!             ExitCode::from(error.exit_code())
//!         }
//!     }
//! }
//! ```
//!
//! With a Unix `SOCK_SEQPACKET` socket as standard input, that is the control channel to the
//! coordinator: the process greets, and lives as the coordinator says. With anything else it runs
//! standalone, for any client, until SIGTERM or SIGINT.
//!
//! | exit code | |
//! |---|---|
//! | 0 | ended in good order: the coordinator or a signal asked for it, or the state was handed over |
//! | 69 | [`EXIT_ORPHANED`] |
//! | 70 | [`EXIT_DEVICE`] |
//! | 73 | [`EXIT_SOCKET`] |
//! | 75 | [`EXIT_NOT_WELCOMED`] |
//! | 76 | [`EXIT_PROTOCOL`] |
//! | 77 | [`EXIT_REJECTED`] |
//!
//! No device process is left behind: before it is welcomed, and after with the orphan policy
//! `exit`, it ends with its coordinator (end of the control channel, and `PR_SET_PDEATHSIG` for
//! the case that it cannot look).
//!
//! With the orphan policy `keep` it outlives its coordinator, also one that breaks the protocol: it
//! stays in the state that it has reached, serves its client, and waits at the socket that came with
//! the welcome for a coordinator of a higher term. Once it was taken over its parent means nothing
//! to it, whatever the policy.

#![forbid(unsafe_code)]

mod data_socket;
mod greeting;
mod panics;

pub(crate) use data_socket::DataSocket;
pub use greeting::GreetingError;

use crate::actor::control::Newcomer;
use crate::actor::introduction::Introduction;
use crate::actor::parts::Parts;
use crate::actor::{ActorError, Arguments, DeviceActor, Ended, InfoError, Message, Outcome};
use crate::device::{Device, DeviceError, DeviceInfo, Handles};
use crate::foreign::{Foreign, RawDevice};
use crate::gate::{Gate, Scope};
use crate::interrupt::Interrupts;
use crate::log::{self, LogFormat};
use crate::memory::MemoryMap;
use crate::vfio_user::ListenError;
use crate::vfio_user::endpoint::Endpoint;
use crate::vfio_user::server;
use crate::vhost_user::{Backend, PopGate, VhostUser};
use ractor::{Actor, ActorRef, SpawnErr};
use standstill_protocol::channel::{DeviceEnd, prefer_short_waits};
use standstill_protocol::message::{Capabilities, MAX_FDS};
use standstill_protocol::migration::MigrationFlags;
use std::io;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use vfio_user::ServerBackend;

/// Exit code: the device could not be built or is none, or the process itself failed.
pub const EXIT_DEVICE: u8 = 70;
/// Exit code: the coordinator is gone and the orphan policy is `exit`, or it went before it had
/// welcomed the device.
pub const EXIT_ORPHANED: u8 = 69;
/// Exit code: the data socket could not be made.
pub const EXIT_SOCKET: u8 = 73;
/// Exit code: the coordinator did not answer the greeting in time.
pub const EXIT_NOT_WELCOMED: u8 = 75;
/// Exit code: the coordinator broke the protocol, or did not read.
pub const EXIT_PROTOCOL: u8 = 76;
/// Exit code: the coordinator rejected the device.
pub const EXIT_REJECTED: u8 = 77;

/// How long DMA in flight may take to end when the process ends in good order.
const LAST_DRAIN: Duration = Duration::from_millis(500);

/// How a device process serves its device.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where the data socket is made; at most 107 bytes.
    pub socket: PathBuf,
    /// Version of the device program, told to the coordinator; at most 64 bytes.
    pub program_version: String,
}

impl ServeOptions {
    /// Serves at this path.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), program_version: env!("CARGO_PKG_VERSION").into() }
    }
}

/// Why a device process ended, if not in good order.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The process could not be set up.
    #[error("the device process cannot be set up: {what}")]
    Setup {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// The device could not be built.
    #[error("the device cannot be built")]
    Build(#[source] DeviceError),
    /// The device is none that can be served.
    #[error("the device cannot be served")]
    Info(#[from] InfoError),
    /// The data socket could not be made.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The coordinator did not welcome the device.
    #[error(transparent)]
    Greeting(#[from] GreetingError),
    /// The coordinator is gone, or broke the protocol.
    #[error(transparent)]
    Control(#[from] ActorError),
    /// The actor ended by itself, which it does not do.
    #[error("the device process's actor is gone")]
    ActorGone,
    /// The actor did not start.
    #[error("the device process's actor cannot start")]
    Spawn(#[from] SpawnErr),
}

impl ServeError {
    /// What the process should exit with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setup { .. } | Self::Build(_) | Self::Info(_) => EXIT_DEVICE,
            Self::ActorGone | Self::Spawn(_) => EXIT_DEVICE,
            Self::Listen(_) => EXIT_SOCKET,
            Self::Greeting(error) => error.exit_code(),
            Self::Control(ActorError::Orphaned) => EXIT_ORPHANED,
            Self::Control(ActorError::Reader(_)) => EXIT_DEVICE,
            Self::Control(_) => EXIT_PROTOCOL,
        }
    }

    fn setup(what: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Setup { what, source: source.into() }
    }
}

/// Serves one device until the coordinator, a signal or the end of the coordinator ends it. Call
/// it from `main` before anything else has read standard input, and exit with its result: other
/// threads of the process may still run when it returns.
///
/// `build` makes the device; it is called once, inside a tokio runtime. The device is RUNNING
/// when `build` returns.
///
/// A panic of any thread aborts the process from now on.
///
/// # Errors
///
/// [`ServeError`]; see [`ServeError::exit_code`].
pub fn serve<D: Device>(
    options: ServeOptions,
    build: impl FnOnce(Handles) -> Result<(D, DeviceInfo), DeviceError>,
) -> Result<(), ServeError> {
    serve_built(options, true, |handles, _memory| {
        let interrupts = handles.interrupts.clone();
        let (device, mut info) = build(handles)?;
        // The gate gives every device the P2P states.
        info.migration = with_p2p(info.migration);
        interrupts.set_counts(info.irqs());
        // The runtime marks what passes it.
        let dirty_tracking = true;
        Ok(Built { device, info, raw: None, pops: None, dirty_tracking, transport: vfio_user() })
    })
}

/// Serves a backend of the `vfio_user` crate as [`serve`] does a device; see
/// [`foreign`](crate::foreign).
///
/// # Errors
///
/// [`ServeError`]; see [`ServeError::exit_code`].
pub fn serve_backend<B: ServerBackend + Send + 'static>(
    options: ServeOptions,
    build: impl FnOnce() -> Result<Foreign<B>, DeviceError>,
) -> Result<(), ServeError> {
    serve_built(options, true, |handles, memory| {
        let built = build()?.put_together(memory.clone(), handles.interrupts);
        built.map_err(DeviceError::new)
    })
}

/// Serves a backend of the `vhost-user-backend` crate as [`serve`] does a device; see
/// [`vhost_user`](crate::vhost_user).
///
/// # Errors
///
/// [`ServeError`]; see [`ServeError::exit_code`].
pub fn serve_vhost_user<B: Backend>(
    options: ServeOptions,
    build: impl FnOnce() -> Result<VhostUser<B>, DeviceError>,
) -> Result<(), ServeError> {
    // A frontend that finds the socket stands still until it is answered.
    serve_built(options, false, |_handles, memory| {
        build()?.put_together(memory.clone()).map_err(DeviceError::new)
    })
}

/// Starts what serves a device to its VMM, beside the actor.
pub(crate) type Transport<D> =
    Box<dyn FnOnce(DataSocket, Arc<Parts<D>>, ActorRef<Message>) -> io::Result<()>>;

/// The transport of devices and of backends of the `vfio_user` crate.
pub(crate) fn vfio_user<D: Device>() -> Transport<D> {
    Box::new(|socket, parts, actor| server::start(socket.open()?, Endpoint::new(parts, actor)))
}

/// A device that is ready to be served.
pub(crate) struct Built<D> {
    pub(crate) device: D,
    pub(crate) info: DeviceInfo,
    /// Answers for regions, windows and interrupts, if the device does so itself.
    pub(crate) raw: Option<Arc<dyn RawDevice>>,
    /// What its pops pass, if it has rings.
    pub(crate) pops: Option<PopGate>,
    /// Whether the runtime marks what it writes to guest RAM.
    pub(crate) dirty_tracking: bool,
    pub(crate) transport: Transport<D>,
}

/// `listens_early` says that clients may wait in the data socket until the device is welcomed.
fn serve_built<D: Device>(
    options: ServeOptions,
    listens_early: bool,
    build: impl FnOnce(Handles, &MemoryMap) -> Result<Built<D>, DeviceError>,
) -> Result<(), ServeError> {
    panics::abort_on_panic();
    let control = greeting::take_control_channel();
    // What cannot be taken is a control channel all the same.
    log::start(if matches!(control, Ok(None)) { LogFormat::Text } else { LogFormat::Json });
    let served =
        control.and_then(|control| listen_and_serve(options, listens_early, control, build));
    match &served {
        Ok(ended) => tracing::info!(?ended, "the device process ends"),
        Err(error) => {
            tracing::error!(error = log::with_causes(error), "the device process ends");
        }
    }
    served.map(|_| ())
}

fn listen_and_serve<D: Device>(
    options: ServeOptions,
    listens_early: bool,
    control: Option<DeviceEnd>,
    build: impl FnOnce(Handles, &MemoryMap) -> Result<Built<D>, DeviceError>,
) -> Result<Ended, ServeError> {
    let socket = DataSocket::bind(&options.socket)?;
    if !listens_early {
        // It can be made: that is known now.
        socket.close();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| ServeError::setup("tokio", error))?;
    let served = greet_and_serve(&runtime, options, &socket, control, build);
    socket.end();
    // Threads of the device that block must not keep the process.
    runtime.shutdown_background();
    served
}

fn greet_and_serve<D: Device>(
    runtime: &Runtime,
    options: ServeOptions,
    socket: &DataSocket,
    control: Option<DeviceEnd>,
    build: impl FnOnce(Handles, &MemoryMap) -> Result<Built<D>, DeviceError>,
) -> Result<Ended, ServeError> {
    #[cfg(feature = "fault-injection")]
    crate::fault::arm_from_environment()
        .map_err(|error| ServeError::setup("the faults of the environment", error))?;
    let memory = MemoryMap::new(Arc::new(Gate::new()));
    let interrupts = Interrupts::new();
    let handles = Handles { dma: memory.dma(), interrupts: interrupts.clone() };
    let Built { device, mut info, raw, pops, dirty_tracking, transport } = {
        let _inside = runtime.enter();
        build(handles, &memory).map_err(ServeError::Build)?
    };
    // Kept, and with them their locks, until the process ends.
    let backing_files = std::mem::take(&mut info.backing_files);
    if backing_files.len() > MAX_FDS {
        return Err(InfoError::BackingFiles(backing_files.len()).into());
    }
    let (migration, peer_dma) = (info.migration, info.peer_dma);
    let parts = Parts::new(device, info, memory, interrupts)?;
    let parts = Arc::new(match raw {
        Some(raw) => parts.with_raw(raw),
        None => parts,
    });
    greeting::lock(&backing_files)?;
    let introduction = Arc::new(Introduction {
        kind: parts.kind.clone(),
        program_version: options.program_version,
        capabilities: Capabilities {
            migration,
            peer_dma,
            progress: parts.device.progress().is_some(),
            dirty_tracking,
            fault_injection: cfg!(feature = "fault-injection"),
        },
        memory: parts.memory_files.clone(),
        backing_files,
    });
    let control = match control {
        None => None,
        Some(channel) => {
            let newcomer = greeting::exchange(&introduction, channel)?;
            // The device's own data threads may leave no CPU idle.
            if let Err(error) = prefer_short_waits() {
                tracing::debug!(%error, "no short waits for the control thread");
            }
            Some((newcomer, Arc::clone(&introduction)))
        }
    };
    let serving = run(Arc::clone(&parts), migration, control, socket, transport);
    let outcome = runtime.block_on(serving)?;
    let ended = outcome?;
    let drain = match ended {
        Ended::Shutdown(grace) => (grace / 2).min(LAST_DRAIN),
        Ended::HandedOver | Ended::Terminated => LAST_DRAIN,
    };
    if let Err(error) = runtime.block_on(parts.gate.close(Scope::All, drain)) {
        tracing::warn!(%error, "ending all the same");
    }
    if let Some(pops) = pops
        && !pops.end_within(drain)
    {
        tracing::warn!(in_flight = pops.in_flight(), "ending with requests in flight");
    }
    Ok(ended)
}

/// Serves until something ends it.
async fn run<D: Device>(
    parts: Arc<Parts<D>>,
    migration: MigrationFlags,
    control: Option<(Newcomer, Arc<Introduction>)>,
    socket: &DataSocket,
    transport: Transport<D>,
) -> Result<Outcome, ServeError> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| ServeError::setup("SIGTERM", error))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|error| ServeError::setup("SIGINT", error))?;
    let (ended, mut outcome) = oneshot::channel();
    let arguments = Arguments { parts: Arc::clone(&parts), migration, control, ended };
    let (actor, mut gone) = Actor::spawn(None, DeviceActor(PhantomData), arguments).await?;
    transport(socket.clone(), parts, actor.clone())
        .map_err(|error| ServeError::setup("the data socket's thread", error))?;
    loop {
        tokio::select! {
            biased;
            outcome = &mut outcome => return outcome.map_err(|_| ServeError::ActorGone),
            _ = &mut gone => return Err(ServeError::ActorGone),
            Some(()) = terminate.recv() => {}
            Some(()) = interrupt.recv() => {}
        }
        // If the actor is gone, that is seen above.
        let _ = actor.cast(Message::Terminate);
    }
}

fn with_p2p(flags: MigrationFlags) -> MigrationFlags {
    if flags.pre_copy() { MigrationFlags::ALL } else { MigrationFlags::STOP_COPY_P2P }
}
