//! Takes over a machine that another coordinator has left behind, dead or alive.
//!
//! 1. The record gets a higher term, before anything else: whoever had the machine kills nobody
//!    from then on.
//! 2. Every device is connected to and says Hello; who does not is lost.
//! 3. Every device that said Hello gets a Welcome with the term, and drops whatever the earlier
//!    coordinator says from then on.
//! 4. [`Operation::TakeOver`] asks all where they are, fences who is lost, and decides.

use super::CoordinatorActor;
use super::incarnation::{Child, Starter};
use super::keep::{Kept, examined};
use super::lease::Lease;
use super::start::{Beginning, Prepared, check, policies};
use super::state::{Standing, State};
use crate::control_directory::{ControlDirectory, ControlDirectoryError};
use crate::custody::Custody;
use crate::description::{DeviceSpec, MachineBuilder};
use crate::device::Message as DeviceMessage;
use crate::error::{MachineError, TakeOverError};
use crate::identity::{boot_id, identity};
use crate::machine::{Machine, TakenOver};
use crate::mailbox::Mailbox;
use crate::policy::{Policies, Presence};
use crate::process::{BackingFile, DeviceProcess, Spawner, identity_behind, open_recorded};
use crate::record::{DeviceRecord, FileRecord, MachineRecord, ProcessIdentity};
use ractor::Actor;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::geteuid;
use standstill_protocol::channel::{AsyncChannel, CoordinatorEnd, RecvError};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage as FromDevice, Hello, VERSIONS, Welcome,
};
use standstill_protocol::transition::{HeldReason, Loss, Outcome, ParticipantId};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How often one that waits for greetings looks whether another one has a higher term.
const LOOK: Duration = Duration::from_millis(100);

/// How far a device may be ahead of the record, which may be a copy of an earlier one. Who claims
/// more would use the terms up.
const MAX_TERMS_AHEAD: u64 = 1 << 32;

/// A device process of the earlier coordinator.
pub(super) struct Found {
    pub(super) process: Child,
    pub(super) incarnation: u64,
    /// How to talk to it, or why that is not possible.
    pub(super) contact: Result<Contact, Unreachable>,
    pub(super) files: Vec<BackingFile>,
    /// Why its end cannot be proven, for a person.
    pub(super) unprovable: Option<String>,
}

/// A device process that has said Hello.
pub(super) struct Contact {
    pub(super) channel: CoordinatorEnd,
    hello: Hello,
    version: u16,
    /// Where it is to write its log.
    log: OwnedFd,
}

impl Contact {
    pub(super) fn new(channel: CoordinatorEnd, hello: Hello, version: u16, log: OwnedFd) -> Self {
        Self { channel, hello, version, log }
    }
}

/// Why there is no talking to a device process.
pub(super) struct Unreachable {
    loss: Loss,
    /// For a person.
    why: String,
}

impl Unreachable {
    pub(super) fn new(loss: Loss, why: impl Into<String>) -> Self {
        Self { loss, why: why.into() }
    }
}

/// What came back from a device's socket.
struct Greeting {
    channel: CoordinatorEnd,
    hello: Hello,
    files: Vec<BackingFile>,
    process: ProcessIdentity,
}

