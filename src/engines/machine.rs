//! The VMM of the demonstration: guest RAM, the device processes with a vfio-user client for each,
//! and everything mapped into everything.

#[cfg(feature = "fault-injection")]
mod members;

use super::engine::{Class, Engine, EngineError, Work};
use super::layout::Layout;
use super::oracle::Sight;
use super::pairs::{Pair, pairs};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use standstill::coordinator::DeviceSpec;
use standstill::device_proc::devices::copy_engine::Descriptor;
use standstill::device_proc::memory::{SharedAccessError, SharedMemory, SharedMemoryError};
#[cfg(feature = "fault-injection")]
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use thiserror::Error;

/// How long a round waits for every pair to write.
pub(crate) const TRAFFIC_DEADLINE: Duration = Duration::from_secs(10);

/// The VMM's side cannot be set up, or cannot go on.
#[derive(Debug, Error)]
pub(crate) enum VmmError {
    /// No place for sockets.
    #[error("cannot make a folder for the data sockets")]
    Folder(#[source] io::Error),
    /// The path of this program is not known.
    #[error("cannot find this program, which is to be started for each device")]
    Program(#[source] io::Error),
    /// Guest RAM cannot be made.
    #[error("cannot make guest RAM")]
    Ram(#[from] SharedMemoryError),
    /// An access to shared memory outside it.
    #[error(transparent)]
    Access(#[from] SharedAccessError),
    /// A device cannot be driven.
    #[error("engine{number}")]
    Engine {
        /// Which.
        number: usize,
        /// Why.
        source: EngineError,
    },
    /// Waiting for interrupts failed.
    #[error("cannot wait for interrupts")]
    Poll(#[source] io::Error),
}

/// What is known before anything is started.
#[derive(Debug)]
pub(crate) struct Blueprint {
    pub(crate) engines: usize,
    pub(crate) pairs: Vec<Pair>,
    layout: Layout,
    folder: TempDir,
    ram: SharedMemory,
    rest: Duration,
}

impl Blueprint {
    /// Makes guest RAM and a folder for sockets; `block` is how much one descriptor copies, in bytes.
    pub(crate) fn new(engines: usize, block: u32) -> Result<Self, VmmError> {
        Self::with_room(engines, block, 0)
    }

    /// The same, with room for so many bytes more in guest RAM, behind what engines use.
    pub(crate) fn with_room(engines: usize, block: u32, room: u64) -> Result<Self, VmmError> {
        let pairs = pairs(engines);
        let layout = Layout::new(engines, &pairs, block);
        let folder = socket_folder().map_err(VmmError::Folder)?;
        let ram = SharedMemory::create("guest-ram", room_at(&layout) + room)?;
        Ok(Self { engines, pairs, layout, folder, ram, rest: Duration::ZERO })
    }

    /// Guest RAM.
    pub(crate) fn ram(&self) -> &SharedMemory {
        &self.ram
    }

    /// The device processes: this program again for each.
    pub(crate) fn devices(&self) -> Result<Vec<DeviceSpec>, VmmError> {
        let program = std::env::current_exe().map_err(VmmError::Program)?;
        let device = |number| {
            DeviceSpec::new(format!("engine{number}"), &program)
                .args(["device", "copy-engine", "--socket"])
                .arg(self.socket(number))
                .arg(format!("--memory={}", self.layout.memory_size()))
                .arg(format!("--rest={}", humantime::format_duration(self.rest)))
        };
        Ok((0..self.engines).map(device).collect())
    }

    fn socket(&self, number: usize) -> PathBuf {
        socket(&self.folder, number)
    }

    /// Connects to every device, maps guest RAM and every other device's memory into each, makes
    /// sure that the devices see them as what they are, and starts all engines. Blocks; `step` is
    /// called once for each device.
    pub(crate) fn connect(self, mut step: impl FnMut()) -> Result<Vmm, VmmError> {
        let engines = (0..self.engines)
            .map(|number| {
                Engine::connect(&self.socket(number), self.layout.memory_size()).map_err(of(number))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let Self { pairs, layout, folder, ram, .. } = self;
        let gone = vec![false; engines.len()];
        let mut vmm = Vmm {
            pairs,
            layout,
            ram,
            engines,
            gone,
            #[cfg(feature = "fault-injection")]
            fresh: BTreeSet::new(),
            folder,
        };
        for number in 0..vmm.engines.len() {
            vmm.wire(number)?;
            step();
        }
        for number in 0..vmm.engines.len() {
            vmm.start(number)?;
        }
        Ok(vmm)
    }
}

/// Where in guest RAM the first page is that no engine uses.
fn room_at(layout: &Layout) -> u64 {
    layout.ram().size.next_multiple_of(4096)
}

fn socket(folder: &TempDir, number: usize) -> PathBuf {
    folder.path().join(format!("engine{number}.sock"))
}

/// A folder whose sockets' paths fit into a socket address, whatever `TMPDIR` says.
fn socket_folder() -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("standstill-");
    let folder = builder.tempdir()?;
    if folder.path().as_os_str().len() < 80 { Ok(folder) } else { builder.tempdir_in("/tmp") }
}

fn of(number: usize) -> impl FnOnce(EngineError) -> VmmError {
    move |source| VmmError::Engine { number, source }
}

/// A machine that is connected and at work.
#[derive(Debug)]
pub(crate) struct Vmm {
    pairs: Vec<Pair>,
    layout: Layout,
    ram: SharedMemory,
    engines: Vec<Engine>,
    /// Engines that are no part of the machine any more.
    gone: Vec<bool>,
    /// Engines whose processes were started again, and to which nothing is mapped yet.
    #[cfg(feature = "fault-injection")]
    fresh: BTreeSet<usize>,
    /// Removed at the end.
    #[cfg_attr(
        not(feature = "fault-injection"),
        expect(dead_code, reason = "nobody connects again")
    )]
    folder: TempDir,
}

impl Vmm {
    /// Maps everything into one device and writes its ring.
    fn wire(&mut self, number: usize) -> Result<(), VmmError> {
        let mut rest = std::mem::take(&mut self.engines);
        let wired = self.wire_among(number, &mut rest);
        self.engines = rest;
        wired
    }

    fn wire_among(&self, number: usize, engines: &mut [Engine]) -> Result<(), VmmError> {
        let (before, from) = engines.split_at_mut(number);
        let Some((engine, after)) = from.split_first_mut() else { return Ok(()) };
        engine.map(self.layout.ram(), &self.ram, Class::Ram).map_err(of(number))?;
        let peers = (0..).zip(&*before).chain((number + 1..).zip(&*after));
        for (peer, other) in peers {
            if self.gone.get(peer).copied().unwrap_or(true) {
                continue;
            }
            let range = self.layout.memory(peer);
            engine.map(range, other.memory(), Class::Peer).map_err(of(number))?;
        }
        let byte = 0x40 + u8::try_from(number % 64).unwrap_or(0);
        let source = vec![byte; self.layout.block() as usize];
        self.ram.write(self.layout.source_offset(number), &source)?;
        self.write_ring(number)
    }

    fn write_ring(&self, number: usize) -> Result<(), VmmError> {
        let is_gone = |engine: usize| self.gone.get(engine).copied().unwrap_or(true);
        let descriptors = self.layout.descriptors(number, &self.pairs, is_gone);
        let ring: Vec<u8> = descriptors.iter().flat_map(Descriptor::to_bytes).collect();
        self.ram.write(self.layout.ring_offset(number), &ring)?;
        Ok(())
    }

    fn start(&mut self, number: usize) -> Result<(), VmmError> {
        let ring = self.layout.ring(number);
        let descriptors = self.layout.descriptors(number, &self.pairs, |_| false).len();
        let Some(engine) = self.engines.get_mut(number) else { return Ok(()) };
        let entries = u32::try_from(descriptors).unwrap_or(u32::MAX);
        engine.start(ring, entries).map_err(of(number))
    }

    /// Who writes into whose memory.
    pub(crate) fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// What is in the mailbox of each pair, read through the VMM's own mappings.
    pub(crate) fn mailboxes(&self) -> Result<Vec<u64>, VmmError> {
        self.pairs.iter().map(|pair| self.mailbox(pair)).collect()
    }

    fn mailbox(&self, pair: &Pair) -> Result<u64, VmmError> {
        let offset = Layout::mailbox_offset(pair.mailbox);
        let receiver = self.engines.get(pair.receiver);
        Ok(receiver.map_or(Ok(0), |engine| engine.memory().load_u64(offset))?)
    }

    /// Looks at all memory that engines can write, through the VMM's own mappings. Takes its time.
    pub(crate) fn look(&self) -> Result<Sight, VmmError> {
        Ok(Sight {
            mailboxes: self.mailboxes()?,
            memory: self.engines.iter().map(|engine| engine.memory().hash()).collect(),
            ram: self.ram.hash(),
        })
    }

    /// How many interrupts have come from each device since this was last called.
    pub(crate) fn take_interrupts(&self) -> Result<Vec<u64>, VmmError> {
        let each =
            |(number, engine): (usize, &Engine)| engine.take_interrupts().map_err(of(number));
        self.engines.iter().enumerate().map(each).collect()
    }

    /// What each engine has done so far. Only while the machine runs.
    pub(crate) fn work(&mut self) -> Result<Vec<Work>, VmmError> {
        let each = |(number, engine): (usize, &mut Engine)| engine.work().map_err(of(number));
        self.engines.iter_mut().enumerate().map(each).collect()
    }

    /// Waits until every ordered pair that is wanted has written since its mailbox held what is given.
    /// Returns the pairs that have not, after that time.
    ///
    /// An engine raises its interrupt at the end of its ring, so an interrupt is the moment to
    /// look again.
    pub(crate) fn wait_for_traffic(
        &self,
        since: &[u64],
        wanted: impl Fn(&Pair) -> bool,
        patience: Duration,
    ) -> Result<Vec<Pair>, VmmError> {
        let deadline = Instant::now() + patience;
        let mut silent: Vec<(Pair, u64)> = self
            .pairs
            .iter()
            .copied()
            .zip(since.iter().copied().chain(std::iter::repeat(0)))
            .filter(|(pair, _)| wanted(pair))
            .collect();
        loop {
            let mut still = Vec::with_capacity(silent.len());
            for (pair, before) in silent {
                if self.mailbox(&pair)? == before {
                    still.push((pair, before));
                }
            }
            silent = still;
            let left = deadline.saturating_duration_since(Instant::now());
            if silent.is_empty() || left.is_zero() {
                return Ok(silent.into_iter().map(|(pair, _)| pair).collect());
            }
            // Pairs are ordered by writer.
            let mut writers: Vec<_> = silent.iter().map(|(pair, _)| pair.writer).collect();
            writers.dedup();
            self.wait_for_interrupt(&writers, left)?;
        }
    }

    /// Waits until one of these raises an interrupt, or for that long.
    fn wait_for_interrupt(&self, writers: &[usize], left: Duration) -> Result<(), VmmError> {
        let engines = || writers.iter().filter_map(|&n| Some((n, self.engines.get(n)?)));
        let mut fds: Vec<_> = engines()
            .map(|(_, engine)| PollFd::from_borrowed_fd(engine.interrupts(), PollFlags::IN))
            .collect();
        let left = Timespec::try_from(left).ok();
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(VmmError::Poll(errno.into())),
        }
        for ((number, engine), fd) in engines().zip(&fds) {
            if !fd.revents().is_empty() {
                engine.take_interrupts().map_err(of(number))?;
            }
        }
        Ok(())
    }
}
