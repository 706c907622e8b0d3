//! A client in bytes: it can send what no client should.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

pub(super) const VERSION: u16 = 1;
pub(super) const REGION_READ: u16 = 9;
pub(super) const REGION_WRITE: u16 = 10;

/// Flags of a command: none, or that no reply is wanted.
pub(super) const POSTED: u32 = 0x10;

/// A reply, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) id: u16,
    pub(super) command: u16,
    pub(super) flags: u32,
    pub(super) error: u32,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// The body of a success, or the error number.
    pub(super) fn result(self) -> Result<Vec<u8>, u32> {
        match self.flags {
            1 => Ok(self.body),
            0x21 => {
                assert!(self.body.is_empty(), "an error reply is a header alone");
                Err(self.error)
            }
            flags => panic!("flags {flags:#x} of a reply"),
        }
    }
}

pub(super) fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).unwrap();
    let mut message = Vec::new();
    message.extend(id.to_ne_bytes());
    message.extend(command.to_ne_bytes());
    message.extend([size, flags, 0].iter().flat_map(|field| field.to_ne_bytes()));
    message.extend(body);
    message
}

/// The body of a VERSION with that JSON.
pub(super) fn version(json: &str) -> Vec<u8> {
    let mut body = vec![0, 0, 2, 0];
    body.extend(json.as_bytes());
    body.push(0);
    body
}

/// The fields of a body, one after another.
#[macro_export]
macro_rules! fields {
    ($($field:expr),* $(,)?) => {{
        let mut body = Vec::<u8>::new();
        $(body.extend(($field).to_ne_bytes());)*
        body
    }};
}

pub(super) fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    fields!(offset, region, count)
}

pub(super) fn write_body(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut body = access(region, offset, u32::try_from(data.len()).unwrap());
    body.extend(data);
    body
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) stream: UnixStream,
    next: u16,
}

impl Client {
    /// One that has said nothing yet.
    pub(super) fn raw(stream: UnixStream) -> Self {
        Self { stream, next: 0 }
    }

    /// One that has exchanged versions.
    pub(super) fn greeted(stream: UnixStream) -> Self {
        let mut client = Self::raw(stream);
        let capabilities = r#"{"capabilities":{"max_msg_fds":16}}"#;
        client.call(VERSION, &version(capabilities)).unwrap();
        client
    }

    pub(super) fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
        let sent = sent.unwrap();
        self.stream.write_all(&bytes[sent..]).unwrap();
    }

    /// The next message and what came with it.
    pub(super) fn receive_with_fds(&mut self) -> (Answer, Vec<OwnedFd>) {
        let mut header = [0; 16];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let got = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let got = got.unwrap().bytes;
        let fds: Vec<_> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        self.stream.read_exact(&mut header[got..]).unwrap();
        let half = |at: usize| u16::from_ne_bytes(header[at..at + 2].try_into().unwrap());
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; usize::try_from(word(4)).unwrap() - 16];
        self.stream.read_exact(&mut body).unwrap();
        let (id, command, flags, error) = (half(0), half(2), word(8), word(12));
        (Answer { id, command, flags, error, body }, fds)
    }

    pub(super) fn receive(&mut self) -> Answer {
        let (answer, fds) = self.receive_with_fds();
        assert!(fds.is_empty(), "fds with {answer:?}");
        answer
    }

    pub(super) fn call_with(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, u32> {
        self.next += 1;
        let id = self.next;
        self.send(&message(id, command, 0, body), fds);
        let answer = self.receive();
        assert_eq!((answer.id, answer.command), (id, command));
        answer.result()
    }

    pub(super) fn call(&mut self, command: u16, body: &[u8]) -> Result<Vec<u8>, u32> {
        self.call_with(command, body, &[])
    }

    pub(super) fn post(&mut self, command: u16, body: &[u8]) {
        self.send(&message(0xffff, command, POSTED, body), &[]);
    }

    pub(super) fn write(&mut self, region: u32, offset: u64, value: u32) -> Result<(), u32> {
        let body = write_body(region, offset, &value.to_le_bytes());
        self.call(REGION_WRITE, &body).map(|reply| assert_eq!(reply, body[..16]))
    }

    pub(super) fn read(&mut self, region: u32, offset: u64) -> Result<u32, u32> {
        let body = access(region, offset, 4);
        let reply = self.call(REGION_READ, &body)?;
        assert_eq!(reply[..16], body);
        Ok(u32::from_le_bytes(reply[16..].try_into().unwrap()))
    }

    pub(super) fn post_write(&mut self, region: u32, offset: u64, value: u32) {
        self.post(REGION_WRITE, &write_body(region, offset, &value.to_le_bytes()));
    }

    /// The connection has ended, with nothing more in it.
    pub(super) fn assert_closed(mut self) {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "something more came: {rest:x?}");
    }
}
