//! Who wants to know which pages the device writes: coordinators, and the [client](super::log).
//!
//! For a coordinator a [`DirtyBitmap`] is attached to a file; from then on every transaction marks, when it ends, the
//! pages of that file that it had named to be written. Several may be attached at the same time, to
//! different files or the same, each for a reader of its own.
//!
//! A transaction that was begun before a bitmap was attached may end without marking in it: what it
//! has written is visible once everything that was in flight then has
//! [passed](crate::gate::Gate::passed).

#![forbid(unsafe_code)]

use super::window::Window;
use standstill_protocol::dirty::DirtyBitmap;
use standstill_protocol::message::FileIdentity;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Of [`DirtyLogs::readers`]: bitmaps are attached.
const COORDINATOR: u8 = 1;
/// Of [`DirtyLogs::readers`]: the client logs.
const CLIENT: u8 = 2;

/// What those who want to know have asked of one IOVA map.
#[derive(Debug, Default)]
pub(super) struct DirtyLogs {
    /// Who there is: what a transaction looks at.
    readers: AtomicU8,
    /// The bitmaps that are attached. Their reader is told with this in hand.
    logs: RwLock<Vec<(FileIdentity, Arc<DirtyBitmap>)>>,
}

impl DirtyLogs {
    /// From now on writes to the file are marked in it.
    pub(super) fn attach(&self, file: FileIdentity, bitmap: Arc<DirtyBitmap>) {
        let mut logs = self.logs.write().unwrap_or_else(PoisonError::into_inner);
        logs.push((file, bitmap));
        self.tell(COORDINATOR, true);
    }

    /// Lets go of a bitmap.
    pub(super) fn detach(&self, bitmap: &Arc<DirtyBitmap>) {
        let mut logs = self.logs.write().unwrap_or_else(PoisonError::into_inner);
        logs.retain(|(_, attached)| !Arc::ptr_eq(attached, bitmap));
        self.tell(COORDINATOR, !logs.is_empty());
    }

    /// Whether the client logs; its marks are in the windows.
    pub(super) fn set_client(&self, is_there: bool) {
        self.tell(CLIENT, is_there);
    }

    fn tell(&self, reader: u8, is_there: bool) {
        if is_there {
            self.readers.fetch_or(reader, Ordering::Release);
        } else {
            self.readers.fetch_and(!reader, Ordering::Release);
        }
    }

    /// Whether a transaction has to mark what it wrote.
    pub(super) fn any(&self) -> bool {
        // Who has begun after a reader came and its turn has come sees it: see the module.
        self.readers.load(Ordering::Acquire) != 0
    }

    /// Marks written ranges: window, offset in it and length, in bytes.
    pub(super) fn mark<'a>(&self, written: impl Iterator<Item = (&'a Window, u64, u64)> + Clone) {
        let readers = self.readers.load(Ordering::Acquire);
        if readers & COORDINATOR != 0 {
            let logs = self.logs.read().unwrap_or_else(PoisonError::into_inner);
            for (window, offset, len) in written.clone() {
                for (_, bitmap) in logs.iter().filter(|(file, _)| Some(*file) == window.file) {
                    bitmap.mark(window.spec.offset + offset, len);
                }
            }
        }
        if readers & CLIENT != 0 {
            for (window, offset, len) in written {
                window.mark(offset, len);
            }
        }
    }
}
