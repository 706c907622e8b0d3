use super::*;
use crate::device::Device;
use crate::gate::Gate;
use crate::interrupt::SetIrqs;
use crate::memory::WindowSpec;
use crate::serve::Built;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use standstill_protocol::message::FileIdentity;
use standstill_vfio_user::wire::{SparseArea, irq::*};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use vfio_bindings::bindings::vfio::{vfio_region_info, vfio_region_sparse_mmap_area};
use vfio_user::{DmaMapFlags, DmaUnmapFlags};

const CONFIG: u32 = 7;
const BAR: u32 = 2;

/// Notes what it is told, and refuses what it is to refuse.
#[derive(Clone, Debug, Default)]
struct Notes {
    notes: Arc<Mutex<Vec<String>>>,
    refuses: Arc<Mutex<Option<io::Error>>>,
}

impl Notes {
    fn note(&self, note: String) -> io::Result<()> {
        self.notes.lock().unwrap().push(note);
        self.refuses.lock().unwrap().take().map_or(Ok(()), Err)
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock().unwrap())
    }

    fn refuse(&self, error: io::Error) {
        *self.refuses.lock().unwrap() = Some(error);
    }
}

impl ServerBackend for Notes {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = at.to_le_bytes()[0]);
        self.note(format!("read {region} {offset:#x} {}", data.len()))
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(format!("write {region} {offset:#x} {data:?}"))
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let (flags, fd) = (flags.bits(), fd.is_some());
        self.note(format!("map {address:#x} {size:#x} {offset:#x} {flags} {fd}"))
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        assert!(flags.is_empty());
        self.note(format!("unmap {address:#x} {size:#x}"))
    }

    fn reset(&mut self) -> io::Result<()> {
        self.note("reset".into())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        self.note(format!("irqs {index} {flags:#x} {start} {count} {}", fds.len()))
    }
}

impl Quiesce for Notes {
    fn quiesce(&mut self) -> io::Result<()> {
        self.note("quiesce".into())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.note("resume".into())
    }
}

impl SaveState for Notes {
    fn save(&mut self, to: &mut dyn Write) -> io::Result<()> {
        to.write_all(b"notes")
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut text = String::new();
        from.read_to_string(&mut text)?;
        self.note(format!("load {text}"))
    }
}

fn region(index: u32, size: u64) -> ServerRegion {
    let region_info = vfio_region_info { index, size, flags: 3, ..Default::default() };
    ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
}

fn regions() -> Vec<ServerRegion> {
    vec![region(BAR, 256), region(CONFIG, 256)]
}

fn irqs() -> Vec<IrqInfo> {
    [(0, 1), (2, 4), (3, 0)].map(|(index, count)| IrqInfo { index, flags: 1, count }).to_vec()
}

fn foreign(notes: &Notes) -> Foreign<Notes> {
    Foreign::new("notes", notes.clone(), regions(), irqs())
}

/// What the transport calls, with the map that the control side has.
fn raw(foreign: Foreign<Notes>, notes: &Notes) -> (Arc<dyn RawDevice>, MemoryMap) {
    let memory = MemoryMap::new(Arc::new(Gate::new()));
    let built = foreign.put_together(memory.clone(), Interrupts::new()).unwrap();
    notes.take();
    (built.raw.unwrap(), memory)
}

fn file() -> (OwnedFd, FileIdentity) {
    let file = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x8000).unwrap();
    let facts = fstat(&file).unwrap();
    (file, FileIdentity { device: facts.st_dev, inode: facts.st_ino })
}

fn window(iova: u64) -> WindowSpec {
    WindowSpec { iova, size: 0x1000, offset: 0x2000, readable: true, writable: iova != 0 }
}

fn refusal(regions: Vec<ServerRegion>, irqs: Vec<IrqInfo>) -> String {
    let foreign = Foreign::new("notes", Notes::default(), regions, irqs);
    let memory = MemoryMap::new(Arc::new(Gate::new()));
    foreign.put_together(memory, Interrupts::new()).err().unwrap().to_string()
}

