//! What the targets of vfio-user have in common: how a stream is made of an input, and a server that
//! does what an input says.

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use standstill_protocol::migration::MigrationState;
use standstill_vfio_user::client::{Client, ClientError, StateStreamError};
use standstill_vfio_user::wire::{
    Command, DMA_READABLE, DeviceInfo, DmaMap, HEADER_SIZE, Header, IrqInfo, RegionInfo, Request,
    SmallWrite, WriteMulti,
};
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// A new fd.
///
/// # Panics
///
/// If the process has too many.
#[must_use]
pub fn null() -> OwnedFd {
    File::open("/dev/null").expect("a file").into()
}

/// How many fds come with each piece of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Next(pub u8);

impl Next {
    /// With the next piece: mostly none.
    pub fn count(&mut self) -> u8 {
        if self.0 == 0 {
            return 0;
        }
        // Any sequence that is the same each time.
        self.0 = self.0.wrapping_mul(5).wrapping_add(3) | 1;
        if self.0 & 0xc0 == 0 { self.0 >> 2 & 7 } else { 0 }
    }
}

/// Makes messages of bodies: each is a number, flags, the length of the body, and the body.
#[must_use]
pub fn stream_of(mut bytes: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    while let Some((&[command, flags, low, high], rest)) = bytes.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
        let (body, rest) = rest.split_at(length);
        let header = Header {
            id: u16::from(command) ^ 0x5500,
            command: u16::from(command),
            flags: u32::from(flags & 0x3f),
            ..Header::default()
        };
        header.encode_message(&mut stream, 0, |out| out.extend_from_slice(body));
        bytes = rest;
    }
    stream
}

/// Appends the body of a request.
pub fn encode_request(request: &Request<'_>, out: &mut Vec<u8>) {
    match request {
        Request::Version(version) => version.encode(out),
        Request::DmaMap(map) => map.encode(out),
        Request::DmaUnmap(unmap) => unmap.encode(out),
        Request::GetInfo(query) => query.encode(DeviceInfo::SIZE, out),
        Request::GetRegionInfo(query) => query.encode(RegionInfo::SIZE, out),
        Request::GetIrqInfo(query) => query.encode(IrqInfo::SIZE, out),
        Request::GetRegionIoFds(query) => query.encode(out),
        Request::SetIrqs { request, data } => {
            request.encode(out);
            out.extend_from_slice(data);
        }
        Request::RegionRead(access) => access.encode(out),
        Request::RegionWrite { access, data } => {
            access.encode(out);
            out.extend_from_slice(data);
        }
        Request::Reset => {}
        Request::RegionWriteMulti(writes) => {
            WriteMulti::encode(&writes.writes().collect::<Vec<_>>(), out);
        }
        Request::DeviceFeature(feature) => feature.encode(out),
        Request::MigDataRead(data) => data.encode(out),
        Request::MigDataWrite(data) => {
            let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
            standstill_vfio_user::wire::MigData { size }.encode(out);
            out.extend_from_slice(data);
        }
    }
}

/// What a server does when it is asked, and what the client asks for next.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Which call the client makes; see [`call`].
    pub call: u8,
    /// How the server answers: the lowest three bits say the kind (0 to 4 a good answer, 5 an
    /// error, 6 the bytes as they are and then the end, 7 a command of its own first), the next
    /// three how many fds come along, and the highest that the answer is to something else.
    pub manner: u8,
    /// The body of the answer, or of the command.
    pub body: &'a [u8],
}

/// The steps of an input: a call, a manner, a length of two bytes, and a body, each.
#[derive(Clone, Debug)]
pub struct Steps<'a>(&'a [u8]);

impl<'a> Steps<'a> {
    /// Of this input. The first step is the answer to VERSION.
    #[must_use]
    pub fn new(input: &'a [u8]) -> Self {
        Self(input.get(..16 << 10).unwrap_or(input))
    }
}

impl<'a> Iterator for Steps<'a> {
    type Item = Step<'a>;

    fn next(&mut self) -> Option<Step<'a>> {
        let (&[call, manner, low, high], rest) = self.0.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
        let (body, rest) = rest.split_at(length);
        self.0 = rest;
        Some(Step { call, manner, body })
    }
}

