//! A device process without a process: a device that notes what is done to it, its actor with a
//! coordinator's end of the control channel, and the transport with a client's end of the data
//! socket.

use super::endpoint::Endpoint;
use super::server::Server;
use crate::actor::control::Newcomer;
use crate::actor::introduction::Introduction;
use crate::actor::parts::Parts;
use crate::actor::{Arguments, DeviceActor};
use crate::device::{
    AccessError, Bar, Device, DeviceError, DeviceInfo, Doorbell, Handles, Pass, PciIdentity,
};
use crate::gate::Gate;
use crate::interrupt::Interrupts;
use crate::memory::{DmaError, MemoryMap, SharedMemory, Span};
use ractor::{Actor, ActorRef};
use standstill_protocol::channel::{CoordinatorEnd, DeviceEnd};
use standstill_protocol::message::{
    Capabilities, Command, CoordinatorMessage, DeviceMessage, Epoch, OrphanPolicy, PeerDma, Phase,
    Term, Welcome,
};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::io::{Read, Write};
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// Longer than anything takes here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The BAR of registers, and that of memory.
pub(crate) const REGISTERS: u32 = 0;
pub(crate) const MEMORY: u32 = 2;
pub(crate) const MEMORY_SIZE: u64 = 64 << 10;
/// What reads as how many writes there were.
pub(crate) const COUNT: u64 = 0x10;
/// What refuses all writes.
pub(crate) const READ_ONLY: u64 = 0x20;
/// A write here makes the device read 8 bytes at that address, before it returns.
pub(crate) const READS_BY_MESSAGE: u64 = 0x30;
/// What is answered as soon as that is let through; see [`Diary::hold`].
pub(crate) const SLOW: u64 = 0x40;
/// Doorbells: one for any write, one for 7 alone.
pub(crate) const BELLS: [Doorbell; 2] =
    [Doorbell::new(REGISTERS, 0x100), Doorbell::new(REGISTERS, 0x108).width(4).of_value(7)];

/// What was done to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// A register was written.
    Wrote(u64, u64),
    /// A doorbell was told.
    Rang(usize),
    /// The hook `stop` was called.
    Stopped,
    /// The hook `start` was called.
    Started,
    /// It was reset.
    Reset,
    /// It was asked for what it can save while it runs.
    Saved(Pass),
}

/// A device that notes what is done to it.
#[derive(Debug)]
pub(crate) struct Diary {
    pub(crate) deeds: Mutex<Vec<Deed>>,
    pub(crate) reads_change: AtomicBool,
    pub(crate) fails_to_stop: AtomicBool,
    pub(crate) read_by_message: Mutex<Option<Result<(), DmaError>>>,
    pub(crate) hangs_at_stop: AtomicBool,
    /// Whether what it saves while it runs is as slow as [`SLOW`].
    pub(crate) saves_slowly: AtomicBool,
    /// Whether it has something to save while it runs.
    pub(crate) saves_running: AtomicBool,
    /// Whether reads of [`SLOW`] wait, and how many do.
    slow: Mutex<(bool, usize)>,
    changed: Condvar,
    pub(crate) handles: Handles,
}

impl Diary {
    fn note(&self, deed: Deed) {
        self.deeds.lock().unwrap().push(deed);
    }

    pub(crate) fn deeds(&self) -> Vec<Deed> {
        self.deeds.lock().unwrap().clone()
    }

    /// From now on a read of [`SLOW`] waits.
    pub(crate) fn hold(&self) {
        self.slow.lock().unwrap().0 = true;
    }

    /// Waits until somebody reads it.
    pub(crate) fn until_held(&self) {
        let waited =
            self.changed.wait_timeout_while(self.slow.lock().unwrap(), PATIENCE, |(_, readers)| {
                *readers == 0
            });
        assert!(!waited.unwrap().1.timed_out(), "nobody reads");
    }

    /// It is answered.
    pub(crate) fn let_through(&self) {
        self.slow.lock().unwrap().0 = false;
        self.changed.notify_all();
    }

    fn be_slow(&self) {
        let mut slow = self.slow.lock().unwrap();
        slow.1 += 1;
        self.changed.notify_all();
        let mut slow = self.changed.wait_while(slow, |(held, _)| *held).unwrap();
        slow.1 -= 1;
    }

    fn writes(&self) -> usize {
        let deeds = self.deeds.lock().unwrap();
        deeds.iter().filter(|deed| matches!(deed, Deed::Wrote(..))).count()
    }
}

