//! Two devices that know nothing of this project but its gate: written against the traits of the
//! `vhost-user-backend` crate, as anybody's are. Each request gets the next number.
//!
//! The script is words: `hold` lets each request wait until somebody opens the fifo beside the socket,
//! and closes it; `later` completes requests on a thread of its own; `fail` gives an error for the
//! first request; `queues:NUMBER`; `threads` has one for each queue; `in-order` says that requests
//! complete so; `stateless` and `no-state`; `old` has not all features; `kind:NAME`;
//! `deadline:MILLISECONDS` to drain; `own` has an event that is none of a ring, whenever something is
//! written to the fifo with `.own` at its end: it waits as a request does with `hold`, and looks into all
//! rings then.

use rustix::fs::{CWD, FileType, Mode, mknodat};
use standstill_device_proc::ServeOptions;
use standstill_device_proc::device::StateVersion;
use standstill_device_proc::serve::ServeError;
use standstill_device_proc::vhost_user::{
    Backend, PopGate, Popped, SaveState, SaveStateMut, VhostUser, serve_vhost_user,
};
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserBackendMut, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;

pub(crate) const SCRIPT: &str = "vhost";

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap<BitmapMmapRegion>>>;
type Vring = VringRwLock<Memory>;

/// Features that the crate cannot serve among them.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 34 | 1 << 30;

/// What both do.
#[derive(Clone)]
struct Common {
    queues: usize,
    threads: bool,
    /// Each request waits here.
    fifo: Option<String>,
    own: Option<Arc<Own>>,
    fails: bool,
    features: u64,
}

impl Common {
    fn masks(&self) -> Vec<u64> {
        if self.threads {
            (0..self.queues).map(|queue| 1 << queue).collect()
        } else {
            vec![u64::MAX]
        }
    }

    fn wait(&self) -> io::Result<()> {
        match &self.fifo {
            Some(fifo) => File::open(fifo)?.read_to_end(&mut Vec::new()).map(drop),
            None => Ok(()),
        }
    }
}

/// An event that is none of a ring.
struct Own {
    /// What makes it.
    event: File,
    /// Where it waits.
    fifo: String,
}

impl Own {
    const NUMBER: u16 = 100;

    fn new(socket: &str) -> Self {
        let path = format!("{socket}.own");
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        // Somebody always has it open to write.
        let event = File::options().read(true).write(true).open(path).unwrap();
        Self { event, fifo: format!("{socket}.fifo") }
    }

    fn wait(&self) -> io::Result<()> {
        (&self.event).read_exact(&mut [0])?;
        File::open(&self.fifo)?.read_to_end(&mut Vec::new()).map(drop)
    }
}

/// Which rings an event is for.
fn rings_of(event: u16, own: Option<&Own>, vrings: &[Vring]) -> io::Result<Range<usize>> {
    match own.filter(|_| event == Own::NUMBER) {
        Some(own) => own.wait().map(|()| 0..vrings.len()),
        None => Ok(event.into()..usize::from(event) + 1),
    }
}

/// Puts the number into the request's buffer, and gives it back.
fn complete(chain: &Chain, number: u32, vring: &Vring) -> io::Result<()> {
    let descriptor = chain.clone().writable().next().ok_or(io::ErrorKind::InvalidData)?;
    let written = chain.memory().write_obj(number.to_le(), descriptor.addr());
    written.map_err(io::Error::other)?;
    vring.add_used(chain.head_index(), 4).map_err(io::Error::other)?;
    vring.signal_used_queue()
}

/// Does all within `handle_event`, behind a lock.
struct Rng {
    common: Common,
    number: u32,
    config: [u8; 8],
    memory: Option<Memory>,
}

impl VhostUserBackendMut for Rng {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.common.queues
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        self.common.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::all()
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let range = offset as usize..(offset + size) as usize;
        self.config.get(range).unwrap_or_default().to_vec()
    }

    fn set_config(&mut self, offset: u32, data: &[u8]) -> io::Result<()> {
        let range = offset as usize..offset as usize + data.len();
        self.config.get_mut(range).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        Ok(())
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        self.common.masks()
    }

    fn handle_event(
        &mut self,
        device_event: u16,
        _: EventSet,
        vrings: &[Vring],
        _: usize,
    ) -> io::Result<()> {
        let own = self.common.own.clone();
        for queue in rings_of(device_event, own.as_deref(), vrings)? {
            self.serve(&vrings[queue])?;
        }
        Ok(())
    }
}

impl Rng {
    fn serve(&mut self, vring: &Vring) -> io::Result<()> {
        let memory = self.memory.clone().unwrap();
        loop {
            // As many backends do it: an error if the ring is not ready.
            let chain = {
                let mut vring = vring.get_mut();
                let chains = vring.get_queue_mut().iter(memory.memory());
                chains.map_err(io::Error::other)?.next()
            };
            let Some(chain) = chain else { return Ok(()) };
            self.common.wait()?;
            if std::mem::take(&mut self.common.fails) {
                return Err(io::Error::other("as the script says"));
            }
            complete(&chain, self.number, vring)?;
            self.number += 1;
        }
    }
}

