//! A backend of the `vhost-user-backend` crate as a device process: it is paused and resumed by a
//! coordinator, and a request that comes meanwhile waits.
//!
//! The device is a virtio entropy source that is none: it gives the numbers from 0 on, so that one
//! sees that none is lost and none comes twice. It knows nothing of states, phases or coordinators.
//! `cargo run --example vhost_user_backend` is the VMM; started with `device` the program is the device
//! process, for any VMM.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::{DeviceSpec, MachineBuilder};
use standstill::device_proc::ServeOptions;
use standstill::device_proc::vhost_user::{VhostUser, serve_vhost_user};
use standstill_testkit::vhost_user::{Base, Completion, Frontend, Guest, Part};
use std::error::Error;
use std::io;
use std::sync::Mutex;
use std::time::Duration;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// The virtio feature `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Numbers {
    memory: Option<Memory>,
    next: u32,
}

impl Numbers {
    /// As many bytes as are wanted.
    fn take(&mut self, length: u32) -> Vec<u8> {
        let begin = self.next;
        self.next = begin.wrapping_add(length.div_ceil(4));
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        (begin..).flat_map(u32::to_le_bytes).take(count).collect()
    }
}

impl VhostUserBackendMut for Numbers {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        VERSION_1
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::LOG_SHMFD
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    /// Nothing can be configured: zeros, for those who ask.
    fn get_config(&self, _offset: u32, size: u32) -> Vec<u8> {
        vec![0; usize::try_from(size).unwrap_or_default()]
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn handle_event(
        &mut self,
        event: u16,
        _events: EventSet,
        vrings: &[Self::Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let (Some(memory), Some(vring)) = (self.memory.clone(), vrings.get(usize::from(event)))
        else {
            return Ok(());
        };
        loop {
            let next = {
                let mut ring = vring.get_mut();
                let chains = ring.get_queue_mut().iter(memory.memory());
                chains.map_err(io::Error::other)?.next()
            };
            let Some(chain) = next else { return Ok(()) };
            let mut length = 0;
            for part in chain.clone().writable() {
                let numbers = self.take(part.len());
                chain.memory().write_slice(&numbers, part.addr()).map_err(io::Error::other)?;
                length += part.len();
            }
            vring.add_used(chain.head_index(), length).map_err(io::Error::other)?;
            vring.signal_used_queue()?;
        }
    }
}

/// The device process. Its state is not saved: nobody misses a number.
fn device(socket: &str) -> Result<(), Box<dyn Error>> {
    let build = || Ok(VhostUser::new("numbers", Mutex::new(Numbers::default())).stateless());
    Ok(serve_vhost_user(ServeOptions::new(socket), build)?)
}

fn numbers(answer: &Completion) -> String {
    let words = answer.data.iter().flat_map(|part| part.chunks_exact(4));
    let numbers = words.filter_map(|word| word.try_into().ok()).map(u32::from_le_bytes);
    numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(" ")
}

fn vmm() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("numbers0");
    let spec = DeviceSpec::new("numbers0", std::env::current_exe()?).arg("device").arg(&socket);
    let machine = MachineBuilder::new("vm0").devices([spec]).start_blocking()?;
    println!("numbers0 is {}", machine.status()?.devices[0].kind);
    let mut guest = Guest::new(1)?;
    let mut frontend = Frontend::connect(&socket, &guest)?;
    frontend.start_rings(&mut guest, Base::Used)?;
    machine.declare_ram(guest.file())?;
    let request = [Part::Writable(12)];
    guest.push(0, &request)?;
    guest.notify(0)?;
    println!("the guest gets {}", numbers(&guest.wait_all(0, PATIENCE)?[0]));

    let stopped = machine.pause()?;
    print!("{}", stopped.report());
    guest.push(0, &request)?;
    guest.notify(0)?;
    println!("{} request waits", guest.outstanding(0)?);
    print!("{}", stopped.resume()?);
    println!("the guest gets {}", numbers(&guest.wait_all(0, PATIENCE)?[0]));
    drop(frontend);
    machine.shutdown()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().collect::<Vec<_>>().as_slice() {
        [_, word, socket] if word == "device" => device(socket),
        _ => vmm(),
    }
}
