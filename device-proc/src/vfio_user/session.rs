//! What is done about each message of a client, and what is answered: no socket, no thread.
//!
//! A [`Session`] lasts as long as a connection. It takes one message after another, in the order of
//! their arrival, calls the [`Endpoint`] and writes the reply, if there is one, into a [`Reply`].
//! What may have to wait for others (unmapping for DMA, what only the control side can do) it gives
//! back as [`Work`]: the transport has to go on reading meanwhile.
//!
//! The rules are those of the vfio-user specification; where it leaves a choice, those of
//! libvfio-user. Each refusal is an error reply with the header alone and a number that says why.
//! Whoever wants no reply is told of no refusal either.

mod about;
mod feature;

use super::doorbells::Doorbells;
use super::endpoint::{Endpoint, LONGEST_ACCESS, refusal_errno};
use super::kept::Kept;
use super::link::MAX_FDS;
use super::share;
use crate::device::Device;
use crate::memory::{PAGE, WindowSpec};
use rustix::io::Errno;
use standstill_protocol::migration::MigrationState;
use standstill_vfio_user::framing::{FramingLimits, Message};
use standstill_vfio_user::wire::{
    self, Capabilities, Command, DMA_BY_FILE, DMA_BY_MMAP, DMA_READABLE, DMA_WRITABLE, DmaMap,
    DmaUnmap, Header, Kind, Limits, LoggingStart, MigrationCapability, RegionAccess, Request,
    Unmap, Version, WireError, WriteMulti,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What this end can take and do, in numbers, for a client of that minor version; with so many DMA
/// windows, and with or without a state that can be saved.
fn capabilities(minor: u16, windows: usize, migrates: bool) -> Capabilities {
    let fits = |size: usize| u64::try_from(size).ok();
    Capabilities {
        max_msg_fds: fits(MAX_FDS),
        max_data_xfer_size: fits(LONGEST_ACCESS),
        max_dma_maps: fits(windows),
        pgsizes: Some(PAGE),
        // QEMU, which says 0.0, would queue every write.
        write_multiple: Some(minor > 0),
        twin_socket: None,
        migration: migrates.then(|| MigrationCapability {
            pgsize: Some(PAGE),
            max_bitmap_size: fits(LONGEST_ACCESS),
        }),
    }
}

/// What bounds each message, whatever is agreed.
pub(super) fn limits() -> FramingLimits {
    let longest = Limits { max_data_xfer_size: u32::try_from(LONGEST_ACCESS).unwrap_or(0) };
    FramingLimits { max_message: longest.max_message(), max_fds: MAX_FDS }
}

/// A reply as it is sent; nothing if there is none.
#[derive(Debug, Default)]
pub(super) struct Reply<'a> {
    bytes: Vec<u8>,
    fds: Vec<ReplyFd<'a>>,
}

#[derive(Debug)]
enum ReplyFd<'a> {
    Memory(BorrowedFd<'a>),
    Doorbell(Arc<OwnedFd>),
}

impl<'a> Reply<'a> {
    /// The message.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What goes with it.
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let fds = self.fds.iter().map(|fd| match fd {
            ReplyFd::Memory(fd) => *fd,
            ReplyFd::Doorbell(fd) => fd.as_fd(),
        });
        fds.collect()
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.fds.clear();
    }

    /// The reply to a command.
    fn set(&mut self, to: &Header, body: impl FnOnce(&mut Vec<u8>)) {
        to.reply().encode_message(&mut self.bytes, 0, body);
    }

    fn refuse(&mut self, to: &Header, errno: wire::Errno) {
        self.clear();
        to.refusal(errno).encode(&mut self.bytes);
    }
}

/// What is to be done after a message was taken.
#[derive(Debug)]
pub(super) enum Next {
    /// Send the reply, if there is one.
    Reply,
    /// Send the reply and close the connection.
    Close,
    /// Do this and [finish](Session::finish).
    Later(Later),
    /// Send the reply; the versions are agreed on, and this many bytes are the most of one transfer.
    Agreed(u32),
    /// A reply to a command of this end.
    Answer,
}

