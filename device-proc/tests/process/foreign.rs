//! A backend of the `vfio_user` crate in a device process: what a coordinator and a client see of it.

use crate::child::{Device, command, until, welcome};
use crate::client::{Client, ErrorReply};
use rustix::event::{EventfdFlags, eventfd};
use standstill_device_proc::ServeOptions;
use standstill_device_proc::device::StateVersion;
use standstill_device_proc::foreign::{Foreign, Quiesce, SaveState, serve_backend};
use standstill_device_proc::serve::ServeError;
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, MemoryDeclaration, OrphanPolicy, PeerDma, Phase,
    RefusalKind, Term,
};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S};
use standstill_vfio_user::client::{self, StateStreamError};
use standstill_vfio_user::wire::{DmaMap, Errno};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use vfio_bindings::bindings::vfio::vfio_region_info;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};

const BAR: u32 = 0;
/// Read and written as it is.
const NUMBER: u64 = 0;
/// A write waits until somebody opens the fifo beside the socket, and closes it.
const WAIT: u64 = 4;
/// Reads as how many windows there are.
const WINDOWS: u64 = 8;
/// Reads as whether it is at rest.
const AT_REST: u64 = 12;

/// A few registers, and what it takes to see what was done to it.
struct Backend {
    number: u32,
    windows: u32,
    at_rest: bool,
    irqs: Vec<File>,
    fifo: String,
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let value = match (region, offset) {
            (BAR, NUMBER) => self.number,
            (BAR, WINDOWS) => self.windows,
            (BAR, AT_REST) => self.at_rest.into(),
            (7, 0) => 0x0003_1234,
            (7, _) => 0,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match (region, offset, data.try_into()) {
            (BAR, NUMBER, Ok(bytes)) => {
                self.number = u32::from_le_bytes(bytes);
                self.irqs.iter_mut().try_for_each(|irq| irq.write_all(&1_u64.to_ne_bytes()))
            }
            (BAR, WAIT, _) => {
                File::open(&self.fifo)?.read_to_string(&mut String::new()).map(|_| ())
            }
            (7, ..) => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        _: u64,
        _: u64,
        _: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        assert!(fd.is_some());
        self.windows += 1;
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        self.windows -= 1;
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.number = 0;
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, fds: Vec<File>) -> io::Result<()> {
        self.irqs = fds;
        Ok(())
    }
}

impl Quiesce for Backend {
    fn quiesce(&mut self) -> io::Result<()> {
        self.at_rest = true;
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.at_rest = false;
        Ok(())
    }
}

impl SaveState for Backend {
    fn save(&mut self, to: &mut dyn Write) -> io::Result<()> {
        to.write_all(&self.number.to_le_bytes())
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut number = [0; 4];
        from.read_exact(&mut number)?;
        self.number = u32::from_le_bytes(number);
        Ok(())
    }
}

/// What the script of these begins with.
pub(crate) const SCRIPT: &str = "foreign";

/// What the device process does.
pub(crate) fn run(socket: &str, script: &[&str]) -> Result<(), ServeError> {
    let fifo = format!("{socket}.fifo");
    let backend = Backend { number: 7, windows: 0, at_rest: false, irqs: Vec::new(), fifo };
    let region = |(index, size)| ServerRegion {
        region_info: vfio_region_info { index, size, flags: 3, ..Default::default() },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let regions = [(BAR, 16), (7, 256)].map(region).to_vec();
    let irqs = vec![IrqInfo { index: 0, flags: 1, count: 1 }];
    serve_backend(ServeOptions::new(socket), || {
        let foreign = Foreign::new("backend", backend, regions, irqs);
        Ok(script.iter().fold(foreign, |foreign, word| match *word {
            "ram-only" => foreign.ram_only(),
            "quiesces" => foreign.quiesces(),
            "saves" => foreign.saves_state(StateVersion::default()),
            _ => foreign,
        }))
    })
}

#[test]
fn a_backend_without_anything_more_goes_all_the_way_in_the_second_phase() {
    let (device, hello) = Device::start(SCRIPT);
    let capabilities = hello.capabilities;
    assert_eq!(capabilities.migration, MigrationFlags::NO_STATE);
    assert_eq!(capabilities.peer_dma, PeerDma::Possible);
    assert!(!capabilities.dirty_tracking, "nobody sees what it writes");
    device.send(&CoordinatorMessage::Welcome(welcome(OrphanPolicy::Exit)));
    device.channel.set_version(1);
    let mut client = Client::connect(&device.socket());
    client.write_u32(BAR, NUMBER, 77).unwrap();
    device.command(1, Phase::PrepareStop, S::RunningP2p);
    assert_eq!(device.refused().refusal.kind, RefusalKind::NoWay);
    device.go(2, Phase::Stop, S::Stop);
    assert_eq!(client.read_u32(BAR, NUMBER), Err(ErrorReply(22)));
    assert_eq!(client.write_u32(BAR, NUMBER, 78), Err(ErrorReply(22)));
    assert_eq!(client.read_u32(7, 0), Ok(0x0003_1234), "this is told, not done");
    device.go(3, Phase::Start, S::Running);
    assert_eq!(client.read_u32(BAR, NUMBER), Ok(77));
    device.shut_down();
}

#[test]
fn a_stop_waits_for_the_call_in_progress_and_the_control_side_does_not() {
    let device = Device::welcomed("foreign ram-only");
    let fifo = device.socket().with_extension("sock.fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let client = Client::connect(&device.socket());
    let waiting = std::thread::spawn(move || {
        let mut client = client;
        let written = client.write(BAR, WAIT, &[0]);
        (client, written)
    });
    // It can be opened once somebody reads it.
    let mut opened = None;
    until("the write waits", || {
        let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
        opened = rustix::fs::open(&fifo, flags, rustix::fs::Mode::empty()).ok();
        opened.is_some()
    });
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.command(1, Phase::Stop, S::Stop);
    let status = device.query(1);
    assert_eq!((status.state, status.moving_to), (S::RunningP2p, Some(S::Stop)));
    drop(opened);
    assert_eq!(device.reached().state, S::Stop);
    let (mut client, written) = waiting.join().unwrap();
    assert_eq!(written, Ok(()), "it was done before the stop");
    assert_eq!(client.read_u32(BAR, NUMBER), Err(ErrorReply(22)));
    device.resume(2);
    assert_eq!(client.read_u32(BAR, NUMBER), Ok(7));
}

#[test]
fn threads_come_to_rest_in_the_first_phase_and_go_on_in_the_last() {
    let device = Device::welcomed("foreign quiesces");
    let mut client = Client::connect(&device.socket());
    let mut at_rest = || client.read_u32(BAR, AT_REST);
    assert_eq!(at_rest(), Ok(0));
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    assert_eq!(at_rest(), Ok(1), "and it still answers");
    device.go(1, Phase::Stop, S::Stop);
    device.go(2, Phase::PrepareStart, S::RunningP2p);
    assert_eq!(at_rest(), Ok(1));
    device.go(2, Phase::Start, S::Running);
    assert_eq!(at_rest(), Ok(0));
}

#[test]
fn who_reaches_ram_only_gets_what_is_declared_and_keeps_nothing_of_a_client_that_goes() {
    let device = Device::welcomed("foreign ram-only");
    let mut client = Client::connect(&device.socket());
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(0x4000).unwrap();
    let irq = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    client.install_intx(irq.as_fd()).unwrap();
    client.dma_map(0x1000, 0x1000, ram.as_fd()).unwrap();
    client.dma_map(0x2000, 0x1000, ram.as_fd()).unwrap();
    assert_eq!(client.read_u32(BAR, WINDOWS), Ok(0));
    let declaration =
        MemoryDeclaration { term: Term(1), sequence: 1, ram_fds: 1, dirty_page_size: 0 };
    device.send_with(&CoordinatorMessage::Memory(declaration), &[ram.as_fd()]);
    assert!(matches!(device.answer(), DeviceMessage::MemoryAccepted(_)));
    assert_eq!(client.read_u32(BAR, WINDOWS), Ok(2));
    client.write_u32(BAR, NUMBER, 1).unwrap();
    let mut raised = [0; 8];
    rustix::io::read(&irq, &mut raised).unwrap();
    assert_eq!(u64::from_ne_bytes(raised), 1);
    drop(client);

    let mut client = Client::connect(&device.socket());
    assert_eq!(client.read_u32(BAR, WINDOWS), Ok(0), "its windows have gone");
    client.write_u32(BAR, NUMBER, 2).unwrap();
    let left = rustix::io::fcntl_dupfd_cloexec(&irq, 0).unwrap();
    rustix::io::ioctl_fionbio(&left, true).unwrap();
    assert_eq!(rustix::io::read(&left, &mut raised), Err(rustix::io::Errno::AGAIN), "so has this");
    assert_eq!(client.read_u32(BAR, NUMBER), Ok(2), "the device is the same");
}

#[test]
fn a_state_goes_from_one_process_to_another_if_there_is_one() {
    let device = Device::welcomed("foreign ram-only");
    device.pause(1);
    for (epoch, phase, target) in [(2, Phase::Save, S::StopCopy), (3, Phase::Load, S::Stop)] {
        let file = tempfile::tempfile().unwrap();
        let command = CoordinatorMessage::Command(command(epoch, phase, target));
        device.send_with(&command, &[file.as_fd()]);
        let refused = device.refused();
        assert_eq!((refused.state, refused.refusal.kind), (S::Stop, RefusalKind::Unsupported));
        assert!(refused.refusal.text.contains("neither be saved nor loaded"), "{refused:?}");
    }
    device.resume(4);
    drop(device);

    let device = Device::welcomed("foreign ram-only saves");
    let mut client = Client::connect(&device.socket());
    client.write_u32(BAR, NUMBER, 4711).unwrap();
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.go(1, Phase::Stop, S::StopCopy);
    let mut file = tempfile::tempfile().unwrap();
    let save = CoordinatorMessage::Command(command(2, Phase::Save, S::StopCopy));
    device.send_with(&save, &[file.as_fd()]);
    assert_eq!(device.reached().state, S::StopCopy);
    drop((client, device));

    let device = Device::welcomed("foreign ram-only saves");
    device.pause(1);
    file.seek(SeekFrom::Start(0)).unwrap();
    let load = CoordinatorMessage::Command(command(2, Phase::Load, S::Stop));
    device.send_with(&load, &[file.as_fd()]);
    assert_eq!(device.reached().state, S::Stop);
    device.resume(3);
    let mut client = Client::connect(&device.socket());
    assert_eq!(client.read_u32(BAR, NUMBER), Ok(4711));
    client.reset().unwrap();
    assert_eq!(client.read_u32(BAR, NUMBER), Ok(0));
}

#[test]
fn what_a_backend_cannot_do_is_said_and_no_wrong_answer_is_given() {
    let device = Device::welcomed("foreign ram-only");
    let client = client::Client::builder().connect(device.socket()).unwrap();
    let refused = |result: Result<(), client::ClientError>| result.unwrap_err().errno();
    let unsupported = Some(Errno::EOPNOTSUPP);
    assert_eq!(refused(client.migration_state().map(|_| ())), unsupported);
    assert_eq!(refused(client.state_size().map(|_| ())), unsupported);
    assert_eq!(refused(client.start_dirty_log(4096, &[]).map(|_| ())), unsupported);
    let state = client.set_migration_state(S::Stop).unwrap_err();
    assert_eq!(state.source.errno(), unsupported);
    let map = DmaMap { flags: 3, offset: 0, iova: 0x1000, size: 0x1000 };
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(0x1000).unwrap();
    client.dma_map(&map, Some(ram.as_fd())).unwrap();
    assert_eq!(refused(client.dma_unmap_dirty(0x1000, 0x1000, 4096).map(|_| ())), unsupported);
    client.dma_unmap(0x1000, 0x1000).unwrap();
    let stream = client.read_state(&mut Vec::new(), 1 << 20).unwrap_err();
    let StateStreamError::Client { source, .. } = stream else { panic!("{stream:?}") };
    assert_eq!(source.errno(), unsupported);
    let stream = client.write_state(&mut &b"a state"[..]).unwrap_err();
    let StateStreamError::Client { source, .. } = stream else { panic!("{stream:?}") };
    assert_eq!(source.errno(), unsupported);
}
