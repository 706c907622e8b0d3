//! `DEVICE_FEATURE`: migration, and which pages the device writes.

use super::{Next, Refused, Reply, Session, Work, later, put_words};
use crate::device::Device;
use crate::memory::{MAX_LOG_PAGE, MIN_LOG_PAGE};
use rustix::io::Errno;
use standstill_vfio_user::wire::feature::{
    FEATURE_DMA_LOGGING_REPORT, FEATURE_DMA_LOGGING_START, FEATURE_DMA_LOGGING_STOP,
    FEATURE_MIG_DATA_SIZE, FEATURE_MIG_DEVICE_STATE, FEATURE_MIGRATION, encode_data_size,
    encode_flags, encode_state,
};
use standstill_vfio_user::wire::{Feature, Header, LoggingStart, MigData};

/// Which feature it is about.
fn number(feature: &Feature) -> u16 {
    match feature {
        Feature::Probe { feature, .. } => *feature,
        Feature::SetState(_) | Feature::GetState => FEATURE_MIG_DEVICE_STATE,
        Feature::StartLogging(_) => FEATURE_DMA_LOGGING_START,
        Feature::StopLogging => FEATURE_DMA_LOGGING_STOP,
        Feature::Report(_) => FEATURE_DMA_LOGGING_REPORT,
        Feature::GetMigration => FEATURE_MIGRATION,
        Feature::GetDataSize => FEATURE_MIG_DATA_SIZE,
    }
}

impl<'a, D: Device> Session<'a, D> {
    pub(super) fn feature(
        &self,
        header: &Header,
        feature: Feature,
        body: &[u8],
        reply: &mut Reply<'a>,
    ) -> Result<Next, Refused> {
        match number(&feature) {
            FEATURE_DMA_LOGGING_START | FEATURE_DMA_LOGGING_STOP | FEATURE_DMA_LOGGING_REPORT => {
                self.endpoint.check_logging()?;
            }
            _ => self.endpoint.check_migration()?,
        }
        match feature {
            // What can be probed is there.
            Feature::Probe { .. } => reply.set(header, |reply| reply.extend_from_slice(body)),
            Feature::SetState(state) => return Ok(later(header, Work::SetState(state), body)),
            Feature::StartLogging(LoggingStart { page_size, ranges }) => {
                // It is a wish, and the reply says what came of it.
                let page_size = page_size.clamp(MIN_LOG_PAGE, MAX_LOG_PAGE);
                let start = LoggingStart { page_size, ranges };
                return Ok(later(header, Work::StartLogging(start), &[]));
            }
            Feature::StopLogging => {
                self.endpoint.parts().memory.stop_log();
                reply.set(header, |reply| reply.extend_from_slice(body));
            }
            Feature::Report(report) => {
                let words = self.endpoint.report(&report)?;
                reply.set(header, |body| {
                    report.encode(body);
                    put_words(&words, body);
                });
            }
            Feature::GetMigration => {
                let flags = self.endpoint.migration_flags();
                reply.set(header, |body| encode_flags(flags, body));
            }
            Feature::GetState => {
                let state = self.endpoint.state()?;
                reply.set(header, |body| encode_state(state, body));
            }
            Feature::GetDataSize => {
                let size = self.endpoint.migration_size().stop_copy;
                reply.set(header, |body| encode_data_size(size, body));
            }
        }
        Ok(Next::Reply)
    }

    /// The reply is as long as was asked for, whatever there is: libvfio-user's client takes no
    /// other. Its size field says how much of it counts.
    pub(super) fn migration_read(
        &self,
        header: &Header,
        asked: MigData,
        reply: &mut Reply<'a>,
    ) -> Result<(), Errno> {
        self.endpoint.check_migration()?;
        // At most what was agreed on.
        let count = usize::try_from(asked.size).map_err(|_| Errno::INVAL)?;
        let mut read = Ok(0);
        reply.set(header, |body| {
            let at = body.len();
            asked.encode(body);
            let data_at = body.len();
            body.resize(data_at + count, 0);
            read = self.endpoint.migration_read(body.get_mut(data_at..).unwrap_or_default());
            if let Ok(length) = read
                && length < count
            {
                let data = body.get(data_at..data_at + length).unwrap_or_default().to_vec();
                body.truncate(at);
                MigData::encode_reply(&data, asked.size, true, body);
            }
        });
        read.map(|_| ())
    }
}
