//! A device's state as bytes.
//!
//! ```text
//! header    magic "STANDSTL", version u16, length of kind u16, kind
//! section   tag u8, pieces (length u32 of 1 to 65536, bytes), end (length 0)
//! ...
//! trailer   tag 0xff, XXH3 (64 bits, no seed) of everything before it u64
//! ```
//!
//! All numbers are little endian. The sections, in this order:
//!
//! | tag | contents |
//! |---|---|
//! | 1 | configuration space, as long as the device's is |
//! | 2 | MSI-X table and pending bits; only with MSI-X |
//! | 3 | interrupts that wait for the start |
//! | 0x10 + i | memory of BAR i; only memory BARs |
//! | 4 | what [`Device::save`] wrote |
//!
//! A reader needs no more memory than one piece, and does not read beyond the trailer. What it
//! reads comes from another process: everything is checked, nothing is believed. A device whose
//! load failed is in ERROR, so what was taken over before the damage was found does no harm.

use super::parts::Parts;
use crate::device::{Device, DeviceError};
use crate::pci::{BarUse, ForeignConfig};
use std::hash::Hasher;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use thiserror::Error;
use twox_hash::xxhash3_64::{DEFAULT_SECRET_LENGTH, RawHasher, SecretBuffer};

const MAGIC: [u8; 8] = *b"STANDSTL";
const VERSION: u16 = 1;
const PIECE: usize = 65536;

const CONFIG: u8 = 1;
const MSIX: u8 = 2;
const INTERRUPTS: u8 = 3;
const DEVICE: u8 = 4;
const BAR_0: u8 = 0x10;
const TRAILER: u8 = 0xff;

/// The most bytes of interrupts that wait: 2048 vectors and the other indexes.
const MOST_INTERRUPTS: usize = 32 << 10;

