//! Who wants to know which pages the device writes.
//!
//! A [`DirtyBitmap`] is attached to a file; from then on every transaction marks, when it ends, the
//! pages of that file that it had named to be written. Several may be attached at the same time, to
//! different files or the same, each for a reader of its own.
//!
//! A transaction that was begun before a bitmap was attached may end without marking in it: what it
//! has written is visible once everything that was in flight then has
//! [passed](crate::gate::Gate::passed).

#![forbid(unsafe_code)]

use standstill_protocol::dirty::DirtyBitmap;
use standstill_protocol::message::FileIdentity;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// The bitmaps that are attached to one IOVA map.
#[derive(Debug, Default)]
pub(super) struct DirtyLogs {
    /// Whether there are any: what a transaction looks at.
    any: AtomicBool,
    logs: RwLock<Vec<(FileIdentity, Arc<DirtyBitmap>)>>,
}

impl DirtyLogs {
    /// From now on writes to the file are marked in it.
    pub(super) fn attach(&self, file: FileIdentity, bitmap: Arc<DirtyBitmap>) {
        let mut logs = self.logs.write().unwrap_or_else(PoisonError::into_inner);
        logs.push((file, bitmap));
        self.any.store(true, Ordering::Release);
    }

    /// Lets go of a bitmap.
    pub(super) fn detach(&self, bitmap: &Arc<DirtyBitmap>) {
        let mut logs = self.logs.write().unwrap_or_else(PoisonError::into_inner);
        logs.retain(|(_, attached)| !Arc::ptr_eq(attached, bitmap));
        self.any.store(!logs.is_empty(), Ordering::Release);
    }

    /// Whether a transaction has to mark what it wrote.
    pub(super) fn any(&self) -> bool {
        // Who has begun after a bitmap was attached and its turn has come sees it: see the module.
        self.any.load(Ordering::Acquire)
    }

    /// Marks written ranges: file, offset in it and length, in bytes.
    pub(super) fn mark(&self, written: impl Iterator<Item = (FileIdentity, u64, u64)>) {
        let logs = self.logs.read().unwrap_or_else(PoisonError::into_inner);
        for (file, offset, len) in written {
            for (_, bitmap) in logs.iter().filter(|(of, _)| *of == file) {
                bitmap.mark(offset, len);
            }
        }
    }
}
