//! A device that was written for the server of the `vfio_user` crate, as a device process: it is
//! paused and resumed by a coordinator, and its registers are what they were.
//!
//! The device is a GPIO line that somebody pulls every third time that it is looked at. It knows
//! nothing of states, phases or coordinators. `cargo run --example foreign_backend` is the VMM;
//! started with `device` the program is the device process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use rustix::event::{EventfdFlags, eventfd};
use standstill::coordinator::{DeviceSpec, MachineBuilder};
use standstill::device_proc::ServeOptions;
use standstill::device_proc::foreign::{Foreign, serve_backend};
use standstill::vfio_user::client::{Client, ClientError};
use std::error::Error;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_PCI_BAR2_REGION_INDEX as BAR2,
    VFIO_PCI_CONFIG_REGION_INDEX as CONFIG, VFIO_PCI_INTX_IRQ_INDEX as INTX,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};

/// Size of the BAR, and of the configuration space, in bytes.
const SIZE: usize = 256;

struct Gpio {
    config: [u8; SIZE],
    interrupt: Option<File>,
    looked_at: u64,
}

impl Gpio {
    fn new() -> Self {
        let mut config = [0; SIZE];
        config[..4].copy_from_slice(&[0x4f, 0x49, 0xc8, 0x0d]);
        config[0x0b] = 0xff; // Of no class that PCI knows.
        config[0x18] = 1; // BAR 2 is one of I/O ports.
        config[0x3d] = 1; // INTA.
        Self { config, interrupt: None, looked_at: 0 }
    }

    /// The bits of the configuration space that can be written.
    fn mask(at: usize) -> u8 {
        match at {
            0x04 => 0b101,       // I/O and bus master.
            0x05 => 0b100,       // INTx off.
            0x19..=0x1b => 0xff, // BAR 2 has 256 bytes.
            0x3c => 0xff,
            _ => 0,
        }
    }
}

/// The bytes of an access to that many.
fn range(offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
    let begin = usize::try_from(offset).ok().filter(|begin| begin + length <= SIZE);
    begin.map(|begin| begin..begin + length).ok_or(ErrorKind::InvalidInput.into())
}

impl ServerBackend for Gpio {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let range = range(offset, data.len())?;
        if region == CONFIG {
            data.copy_from_slice(&self.config[range]);
            return Ok(());
        }
        data.fill(0);
        if (region, offset) == (BAR2, 0) {
            self.looked_at += 1;
            if self.looked_at.is_multiple_of(3) {
                data[0] = 1;
                if let Some(interrupt) = &mut self.interrupt {
                    interrupt.write_all(&1_u64.to_ne_bytes())?;
                }
            }
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = range(offset, data.len())?;
        for (at, new) in range.zip(data).filter(|_| region == CONFIG) {
            let mask = Self::mask(at);
            self.config[at] = (self.config[at] & !mask) | (new & mask);
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        _offset: u64,
        _address: u64,
        _size: u64,
        _fd: Option<File>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, _address: u64, _size: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.looked_at = 0;
        Ok(())
    }

    fn set_irqs(
        &mut self,
        _index: u32,
        _flags: u32,
        _start: u32,
        _count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        self.interrupt = fds.into_iter().next();
        Ok(())
    }
}

/// The device process. It does no DMA at all, so it reaches no peer.
fn device(socket: &str) -> Result<(), Box<dyn Error>> {
    let region = |index| ServerRegion {
        region_info: vfio_region_info {
            index,
            size: SIZE as u64,
            flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            ..Default::default()
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let (regions, irqs) = (
        [BAR2, CONFIG].map(region).to_vec(),
        vec![IrqInfo { index: INTX, flags: VFIO_IRQ_INFO_EVENTFD, count: 1 }],
    );
    let build = || Ok(Foreign::new("gpio", Gpio::new(), regions, irqs).ram_only());
    Ok(serve_backend(ServeOptions::new(socket), build)?)
}

/// Looks at the line four times; what was seen, and how many interrupts came.
fn look(
    interrupt: &OwnedFd,
    mut look_once: impl FnMut(&mut [u8]) -> Result<(), Box<dyn Error>>,
) -> Result<String, Box<dyn Error>> {
    let mut seen = Vec::new();
    for _ in 0..4 {
        let mut data = [0];
        look_once(&mut data)?;
        seen.push(data[0].to_string());
    }
    let mut raised = [0; 8];
    rustix::io::read(interrupt, &mut raised)?;
    let (seen, raised) = (seen.join(" "), u64::from_ne_bytes(raised));
    Ok(format!("reads {seen} and sees {raised} interrupt"))
}

fn vmm() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("gpio0");
    let spec = DeviceSpec::new("gpio0", std::env::current_exe()?).arg("device").arg(&socket);
    let machine = MachineBuilder::new("vm0").devices([spec]).start_blocking()?;
    println!("gpio0 is {}", machine.status()?.devices[0].kind);
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;

    let mut client = vfio_user::Client::new(&socket)?;
    client.set_irqs(INTX, 4 | 32, 0, 1, &[interrupt.as_raw_fd()])?;
    let seen = look(&interrupt, |data| Ok(client.region_read(BAR2, 0, data)?))?;
    println!("the crate's client {seen}");
    client.shutdown()?;
    drop(client);

    let client = Client::builder().connect(&socket)?;
    client.irq_install(INTX, 0, &[interrupt.as_fd()])?;
    let stopped = machine.pause()?;
    print!("{}", stopped.report());
    match client.region_read(BAR2, 0, &mut [0]) {
        Err(ClientError::Refused { errno, .. }) => println!("a look meanwhile is refused: {errno}"),
        other => println!("a look meanwhile: {other:?}"),
    }
    print!("{}", stopped.resume()?);
    let seen = look(&interrupt, |data| Ok(client.region_read(BAR2, 0, data)?))?;
    println!("our client {seen}");
    machine.shutdown()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().collect::<Vec<_>>().as_slice() {
        [_, word, socket] if word == "device" => device(socket),
        _ => vmm(),
    }
}
