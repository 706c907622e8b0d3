//! A ready subject: anybody's device programs.

use super::subject::{Look, Rig, RigError, Subject};
use rustix::fs::{MemfdFlags, memfd_create};
use standstill_coordinator::DeviceSpec;
use standstill_coordinator::report::{ParticipantReport, TransitionReport};
use standstill_protocol::message::{CounterKind, Phase};
use standstill_vfio_user::client::Client;
use standstill_vfio_user::wire::{DMA_READABLE, DMA_WRITABLE, DmaMap};
use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// How long a device may take to answer its client; long, since tests run on busy machines.
const PATIENCE: Duration = Duration::from_secs(30);

/// Makes the description of a device out of its number and the path of its data socket.
type Describe = dyn Fn(u16, &Path) -> DeviceSpec + Send + Sync;
/// Sets a device to work, or sees that it works.
type Drive = dyn Fn(Driven<'_>) -> Result<(), RigError> + Send + Sync;

/// Machines of any device programs.
///
/// Each has a megabyte of guest RAM, declared to all devices and looked at while the machine stands.
/// What devices show with their answers is compared: counters must not move and memory must be the same
/// while they stand. A vfio-user client is connected to each device, and all guest RAM mapped for its
/// DMA, if a [register](Self::register) is named that can be read, or if the devices are
/// [driven](Self::traffic).
///
/// Without traffic nobody writes to guest RAM, and only what devices show themselves can give a liar
/// away.
#[derive(Clone)]
pub struct DevicePrograms {
    describe: Arc<Describe>,
    register: Option<(u32, u64)>,
    drive: Option<Arc<Drive>>,
}

/// One device that is to work.
pub struct Driven<'a> {
    /// Its number, from 0.
    pub device: u16,
    /// A client of it.
    pub client: &'a Client,
    /// Guest RAM of [`DevicePrograms::RAM`] bytes, the same for all devices; for DMA it begins at the
    /// address 0.
    pub ram: &'a File,
}

impl std::fmt::Debug for DevicePrograms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DevicePrograms").field("register", &self.register).finish_non_exhaustive()
    }
}

impl DevicePrograms {
    /// Size of guest RAM in bytes.
    pub const RAM: u64 = 1 << 20;

    /// Machines of the devices that this describes: their number, from 0, and a path at which their
    /// data socket can be. Names must be unique in a machine.
    pub fn new(describe: impl Fn(u16, &Path) -> DeviceSpec + Send + Sync + 'static) -> Self {
        Self { describe: Arc::new(describe), register: None, drive: None }
    }

    /// A 32-bit register of each device, which can be read without any harm at any time: the sign that
    /// a device serves its client.
    #[must_use]
    pub fn register(mut self, bar: u32, offset: u64) -> Self {
        self.register = Some((bar, offset));
        self
    }

    /// How a device is made to work: this is called for each one that should, while the machine runs,
    /// after it was connected to and after every pause and resume. It sets a device to work that does
    /// not, so that it writes to guest RAM again and again from then on, and returns an error if it
    /// cannot; that the device does not work is told then.
    #[must_use]
    pub fn traffic(
        mut self,
        drive: impl Fn(Driven<'_>) -> Result<(), RigError> + Send + Sync + 'static,
    ) -> Self {
        self.drive = Some(Arc::new(drive));
        self
    }
}

impl Subject for DevicePrograms {
    fn rig(&self, devices: u16) -> Result<Box<dyn Rig>, RigError> {
        // The path of a socket has 107 bytes at most, whatever TMPDIR says.
        let folder = tempfile::Builder::new().prefix("faults-").tempdir_in("/tmp")?;
        let mut ram = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        ram.set_len(Self::RAM)?;
        ram.seek(SeekFrom::Start(0))?;
        ram.write_all(&[0x5a; 4096])?;
        let sockets = (0..devices).map(|number| folder.path().join(format!("device{number}.sock")));
        let devices = sockets.map(|socket| Device { socket, client: None, gone: false }).collect();
        let rig = DeviceProgramsRig {
            programs: self.clone(),
            ram,
            devices,
            looks: Vec::new(),
            _folder: folder,
        };
        Ok(Box::new(rig))
    }
}

struct Device {
    socket: PathBuf,
    client: Option<Client>,
    gone: bool,
}

struct DeviceProgramsRig {
    programs: DevicePrograms,
    ram: File,
    devices: Vec<Device>,
    /// Hashes of guest RAM.
    looks: Vec<u64>,
    /// Removed at the end.
    _folder: TempDir,
}

impl DeviceProgramsRig {
    fn connect_to(&mut self, number: usize) -> Result<(), RigError> {
        let DevicePrograms { register, drive, .. } = &self.programs;
        if register.is_none() && drive.is_none() {
            return Ok(());
        }
        let device = self.devices.get_mut(number).ok_or("no such device")?;
        let client = Client::builder().timeout(PATIENCE).connect(&device.socket)?;
        let flags = DMA_READABLE | DMA_WRITABLE;
        let map = DmaMap { flags, offset: 0, iova: 0, size: DevicePrograms::RAM };
        client.dma_map(&map, Some(self.ram.as_fd()))?;
        device.client = Some(client);
        Ok(())
    }

