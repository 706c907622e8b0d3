//! Programs of the machine that runs the tests, so packed that they run in a guest: with the shared
//! libraries that they need, and without what only a debugger reads.
//!
//! A guest's program need not be linked in a way of its own (statically, for another target), nor be
//! built apart: what cargo has built for the tests will do, the test program itself included.

use super::run::{RunError, run};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use thiserror::Error;

/// How long the dynamic linker may take to find the libraries.
const LINK: Duration = Duration::from_secs(60);

/// Size of the header of an ELF file and of an entry of its program header table, in bytes.
const HEADER: usize = 64;
const ENTRY: usize = 56;
/// Types of entries: what is loaded, and the path of the dynamic linker.
const LOAD: u32 = 1;
const INTERPRETER: u32 = 3;

/// A program cannot be packed.
#[derive(Debug, Error)]
pub enum ProgramFileError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no program that the guest's kernel could run.
    #[error("{} is no 64-bit ELF program", .0.display())]
    NotElf(PathBuf),
    /// Its libraries cannot be found.
    #[error("the shared libraries of {} cannot be found", path.display())]
    Libraries {
        /// The program.
        path: PathBuf,
        /// What the dynamic linker said.
        source: RunError,
    },
}

/// A file for the guest: where it is to be, and what is in it.
pub(super) type Packed = (String, Vec<u8>);

/// The program itself, as it is to be in the guest, and the dynamic linker and libraries, each at
/// the path where the program looks for it.
pub(super) fn pack(program: &Path) -> Result<(Vec<u8>, Vec<Packed>), ProgramFileError> {
    let read = |path: &Path| {
        fs::read(path).map_err(|source| ProgramFileError::Io { path: path.to_owned(), source })
    };
    let mut content = read(program)?;
    let elf = Elf::of(&content).ok_or_else(|| ProgramFileError::NotElf(program.to_owned()))?;
    // Sections for debuggers are behind all that is loaded; nobody else reads the table of sections.
    content.truncate(elf.loaded);
    let Some(interpreter) = elf.interpreter else {
        return Ok((content, Vec::new()));
    };
    let list = run(Command::new(&interpreter).arg("--list").arg(program), LINK)
        .map_err(|source| ProgramFileError::Libraries { path: program.to_owned(), source })?;
    let mut paths = libraries(&String::from_utf8_lossy(&list));
    paths.push(interpreter);
    paths.sort();
    paths.dedup();
    let files = paths.into_iter().map(|path| Ok((path.clone(), read(Path::new(&path))?)));
    Ok((content, files.collect::<Result<_, _>>()?))
}

/// The paths in what the dynamic linker says, such as
/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f0000000000)`.
fn libraries(list: &str) -> Vec<String> {
    let path = |line: &str| {
        let place = line.split_once("=>").map_or(line, |(_, place)| place).trim();
        let (path, _) = place.rsplit_once(" (0x")?;
        path.starts_with('/').then(|| path.to_owned())
    };
    list.lines().filter_map(path).collect()
}

/// What of an ELF file the kernel looks at.
#[derive(Debug, PartialEq, Eq)]
struct Elf {
    /// How many bytes of the file are loaded, or say what is.
    loaded: usize,
    interpreter: Option<String>,
}

impl Elf {
    /// `None` if it is no 64-bit little-endian one, or is cut off.
    fn of(file: &[u8]) -> Option<Self> {
        // Magic, 64 bits, little endian.
        if !file.starts_with(b"\x7fELF\x02\x01") || file.len() < HEADER {
            return None;
        }
        let u16_at = |at: usize| Some(u16::from_le_bytes(file.get(at..at + 2)?.try_into().ok()?));
        let u64_at = |at: usize| {
            let value = u64::from_le_bytes(file.get(at..at.checked_add(8)?)?.try_into().ok()?);
            usize::try_from(value).ok()
        };
        let (table, count) = (u64_at(32)?, usize::from(u16_at(56)?));
        if usize::from(u16_at(54)?) != ENTRY {
            return None;
        }
        let mut elf = Self { loaded: table.checked_add(count * ENTRY)?, interpreter: None };
        for entry in (0..count).map(|index| table + index * ENTRY) {
            let kind = u32::from_le_bytes(file.get(entry..entry + 4)?.try_into().ok()?);
            let (offset, size) = (u64_at(entry + 8)?, u64_at(entry + 32)?);
            let content = file.get(offset..offset.checked_add(size)?)?;
            if kind == LOAD {
                elf.loaded = elf.loaded.max(offset + size);
            }
            if kind == INTERPRETER {
                let path = content.strip_suffix(b"\0").unwrap_or(content);
                elf.interpreter = Some(std::str::from_utf8(path).ok()?.to_owned());
            }
        }
        (elf.loaded <= file.len()).then_some(elf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_packed_program_runs_and_is_smaller() {
        let this = std::env::current_exe().unwrap();
        let (content, libraries) = pack(&this).unwrap();
        assert!(content.len() < fs::read(&this).unwrap().len() / 2, "{}", content.len());
        assert!(libraries.iter().any(|(path, _)| path.contains("libc.so")), "no C library");
        let folder = tempfile::tempdir().unwrap();
        let packed = folder.path().join("program");
        fs::write(&packed, content).unwrap();
        fs::set_permissions(&packed, fs::Permissions::from_mode(0o755)).unwrap();
        let list = run(Command::new(&packed).arg("--list"), LINK).unwrap();
        assert!(String::from_utf8(list).unwrap().contains("a_packed_program_runs_and_is_smaller"));
    }

    #[test]
    fn what_is_no_program_is_refused_by_name() {
        let error = pack(Path::new("/etc/passwd")).unwrap_err();
        assert_eq!(error.to_string(), "/etc/passwd is no 64-bit ELF program");
        let error = pack(Path::new("/no/program")).unwrap_err();
        assert!(error.to_string().starts_with("/no/program: "), "{error}");
    }

    #[test]
    fn libraries_are_found_in_what_the_linker_says() {
        let list = "\tlinux-vdso.so.1 (0x00007ffe)\n\
                    \tlibgcc_s.so.1 => /lib/libgcc_s.so.1 (0x00007f01)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n";
        assert_eq!(libraries(list), ["/lib/libgcc_s.so.1", "/lib64/ld-linux-x86-64.so.2"]);
    }

    proptest! {
        #[test]
        fn no_file_is_read_beyond_its_end(
            mut bytes in proptest::collection::vec(any::<u8>(), 64..512),
            table in 0..512_u64,
            count in 0..8_u16,
        ) {
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            bytes[32..40].copy_from_slice(&table.to_le_bytes());
            bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
            bytes[56..58].copy_from_slice(&count.to_le_bytes());
            if let Some(elf) = Elf::of(&bytes) {
                prop_assert!(elf.loaded <= bytes.len());
            }
        }
    }
}
