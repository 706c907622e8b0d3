//! Which pages the device writes, for its client: `DMA_LOGGING_START`, `DMA_LOGGING_STOP` and
//! `DMA_LOGGING_REPORT`, and `DMA_UNMAP` with a bitmap.
//!
//! Each window that the device can write in mapped memory has a bitmap of its own while the client
//! logs, one bit for each page of the size that the client has chosen. Pages are counted from IOVA 0,
//! so a page may lie in two windows. A window that is mapped meanwhile is logged too. What is set
//! when a window goes stays, by IOVA, until it is reported: a client may ask after it has unmapped.
//! Windows without a file are not logged here: what is written there by messages the client knows.
//!
//! **A report takes.** A page that is reported is clear from then on. One that lies only in part in
//! the range of the report is reported and stays set, since the other part was not told.
//!
//! # Why no write is missed
//!
//! A transaction marks after it has written, with one read-modify-write of the word that holds its
//! page; a report takes with one read-modify-write of the same word. All changes of a word have one
//! order. If the mark comes first, the report takes it and, since marks release and reports acquire,
//! who reads the page after the report finds what was written before the mark (a mark of somebody
//! else in between is a read-modify-write too, and hands that on). If the report comes first, the
//! mark is there for the next one. So a mark is never left out because the bit is found set: that
//! would be a look without a place in this order. A report, however, leaves out words that it finds
//! 0: what it missed by that it has not taken either.
//!
//! Who is in the middle of a transaction when logging starts may end it without a mark:
//! [`MemoryMap::start_log`] returns when those have passed.

#![forbid(unsafe_code)]

mod report;

pub use report::Report;

use super::window::{Window, WindowSpec};
use super::{MemoryMap, UnmapError};
use nix::libc;
use report::{Bits, Part, ends, word_mask};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use thiserror::Error;
use zerocopy::FromZeros;

/// The smallest page of a log or a report, in bytes.
pub const MIN_LOG_PAGE: u64 = 4096;
/// The largest page of a log, in bytes. A report may have larger ones.
pub const MAX_LOG_PAGE: u64 = 1 << 30;
/// The most pages that are logged: 2 TiB of 4 KiB, which takes 64 MiB.
pub const MAX_LOG_PAGES: u64 = 1 << 29;
/// The most pages in one report: 512 GiB of 4 KiB, which takes 16 MiB.
pub const MAX_REPORT_PAGES: u64 = 1 << 27;

/// The most words (64 pages) of windows that are gone. If there are more, all is reported from then
/// on.
const MAX_UNMAPPED_WORDS: usize = 1 << 20;

/// A range of IOVAs whose windows are to be logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogRange {
    /// First IOVA.
    pub iova: u64,
    /// Length in bytes, not 0.
    pub length: u64,
}

/// Pages were not logged or not reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LogError {
    /// No power of two, or out of range.
    #[error(
        "pages of {0:#x} bytes cannot be logged: a power of two from {MIN_LOG_PAGE:#x} is expected, \
         to {MAX_LOG_PAGE:#x} at the start"
    )]
    PageSize(u64),
    /// A range that is empty or has no end.
    #[error("{length:#x} bytes at {iova:#x} are no range of addresses")]
    BadRange {
        /// First IOVA.
        iova: u64,
        /// Length, in bytes.
        length: u64,
    },
    /// It was started before, with another page size.
    #[error("pages of {asked:#x} bytes, but pages of {present:#x} bytes are logged already")]
    Started {
        /// What was asked for.
        asked: u64,
        /// What is logged.
        present: u64,
    },
    /// Nothing is logged.
    #[error("the log was not started")]
    NotStarted,
    /// More than [`MAX_LOG_PAGES`].
    #[error("{pages} pages to be logged, at most {MAX_LOG_PAGES} are possible")]
    TooManyPages {
        /// How many.
        pages: u64,
    },
    /// More than [`MAX_REPORT_PAGES`].
    #[error("{pages} pages in one report, at most {MAX_REPORT_PAGES} are possible")]
    LongReport {
        /// How many.
        pages: u64,
    },
    /// There is no memory for the bitmaps.
    #[error("no memory to log {pages} pages")]
    NoMemory {
        /// How many.
        pages: u64,
    },
    /// Transactions of before the start are still in flight, so that not all writes are logged.
    #[error("transactions of before the start of the log are in flight after {waited:?}")]
    Busy {
        /// How long was waited.
        waited: Duration,
    },
}