impl Device for Diary {
    fn region_read(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if offset == SLOW {
            self.be_slow();
        }
        let value = if offset == COUNT { self.writes() as u64 } else { offset };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn region_write(&self, _: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        if offset == READ_ONLY {
            return Err(AccessError::NoRegister { offset, width: data.len() });
        }
        let value = u64::from_le_bytes(value);
        self.note(Deed::Wrote(offset, value));
        if offset == READS_BY_MESSAGE {
            let access = self.handles.dma.try_access(&[Span::read(value, 8)]);
            let read = access.and_then(|access| access.read(0, 0, &mut [0; 8]));
            *self.read_by_message.lock().unwrap() = Some(read);
        }
        Ok(())
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        BELLS.to_vec()
    }

    fn doorbell(&self, index: usize) {
        self.note(Deed::Rang(index));
    }

    fn reads_have_side_effects(&self) -> bool {
        self.reads_change.load(Ordering::SeqCst)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.note(Deed::Reset);
        Ok(())
    }

    async fn stop(&self, _: Duration) -> Result<(), DeviceError> {
        self.note(Deed::Stopped);
        if self.hangs_at_stop.swap(false, Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if self.fails_to_stop.swap(false, Ordering::SeqCst) {
            return Err(DeviceError::new("as it was told"));
        }
        Ok(())
    }

    async fn start(&self, _: Duration) -> Result<(), DeviceError> {
        self.note(Deed::Started);
        Ok(())
    }

    fn save(&self, _: &mut dyn Write) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save_running(&self, pass: Pass, to: &mut dyn Write) -> Result<(), DeviceError> {
        self.note(Deed::Saved(pass));
        if self.saves_slowly.load(Ordering::SeqCst) {
            self.be_slow();
        }
        if self.saves_running.load(Ordering::SeqCst) {
            to.write_all(b"a page of the diary").map_err(DeviceError::new)?;
        }
        Ok(())
    }

    fn load_running(&self, _: Pass, from: &mut dyn Read) -> Result<(), DeviceError> {
        from.read_to_end(&mut Vec::new()).map(|_| ()).map_err(DeviceError::new)
    }

    fn load(&self, _: &mut dyn Read) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// All of it; ends when it is dropped.
pub(crate) struct Rig {
    pub(crate) parts: Arc<Parts<Diary>>,
    pub(crate) coordinator: CoordinatorEnd,
    actor: ActorRef<crate::actor::Message>,
    control: Option<JoinHandle<()>>,
    clients: Option<Sender<OwnedFd>>,
    transport: Option<JoinHandle<()>>,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with_flags(MigrationFlags::STOP_COPY_P2P)
    }

    pub(crate) fn with_flags(migration: MigrationFlags) -> Self {
        let (memory, interrupts) = (MemoryMap::new(Arc::new(Gate::new())), Interrupts::new());
        let handles = Handles { dma: memory.dma(), interrupts: interrupts.clone() };
        let device = Diary {
            deeds: Mutex::default(),
            reads_change: AtomicBool::new(true),
            fails_to_stop: AtomicBool::new(false),
            read_by_message: Mutex::default(),
            hangs_at_stop: AtomicBool::new(false),
            saves_slowly: AtomicBool::new(false),
            saves_running: AtomicBool::new(false),
            slow: Mutex::default(),
            changed: Condvar::new(),
            handles,
        };
        let bar = SharedMemory::create("rig", MEMORY_SIZE).unwrap();
        let mut info = DeviceInfo::new("diary", PciIdentity::new(1, 2))
            .bar(0, Bar::registers(4096))
            .bar(2, Bar::memory(MEMORY_SIZE, bar.try_clone_fd().unwrap()))
            .msix_vectors(4);
        info.migration = migration;
        interrupts.set_counts(info.irqs());
        let parts = Arc::new(Parts::new(device, info, memory, interrupts).unwrap());
        let (coordinator, device_end) = CoordinatorEnd::pair().unwrap();
        let channel = DeviceEnd::from_fd(device_end).unwrap();
        coordinator.set_version(1);
        channel.set_version(1);
        let (tell, told) = mpsc::channel();
        let of_actor = Arc::clone(&parts);
        let control = std::thread::spawn(move || control(of_actor, migration, channel, &tell));
        let actor: ActorRef<_> = told.recv().unwrap();
        let (clients, next) = mpsc::channel::<OwnedFd>();
        let endpoint = Endpoint::new(Arc::clone(&parts), actor.clone());
        let mut server = Server::new(endpoint).unwrap();
        let transport = std::thread::spawn(move || {
            for client in next {
                server.serve(client);
            }
        });
        let (control, clients, transport) = (Some(control), Some(clients), Some(transport));
        Self { parts, coordinator, actor, control, clients, transport }
    }

    /// The other end of a new client's connection; it is served when the one before has gone.
    pub(crate) fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.clients.as_ref().unwrap().send(theirs.into()).unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        ours
    }

    /// One more way to the device than the server's.
    pub(crate) fn endpoint(&self) -> Endpoint<Diary> {
        Endpoint::new(Arc::clone(&self.parts), self.actor.clone())
    }

    pub(crate) fn device(&self) -> &Diary {
        &self.parts.device
    }

    /// Sends a command and does not wait.
    pub(crate) fn command(
        &self,
        epoch: u64,
        phase: Phase,
        target: MigrationState,
        lease: Duration,
    ) {
        let command = Command {
            term: Term(1),
            epoch: Epoch(epoch),
            phase,
            target,
            budget_ns: 20_000_000_000,
            lease_ns: lease.as_nanos().try_into().unwrap(),
        };
        self.coordinator.try_send(&CoordinatorMessage::Command(command), &[]).unwrap();
    }

    /// The next message that is not about clients that come and go.
    pub(crate) fn answer(&self) -> DeviceMessage {
        loop {
            let message = self.coordinator.recv(PATIENCE).unwrap().message;
            if !matches!(message, DeviceMessage::Event(_)) {
                return message;
            }
        }
    }

    fn go(&self, epoch: u64, phase: Phase, target: MigrationState, lease: Duration) {
        self.command(epoch, phase, target, lease);
        match self.answer() {
            DeviceMessage::Reached(reached) => assert_eq!(reached.state, target),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn stop(&self, epoch: u64, lease: Duration) {
        self.go(epoch, Phase::PrepareStop, MigrationState::RunningP2p, Duration::ZERO);
        self.go(epoch, Phase::Stop, MigrationState::Stop, lease);
    }

    /// Stops what is stopped, without a lease.
    pub(crate) fn stop_again(&self, epoch: u64) {
        self.command(epoch, Phase::PrepareStop, MigrationState::RunningP2p, Duration::ZERO);
        assert!(matches!(self.answer(), DeviceMessage::Reached(_)));
        self.go(epoch, Phase::Stop, MigrationState::Stop, Duration::ZERO);
    }

    pub(crate) fn start(&self, epoch: u64) {
        self.go(epoch, Phase::PrepareStart, MigrationState::RunningP2p, Duration::ZERO);
        self.go(epoch, Phase::Start, MigrationState::Running, Duration::ZERO);
    }
}

/// The control side, on a runtime of its own.
fn control(
    parts: Arc<Parts<Diary>>,
    migration: MigrationFlags,
    channel: DeviceEnd,
    tell: &Sender<ActorRef<crate::actor::Message>>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let capabilities = Capabilities {
        migration,
        peer_dma: PeerDma::Possible,
        progress: false,
        dirty_tracking: true,
        fault_injection: false,
    };
    let introduction = Arc::new(Introduction {
        kind: "diary".into(),
        program_version: "0".into(),
        capabilities,
        memory: Vec::new(),
        backing_files: Vec::new(),
    });
    let welcome = Welcome {
        version: 1,
        machine: Default::default(),
        name: "diary".into(),
        incarnation: 1,
        term: Term(1),
        epoch: Epoch(0),
        heartbeat_ns: 0,
        orphan: OrphanPolicy::Keep,
        listener: false,
        log: false,
    };
    let control = Some((Newcomer { channel, welcome, fds: Vec::new() }, introduction));
    runtime.block_on(async {
        let (ended, _outcome) = oneshot::channel();
        let arguments = Arguments { parts, migration, control, ended };
        let (actor, gone) = Actor::spawn(None, DeviceActor(PhantomData), arguments).await.unwrap();
        tell.send(actor).unwrap();
        // An actor of this kind does not fail.
        let _ = gone.await;
    });
}

impl Drop for Rig {
    fn drop(&mut self) {
        // The transport ends with the client, which whoever uses this has dropped before, and
        // tells the actor so.
        drop(self.clients.take());
        let transport = self.transport.take().map(JoinHandle::join);
        self.actor.stop(None);
        let control = self.control.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(
                transport.is_none_or(|end| end.is_ok()) && control.is_none_or(|end| end.is_ok())
            );
        }
    }
}