/// Takes a machine over; see the module's documentation.
pub(crate) async fn take_over(builder: MachineBuilder) -> Result<TakenOver, TakeOverError> {
    check(&builder).map_err(|error| TakeOverError::Description(Box::new(error)))?;
    let path = builder.control_directory.clone().ok_or(TakeOverError::NoControlDirectory)?;
    let (name, specs, policies) =
        (builder.name.clone(), builder.devices.clone(), policies(&builder));
    let (directory, record) = blocking(move || claim(&path, &name, &specs, policies)).await?;

    let time = builder.deadlines.hello;
    let greetings = greet_all(&directory, &record, &builder.devices, time).await?;
    let uuid = record.uuid;
    let hellos = builder.devices.iter().zip(&greetings);
    let hellos =
        hellos.filter_map(|(spec, greeting)| Some((&spec.name, &greeting.as_ref().ok()?.hello)));
    check_hellos(hellos, uuid)?;
    let known = builder.devices.iter().map(|spec| record.device(&spec.name));
    let greetings: Vec<_> = known
        .zip(greetings)
        .map(|(known, greeting)| greeting.and_then(|found| believable(found, known, &record)))
        .collect();

    let specs = builder.devices.clone();
    let (kept, found, spawner) = blocking(move || {
        let kept = raise(directory, record, &specs, &greetings)?;
        let found = specs.iter().zip(greetings);
        let found = found
            .map(|(spec, greeting)| find(spec, greeting, &kept))
            .collect::<Result<Vec<_>, _>>()?;
        let spawner = Spawner::new().map_err(|error| system("start processes", error))?;
        Ok((kept, found, spawner))
    })
    .await?;

    let events = builder.events.clone();
    let beginning = Beginning::TakenOver(found);
    let starter = Starter::Spawner(spawner);
    let prepared =
        Prepared { builder, starter, kept: Some(kept), events: events.clone(), beginning };
    let (actor, _) = Actor::spawn(None, CoordinatorActor, prepared)
        .await
        .map_err(|error| system("start the coordinator actor", error))?;
    let machine = Machine::new(Mailbox::Actor(actor), &events);
    // From here on the actor has the only one, so that readers learn when it ends.
    drop(events);
    let report = machine.finish_take_over().await.map_err(|error| match error {
        MachineError::Superseded { term } => TakeOverError::Superseded { term },
        error => TakeOverError::Unfinished(error),
    })?;
    if let Outcome::Held { reasons, .. } = &report.outcome
        && reasons.contains(&HeldReason::Superseded)
    {
        // The term is asked for rather than guessed: whoever is superseded says by whom.
        return Err(match machine.accept_hold().await {
            Err(MachineError::Superseded { term }) => TakeOverError::Superseded { term },
            Err(error) => TakeOverError::Unfinished(error),
            Ok(()) => TakeOverError::Unfinished(MachineError::Transition(report)),
        });
    }
    Ok(TakenOver { machine, report })
}

fn system(
    what: &'static str,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> TakeOverError {
    TakeOverError::System { what, source: io::Error::other(error) }
}

/// Runs what may block on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TakeOverError> + Send + 'static,
) -> Result<T, TakeOverError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| system("run what may block", error))?
}

/// Gives the record a higher term, if the description fits.
fn claim(
    path: &Path,
    machine: &str,
    specs: &[DeviceSpec],
    policies: Policies,
) -> Result<(ControlDirectory, MachineRecord), TakeOverError> {
    let directory = ControlDirectory::open(path)?;
    let coordinator = examined("/proc/self", identity(std::process::id()))?;
    let boot = examined("/proc/sys/kernel/random/boot_id", boot_id())?;
    let lock = directory.lock()?;
    let mut record = directory.read_existing()?;
    if record.machine != machine {
        let (found, expected) = (record.machine, machine.to_owned());
        return Err(TakeOverError::Machine { found, expected });
    }
    let described = |device: &&DeviceRecord| specs.iter().any(|spec| spec.name == device.name);
    if let Some(device) = record.devices.iter().find(|device| !described(device)) {
        return Err(TakeOverError::Undescribed { device: device.name.clone() });
    }
    // One that is optional may have had no process.
    let missing = |spec: &&DeviceSpec| {
        record.device(&spec.name).is_none() && policies.resolve(spec).1 == Presence::Required
    };
    if let Some(spec) = specs.iter().find(missing) {
        return Err(TakeOverError::Unrecorded { device: spec.name.clone() });
    }
    for spec in specs {
        directory.socket_path(&spec.name).map_err(ControlDirectoryError::from)?;
    }
    if record.boot != boot {
        return Err(TakeOverError::ControlDirectory(directory.other_boot(machine)));
    }
    record.term = record.term.saturating_add(1);
    record.coordinator = coordinator;
    lock.write(&record)?;
    drop(lock);
    Ok((directory, record))
}

/// Connects to every device and waits for its Hello, all at the same time and each that long.
///
/// A device greets one at a time: of two that take the machine over at once, each may have the device
/// that the other one waits for. So the one with the lower term goes as soon as it learns of the other.
async fn greet_all(
    directory: &ControlDirectory,
    record: &MachineRecord,
    specs: &[DeviceSpec],
    time: Duration,
) -> Result<Vec<Result<Greeting, Unreachable>>, TakeOverError> {
    let mut greetings: Vec<_> = specs
        .iter()
        .map(|_| Err(Unreachable::new(Loss::Disconnected, "it was not asked")))
        .collect();
    let mut tasks = JoinSet::new();
    for (at, spec) in specs.iter().enumerate() {
        let path = directory.socket_path(&spec.name).map_err(ControlDirectoryError::from)?;
        tasks.spawn(async move { (at, greet(path, time).await) });
    }
    let mut looks = tokio::time::interval(LOOK);
    loop {
        let done = tokio::select! {
            done = tasks.join_next() => done,
            _ = looks.tick() => {
                match directory.check_term(record.uuid, record.term()) {
                    Err(ControlDirectoryError::Superseded { found, .. }) => {
                        return Err(TakeOverError::Superseded { term: found });
                    }
                    Err(error) => return Err(error.into()),
                    Ok(()) => continue,
                }
            }
        };
        let Some(done) = done else { break };
        let (at, greeting) = done.map_err(|error| system("wait for the greetings", error))?;
        greetings[at] = greeting;
    }
    Ok(greetings)
}

