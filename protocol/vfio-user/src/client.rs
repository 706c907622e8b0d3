//! The client: what a VMM uses to reach a device in another process.
//!
//! ```
//! use standstill_vfio_user::client::Client;
//! use std::time::Duration;
//! # use standstill_vfio_user::connection::connect;
//! # use standstill_vfio_user::framing::FramingLimits;
//! # use std::os::unix::net::UnixListener;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let path = std::env::temp_dir().join(format!("vfio-user-{}.sock", std::process::id()));
//! # let listener = UnixListener::bind(&path)?;
//! # // A device that answers everything with the body that it was sent.
//! # std::thread::spawn(move || {
//! #     let socket = listener.accept().unwrap().0;
//! #     let limits = FramingLimits { max_message: 4096, max_fds: 1 };
//! #     let (mut receiver, mut sender) = connect(socket, limits).unwrap();
//! #     while let Ok(message) = receiver.receive(None) {
//! #         let body = match message.header.command {
//! #             9 => [message.body, &[1, 2, 3, 4]].concat(),
//! #             10 => message.body[..16].to_vec(),
//! #             _ => message.body.to_vec(),
//! #         };
//! #         sender.send(&message.header.reply(), &body, &[], None, |_| ()).unwrap();
//! #     }
//! # });
//! let client = Client::builder().timeout(Duration::from_secs(5)).connect(&path)?;
//! # std::fs::remove_file(&path)?;
//! let mut register = [0; 4];
//! client.region_read(0, 0x10, &mut register)?;
//! client.region_write(0, 0x10, &register)?;
//! # assert_eq!(register, [1, 2, 3, 4]);
//! # Ok(())
//! # }
//! ```
//!
//! **From many threads.** A [`Client`] can be cloned and used from any number of threads at once:
//! their requests are under way together, and each gets its own answer, in whatever order they come.
//! A call alone costs one `send` and one `recvmsg` and involves no other thread.
//!
//! **Deadlines.** Each message that is answered has the client's timeout
//! ([`Builder::timeout`], [`Client::with_timeout`]). Where none comes, the call fails, and a late
//! answer is dropped; the connection goes on. (A server that goes on not to answer is refused more
//! requests at some point.)
//!
//! **Errors.** [`ClientError`] tells what the server has refused from what did not reach it, and both
//! from an answer that cannot be. After a message that shows the stream itself to be wrong, all calls
//! fail with the same [`ClientError::Ended`].
//!
//! **DMA by messages.** A server that has no fd of some memory asks for it by messages, at any time.
//! A thread of its own serves them from the [`DmaTarget`] given to the builder.
//!
//! **Servers are not trusted.** Whatever one sends, nothing here panics, no call is later than its
//! deadline, and memory is bounded by what was agreed.

mod error;
mod exchange;
mod interrupts;
mod memory;
mod migration;
mod pending;
mod regions;
mod service;
mod turn;

#[cfg(test)]
mod tests;

pub use error::{ClientError, ConnectError, EndError, SetStateError, StateStreamError};
pub use regions::Region;
pub use service::{DmaTarget, NoDma};

use crate::Deadline;
use crate::connection::{Receiver, Sender, connect};
use crate::framing::FramingLimits;
use crate::wire::{
    Capabilities, Command, DEFAULT_MAX_DATA_XFER_SIZE, DEFAULT_MAX_DMA_MAPS, DEFAULT_PGSIZES,
    DeviceInfo, Header, Kind, Limits, MAJOR, MINOR, MigrationCapability, Query, Version, WireError,
};
use exchange::Exchange;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long an answer may take, if nobody says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// The most regions, and the most interrupt indexes, of a device.
pub const MAX_INDEXES: u32 = 256;

/// A connection to a device. Clones are the same connection. See the [module](self).
#[derive(Clone, Debug)]
pub struct Client {
    link: Arc<Link>,
    timeout: Duration,
}

/// The connection, which ends with the last client.
struct Link {
    exchange: Arc<Exchange>,
    agreed: Agreed,
    service: Option<JoinHandle<()>>,
}