/// Makes one of the client's calls; state streams are read and written with what has a length.
///
/// # Errors
///
/// What the call says.
pub fn call(client: &Client, number: u8) -> Result<(), ClientError> {
    let stream = |error| match error {
        StateStreamError::Client { source, .. } => Err(source),
        StateStreamError::TooLong { .. } | StateStreamError::Io { .. } => Ok(()),
    };
    match number % 24 {
        0 => client.device_info().map(drop),
        1 => client.region_info(u32::from(number)).map(drop),
        2 => client.region_io_fds(0).map(drop),
        3 => client.irq_info(2).map(drop),
        4 => client.irq_disable(2),
        5 => client.region_read(0, 0x10, &mut [0; 4]),
        6 => client.region_read(1, 0, &mut [0; 5000]),
        7 => client.region_write(0, 0x10, &[1, 2, 3, 4]),
        8 => {
            let flags = DMA_READABLE;
            let map = DmaMap { flags, offset: 0, iova: 0x1000, size: 0x1000 };
            client.dma_map(&map, Some(null().as_fd()))
        }
        9 => client.dma_unmap(0x1000, 0x1000),
        10 => client.dma_unmap_dirty(0, 0x10_0000, 0x1000).map(drop),
        11 => client.dma_unmap_all(),
        12 => client.reset(),
        13 => client.migration_flags().map(drop),
        14 => client.migration_state().map(drop),
        15 => client.set_migration_state(MigrationState::StopCopy).map_err(|error| error.source),
        16 => client.state_size().map(drop),
        17 => client.start_dirty_log(4096, &[(0, 0x1000)]).map(drop),
        18 => client.stop_dirty_log(),
        19 => client.dirty_pages(0x1000, 0x4_0000_0000, 0x1000).map(drop),
        20 => client.read_state(&mut std::io::sink(), 20_000).map(drop).or_else(stream),
        21 => client.write_state(&mut [0; 6000].as_slice()).map(drop).or_else(stream),
        22 => client.probe(8, 1 << 16).map(drop),
        _ => {
            let write = SmallWrite::new(0, 0, &[1]);
            let writes: Vec<_> = write.into_iter().collect();
            client.region_write_multi(&writes)
        }
    }
}

/// A server that does what the steps say.
#[derive(Debug)]
pub struct Server(UnixStream);

impl Server {
    /// At the other end of this socket.
    #[must_use]
    pub fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Answers until the steps or the client have ended.
    pub fn run(mut self, steps: Steps<'_>) {
        for step in steps {
            if self.serve(step).is_none() {
                break;
            }
        }
        // It reads on until the client has gone, so that nothing of that is an error there.
        let _ = self.0.shutdown(Shutdown::Write);
        let _ = std::io::copy(&mut self.0, &mut std::io::sink());
    }

    /// Hears a command, and whatever else the client says before it.
    fn hear(&mut self) -> Option<Header> {
        loop {
            let mut header = [0; HEADER_SIZE];
            self.0.read_exact(&mut header).ok()?;
            let header = Header::decode(&header)?;
            let mut body = vec![0; header.body_size()?];
            self.0.read_exact(&mut body).ok()?;
            // The answers to this server's own commands need none.
            if header.wants_reply() {
                return Some(header);
            }
        }
    }

    fn serve(&mut self, step: Step<'_>) -> Option<()> {
        let mut header = self.hear()?;
        let fds: Vec<_> = (0..step.manner >> 3 & 7).map(|_| null()).collect();
        if step.manner & 0x80 != 0 {
            header.id = header.id.wrapping_add(u16::from(step.call));
            header.command ^= u16::from(step.call >> 4);
        }
        let mut bytes = Vec::new();
        match step.manner & 7 {
            6 => {
                self.send(step.body, &fds)?;
                return None;
            }
            7 => {
                let command =
                    if step.body.len() & 1 == 0 { Command::DmaRead } else { Command::DmaWrite };
                let own = Header::command(header.id, command);
                own.encode_message(&mut bytes, 0, |out| out.extend_from_slice(step.body));
                header
                    .reply()
                    .encode_message(&mut bytes, 0, |out| out.extend_from_slice(step.body));
            }
            manner => {
                let reply = match manner {
                    5 => Header { flags: 0x21, error: u32::from(step.call), ..header.reply() },
                    _ => header.reply(),
                };
                reply.encode_message(&mut bytes, 0, |out| out.extend_from_slice(step.body));
            }
        }
        self.send(&bytes, &fds)
    }

    fn send(&mut self, bytes: &[u8], fds: &[OwnedFd]) -> Option<()> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let sent = loop {
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => break sent,
                Err(Errno::INTR) => {}
                Err(_) => return None,
            }
        };
        self.0.write_all(&bytes[sent..]).ok()
    }
}
