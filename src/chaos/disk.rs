//! A disk among the copy engines: a vhost-user-blk process, and the frontend that keeps it at work.
//!
//! It is the first device of its machine. Its guest is a part of the guest RAM of all, so that whatever the
//! disk writes there while the machine stands is seen, as what the engines write is; and its image is looked at,
//! too.

use super::subject::{Engines, EnginesRig};
use standstill::coordinator::DeviceSpec;
use standstill::coordinator::report::TransitionReport;
use standstill::protocol::fault::{Action, Fault, Point};
use standstill_testkit::plan::{
    Cause, Injection, Outside, OutsideAction, Plan, PlanError, Resource,
};
use standstill_testkit::sweep::{Access, Look, Rig, RigError, Subject};
use standstill_testkit::vhost_user::{
    Base, BlockAnswer, BlockRequest, BlockStatus, Frontend, Guest, RingLayout,
};
use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Which device the disk is.
pub(super) const DISK: u16 = 0;

const QUEUES: usize = 2;
/// Where the cache mode is in the configuration space, the only thing there that can be written.
const WRITEBACK: u32 = 32;
/// Size of a block, and of the buffers of the rings, in bytes.
const BLOCK: usize = 4096;
const SECTORS: u64 = 8;
/// How many blocks each queue has.
const BLOCKS: u64 = 8;
/// How many requests are under way in each queue: three descriptors each.
const DEPTH: usize = 4;
const RING: RingLayout = RingLayout { descriptors: 16, buffer: 4096 };
/// How long each request takes, so that some are in flight whenever a stop comes.
const DELAY: &str = "--delay=1ms";
/// What the driver rests between two looks at its rings: little, since many machines are at work on few CPUs.
const REST: Duration = Duration::from_millis(2);
/// How long it is waited until the disk has done what it was asked.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the table says what becomes of a disk that has this fault. A disk writes to a file, which the
/// limit of its size forbids; and one whose thread hangs before it takes a request may have taken others
/// before, or none: nobody can say which. That it has taken one is another fault.
pub(super) fn is_judged(cause: &Cause) -> bool {
    match cause {
        Cause::Inside(Fault { point: Point::Dma, action, .. }) => match action {
            Action::Spin => false,
            Action::DelayMs(ms) => u64::from(*ms) < 1000,
            _ => true,
        },
        Cause::Outside(Outside { action: OutsideAction::Limit(limit), .. }) => {
            limit.resource != Resource::FileSize
        }
        _ => true,
    }
}

/// Whether the table says what becomes of a machine whose disk has the faults of this plan.
pub(super) fn accepts(plan: &Plan) -> Result<(), PlanError> {
    let mut numbered = (1..).zip(&plan.faults);
    let unknown = numbered.find(|(_, fault)| fault.device == DISK && !is_judged(&fault.cause));
    match unknown {
        None => Ok(()),
        Some((fault, Injection { cause, .. })) => Err(PlanError::Impossible {
            fault,
            what: cause.to_string(),
            why: "the table of expected outcomes says nothing of a disk (device 0) with that fault",
        }),
    }
}

/// Machines of a disk and of copy engines. The disk is device 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskAndEngines;

impl Subject for DiskAndEngines {
    fn rig(&self, devices: u16) -> Result<Box<dyn Rig>, RigError> {
        let engines = Engines::with_room(devices.saturating_sub(1), RING.size(QUEUES))?;
        let folder = tempfile::Builder::new().prefix("disk-").tempdir()?;
        let image = folder.path().join("image");
        File::create_new(&image)?.set_len(QUEUES as u64 * BLOCKS * BLOCK as u64)?;
        let ram = engines.ram()?.ok_or("the engines have no guest RAM")?;
        let guest = Guest::in_file(File::from(ram), engines.room()?, QUEUES, RING)?;
        let disk = Disk {
            socket: folder.path().join("disk.sock"),
            image,
            driver: Arc::new(Mutex::new(Driver::new(guest))),
            frontend: None,
            load: None,
            connections: 0,
            looks: Vec::new(),
            _folder: folder,
        };
        Ok(Box::new(MixedRig { disk, engines }))
    }
}

struct MixedRig {
    disk: Disk,
    engines: EnginesRig,
}

/// The number of an engine among the engines; `None` for the disk.
fn engine(device: usize) -> Option<usize> {
    device.checked_sub(1)
}

fn engines(devices: &BTreeSet<usize>) -> BTreeSet<usize> {
    devices.iter().copied().filter_map(engine).collect()
}

impl Rig for MixedRig {
    fn devices(&self) -> Result<Vec<DeviceSpec>, RigError> {
        let mut devices = vec![self.disk.spec()?];
        devices.extend(self.engines.devices()?);
        Ok(devices)
    }

    fn ram(&self) -> Result<Option<OwnedFd>, RigError> {
        self.engines.ram()
    }

    fn connect(&mut self) -> Result<(), RigError> {
        self.disk.connect()?;
        self.engines.connect()
    }

