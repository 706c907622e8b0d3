//! Regions: what they are like, and accesses to them.

use super::{Client, ClientError};
use crate::wire::{
    Command, IoFds, IoFdsQuery, IoFdsReply, Query, RegionAccess, RegionInfo, RegionReply,
    SmallWrite, WireError, WriteMulti,
};
use std::os::fd::OwnedFd;

/// A region, and the fd through which it can be mapped.
#[derive(Debug)]
pub struct Region {
    /// What it is like.
    pub info: RegionInfo,
    /// Its file, if the server gives one.
    pub fd: Option<OwnedFd>,
}

/// One transfer: the part of the data, and where in the region it is.
type Piece = (usize, usize, RegionAccess);

/// Cuts an access into transfers of at most `limit` bytes.
fn pieces(region: u32, offset: u64, length: usize, limit: u32) -> impl Iterator<Item = Piece> {
    let step = usize::try_from(limit).unwrap_or(usize::MAX).max(1);
    (0..length).step_by(step).map(move |start| {
        let size = step.min(length - start);
        // The step is no more than 32 bits.
        let count = u32::try_from(size).unwrap_or(u32::MAX);
        let access = RegionAccess { offset: offset.wrapping_add(start as u64), region, count };
        (start, start + size, access)
    })
}

impl Client {
    /// What a region is like. A region that the device does not have has size 0.
    ///
    /// # Errors
    ///
    /// [`ClientError`], also for an answer about another region, one that never gets whole, and
    /// more than one fd.
    pub fn region_info(&self, index: u32) -> Result<Region, ClientError> {
        const COMMAND: Command = Command::GetRegionInfo;
        let what = COMMAND.name();
        let mut argsz = u32::try_from(RegionInfo::SIZE).unwrap_or(u32::MAX);
        // All clients ask twice where there are capabilities: first for their size.
        for last in [false, true] {
            let query = Query { argsz, index };
            let ask = |body: &mut Vec<u8>| query.encode(RegionInfo::SIZE, body);
            let reply =
                self.call(COMMAND, &[], ask, |body, mut fds| match RegionInfo::decode(body)? {
                    RegionReply::Partial { argsz }
                        if last || argsz > self.link.agreed.max_argsz =>
                    {
                        let value = u64::from(argsz);
                        Err(WireError::Field { what, field: "argsz", value })
                    }
                    RegionReply::Partial { argsz } => Ok(Err(argsz)),
                    RegionReply::Whole(info) if info.index != index => {
                        let value = u64::from(info.index);
                        Err(WireError::Field { what, field: "index", value })
                    }
                    RegionReply::Whole(_) if fds.len() > 1 => {
                        Err(WireError::Fds { what, fds: fds.len(), expected: 1 })
                    }
                    RegionReply::Whole(info) => Ok(Ok(Region { info, fd: fds.pop() })),
                })?;
            match reply {
                Ok(region) => return Ok(region),
                Err(needed) => argsz = needed,
            }
        }
        // The last answer is whole or an error.
        let source = WireError::Field { what, field: "argsz", value: argsz.into() };
        Err(ClientError::Reply { command: COMMAND, source })
    }

    /// Which fds stand for writes into a region, and these.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; many servers do not have this.
    pub fn region_io_fds(&self, index: u32) -> Result<(IoFds, Vec<OwnedFd>), ClientError> {
        const COMMAND: Command = Command::GetRegionIoFds;
        let what = COMMAND.name();
        let mut argsz = u32::try_from(IoFdsQuery::SIZE).unwrap_or(u32::MAX);
        for last in [false, true] {
            let query = IoFdsQuery { argsz, index };
            let ask = |body: &mut Vec<u8>| query.encode(body);
            let reply =
                self.call(COMMAND, &[], ask, |body, fds| match IoFds::decode(body, fds.len())? {
                    IoFdsReply::Partial { argsz } if last || argsz > self.link.agreed.max_argsz => {
                        let value = u64::from(argsz);
                        Err(WireError::Field { what, field: "argsz", value })
                    }
                    IoFdsReply::Partial { argsz } => Ok(Err(argsz)),
                    IoFdsReply::Whole(io_fds) if io_fds.index != index => {
                        let value = u64::from(io_fds.index);
                        Err(WireError::Field { what, field: "index", value })
                    }
                    IoFdsReply::Whole(io_fds) => Ok(Ok((io_fds, fds))),
                })?;
            match reply {
                Ok(whole) => return Ok(whole),
                Err(needed) => argsz = needed,
            }
        }
        let source = WireError::Field { what, field: "argsz", value: argsz.into() };
        Err(ClientError::Reply { command: COMMAND, source })
    }

