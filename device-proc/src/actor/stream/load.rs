//! Reading a state stream, and taking it over.

use super::format::{
    Chain, DIGEST, HEADER, Header, Identity, MORE, OPTIONAL, PIECE, PREAMBLE, Tag, check_preamble,
    digest,
};
use super::{StreamError, identity, memory_bars};
use crate::actor::parts::Parts;
use crate::device::{Device, DeviceError, Pass};
use crate::interrupt::Latched;
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;

/// The most bytes of interrupts that wait: 2048 vectors and the other indexes.
const MOST_INTERRUPTS: usize = 32 << 10;

/// Reads what a [`Saver`](super::Saver) wrote, and takes it over; nothing is read beyond its end.
pub(crate) fn load<D: Device>(parts: &Parts<D>, from: impl Read) -> Result<(), StreamError> {
    let mut stream = Records::begin(from)?;
    let own = identity(parts);
    stream.expect(Tag::IDENTITY)?;
    let saved = Identity::from_bytes(stream.contents(), stream.newer)?;
    own.check(&saved)?;
    // Then there may be more of the device's state than it knows.
    let newer_device = saved.state[1] > own.state[1];
    let config_size = parts.config().bytes().len();

    let mut memory = Memory::of(parts);
    loop {
        let header = stream.next_known()?;
        match header.tag {
            Tag::RUNNING_FIRST | Tag::RUNNING_LATER => {
                let pass = match header.tag {
                    Tag::RUNNING_FIRST => Pass::First,
                    _ => Pass::Later,
                };
                stream.section(newer_device, |section| parts.device.load_running(pass, section))?;
            }
            tag => match memory.find(tag) {
                Some(bar) => bar.take(header, stream.contents())?,
                None => break,
            },
        }
    }
    stream.is(Tag::CONFIG)?;
    memory.check_whole()?;
    let config = stream.exact(Tag::CONFIG, config_size)?;
    let msix = match parts.layout.msix {
        Some(_) => {
            let size = parts.msix().len();
            stream.expect(Tag::MSIX)?;
            Some(stream.exact(Tag::MSIX, size)?)
        }
        None => None,
    };
    stream.expect(Tag::INTERRUPTS)?;
    let latched = stream.contents();
    if latched.len() > MOST_INTERRUPTS {
        let expected = MOST_INTERRUPTS as u64;
        return Err(StreamError::TooLong { section: Tag::INTERRUPTS, expected });
    }
    let latched: Latched = standstill_protocol::codec::decode_state(latched)
        .map_err(|error| StreamError::Interrupts(error.to_string()))?;
    if !latched.is_in_order() {
        return Err(StreamError::Interrupts("vectors twice, or out of their order".into()));
    }
    stream.expect(Tag::DEVICE)?;
    stream.section(newer_device, |section| parts.device.load(section))?;
    stream.end()?;
    parts.config().restore(&config)?;
    if let Some(msix) = msix {
        *parts.msix() = msix;
    }
    let restored = parts.interrupts.restore(&latched);
    restored.map_err(|error| StreamError::Interrupts(error.to_string()))
}

/// The records of a stream, one at a time, each of them checked.
struct Records<R> {
    from: R,
    chain: Chain,
    /// The stream's minor version is newer.
    newer: bool,
    header: Header,
    /// Header, contents and digest of the record that was read last.
    record: Vec<u8>,
}

impl<R: Read> Records<R> {
    fn begin(mut from: R) -> Result<Self, StreamError> {
        let mut preamble = [0; PREAMBLE];
        read_exact(&mut from, &mut preamble)?;
        let newer = check_preamble(&preamble)?;
        Ok(Self {
            from,
            chain: Chain::new(&preamble),
            newer,
            header: Header { tag: Tag::END, flags: 0, length: 0, at: 0 },
            record: Vec::with_capacity(HEADER + PIECE + DIGEST),
        })
    }

