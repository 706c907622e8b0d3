//! One incarnation of a device: its process, its control channel and its actor.

use super::Message;
#[cfg(any(test, fuzzing))]
use super::script::{Script, ScriptedProcess};
use super::state::{Allowance, Device, Standing, Tellings};
use super::supervision::Care;
use crate::custody::Custody;
use crate::description::DeviceSpec;
use crate::device::{Arguments, DeviceActor, Message as DeviceMessage};
use crate::error::StartError;
use crate::logs::{LogTail, Origin};
use crate::mailbox::Mailbox;
use crate::process::{DeviceProcess, Spawner, identity_behind};
use crate::record::ProcessIdentity;
use ractor::{Actor, ActorId, ActorRef};
use rustix::process::Signal;
use standstill_protocol::channel::CoordinatorEnd;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::ParticipantId;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A process that was started, and our end of its control channel.
pub(crate) type Spawned = (CoordinatorEnd, Child);

/// A process that has no actor yet. It ends when this is dropped.
#[derive(Debug)]
pub(crate) enum Child {
    Process(DeviceProcess),
    /// A test plays it.
    #[cfg(any(test, fuzzing))]
    Scripted(ScriptedProcess),
}

impl Child {
    pub(super) fn pid(&self) -> u32 {
        match self {
            Self::Process(process) => process.pid(),
            #[cfg(any(test, fuzzing))]
            Self::Scripted(_) => std::process::id(),
        }
    }
}

/// The process of a device, whose actor owns it.
pub(super) enum Process {
    Running {
        pid: u32,
        /// Of its own, so that all can be killed at once.
        pidfd: OwnedFd,
        actor: ActorRef<DeviceMessage>,
    },
    /// A test plays both.
    #[cfg(any(test, fuzzing))]
    Scripted(ScriptedProcess),
}

impl Process {
    pub(super) fn pid(&self) -> u32 {
        match self {
            Self::Running { pid, .. } => *pid,
            #[cfg(any(test, fuzzing))]
            Self::Scripted(_) => std::process::id(),
        }
    }

    /// Tells its actor something. One that is gone has killed the process.
    pub(super) fn tell(&self, message: DeviceMessage) {
        match self {
            Self::Running { actor, .. } => drop(actor.cast(message)),
            #[cfg(any(test, fuzzing))]
            Self::Scripted(process) => process.tell(message),
        }
    }

    /// It is to outlive this program, as long as it is this program's.
    fn place_under(&self, custody: Arc<Custody>) {
        match self {
            Self::Running { actor, .. } => drop(actor.cast(DeviceMessage::PlaceUnder(custody))),
            #[cfg(any(test, fuzzing))]
            Self::Scripted(_) => drop(custody),
        }
    }

    /// Sends SIGKILL, past its actor.
    pub(super) fn kill(&self) {
        match self {
            // Fails only if it is gone.
            Self::Running { pidfd, .. } => {
                let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
            }
            #[cfg(any(test, fuzzing))]
            Self::Scripted(process) => process.kill(),
        }
    }

    /// Whether that is its actor.
    pub(super) fn is_of(&self, id: ActorId) -> bool {
        match self {
            Self::Running { actor, .. } => actor.get_id() == id,
            #[cfg(any(test, fuzzing))]
            Self::Scripted(_) => false,
        }
    }

    /// By which it can be found again.
    pub(super) fn identity(&self) -> io::Result<ProcessIdentity> {
        match self {
            Self::Running { pid, pidfd, .. } => {
                let ended = || io::Error::other("the process has ended");
                identity_behind(pidfd, *pid)?.ok_or_else(ended)
            }
            #[cfg(any(test, fuzzing))]
            Self::Scripted(_) => crate::identity::identity(std::process::id()),
        }
    }
}

/// Starts the processes of later incarnations, where that may block.
pub(super) enum Starter {
    Spawner(Spawner),
    /// A test does, when it wants to.
    #[cfg(any(test, fuzzing))]
    Script(Script),
}

impl Starter {
    /// Starts the process of the incarnation `next` in the place of `id`; [`Message::Spawned`] is
    /// the answer.
    pub(super) fn start(
        &self,
        myself: &Mailbox,
        (id, next): (ParticipantId, ParticipantId),
        spec: DeviceSpec,
    ) {
        match self {
            Self::Spawner(spawner) => {
                let (spawner, myself) = (spawner.clone(), myself.clone());
                tokio::task::spawn_blocking(move || {
                    // Not to outlive this coordinator before it is somebody's.
                    let spawned = spawn(&spawner, &spec, None).map_err(Box::new);
                    // With a coordinator that is gone the process is dropped, and so ends.
                    let _ = myself.cast(Message::Spawned(id, next, spawned));
                });
            }
            #[cfg(any(test, fuzzing))]
            Self::Script(script) => script.start_asked(id, next, spec.name),
        }
    }
}

