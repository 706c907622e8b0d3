//! Keeps mapped memory of others out of this process's core dumps.

use rustix::io;
use rustix::mm::{Advice, madvise};
use vm_memory::MmapRegion;

/// Leaves a mapping out of core dumps: guest memory is no part of this program.
///
/// # Errors
///
/// What `madvise` says.
pub(super) fn exclude_from_core_dump(region: &MmapRegion) -> io::Result<()> {
    let start = region.as_ptr().cast();
    // SAFETY: the range is exactly one mapping, owned by `region`, which outlives the call, and
    // MADV_DONTDUMP changes neither contents nor validity of a mapping.
    unsafe { madvise(start, region.size(), Advice::LinuxDontDump) }
}
