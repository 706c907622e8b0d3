//! What a later coordinator will need, written down while this one has the machine.

use super::Message;
use super::start::Start;
use super::state::{Device, Standing, State};
use crate::control_directory::{ControlDirectory, ControlDirectoryError};
use crate::custody::Custody;
use crate::description::DeviceSpec;
use crate::identity::{boot_id, identity};
use crate::process::BackingFile;
use crate::record::{DeviceRecord, MachineRecord, RECORD_VERSION};
use standstill_protocol::message::{CoordinatorMessage, Query, Term};
use standstill_protocol::transition::ParticipantId;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// A machine whose device processes outlive their coordinator.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) custody: Arc<Custody>,
    /// As it was written last.
    pub(super) record: MachineRecord,
}

/// Says what could not be found out about a process or the system.
pub(super) fn examined<T>(
    path: impl Into<PathBuf>,
    result: io::Result<T>,
) -> Result<T, ControlDirectoryError> {
    let failed =
        |source| ControlDirectoryError::System { what: "examine", path: path.into(), source };
    result.map_err(failed)
}

impl Kept {
    /// Takes the directory for a new machine; no process of it runs yet. Blocks.
    pub(super) fn claim(
        path: &Path,
        machine: &str,
        devices: &[DeviceSpec],
    ) -> Result<Self, ControlDirectoryError> {
        let directory = ControlDirectory::create(path)?;
        for spec in devices {
            directory.socket_path(&spec.name)?;
        }
        let record = MachineRecord {
            version: RECORD_VERSION,
            boot: examined("/proc/sys/kernel/random/boot_id", boot_id())?,
            machine: machine.to_owned(),
            uuid: Uuid::new_v4(),
            term: 1,
            coordinator: examined("/proc/self", identity(std::process::id()))?,
            devices: Vec::new(),
        };
        directory.lock()?.claim(&record)?;
        let custody = Arc::new(Custody::new(directory, record.uuid, Term(record.term)));
        Ok(Self { custody, record })
    }

    /// Writes down all processes of a new machine, none of which has greeted yet. Blocks.
    pub(super) fn add_processes(
        &mut self,
        specs: &[DeviceSpec],
        processes: &[Start],
    ) -> Result<(), ControlDirectoryError> {
        for (spec, process) in specs.iter().zip(processes) {
            let Ok((_, process)) = process else { continue };
            let path = format!("/proc/{}", process.pid());
            self.record.devices.push(DeviceRecord {
                name: spec.name.clone(),
                incarnation: 1,
                process: examined(path, identity(process.pid()))?,
                backing_files: Vec::new(),
            });
        }
        self.write()
    }

    fn write(&self) -> Result<(), ControlDirectoryError> {
        let lock = self.custody.directory().lock()?;
        self.custody.check()?;
        lock.write(&self.record)
    }

    /// Puts a device into the record, in the place of its earlier incarnation.
    fn put(&mut self, device: DeviceRecord) -> Result<(), ControlDirectoryError> {
        let before = self.record.devices.clone();
        match self.record.devices.iter_mut().find(|known| known.name == device.name) {
            Some(known) if *known == device => return Ok(()),
            Some(known) => *known = device,
            None => self.record.devices.push(device),
        }
        // What cannot be written must not keep others from being written.
        self.write().inspect_err(|_| self.record.devices = before)
    }

    /// Takes a device out of the record, and its socket out of the directory.
    fn take_out(&mut self, name: &str) -> Result<(), ControlDirectoryError> {
        let Some(at) = self.record.devices.iter().position(|device| device.name == name) else {
            return Ok(());
        };
        self.record.devices.remove(at);
        self.write()?;
        self.custody.directory().unbind(name)
    }

    /// Removes the record and the sockets of a machine that has ended. Blocks.
    pub(super) fn leave(&self) {
        let Self { custody, record } = self;
        let removed = custody
            .directory()
            .lock()
            .and_then(|lock| lock.remove(record.uuid, custody.term(), &record.devices));
        if let Err(error) = removed {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the record of a machine that has ended is left");
        }
    }
}

impl State {
    /// How new processes are to be held, if they outlive this coordinator.
    pub(super) fn custody(&self) -> Option<&Arc<Custody>> {
        self.kept.as_ref().map(|kept| &kept.custody)
    }

    /// Writes a device down that is about to be welcomed, and makes the socket on which it is to
    /// wait for a later coordinator; `None` if it ends with this one.
    ///
    /// From its Welcome on it may outlive this coordinator, so this comes before. It blocks for the
    /// writing of a small file, and [`LOCK_WAIT`](crate::control_directory::LOCK_WAIT) at most.
    pub(super) fn keep_device(
        &mut self,
        id: ParticipantId,
        files: &[BackingFile],
    ) -> Result<Option<OwnedFd>, ControlDirectoryError> {
        let Some(kept) = &mut self.kept else { return Ok(None) };
        let Some(device) = self.devices.get(id) else { return Ok(None) };
        let (name, incarnation) = (device.spec.name.clone(), device.incarnation);
        let Some(process) = &device.process else { return Ok(None) };
        let process = examined(format!("/proc/{}", process.pid()), process.identity())?;
        let backing_files = files.iter().map(BackingFile::record).collect();
        kept.put(DeviceRecord { name: name.clone(), incarnation, process, backing_files })?;
        kept.custody.directory().bind(&name).map(Some)
    }

    /// True once every welcomed device has shown that it has read its Welcome, and so listens and
    /// does not end with this coordinator any more. It shows that by an answer to a query.
    pub(super) fn have_settled(&mut self) -> bool {
        let (Some(_), Some(starting)) = (&self.kept, &mut self.starting) else { return true };
        let counts = |device: &Device| device.standing == Standing::Ready;
        if let Some(settling) = &mut starting.settling {
            // An optional one may be lost meanwhile.
            settling.retain(|id| self.devices.get(*id).is_some_and(counts));
            return settling.is_empty();
        }
        let query = CoordinatorMessage::Query(Query { term: self.term, epoch: self.epoch });
        for device in self.devices.iter_mut().filter(|device| counts(device)) {
            device.allowance.asked();
            if let Some(channel) = &device.channel {
                // One that cannot be asked does not answer in time.
                let _ = channel.try_send(&query, &[]);
            }
        }
        let waiting = self.devices.iter().filter(|device| counts(device));
        let ids: BTreeSet<_> = waiting.map(|device| device.id).collect();
        let settled = ids.is_empty();
        // They have as long for this as they had for their Hello, which may have come in time just so.
        let deadline = self.myself.cast_after(self.deadlines.hello, || Message::SettlingExpired);
        std::mem::replace(&mut starting.deadline, deadline).abort();
        starting.settling = Some(ids);
        settled
    }

    /// A device has answered a query.
    pub(super) fn settled(&mut self, id: ParticipantId) {
        let settling = self.starting.as_mut().and_then(|starting| starting.settling.as_mut());
        if settling.is_some_and(|settling| settling.remove(&id)) {
            self.maybe_started();
        }
    }

    /// A device without process is no part of the machine any more.
    pub(super) fn forget_device(&mut self, name: &str) {
        let Some(kept) = &mut self.kept else { return };
        if let Err(error) = kept.take_out(name) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(device = name, error, "the record of a removed device is left");
        }
    }

    /// The machine has ended: nobody is to look for it any more.
    pub(super) fn leave_directory(&mut self) {
        if self.superseded.is_none()
            && self.devices.iter().all(|device| device.gone)
            && let Some(kept) = &self.kept
        {
            kept.leave();
        }
    }
}
