//! Migration: states, the stream of a device's state, dirty pages.

use super::exchange::Ticket;
use super::{Client, ClientError, SetStateError, StateStreamError};
use crate::wire::feature::{
    FEATURE_SIZE, decode_data_size_reply, decode_flags_reply, decode_state_reply,
};
use crate::wire::{Command, Feature, LoggingReport, LoggingStart, MigData, PageBitmap, WireError};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::io::{self, Read, Write};

const FEATURE: Command = Command::DeviceFeature;

fn request(source: WireError) -> ClientError {
    ClientError::Request { command: FEATURE, source }
}

impl Client {
    fn feature<R>(
        &self,
        feature: &Feature,
        parse: impl FnOnce(&[u8]) -> Result<R, WireError>,
    ) -> Result<R, ClientError> {
        self.call(FEATURE, &[], |body| feature.encode(body), |body, _| parse(body))
    }

    /// Whether the server has these operations of a feature (see [`Feature::Probe`]).
    ///
    /// # Errors
    ///
    /// [`ClientError`]; a refusal is no error here.
    pub fn probe(&self, feature: u16, operations: u32) -> Result<bool, ClientError> {
        match self.feature(&Feature::Probe { feature, operations }, |_| Ok(())) {
            Ok(()) => Ok(true),
            Err(ClientError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Which migration states the device has.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; EOPNOTSUPP or EINVAL from a server that cannot migrate.
    pub fn migration_flags(&self) -> Result<MigrationFlags, ClientError> {
        self.feature(&Feature::GetMigration, decode_flags_reply)
    }

    /// The device's migration state.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn migration_state(&self) -> Result<MigrationState, ClientError> {
        self.feature(&Feature::GetState, decode_state_reply)
    }

    /// Takes the device to a migration state, over as many others as are on the way.
    ///
    /// # Errors
    ///
    /// [`SetStateError`]: the device may then be in its old state, in any on the way, or in ERROR;
    /// so it is asked, and the error says it.
    pub fn set_migration_state(&self, wanted: MigrationState) -> Result<(), SetStateError> {
        self.feature(&Feature::SetState(wanted), |_| Ok(())).map_err(|source| {
            let now = self.migration_state();
            SetStateError { wanted, source, now }
        })
    }

    /// How many bytes the device's state will have, from here to the end. An estimate.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; EOPNOTSUPP or EINVAL from a server that does not have this.
    pub fn state_size(&self) -> Result<u64, ClientError> {
        self.feature(&Feature::GetDataSize, decode_data_size_reply)
    }

    /// Reads the device's state until there is none left now, and writes it to `to`; returns how
    /// many bytes that were, at most `limit`. In STOP_COPY that is the end; while pre-copying there
    /// may be more later.
    ///
    /// # Errors
    ///
    /// [`StateStreamError`]. The stream is of no more use then.
    pub fn read_state(&self, to: &mut impl Write, limit: u64) -> Result<u64, StateStreamError> {
        let size = self.max_data_xfer_size();
        let mut done = 0_u64;
        let mut asked = self.ask_state(size).map_err(failed(done))?;
        let mut chunk = Vec::new();
        loop {
            chunk.clear();
            let answer = asked.finish(&mut self.deadline(), |body, _| {
                chunk.extend_from_slice(MigData::decode_data(body, size)?);
                Ok(())
            });
            answer.map_err(failed(done))?;
            done = done.saturating_add(chunk.len() as u64);
            if done > limit {
                return Err(StateStreamError::TooLong { limit });
            }
            if chunk.len() < usize::try_from(size).unwrap_or(usize::MAX) {
                to.write_all(&chunk).map_err(|source| StateStreamError::Io { done, source })?;
                return Ok(done);
            }
            // The server gets the next one ready meanwhile.
            asked = self.ask_state(size).map_err(failed(done))?;
            to.write_all(&chunk).map_err(|source| StateStreamError::Io { done, source })?;
        }
    }

    fn ask_state(&self, size: u32) -> Result<Ticket<'_>, ClientError> {
        let ask = |body: &mut Vec<u8>| MigData { size }.encode(body);
        self.exchange().start(Command::MigDataRead, &[], &[], &mut self.deadline(), ask)
    }

    /// Writes a device's state, all that `from` has; returns how many bytes that were. The device
    /// has to be in RESUMING, and judges the whole when it is taken from there to STOP.
    ///
    /// # Errors
    ///
    /// [`StateStreamError`]. The stream is of no more use then.
    pub fn write_state(&self, from: &mut impl Read) -> Result<u64, StateStreamError> {
        let size = usize::try_from(self.max_data_xfer_size()).unwrap_or(usize::MAX);
        let mut chunk = vec![0; size];
        let mut done = 0_u64;
        let mut sent: Option<Ticket<'_>> = None;
        loop {
            // The server takes the last one meanwhile.
            let read = fill(from, &mut chunk);
            if let Some(sent) = sent.take() {
                sent.finish(&mut self.deadline(), |_, _| Ok(())).map_err(failed(done))?;
            }
            let count = read.map_err(|source| StateStreamError::Io { done, source })?;
            let Some(data @ [_, ..]) = chunk.get(..count) else {
                return Ok(done);
            };
            let header = MigData { size: u32::try_from(count).unwrap_or(u32::MAX) };
            let ask = |body: &mut Vec<u8>| header.encode(body);
            let exchange = self.exchange();
            let ticket =
                exchange.start(Command::MigDataWrite, data, &[], &mut self.deadline(), ask);
            sent = Some(ticket.map_err(failed(done))?);
            done = done.saturating_add(count as u64);
        }
    }

    /// Begins to track which pages the device writes to, in these ranges (first address and size in
    /// bytes), or everywhere if there are none; returns the page size that the server has chosen.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn start_dirty_log(
        &self,
        page_size: u64,
        ranges: &[(u64, u64)],
    ) -> Result<u64, ClientError> {
        let start = LoggingStart { page_size, ranges: ranges.to_vec() };
        self.feature(&Feature::StartLogging(start), LoggingStart::decode_reply)
    }

