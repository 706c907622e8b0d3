//! `VERSION`: what both ends can do.
//!
//! The client says what it can do, the server answers with what holds. Two of the numbers say what
//! their sender takes (`max_msg_fds`, and a client's `max_data_xfer_size` for message DMA); the
//! others hold for the connection.
//!
//! # QEMU's limits
//!
//! QEMU (11.1) takes no answer that is longer than its own message (214 bytes) and none with more
//! than 16 fds or pages below 4096 bytes. [`Version::answer`] keeps to that by itself: it answers
//! only the keys that it was sent, and none with a larger number.

use super::bytes::{Put, Reader};
use super::error::WireError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

const WHAT: &str = "VERSION";

/// The major version that is spoken here.
pub const MAJOR: u16 = 0;
/// The newest minor version that is spoken here.
pub const MINOR: u16 = 2;
/// The longest body of a `VERSION`, in bytes. QEMU's has 198.
pub const MAX_VERSION_SIZE: usize = 4096;

/// `max_msg_fds` of who does not say it.
pub const DEFAULT_MAX_MSG_FDS: u32 = 1;
/// `max_data_xfer_size` of who does not say it.
pub const DEFAULT_MAX_DATA_XFER_SIZE: u32 = 1 << 20;
/// `max_dma_maps` of who does not say it.
pub const DEFAULT_MAX_DMA_MAPS: u32 = 65535;
/// `pgsizes` of who does not say it.
pub const DEFAULT_PGSIZES: u64 = 4096;
/// The most fds that Linux takes in one message.
pub const MAX_MSG_FDS: u32 = 253;
/// The most fds that a server may ask for if QEMU is to be its client.
pub const QEMU_MAX_MSG_FDS: u32 = 16;
/// The largest `max_data_xfer_size` that is agreed here, and the largest that QEMU takes.
pub const MAX_DATA_XFER_SIZE: u32 = 64 << 20;

/// The body of a `VERSION`, request or reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Another one is another protocol.
    pub major: u16,
    /// A newer one adds to an older one.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

/// What the sender of a `VERSION` can do. What it does not say has a default: see the methods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// How many fds the sender takes in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// The most bytes of one transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// How many ranges of addresses can be mapped for DMA at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// All page sizes that mappings may have, each a bit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// Whether `REGION_WRITE_MULTI` can be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// Whether a second socket for the server's commands is possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// What dirty page tracking can do. No part of the specification any more, but of QEMU and of
    /// libvfio-user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationCapability>,
}

/// A second socket, for the commands of the server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TwinSocket {
    /// Whether it is possible; in a reply, whether it came.
    pub supported: bool,
    /// Which of the reply's fds it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u64>,
}

/// What dirty page tracking can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationCapability {
    /// The smallest page that can be told apart, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsize: Option<u64>,
    /// The longest bitmap, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bitmap_size: Option<u64>,
}

/// All of the JSON.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Data<C> {
    capabilities: C,
}

impl Capabilities {
    /// How many fds the sender takes in one message, at most [`MAX_MSG_FDS`].
    #[must_use]
    pub fn max_msg_fds(&self) -> u32 {
        at_most(self.max_msg_fds, DEFAULT_MAX_MSG_FDS, MAX_MSG_FDS)
    }

    /// The most bytes of one transfer, at most [`MAX_DATA_XFER_SIZE`].
    #[must_use]
    pub fn max_data_xfer_size(&self) -> u32 {
        at_most(self.max_data_xfer_size, DEFAULT_MAX_DATA_XFER_SIZE, MAX_DATA_XFER_SIZE)
    }

    /// How many ranges can be mapped for DMA at a time.
    #[must_use]
    pub fn max_dma_maps(&self) -> u32 {
        at_most(self.max_dma_maps, DEFAULT_MAX_DMA_MAPS, u32::MAX)
    }

    /// The page sizes of mappings, each a bit.
    #[must_use]
    pub fn pgsizes(&self) -> u64 {
        self.pgsizes.unwrap_or(DEFAULT_PGSIZES)
    }

    /// Whether `REGION_WRITE_MULTI` can be used.
    #[must_use]
    pub fn write_multiple(&self) -> bool {
        self.write_multiple.unwrap_or(false)
    }

    /// What of these, the server's, holds towards a client that sent `client`. Only what the client
    /// said is answered; what it did not say has its default, unless these are below that. A second
    /// socket is not offered.
    #[must_use]
    pub fn agree(&self, client: &Self) -> Self {
        let migration = client.migration.as_ref().zip(self.migration.as_ref());
        Self {
            max_msg_fds: client.max_msg_fds.map(|theirs| {
                // It says what the server takes, but must be no longer to write than theirs.
                theirs.min(u64::from(self.max_msg_fds()))
            }),
            max_data_xfer_size: lower(
                client.max_data_xfer_size,
                self.max_data_xfer_size(),
                DEFAULT_MAX_DATA_XFER_SIZE,
            ),
            max_dma_maps: lower(client.max_dma_maps, self.max_dma_maps(), DEFAULT_MAX_DMA_MAPS),
            pgsizes: client.pgsizes.map(|theirs| theirs & self.pgsizes()),
            write_multiple: client.write_multiple.filter(|theirs| *theirs && self.write_multiple()),
            twin_socket: None,
            migration: migration.map(|(theirs, ours)| MigrationCapability {
                pgsize: theirs.pgsize.zip(ours.pgsize).map(least),
                max_bitmap_size: theirs.max_bitmap_size.zip(ours.max_bitmap_size).map(least),
            }),
        }
    }
}