/// Connects to one device and waits for its Hello. An error says what it did instead.
async fn greet(path: PathBuf, time: Duration) -> Result<Greeting, Unreachable> {
    let lost = |why| Unreachable::new(Loss::Disconnected, why);
    let broke =
        |what: &str| Unreachable::new(Loss::Protocol, format!("it broke the protocol: {what}"));
    let channel = CoordinatorEnd::connect(&path)
        .map_err(|error| lost(format!("nobody can be reached at {}: {error}", path.display())))?;
    let peer = channel
        .peer_credentials()
        .map_err(|error| lost(format!("it does not show its credentials: {error}")))?;
    let user = geteuid().as_raw();
    if peer.uid != user && peer.uid != 0 {
        let uid = peer.uid;
        return Err(lost(format!("user {uid} listens in its place, expected {user} or root")));
    }
    // 0 is one that cannot be seen from this pid namespace.
    let pid = u32::try_from(peer.pid).ok().filter(|&pid| pid > 0);
    let pid = pid.ok_or_else(|| lost("its process cannot be seen from here".to_owned()))?;
    // Older kernels tell the number alone.
    let seen = match channel.peer_pidfd() {
        Ok(pidfd) => identity_behind(&pidfd, pid),
        Err(error) if error.raw_os_error() == Some(Errno::NOPROTOOPT.raw_os_error()) => {
            identity(pid).map(Some)
        }
        // It is not there to be told.
        Err(_) => Ok(None),
    };
    // A process of its own may have its socket still: that one is not the device.
    let process = seen
        .map_err(|error| lost(format!("its process {pid} cannot be seen: {error}")))?
        .ok_or_else(|| Unreachable::new(Loss::Exited, format!("its process {pid} has ended")))?;
    let channel = AsyncChannel::new(channel)
        .map_err(|error| lost(format!("it cannot be watched: {error}")))?;
    let received = match timeout(time, channel.recv()).await {
        Ok(Ok(received)) => received,
        Ok(Err(RecvError::Disconnected)) => {
            return Err(lost("it closed the connection before it said Hello".to_owned()));
        }
        Ok(Err(error)) => return Err(broke(&error.to_string())),
        Err(_) => return Err(Unreachable::new(Loss::Timeout, "it did not say Hello in time")),
    };
    let FromDevice::Hello(hello) = received.message else {
        return Err(broke("its first message was no Hello"));
    };
    let files = BackingFile::reopen_all(received.fds).map_err(|error| broke(&error.to_string()))?;
    // A fence waits for these locks: one that was never taken would prove nothing.
    if files.iter().any(|file| !file.is_locked().unwrap_or(false)) {
        return Err(broke("it declared a backing file that it has not locked"));
    }
    let hello = crate::words::hello(hello);
    Ok(Greeting { channel: channel.into_inner(), hello, files, process })
}

/// Whether these are devices of this machine, and this coordinator can talk with them. If none is of
/// this machine, the record is wrong, and nobody is to be harmed for that; if some are, the others
/// lie (see [`believable`]).
fn check_hellos<'a>(
    hellos: impl Iterator<Item = (&'a String, &'a Hello)> + Clone,
    expected: uuid::Uuid,
) -> Result<(), TakeOverError> {
    let belongs = |hello: &Hello| hello.machine == Some(expected);
    if !hellos.clone().any(|(_, hello)| belongs(hello))
        && let Some((device, hello)) = hellos.clone().next()
    {
        let (device, found) = (device.clone(), hello.machine);
        return Err(TakeOverError::ForeignMachine { device, found, expected });
    }
    for (device, hello) in hellos.filter(|(_, hello)| belongs(hello)) {
        if VERSIONS.negotiate(hello.versions).is_none() {
            let (device, theirs, ours) = (device.clone(), hello.versions, VERSIONS);
            return Err(TakeOverError::Version { device, theirs, ours });
        }
    }
    Ok(())
}

