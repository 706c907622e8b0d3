//! A relay on the data socket: between a device process and its client.
//!
//! ```text
//! client ⇄ relay ⇄ device process
//! ```
//!
//! It listens in the place of the device, on threads of the test, and passes bytes and file descriptors
//! on, message by message: each protocol says how long its messages are. What is armed for a message is
//! done to exactly that one.
//!
//! ```
//! use standstill_testkit::outside::data::{DataAction, DataFault, DataRelay, Framing, Way};
//! use std::io::{Read, Write};
//! use std::os::unix::net::{UnixListener, UnixStream};
//!
//! let folder = tempfile::tempdir()?;
//! let (listen, path) = (folder.path().join("relay"), folder.path().join("device"));
//! let device = UnixListener::bind(&path)?;
//! let relay = DataRelay::start(&listen, &path, Framing::VfioUser)?;
//! // The second message of the client ends in the middle of its header, and so does the connection.
//! let _ = relay.arm(DataFault { way: Way::ToDevice, message: 2, action: DataAction::CutAt(7) });
//!
//! let mut client = UnixStream::connect(relay.path())?;
//! let message = [1, 0, 13, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
//! client.write_all(&message)?;
//! client.write_all(&message)?;
//! let mut received = Vec::new();
//! device.accept()?.0.read_to_end(&mut received)?;
//! assert_eq!(received.len(), 16 + 7);
//! assert_eq!(relay.fired().len(), 1);
//! # Ok::<_, std::io::Error>(())
//! ```

use super::Fired;
use crate::trace::now_ns;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with,
};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// The most fds that the kernel lets through with one write.
const MANY_FDS: usize = 253;
/// The longest message that is read as one, in bytes; what claims to be longer is passed on as it comes.
const LONGEST: usize = 16 << 20;
/// How long a byte is alone in the receiver's queue.
const ALONE: Duration = Duration::from_micros(500);
/// How many bytes of a message are alone, from its beginning: more than any header has.
const ALONE_BYTES: usize = 64;
/// How often a device is tried whose queue of clients is full; nothing tells when there is room.
const AGAIN: Duration = Duration::from_millis(2);

/// How messages are told from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Framing {
    /// vfio-user: 16 bytes of header, with the length of the whole message.
    VfioUser,
    /// vhost-user: 12 bytes of header, with the length of what follows it.
    VhostUser,
    /// Whatever one read gives is a message.
    Reads,
}

impl Framing {
    /// How many bytes are missing to a whole message.
    fn missing(self, bytes: &[u8]) -> usize {
        let length = |at: usize| {
            let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
            field.map_or(0, |field| usize::try_from(u32::from_le_bytes(field)).unwrap_or(0))
        };
        let (header, whole) = match self {
            Self::VfioUser => (16, length(4)),
            Self::VhostUser => (12, length(8).saturating_add(12)),
            Self::Reads => (1, 1),
        };
        if bytes.len() < header {
            header - bytes.len()
        } else if whole > LONGEST {
            0
        } else {
            whole.saturating_sub(bytes.len())
        }
    }
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// From the client to the device process.
    ToDevice,
    /// From the device process to the client.
    ToClient,
}

/// What is done to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DataFault {
    /// Which way it goes.
    pub way: Way,
    /// The how-manieth that goes this way after this was armed, over all connections, from 1; each
    /// if 0.
    pub message: u32,
    /// What.
    pub action: DataAction,
}

/// What is done to a message on a data socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataAction {
    /// It comes that many milliseconds later, and what follows it too.
    DelayMs(u32),
    /// All bits of its byte at that offset are inverted, or of its last byte if it is shorter.
    CorruptAt(u32),
    /// It comes byte by byte: each of its first 64 bytes is alone for a moment.
    Split,
    /// It is written together with the next one, by one write.
    Merge,
    /// Both connections are closed after that many bytes of it; before it, if 0.
    CutAt(u32),
}

#[derive(Debug)]
struct Armed {
    fault: DataFault,
    count: u32,
}

#[derive(Debug, Default)]
struct Shared {
    armed: Mutex<Vec<Armed>>,
    fired: Mutex<Vec<Fired>>,
    /// To be shut down at the end; each connection has two.
    streams: Mutex<Vec<UnixStream>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    ended: Mutex<bool>,
    end: Condvar,
}