/// Refuses what has a place in the JSON but is no object: for serde a list would do, too.
fn check_objects(json: &Value) -> Result<(), WireError> {
    for place in ["", "/capabilities", "/capabilities/migration", "/capabilities/twin_socket"] {
        if json.pointer(place).is_some_and(|value| !value.is_object()) {
            let reason = format!("its JSON: `{place}` is no object");
            return Err(WireError::Version { reason });
        }
    }
    Ok(())
}

fn least((a, b): (u64, u64)) -> u64 {
    a.min(b)
}

fn at_most(said: Option<u64>, default: u32, limit: u32) -> u32 {
    said.map_or(default, |said| u32::try_from(said).unwrap_or(u32::MAX)).min(limit)
}

/// The answer to one number: the lower one if it was said, ours if it is below the default.
fn lower(theirs: Option<u64>, ours: u32, default: u32) -> Option<u64> {
    match theirs {
        Some(theirs) => Some(theirs.min(u64::from(ours))),
        None => (ours < default).then_some(u64::from(ours)),
    }
}

impl Version {
    /// The version spoken here, with these capabilities.
    #[must_use]
    pub fn new(capabilities: Capabilities) -> Self {
        Self { major: MAJOR, minor: MINOR, capabilities }
    }

    /// The answer of a server with these `capabilities` to a client that sent `self`.
    ///
    /// # Errors
    ///
    /// [`WireError::Version`] for another major version, or if both have no page size in common.
    pub fn answer(&self, capabilities: &Capabilities) -> Result<Self, WireError> {
        if self.major != MAJOR {
            let reason = format!("major version {}, not {MAJOR}", self.major);
            return Err(WireError::Version { reason });
        }
        if self.capabilities.pgsizes() & capabilities.pgsizes() == 0 {
            let (theirs, ours) = (self.capabilities.pgsizes(), capabilities.pgsizes());
            let reason = format!("page sizes {theirs:#x} of the client, {ours:#x} of the server");
            return Err(WireError::Version { reason });
        }
        let capabilities = capabilities.agree(&self.capabilities);
        Ok(Self { major: MAJOR, minor: self.minor.min(MINOR), capabilities })
    }

    /// Reads a body. No JSON at all and an empty object are possible; unknown keys are ignored.
    ///
    /// # Errors
    ///
    /// [`WireError`] for a body that is too short or too long, JSON without terminating NUL or with
    /// values of a wrong type, and numbers that cannot be (`max_msg_fds` above 1024, pages that are
    /// no power of two).
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        if body.len() > MAX_VERSION_SIZE {
            let (count, limit) = (body.len() as u64, MAX_VERSION_SIZE as u64);
            return Err(WireError::TooLong { what: WHAT, count, limit });
        }
        let mut reader = Reader::new(WHAT, body);
        let (major, minor) = (reader.u16()?, reader.u16()?);
        let capabilities = match reader.rest() {
            [] => Capabilities::default(),
            [json @ .., 0] => {
                let end = json.iter().position(|byte| *byte == 0).unwrap_or(json.len());
                let wrong = |error| WireError::Version { reason: format!("its JSON: {error}") };
                let json: Value = serde_json::from_slice(&json[..end]).map_err(wrong)?;
                check_objects(&json)?;
                let data: Data<Capabilities> = serde_json::from_value(json).map_err(wrong)?;
                data.capabilities
            }
            _ => return Err(WireError::Version { reason: "JSON without a NUL at its end".into() }),
        };
        if let Some(value) = capabilities.max_msg_fds.filter(|fds| *fds > 1024) {
            return Err(WireError::Field { what: WHAT, field: "max_msg_fds", value });
        }
        let pgsize = capabilities.migration.as_ref().and_then(|migration| migration.pgsize);
        if let Some(value) = pgsize.filter(|size| !size.is_power_of_two()) {
            return Err(WireError::Field { what: WHAT, field: "migration.pgsize", value });
        }
        Ok(Self { major, minor, capabilities })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u16(self.major);
        out.put_u16(self.minor);
        // Numbers, booleans and fixed keys: writing them into memory cannot fail.
        let data = Data { capabilities: &self.capabilities };
        if serde_json::to_writer(&mut *out, &data).is_ok() {
            out.push(0);
        }
    }
}