    /// Reads one record.
    fn next(&mut self) -> Result<Header, StreamError> {
        let mut header = [0; HEADER];
        read_exact(&mut self.from, &mut header)?;
        let Header { tag, length, at, .. } = Header::from_bytes(header);
        let long = || StreamError::Piece { section: tag, length };
        let length = usize::try_from(length).map_err(|_| long())?;
        if length > PIECE {
            return Err(long());
        }
        #[cfg(feature = "fault-injection")]
        if tag != Tag::IDENTITY && tag != Tag::END {
            super::faults::reach_record()?;
        }
        let end = HEADER + length;
        self.record.resize(end + DIGEST, 0);
        self.record[..HEADER].copy_from_slice(&header);
        read_exact(&mut self.from, &mut self.record[HEADER..])?;
        let mut found = [0; DIGEST];
        found.copy_from_slice(&self.record[end..]);
        let (found, actual) = (u128::from_le_bytes(found), digest(&self.record[..end]));
        if found != actual {
            return Err(StreamError::Damaged { section: tag, at, found, actual });
        }
        self.record.truncate(end);
        self.header = Header::from_bytes(header);
        if tag != Tag::END {
            self.chain.add(actual);
        }
        Ok(self.header)
    }

    /// Reads one record that is known, or may not be skipped.
    fn next_known(&mut self) -> Result<Header, StreamError> {
        loop {
            let header = self.next()?;
            match header.tag {
                Tag(1..=7 | 0x10..=0x15 | 0xffff) => return Ok(header),
                _ if header.flags & OPTIONAL != 0 => {}
                section => return Err(StreamError::Unknown { section }),
            }
        }
    }

    fn expect(&mut self, expected: Tag) -> Result<(), StreamError> {
        self.next_known()?;
        self.is(expected)
    }

    /// That is the record that was read last.
    fn is(&self, expected: Tag) -> Result<(), StreamError> {
        match self.header.tag {
            found if found != expected => Err(StreamError::Section { found, expected }),
            _ => Ok(()),
        }
    }

    fn contents(&self) -> &[u8] {
        &self.record[HEADER..]
    }

    /// The contents of the record that was read last, which have that tag and length.
    fn exact(&self, section: Tag, length: usize) -> Result<Vec<u8>, StreamError> {
        self.is(section)?;
        let (contents, expected) = (self.contents(), length as u64);
        match contents.len() {
            actual if actual < length => {
                Err(StreamError::TooShort { section, actual: actual as u64, expected })
            }
            actual if actual > length => Err(StreamError::TooLong { section, expected }),
            _ => Ok(contents.to_vec()),
        }
    }

    /// Gives the device the section whose first record was read last.
    fn section(
        &mut self,
        may_have_more: bool,
        take: impl FnOnce(&mut dyn Read) -> Result<(), DeviceError>,
    ) -> Result<(), StreamError> {
        let tag = self.header.tag;
        let mut section = Section { stream: self, tag, begins_at: 0, taken: 0, failed: None };
        section.check_place()?;
        let taken = take(&mut section);
        if let Some(error) = section.failed.take() {
            return Err(error);
        }
        taken.map_err(StreamError::Device)?;
        let read = section.begins_at + section.taken as u64;
        loop {
            let left = section.left();
            if left > 0 && !may_have_more {
                return Err(StreamError::TooLong { section: tag, expected: read });
            }
            section.taken += left;
            if !section.go_on()? {
                return Ok(());
            }
        }
    }

    fn end(&mut self) -> Result<(), StreamError> {
        self.expect(Tag::END)?;
        if self.contents().get(..Chain::LENGTH) == Some(&self.chain.to_bytes()) {
            Ok(())
        } else {
            Err(StreamError::Chain)
        }
    }
}

fn read_exact(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), StreamError> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => StreamError::Short,
        _ => StreamError::Read(error),
    })
}

/// Reads one section, across its records, to its end and no further.
struct Section<'a, R> {
    stream: &'a mut Records<R>,
    tag: Tag,
    /// Where the present record begins in the section.
    begins_at: u64,
    /// What was taken of its contents.
    taken: usize,
    failed: Option<StreamError>,
}

