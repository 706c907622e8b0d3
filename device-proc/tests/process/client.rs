//! A vfio-user client in bytes: the crate's own cannot take an error reply.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const RESET: u16 = 13;
const REPLY: u32 = 1;
const ERROR: u32 = 1 << 5;

/// The server refused, with that errno.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ErrorReply(pub(crate) u32);

/// A connection that has exchanged versions.
pub(crate) struct Client {
    stream: UnixStream,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(crate::child::PATIENCE)).unwrap();
        let mut client = Self { stream };
        let mut version = vec![0, 0, 1, 0];
        version.extend(br#"{"capabilities":{}}"#);
        version.push(0);
        client.call(VERSION, &version, &[]).unwrap();
        client
    }

    fn call(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, ErrorReply> {
        let mut message = Vec::new();
        message.extend(7_u16.to_le_bytes());
        message.extend(command.to_le_bytes());
        message.extend(u32::try_from(16 + body.len()).unwrap().to_le_bytes());
        message.extend([0; 8]);
        message.extend(body);
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent =
            sendmsg(&self.stream, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(message.len()));

        let mut header = [0; 16];
        self.stream.read_exact(&mut header).unwrap();
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(field(0), u32::from(command) << 16 | 7);
        let mut reply = vec![0; usize::try_from(field(4)).unwrap() - 16];
        self.stream.read_exact(&mut reply).unwrap();
        assert_eq!(field(8) & REPLY, REPLY);
        if field(8) & ERROR != 0 { Err(ErrorReply(field(12))) } else { Ok(reply) }
    }

    pub(crate) fn read(
        &mut self,
        region: u32,
        offset: u64,
        count: u32,
    ) -> Result<Vec<u8>, ErrorReply> {
        let mut body = Vec::new();
        body.extend(offset.to_le_bytes());
        body.extend(region.to_le_bytes());
        body.extend(count.to_le_bytes());
        Ok(self.call(REGION_READ, &body, &[])?.split_off(16))
    }

    pub(crate) fn read_u32(&mut self, region: u32, offset: u64) -> Result<u32, ErrorReply> {
        Ok(u32::from_le_bytes(self.read(region, offset, 4)?.try_into().unwrap()))
    }

    pub(crate) fn write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ErrorReply> {
        let mut body = Vec::new();
        body.extend(offset.to_le_bytes());
        body.extend(region.to_le_bytes());
        body.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        body.extend(data);
        self.call(REGION_WRITE, &body, &[]).map(|_| ())
    }

    pub(crate) fn write_u32(
        &mut self,
        region: u32,
        offset: u64,
        value: u32,
    ) -> Result<(), ErrorReply> {
        self.write(region, offset, &value.to_le_bytes())
    }

    /// Installs eventfds for MSI-X vectors from 0 on.
    pub(crate) fn install_msix(&mut self, eventfds: &[BorrowedFd<'_>]) -> Result<(), ErrorReply> {
        self.install(2, eventfds)
    }

    /// Installs an eventfd for INTx.
    pub(crate) fn install_intx(&mut self, eventfd: BorrowedFd<'_>) -> Result<(), ErrorReply> {
        self.install(0, &[eventfd])
    }

    fn install(&mut self, index: u32, eventfds: &[BorrowedFd<'_>]) -> Result<(), ErrorReply> {
        let count = u32::try_from(eventfds.len()).unwrap();
        let fields: [u32; 5] = [20, 4 | 32, index, 0, count];
        let body: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        self.call(SET_IRQS, &body, eventfds).map(|_| ())
    }

    pub(crate) fn dma_map(
        &mut self,
        iova: u64,
        size: u64,
        fd: BorrowedFd<'_>,
    ) -> Result<(), ErrorReply> {
        let mut body = Vec::new();
        body.extend(32_u32.to_le_bytes());
        body.extend(3_u32.to_le_bytes());
        body.extend([0_u64, iova, size].iter().flat_map(|field| field.to_le_bytes()));
        self.call(DMA_MAP, &body, &[fd]).map(|_| ())
    }

    pub(crate) fn reset(&mut self) -> Result<(), ErrorReply> {
        self.call(RESET, &[], &[]).map(|_| ())
    }

    /// Asks for a write of registers, and does not wait for the answer.
    #[cfg(feature = "fault-injection")]
    pub(crate) fn send_region_write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let mut message = Vec::new();
        message.extend(7_u16.to_le_bytes());
        message.extend(REGION_WRITE.to_le_bytes());
        message.extend(u32::try_from(16 + 16 + data.len()).unwrap().to_le_bytes());
        message.extend([0; 8]);
        message.extend(offset.to_le_bytes());
        message.extend(region.to_le_bytes());
        message.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        message.extend(data);
        self.send_raw(&message);
    }

    /// Sends bytes that are no message.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }
}