/// A state stream was not written or not taken over.
#[derive(Debug, Error)]
pub(super) enum StreamError {
    #[error("the state stream cannot be written")]
    Write(#[source] io::Error),
    #[error("the state stream cannot be read")]
    Read(#[source] io::Error),
    #[error("the state stream ends too early")]
    Short,
    #[error("this is no state stream: it begins with {0:02x?}")]
    Magic([u8; 8]),
    #[error("state stream of version {0}, expected {VERSION}")]
    Version(u16),
    #[error("the state of a {found:?}, this is a {expected:?}")]
    Kind { found: String, expected: String },
    #[error("section {found:#x} where {expected:#x} was expected")]
    Section { found: u8, expected: u8 },
    #[error("a piece of {length} bytes in section {section:#x}, at most {PIECE} are possible")]
    Piece { section: u8, length: u32 },
    #[error("section {section:#x} has more than the expected {expected} bytes")]
    TooLong { section: u8, expected: u64 },
    #[error("section {section:#x} has {actual} bytes, expected {expected}")]
    TooShort { section: u8, actual: u64, expected: u64 },
    #[error("damaged: the checksum is {found:#018x}, the contents give {actual:#018x}")]
    Checksum { found: u64, actual: u64 },
    #[error(transparent)]
    Config(#[from] ForeignConfig),
    #[error("interrupts that wait: {0}")]
    Interrupts(String),
    #[error("memory of BAR {bar} cannot be accessed")]
    Memory {
        bar: u8,
        #[source]
        source: io::Error,
    },
    #[error("the device: {0}")]
    Device(#[source] DeviceError),
}

type Checksum = RawHasher<&'static [u8; DEFAULT_SECRET_LENGTH]>;

fn checksum() -> Checksum {
    RawHasher::new(SecretBuffer::default())
}

/// Writes the device's state.
pub(super) fn save<D: Device>(parts: &Parts<D>, to: impl Write) -> Result<(), StreamError> {
    let mut out = Writer {
        to,
        checksum: checksum(),
        #[cfg(feature = "fault-injection")]
        is_cut: false,
    };
    out.header(&parts.kind)?;
    let config = parts.config().bytes().to_vec();
    out.section(CONFIG, |section| section.write_all(&config).map_err(StreamError::Write))?;
    if parts.layout.msix.is_some() {
        let msix = parts.msix().clone();
        out.section(MSIX, |section| section.write_all(&msix).map_err(StreamError::Write))?;
    }
    let latched = standstill_protocol::codec::encode_state(&parts.interrupts.latched())
        .map_err(|error| StreamError::Interrupts(error.to_string()))?;
    out.section(INTERRUPTS, |section| section.write_all(&latched).map_err(StreamError::Write))?;
    for (bar, memory, size) in memory_bars(parts) {
        out.section(BAR_0 + bar, |section| copy_out(bar, memory, size, section))?;
    }
    out.section(DEVICE, |section| {
        let saved = parts.device.save(section);
        // If the stream failed, that is what went wrong, whatever the device says.
        match (section.failed.take(), saved) {
            (Some(error), _) => Err(StreamError::Write(error)),
            (None, saved) => saved.map_err(StreamError::Device),
        }
    })?;
    out.trailer()
}

/// The memory BARs with their sizes.
fn memory_bars<D>(parts: &Parts<D>) -> impl Iterator<Item = (u8, &OwnedFd, u64)> {
    let bars = parts.layout.bars.iter().zip(&parts.bar_memory).zip(0_u8..);
    bars.filter(|((bar, _), _)| bar.usage == BarUse::Memory)
        .filter_map(|((bar, memory), index)| Some((index, memory.as_ref()?, bar.size)))
}

fn copy_out(
    bar: u8,
    memory: &OwnedFd,
    size: u64,
    section: &mut dyn Write,
) -> Result<(), StreamError> {
    let failed = |source| StreamError::Memory { bar, source };
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let length = usize::try_from(size - at).map_or(PIECE, |rest| rest.min(PIECE));
        let read = rustix::io::pread(memory, &mut piece[..length], at)
            .map_err(|errno| failed(errno.into()))?;
        if read == 0 {
            return Err(failed(ErrorKind::UnexpectedEof.into()));
        }
        section.write_all(&piece[..read]).map_err(StreamError::Write)?;
        at += read as u64;
    }
    Ok(())
}

struct Writer<W> {
    to: W,
    checksum: Checksum,
    /// What follows is not written, as if it were.
    #[cfg(feature = "fault-injection")]
    is_cut: bool,
}

impl<W: Write> Writer<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.checksum.write(bytes);
        #[cfg(feature = "fault-injection")]
        if self.is_cut {
            return Ok(());
        }
        self.to.write_all(bytes)
    }

    fn header(&mut self, kind: &str) -> Result<(), StreamError> {
        // A kind has at most 64 bytes.
        let length = u16::try_from(kind.len()).unwrap_or(u16::MAX);
        let mut header = Vec::with_capacity(12 + kind.len());
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend(length.to_le_bytes());
        header.extend(kind.as_bytes());
        self.put(&header).map_err(StreamError::Write)
    }

    fn section(
        &mut self,
        tag: u8,
        fill: impl FnOnce(&mut SectionWriter<'_, W>) -> Result<(), StreamError>,
    ) -> Result<(), StreamError> {
        self.put(&[tag]).map_err(StreamError::Write)?;
        let mut section =
            SectionWriter { out: self, piece: Vec::with_capacity(PIECE), failed: None };
        fill(&mut section)?;
        section.end().map_err(StreamError::Write)
    }

    fn piece(&mut self, piece: &[u8]) -> io::Result<()> {
        #[cfg(feature = "fault-injection")]
        if let Some(spoilt) = self.spoil_piece(piece) {
            return spoilt;
        }
        self.put(&piece_length(piece))?;
        self.put(piece)
    }

    fn trailer(mut self) -> Result<(), StreamError> {
        self.put(&[TRAILER]).map_err(StreamError::Write)?;
        #[cfg(feature = "fault-injection")]
        if self.is_cut {
            return Ok(());
        }
        let sum = self.checksum.finish().to_le_bytes();
        self.to.write_all(&sum).and_then(|()| self.to.flush()).map_err(StreamError::Write)
    }
}

/// A piece has at most `PIECE` bytes.
fn piece_length(piece: &[u8]) -> [u8; 4] {
    u32::try_from(piece.len()).unwrap_or(u32::MAX).to_le_bytes()
}

/// Gathers what is written into pieces.
struct SectionWriter<'a, W> {
    out: &'a mut Writer<W>,
    piece: Vec<u8>,
    failed: Option<io::Error>,
}

impl<W: Write> SectionWriter<'_, W> {
    fn send_piece(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let sent = self.out.piece(&self.piece);
        self.piece.clear();
        if let Err(error) = &sent {
            self.failed = Some(io::Error::new(error.kind(), error.to_string()));
        }
        sent
    }