/// Something that may have to wait.
#[derive(Debug)]
pub(super) struct Later {
    header: Header,
    pub(super) work: Work,
    /// The body of the command, to be repeated in the reply.
    echo: Vec<u8>,
}

/// What it is.
#[derive(Clone, Debug)]
pub(super) enum Work {
    /// Take DMA windows away.
    Unmap(DmaUnmap),
    /// Log which pages the device writes.
    StartLogging(LoggingStart),
    /// Ask the control side for a reset.
    Reset,
    /// Ask the control side for a migration state.
    SetState(MigrationState),
}

impl Work {
    /// Whether it waits for the control side.
    pub(super) fn asks(&self) -> bool {
        matches!(self, Self::Reset | Self::SetState(_))
    }
}

/// Why a command is refused.
enum Refused {
    Wire(WireError),
    Errno(Errno),
}

impl From<WireError> for Refused {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// A number for the client.
fn number(errno: Errno) -> wire::Errno {
    wire::Errno::from_reply(u32::try_from(errno.raw_os_error()).unwrap_or(0))
}

/// One connection of a client.
#[derive(Debug)]
pub(super) struct Session<'a, D> {
    endpoint: &'a Endpoint<D>,
    doorbells: Option<&'a Doorbells>,
    /// What was agreed on; `None` before the versions were exchanged.
    agreed: Option<Agreed>,
    /// The client has mapped windows without a file: DMA there needs messages to it.
    pub(super) has_windows_without_file: bool,
}

#[derive(Clone, Copy, Debug)]
struct Agreed {
    limits: Limits,
    /// How many fds the client takes in one message.
    max_msg_fds: usize,
}

impl<'a, D: Device> Session<'a, D> {
    /// A client that has just come.
    pub(super) fn new(endpoint: &'a Endpoint<D>, doorbells: Option<&'a Doorbells>) -> Self {
        Self { endpoint, doorbells, agreed: None, has_windows_without_file: false }
    }

    /// Takes a message. Writes that cannot be refused and have to wait for the start are kept.
    #[inline]
    pub(super) fn take(
        &mut self,
        message: Message<'_>,
        kept: &mut Kept,
        reply: &mut Reply<'a>,
    ) -> Next {
        let Message { header, kind, body, fds } = message;
        reply.clear();
        let posted = match kind {
            Kind::Command => false,
            Kind::Posted => true,
            Kind::Done | Kind::Refused(_) => return Next::Answer,
        };
        let next = match self.command(&header, posted, body, fds, kept, reply) {
            Ok(next) => next,
            Err(refused) => self.refused(&header, refused, reply),
        };
        if posted {
            reply.clear();
        }
        next
    }

    #[cold]
    fn refused(&self, header: &Header, refused: Refused, reply: &mut Reply<'a>) -> Next {
        match refused {
            Refused::Wire(error) => {
                tracing::debug!(%error, "a client's command");
                reply.refuse(header, error.errno());
            }
            Refused::Errno(errno) => reply.refuse(header, number(errno)),
        }
        // Whoever cannot agree on a version has nothing else to say.
        let is_version = header.command == Command::Version.number();
        if is_version && self.agreed.is_none() { Next::Close } else { Next::Reply }
    }

