//! Our own client: every command with each other.

use crate::memory::Span;
use crate::vfio_user::rig::{BELLS, COUNT, Deed, MEMORY, MEMORY_SIZE, REGISTERS, Rig};
use rustix::event::{EventfdFlags, eventfd};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S};
use standstill_vfio_user::client::{Client, ClientError, DmaTarget};
use standstill_vfio_user::wire::feature::{FEATURE_GET, FEATURE_MIGRATION, FEATURE_SET};
use standstill_vfio_user::wire::{DMA_READABLE, DMA_WRITABLE, DmaMap, Errno, IoFdKind, SmallWrite};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

/// A VMM's memory that nobody has an fd of: 64 KiB at 0x10000.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(vec![0; 1 << 16])))
    }

    fn range(iova: u64, length: usize) -> Result<std::ops::Range<usize>, Errno> {
        let start = iova.checked_sub(1 << 16).and_then(|start| usize::try_from(start).ok());
        let start = start.ok_or(Errno::ENODEV)?;
        if start + length > 1 << 16 { Err(Errno::ENODEV) } else { Ok(start..start + length) }
    }
}

impl DmaTarget for Memory {
    fn read(&mut self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.0.lock().unwrap()[Self::range(iova, data.len())?]);
        Ok(())
    }

    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.lock().unwrap()[Self::range(iova, data.len())?].copy_from_slice(data);
        Ok(())
    }
}

fn client(rig: &Rig) -> Client {
    Client::builder().start(rig.connect()).unwrap()
}

const BOTH: u32 = DMA_READABLE | DMA_WRITABLE;

fn ram(size: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file.into()
}

#[test]
fn regions_interrupts_and_doorbells() {
    let rig = Rig::new();
    let client = client(&rig);
    let info = client.device_info().unwrap();
    assert!(info.is_pci() && info.is_resettable());
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    let memory = client.region_info(MEMORY).unwrap();
    assert_eq!(memory.info.size, MEMORY_SIZE);
    File::from(memory.fd.unwrap()).write_all_at(&[5; 8], 16).unwrap();
    let mut data = [0; 8];
    client.region_read(MEMORY, 16, &mut data).unwrap();
    assert_eq!(data, [5; 8]);
    assert!(client.region_info(REGISTERS).unwrap().fd.is_none());

    client.region_write(REGISTERS, 0, &7_u32.to_le_bytes()).unwrap();
    client.region_write_posted(REGISTERS, 8, &8_u32.to_le_bytes()).unwrap();
    let writes = [3, 4].map(|at| SmallWrite::new(REGISTERS, 16 * at, &[9; 4]).unwrap());
    client.region_write_multi(&writes).unwrap();
    let mut count = [0; 4];
    client.region_read(REGISTERS, COUNT, &mut count).unwrap();
    let refused = client.region_write(REGISTERS, 4096, &[0; 4]).unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EINVAL));

    let vector = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    assert_eq!(client.irq_info(2).unwrap().count, 4);
    client.irq_install(2, 1, &[vector.as_fd()]).unwrap();
    client.irq_trigger(2, 1, 1).unwrap();
    assert!(rustix::io::read(&vector, &mut [0; 8]).is_ok());
    client.irq_mask(2, 1, 1).unwrap();
    rig.device().handles.interrupts.raise(1);
    assert!(rustix::io::read(&vector, &mut [0; 8]).is_err());
    client.irq_unmask(2, 1, 1).unwrap();
    assert!(rustix::io::read(&vector, &mut [0; 8]).is_ok());
    client.irq_disable(2).unwrap();

    let (io_fds, fds) = client.region_io_fds(REGISTERS).unwrap();
    assert_eq!((io_fds.entries.len(), fds.len()), (2, 2));
    for (entry, bell) in io_fds.entries.iter().zip(BELLS) {
        assert_eq!((entry.offset, entry.size), (bell.offset, bell.width.into()));
        let kind = IoFdKind::IoEventFd {
            flags: bell.value.is_some().into(),
            datamatch: bell.value.unwrap_or(0),
        };
        assert_eq!(entry.kind, kind);
    }
    client.reset().unwrap();
    assert_eq!(rig.device().deeds().last(), Some(&Deed::Reset));
}

