//! State streams as tests and fuzzers want them: kept in memory, taken apart, changed and sealed
//! again.

use super::Sink;
use super::format::{Chain, DIGEST, HEADER, Header, PREAMBLE, Tag, digest};
use std::io::{self, Write};

/// A stream that nobody gives up.
#[derive(Debug, Default)]
pub(in crate::actor) struct Kept(pub(in crate::actor) Vec<u8>);

impl Write for Kept {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Kept {
    fn still_wanted(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream taken apart, to be changed and sealed again.
#[derive(Clone, Debug)]
pub(super) struct Apart {
    pub(super) preamble: [u8; PREAMBLE],
    pub(super) records: Vec<(Header, Vec<u8>)>,
}

impl Apart {
    pub(super) fn of(stream: &[u8]) -> Self {
        let (preamble, mut rest) = stream.split_first_chunk().unwrap();
        let mut records = Vec::new();
        while let Some((header, more)) = rest.split_first_chunk::<HEADER>() {
            let header = Header::from_bytes(*header);
            let length = usize::try_from(header.length).unwrap();
            records.push((header, more[..length].to_vec()));
            rest = &more[length + DIGEST..];
        }
        assert_eq!(records.pop().unwrap().0.tag, Tag::END);
        Self { preamble: *preamble, records }
    }

    pub(super) fn tags(&self) -> Vec<Tag> {
        self.records.iter().map(|(header, _)| header.tag).collect()
    }

    pub(super) fn find(&mut self, tag: Tag) -> usize {
        self.records.iter().position(|(header, _)| header.tag == tag).unwrap()
    }

    pub(super) fn insert(&mut self, at: usize, tag: u16, flags: u16, contents: &[u8]) {
        let header = Header { tag: Tag(tag), flags, length: 0, at: 0 };
        self.records.insert(at, (header, contents.to_vec()));
    }

    /// With digests and an end that fit.
    pub(super) fn sealed(&self) -> Vec<u8> {
        let mut stream = self.preamble.to_vec();
        let mut chain = Chain::new(&self.preamble);
        let mut put = |header: Header, contents: &[u8]| {
            let length = u32::try_from(contents.len()).unwrap();
            let begin = stream.len();
            stream.extend(Header { length, ..header }.to_bytes());
            stream.extend(contents);
            let sum = digest(&stream[begin..]);
            stream.extend(sum.to_le_bytes());
            sum
        };
        for (header, contents) in &self.records {
            chain.add(put(*header, contents));
        }
        put(Header { tag: Tag::END, flags: 0, length: 0, at: 0 }, &chain.to_bytes());
        stream
    }
}