/// What both ends have agreed on.
#[derive(Clone, Debug)]
struct Agreed {
    version: (u16, u16),
    server: Capabilities,
    max_data_xfer_size: u32,
    max_argsz: u32,
    write_multiple: bool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("agreed", &self.agreed).finish_non_exhaustive()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.exchange.end(EndError::Dropped);
        let here = thread::current().id();
        if let Some(service) = self.service.take().filter(|service| service.thread().id() != here) {
            // From here on the DMA target is not used any more. A panic of it has been told already.
            let _ = service.join();
        }
    }
}

/// How a [`Client`] is made.
pub struct Builder {
    capabilities: Capabilities,
    timeout: Duration,
    target: Box<dyn DmaTarget>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Builder");
        out.field("capabilities", &self.capabilities).field("timeout", &self.timeout);
        out.finish_non_exhaustive()
    }
}

impl Builder {
    /// How long each answer may take; [`DEFAULT_TIMEOUT`] if not set. Also how long the server may
    /// take to take the answers to its own commands.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// What the client says that it can do. A second socket is never agreed to.
    #[must_use]
    pub fn capabilities(self, capabilities: Capabilities) -> Self {
        Self { capabilities, ..self }
    }

    /// The memory that the server reaches by messages; none if not set.
    #[must_use]
    pub fn dma(self, target: impl DmaTarget + 'static) -> Self {
        Self { target: Box::new(target), ..self }
    }

    /// Connects to a device that listens at a path.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn connect(self, path: impl AsRef<Path>) -> Result<Client, ConnectError> {
        self.start(UnixStream::connect(path)?)
    }

    /// Speaks with a device over a Unix stream socket that is connected to it.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn start(mut self, socket: impl Into<OwnedFd>) -> Result<Client, ConnectError> {
        self.capabilities.twin_socket = None;
        let own_limit = self.capabilities.max_data_xfer_size();
        let limits = FramingLimits {
            max_message: Limits { max_data_xfer_size: own_limit }.max_message(),
            max_fds: usize::try_from(self.capabilities.max_msg_fds()).unwrap_or(0),
        };
        let (mut receiver, mut sender) = connect(socket, limits)?;
        let deadline = Deadline::within(self.timeout);
        let version = negotiate(&mut receiver, &mut sender, self.capabilities, deadline)?;
        let server = version.capabilities;
        let max_data_xfer_size = server.max_data_xfer_size().min(own_limit);
        let agreed = Agreed {
            version: (version.major, version.minor),
            max_data_xfer_size,
            max_argsz: Limits { max_data_xfer_size }.max_message(),
            write_multiple: server.write_multiple(),
            server,
        };
        let exchange = Arc::new(Exchange::new(receiver, sender)?);
        let (for_service, mut target) = (Arc::clone(&exchange), self.target);
        let run = move || service::run(&for_service, &mut *target, own_limit, self.timeout);
        let service = thread::Builder::new().name("vfio-user-dma".into()).spawn(run)?;
        let link = Arc::new(Link { exchange, agreed, service: Some(service) });
        Ok(Client { link, timeout: self.timeout })
    }
}

/// Says what the client can do and hears what the server can.
fn negotiate(
    receiver: &mut Receiver,
    sender: &mut Sender,
    capabilities: Capabilities,
    mut deadline: Deadline,
) -> Result<Version, ConnectError> {
    let header = Header::command(0, Command::Version);
    let ours = Version::new(capabilities);
    sender.send_by(&header, &[], &[], &mut deadline, |body| ours.encode(body))?;
    let answer = receiver.receive_by(&mut deadline)?;
    let Header { id, command, .. } = answer.header;
    match answer.kind {
        Kind::Done | Kind::Refused(_) if (id, command) == (header.id, header.command) => {}
        _ => return Err(ConnectError::NotTheAnswer { id, command }),
    }
    if let Kind::Refused(errno) = answer.kind {
        return Err(ConnectError::Refused(errno));
    }
    let version = Version::decode(answer.body)?;
    if version.major != MAJOR || version.minor > MINOR {
        let (major, minor) = (version.major, version.minor);
        return Err(ConnectError::Version { major, minor });
    }
    let theirs = &version.capabilities;
    if theirs.max_data_xfer_size() == 0 {
        return Err(ConnectError::NoData);
    }
    // Its commands would come where nobody listens.
    if theirs.twin_socket.as_ref().is_some_and(|twin| twin.supported) {
        return Err(ConnectError::NotOffered("a twin socket"));
    }
    if theirs.write_multiple() && !ours.capabilities.write_multiple() {
        return Err(ConnectError::NotOffered("several writes in one message"));
    }
    Ok(version)
}

