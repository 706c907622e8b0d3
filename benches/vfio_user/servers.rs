//! The servers, each a process of this program.

use crate::program::Failure;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use standstill::device_proc::device::{
    AccessError, Bar, Device, DeviceError, DeviceInfo, PciIdentity,
};
use standstill::device_proc::{ServeOptions, serve};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vfio_bindings::bindings::vfio::vfio_region_info;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend, ServerRegion};

/// How long a server may take to begin.
const PATIENCE: Duration = Duration::from_secs(20);

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServerKind {
    /// None: as many bytes come back as a reply has.
    PingPong,
    /// A device process of this project.
    Ours,
    /// That of the `vfio_user` crate.
    Crate,
}

impl ServerKind {
    pub(crate) const ALL: [Self; 3] = [Self::PingPong, Self::Ours, Self::Crate];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PingPong => "bare ping-pong",
            Self::Ours => "device process",
            Self::Crate => "`vfio_user` crate",
        }
    }

    fn argument(self) -> &'static str {
        match self {
            Self::PingPong => "serve-ping-pong",
            Self::Ours => "serve-ours",
            Self::Crate => "serve-crate",
        }
    }

    pub(crate) fn from_argument(argument: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.argument() == argument)
    }

    /// Serves, in a process of its own.
    pub(crate) fn serve(self, socket: &Path) -> Result<(), Failure> {
        match self {
            Self::PingPong => ping_pong(socket),
            Self::Ours => Ok(serve(ServeOptions::new(socket), |_| Ok(registers()))?),
            Self::Crate => served_by_the_crate(socket),
        }
    }
}

/// A server's process; killed when this is dropped.
pub(crate) struct Server {
    pub(crate) kind: ServerKind,
    process: Child,
}

impl Server {
    /// Starts one and connects to it.
    pub(crate) fn start(kind: ServerKind, folder: &Path) -> Result<(Self, UnixStream), Failure> {
        let socket = folder.join(kind.argument());
        let program = std::env::current_exe()?;
        let process =
            Command::new(program).arg(kind.argument()).arg(&socket).stdin(Stdio::null()).spawn()?;
        let server = Self { kind, process };
        let began = Instant::now();
        loop {
            match UnixStream::connect(&socket) {
                Ok(client) => return Ok((server, client)),
                Err(error) if began.elapsed() > PATIENCE => return Err(error.into()),
                Err(_) => std::thread::yield_now(),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn ping_pong(socket: &Path) -> Result<(), Failure> {
    let (client, _) = UnixListener::bind(socket)?.accept()?;
    let mut message = [0; 64];
    loop {
        let (length, _) = recv(&client, &mut message, RecvFlags::empty())?;
        if length == 0 {
            return Ok(());
        }
        // The reply is longer by what was read.
        let reply = message.get(..length + 4).unwrap_or_default();
        send(&client, reply, SendFlags::NOSIGNAL)?;
    }
}

/// Each register reads as its offset.
fn read_register(offset: u64, data: &mut [u8]) {
    let bytes = offset.to_le_bytes();
    let count = data.len().min(bytes.len());
    data[..count].copy_from_slice(&bytes[..count]);
}

struct Registers;

fn registers() -> (Registers, DeviceInfo) {
    let info = DeviceInfo::new("registers", PciIdentity::new(0x1af4, 0x10f0));
    (Registers, info.bar(0, Bar::registers(4096)))
}

impl Device for Registers {
    fn region_read(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        read_register(offset, data);
        Ok(())
    }

    fn region_write(&self, _: u32, _: u64, _: &[u8]) -> Result<(), AccessError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self, _: &mut dyn Write) -> Result<(), DeviceError> {
        Ok(())
    }

    fn load(&self, _: &mut dyn Read) -> Result<(), DeviceError> {
        Ok(())
    }
}

struct Backend;

impl ServerBackend for Backend {
    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        read_register(offset, data);
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        _: u64,
        _: u64,
        _: u64,
        _: Option<File>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}

fn served_by_the_crate(socket: &Path) -> Result<(), Failure> {
    let region = |index| ServerRegion {
        region_info: vfio_region_info {
            argsz: 32,
            flags: 3,
            index,
            cap_offset: 0,
            size: 4096,
            offset: 0,
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let server = vfio_user::Server::new(socket, true, Vec::new(), (0..9).map(region).collect())?;
    Ok(server.run(&mut Backend)?)
}