#[test]
fn windows_their_log_and_dma_by_messages() {
    let rig = Rig::new();
    let memory = Memory::new();
    let client = Client::builder().dma(memory.clone()).start(rig.connect()).unwrap();
    let map = |iova, size| DmaMap { flags: BOTH, offset: 0, iova, size };
    client.dma_map(&map(1 << 16, 1 << 16), None).unwrap();
    let ram = ram(1 << 20);
    client.dma_map(&map(1 << 20, 1 << 20), Some(ram.as_fd())).unwrap();
    assert_eq!(client.start_dirty_log(4096, &[]).unwrap(), 4096);

    let dma = rig.device().handles.dma.clone();
    let copy = std::thread::spawn(move || {
        let spans = [Span::read_write(1 << 16, 4096), Span::write((1 << 20) + 8192, 4096)];
        let access = dma.access(&spans)?;
        access.write(0, 0, b"by message")?;
        access.copy(0, 1)
    });
    copy.join().unwrap().unwrap();
    assert_eq!(&memory.0.lock().unwrap()[..10], b"by message");
    let mut copied = [0; 10];
    File::from(ram.try_clone().unwrap()).read_exact_at(&mut copied, 8192).unwrap();
    assert_eq!(&copied, b"by message");

    let pages = client.dirty_pages(1 << 20, 1 << 20, 4096).unwrap();
    assert_eq!(pages.dirty().collect::<Vec<_>>(), [(1 << 20) + 8192]);
    let access = rig.device().handles.dma.access(&[Span::write(1 << 20, 8)]).unwrap();
    access.write(0, 0, &[1; 8]).unwrap();
    drop(access);
    let pages = client.dma_unmap_dirty(1 << 20, 1 << 20, 4096).unwrap();
    assert_eq!(pages.dirty().collect::<Vec<_>>(), [1 << 20]);
    client.stop_dirty_log().unwrap();
    assert_eq!(client.dma_unmap(0, 4096).unwrap_err().errno(), Some(Errno::ENOENT));
    client.dma_unmap_all().unwrap();
    assert_eq!(rig.parts.memory.windows(), 0);
}

#[test]
fn a_device_moves_from_one_process_to_another() {
    let (source, target) =
        (Rig::with_flags(MigrationFlags::ALL), Rig::with_flags(MigrationFlags::ALL));
    let from = client(&source);
    assert_eq!(from.migration_flags().unwrap(), MigrationFlags::ALL);
    assert!(from.probe(FEATURE_MIGRATION, FEATURE_GET).unwrap());
    assert!(!from.probe(FEATURE_MIGRATION, FEATURE_SET).unwrap());
    from.region_write(MEMORY, 4000, &[3; 200]).unwrap();
    assert!(from.state_size().unwrap() >= MEMORY_SIZE);
    from.set_migration_state(S::PreCopy).unwrap();
    let mut state = Vec::new();
    from.read_state(&mut state, 1 << 30).unwrap();
    from.region_write(MEMORY, 0, &[4; 8]).unwrap();
    from.set_migration_state(S::StopCopy).unwrap();
    from.read_state(&mut state, 1 << 30).unwrap();

    let to = client(&target);
    to.set_migration_state(S::Resuming).unwrap();
    to.write_state(&mut &state[..]).unwrap();
    to.set_migration_state(S::Running).unwrap();
    assert_eq!(to.migration_state().unwrap(), S::Running);
    let mut data = [0; 200];
    to.region_read(MEMORY, 4000, &mut data).unwrap();
    assert_eq!(data, [3; 200]);
    to.region_read(MEMORY, 0, &mut data[..8]).unwrap();
    assert_eq!(data[..8], [4; 8]);
    drop(from);

    to.set_migration_state(S::Resuming).unwrap();
    to.write_state(&mut &state[..state.len() - 1]).unwrap();
    let refused = to.set_migration_state(S::Stop).unwrap_err();
    assert_eq!(refused.now.unwrap(), S::Error);
}

#[test]
fn the_largest_bitmap_that_a_server_takes_is_the_largest_that_the_client_asks_for() {
    let rig = Rig::new();
    let client = client(&rig);
    // A bit for each page, in words of 64; the message may have 1 MiB in all.
    let words = ((1_u64 << 20) - 40) / 8;
    let largest = words * 64 * 4096;
    client.start_dirty_log(4096, &[]).unwrap();
    for size in [largest, largest + 4096] {
        client.dma_map(&DmaMap { flags: BOTH, offset: 0, iova: 0, size }, None).unwrap();
        let pages = client.dma_unmap_dirty(0, size, 4096);
        if size == largest {
            assert_eq!(pages.unwrap().dirty().count(), 0);
        } else {
            // Not sent: no server would take it.
            assert!(matches!(pages, Err(ClientError::Request { .. })), "{pages:?}");
        }
    }
}