impl LogError {
    /// What to answer the client.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::PageSize(_) | Self::BadRange { .. } | Self::Started { .. } | Self::NotStarted => {
                libc::EINVAL
            }
            Self::TooManyPages { .. } => libc::ENOSPC,
            Self::LongReport { .. } => libc::E2BIG,
            Self::NoMemory { .. } => libc::ENOMEM,
            Self::Busy { .. } => libc::EBUSY,
        }
    }
}

/// A window was not unmapped, or not with its report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UnmapReportError {
    /// It was not unmapped.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
    /// Nothing can be reported of it.
    #[error(transparent)]
    Log(#[from] LogError),
}

impl UnmapReportError {
    /// What to answer the client.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Unmap(error) => error.errno(),
            Self::Log(error) => error.errno(),
        }
    }
}

/// The same ranges, ascending and apart.
fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, before| {
        let touches = next.0 <= before.1.saturating_add(1);
        before.1 = if touches { before.1.max(next.1) } else { before.1 };
        touches
    });
    ranges
}

/// What the client has asked to be logged.
#[derive(Debug)]
pub(super) struct ClientLog {
    /// A page has `1 << shift` bytes.
    shift: u32,
    /// First and last IOVAs, ascending and apart. Empty: everything.
    ranges: Vec<(u64, u64)>,
    /// In the bitmaps of all windows.
    words: u64,
    /// What was set in windows that are gone: words of 64 pages that are not 0, by number.
    unmapped: BTreeMap<u64, u64>,
    /// There was more of that than fits.
    is_full: bool,
}

impl ClientLog {
    fn new(page_size: u64, ranges: Vec<(u64, u64)>) -> Self {
        Self {
            shift: page_size.trailing_zeros(),
            ranges,
            words: 0,
            unmapped: BTreeMap::new(),
            is_full: false,
        }
    }

    fn page_size(&self) -> u64 {
        1 << self.shift
    }

    /// The same for more ranges, without what was set in windows that are gone.
    fn with_ranges(&self, mut more: Vec<(u64, u64)>) -> Self {
        let all = self.ranges.is_empty() || more.is_empty();
        more.extend(&self.ranges);
        let ranges = if all { Vec::new() } else { merged(more) };
        let (unmapped, is_full) = (BTreeMap::new(), self.is_full);
        Self { shift: self.shift, ranges, words: self.words, unmapped, is_full }
    }

    /// Whether the window is to be logged and is not yet.
    fn wants(&self, window: &Window) -> bool {
        let spec = &window.spec;
        let place = self.ranges.partition_point(|(_, last)| *last < spec.iova);
        let is_meant = self.ranges.is_empty()
            || self.ranges.get(place).is_some_and(|(first, _)| *first <= spec.last());
        is_meant && window.is_mapped() && spec.writable && window.log().is_none()
    }