#[test]
fn lists_that_are_no_pci_devices_are_refused_and_say_where() {
    let with = |other| [regions(), vec![other]].concat();
    assert!(refusal(with(region(9, 1)), irqs()).contains("region 9"));
    assert!(refusal(with(region(BAR, 1)), irqs()).contains("twice"));
    assert!(refusal(vec![region(BAR, 256)], irqs()).contains("region 7"));
    assert!(refusal(vec![region(CONFIG, 32)], irqs()).contains("at least 64"));
    let irq = |index, count| vec![IrqInfo { index, flags: 1, count }];
    for wrong in [irq(0, 2), irq(1, 33), irq(2, 2049), irq(5, 1), [irq(1, 1), irq(1, 1)].concat()] {
        assert!(refusal(regions(), wrong.clone()).contains("interrupt index"), "{wrong:?}");
    }
    let (fd, _) = file();
    let beyond = mappable(0, fd.as_raw_fd(), &[(0x3000, 0x2000)]);
    assert!(refusal(with(beyond), irqs()).contains("ends beyond"));
    let config = mappable(CONFIG, fd.as_raw_fd(), &[]);
    assert!(refusal(vec![config], irqs()).contains("cannot be mapped"));
    let closed = mappable(0, i32::MAX, &[]);
    assert!(refusal(with(closed), irqs()).contains("file of region 0"));
}

fn mappable(index: u32, fd: i32, areas: &[(u64, u64)]) -> ServerRegion {
    let mut region = region(index, 0x4000);
    region.region_info.flags |= 4;
    region.mmap_fd = Some(fd);
    let area = |&(offset, size)| vfio_user::SparseArea {
        area: vfio_region_sparse_mmap_area { offset, size },
    };
    region.sparse_areas = areas.iter().map(area).collect();
    region
}

#[test]
fn what_can_be_mapped_has_areas_and_a_file_of_its_own() {
    let notes = Notes::default();
    let ((first, first_id), (second, second_id)) = (file(), file());
    let list = vec![
        region(CONFIG, 256),
        mappable(0, first.as_raw_fd(), &[]),
        mappable(1, second.as_raw_fd(), &[(0x1000, 0x2000)]),
        // Without an fd there is nothing to map.
        ServerRegion { mmap_fd: None, ..mappable(3, 0, &[]) },
    ];
    let foreign = Foreign::new("notes", notes.clone(), list, irqs()).ram_only();
    let memory = MemoryMap::new(Arc::new(Gate::new()));
    let built = foreign.put_together(memory, Interrupts::new()).unwrap();
    assert_eq!(built.info.peer_dma, PeerDma::Possible, "peers can map it");
    let raw = built.raw.unwrap();
    drop((first, second));
    let mut files = [first_id, second_id];
    files.sort_unstable();
    assert_eq!(raw.memory_files(), files);
    for (index, areas) in [(0, Some((0, 0x4000))), (1, Some((0x1000, 0x2000))), (3, None)] {
        let info = raw.region(index);
        let areas = areas.map(|(offset, size)| vec![SparseArea { offset, size }]);
        assert_eq!((info.flags, info.sparse), (if areas.is_some() { 7 } else { 3 }, areas));
        assert_eq!(raw.region_memory(index).is_some(), index < 3);
    }
    assert_eq!((raw.region_size(4), raw.region(4).flags), (0, 0));
}

#[test]
fn a_device_says_what_it_is_and_can() {
    let version = StateVersion { major: 2, minor: 1 };
    let build = |foreign: Foreign<Notes>| {
        let memory = MemoryMap::new(Arc::new(Gate::new()));
        let Built { info, .. } = foreign.put_together(memory, Interrupts::new()).unwrap();
        // What the configuration space of these tests reads as.
        assert_eq!((info.pci.vendor, info.pci.device), (0x0100, 0x0302));
        assert_eq!((info.pci.class, info.pci.revision), (0x0b_0a_09, 8));
        (info.migration, info.peer_dma, info.state_version)
    };
    let plain = || foreign(&Notes::default());
    let none = StateVersion::default();
    let (possible, ram_only) = (PeerDma::Possible, PeerDma::RamOnly);
    assert_eq!(build(plain()), (MigrationFlags::NO_STATE, possible, none));
    assert_eq!(build(plain().ram_only()), (MigrationFlags::NO_STATE_P2P, ram_only, none));
    assert_eq!(build(plain().quiesces()), (MigrationFlags::NO_STATE_P2P, possible, none));
    let saves = plain().saves_state(version);
    assert_eq!(build(saves), (MigrationFlags::STOP_COPY, possible, version));
    let both = plain().quiesces().saves_state(version);
    assert_eq!(build(both), (MigrationFlags::STOP_COPY_P2P, possible, version));
}

