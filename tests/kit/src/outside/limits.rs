//! Too little of something: a limit on a running process, by `prlimit(2)`.
//!
//! What a device process of our runtime does about each is in `docs/testkit.md`.
//!
//! ```
//! use rustix::process::{Pid, getpid};
//! use standstill_testkit::plan::{Limit, Resource};
//!
//! // No core dumps, no locked memory: for this process.
//! Limit { resource: Resource::LockedMemory, value: 0 }.impose(getpid())?;
//! # Ok::<_, std::io::Error>(())
//! ```

use crate::plan::{Limit, Resource};
use rustix::process::{Pid, Resource as Kernel, Rlimit, prlimit};
use std::io;

impl Limit {
    /// Lets a running process have no more than that; what it has already stays. The limit before.
    ///
    /// # Errors
    ///
    /// Those of `prlimit(2)`: `EPERM` for a process of another user or to raise a limit, `ESRCH` for
    /// one that is gone.
    pub fn impose(self, process: Pid) -> io::Result<Option<u64>> {
        let resource = match self.resource {
            Resource::AddressSpace => Kernel::As,
            Resource::Data => Kernel::Data,
            Resource::Files => Kernel::Nofile,
            Resource::Processes => Kernel::Nproc,
            Resource::FileSize => Kernel::Fsize,
            Resource::LockedMemory => Kernel::Memlock,
        };
        let limit = Rlimit { current: Some(self.value), maximum: Some(self.value) };
        Ok(prlimit(Some(process), resource, limit)?.current)
    }
}
