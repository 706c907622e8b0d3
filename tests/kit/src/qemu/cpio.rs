//! An initramfs: a cpio archive in the format `newc`, as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Write};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that is being written. Folders come by themselves.
#[derive(Debug)]
pub(super) struct Archive<W> {
    to: W,
    /// Folders that are in it.
    folders: BTreeSet<String>,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to, folders: BTreeSet::new(), entries: 0 }
    }

    /// Adds a file with these permissions. The path is taken from the root, with or without a
    /// leading slash.
    ///
    /// # Errors
    ///
    /// If it is longer than the format has room for, or the archive cannot be written.
    pub(super) fn file(&mut self, path: &str, content: &[u8], permissions: u32) -> io::Result<()> {
        self.add(path, FILE | permissions, (0, 0), content)
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.add(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    pub(super) fn character_device(&mut self, path: &str, number: (u32, u32)) -> io::Result<()> {
        self.add(path, CHARACTER_DEVICE | 0o600, number, &[])
    }

    pub(super) fn folder(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        self.parent(path)?;
        self.write(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Ends it.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entries = 0;
        self.write("TRAILER!!!", 0, (0, 0), &[])?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn add(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        self.parent(path)?;
        self.write(path, mode, device, content)
    }

    fn parent(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn write(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let too_long = |_| io::Error::new(ErrorKind::FileTooLarge, "a file of 4 GiB or more");
        let size = u32::try_from(content.len()).map_err(too_long)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_long)?;
        let links = 1;
        let fields =
            [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.entries += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.to.write_all(header.as_bytes())?;
        self.to.write_all(path.as_bytes())?;
        self.to.write_all(&[0])?;
        self.align(header.len() + path.len() + 1)?;
        self.to.write_all(content)?;
        self.align(content.len())
    }

    /// Fills up to a multiple of four bytes.
    fn align(&mut self, len: usize) -> io::Result<()> {
        let filler = len.next_multiple_of(4) - len;
        self.to.write_all(&[0; 4][..filler])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_small_archive() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a", b"hello", 0o755).unwrap();
        let bytes = archive.finish().unwrap();
        let zero = "00000000";
        let header = |numbers: [&str; 13]| format!("070701{}", numbers.concat());
        let file = header([
            zero, "000081ed", zero, zero, "00000001", zero, "00000005", zero, zero, zero, zero,
            "00000002", zero,
        ]);
        let end = header([
            zero, zero, zero, zero, "00000001", zero, zero, zero, zero, zero, zero, "0000000b",
            zero,
        ]);
        let expected = format!("{file}a\0hello\0\0\0{end}TRAILER!!!\0\0\0\0");
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    }

    #[test]
    fn everything_is_in_it_once_and_folders_come_first() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/bin/a/b", &[7; 4097], 0o644).unwrap();
        archive.file("bin/a/c", b"", 0o644).unwrap();
        archive.symlink("/bin/d", "a/b").unwrap();
        archive.folder("/proc").unwrap();
        archive.folder("/bin/").unwrap();
        archive.character_device("/dev/console", (5, 1)).unwrap();
        let bytes = archive.finish().unwrap();
        let expected = [
            ("bin", 0),
            ("bin/a", 0),
            ("bin/a/b", 4097),
            ("bin/a/c", 0),
            ("bin/d", 3),
            ("proc", 0),
            ("dev", 0),
            ("dev/console", 0),
            ("TRAILER!!!", 0),
        ];
        assert_eq!(list(&bytes), expected.map(|(name, size)| (name.to_owned(), size)));
    }

    /// Names and sizes, read as the kernel reads them.
    fn list(mut bytes: &[u8]) -> Vec<(String, usize)> {
        let mut list = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(&bytes[..6], b"070701");
            let field = |at: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * at..14 + 8 * at]).unwrap();
                usize::from_str_radix(digits, 16).unwrap()
            };
            let (size, name_size) = (field(6), field(11));
            let name = std::str::from_utf8(&bytes[110..109 + name_size]).unwrap();
            assert_eq!(bytes[109 + name_size], 0);
            list.push((name.to_owned(), size));
            let content = (110 + name_size).next_multiple_of(4);
            bytes = &bytes[(content + size).next_multiple_of(4)..];
        }
        list
    }
}