    /// Reads from a region, all of `data`.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; with more than one transfer, some of `data` may have been filled.
    #[inline]
    pub fn region_read(
        &self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ClientError> {
        for (start, end, access) in pieces(region, offset, data.len(), self.max_data_xfer_size()) {
            let ask = |body: &mut Vec<u8>| access.encode(body);
            let data = data.get_mut(start..end).unwrap_or_default();
            self.call(Command::RegionRead, &[], ask, |body, _| {
                let (answered, read) = RegionAccess::decode_with_data(body, access.count)?;
                check_same(Command::RegionRead, &access, &answered)?;
                data.copy_from_slice(read);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Writes into a region, all of `data`, and waits until the device has taken it.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; with more than one transfer, some may have been written.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        const COMMAND: Command = Command::RegionWrite;
        for (start, end, access) in pieces(region, offset, data.len(), self.max_data_xfer_size()) {
            let ask = |body: &mut Vec<u8>| access.encode(body);
            let data = data.get(start..end).unwrap_or_default();
            self.call_with_data(COMMAND, data, &[], ask, |body, _| {
                let answered = RegionAccess::decode_plain(body, access.count)?;
                check_same(COMMAND, &access, &answered)
            })?;
        }
        Ok(())
    }

    /// Writes into a region without waiting for an answer: a posted write. That the device has
    /// refused it is not told. Commands that follow come after it.
    ///
    /// # Errors
    ///
    /// [`ClientError`] if it could not be sent.
    pub fn region_write_posted(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ClientError> {
        for (start, end, access) in pieces(region, offset, data.len(), self.max_data_xfer_size()) {
            let data = data.get(start..end).unwrap_or_default();
            let ask = |body: &mut Vec<u8>| access.encode(body);
            self.exchange().post(Command::RegionWrite, data, &mut self.deadline(), ask)?;
        }
        Ok(())
    }

    /// Makes several small writes, in their order, in one message, and waits for it.
    ///
    /// # Errors
    ///
    /// [`ClientError`], also if the server cannot do that
    /// ([`Capabilities::write_multiple`](crate::wire::Capabilities::write_multiple)), or has not
    /// done all.
    pub fn region_write_multi(&self, writes: &[SmallWrite]) -> Result<(), ClientError> {
        const COMMAND: Command = Command::RegionWriteMulti;
        self.check_write_multi(writes)?;
        let ask = |body: &mut Vec<u8>| WriteMulti::encode(writes, body);
        self.call(COMMAND, &[], ask, |body, _| {
            let (done, all) = (WriteMulti::decode_reply(body)?, writes.len() as u64);
            let few = WireError::Field { what: COMMAND.name(), field: "wr_cnt", value: done };
            if done == all { Ok(()) } else { Err(few) }
        })
    }

    /// As [`region_write_multi`](Self::region_write_multi), but does not wait.
    ///
    /// # Errors
    ///
    /// [`ClientError`] if it could not be sent.
    pub fn region_write_multi_posted(&self, writes: &[SmallWrite]) -> Result<(), ClientError> {
        self.check_write_multi(writes)?;
        let ask = |body: &mut Vec<u8>| WriteMulti::encode(writes, body);
        self.exchange().post(Command::RegionWriteMulti, &[], &mut self.deadline(), ask)
    }

    fn check_write_multi(&self, writes: &[SmallWrite]) -> Result<(), ClientError> {
        const COMMAND: Command = Command::RegionWriteMulti;
        let wrong = |source| Err(ClientError::Request { command: COMMAND, source });
        if !self.link.agreed.write_multiple {
            return wrong(WireError::UnknownCommand { number: COMMAND.number() });
        }
        let (count, limit) = (writes.len() as u64, WriteMulti::MOST as u64);
        if count > limit {
            return wrong(WireError::TooLong { what: COMMAND.name(), count, limit });
        }
        Ok(())
    }
}

/// Refuses an answer about another access.
fn check_same(
    command: Command,
    asked: &RegionAccess,
    answered: &RegionAccess,
) -> Result<(), WireError> {
    let what = command.name();
    let wrong = |field, value| Err(WireError::Field { what, field, value });
    if answered.offset != asked.offset {
        return wrong("offset", answered.offset);
    }
    if answered.region != asked.region {
        return wrong("region", answered.region.into());
    }
    if answered.count != asked.count {
        return wrong("count", answered.count.into());
    }
    Ok(())
}
