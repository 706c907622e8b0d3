//! `DEVICE_FEATURE`: migration and dirty page tracking.

use super::bitmap::{bitmap_size, check_pages};
use super::bytes::{Put, Reader, check_argsz, check_range, size_u32};
use super::error::WireError;
use standstill_protocol::migration::{MigrationFlags, MigrationState};

const WHAT: &str = "DEVICE_FEATURE";

/// Ask for the feature's value.
pub const FEATURE_GET: u32 = 1 << 16;
/// Set the feature's value.
pub const FEATURE_SET: u32 = 1 << 17;
/// Ask only whether the operations named beside it can be used.
pub const FEATURE_PROBE: u32 = 1 << 18;
const FEATURE_NUMBER: u32 = 0xffff;

/// Feature: which migration states the device has.
pub const FEATURE_MIGRATION: u16 = 1;
/// Feature: the migration state.
pub const FEATURE_MIG_DEVICE_STATE: u16 = 2;
/// Feature: begin to track dirty pages.
pub const FEATURE_DMA_LOGGING_START: u16 = 6;
/// Feature: track no more.
pub const FEATURE_DMA_LOGGING_STOP: u16 = 7;
/// Feature: which pages are dirty.
pub const FEATURE_DMA_LOGGING_REPORT: u16 = 8;
/// Feature: how long the device's state will be.
pub const FEATURE_MIG_DATA_SIZE: u16 = 9;

/// The operations ([`FEATURE_GET`], [`FEATURE_SET`]) of a feature; 0 for one that is not known.
#[must_use]
pub fn operations(feature: u16) -> u32 {
    match feature {
        FEATURE_MIGRATION | FEATURE_DMA_LOGGING_REPORT | FEATURE_MIG_DATA_SIZE => FEATURE_GET,
        FEATURE_MIG_DEVICE_STATE => FEATURE_GET | FEATURE_SET,
        FEATURE_DMA_LOGGING_START | FEATURE_DMA_LOGGING_STOP => FEATURE_SET,
        _ => 0,
    }
}

/// What a `DEVICE_FEATURE` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Whether a feature has these operations. All of them have to be possible; the reply is the
    /// request.
    Probe {
        /// Number of the feature.
        feature: u16,
        /// [`FEATURE_GET`] and [`FEATURE_SET`], or neither.
        operations: u32,
    },
    /// Which migration states the device has; the reply is [`encode_flags`].
    GetMigration,
    /// Its state; the reply is [`encode_state`].
    GetState,
    /// Take it to a state; the reply is the request.
    SetState(MigrationState),
    /// Begin to track dirty pages; the reply is the request, with the page size that was chosen
    /// ([`LoggingStart::encode`]).
    StartLogging(LoggingStart),
    /// Track no more; the reply is the request.
    StopLogging,
    /// Which pages are dirty, and begin anew with these; the reply is [`LoggingReport::encode`] and
    /// a bitmap.
    Report(LoggingReport),
    /// How long the device's state will be; the reply is [`encode_data_size`].
    GetDataSize,
}

/// The request to track dirty pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggingStart {
    /// Size of a page in bytes, a power of two: a wish. The reply says what was chosen.
    pub page_size: u64,
    /// Which ranges, as first address and size in bytes; none for all.
    pub ranges: Vec<(u64, u64)>,
}

/// The request for dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggingReport {
    /// First address.
    pub iova: u64,
    /// How many bytes.
    pub length: u64,
    /// Size of a page in bytes, a power of two.
    pub page_size: u64,
}

/// Appends how a request or reply begins: `argsz`, and the feature with its operation.
fn put_header(out: &mut Vec<u8>, argsz: usize, feature: u16, operation: u32) {
    out.put_u32(size_u32(argsz));
    out.put_u32(u32::from(feature) | operation);
}

/// Size of what all requests and replies begin with, in bytes.
pub const FEATURE_SIZE: usize = 8;
/// Size of the migration state in a request or reply, in bytes.
const STATE_SIZE: usize = 8;
/// What the kernel's interface has an fd for, and vfio-user nothing.
const NO_FD: u32 = u32::MAX;