    /// Whether there may be bitmaps for these windows, too.
    fn check<'a>(&self, added: impl Iterator<Item = &'a Window>) -> Result<(), LogError> {
        let words: u64 = added.map(|window| PageLog::count(self.shift, &window.spec)).sum();
        let pages = (self.words + words) * 64;
        if pages > MAX_LOG_PAGES { Err(LogError::TooManyPages { pages }) } else { Ok(()) }
    }

    /// Has a new window logged, if that was asked for.
    pub(super) fn add(&mut self, window: &Window) -> Result<(), LogError> {
        if self.wants(window) {
            self.check(std::iter::once(window))?;
            self.attach(window, PageLog::new(self.shift, &window.spec)?);
        }
        Ok(())
    }

    fn attach(&mut self, window: &Window, pages: PageLog) {
        self.words += pages.words.len() as u64;
        *window.log_mut() = Some(pages);
    }

    /// The window goes; what is set stays. If somebody still uses it, all of it counts as written.
    pub(super) fn remove(&mut self, window: &Window) {
        let Some(log) = window.log_mut().take() else { return };
        self.words -= log.words.len() as u64;
        let in_use = window.users.in_flight() > 0;
        let (first, last) = (window.spec.iova >> self.shift, window.spec.last() >> self.shift);
        for (word, bits) in (log.first_word..).zip(&log.words) {
            let all = if in_use { word_mask(word, first, last) } else { 0 };
            let bits = bits.load(Ordering::Acquire) | all;
            if bits == 0 || self.is_full {
                continue;
            }
            if self.unmapped.len() >= MAX_UNMAPPED_WORDS && !self.unmapped.contains_key(&word) {
                self.is_full = true;
                self.unmapped = BTreeMap::new();
            } else {
                *self.unmapped.entry(word).or_default() |= bits;
            }
        }
    }

    /// Takes what is set into the bitmap of a report.
    fn take(&mut self, windows: &[Arc<Window>], bits: &mut Bits<'_>) {
        if self.is_full {
            bits.set_all();
        }
        let space = Part::new(&bits.report, self.shift, 0, u64::MAX);
        let words = space.first / 64..=space.last / 64;
        let found: Vec<u64> = self.unmapped.range(words).map(|(word, _)| *word).collect();
        for word in found {
            if let Some(set) = self.unmapped.get_mut(&word) {
                bits.set(&space, word, *set & space.mask(word));
                *set &= !space.taken(word);
                if *set == 0 {
                    self.unmapped.remove(&word);
                }
            }
        }
        for window in windows {
            if let Some(log) = &*window.log() {
                let part =
                    Part::new(&bits.report, self.shift, window.spec.iova, window.spec.last());
                log.take(&part, bits);
            }
        }
    }
}

/// The pages of one window that were written: bit `n % 64` of word `n / 64` is for page `n`, counted
/// from IOVA 0.
#[derive(Debug)]
pub(super) struct PageLog {
    shift: u32,
    /// Number of the first word that is there.
    first_word: u64,
    words: Box<[AtomicU64]>,
}

impl PageLog {
    fn count(shift: u32, spec: &WindowSpec) -> u64 {
        (spec.last() >> shift) / 64 - (spec.iova >> shift) / 64 + 1
    }

    fn new(shift: u32, spec: &WindowSpec) -> Result<Self, LogError> {
        let count = Self::count(shift, spec);
        let error = LogError::NoMemory { pages: count * 64 };
        let words = usize::try_from(count).map_err(|_| error)?;
        // Pages of the allocator's that no mark touches are never there.
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(words).map_err(|_| error)?;
        Ok(Self { shift, first_word: (spec.iova >> shift) / 64, words })
    }

    /// Marks the pages of `len` bytes from that IOVA, in its window: they *have been* written.
    pub(super) fn mark(&self, iova: u64, len: u64) {
        let Some(more) = len.checked_sub(1) else { return };
        let (first, last) = (iova >> self.shift, iova.saturating_add(more) >> self.shift);
        for word in first / 64..=last / 64 {
            if let Some(bits) = self.word(word) {
                bits.fetch_or(word_mask(word, first, last), Ordering::AcqRel);
            }
        }
    }

    fn take(&self, part: &Part, bits: &mut Bits<'_>) {
        if part.is_empty() {
            return;
        }
        for number in part.first / 64..=part.last / 64 {
            let Some(word) = self.word(number) else { continue };
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let taken = part.taken(number);
            let set = word.fetch_and(!taken, Ordering::AcqRel) & part.mask(number);
            bits.set(part, number, set);
        }
    }

    fn word(&self, number: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(number.checked_sub(self.first_word)?).ok()?)
    }
}

