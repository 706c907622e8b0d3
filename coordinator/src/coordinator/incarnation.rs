//! One incarnation of a device: its process, its control channel and its actor.

use super::Message;
use super::state::{Allowance, Device, Process, Standing};
use super::supervision::Care;
use crate::custody::Custody;
use crate::description::DeviceSpec;
use crate::device::{Arguments, DeviceActor};
use crate::error::StartError;
use crate::logs::{LogTail, Origin};
use crate::process::{DeviceProcess, Spawner};
use ractor::{Actor, ActorRef};
use standstill_protocol::channel::CoordinatorEnd;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::ParticipantId;
use std::io;
use std::sync::Arc;

/// A process that was started, and our end of its control channel.
pub(super) type Spawned = (CoordinatorEnd, DeviceProcess);

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
    Ok((channel, process))
}

/// What the coordinator keeps of a process that was started; its actor lives from now on.
pub(super) async fn device(
    myself: &ActorRef<Message>,
    id: ParticipantId,
    spec: DeviceSpec,
    incarnation: u64,
    (channel, process): Spawned,
) -> io::Result<Device> {
    let mut device = without_channel(myself, id, spec, incarnation, process).await?;
    device.channel = Some(channel);
    Ok(device)
}

/// What the coordinator keeps of a process with which it cannot talk (yet); its actor lives from
/// now on.
pub(super) async fn without_channel(
    myself: &ActorRef<Message>,
    id: ParticipantId,
    spec: DeviceSpec,
    incarnation: u64,
    process: DeviceProcess,
) -> io::Result<Device> {
    let tail = LogTail::default();
    let pid = process.pid();
    let pidfd = process.pidfd().try_clone_to_owned()?;
    let origin = Origin { device: spec.name.clone(), incarnation };
    let arguments =
        Arguments { id, origin, process, tail: tail.clone(), coordinator: myself.clone() };
    let (actor, _) = Actor::spawn_linked(None, DeviceActor, arguments, myself.get_cell())
        .await
        .map_err(io::Error::other)?;
    Ok(Device {
        id,
        spec,
        incarnation,
        process: Some(Process { pid, pidfd, actor }),
        channel: None,
        tail,
        standing: Standing::Greeting,
        hello: None,
        state: MigrationState::Running,
        progress: 0,
        dropped_logs: 0,
        exit: None,
        gone: false,
        lost_before: None,
        allowance: Allowance::new(),
        care: Care::default(),
    })
}
