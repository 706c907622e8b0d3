//! Devices written for another server: any [`vfio_user::ServerBackend`] as a device process.
//!
//! A backend of the `vfio_user` crate answers for everything itself: its regions, the configuration
//! space among them, its DMA windows, of which it gets the fds, and its eventfds. [`serve_backend`]
//! serves it with this crate's server, lifecycle and control channel; between those and the backend
//! there is nothing but the trait's own methods.
//!
//! ```no_run
//! use standstill_device_proc::ServeOptions;
//! use standstill_device_proc::foreign::{Foreign, serve_backend};
//! use vfio_user::{IrqInfo, ServerBackend, ServerRegion};
//!
//! fn run<B: ServerBackend + Send + 'static>(
//!     backend: B,
//!     regions: Vec<ServerRegion>,
//!     irqs: Vec<IrqInfo>,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     let build = || Ok(Foreign::new("gpio", backend, regions, irqs).ram_only());
//!     Ok(serve_backend(ServeOptions::new("/run/vm/gpio.sock"), build)?)
//! }
//! ```
//!
//! # When it stands still
//!
//! The gate through which a [`Device`](crate::device::Device) does its DMA is not in the way of a
//! backend. So what it promises depends on what its author says of it:
//!
//! | | first step of a stop | second step |
//! |---|---|---|
//! | [`new`](Foreign::new): it acts only while one of its methods is called | it has none | no method that acts is called, and the one in progress is waited for |
//! | [`ram_only`](Foreign::ram_only): and it gets only windows onto RAM | nothing: there is no peer that it could reach | as above |
//! | [`quiesces`](Foreign::quiesces): it has threads, and the hooks of [`Quiesce`] | [`Quiesce::quiesce`] | as above |
//!
//! Without either of the two a device has no P2P states and says so: a machine of several devices
//! refuses it unless its configuration allows one phase.
//!
//! While it is stopped, only what tells it something is called: accesses to the configuration space,
//! `dma_map`, `dma_unmap` and `set_irqs`. A backend does no DMA and raises no interrupt in these.
//! Accesses to all other regions wait for the start or are refused, as with any device.
//!
//! # What it cannot do
//!
//! The state of a backend is saved and loaded only if it implements [`SaveState`]; otherwise its
//! migration flags say that it has none, and `Save` is refused. What it writes to RAM is marked
//! nowhere, so it takes part in no dirty tracking, of the coordinator or of the client. A method that
//! panics ends the process.

mod backend;
mod layout;
mod raw;

pub use crate::serve::serve_backend;
pub use layout::ForeignError;

pub(crate) use backend::ForeignDevice;
pub(crate) use raw::RawDevice;

use crate::device::{DeviceInfo, StateVersion};
use crate::interrupt::Interrupts;
use crate::memory::MemoryMap;
use crate::serve::{Built, vfio_user};
use backend::{Inner, QuiesceHooks, StateHooks};
use layout::Layout;
use standstill_protocol::message::PeerDma;
use standstill_protocol::migration::MigrationFlags;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vfio_user::{IrqInfo, ServerBackend, ServerRegion};

/// A backend that has threads of its own, and can bring them to rest.
pub trait Quiesce: ServerBackend {
    /// Comes to rest: when this returns, what was begun has ended, and until
    /// [`resume`](Self::resume) there is no DMA and no change of state, by whatever thread, except
    /// that accesses to regions go on to be answered. Work that they ask for waits. Interrupts of
    /// what has ended were raised.
    ///
    /// Called in the first step of a stop, on a thread that may block; a backend that takes longer
    /// than the step may take is told to resume.
    ///
    /// # Errors
    ///
    /// The device runs on, and the coordinator is told.
    fn quiesce(&mut self) -> io::Result<()>;

    /// Goes on. Also called if `quiesce` has failed or was late, and for a backend that is not at
    /// rest: it changes nothing then.
    ///
    /// # Errors
    ///
    /// The device is at rest as before, and the coordinator is told.
    fn resume(&mut self) -> io::Result<()>;
}

/// A backend whose state can be saved and loaded.
pub trait SaveState: ServerBackend {
    /// Writes all of its state, configuration space and mappable regions included; windows and
    /// eventfds are no part of it. The device is stopped. No other method is called meanwhile.
    ///
    /// # Errors
    ///
    /// The `Save` is refused.
    fn save(&mut self, to: &mut dyn Write) -> io::Result<()>;