    fn end(mut self) -> io::Result<()> {
        self.send_piece()?;
        self.out.put(&0_u32.to_le_bytes())
    }
}

impl<W: Write> Write for SectionWriter<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let length = data.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&data[..length]);
        if self.piece.len() == PIECE {
            self.send_piece()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what [`save`] wrote, and takes it over.
pub(super) fn load<D: Device>(parts: &Parts<D>, from: impl Read) -> Result<(), StreamError> {
    let mut stream = Reader { from, checksum: checksum() };
    stream.header(&parts.kind)?;
    let mut config = vec![0; parts.config().bytes().len()];
    stream.exact_section(CONFIG, &mut config)?;
    let mut msix = parts.layout.msix.map(|_| vec![0; parts.msix().len()]);
    if let Some(msix) = &mut msix {
        stream.exact_section(MSIX, msix)?;
    }
    let latched = stream.short_section(INTERRUPTS, MOST_INTERRUPTS)?;
    let latched = standstill_protocol::codec::decode_state(&latched)
        .map_err(|error| StreamError::Interrupts(error.to_string()))?;
    for (bar, memory, size) in memory_bars(parts) {
        stream.section(BAR_0 + bar, |section| copy_in(bar, memory, size, section))?;
    }
    stream.section(DEVICE, |section| {
        let loaded = parts.device.load(section);
        match (section.failed.take(), loaded) {
            (Some(error), _) => Err(error),
            (None, loaded) => loaded.map_err(StreamError::Device),
        }
    })?;
    stream.trailer()?;
    parts.config().restore(&config)?;
    if let Some(msix) = msix {
        *parts.msix() = msix;
    }
    let restored = parts.interrupts.restore(&latched);
    restored.map_err(|error| StreamError::Interrupts(error.to_string()))
}

fn copy_in<R: Read>(
    bar: u8,
    memory: &OwnedFd,
    size: u64,
    section: &mut SectionReader<'_, R>,
) -> Result<(), StreamError> {
    let failed = |source| StreamError::Memory { bar, source };
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    loop {
        let length = section.next_bytes(&mut piece)?;
        if length == 0 {
            break;
        }
        if length as u64 > size - at {
            return Err(StreamError::TooLong { section: BAR_0 + bar, expected: size });
        }
        let mut rest = &piece[..length];
        while !rest.is_empty() {
            let written = rustix::io::pwrite(memory, rest, at).map_err(|e| failed(e.into()))?;
            if written == 0 {
                return Err(failed(ErrorKind::WriteZero.into()));
            }
            rest = &rest[written..];
            at += written as u64;
        }
    }
    if at == size {
        Ok(())
    } else {
        Err(StreamError::TooShort { section: BAR_0 + bar, actual: at, expected: size })
    }
}

struct Reader<R> {
    from: R,
    checksum: Checksum,
}

impl<R: Read> Reader<R> {
    fn get(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        self.from.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => StreamError::Short,
            _ => StreamError::Read(error),
        })?;
        self.checksum.write(bytes);
        Ok(())
    }

    fn get_array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        self.get(&mut bytes)?;
        Ok(bytes)
    }

    fn header(&mut self, expected: &str) -> Result<(), StreamError> {
        let magic = self.get_array()?;
        if magic != MAGIC {
            return Err(StreamError::Magic(magic));
        }
        let version = u16::from_le_bytes(self.get_array()?);
        if version != VERSION {
            return Err(StreamError::Version(version));
        }
        let length = u16::from_le_bytes(self.get_array()?);
        let mut kind = vec![0; usize::from(length).min(standstill_protocol::message::MAX_NAME)];
        self.get(&mut kind)?;
        if usize::from(length) != kind.len() || kind != expected.as_bytes() {
            let found = String::from_utf8_lossy(&kind).into_owned();
            return Err(StreamError::Kind { found, expected: expected.into() });
        }
        Ok(())
    }

    fn section<T>(
        &mut self,
        tag: u8,
        take: impl FnOnce(&mut SectionReader<'_, R>) -> Result<T, StreamError>,
    ) -> Result<T, StreamError> {
        let [found] = self.get_array()?;
        if found != tag {
            return Err(StreamError::Section { found, expected: tag });
        }
        let mut section =
            SectionReader { stream: self, tag, left: 0, taken: 0, ended: false, failed: None };
        let taken = take(&mut section)?;
        section.end()?;
        Ok(taken)
    }

    fn exact_section(&mut self, tag: u8, bytes: &mut [u8]) -> Result<(), StreamError> {
        let expected = bytes.len() as u64;
        self.section(tag, |section| {
            let mut filled = 0;
            while filled < bytes.len() {
                match section.next_bytes(&mut bytes[filled..])? {
                    0 => {
                        let actual = filled as u64;
                        return Err(StreamError::TooShort { section: tag, actual, expected });
                    }
                    length => filled += length,
                }
            }
            Ok(())
        })
    }

    /// A section of any length up to a small one.
    fn short_section(&mut self, tag: u8, longest: usize) -> Result<Vec<u8>, StreamError> {
        self.section(tag, |section| {
            let mut bytes = vec![0; longest];
            let mut filled = 0;
            while filled < longest {
                match section.next_bytes(&mut bytes[filled..])? {
                    0 => break,
                    length => filled += length,
                }
            }
            bytes.truncate(filled);
            Ok(bytes)
        })
    }

    fn trailer(mut self) -> Result<(), StreamError> {
        let [found] = self.get_array()?;
        if found != TRAILER {
            return Err(StreamError::Section { found, expected: TRAILER });
        }
        let actual = self.checksum.finish();
        let found = u64::from_le_bytes(self.get_array()?);
        if found != actual {
            return Err(StreamError::Checksum { found, actual });
        }
        Ok(())
    }
}