impl<R: Read> Section<'_, R> {
    fn left(&self) -> usize {
        self.stream.contents().len() - self.taken
    }

    /// The present record is the one that comes next.
    fn check_place(&self) -> Result<(), StreamError> {
        let Header { tag, length, at, .. } = self.stream.header;
        if tag != self.tag {
            return Err(StreamError::Section { found: tag, expected: self.tag });
        }
        if at != self.begins_at {
            let length = u64::from(length);
            let expected_at = self.begins_at;
            return Err(StreamError::Place {
                section: tag,
                length,
                at,
                expected: length,
                expected_at,
            });
        }
        Ok(())
    }

    /// Reads the section's next record once nothing is left of the present one; false at its end.
    fn go_on(&mut self) -> Result<bool, StreamError> {
        if self.stream.header.flags & MORE == 0 {
            return Ok(false);
        }
        self.begins_at += self.taken as u64;
        self.stream.next()?;
        self.taken = 0;
        self.check_place()?;
        Ok(true)
    }

    fn next_bytes(&mut self, data: &mut [u8]) -> Result<usize, StreamError> {
        while self.left() == 0 {
            if !self.go_on()? {
                return Ok(0);
            }
        }
        let length = data.len().min(self.left());
        let from = self.taken;
        data[..length].copy_from_slice(&self.stream.contents()[from..from + length]);
        self.taken += length;
        Ok(length)
    }
}

impl<R: Read> Read for Section<'_, R> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        if let Some(error) = &self.failed {
            return Err(io::Error::new(ErrorKind::InvalidData, error.to_string()));
        }
        self.next_bytes(data).map_err(|error| {
            let seen = io::Error::new(ErrorKind::InvalidData, error.to_string());
            self.failed = Some(error);
            seen
        })
    }
}

/// The memory BARs, and what has come of them.
struct Memory<'a>(Vec<BarMemory<'a>>);

struct BarMemory<'a> {
    bar: u8,
    memory: &'a OwnedFd,
    size: u64,
    /// One bit for each piece.
    came: Vec<u64>,
}

impl<'a> Memory<'a> {
    fn of<D>(parts: &'a Parts<D>) -> Self {
        let bars = memory_bars(parts).map(|(bar, memory, size)| {
            let words = size.div_ceil(PIECE as u64 * 64);
            let came = vec![0; usize::try_from(words).unwrap_or(0)];
            BarMemory { bar, memory, size, came }
        });
        Self(bars.collect())
    }

    fn find(&mut self, tag: Tag) -> Option<&mut BarMemory<'a>> {
        self.0.iter_mut().find(|bar| Tag::memory(bar.bar) == tag)
    }

    fn check_whole(&self) -> Result<(), StreamError> {
        self.0.iter().try_for_each(BarMemory::check_whole)
    }
}

impl BarMemory<'_> {
    /// Takes over one piece. The device is in RESUMING: if the rest of the stream is bad, it will
    /// be in ERROR.
    fn take(&mut self, header: Header, contents: &[u8]) -> Result<(), StreamError> {
        let Header { tag: section, at, .. } = header;
        let (piece, within) = (at / PIECE as u64, at % PIECE as u64);
        let length = contents.len() as u64;
        let expected_at = at - within;
        let expected = self.size.saturating_sub(expected_at).min(PIECE as u64);
        if within != 0 || length != expected || length == 0 {
            return Err(StreamError::Place { section, length, at, expected, expected_at });
        }
        let failed = |source| StreamError::Memory { bar: self.bar, source };
        write_all(self.memory, contents, at).map_err(failed)?;
        let word = usize::try_from(piece / 64).ok().and_then(|word| self.came.get_mut(word));
        if let Some(word) = word {
            *word |= 1 << (piece % 64);
        }
        Ok(())
    }

    fn check_whole(&self) -> Result<(), StreamError> {
        let pieces = self.size.div_ceil(PIECE as u64);
        let came = |piece: u64| {
            let word = usize::try_from(piece / 64).ok().and_then(|word| self.came.get(word));
            word.is_some_and(|word| word & (1 << (piece % 64)) != 0)
        };
        let Some(piece) = (0..pieces).find(|&piece| !came(piece)) else { return Ok(()) };
        let at = piece * PIECE as u64;
        let missing = (self.size - at).min(PIECE as u64);
        Err(StreamError::Missing { section: Tag::memory(self.bar), at, missing })
    }
}

fn write_all(memory: &OwnedFd, mut data: &[u8], mut at: u64) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::pwrite(memory, data, at) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(length) => {
                data = &data[length..];
                at += length as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