impl MemoryMap {
    /// Starts to log which pages of `page_size` bytes the device writes, in the windows that touch
    /// one of the ranges, those to come too; without ranges, in all. Such a window is logged as a
    /// whole. Returns when no transaction of before is in flight, at most after `timeout`; blocks
    /// the calling OS thread.
    ///
    /// If it was started before with the same page size, the ranges are added, and what is set
    /// stays.
    ///
    /// # Errors
    ///
    /// [`LogError`]; if it was not started before, it is not now.
    pub fn start_log(
        &self,
        page_size: u64,
        ranges: &[LogRange],
        timeout: Duration,
    ) -> Result<(), LogError> {
        if !page_size.is_power_of_two() || !(MIN_LOG_PAGE..=MAX_LOG_PAGE).contains(&page_size) {
            return Err(LogError::PageSize(page_size));
        }
        let asked: Result<Vec<_>, _> =
            ranges.iter().map(|range| ends(range.iova, range.length)).collect();
        let asked = merged(asked?);
        let mut changes = self.shared.changes();
        let mut log = match &changes.log {
            Some(log) if log.page_size() != page_size => {
                return Err(LogError::Started { asked: page_size, present: log.page_size() });
            }
            Some(log) => log.with_ranges(asked),
            None => ClientLog::new(page_size, asked),
        };
        let is_new = changes.log.is_none();
        let windows = self.shared.windows().clone();
        let added: Vec<_> = windows.into_iter().filter(|window| log.wants(window)).collect();
        log.check(added.iter().map(|window| &**window))?;
        let logs: Result<Vec<_>, _> =
            added.iter().map(|window| PageLog::new(log.shift, &window.spec)).collect();
        // From here on nothing can fail but the wait.
        for (window, pages) in added.iter().zip(logs?) {
            log.attach(window, pages);
        }
        if let Some(old) = &mut changes.log {
            log.unmapped = std::mem::take(&mut old.unmapped);
        }
        changes.log = Some(log);
        self.shared.dirty.set_client(true);
        drop(changes);
        if added.is_empty() || self.shared.gate.passed_within(timeout) {
            return Ok(());
        }
        if is_new {
            self.stop_log();
        }
        Err(LogError::Busy { waited: timeout })
    }

    /// Logs no more and forgets what is set. Does nothing if it was not started.
    pub fn stop_log(&self) {
        let mut changes = self.shared.changes();
        self.shared.dirty.set_client(false);
        for window in self.shared.windows().iter() {
            window.log_mut().take();
        }
        changes.log = None;
    }

    /// Size of the pages that are logged, in bytes; `None` if none are.
    #[must_use]
    pub fn log_page_size(&self) -> Option<u64> {
        self.shared.changes().log.as_ref().map(ClientLog::page_size)
    }

    /// Which pages of a range were written since they were reported the last time: bit `n % 64` of
    /// word `n / 64` is for page `n` of the report, and bits behind the last page are 0. What is
    /// reported is clear from then on, except in pages of the log that lie only in part in the
    /// range. Where no window is, and in windows that are not logged, nothing was written.
    ///
    /// A page of the report is set if anything in it was, as far as the log tells pages apart.
    ///
    /// # Errors
    ///
    /// [`LogError::NotStarted`].
    pub fn report(&self, report: &Report) -> Result<Vec<u64>, LogError> {
        let mut changes = self.shared.changes();
        let log = changes.log.as_mut().ok_or(LogError::NotStarted)?;
        let windows = self.shared.windows_in(report.first, report.last);
        let words = usize::try_from(report.pages().div_ceil(64));
        let mut words = vec![0; words.unwrap_or(0)];
        log.take(&windows, &mut Bits { report: *report, words: &mut words });
        Ok(words)
    }

    /// As [`unmap`](Self::unmap), and reports what was written in the window, in pages of
    /// `page_size` bytes.
    ///
    /// # Errors
    ///
    /// [`UnmapReportError`]; the window is there and can be used as before.
    pub fn unmap_reported(
        &self,
        iova: u64,
        size: u64,
        page_size: u64,
        timeout: Duration,
    ) -> Result<Vec<u64>, UnmapReportError> {
        let report = Report::new(iova, size, page_size)?;
        if self.log_page_size().is_none() {
            return Err(LogError::NotStarted.into());
        }
        let window = self.drain(iova, size, timeout)?;
        // Nobody marks there any more.
        let result = self.report(&report);
        match &result {
            Ok(_) => self.remove(&[window]),
            Err(_) => drop(window.users.open()),
        }
        Ok(result?)
    }
}
