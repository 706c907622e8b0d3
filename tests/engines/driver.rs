//! Drives one copy engine as a guest's driver would, over vfio-user.

use standstill::device_proc::devices::copy_engine::Descriptor;
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::device_proc::memory::SharedMemory;
use standstill::vfio_user::client::Client;
use standstill::vfio_user::wire::{DMA_READABLE, DMA_WRITABLE, DmaMap};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// Size of an engine's memory BAR.
pub(crate) const MEMORY: u64 = 64 << 10;
/// How long a device may take to answer its client.
const PATIENCE: Duration = Duration::from_secs(60);
/// The region with the PCI configuration space, and what is in its first bytes: the vendor.
const CONFIG_REGION: u32 = 7;

/// One engine and a client of it.
pub(crate) struct Engine {
    client: Client,
    /// The client's own mapping of the memory BAR.
    pub(crate) memory: SharedMemory,
}

impl Engine {
    pub(crate) fn connect(socket: &Path) -> Self {
        let client = Client::builder().timeout(PATIENCE).connect(socket).unwrap();
        let fd = client.region_info(MEMORY_BAR).unwrap().fd.unwrap();
        let memory = SharedMemory::from_fd(fd, MEMORY).unwrap();
        let mut engine = Self { client, memory };
        assert_eq!(engine.read(ID), ID_VALUE);
        engine
    }

    /// Maps memory into its IOVA space.
    pub(crate) fn map(&mut self, iova: u64, memory: &SharedMemory) {
        let (flags, size) = (DMA_READABLE | DMA_WRITABLE, memory.size());
        let map = DmaMap { flags, offset: 0, iova, size };
        self.client.dma_map(&map, Some(memory.as_fd())).unwrap();
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
        let mut bytes = [0; 4];
        self.client.region_read(region, offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, register: u64, value: &[u8]) {
        self.client.region_write(REGISTER_BAR, register, value).unwrap();
    }
}