    /// Tracks dirty pages no more.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn stop_dirty_log(&self) -> Result<(), ClientError> {
        self.feature(&Feature::StopLogging, |_| Ok(()))
    }

    /// Which pages the device has written to since they were asked for last. A range whose bitmap is
    /// longer than one transfer is asked for in several. (libvfio-user's servers know only ranges
    /// that are exactly one mapping.)
    ///
    /// # Errors
    ///
    /// [`ClientError`]. After that all pages have to be taken for dirty.
    pub fn dirty_pages(
        &self,
        iova: u64,
        size: u64,
        page_size: u64,
    ) -> Result<PageBitmap, ClientError> {
        let mut all = PageBitmap::empty(iova, size, page_size).map_err(request)?;
        let per_transfer = self.bitmap_bytes().saturating_mul(8).saturating_mul(page_size);
        let mut at = 0;
        while at < size {
            let length = per_transfer.min(size - at);
            // The last address of the whole exists, so this one does.
            let report = LoggingReport { iova: iova.wrapping_add(at), length, page_size };
            self.feature(&Feature::Report(report), |body| {
                all.append(length, report.decode_reply(body)?);
                Ok(())
            })?;
            at += length;
        }
        Ok(all)
    }

    /// The longest bitmap of one report, in bytes: whole words.
    fn bitmap_bytes(&self) -> u64 {
        let fixed = (FEATURE_SIZE + LoggingReport::SIZE) as u64;
        u64::from(self.max_data_xfer_size()).saturating_sub(fixed).max(8) & !7
    }
}

fn failed(done: u64) -> impl FnOnce(ClientError) -> StateStreamError {
    move |source| StateStreamError::Client { done, source }
}

/// Reads until `chunk` is full or the source has ended.
fn fill(from: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while let Some(rest @ [_, ..]) = chunk.get_mut(count..) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(read) => count += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}
