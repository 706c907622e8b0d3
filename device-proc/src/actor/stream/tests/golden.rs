//! The vector of `docs/state-format.md` against what is written and read.

use super::*;

const DOCUMENT: &str = include_str!("../../../../../docs/state-format.md");

/// The bytes of the document: lines of an offset and up to 16 bytes, between two marks; text behind
/// a bar is for people.
fn document() -> Vec<u8> {
    let vector = DOCUMENT.split_once("<!-- vector -->").unwrap().1;
    let vector = vector.split_once("<!-- end of vector -->").unwrap().0;
    let mut bytes = Vec::new();
    for line in vector.lines().filter(|line| !line.is_empty() && !line.starts_with("```")) {
        let line = line.split_once('|').map_or(line, |(line, _)| line);
        let (offset, hex) = line.trim().split_once("  ").unwrap();
        assert_eq!(usize::from_str_radix(offset, 16), Ok(bytes.len()), "offset in {line:?}");
        bytes.extend(hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    }
    bytes
}

/// The device of the document: 4 KiB of memory, its first bytes `memory`, one vector that waits,
/// state that was saved while it ran and after.
fn device() -> Arc<Parts<Scripted>> {
    let device = Scripted { contents: Mutex::new(b"state".to_vec()), ..Scripted::default() };
    let info = info().bar(2, Bar::memory(4096, memory(4096))).msix_vectors(1).state_version(1, 2);
    put_together(device, info)
}

fn written() -> Vec<u8> {
    let source = device();
    poke(&source, 0, b"memory");
    source.interrupts.restore(&Latched { msix: vec![0], ..Latched::default() }).unwrap();
    passes(&source, &[(Pass::First, b"running")]);
    let mut stream = Kept::default();
    let mut saver = Saver::new(&source);
    saver.pre_copy(&source, &mut stream).unwrap();
    saver.finish(&source, &mut stream).unwrap();
    stream.0
}

/// The same with 16 bytes for a configuration space: what a device has there is no part of the
/// format.
fn with_short_config() -> Vec<u8> {
    let mut apart = Apart::of(&written());
    let config = apart.find(Tag::CONFIG);
    apart.records[config].1 = vec![0; 16];
    apart.sealed()
}

/// Long runs of zeros are no use to a reader: the document leaves out the contents of memory and
/// MSI-X table.
fn without_the_long_ones(stream: &[u8]) -> Vec<u8> {
    let mut short = stream[..PREAMBLE].to_vec();
    let mut rest = &stream[PREAMBLE..];
    while let Some((header, more)) = rest.split_first_chunk::<HEADER>() {
        let length = usize::try_from(Header::from_bytes(*header).length).unwrap();
        short.extend(header);
        if length < 256 {
            short.extend(&more[..length + DIGEST]);
        } else {
            short.extend(&more[length..length + DIGEST]);
        }
        rest = &more[length + DIGEST..];
    }
    short
}

fn dump(bytes: &[u8]) -> String {
    let line = |(at, bytes): (usize, &[u8])| {
        let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{:04x}  {}\n", at * 16, hex.join(" "))
    };
    bytes.chunks(16).enumerate().map(line).collect()
}

#[test]
fn the_document_has_the_bytes_that_are_written() {
    let short = without_the_long_ones(&with_short_config());
    assert!(short == document(), "written is\n{}", dump(&short));
}

#[test]
fn the_stream_of_the_document_is_read() {
    let target = device();
    load(&target, written().as_slice()).unwrap();
    assert_eq!(*target.device.passes.lock().unwrap(), [(Pass::First, b"running".to_vec())]);
    assert_eq!(*target.device.contents.lock().unwrap(), b"state");
    assert_eq!(target.interrupts.latched().msix, [0]);
}