/// Ends a process that nobody wants any more, which may take a moment; [`Message::Discarded`] is
/// the answer.
pub(super) fn discard(myself: &Mailbox, spawned: Spawned) {
    let scripted = !matches!(spawned.1, Child::Process(_));
    let myself = myself.clone();
    let end = move || {
        drop(spawned);
        let _ = myself.cast(Message::Discarded);
    };
    if scripted { end() } else { drop(tokio::task::spawn_blocking(end)) }
}

/// Starts a device process. Blocks for as long as that takes.
///
/// `custody` is how it is held if it is to outlive this coordinator.
pub(super) fn spawn(
    spawner: &Spawner,
    spec: &DeviceSpec,
    custody: Option<&Arc<Custody>>,
) -> Result<Spawned, StartError> {
    let (channel, stdin) = CoordinatorEnd::pair()
        .map_err(|source| StartError::System { what: "make a control channel", source })?;
    let mut process = spawner
        .spawn(&spec.process, stdin)
        .map_err(|source| StartError::Spawn { device: spec.name.clone(), source })?;
    if let Some(custody) = custody {
        process.place_under(Arc::clone(custody));
    }
    Ok((channel, Child::Process(process)))
}

/// What the coordinator keeps of a process that was started; its actor lives from now on.
pub(super) async fn device(
    myself: &Mailbox,
    id: ParticipantId,
    spec: DeviceSpec,
    incarnation: u64,
    (channel, process): Spawned,
) -> io::Result<Device> {
    let mut device = without_channel(myself, id, spec, incarnation, process).await?;
    device.channel = Some(channel);
    Ok(device)
}

/// The same of a later incarnation, which nobody could find yet: it outlives this program, if it is to,
/// from the moment on that it has an actor. If it gets none, it ends.
pub(super) async fn newcomer(
    myself: &Mailbox,
    id: ParticipantId,
    spec: DeviceSpec,
    incarnation: u64,
    spawned: Spawned,
    custody: Option<&Arc<Custody>>,
) -> io::Result<Device> {
    let device = device(myself, id, spec, incarnation, spawned).await?;
    if let (Some(process), Some(custody)) = (&device.process, custody) {
        process.place_under(Arc::clone(custody));
    }
    Ok(device)
}

/// What the coordinator keeps of a process with which it cannot talk (yet); its actor lives from
/// now on.
pub(super) async fn without_channel(
    myself: &Mailbox,
    id: ParticipantId,
    spec: DeviceSpec,
    incarnation: u64,
    child: Child,
) -> io::Result<Device> {
    let tail = LogTail::default();
    let process = match child {
        Child::Process(process) => {
            let origin = Origin { device: spec.name.clone(), incarnation };
            own(myself, id, origin, process, tail.clone()).await?
        }
        #[cfg(any(test, fuzzing))]
        Child::Scripted(process) => Process::Scripted(process.of(id)),
    };
    Ok(Device {
        id,
        spec,
        incarnation,
        process: Some(process),
        channel: None,
        tail,
        standing: Standing::Greeting,
        hello: None,
        state: MigrationState::Running,
        told: None,
        lease: None,
        progress: 0,
        dropped_logs: 0,
        exit: None,
        gone: false,
        allowance: Allowance::new(),
        tellings: Tellings::new(),
        care: Care::default(),
    })
}

/// Gives a process an actor.
async fn own(
    myself: &Mailbox,
    id: ParticipantId,
    origin: Origin,
    process: DeviceProcess,
    tail: LogTail,
) -> io::Result<Process> {
    let pid = process.pid();
    let pidfd = process.pidfd().try_clone_to_owned()?;
    let coordinator = myself.actor()?.clone();
    let supervisor = coordinator.get_cell();
    let arguments = Arguments { id, origin, process, tail, coordinator };
    let spawned = Actor::spawn_linked(None, DeviceActor, arguments, supervisor).await;
    let (actor, _) = spawned.map_err(io::Error::other)?;
    Ok(Process::Running { pid, pidfd, actor })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_directory::ControlDirectory;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use standstill_protocol::message::Term;

    #[tokio::test]
    async fn a_newcomer_that_gets_no_actor_ends_although_the_others_outlive_their_coordinator() {
        let folder = tempfile::tempdir().unwrap();
        let directory = ControlDirectory::create(&folder.path().join("vm")).unwrap();
        let custody = Arc::new(Custody::new(directory, uuid::Uuid::nil(), Term(1)));
        custody.keep();
        let spec = DeviceSpec::new("d0", "sleep").args(["60"]);
        let spawned = spawn(&Spawner::new().unwrap(), &spec, None).unwrap();
        let Child::Process(process) = &spawned.1 else { unreachable!("it is a real one") };
        let pidfd = process.pidfd().try_clone_to_owned().unwrap();
        // There is no actor here to which it could be linked.
        let nobody = Mailbox::Script(Script::new());
        let id = ParticipantId(1);
        let error = newcomer(&nobody, id, spec, 2, spawned, Some(&custody)).await.err().unwrap();
        assert!(error.to_string().contains("stands in for the actor"), "{error}");
        let patience = Timespec { tv_sec: 30, tv_nsec: 0 };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&patience)).unwrap(), 1, "it lives on");
    }
}