    fn command(
        &mut self,
        header: &Header,
        posted: bool,
        body: &[u8],
        fds: Vec<OwnedFd>,
        kept: &mut Kept,
        reply: &mut Reply<'a>,
    ) -> Result<Next, Refused> {
        let Some(Agreed { limits, .. }) = self.agreed else {
            return self.greet(header, body, &fds, reply);
        };
        match Request::decode(header.command, body, fds.len(), limits)? {
            Request::RegionRead(access) => self.region_read(header, access, kept, reply)?,
            Request::RegionWrite { access, data } => {
                self.region_write(access.region, access.offset, data, posted, kept)?;
                reply.set(header, |body| access.encode(body));
            }
            Request::RegionWriteMulti(writes) => {
                let done = self.write_multi(writes, posted, kept)?;
                reply.set(header, |body| WriteMulti::encode_reply(done, body));
            }
            Request::SetIrqs { request, data } => {
                share::check(&fds)?;
                self.endpoint.set_irqs(&request, data, fds)?;
                reply.set(header, |_| ());
            }
            Request::DmaMap(map) => {
                share::check(&fds)?;
                self.dma_map(map, fds.into_iter().next())?;
                reply.set(header, |_| ());
            }
            Request::DmaUnmap(unmap) => return self.dma_unmap(header, unmap, reply),
            Request::Reset => return Ok(later(header, Work::Reset, &[])),
            Request::DeviceFeature(feature) => {
                return self.feature(header, feature, body, reply);
            }
            Request::GetInfo(_) => self.info(header, reply),
            Request::GetRegionInfo(query) => self.region_info(header, query, reply)?,
            Request::GetRegionIoFds(query) => self.region_io_fds(header, query, reply)?,
            Request::GetIrqInfo(query) => self.irq_info(header, query, reply)?,
            Request::MigDataRead(asked) => self.migration_read(header, asked, reply)?,
            Request::MigDataWrite(data) => {
                self.endpoint.check_migration()?;
                self.endpoint.migration_write(data)?;
                reply.set(header, |_| ());
            }
            // There is one in the life of a connection.
            Request::Version(_) => return Err(Errno::INVAL.into()),
        }
        Ok(Next::Reply)
    }

    /// The first message of a connection, and no other, exchanges versions.
    #[cold]
    fn greet(
        &mut self,
        header: &Header,
        body: &[u8],
        fds: &[OwnedFd],
        reply: &mut Reply<'a>,
    ) -> Result<Next, Refused> {
        if header.command != Command::Version.number() || !fds.is_empty() {
            return Err(Errno::INVAL.into());
        }
        let version = Version::decode(body)?;
        let migrates = self.endpoint.check_migration().is_ok();
        let windows = self.endpoint.parts().memory.most_with_file();
        let answer = version.answer(&capabilities(version.minor, windows, migrates))?;
        let ours = u32::try_from(LONGEST_ACCESS).unwrap_or(u32::MAX);
        let max_data_xfer_size = version.capabilities.max_data_xfer_size().min(ours);
        self.agreed = Some(Agreed {
            limits: Limits { max_data_xfer_size },
            max_msg_fds: usize::try_from(version.capabilities.max_msg_fds()).unwrap_or(0),
        });
        tracing::debug!(major = version.major, minor = version.minor, "a client's version");
        reply.set(header, |body| answer.encode(body));
        Ok(Next::Agreed(max_data_xfer_size))
    }

    #[inline]
    fn region_read(
        &self,
        header: &Header,
        access: RegionAccess,
        kept: &mut Kept,
        reply: &mut Reply<'a>,
    ) -> Result<(), Errno> {
        let RegionAccess { offset, region, count } = access;
        // At most what was agreed on.
        let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        self.endpoint.check_range(region, offset, count)?;
        if count == 0 {
            reply.set(header, |body| access.encode(body));
            return Ok(());
        }
        let permit = self.endpoint.enter();
        if let Some(permit) = &permit {
            kept.carry_out(self.endpoint, permit);
        }
        let mut read = Ok(());
        reply.set(header, |body| {
            access.encode(body);
            let at = body.len();
            // No call into libc for a register, whose page is in no cache when this process wakes.
            body.extend_from_slice(&[0; 8]);
            body.resize(at + count, 0);
            let data = body.get_mut(at..).unwrap_or_default();
            read = self.endpoint.region_read(permit.as_ref(), region, offset, data);
        });
        read
    }