    /// Reads what [`save`](Self::save) wrote, to the end, and checks it: it comes from another
    /// process. What was read takes effect only when this returns Ok.
    ///
    /// # Errors
    ///
    /// The `Load` is refused and the device is in ERROR until it is reset.
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()>;
}

/// A backend and what its author says of it. See the [module](self).
pub struct Foreign<B> {
    kind: String,
    backend: B,
    regions: Vec<ServerRegion>,
    irqs: Vec<IrqInfo>,
    ram_only: bool,
    quiesce: Option<QuiesceHooks<B>>,
    state: Option<StateHooks<B>>,
    state_version: StateVersion,
    backing_files: Vec<OwnedFd>,
}

impl<B> fmt::Debug for Foreign<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Foreign");
        out.field("kind", &self.kind).field("ram_only", &self.ram_only);
        out.finish_non_exhaustive()
    }
}

impl<B: ServerBackend + Send + 'static> Foreign<B> {
    /// A backend that acts only while one of its methods is called. `kind` is what the device is
    /// called, 1 to 64 bytes; `regions` and `irqs` are what the crate's `Server::new` takes: a PCI
    /// device's, the configuration space (region 7) among them. Whatever is not in a list is absent.
    pub fn new(
        kind: impl Into<String>,
        backend: B,
        regions: Vec<ServerRegion>,
        irqs: Vec<IrqInfo>,
    ) -> Self {
        Self {
            kind: kind.into(),
            backend,
            regions,
            irqs,
            ram_only: false,
            quiesce: None,
            state: None,
            state_version: StateVersion::default(),
            backing_files: Vec::new(),
        }
    }

    /// It reaches RAM alone: it is told of a window with a file only once the coordinator has
    /// declared that file to be RAM. All others are kept from it. Without a coordinator that
    /// declares its RAM it has no memory to reach.
    #[must_use]
    pub fn ram_only(self) -> Self {
        Self { ram_only: true, ..self }
    }

    /// It has threads of its own, which come to rest by the hooks of [`Quiesce`].
    #[must_use]
    pub fn quiesces(self) -> Self
    where
        B: Quiesce,
    {
        let hooks = QuiesceHooks { quiesce: B::quiesce, resume: B::resume };
        Self { quiesce: Some(hooks), ..self }
    }

    /// Its state can be saved and loaded, in the version that is given: another major version is
    /// refused, as it is for any device ([`StateVersion`]).
    #[must_use]
    pub fn saves_state(self, version: StateVersion) -> Self
    where
        B: SaveState,
    {
        let hooks = StateHooks { save: B::save, load: B::load };
        Self { state: Some(hooks), state_version: version, ..self }
    }

    /// Adds a backing file; see [`DeviceInfo::backing_files`](field@DeviceInfo::backing_files).
    #[must_use]
    pub fn backing_file(mut self, file: impl Into<OwnedFd>) -> Self {
        self.backing_files.push(file.into());
        self
    }

    /// The migration states that it has.
    fn migration(&self) -> MigrationFlags {
        match (self.state.is_some(), self.ram_only || self.quiesce.is_some()) {
            (true, true) => MigrationFlags::STOP_COPY_P2P,
            (true, false) => MigrationFlags::STOP_COPY,
            (false, true) => MigrationFlags::NO_STATE_P2P,
            (false, false) => MigrationFlags::NO_STATE,
        }
    }

    /// The device, how it is described, and what the transport calls.
    pub(crate) fn put_together(
        mut self,
        memory: MemoryMap,
        interrupts: Interrupts,
    ) -> Result<Built<ForeignDevice<B>>, ForeignError> {
        let migration = self.migration();
        let layout = Layout::new(std::mem::take(&mut self.regions), &self.irqs)?;
        let identity = layout.identity(&mut self.backend)?;
        let mut info = DeviceInfo::new(self.kind, identity).without_intx();
        info.migration = migration;
        info.state_version = self.state_version;
        info.backing_files = self.backing_files;
        if self.ram_only && layout.memory_files().is_empty() {
            info.peer_dma = PeerDma::RamOnly;
        }
        interrupts.set_counts(layout.counts());
        let inner = Inner::new(self.backend, layout, memory, interrupts, self.ram_only);
        let inner = Arc::new(inner);
        let device = ForeignDevice::new(Arc::clone(&inner), self.quiesce, self.state);
        // A device that answers for itself writes alone.
        let dirty_tracking = false;
        let (raw, pops, transport) = (Some(inner as Arc<dyn RawDevice>), None, vfio_user());
        Ok(Built { device, info, raw, pops, dirty_tracking, transport })
    }
}

#[cfg(test)]
mod tests;
