//! What a device process says of itself in every `Hello`.

use rustix::fs::{Mode, OFlags, open};
use standstill_protocol::message::{
    Capabilities, Epoch, FileIdentity, Hello, MAX_FDS, Term, VERSIONS,
};
use standstill_protocol::migration::MigrationState;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use uuid::Uuid;

/// What stays the same for as long as the process lives.
#[derive(Debug)]
pub(crate) struct Introduction {
    pub(crate) kind: String,
    pub(crate) program_version: String,
    pub(crate) capabilities: Capabilities,
    /// The files behind the device's memory BARs.
    pub(crate) memory: Vec<FileIdentity>,
    /// Kept, and with them their locks, until the process ends; at most [`MAX_FDS`].
    pub(crate) backing_files: Vec<OwnedFd>,
}

/// What differs from one `Hello` to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) machine: Option<Uuid>,
    pub(crate) term: Term,
    pub(crate) epoch: Epoch,
    pub(crate) state: MigrationState,
}

impl Facts {
    /// Those of a device that nobody has welcomed yet.
    pub(crate) const AT_FIRST: Self =
        Self { machine: None, term: Term(0), epoch: Epoch(0), state: MigrationState::Running };
}

impl Introduction {
    /// The message, and the fds that go with it.
    pub(crate) fn hello(&self, facts: Facts) -> io::Result<(Hello, Vec<OwnedFd>)> {
        debug_assert!(self.backing_files.len() <= MAX_FDS);
        let files = self.backing_files.iter().map(reopen).collect::<io::Result<Vec<_>>>()?;
        let Facts { machine, term, epoch, state } = facts;
        let hello = Hello {
            versions: VERSIONS,
            kind: self.kind.clone(),
            program_version: self.program_version.clone(),
            capabilities: self.capabilities,
            machine,
            term,
            epoch,
            state,
            backing_files: u8::try_from(files.len()).unwrap_or(u8::MAX),
            memory: self.memory.clone(),
        };
        Ok((hello, files))
    }
}

/// The same file through an open file description of its own: the coordinator takes the lock
/// through it as proof that this process and all its requests are gone, so it must not share ours.
fn reopen(file: &OwnedFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(open(path, flags, Mode::empty())?)
}
