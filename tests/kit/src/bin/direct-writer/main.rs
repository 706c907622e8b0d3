//! Stands for a device in the middle of its work: holds an exclusive lock on a file and keeps
//! `O_DIRECT` writes to all of it in flight through `io_uring`, each with other content than the
//! one before, until it is killed.
//!
//! `direct-writer FILE BLOCKS BLOCK_BYTES [PROOF]`: once the first write to each block is in flight it
//! says `ready` on standard error; what it cannot do it says there, too. With a `PROOF` the lock is on
//! that file, which is never written, and is registered with the `io_uring`.

#![deny(unsafe_code)]

mod ring;

use ring::DirectWrites;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::process::{Signal, set_parent_process_death_signal};
use standstill_protocol::channel::prefer_short_waits;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use thiserror::Error;

/// Why nothing is written.
#[derive(Debug, Error)]
enum Error {
    #[error("usage: direct-writer FILE BLOCKS BLOCK_BYTES [PROOF]")]
    Usage,
    #[error("cannot ask for a signal when the parent ends: {0}")]
    ParentDeath(#[source] rustix::io::Errno),
    #[error("{} cannot be opened (the file that is written with O_DIRECT, which its file system must support): {source}", .path.display())]
    Open { path: PathBuf, source: rustix::io::Errno },
    #[error("{} cannot be locked by flock: {source}", .path.display())]
    Lock { path: PathBuf, source: rustix::io::Errno },
    #[error(
        "io_uring is refused (the kernel must have it, and neither sysctl kernel.io_uring_disabled \
         nor a seccomp filter may forbid it): {0}"
    )]
    Ring(#[source] io::Error),
    #[error("a direct write through io_uring failed: {0}")]
    Write(#[source] io::Error),
}

#[expect(clippy::print_stderr, reason = "standard error is how it says why it ends")]
fn main() -> ExitCode {
    let Err(error) = run();
    eprintln!("direct-writer: {error}");
    ExitCode::FAILURE
}

#[expect(clippy::print_stderr, reason = "standard error is how it says that it is ready")]
fn run() -> Result<std::convert::Infallible, Error> {
    let mut arguments = std::env::args_os().skip(1);
    let path = PathBuf::from(arguments.next().ok_or(Error::Usage)?);
    let mut number = || arguments.next()?.to_str()?.parse::<u32>().ok();
    let (Some(blocks), Some(block_bytes)) = (number(), number()) else { return Err(Error::Usage) };

    // Whoever started it may be killed before it can fence.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Error::ParentDeath)?;
    // On a busy machine a killed process that waits for the CPU, so as to end, may wait longer than
    // its writes take. Refused, the test needs more attempts.
    let _ = prefer_short_waits();
    let open = |path: &PathBuf, more| {
        let file = open(path, OFlags::RDWR | OFlags::CLOEXEC | more, Mode::empty());
        file.map(File::from).map_err(|source| Error::Open { path: path.clone(), source })
    };
    let lock = |file: &File, path| {
        let locked = flock(file, FlockOperation::NonBlockingLockExclusive);
        locked.map_err(|source| Error::Lock { path, source })
    };
    let file = open(&path, OFlags::DIRECT)?;
    let proof = match arguments.next().map(PathBuf::from) {
        None => {
            lock(&file, path)?;
            None
        }
        Some(path) => {
            let proof = open(&path, OFlags::empty())?;
            lock(&proof, path)?;
            Some(proof)
        }
    };

    let mut writes =
        DirectWrites::new(file, proof.as_ref(), blocks, block_bytes).map_err(Error::Ring)?;
    let mut stamps = 1..;
    for (block, stamp) in (0..blocks).zip(&mut stamps) {
        writes.push(block, stamp).map_err(Error::Write)?;
    }
    writes.submit().map_err(Error::Write)?;
    eprintln!("ready");
    loop {
        for (block, stamp) in writes.wait().map_err(Error::Write)?.into_iter().zip(&mut stamps) {
            writes.push(block, stamp).map_err(Error::Write)?;
        }
    }
}