/// A relay on a data socket. Dropping it closes all connections.
#[derive(Debug)]
pub struct DataRelay {
    shared: Arc<Shared>,
    path: PathBuf,
    listener: Arc<UnixListener>,
    listening: Option<JoinHandle<()>>,
}

impl DataRelay {
    /// Listens at one path in the place of a device that listens at another one, which may begin
    /// later.
    ///
    /// # Errors
    ///
    /// Those of binding the path.
    pub fn start(listen: &Path, device: &Path, framing: Framing) -> io::Result<Self> {
        let listener = Arc::new(UnixListener::bind(listen)?);
        let shared = Arc::<Shared>::default();
        let (known, accepts, device) =
            (Arc::clone(&shared), Arc::clone(&listener), device.to_owned());
        let listening = std::thread::spawn(move || {
            for client in accepts.incoming().map_while(Result::ok) {
                // A client whose device is not there sees the end of its connection.
                let Ok(device) = known.connect(&device) else { continue };
                let _ = known.relay(client, device, framing);
            }
        });
        Ok(Self { shared, path: listen.to_owned(), listener, listening: Some(listening) })
    }

    /// Does this from now on. Returns its index in what has fired. Of several for one message the
    /// first counts.
    #[must_use = "the index tells it from others"]
    pub fn arm(&self, fault: DataFault) -> u32 {
        let mut armed = lock(&self.shared.armed);
        armed.push(Armed { fault, count: 0 });
        u32::try_from(armed.len() - 1).unwrap_or(u32::MAX)
    }

    /// What has happened so far, in that order.
    #[must_use]
    pub fn fired(&self) -> Vec<Fired> {
        lock(&self.shared.fired).clone()
    }

    /// Where clients connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DataRelay {
    fn drop(&mut self) {
        *lock(&self.shared.ended) = true;
        self.shared.end.notify_all();
        // Ends the thread that accepts.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let listening = self.listening.take().map(JoinHandle::join);
        for stream in lock(&self.shared.streams).drain(..) {
            // Fails for one that has ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let threads: Vec<_> = lock(&self.shared.threads).drain(..).collect();
        let panicked = threads.into_iter().map(JoinHandle::join).chain(listening);
        // A panic has been printed where it happened.
        panicked.for_each(drop);
        let _ = std::fs::remove_file(&self.path);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Waits, at most until the relay is dropped.
    fn wait(&self, time: Duration) -> io::Result<()> {
        let waited = self.end.wait_timeout_while(lock(&self.ended), time, |ended| !*ended);
        let (ended, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *ended { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }

    /// Connects to a device, which may take its time, at most until the relay is dropped.
    fn connect(&self, device: &Path) -> io::Result<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(device)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                // A device that stands accepts nobody.
                Err(Errno::AGAIN) => self.wait(AGAIN)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    fn relay(
        self: &Arc<Self>,
        client: UnixStream,
        device: UnixStream,
        framing: Framing,
    ) -> io::Result<()> {
        for (way, from, to) in [
            (Way::ToDevice, client.try_clone()?, device.try_clone()?),
            (Way::ToClient, device.try_clone()?, client.try_clone()?),
        ] {
            let shared = Arc::clone(self);
            let thread = std::thread::spawn(move || {
                // Whatever ends one way ends the connection.
                let _ = shared.pass_on(way, &from, &to, framing);
                for stream in [from, to] {
                    let _ = stream.shutdown(Shutdown::Both);
                }
            });
            lock(&self.threads).push(thread);
        }
        lock(&self.streams).extend([client, device]);
        Ok(())
    }

    /// Passes messages on until one side has closed, or a fault closes both.
    fn pass_on(
        &self,
        way: Way,
        from: &UnixStream,
        to: &UnixStream,
        framing: Framing,
    ) -> io::Result<()> {
        let mut held: Option<Message> = None;
        while let Some(mut message) = Message::receive(from, framing)? {
            let action = self.due(way);
            if let Some(first) = held.take() {
                message = first.merged(message);
            }
            match action {
                None => message.send(to)?,
                Some(DataAction::DelayMs(ms)) => {
                    self.wait(Duration::from_millis(ms.into()))?;
                    message.send(to)?;
                }
                Some(DataAction::CorruptAt(offset)) => {
                    message.corrupt(offset);
                    message.send(to)?;
                }
                Some(DataAction::Split) => {
                    let (alone, rest) = message.split();
                    for byte in alone {
                        byte.send(to)?;
                        self.wait(ALONE)?;
                    }
                    rest.send(to)?;
                }
                Some(DataAction::Merge) => held = Some(message),
                Some(DataAction::CutAt(length)) => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX);
                    message.bytes.truncate(length);
                    return message.send(to);
                }
            }
        }
        Ok(())
    }

    /// What is armed for the message that has just come.
    fn due(&self, way: Way) -> Option<DataAction> {
        let mut due = None;
        for (index, Armed { fault, count }) in (0..).zip(lock(&self.armed).iter_mut()) {
            if fault.way != way {
                continue;
            }
            *count += 1;
            if due.is_none() && (fault.message == 0 || fault.message == *count) {
                let fired = Fired { index, occurrence: *count, at_ns: now_ns() };
                lock(&self.fired).push(fired);
                due = Some(fault.action);
            }
        }
        due
    }
}

struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    /// Reads one; `None` at the end. A part of one at the end is one, too.
    fn receive(from: &UnixStream, framing: Framing) -> io::Result<Option<Self>> {
        let mut message = Self { bytes: Vec::new(), fds: Vec::new() };
        loop {
            let missing = framing.missing(&message.bytes);
            if missing == 0 {
                return Ok(Some(message));
            }
            let room = if framing == Framing::Reads { 64 << 10 } else { missing };
            if !message.read(from, room)? {
                return Ok((!message.bytes.is_empty()).then_some(message));
            }
        }
    }

    /// Reads at most that many bytes more; false at the end.
    fn read(&mut self, from: &UnixStream, most: usize) -> io::Result<bool> {
        let mut bytes = vec![0; most.min(64 << 10)];
        let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let read = loop {
            match recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(received) => break received.bytes,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        };
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = part {
                self.fds.extend(some);
            }
        }
        self.bytes.extend_from_slice(&bytes[..read]);
        Ok(read > 0)
    }