/// Reads one section, across its pieces, to its end and no further.
struct SectionReader<'a, R> {
    stream: &'a mut Reader<R>,
    tag: u8,
    /// What is left of the present piece.
    left: usize,
    taken: u64,
    ended: bool,
    failed: Option<StreamError>,
}

impl<R: Read> SectionReader<'_, R> {
    /// Reads some bytes; 0 at the section's end.
    fn next_bytes(&mut self, data: &mut [u8]) -> Result<usize, StreamError> {
        if data.is_empty() || !self.has_more()? {
            return Ok(0);
        }
        let length = data.len().min(self.left);
        self.stream.get(&mut data[..length])?;
        self.left -= length;
        self.taken += length as u64;
        Ok(length)
    }

    fn has_more(&mut self) -> Result<bool, StreamError> {
        if self.left == 0 && !self.ended {
            let length = u32::from_le_bytes(self.stream.get_array()?);
            match usize::try_from(length) {
                Ok(0) => self.ended = true,
                Ok(length) if length <= PIECE => {
                    #[cfg(feature = "fault-injection")]
                    faults::reach_piece()?;
                    self.left = length;
                }
                _ => {
                    return Err(StreamError::Piece { section: self.tag, length });
                }
            }
        }
        Ok(!self.ended)
    }

    /// Everything was taken.
    fn end(mut self) -> Result<(), StreamError> {
        if self.has_more()? {
            return Err(StreamError::TooLong { section: self.tag, expected: self.taken });
        }
        Ok(())
    }
}

impl<R: Read> Read for SectionReader<'_, R> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.next_bytes(data).map_err(|error| {
            let seen = io::Error::new(ErrorKind::InvalidData, error.to_string());
            self.failed = Some(error);
            seen
        })
    }
}

#[cfg(feature = "fault-injection")]
mod faults;
#[cfg(test)]
mod tests;