/// A device that hides what it has is one that broke the protocol: a fence without the lock of a
/// file that it writes to would prove nothing, and above the highest term there is none.
fn believable(
    greeting: Greeting,
    known: Option<&DeviceRecord>,
    record: &MachineRecord,
) -> Result<Greeting, Unreachable> {
    let term = record.term;
    let broke =
        |what: String| Unreachable::new(Loss::Protocol, format!("it broke the protocol: {what}"));
    if let Some(machine) = greeting.hello.machine.filter(|&machine| machine != record.uuid) {
        return Err(broke(format!("it claims to belong to machine {machine}")));
    }
    if greeting.hello.machine.is_none() {
        return Err(broke("it claims to belong to no machine".to_owned()));
    }
    let claimed = greeting.hello.term.0;
    if claimed.saturating_sub(term) > MAX_TERMS_AHEAD {
        return Err(broke(format!("it claims to know term {claimed}, the record has {term}")));
    }
    let declared: Vec<_> = greeting.files.iter().map(BackingFile::record).collect();
    let is_declared = |file: &&FileRecord| {
        declared.iter().any(|d| (d.device, d.inode) == (file.device, file.inode))
    };
    let files = known.map_or(&[][..], |known| &known.backing_files);
    match files.iter().find(|file| !is_declared(file)) {
        Some(FileRecord { path, device, inode }) => {
            let path = path.as_deref().unwrap_or("?");
            Err(broke(format!(
                "it does not declare its backing file {path} ({device:#x}:{inode}) any more"
            )))
        }
        None => Ok(greeting),
    }
}

/// Brings the record to what the devices say: a term above all of theirs, and their files.
fn raise(
    directory: ControlDirectory,
    mut record: MachineRecord,
    specs: &[DeviceSpec],
    greetings: &[Result<Greeting, Unreachable>],
) -> Result<Kept, TakeOverError> {
    let ours = record.clone();
    for (spec, greeting) in specs.iter().zip(greetings) {
        let Ok(Greeting { hello, files, process, .. }) = greeting else { continue };
        if hello.term.0 >= record.term {
            record.term = hello.term.0.saturating_add(1);
        }
        if let Some(device) = record.devices.iter_mut().find(|device| device.name == spec.name) {
            device.process = *process;
            device.backing_files = files.iter().map(BackingFile::record).collect();
        }
    }
    let lock = directory.lock()?;
    let found = directory.read_existing()?;
    if (found.uuid, found.term) != (ours.uuid, ours.term) {
        return Err(TakeOverError::Superseded { term: found.term() });
    }
    if record != ours {
        lock.write(&record)?;
    }
    drop(lock);
    let custody = Custody::new(directory, record.uuid, record.term());
    // They were left to themselves, and are so again if this take-over fails.
    custody.keep();
    Ok(Kept { custody: Arc::new(custody), record })
}

/// What there is of a device (nothing of one that was never started): its process, its files, and a way to talk to it.
fn find(
    spec: &DeviceSpec,
    greeting: Result<Greeting, Unreachable>,
    kept: &Kept,
) -> Result<Option<Found>, TakeOverError> {
    let Some(known) = kept.record.device(&spec.name) else { return Ok(None) };
    let incarnation = known.incarnation;
    let program = spec.process.program().to_owned();
    let custody = || Arc::clone(&kept.custody);
    let why = match greeting {
        Ok(Greeting { channel, hello, files, process }) => {
            // Older kernels tell the number alone.
            let pidfd = match channel.peer_pidfd() {
                Ok(pidfd) => Ok(Some(pidfd)),
                Err(_) => open_recorded(process),
            };
            let (log_end, log) = pipe_with(PipeFlags::CLOEXEC)
                .map_err(|errno| system("make a pipe for a device's log", errno))?;
            match pidfd {
                Ok(Some(pidfd)) => {
                    let process =
                        DeviceProcess::adopt(program, process.pid, pidfd, Some(log_end), custody())
                            .map_err(|error| system("take charge of a device process", error))?;
                    let version = VERSIONS.negotiate(hello.versions).unwrap_or(VERSIONS.min);
                    let process = Child::Process(process);
                    let contact = Ok(Contact::new(channel, hello, version, log));
                    let unprovable = None;
                    return Ok(Some(Found { process, incarnation, contact, files, unprovable }));
                }
                Ok(None) => Unreachable::new(Loss::Exited, "its process has ended"),
                Err(error) => {
                    let why = format!("its process cannot be held: {error}");
                    Unreachable::new(Loss::Disconnected, why)
                }
            }
        }
        Err(why) => why,
    };
    let process = DeviceProcess::adopt_recorded(program, known.process, custody())
        .map_err(|error| system("take charge of a recorded device process", error))?;
    let mut files = Vec::with_capacity(known.backing_files.len());
    let mut unprovable = None;
    for file in &known.backing_files {
        match BackingFile::find(file) {
            Ok(file) => files.push(file),
            Err(error) => unprovable = Some(error.to_string()),
        }
    }
    let process = Child::Process(process);
    Ok(Some(Found { process, incarnation, contact: Err(why), files, unprovable }))
}