    fn remove(&mut self, device: usize) -> Result<(), RigError> {
        match engine(device) {
            Some(engine) => self.engines.remove(engine),
            None => {
                self.disk.leave();
                Ok(())
            }
        }
    }

    fn restore(&mut self, device: usize) -> Result<(), RigError> {
        match engine(device) {
            Some(engine) => self.engines.restore(engine),
            None => self.disk.connect(),
        }
    }

    fn go_on(&mut self, devices: &BTreeSet<usize>) -> Result<(), RigError> {
        self.engines.go_on(&engines(devices))
    }

    fn traffic(&mut self, devices: &BTreeSet<usize>) -> Result<Vec<String>, RigError> {
        let mut idle = self.engines.traffic(&engines(devices))?;
        if devices.contains(&DISK.into()) {
            idle.extend(self.disk.traffic()?);
        }
        // Whether or not anything is expected of it.
        idle.extend(self.disk.driver().wrong.take());
        Ok(idle)
    }

    fn access(&mut self, device: usize) -> Option<Access> {
        match engine(device) {
            Some(engine) => self.engines.access(engine),
            None => self.disk.access(),
        }
    }

    fn look(&mut self, moment: Look) -> Result<(), RigError> {
        self.disk.look(moment)?;
        self.engines.look(moment)?;
        self.disk.looked(moment)
    }

    fn late_writes(
        &mut self,
        stopped: Option<&TransitionReport>,
        resume: Option<&TransitionReport>,
    ) -> Result<Vec<String>, RigError> {
        let mut late = self.engines.late_writes(stopped, resume)?;
        let looks = std::mem::take(&mut self.disk.looks);
        let [first, last] = &looks[..] else {
            return Err("nobody has looked at the disk".into());
        };
        if first.used != last.used {
            let (from, to) = (first.used, last.used);
            late.push(format!(
                "the disk has gone from {from:?} to {to:?} answers while it was stopped"
            ));
        }
        if first.image != last.image {
            late.push("the image of the disk changed while every device was stopped".to_owned());
        }
        Ok(late)
    }
}

/// What does not move while the disk is stopped, whatever its driver does.
#[derive(Clone, Copy, Debug)]
struct Still {
    /// Indexes of its used rings.
    used: [u16; QUEUES],
    /// Hash of its image.
    image: u64,
}

/// The disk as its VMM has it.
struct Disk {
    socket: PathBuf,
    image: PathBuf,
    driver: Arc<Mutex<Driver>>,
    /// That of the present connection. Whoever hangs in a call of it has it for himself.
    frontend: Option<Arc<Mutex<Frontend>>>,
    load: Option<Load>,
    /// How many there were.
    connections: u32,
    /// Of the last standstill.
    looks: Vec<Still>,
    /// Removed at the end.
    _folder: TempDir,
}

impl Disk {
    fn spec(&self) -> Result<DeviceSpec, RigError> {
        let program = std::env::current_exe()?;
        let spec = DeviceSpec::new("disk", program).args(["device", "vhost-user-blk", DELAY]);
        let spec = spec.arg(format!("--queues={QUEUES}")).arg("--socket").arg(&self.socket);
        Ok(spec.arg("--file").arg(&self.image))
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        lock(&self.driver)
    }

    /// Starts the rings of a new process, once as QEMU does and once as Cloud Hypervisor does, and has the
    /// driver go on.
    fn connect(&mut self) -> Result<(), RigError> {
        let mut driver = lock(&self.driver);
        let mut frontend = Frontend::connect(&self.socket, &driver.guest)?;
        let base = if self.connections.is_multiple_of(2) { Base::Used } else { Base::Avail };
        frontend.start_rings(&mut driver.guest, base)?;
        driver.rests = false;
        drop(driver);
        self.frontend = Some(Arc::new(Mutex::new(frontend)));
        self.connections += 1;
        if self.load.is_none() {
            self.load = Some(Load::start(Arc::clone(&self.driver))?);
        }
        Ok(())
    }

    fn leave(&mut self) {
        (self.frontend, self.load) = (None, None);
    }

    /// Waits until the disk has done all that it was asked before this.
    fn traffic(&self) -> Result<Option<String>, RigError> {
        let asked = self.driver().asked;
        let begin = Instant::now();
        loop {
            let driver = self.driver();
            if driver.answered.iter().zip(asked).all(|(answered, asked)| *answered >= asked) {
                return Ok(None);
            }
            if begin.elapsed() > PATIENCE || driver.wrong.is_some() {
                let answered = driver.answered;
                let text = format!("the disk has answered {answered:?} of {asked:?} requests");
                return Ok(Some(text));
            }
            drop(driver);
            std::thread::park_timeout(REST);
        }
    }

    fn access(&self) -> Option<Access> {
        let frontend = Arc::clone(self.frontend.as_ref()?);
        Some(Box::new(move || Ok(lock(&frontend).set_config(WRITEBACK, &[1])?)))
    }