#[test]
fn the_configuration_space_is_accessed_as_a_processor_does_and_other_regions_as_asked() {
    let notes = Notes::default();
    let (raw, _) = raw(foreign(&notes), &notes);
    let mut data = [0; 8];
    raw.read(CONFIG, 0x1, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
    let whole = ["read 7 0x1 1", "read 7 0x2 2", "read 7 0x4 4", "read 7 0x8 1"];
    assert_eq!(notes.take(), whole);
    raw.write(CONFIG, 0x6, &[6, 7, 8]).unwrap();
    assert_eq!(notes.take(), ["write 7 0x6 [6, 7]", "write 7 0x8 [8]"]);
    raw.read(BAR, 0x1, &mut data).unwrap();
    raw.write(BAR, 0x3, &[1, 2, 3]).unwrap();
    assert_eq!(notes.take(), ["read 2 0x1 8", "write 2 0x3 [1, 2, 3]"]);
}

#[test]
fn what_a_backend_refuses_has_its_number() {
    let notes = Notes::default();
    let (raw, _) = raw(foreign(&notes), &notes);
    for (error, errno) in [
        (io::Error::from_raw_os_error(28), Errno::NOSPC),
        (io::ErrorKind::InvalidInput.into(), Errno::INVAL),
        (io::ErrorKind::Unsupported.into(), Errno::OPNOTSUPP),
        (io::Error::other("broken"), Errno::IO),
    ] {
        notes.refuse(error);
        assert_eq!(raw.write(BAR, 0, &[0]), Err(errno));
    }
    let flags = |flags| {
        let mut region = region(BAR, 256);
        region.region_info.flags = flags;
        let list = vec![region, self::region(CONFIG, 256)];
        self::raw(Foreign::new("notes", notes.clone(), list, irqs()), &notes).0
    };
    assert_eq!(flags(2).read(BAR, 0, &mut [0]), Err(Errno::INVAL), "it cannot be read");
    assert_eq!(flags(1).write(BAR, 0, &[0]), Err(Errno::INVAL), "it cannot be written");
    assert!(notes.take().len() < 10);
}

#[test]
fn a_backend_gets_every_window_with_its_file_once() {
    let notes = Notes::default();
    let (raw, memory) = raw(foreign(&notes), &notes);
    let (peer, _) = file();
    raw.map(window(0x1000), Some(peer.try_clone().unwrap())).unwrap();
    raw.map(window(0x1000), Some(peer.try_clone().unwrap())).unwrap();
    raw.map(WindowSpec { offset: 0, ..window(0) }, None).unwrap();
    assert_eq!(notes.take(), ["map 0x1000 0x1000 0x2000 3 true", "map 0x0 0x1000 0x0 1 false"]);
    let wide = WindowSpec { size: 0x2000, ..window(0x1000) };
    assert_eq!(raw.map(wide, Some(peer.try_clone().unwrap())), Err(Errno::EXIST));
    assert_eq!(raw.unmap(0x1000, 0x2000), Err(Errno::NOENT));
    assert!(notes.take().is_empty());

    notes.refuse(io::Error::from_raw_os_error(12));
    assert_eq!(raw.map(window(0x4000), Some(peer.try_clone().unwrap())), Err(Errno::NOMEM));
    assert_eq!(memory.windows(), 2, "what it has refused is not there");
    notes.refuse(io::Error::from_raw_os_error(16));
    assert_eq!(raw.unmap(0x1000, 0x1000), Err(Errno::BUSY));
    assert_eq!(memory.windows(), 2, "what it does not give back is");
    notes.take();
    raw.unmap(0x1000, 0x1000).unwrap();
    assert_eq!(notes.take(), ["unmap 0x1000 0x1000"]);

    raw.map(window(0x1000), Some(peer)).unwrap();
    notes.take();
    notes.refuse(io::Error::from_raw_os_error(16));
    assert_eq!(raw.unmap_all(), Err(Errno::BUSY));
    assert_eq!(notes.take(), ["unmap 0x0 0x1000", "unmap 0x1000 0x1000"]);
    assert_eq!(memory.windows(), 0, "the client has gone all the same");
}

#[test]
fn who_reaches_ram_only_is_told_of_a_window_when_it_is_known_to_be_ram() {
    let notes = Notes::default();
    let (raw, memory) = raw(foreign(&notes).ram_only(), &notes);
    let ((ram, _), (peer, _), (late, _)) = (file(), file(), file());
    memory.declare_ram(ram.try_clone().unwrap()).unwrap();
    raw.map(window(0x1000), Some(ram)).unwrap();
    assert_eq!(notes.take(), ["map 0x1000 0x1000 0x2000 3 true"]);
    raw.map(window(0x2000), Some(peer)).unwrap();
    raw.map(window(0x3000), Some(late.try_clone().unwrap())).unwrap();
    assert!(notes.take().is_empty(), "these are peers', for all that is known");

    memory.declare_ram(late).unwrap();
    notes.refuse(io::Error::other("not now"));
    raw.ram_declared();
    raw.ram_declared();
    raw.ram_declared();
    let late = "map 0x3000 0x1000 0x2000 3 true";
    assert_eq!(notes.take(), [late, late], "until it takes it, and once");
    raw.unmap(0x2000, 0x1000).unwrap();
    assert!(notes.take().is_empty(), "it was never told of that one");
    raw.unmap(0x3000, 0x1000).unwrap();
    assert_eq!(notes.take(), ["unmap 0x3000 0x1000"]);
}

#[test]
fn windows_onto_the_memory_of_a_process_that_is_gone_are_taken_back() {
    let notes = Notes::default();
    let (raw, memory) = raw(foreign(&notes), &notes);
    let ((ram, ram_id), (peer, peer_id), (other, _)) = (file(), file(), file());
    memory.declare_ram(ram.try_clone().unwrap()).unwrap();
    raw.map(window(0x1000), Some(ram)).unwrap();
    raw.map(window(0x2000), Some(peer)).unwrap();
    raw.map(window(0x3000), Some(other)).unwrap();
    notes.take();
    raw.revoke(&[peer_id, ram_id]);
    assert_eq!(notes.take(), ["unmap 0x2000 0x1000"]);
    memory.revoke(&[peer_id, ram_id], std::time::Duration::ZERO).unwrap();
    assert_eq!(raw.unmap(0x2000, 0x1000), Err(Errno::NOENT));
    raw.unmap_all().unwrap();
    assert_eq!((notes.take().len(), memory.windows()), (2, 0));
}

fn irq(index: u32, flags: u32, start: u32, count: u32) -> SetIrqs {
    SetIrqs { argsz: SET_IRQS_SIZE + count, flags, index, start, count }
}

fn eventfds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap()).collect()
}