impl Feature {
    /// Reads the body of a request. `limit` is the longest reply, in bytes.
    ///
    /// # Errors
    ///
    /// [`WireError`] for operations that do not exist, do not go together or are not those of the
    /// feature, features that are not known, an `argsz` that is less than the request or its reply,
    /// a state that is none or is ERROR, and ranges and page sizes that cannot be.
    pub fn decode(body: &[u8], limit: u32) -> Result<Self, WireError> {
        let mut reader = Reader::new(WHAT, body);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        check_argsz(WHAT, argsz, FEATURE_SIZE as u64)?;
        if flags & !(FEATURE_NUMBER | FEATURE_GET | FEATURE_SET | FEATURE_PROBE) != 0 {
            return Err(WireError::Flags { what: WHAT, flags });
        }
        // It is masked to 16 bits.
        let feature = u16::try_from(flags & FEATURE_NUMBER).unwrap_or(0);
        let operation = flags & (FEATURE_GET | FEATURE_SET);
        let unknown = WireError::UnknownFeature { feature, flags };
        let possible = operations(feature);
        if possible == 0 || operation & !possible != 0 {
            return Err(unknown);
        }
        if flags & FEATURE_PROBE != 0 {
            return Ok(Self::Probe { feature, operations: operation });
        }
        let fits = |size: u64| check_argsz(WHAT, argsz, size.saturating_add(FEATURE_SIZE as u64));
        match (feature, operation) {
            (FEATURE_MIGRATION, FEATURE_GET) => fits(8).map(|()| Self::GetMigration),
            (FEATURE_MIG_DEVICE_STATE, FEATURE_GET) => {
                fits(STATE_SIZE as u64).map(|()| Self::GetState)
            }
            (FEATURE_MIG_DEVICE_STATE, FEATURE_SET) => {
                fits(STATE_SIZE as u64)?;
                decode_target(&mut reader).map(Self::SetState)
            }
            (FEATURE_DMA_LOGGING_START, FEATURE_SET) => {
                let start = LoggingStart::decode(&mut reader)?;
                fits(start.size() as u64)?;
                Ok(Self::StartLogging(start))
            }
            // A body like that of a START is tolerated.
            (FEATURE_DMA_LOGGING_STOP, FEATURE_SET) => Ok(Self::StopLogging),
            (FEATURE_DMA_LOGGING_REPORT, FEATURE_GET) => {
                let report = LoggingReport::decode(&mut reader)?;
                let size = report.bitmap_size().saturating_add(LoggingReport::SIZE as u64);
                fits(size)?;
                if size.saturating_add(FEATURE_SIZE as u64) > u64::from(limit) {
                    let (count, limit) = (report.bitmap_size(), u64::from(limit));
                    return Err(WireError::TooLong { what: WHAT, count, limit });
                }
                Ok(Self::Report(report))
            }
            (FEATURE_MIG_DATA_SIZE, FEATURE_GET) => fits(8).map(|()| Self::GetDataSize),
            _ => Err(unknown),
        }
    }

    /// Appends the body of a request.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Probe { feature, operations } => {
                put_header(out, FEATURE_SIZE, *feature, operations | FEATURE_PROBE);
            }
            Self::GetMigration => put_header(out, FEATURE_SIZE + 8, FEATURE_MIGRATION, FEATURE_GET),
            Self::GetState => {
                let argsz = FEATURE_SIZE + STATE_SIZE;
                put_header(out, argsz, FEATURE_MIG_DEVICE_STATE, FEATURE_GET);
            }
            Self::SetState(state) => put_state(out, *state, FEATURE_SET),
            Self::StartLogging(start) => start.encode(out),
            Self::StopLogging => {
                put_header(out, FEATURE_SIZE, FEATURE_DMA_LOGGING_STOP, FEATURE_SET);
            }
            Self::Report(report) => report.encode(out),
            Self::GetDataSize => {
                put_header(out, FEATURE_SIZE + 8, FEATURE_MIG_DATA_SIZE, FEATURE_GET);
            }
        }
    }
}

fn decode_state(reader: &mut Reader<'_>) -> Result<MigrationState, WireError> {
    let (value, _fd) = (reader.u32()?, reader.u32()?);
    let none = WireError::Field { what: WHAT, field: "state", value: value.into() };
    MigrationState::from_value(value).ok_or(none)
}

/// A state that a client can ask for.
fn decode_target(reader: &mut Reader<'_>) -> Result<MigrationState, WireError> {
    match decode_state(reader)? {
        MigrationState::Error => Err(WireError::Field { what: WHAT, field: "state", value: 0 }),
        state => Ok(state),
    }
}

fn put_state(out: &mut Vec<u8>, state: MigrationState, operation: u32) {
    put_header(out, FEATURE_SIZE + STATE_SIZE, FEATURE_MIG_DEVICE_STATE, operation);
    out.put_u32(state.value());
    out.put_u32(NO_FD);
}

/// What follows the fixed part of a reply.
fn reply_data(body: &[u8]) -> Result<Reader<'_>, WireError> {
    let mut reader = Reader::new(WHAT, body);
    reader.bytes(FEATURE_SIZE)?;
    Ok(reader)
}

/// Appends the body of the reply to [`Feature::GetState`].
pub fn encode_state(state: MigrationState, out: &mut Vec<u8>) {
    put_state(out, state, FEATURE_GET);
}

/// Reads the body of the reply to [`Feature::GetState`].
///
/// # Errors
///
/// [`WireError`] if it is too short or the state is none.
pub fn decode_state_reply(body: &[u8]) -> Result<MigrationState, WireError> {
    decode_state(&mut reply_data(body)?)
}