    /// Sends all of it, its fds with the first byte.
    fn send(&self, to: &UnixStream) -> io::Result<()> {
        let mut fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut rest = self.bytes.as_slice();
        while !rest.is_empty() {
            let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::Error::other("more file descriptors than one write can have"));
            }
            match sendmsg(to, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    fds.clear();
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Its first bytes, each alone, the first one with all fds; and the rest.
    fn split(mut self) -> (Vec<Self>, Self) {
        let rest = self.bytes.split_off(self.bytes.len().min(ALONE_BYTES));
        let mut fds = self.fds;
        let alone = |byte| Self { bytes: vec![byte], fds: std::mem::take(&mut fds) };
        let alone = self.bytes.into_iter().map(alone).collect();
        (alone, Self { bytes: rest, fds })
    }

    fn merged(mut self, mut next: Self) -> Self {
        self.bytes.append(&mut next.bytes);
        self.fds.append(&mut next.fds);
        self
    }

    fn corrupt(&mut self, offset: u32) {
        let last = self.bytes.len().saturating_sub(1);
        let offset = usize::try_from(offset).unwrap_or(last).min(last);
        if let Some(byte) = self.bytes.get_mut(offset) {
            *byte = !*byte;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::Instant;

    /// A message of vfio-user with that payload.
    fn message(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        let length = u32::try_from(16 + payload.len()).unwrap();
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    struct Wire {
        _folder: tempfile::TempDir,
        relay: DataRelay,
        client: UnixStream,
        device: UnixStream,
    }

    fn wire() -> Wire {
        let folder = tempfile::tempdir().unwrap();
        let (listen, at) = (folder.path().join("relay"), folder.path().join("device"));
        let listener = UnixListener::bind(&at).unwrap();
        let relay = DataRelay::start(&listen, &at, Framing::VfioUser).unwrap();
        let client = UnixStream::connect(relay.path()).unwrap();
        let (device, _) = listener.accept().unwrap();
        for stream in [&client, &device] {
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        }
        Wire { _folder: folder, relay, client, device }
    }

    fn exactly(mut stream: &UnixStream, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn messages_and_fds_pass_both_ways_and_only_the_one_that_is_meant_is_changed() {
        let mut wire = wire();
        let first = wire.relay.arm(DataFault {
            way: Way::ToDevice,
            message: 2,
            action: DataAction::CorruptAt(17),
        });
        for payload in [b"one", b"two", b"san"] {
            wire.client.write_all(&message(payload)).unwrap();
        }
        assert_eq!(exactly(&wire.device, 19), message(b"one"));
        assert_eq!(exactly(&wire.device, 19), message(&[b't', !b'w', b'o']));
        assert_eq!(exactly(&wire.device, 19), message(b"san"));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let with_fd = Message { bytes: message(b"fd"), fds: vec![theirs.into()] };
        with_fd.send(&wire.device).unwrap();
        drop(with_fd);
        let received = Message::receive(&wire.client, Framing::VfioUser).unwrap().unwrap();
        assert_eq!((received.bytes, received.fds.len()), (message(b"fd"), 1));
        UnixStream::from(received.fds.into_iter().next().unwrap()).write_all(b"x").unwrap();
        assert_eq!(exactly(&ours, 1), b"x");
        let fired = wire.relay.fired();
        assert_eq!(fired.iter().map(|f| (f.index, f.occurrence)).collect::<Vec<_>>(), [(first, 2)]);
    }

    #[test]
    fn a_cut_message_is_the_last_one_in_both_directions() {
        let mut wire = wire();
        let cut = DataFault { way: Way::ToClient, message: 1, action: DataAction::CutAt(5) };
        let _ = wire.relay.arm(cut);
        wire.device.write_all(&message(b"reply")).unwrap();
        let mut got = Vec::new();
        wire.client.read_to_end(&mut got).unwrap();
        assert_eq!(got, message(b"reply")[..5]);
        assert_eq!(wire.device.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn a_message_is_split_into_single_bytes_the_fds_with_the_first_and_a_rest() {
        let (fd, _) = UnixStream::pair().unwrap();
        let bytes: Vec<_> = (0..100).collect();
        let (alone, rest) = Message { bytes, fds: vec![fd.into()] }.split();
        assert_eq!(alone.iter().map(|byte| byte.fds.len()).collect::<Vec<_>>()[..3], [1, 0, 0]);
        let bytes: Vec<_> = alone.into_iter().map(|byte| byte.bytes).collect();
        assert_eq!(bytes, (0..64).map(|byte| vec![byte]).collect::<Vec<_>>());
        assert_eq!((rest.bytes, rest.fds.len()), ((64..100).collect(), 0));
    }

    #[test]
    fn a_split_message_comes_byte_by_byte_and_merged_ones_by_one_write() {
        let mut wire = wire();
        let split = DataFault { way: Way::ToDevice, message: 1, action: DataAction::Split };
        let merge = DataFault { way: Way::ToDevice, message: 2, action: DataAction::Merge };
        let _ = (wire.relay.arm(split), wire.relay.arm(merge));
        let began = Instant::now();
        wire.client.write_all(&message(b"in pieces")).unwrap();
        assert_eq!(exactly(&wire.device, 25), message(b"in pieces"));
        // However long this test was held up: before the last byte each of the others was alone.
        assert!(began.elapsed() >= 24 * ALONE, "it came at once");
        wire.client.write_all(&message(b"a")).unwrap();
        wire.client.write_all(&message(b"b")).unwrap();
        let mut both = [0; 64];
        assert_eq!(wire.device.read(&mut both).unwrap(), 34);
    }

    #[test]
    fn a_client_waits_for_a_device_that_stands_and_the_end_of_the_relay_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (listen, at) = (folder.path().join("relay"), folder.path().join("device"));
        // One client is in its queue, and there is room for no other.
        let device =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let device = UnixListener::from(device.unwrap());
        rustix::net::bind(&device, &SocketAddrUnix::new(&at).unwrap()).unwrap();
        rustix::net::listen(&device, 0).unwrap();
        let _fills = UnixStream::connect(&at).unwrap();
        let relay = DataRelay::start(&listen, &at, Framing::VfioUser).unwrap();
        let mut late = UnixStream::connect(relay.path()).unwrap();
        late.write_all(&message(b"late")).unwrap();
        device.accept().unwrap();
        assert_eq!(exactly(&device.accept().unwrap().0, 20), message(b"late"));

        let _fills = UnixStream::connect(&at).unwrap();
        let _waits = UnixStream::connect(relay.path()).unwrap();
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            drop(relay);
            ended.send(()).unwrap();
        });
        end.recv_timeout(Duration::from_secs(30)).unwrap();
    }
}
