//! Drives one copy engine as a guest's driver would, over vfio-user.
//!
//! The client of the `vfio_user` crate waits for ever where a device refuses or is silent, so every
//! call is made on a thread of its own and has a deadline.

use standstill::device_proc::devices::copy_engine::Descriptor;
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::device_proc::memory::SharedMemory;
use std::fmt::Debug;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;
use vfio_user::Client;

/// Size of an engine's memory BAR.
pub(crate) const MEMORY: u64 = 64 << 10;
/// How long a device may take to answer its client.
const PATIENCE: Duration = Duration::from_secs(60);
/// The region with the PCI configuration space, and what is in its first bytes: the vendor.
const CONFIG_REGION: u32 = 7;

/// One engine and a client of it.
pub(crate) struct Engine {
    /// Away while a call is under way, and for good if one does not return.
    client: Option<Client>,
    /// The client's own mapping of the memory BAR.
    pub(crate) memory: SharedMemory,
}

impl Engine {
    pub(crate) fn connect(socket: &Path) -> Self {
        let path = socket.to_owned();
        let client = bounded("connect", move || Client::new(&path)).unwrap();
        let region = client.region(MEMORY_BAR).unwrap();
        let fd = region.file_offset.as_ref().unwrap().file().as_fd().try_clone_to_owned().unwrap();
        let memory = SharedMemory::from_fd(fd, MEMORY).unwrap();
        let mut engine = Self { client: Some(client), memory };
        assert_eq!(engine.read(ID), ID_VALUE);
        engine
    }

    /// Maps memory into its IOVA space.
    pub(crate) fn map(&mut self, iova: u64, memory: &SharedMemory) {
        let (fd, size) = (memory.try_clone_fd().unwrap(), memory.size());
        self.call("map", move |client| client.dma_map(0, iova, size, fd.as_raw_fd()));
    }

    /// What it has at that IOVA: `PROBE_UNMAPPED`, `PROBE_RAM` or `PROBE_PEER`.
    pub(crate) fn probe(&mut self, iova: u64, size: u64) -> u32 {
        self.write(PROBE_IOVA, &iova.to_le_bytes());
        self.write(PROBE_LEN, &size.to_le_bytes());
        self.read(PROBE_RESULT)
    }

    /// Starts it on a ring, which it goes round for ever.
    pub(crate) fn start(&mut self, ring: u64, descriptors: &[Descriptor]) {
        let entries = u32::try_from(descriptors.len()).unwrap();
        self.write(RING_BASE, &ring.to_le_bytes());
        self.write(RING_ENTRIES, &entries.to_le_bytes());
        self.write(CONTROL, &(CONTROL_RUN | CONTROL_LOOP).to_le_bytes());
    }

    /// Reads a register. Not while the device is stopped.
    pub(crate) fn read(&mut self, register: u64) -> u32 {
        self.read_at(REGISTER_BAR, register)
    }

    /// Reads the configuration space, which a device serves in every state.
    pub(crate) fn assert_serves(&mut self) {
        let identity = self.read_at(CONFIG_REGION, 0);
        assert!(identity != 0 && identity != u32::MAX, "{identity:#x}");
    }

    fn read_at(&mut self, region: u32, offset: u64) -> u32 {
        self.call("read", move |client| {
            let mut bytes = [0; 4];
            client.region_read(region, offset, &mut bytes).map(|()| u32::from_le_bytes(bytes))
        })
    }

    fn write(&mut self, register: u64, value: &[u8]) {
        let value = value.to_vec();
        self.call("write", move |client| client.region_write(REGISTER_BAR, register, &value));
    }

    fn call<T: Send + 'static, E: Debug + Send + 'static>(
        &mut self,
        what: &str,
        call: impl FnOnce(&mut Client) -> Result<T, E> + Send + 'static,
    ) -> T {
        let mut client = self.client.take().unwrap();
        let (result, client) = bounded(what, move || (call(&mut client), client));
        self.client = Some(client);
        result.unwrap_or_else(|error| panic!("{what}: {error:?}"))
    }
}

fn bounded<T: Send + 'static>(what: &str, call: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, result) = channel();
    std::thread::spawn(move || send.send(call()));
    result.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"))
}