    #[inline]
    fn region_write(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
        posted: bool,
        kept: &mut Kept,
    ) -> Result<(), Errno> {
        self.endpoint.check_range(region, offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        let permit = self.endpoint.enter();
        match &permit {
            Some(permit) => kept.carry_out(self.endpoint, permit),
            None if posted && self.endpoint.is_gated(region) => {
                kept.keep(region, offset, data, self.endpoint.parts().edge.contents());
                return Ok(());
            }
            None => {}
        }
        self.endpoint.region_write(permit.as_ref(), region, offset, data)
    }

    /// Up to the first one that is refused; refused as a whole if that is the first of all.
    fn write_multi(
        &self,
        writes: WriteMulti<'_>,
        posted: bool,
        kept: &mut Kept,
    ) -> Result<u64, Errno> {
        let mut done = 0;
        for write in writes.writes() {
            match self.region_write(write.region, write.offset, write.data(), posted, kept) {
                Ok(()) => done += 1,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn dma_map(&mut self, map: DmaMap, fd: Option<OwnedFd>) -> Result<(), Errno> {
        if map.flags & (DMA_BY_FILE | DMA_BY_MMAP) == DMA_BY_FILE {
            // Windows are mapped, or reached by messages.
            return Err(Errno::OPNOTSUPP);
        }
        let window = WindowSpec {
            iova: map.iova,
            size: map.size,
            offset: map.offset,
            readable: map.flags & DMA_READABLE != 0,
            writable: map.flags & DMA_WRITABLE != 0,
        };
        let without_file = fd.is_none();
        self.endpoint.dma_map(window, fd)?;
        self.has_windows_without_file |= without_file;
        Ok(())
    }

    fn dma_unmap(
        &self,
        header: &Header,
        unmap: DmaUnmap,
        reply: &mut Reply<'a>,
    ) -> Result<Next, Refused> {
        // Usually nothing uses it.
        if let Unmap::Range { iova, size } = unmap.what
            && self.endpoint.dma_unmap_at_once(iova, size)?
        {
            reply.set(header, |body| unmap.encode(body));
            return Ok(Next::Reply);
        }
        Ok(later(header, Work::Unmap(unmap), &[]))
    }

    /// Does what may have to wait; for any thread. What comes of it is to be repeated in the reply
    /// behind what the command has said.
    pub(super) fn carry_out(endpoint: &Endpoint<D>, work: &Work) -> Result<Vec<u64>, Errno> {
        let done = match work {
            Work::Unmap(DmaUnmap { what, .. }) => match *what {
                Unmap::Range { iova, size } => endpoint.dma_unmap(iova, size),
                Unmap::All => endpoint.dma_unmap_all(),
                Unmap::Bitmap { iova, size, page_size, .. } => {
                    return endpoint.dma_unmap_reported(iova, size, page_size);
                }
            },
            Work::StartLogging(start) => endpoint.start_log(start),
            Work::Reset => endpoint.reset(),
            Work::SetState(state) => match endpoint.set_state(*state)? {
                Ok(_) => Ok(()),
                Err(refusal) => Err(refusal_errno(&refusal)),
            },
        };
        done.map(|()| Vec::new())
    }

    /// What had to wait is done: the reply.
    pub(super) fn finish(
        &self,
        later: &Later,
        done: Result<Vec<u64>, Errno>,
        reply: &mut Reply<'a>,
    ) {
        let Later { header, work, echo } = later;
        reply.clear();
        if !header.wants_reply() {
            return;
        }
        match (done, work) {
            (Err(errno), _) => reply.refuse(header, number(errno)),
            (Ok(words), Work::Unmap(unmap)) => reply.set(header, |body| {
                unmap.encode(body);
                let bitmap = body.len();
                put_words(&words, body);
                if let Unmap::Bitmap { bitmap_size, .. } = unmap.what {
                    // As long as the client has said, which is long enough.
                    let size = usize::try_from(bitmap_size).unwrap_or(0);
                    body.resize(bitmap + size, 0);
                }
            }),
            (Ok(_), Work::StartLogging(start)) => reply.set(header, |body| start.encode(body)),
            (Ok(_), _) => reply.set(header, |body| body.extend_from_slice(echo)),
        }
    }
}

/// The bits of a bitmap, as they travel.
fn put_words(words: &[u64], body: &mut Vec<u8>) {
    body.reserve(size_of_val(words));
    words.iter().for_each(|word| body.extend_from_slice(&word.to_ne_bytes()));
}

fn later(header: &Header, work: Work, echo: &[u8]) -> Next {
    Next::Later(Later { header: *header, work, echo: echo.to_vec() })
}
