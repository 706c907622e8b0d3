//! A client and a device process by themselves: one that is killed under calls, clients that come and
//! go, and a state that moves from one process to another between DMA by messages.

use crate::machine::LONG;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::device_proc::devices::copy_engine::{Descriptor, FLAG_INTERRUPT};
use standstill::device_proc::memory::SharedMemory;
use standstill::protocol::migration::MigrationState as S;
use standstill::vfio_user::client::{Builder, Client, DmaTarget};
use standstill::vfio_user::wire::{DMA_READABLE, DMA_WRITABLE, DmaMap, Errno, IrqIndex};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tempfile::TempDir;

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x10_0000;
const MSIX: u32 = IrqIndex::Msix as u32;

/// A copy engine without a coordinator.
struct Process {
    child: Child,
    socket: PathBuf,
    _folder: TempDir,
}

impl Process {
    fn start() -> Self {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let socket = folder.path().join("data.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "copy-engine", "--memory=65536", "--socket"])
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, socket, _folder: folder }
    }

    /// As soon as it listens.
    fn connect(&self, builder: impl Fn() -> Builder) -> Client {
        let begin = Instant::now();
        loop {
            match builder().timeout(LONG).connect(&self.socket) {
                Ok(client) => return client,
                Err(error) => assert!(begin.elapsed() < LONG, "{error:?}"),
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn window() -> DmaMap {
    DmaMap { flags: DMA_READABLE | DMA_WRITABLE, offset: 0, iova: BASE, size: SIZE }
}

fn read_u32(client: &Client, register: u64) -> u32 {
    let mut bytes = [0; 4];
    client.region_read(REGISTER_BAR, register, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

fn read_u64(client: &Client, register: u64) -> u64 {
    let mut bytes = [0; 8];
    client.region_read(REGISTER_BAR, register, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn write(client: &Client, register: u64, value: &[u8]) {
    client.region_write(REGISTER_BAR, register, value).unwrap();
}

#[test]
fn a_process_that_is_killed_ends_every_call_and_every_later_one() {
    let mut process = Process::start();
    let client = process.connect(Client::builder);
    let (works, working) = channel();
    let (ends, ended) = channel();
    for _ in 0..4 {
        let (client, works, ends) = (client.clone(), works.clone(), ends.clone());
        std::thread::spawn(move || {
            let mut told = false;
            let error = loop {
                let mut bytes = [0; 4];
                match client.region_read(REGISTER_BAR, ID, &mut bytes) {
                    Ok(()) => assert_eq!(u32::from_le_bytes(bytes), ID_VALUE),
                    Err(error) => break error,
                }
                if !std::mem::replace(&mut told, true) {
                    works.send(()).unwrap();
                }
            };
            ends.send(error).unwrap();
        });
    }
    for _ in 0..4 {
        working.recv_timeout(LONG).unwrap();
    }
    process.child.kill().unwrap();
    for _ in 0..4 {
        let error = ended.recv_timeout(LONG).unwrap();
        assert!(error.is_end(), "{error:?}");
    }
    assert!(client.reset().unwrap_err().is_end());
    assert!(client.region_write_posted(REGISTER_BAR, CONTROL, &[0; 4]).unwrap_err().is_end());
    let state = client.set_migration_state(S::Stop).unwrap_err();
    assert!(state.source.is_end() && state.now.unwrap_err().is_end());
}

#[test]
fn a_client_that_comes_finds_the_device_as_the_last_one_has_left_it_and_nothing_of_that_one() {
    let process = Process::start();
    let memory = SharedMemory::create("window", SIZE).unwrap();
    let vector = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let first = process.connect(Client::builder);
    first.dma_map(&window(), Some(memory.as_fd())).unwrap();
    first.irq_install(MSIX, 0, &[vector.as_fd()]).unwrap();
    first.irq_trigger(MSIX, 0, 1).unwrap();
    assert!(rustix::io::read(&vector, &mut [0; 8]).is_ok());
    write(&first, RING_BASE, &BASE.to_le_bytes());
    first.set_migration_state(S::Stop).unwrap();
    drop(first);

    let second = process.connect(Client::builder);
    assert_eq!(second.migration_state().unwrap(), S::Stop, "nobody has started it");
    let refused = second.region_write(REGISTER_BAR, RING_ENTRIES, &[0; 4]).unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EINVAL));
    second.set_migration_state(S::Running).unwrap();
    assert_eq!(read_u64(&second, RING_BASE), BASE);
    let probe = || {
        write(&second, PROBE_IOVA, &BASE.to_le_bytes());
        write(&second, PROBE_LEN, &SIZE.to_le_bytes());
        read_u32(&second, PROBE_RESULT)
    };
    assert_eq!(probe(), PROBE_UNMAPPED);
    second.dma_map(&window(), Some(memory.as_fd())).unwrap();
    assert_eq!(probe(), PROBE_PEER);
    second.irq_trigger(MSIX, 0, 1).unwrap();
    assert!(rustix::io::read(&vector, &mut [0; 8]).is_err(), "it belonged to the first one");
}

/// The VMM's memory at [`BASE`], of which nobody has an fd.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn at<T>(
        &self,
        iova: u64,
        length: usize,
        with: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, Errno> {
        let begin = iova.checked_sub(BASE).and_then(|at| usize::try_from(at).ok());
        let begin = begin.ok_or(Errno::ENODEV)?;
        let mut memory = self.0.lock().unwrap();
        memory.get_mut(begin..begin + length).map(with).ok_or(Errno::ENODEV)
    }

    fn put(&self, iova: u64, bytes: &[u8]) {
        self.at(iova, bytes.len(), |place| place.copy_from_slice(bytes)).unwrap();
    }

    fn get(&self, iova: u64, length: usize) -> Vec<u8> {
        self.at(iova, length, |place| place.to_vec()).unwrap()
    }
}

impl DmaTarget for Memory {
    fn read(&mut self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.at(iova, data.len(), |place| data.copy_from_slice(place))
    }

    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.at(iova, data.len(), |place| place.copy_from_slice(data))
    }
}

/// A client that the engine reaches its memory through, and the eventfd of its interrupt.
fn with_memory(process: &Process, memory: &Memory) -> (Client, OwnedFd) {
    let client = process.connect(|| Client::builder().dma(memory.clone()));
    client.dma_map(&window(), None).unwrap();
    let vector = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    client.irq_install(MSIX, 0, &[vector.as_fd()]).unwrap();
    (client, vector)
}

/// Has the engine execute the descriptors before that one.
fn ring(client: &Client, vector: &OwnedFd, until: u32) {
    write(client, DOORBELL, &until.to_le_bytes());
    let patience = Timespec::try_from(LONG).unwrap();
    let raised = poll(&mut [PollFd::new(vector, PollFlags::IN)], Some(&patience)).unwrap();
    assert_eq!(raised, 1, "status {:#x}", read_u32(client, STATUS));
    rustix::io::read(vector, &mut [0; 8]).unwrap();
}

#[test]
fn an_engine_goes_on_in_another_process_with_dma_by_messages_in_both() {
    let memory = Memory(Arc::new(Mutex::new(vec![0; usize::try_from(SIZE).unwrap()])));
    let (from, to) = (BASE + 0x1000, BASE + 0x2000);
    memory.put(from, b"first and second");
    for (number, (source, destination)) in (0..).zip([(from, to), (from + 6, to + 0x1000)]) {
        let descriptor = Descriptor {
            source,
            destination,
            len: 10,
            flags: FLAG_INTERRUPT,
            ..Descriptor::default()
        };
        memory.put(BASE + 64 * number, &descriptor.to_bytes());
    }
    let source = Process::start();
    let (client, vector) = with_memory(&source, &memory);
    write(&client, RING_BASE, &BASE.to_le_bytes());
    write(&client, RING_ENTRIES, &4_u32.to_le_bytes());
    write(&client, CONTROL, &CONTROL_RUN.to_le_bytes());
    ring(&client, &vector, 1);
    assert_eq!(memory.get(to, 10), b"first and ");
    client.region_write(MEMORY_BAR, 100, b"moved").unwrap();
    client.set_migration_state(S::StopCopy).unwrap();
    let mut state = Vec::new();
    client.read_state(&mut state, 1 << 30).unwrap();
    drop((client, source));

    let target = Process::start();
    let (client, vector) = with_memory(&target, &memory);
    client.set_migration_state(S::Resuming).unwrap();
    client.write_state(&mut state.as_slice()).unwrap();
    client.set_migration_state(S::Running).unwrap();
    assert_eq!((read_u32(&client, HEAD), read_u64(&client, DESCRIPTORS)), (1, 1));
    let mut moved = [0; 5];
    client.region_read(MEMORY_BAR, 100, &mut moved).unwrap();
    assert_eq!(&moved, b"moved");
    ring(&client, &vector, 2);
    assert_eq!(memory.get(to + 0x1000, 10), b"and second");
    assert_eq!(read_u64(&client, DESCRIPTORS), 2);
}
