//! What a report says: the arithmetic between the pages of a log and those of a report.

#![forbid(unsafe_code)]

use super::{LogError, MAX_REPORT_PAGES, MIN_LOG_PAGE};

/// What a report is to say: for which range of IOVAs, in pages of which size.
///
/// ```
/// use standstill_device_proc::memory::Report;
///
/// let report = Report::new(0x1000_0000, 0x10_0000, 4096).expect("acceptable");
/// assert_eq!((report.pages(), report.bytes()), (256, 32));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub(super) first: u64,
    pub(super) last: u64,
    /// Its page has `1 << shift` bytes.
    shift: u32,
}

impl Report {
    /// For `length` bytes from `iova` in pages of `page_size` bytes, a power of two. The pages are
    /// counted from `iova`, which need not be a multiple of anything; the last one may be incomplete.
    ///
    /// # Errors
    ///
    /// [`LogError`] for an impossible range, page size or length of the report.
    pub fn new(iova: u64, length: u64, page_size: u64) -> Result<Self, LogError> {
        if !page_size.is_power_of_two() || page_size < MIN_LOG_PAGE {
            return Err(LogError::PageSize(page_size));
        }
        let (first, last) = ends(iova, length)?;
        let report = Self { first, last, shift: page_size.trailing_zeros() };
        let pages = report.pages();
        if pages > MAX_REPORT_PAGES {
            return Err(LogError::LongReport { pages });
        }
        Ok(report)
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(self) -> u64 {
        ((self.last - self.first) >> self.shift) + 1
    }

    /// Size of its bitmap in bytes: whole words of 64 bits.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.pages().div_ceil(64) * 8
    }
}

/// First and last IOVA of a range.
pub(super) fn ends(iova: u64, length: u64) -> Result<(u64, u64), LogError> {
    let last = length.checked_sub(1).and_then(|more| iova.checked_add(more));
    Ok((iova, last.ok_or(LogError::BadRange { iova, length })?))
}

/// Which pages of a log a report is about, within a range of IOVAs that has a log.
pub(super) struct Part {
    /// IOVAs that both have in common; none if the first one is behind the last.
    from: u64,
    to: u64,
    /// A page of the log has `1 << shift` bytes.
    shift: u32,
    /// Pages that have a byte in common with both.
    pub(super) first: u64,
    pub(super) last: u64,
    /// Of these, the pages whose bytes in the log's range all lie in the report's: they are taken.
    first_taken: u64,
    last_taken: u64,
}

impl Part {
    pub(super) fn new(report: &Report, shift: u32, begin: u64, end: u64) -> Self {
        let (from, to) = (report.first.max(begin), report.last.min(end));
        let (first, last) = (from >> shift, to >> shift);
        let page_begin = (first << shift).max(begin);
        let page_end = ((last << shift) | ((1 << shift) - 1)).min(end);
        let first_taken = first + u64::from(page_begin < report.first);
        // With nothing before it, there is nothing to take.
        let (last_taken, first_taken) = match last.checked_sub(u64::from(page_end > report.last)) {
            Some(last_taken) => (last_taken, first_taken),
            None => (0, 1),
        };
        Self { from, to, shift, first, last, first_taken, last_taken }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.from > self.to
    }

    pub(super) fn mask(&self, word: u64) -> u64 {
        word_mask(word, self.first, self.last)
    }

    pub(super) fn taken(&self, word: u64) -> u64 {
        word_mask(word, self.first_taken, self.last_taken)
    }
}

/// The bitmap of a report.
pub(super) struct Bits<'a> {
    pub(super) report: Report,
    pub(super) words: &'a mut [u64],
}

impl Bits<'_> {
    fn or(&mut self, word: u64, bits: u64) {
        if let Some(into) = usize::try_from(word).ok().and_then(|at| self.words.get_mut(at)) {
            *into |= bits;
        }
    }

    /// Sets these pages of the report.
    fn set_pages(&mut self, first: u64, last: u64) {
        for word in first / 64..=last / 64 {
            self.or(word, word_mask(word, first, last));
        }
    }

    pub(super) fn set_all(&mut self) {
        self.set_pages(0, self.report.pages() - 1);
    }

    /// Sets the pages of the report that those of one word of a log have a byte in common with.
    pub(super) fn set(&mut self, part: &Part, word: u64, mut set: u64) {
        let (first, shift) = (self.report.first, self.report.shift);
        if shift == part.shift && first.trailing_zeros() >= shift {
            // Bit for bit; those before the first page of the report are not set.
            let (base, at) = (first >> shift, word * 64);
            let Some(to) = at.checked_sub(base) else {
                return self.or(0, set >> (base - at).min(63));
            };
            self.or(to / 64, set << (to % 64));
            if to % 64 != 0 {
                self.or(to / 64 + 1, set >> (64 - to % 64));
            }
            return;
        }
        while set != 0 {
            let page = word * 64 + u64::from(set.trailing_zeros());
            set &= set - 1;
            let begin = page << part.shift;
            let end = begin | ((1 << part.shift) - 1);
            let (begin, end) = (begin.max(part.from), end.min(part.to));
            let bit = (end - first) >> shift;
            self.set_pages((begin - first) >> shift, bit);
            // What else begins in that page of the report would set it once more.
            let next = (bit + 1).checked_mul(1 << shift).and_then(|at| at.checked_add(first));
            let next = next.map_or(u64::MAX, |at| (at >> part.shift).saturating_sub(word * 64));
            set &= if next < 64 { u64::MAX << next } else { 0 };
        }
    }
}

/// The bits `first..=last` of a bitmap that fall into one of its words.
pub(super) fn word_mask(word: u64, first: u64, last: u64) -> u64 {
    let (begin, end) = (word * 64, word * 64 + 63);
    if first > last || last < begin || first > end {
        return 0;
    }
    let (low, high) = (first.max(begin) - begin, last.min(end) - begin);
    (u64::MAX << low) & (u64::MAX >> (63 - high))
}