#[test]
fn a_backend_gets_eventfds_and_the_plainest_form_of_each_request() {
    let notes = Notes::default();
    let (raw, _) = raw(foreign(&notes), &notes);
    let trigger = DATA_EVENTFD | ACTION_TRIGGER;
    raw.set_irqs(&irq(2, trigger, 1, 2), &[], eventfds(2)).unwrap();
    assert_eq!(notes.take(), ["irqs 2 0x24 1 2 2"]);
    raw.set_irqs(&irq(2, trigger, 1, 1), &[], Vec::new()).unwrap();
    assert_eq!(notes.take(), ["irqs 2 0x24 1 1 0"], "one of them is removed");
    raw.set_irqs(&irq(2, trigger, 0, 4), &[], Vec::new()).unwrap();
    assert_eq!(notes.take(), ["irqs 2 0x21 0 0 0"], "all are");
    raw.set_irqs(&irq(0, trigger, 0, 1), &[], eventfds(1)).unwrap();
    raw.set_irqs(&irq(0, trigger, 0, 1), &[], Vec::new()).unwrap();
    assert_eq!(notes.take(), ["irqs 0 0x24 0 1 1", "irqs 0 0x21 0 0 0"]);
    raw.set_irqs(&irq(2, DATA_NONE | ACTION_MASK, 0, 4), &[], Vec::new()).unwrap();
    let some = irq(2, DATA_BOOL | ACTION_UNMASK, 1, 3);
    raw.set_irqs(&some, &[1, 0, 1], Vec::new()).unwrap();
    assert_eq!(notes.take(), ["irqs 2 0x9 0 4 0", "irqs 2 0x11 1 1 0", "irqs 2 0x11 3 1 0"]);

    let no_eventfd = vec![file().0];
    assert_eq!(raw.set_irqs(&irq(2, trigger, 0, 1), &[], no_eventfd), Err(Errno::INVAL));
    assert_eq!(raw.set_irqs(&irq(3, trigger, 0, 1), &[], eventfds(1)), Err(Errno::INVAL));
    assert_eq!(raw.set_irqs(&irq(2, trigger, 3, 2), &[], eventfds(2)), Err(Errno::INVAL));
    assert!(notes.take().is_empty(), "none of that has come to it");
}