    /// Before anybody looks at guest RAM. From the first look on the guest stands: its last requests are in the
    /// rings, of which the disk has not been told.
    fn look(&mut self, moment: Look) -> Result<(), RigError> {
        let mut driver = lock(&self.driver);
        let mut used = [0; QUEUES];
        for (queue, used) in used.iter_mut().enumerate() {
            *used = driver.guest.used(queue)?;
        }
        let mut hasher = DefaultHasher::new();
        std::fs::read(&self.image)?.hash(&mut hasher);
        if moment == Look::AfterStop {
            self.looks.clear();
            driver.turn(false);
            driver.rests = true;
        }
        self.looks.push(Still { used, image: hasher.finish() });
        Ok(())
    }

    /// After that. The first time the disk is told, as by a kick that was under way when the guest was stopped:
    /// nothing may come of it.
    fn looked(&self, moment: Look) -> Result<(), RigError> {
        let mut driver = self.driver();
        driver.rests = moment == Look::AfterStop;
        (0..QUEUES).try_for_each(|queue| driver.guest.kick(queue)).map_err(Into::into)
    }
}

/// A driver that keeps each queue of its disk at work, and knows what must come of that.
struct Driver {
    guest: Guest,
    /// It asks for nothing now.
    rests: bool,
    /// By queue.
    asked: [u64; QUEUES],
    answered: [u64; QUEUES],
    /// By block: what is in it, and what is to be done with it.
    blocks: Vec<(u8, Option<Begun>)>,
    /// What the disk has done that it must not.
    wrong: Option<String>,
}

/// A request of one block that is under way.
#[derive(Clone, Copy, Debug)]
struct Begun {
    queue: usize,
    number: u64,
    writes: bool,
}

impl Driver {
    fn new(guest: Guest) -> Self {
        let blocks = vec![(0, None); QUEUES * usize::try_from(BLOCKS).unwrap_or(0)];
        let (asked, answered) = ([0; QUEUES], [0; QUEUES]);
        Self { guest, rests: true, asked, answered, blocks, wrong: None }
    }

    /// Looks at answers, and asks for more. If it may not tell the disk, that waits in the rings.
    fn turn(&mut self, tells: bool) {
        if self.wrong.is_some() {
            return;
        }
        let done = (0..QUEUES).try_for_each(|queue| {
            for answer in self.guest.take_answers(queue)? {
                self.check(queue, &BlockAnswer::of(answer)?)?;
            }
            while self.guest.outstanding(queue)? < DEPTH {
                self.ask(queue)?;
            }
            if tells {
                self.guest.notify(queue)?;
            }
            Ok::<_, RigError>(())
        });
        self.wrong = done.err().map(|error| format!("the disk has failed: {error}"));
    }

    /// One request for the next block of a queue: it is written, then read, in turns.
    fn ask(&mut self, queue: usize) -> Result<(), RigError> {
        let number = self.asked.get_mut(queue).ok_or("there is no such queue")?;
        let block = queue as u64 * BLOCKS + *number % BLOCKS;
        let writes = (*number / BLOCKS).is_multiple_of(2);
        let (byte, begun) = self.blocks.get_mut(usize::try_from(block)?).ok_or("no such block")?;
        let sector = block * SECTORS;
        let request = if writes {
            BlockRequest::Write { sector, data: vec![byte.wrapping_add(1); BLOCK] }
        } else {
            BlockRequest::Read { sector, length: BLOCK }
        };
        *begun = Some(Begun { queue, number: *number, writes });
        *number += 1;
        self.guest.push_block(queue, &request)?;
        Ok(())
    }

    fn check(&mut self, queue: usize, answer: &BlockAnswer) -> Result<(), RigError> {
        let BlockAnswer { request, status, data } = answer;
        if *status != BlockStatus::Ok {
            return Err(format!("{request} has ended with {status:?}").into());
        }
        let own = |begun: &Begun| (begun.queue, begun.number) == (queue, request.number);
        let mut blocks = self.blocks.iter_mut();
        let block = blocks.find(|(_, begun)| begun.as_ref().is_some_and(own));
        let (byte, begun) = block.ok_or_else(|| format!("{request} was not made"))?;
        match begun.take() {
            Some(Begun { writes: true, .. }) => *byte = byte.wrapping_add(1),
            _ if data.len() != BLOCK || data.iter().any(|found| found != byte) => {
                let found = data.first();
                return Err(format!("{request} has read {found:?}, and {byte} was written").into());
            }
            _ => {}
        }
        if let Some(answered) = self.answered.get_mut(queue) {
            *answered += 1;
        }
        Ok(())
    }
}

/// The thread on which a driver is at work, until this is dropped.
struct Load {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn start(driver: Arc<Mutex<Driver>>) -> Result<Self, RigError> {
        let is_over = Arc::new(AtomicBool::new(false));
        let own = Arc::clone(&is_over);
        let thread = std::thread::Builder::new().name("driver".into()).spawn(move || {
            while !own.load(Ordering::Relaxed) {
                let mut driver = lock(&driver);
                if !driver.rests {
                    driver.turn(true);
                }
                drop(driver);
                std::thread::park_timeout(REST);
            }
        })?;
        Ok(Self { is_over, thread: Some(thread) })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