    /// Sets a device to work, and sees that it serves its client.
    fn drive(&self, number: usize) -> Result<(), RigError> {
        let DevicePrograms { register, drive, .. } = &self.programs;
        let client = self.devices.get(number).and_then(|device| device.client.as_ref());
        let client = client.ok_or("it has no client")?;
        if let Some(register) = register {
            read(client, *register)?;
        }
        let Some(drive) = drive else { return Ok(()) };
        drive(Driven { device: number.try_into()?, client, ram: &self.ram })
    }
}

impl Rig for DeviceProgramsRig {
    fn devices(&self) -> Result<Vec<DeviceSpec>, RigError> {
        let describe =
            |(number, device): (u16, &Device)| (self.programs.describe)(number, &device.socket);
        Ok((0..).zip(&self.devices).map(describe).collect())
    }

    fn ram(&self) -> Result<Option<OwnedFd>, RigError> {
        Ok(Some(self.ram.try_clone()?.into()))
    }

    fn connect(&mut self) -> Result<(), RigError> {
        (0..self.devices.len()).try_for_each(|number| self.connect_to(number))
    }

    fn remove(&mut self, device: usize) -> Result<(), RigError> {
        let device = self.devices.get_mut(device).ok_or("no such device")?;
        (device.client, device.gone) = (None, true);
        Ok(())
    }

    fn restore(&mut self, device: usize) -> Result<(), RigError> {
        self.connect_to(device)
    }

    fn traffic(&mut self, devices: &BTreeSet<usize>) -> Result<Vec<String>, RigError> {
        let DevicePrograms { register, drive, .. } = &self.programs;
        if register.is_none() && drive.is_none() {
            return Ok(Vec::new());
        }
        let idle = |&number: &usize| {
            let error = self.drive(number).err()?;
            Some(format!("device {number} does not work: {error}"))
        };
        Ok(devices.iter().filter_map(idle).collect())
    }

    fn access(&mut self, device: usize) -> Option<super::Access> {
        let (register, device) = (self.programs.register?, self.devices.get(device)?);
        let client = device.client.clone()?;
        Some(Box::new(move || read(&client, register)))
    }

    fn look(&mut self, moment: Look) -> Result<(), RigError> {
        if moment == Look::AfterStop {
            self.looks.clear();
        }
        let mut bytes = vec![0; usize::try_from(DevicePrograms::RAM)?];
        self.ram.read_exact_at(&mut bytes, 0)?;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        self.looks.push(hasher.finish());
        Ok(())
    }

    fn late_writes(
        &mut self,
        stopped: Option<&TransitionReport>,
        resume: Option<&TransitionReport>,
    ) -> Result<Vec<String>, RigError> {
        let mut late = Vec::new();
        let looks = std::mem::take(&mut self.looks);
        if looks.windows(2).any(|pair| pair[0] != pair[1]) {
            late.push("guest RAM changed while every device was stopped".to_owned());
        }
        if let (Some(stopped), Some(resume)) = (stopped, resume) {
            late.extend(moved(stopped, resume));
        }
        Ok(late)
    }
}

/// Reads the register.
fn read(client: &Client, (bar, offset): (u32, u64)) -> Result<(), RigError> {
    let mut value = [0; 4];
    Ok(client.region_read(bar, offset, &mut value)?)
}

/// What devices show that has moved between their last words before they stood and their first ones after, in
/// words. Nothing is said of those that have shown nothing, as one that refuses, or were fenced.
#[must_use]
pub fn moved(stopped: &TransitionReport, resume: &TransitionReport) -> Vec<String> {
    let mut moved = Vec::new();
    for stopped in stopped.participants.iter().filter(|stopped| stopped.fence.is_none()) {
        let same = |started: &&ParticipantReport| {
            (&started.name, started.incarnation) == (&stopped.name, stopped.incarnation)
        };
        let mut started = resume.participants.iter().filter(|started| started.fence.is_none());
        if let Some(started) = started.find(same) {
            moved.extend(moved_of_one(stopped, started));
        }
    }
    moved
}

fn moved_of_one(stopped: &ParticipantReport, started: &ParticipantReport) -> Vec<String> {
    let before = stopped.command(Phase::Stop).and_then(|command| command.evidence());
    let after = started.command(Phase::PrepareStart).and_then(|command| command.evidence());
    let (Some(before), Some(after)) = (before, after) else {
        return Vec::new();
    };
    let name = &stopped.name;
    let mut moved = Vec::new();
    if let (Some(before), Some(after)) = (before.memory_hash, after.memory_hash)
        && before != after
    {
        moved.push(format!("the memory of {name} changed while it was stopped"));
    }
    // What others have written into it is shown at another moment.
    for counter in before.counters.iter().filter(|c| c.kind != CounterKind::Received) {
        let same =
            after.counters.iter().find(|c| (c.kind, c.index) == (counter.kind, counter.index));
        if let Some(now) = same.filter(|now| now.value != counter.value) {
            let (kind, index, value, now) = (counter.kind, counter.index, counter.value, now.value);
            moved.push(format!(
                "counter {kind:?} {index} of {name} moved from {value} to {now} while it was stopped"
            ));
        }
    }
    moved
}