impl SaveStateMut for Rng {
    fn save(&mut self, to: &mut dyn Write) -> io::Result<()> {
        to.write_all(&self.number.to_le_bytes())?;
        to.write_all(&self.config)
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let (mut number, mut config) = ([0; 4], [0; 8]);
        from.read_exact(&mut number)?;
        from.read_exact(&mut config)?;
        (self.number, self.config) = (u32::from_le_bytes(number), config);
        Ok(())
    }
}

/// A request on its way to the thread that completes it.
type Begun = (Chain, Vring, Popped);

/// Completes requests on a thread of its own, one after another.
struct Later {
    common: Common,
    number: Arc<AtomicU32>,
    memory: RwLock<Option<Memory>>,
    pops: PopGate,
    begun: Mutex<Sender<Begun>>,
}

impl Later {
    fn new(common: Common, pops: PopGate) -> Self {
        let (begun, next) = channel::<Begun>();
        let number = Arc::new(AtomicU32::new(0));
        let (own, waits) = (Arc::clone(&number), common.clone());
        std::thread::spawn(move || {
            for (chain, vring, popped) in next {
                waits.wait().unwrap();
                // A request that makes no sense is not answered.
                let _ = complete(&chain, own.fetch_add(1, Ordering::SeqCst), &vring);
                drop(popped);
            }
        });
        Self { common, number, memory: RwLock::default(), pops, begun: Mutex::new(begun) }
    }
}

impl VhostUserBackend for Later {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.common.queues
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        self.common.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::empty()
    }

    fn set_event_idx(&self, _: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.write().unwrap() = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        self.common.masks()
    }

    fn handle_event(
        &self,
        device_event: u16,
        _: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        for index in rings_of(device_event, self.common.own.as_deref(), vrings)? {
            let vring = &vrings[index];
            let queue = if self.common.threads { thread } else { index };
            let memory = self.memory.read().unwrap().clone().unwrap();
            while let Some(popped) = self.pops.enter(queue) {
                let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.memory());
                let Some(chain) = chain else { break };
                self.begun.lock().unwrap().send((chain, vring.clone(), popped)).unwrap();
            }
        }
        Ok(())
    }
}

impl SaveState for Later {
    fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        to.write_all(&self.number.load(Ordering::SeqCst).to_le_bytes())
    }

    fn load(&self, from: &mut dyn Read) -> io::Result<()> {
        let mut number = [0; 4];
        from.read_exact(&mut number)?;
        self.number.store(u32::from_le_bytes(number), Ordering::SeqCst);
        Ok(())
    }
}

/// Runs as a device process, until that is to end.
pub(crate) fn run(socket: &str, script: &[&str]) -> Result<(), ServeError> {
    let number = |key: &str| {
        script.iter().find_map(|word| word.strip_prefix(key)).map(|number| number.parse().unwrap())
    };
    let says = |word| script.contains(&word);
    let common = Common {
        queues: number("queues:").unwrap_or(1),
        threads: says("threads"),
        fifo: says("hold").then(|| format!("{socket}.fifo")),
        own: says("own").then(|| Arc::new(Own::new(socket))),
        fails: says("fail"),
        features: if says("old") { FEATURES & !(1 << 32) } else { FEATURES },
    };
    let kind = script.iter().find_map(|word| word.strip_prefix("kind:")).unwrap_or("rng");
    let deadline = Duration::from_millis(number("deadline:").unwrap_or(30_000) as u64);
    let options = ServeOptions::new(socket);
    let own = common.own.clone();
    if says("later") {
        return serve_vhost_user(options, || {
            let pops = PopGate::new(common.queues);
            let backend = Later::new(common, pops.clone());
            let device = VhostUser::new(kind, backend).holds_permits(pops).drain_deadline(deadline);
            let device = listening(device.saves_state(StateVersion::default()), own);
            Ok(if says("in-order") { device.completes_in_order() } else { device })
        });
    }
    let rng = Rng { common, number: 0, config: *b"01234567", memory: None };
    serve_vhost_user(options, || {
        let device = VhostUser::new(kind, Arc::new(Mutex::new(rng))).drain_deadline(deadline);
        let device = listening(device, own);
        let device = if says("in-order") { device.completes_in_order() } else { device };
        Ok(match (says("stateless"), says("no-state")) {
            (true, _) => device.stateless(),
            (_, true) => device,
            _ => device.saves_state(StateVersion::default()),
        })
    })
}

fn listening<B: Backend>(device: VhostUser<B>, own: Option<Arc<Own>>) -> VhostUser<B> {
    match own {
        Some(own) => device
            .listens(move |_, workers| workers.listen(0, own.event.as_fd(), Own::NUMBER.into())),
        None => device,
    }
}