/// Appends the body of the reply to [`Feature::GetMigration`].
pub fn encode_flags(flags: MigrationFlags, out: &mut Vec<u8>) {
    put_header(out, FEATURE_SIZE + 8, FEATURE_MIGRATION, FEATURE_GET);
    out.put_u64(flags.bits());
}

/// Reads the body of the reply to [`Feature::GetMigration`].
///
/// # Errors
///
/// [`WireError`] if it is too short or a set of flags that cannot be.
pub fn decode_flags_reply(body: &[u8]) -> Result<MigrationFlags, WireError> {
    let value = reply_data(body)?.u64()?;
    // A device whose state cannot be saved does not answer this.
    let flags = MigrationFlags::new(value).ok().filter(|flags| flags.stop_copy());
    flags.ok_or(WireError::Field { what: WHAT, field: "flags", value })
}

/// Appends the body of the reply to [`Feature::GetDataSize`]: so many bytes until the end.
pub fn encode_data_size(size: u64, out: &mut Vec<u8>) {
    put_header(out, FEATURE_SIZE + 8, FEATURE_MIG_DATA_SIZE, FEATURE_GET);
    out.put_u64(size);
}

/// Reads the body of the reply to [`Feature::GetDataSize`].
///
/// # Errors
///
/// [`WireError`] if it is too short.
pub fn decode_data_size_reply(body: &[u8]) -> Result<u64, WireError> {
    reply_data(body)?.u64()
}

impl LoggingStart {
    /// Size of the data without ranges, in bytes.
    const SIZE: usize = 16;

    fn size(&self) -> usize {
        Self::SIZE + 16 * self.ranges.len()
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let (page_size, count, _reserved) = (reader.u64()?, reader.u32()?, reader.u32()?);
        if !page_size.is_power_of_two() {
            return Err(WireError::Field { what: WHAT, field: "page_size", value: page_size });
        }
        // Each takes 16 bytes of the body, so there are no more than came.
        let mut ranges = Vec::new();
        for _ in 0..count {
            let (iova, length) = (reader.u64()?, reader.u64()?);
            check_range(WHAT, iova, length)?;
            ranges.push((iova, length));
        }
        Ok(Self { page_size, ranges })
    }

    /// Appends the body of the request; or of the reply, with the page size that was chosen.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_header(out, FEATURE_SIZE + self.size(), FEATURE_DMA_LOGGING_START, FEATURE_SET);
        out.put_u64(self.page_size);
        out.put_u32(size_u32(self.ranges.len()));
        out.put_u32(0);
        for (iova, length) in &self.ranges {
            out.put_u64(*iova);
            out.put_u64(*length);
        }
    }

    /// Reads the body of a reply: the page size that was chosen.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is too short or the size no power of two.
    pub fn decode_reply(body: &[u8]) -> Result<u64, WireError> {
        let value = reply_data(body)?.u64()?;
        let wrong = WireError::Field { what: WHAT, field: "page_size", value };
        if value.is_power_of_two() { Ok(value) } else { Err(wrong) }
    }
}

impl LoggingReport {
    /// Size of the data without the bitmap, in bytes.
    pub const SIZE: usize = 24;

    /// How many bytes the bitmap has.
    #[must_use]
    pub fn bitmap_size(&self) -> u64 {
        bitmap_size(self.length, self.page_size)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let (iova, length, page_size) = (reader.u64()?, reader.u64()?, reader.u64()?);
        check_pages(WHAT, iova, length, page_size)?;
        Ok(Self { iova, length, page_size })
    }

    /// Appends the body of the request, or of a reply; the bitmap follows there.
    pub fn encode(&self, out: &mut Vec<u8>) {
        // A bitmap that could not be sent is refused by both ends.
        let bitmap = usize::try_from(self.bitmap_size()).unwrap_or(usize::MAX);
        let argsz = (FEATURE_SIZE + Self::SIZE).saturating_add(bitmap);
        put_header(out, argsz, FEATURE_DMA_LOGGING_REPORT, FEATURE_GET);
        out.put_u64(self.iova);
        out.put_u64(self.length);
        out.put_u64(self.page_size);
    }

    /// Reads the body of a reply: the bitmap of this report, as it travels.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it is about other pages, or the bitmap has another length.
    pub fn decode_reply<'a>(&self, body: &'a [u8]) -> Result<&'a [u8], WireError> {
        let mut reader = reply_data(body)?;
        let (iova, length, page_size) = (reader.u64()?, reader.u64()?, reader.u64()?);
        for (field, value, ours) in [
            ("iova", iova, self.iova),
            ("length", length, self.length),
            ("page_size", page_size, self.page_size),
        ] {
            if value != ours {
                return Err(WireError::Field { what: WHAT, field, value });
            }
        }
        let bitmap = reader.rest();
        if u64::try_from(bitmap.len()) != Ok(self.bitmap_size()) {
            let (length, count) = (bitmap.len(), self.bitmap_size());
            return Err(WireError::DataLength { what: WHAT, length, count });
        }
        Ok(bitmap)
    }
}