impl State {
    /// Tells a device that said Hello that it has another coordinator now.
    pub(super) fn welcome_found(&mut self, id: ParticipantId, contact: Contact) {
        let Contact { channel, hello, version, log } = contact;
        let Some(welcome) = self.welcome_of(id, version) else { return };
        // It goes on listening where it did.
        let welcome = Welcome { log: true, ..welcome };
        let Some(device) = self.device(id) else { return };
        let sent = channel.try_send(&CoordinatorMessage::Welcome(welcome), &[log.as_fd()]);
        channel.set_version(version);
        // What has files has sent them; kernels that cannot say so leave it at that.
        let _ = channel.refuse_fds();
        device.state = hello.state;
        device.lease = Some(Lease::of_another());
        device.hello = Some(hello);
        device.standing = match sent {
            Ok(()) => Standing::Ready,
            Err(error) => {
                Standing::Lost(Loss::Disconnected, format!("it cannot be welcomed: {error}"))
            }
        };
        if device.standing == Standing::Ready {
            self.listen_to(id, channel);
        }
    }

    fn listen_to(&mut self, id: ParticipantId, channel: CoordinatorEnd) {
        let watched = self.poll.add(id, &channel);
        let Some(device) = self.device(id) else { return };
        match watched {
            Ok(()) => device.channel = Some(channel),
            Err(error) => {
                let text = format!("it cannot be watched: {error}");
                device.standing = Standing::Lost(Loss::Disconnected, text);
            }
        }
    }

    /// A device that cannot be reached: the transition that follows fences it.
    pub(super) fn not_found(&mut self, id: ParticipantId, unreachable: Unreachable) {
        let Unreachable { loss, why } = unreachable;
        if let Some(device) = self.device(id) {
            tracing::warn!(device = device.spec.name, why, "cannot be taken over");
            device.standing = Standing::Lost(loss, why);
        }
    }

    /// What a fence of the device must find unlocked, and whether that can be found out.
    pub(super) fn found_files(
        &mut self,
        id: ParticipantId,
        files: Vec<BackingFile>,
        unprovable: Option<String>,
    ) {
        let Some(device) = self.device(id) else { return };
        device.tell(DeviceMessage::BackingFiles(files));
        if let Some(why) = unprovable {
            device.tell(DeviceMessage::Unprovable(why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_protocol::message::{Capabilities, Epoch, PeerDma, Term};
    use standstill_protocol::migration::{MigrationFlags, MigrationState};

    #[test]
    fn a_hello_of_another_machine_is_refused_by_name() {
        let hello = |machine| Hello {
            versions: VERSIONS,
            kind: "rogue".into(),
            program_version: "1".into(),
            capabilities: Capabilities {
                migration: MigrationFlags::STOP_COPY_P2P,
                peer_dma: PeerDma::Possible,
                progress: false,
                dirty_tracking: false,
                fault_injection: false,
            },
            machine,
            term: Term(1),
            epoch: Epoch(0),
            state: MigrationState::Running,
            backing_files: 0,
            memory: Vec::new(),
        };
        let (own, other) = (uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2));
        let (nic, disk) = ("nic0".to_owned(), "disk0".to_owned());
        let check = |machines: [Option<uuid::Uuid>; 2]| {
            let hellos = machines.map(hello);
            let [first, second] = &hellos;
            check_hellos([(&nic, first), (&disk, second)].into_iter(), own)
        };
        check([Some(own), Some(own)]).unwrap();
        // One that lies does not keep the others from being taken over.
        for liar in [None, Some(other)] {
            check([Some(own), liar]).unwrap();
            check([liar, Some(own)]).unwrap();
            let error = check([liar, liar]).unwrap_err();
            assert!(matches!(error, TakeOverError::ForeignMachine { .. }), "{error}");
            assert!(error.to_string().contains("\"nic0\""), "{error}");
        }
    }
}