#[test]
fn what_a_client_fires_is_fired_for_it_and_its_eventfds_go_with_it() {
    let notes = Notes::default();
    let (raw, _) = raw(foreign(&notes), &notes);
    let trigger = DATA_EVENTFD | ACTION_TRIGGER;
    let [vector] = <[OwnedFd; 1]>::try_from(eventfds(1)).unwrap();
    raw.set_irqs(&irq(2, trigger, 0, 1), &[], vec![vector.try_clone().unwrap()]).unwrap();
    raw.set_irqs(&irq(0, trigger, 0, 1), &[], eventfds(1)).unwrap();
    raw.set_irqs(&irq(0, DATA_NONE | ACTION_TRIGGER, 0, 0), &[], Vec::new()).unwrap();
    notes.take();
    raw.set_irqs(&irq(2, DATA_NONE | ACTION_TRIGGER, 0, 1), &[], Vec::new()).unwrap();
    let mut counter = [0; 8];
    rustix::io::read(&vector, &mut counter).unwrap();
    assert_eq!((u64::from_ne_bytes(counter), notes.take()), (1, Vec::new()));
    raw.release_irqs();
    assert_eq!(notes.take(), ["irqs 2 0x21 0 0 0"], "INTx had none any more");
}

#[tokio::test]
async fn hooks_come_to_a_backend_that_has_them() {
    let notes = Notes::default();
    let memory = || MemoryMap::new(Arc::new(Gate::new()));
    let budget = std::time::Duration::from_secs(30);
    let plain = foreign(&notes).put_together(memory(), Interrupts::new()).unwrap().device;
    notes.take();
    plain.prepare_stop(budget).await.unwrap();
    plain.stop(budget).await.unwrap();
    plain.start(budget).await.unwrap();
    assert!(notes.take().is_empty());
    assert!(plain.save(&mut Vec::new()).is_err() && plain.load(&mut io::empty()).is_err());

    let whole = foreign(&notes).quiesces().saves_state(StateVersion::default());
    let whole = whole.put_together(memory(), Interrupts::new()).unwrap().device;
    notes.take();
    whole.prepare_stop(budget).await.unwrap();
    whole.stop(budget).await.unwrap();
    let mut state = Vec::new();
    whole.save(&mut state).unwrap();
    whole.load(&mut state.as_slice()).unwrap();
    whole.start(budget).await.unwrap();
    whole.reset().unwrap();
    assert_eq!(notes.take(), ["quiesce", "load notes", "resume", "reset"]);
    notes.refuse(io::Error::other("not now"));
    let refused = whole.prepare_stop(budget).await.unwrap_err();
    assert!(refused.to_string().contains("not now"), "{refused}");
}
