//! With the message loop of the crate, and its threads: what the device needs of whoever serves it.

use super::rig::{Driver, Kind, Machine, pattern, readable, writable};
use super::*;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

/// The number of the event by which a queue's thread hears of completions.
const COMPLETIONS: u64 = 100;
/// Pages of guest memory.
const PAGES: usize = (2 << 20) / 4096;

/// A frontend with one started ring.
struct Connected {
    frontend: Frontend,
    kick: EventFd,
    call: EventFd,
    /// Waits for `call`.
    signals: Epoll,
    /// A bit for each page that was written to.
    log: File,
}

impl Connected {
    fn new(frontend: Frontend, driver: &Driver) -> Self {
        let mut frontend = frontend;
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        frontend.set_features(features).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 1);
        let memory = driver.memory.memory();
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
            .collect();
        frontend.set_mem_table(&regions).unwrap();
        let log = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        log.set_len(PAGES as u64 / 8).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: PAGES as u64 / 8,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        frontend.set_log_base(0, Some(region)).unwrap();
        let host =
            |addr: u64| memory.get_host_address(vm_memory::GuestAddress(addr)).unwrap() as u64;
        frontend.set_vring_num(0, SIZE).unwrap();
        frontend.set_vring_base(0, 0).unwrap();
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: host(0),
            used_ring_addr: host(0x3000),
            avail_ring_addr: host(0x2000),
            log_addr: None,
        };
        frontend.set_vring_addr(0, &config).unwrap();
        let [call, kick] = [0, 1].map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        frontend.set_vring_call(0, &call).unwrap();
        frontend.set_vring_kick(0, &kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
        let signals = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        signals.ctl(ControlOperation::Add, call.as_raw_fd(), event).unwrap();
        Self { frontend, kick, call, signals, log }
    }

    /// Kicks and waits until something was used.
    fn run(&self, driver: &mut Driver) -> Vec<(u16, u32)> {
        driver.want_next_signal();
        self.kick.write(1).unwrap();
        loop {
            let used = driver.take_used();
            if !used.is_empty() {
                return used;
            }
            let mut events = [EpollEvent::default()];
            match self.signals.wait(30_000, &mut events) {
                // By a signal for another test of this process.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                signalled => assert_eq!(signalled.unwrap(), 1, "the device has not signalled"),
            }
            self.call.read().unwrap();
        }
    }

    fn take_dirty(&self) -> Vec<usize> {
        let mut bits = [0; PAGES / 8];
        self.log.read_exact_at(&mut bits, 0).unwrap();
        self.log.write_all_at(&[0; PAGES / 8], 0).unwrap();
        (0..PAGES).filter(|page| bits[page / 8] >> (page % 8) & 1 == 1).collect()
    }
}

#[test]
fn what_finishes_later_is_heard_of_and_what_is_written_to_is_logged() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |_| {});
        machine.image.write_all_at(&pattern(11, 3 * 4096), 0).unwrap();
        machine.image.sync_all().unwrap();
        let socket = machine.path("socket");
        let mut listener = Listener::from(UnixListener::bind(&socket).unwrap());
        let frontend = Frontend::connect(&socket, 1).unwrap();
        let memory = GuestMemoryAtomic::new(Memory::new());
        let device = Arc::clone(&machine.device);
        let mut daemon = VhostUserDaemon::new("blk".into(), device, memory).unwrap();
        let handlers = daemon.get_epoll_handlers();
        let completions = machine.device.completions().unwrap();
        for (handler, fd) in handlers.iter().zip(&completions) {
            if let Some(fd) = fd {
                handler.register_listener(fd.as_raw_fd(), EventSet::IN, COMPLETIONS).unwrap();
            }
        }
        daemon.start(&mut listener).unwrap();

        let mut driver = machine.driver(0);
        let connected = Connected::new(frontend, &driver);
        // Three pages and a bit, not aligned; the header and the status are elsewhere.
        let (header, status, data) =
            (driver.free(0), driver.free(0x800), driver.free(0x1000) + 0x10);
        let pieces = [
            driver.header(header, VIRTIO_BLK_T_IN, 0),
            writable(data, 3 * 4096),
            writable(status, 1),
        ];
        let head = driver.add(&pieces);
        assert_eq!(connected.run(&mut driver), [(head, 3 * 4096 + 1)], "{kind:?}");
        assert_eq!(driver.get(status, 1), [OK]);
        assert!(driver.get(data, 3 * 4096) == pattern(11, 3 * 4096));
        let page = |addr: u64| usize::try_from(addr / 4096).unwrap();
        // The used ring; the status; the data.
        let mut written = vec![page(0x3000), page(status)];
        written.extend(page(data)..=page(data) + 3);
        assert_eq!(connected.take_dirty(), written, "{kind:?}");

        // A write changes nothing of memory but its answer.
        let pieces =
            [driver.header(header, VIRTIO_BLK_T_OUT, 0), readable(data, 4096), writable(status, 1)];
        driver.add(&pieces);
        connected.run(&mut driver);
        assert_eq!(connected.take_dirty(), [page(0x3000), page(status)], "{kind:?}");

        assert_eq!(connected.frontend.get_vring_base(0).unwrap(), 2);
        drop(connected.frontend);
        // However the crate calls the end of a connection.
        let _ = daemon.wait();
        handlers.iter().for_each(|handler| handler.send_exit_event());
    }
}