impl Client {
    /// A client to be, which says that it can do all that is possible here: 16 fds, 1 MiB in one
    /// transfer, pages of 4096 bytes, several writes in one message.
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            capabilities: Capabilities {
                max_msg_fds: Some(u64::from(crate::wire::QEMU_MAX_MSG_FDS)),
                max_data_xfer_size: Some(u64::from(DEFAULT_MAX_DATA_XFER_SIZE)),
                max_dma_maps: Some(u64::from(DEFAULT_MAX_DMA_MAPS)),
                pgsizes: Some(DEFAULT_PGSIZES),
                write_multiple: Some(true),
                twin_socket: None,
                migration: Some(MigrationCapability {
                    pgsize: Some(DEFAULT_PGSIZES),
                    max_bitmap_size: Some(u64::from(DEFAULT_MAX_DATA_XFER_SIZE)),
                }),
            },
            timeout: DEFAULT_TIMEOUT,
            target: Box::new(NoDma),
        }
    }

    /// The same connection with another timeout for each answer: a reset or a change of the
    /// migration state may take its time.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { link: Arc::clone(&self.link), timeout }
    }

    /// What the server says that it can do.
    #[must_use]
    pub fn server(&self) -> &Capabilities {
        &self.link.agreed.server
    }

    /// The version that the server answered with, major and minor.
    #[must_use]
    pub fn version(&self) -> (u16, u16) {
        self.link.agreed.version
    }

    /// The most bytes of one transfer that both ends can do. Calls with more are cut into several.
    #[must_use]
    pub fn max_data_xfer_size(&self) -> u32 {
        self.link.agreed.max_data_xfer_size
    }

    /// What the device has.
    ///
    /// # Errors
    ///
    /// [`ClientError`], also for more than [`MAX_INDEXES`] regions or interrupt indexes.
    pub fn device_info(&self) -> Result<DeviceInfo, ClientError> {
        let size = u32::try_from(DeviceInfo::SIZE).unwrap_or(u32::MAX);
        let query = Query { argsz: size, index: 0 };
        let ask = |body: &mut Vec<u8>| query.encode(DeviceInfo::SIZE, body);
        self.call(Command::GetInfo, &[], ask, |body, _| {
            let info = DeviceInfo::decode(body)?;
            for (field, value) in [("num_regions", info.num_regions), ("num_irqs", info.num_irqs)] {
                if value > MAX_INDEXES {
                    let value = u64::from(value);
                    return Err(WireError::Field { what: "DEVICE_GET_INFO", field, value });
                }
            }
            Ok(info)
        })
    }

    /// Resets the device. Which migration state it is in then depends on the server: ask.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; some servers refuse it in STOP and STOP_COPY.
    pub fn reset(&self) -> Result<(), ClientError> {
        self.call(Command::Reset, &[], |_| (), |_, _| Ok(()))
    }

    fn exchange(&self) -> &Exchange {
        &self.link.exchange
    }

    fn deadline(&self) -> Deadline {
        Deadline::within(self.timeout)
    }

    /// A command without data or fds, and its answer.
    fn call<R>(
        &self,
        command: Command,
        fds: &[BorrowedFd<'_>],
        body: impl FnOnce(&mut Vec<u8>),
        parse: impl FnOnce(&[u8], Vec<OwnedFd>) -> Result<R, WireError>,
    ) -> Result<R, ClientError> {
        self.call_with_data(command, &[], fds, body, parse)
    }

    /// A command and its answer.
    fn call_with_data<R>(
        &self,
        command: Command,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        body: impl FnOnce(&mut Vec<u8>),
        parse: impl FnOnce(&[u8], Vec<OwnedFd>) -> Result<R, WireError>,
    ) -> Result<R, ClientError> {
        let mut deadline = self.deadline();
        let ticket = self.exchange().start(command, data, fds, &mut deadline, body)?;
        ticket.finish(&mut deadline, parse)
    }
}
