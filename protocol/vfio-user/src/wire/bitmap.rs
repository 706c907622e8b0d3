//! Which pages are dirty, one bit each.

use super::bytes::check_range;
use super::error::WireError;

/// The pages of a range of addresses that were written to.
///
/// Travels as words of 64 bits: the lowest bit of the first one is the page at the beginning of the
/// range. Bits beyond the range are 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    iova: u64,
    page_size: u64,
    pages: u64,
    words: Vec<u64>,
}

/// How many bytes the bitmap of a range has: one bit for each page, in whole words of 8 bytes.
/// `page_size` is not 0.
#[must_use]
pub fn bitmap_size(size: u64, page_size: u64) -> u64 {
    size.div_ceil(page_size.max(1)).div_ceil(64).saturating_mul(8)
}

/// Refuses a range or a page size that no bitmap can have.
pub(super) fn check_pages(
    what: &'static str,
    iova: u64,
    size: u64,
    page_size: u64,
) -> Result<(), WireError> {
    if !page_size.is_power_of_two() {
        return Err(WireError::Field { what, field: "page_size", value: page_size });
    }
    check_range(what, iova, size)
}

impl PageBitmap {
    /// For `size` bytes from `iova`, with no page there yet: they are [appended](Self::append).
    pub(crate) fn empty(iova: u64, size: u64, page_size: u64) -> Result<Self, WireError> {
        check_pages("bitmap", iova, size, page_size)?;
        Ok(Self { iova, page_size, pages: 0, words: Vec::new() })
    }

    /// Appends the bits of the next `size` bytes. What is there has to be whole words.
    pub(crate) fn append(&mut self, size: u64, bytes: &[u8]) {
        let (words, _) = bytes.as_chunks();
        self.words.extend(words.iter().map(|word| u64::from_ne_bytes(*word)));
        let pages = size.div_ceil(self.page_size);
        self.pages = self.pages.saturating_add(pages);
        // Who sends bits beyond the range means nothing by them.
        if let (Some(last), used @ 1..) = (self.words.last_mut(), pages % 64) {
            *last &= (1 << used) - 1;
        }
    }

    /// For `size` bytes from `iova`, with no page dirty.
    ///
    /// # Errors
    ///
    /// [`WireError`] if the page size is no power of two, or the range is empty or reaches beyond
    /// the last address. The bitmap is allocated: bound the size first.
    pub fn new(iova: u64, size: u64, page_size: u64) -> Result<Self, WireError> {
        const WHAT: &str = "bitmap";
        check_pages(WHAT, iova, size, page_size)?;
        let words = bitmap_size(size, page_size) / 8;
        let too_long = WireError::TooLong { what: WHAT, count: words, limit: u64::from(u32::MAX) };
        let words = u32::try_from(words).ok().and_then(|words| usize::try_from(words).ok());
        let words = vec![0; words.ok_or(too_long)?];
        Ok(Self { iova, page_size, pages: size.div_ceil(page_size), words })
    }

    /// Takes over the bits of a reply, which has to have the right length.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`WireError::DataLength`].
    pub fn from_bytes(
        iova: u64,
        size: u64,
        page_size: u64,
        bytes: &[u8],
    ) -> Result<Self, WireError> {
        const WHAT: &str = "bitmap";
        check_pages(WHAT, iova, size, page_size)?;
        let count = bitmap_size(size, page_size);
        if u64::try_from(bytes.len()) != Ok(count) {
            return Err(WireError::DataLength { what: WHAT, length: bytes.len(), count });
        }
        let mut bitmap = Self::empty(iova, size, page_size)?;
        bitmap.append(size, bytes);
        Ok(bitmap)
    }

    /// Appends the bits, as they travel.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(self.words.len().saturating_mul(8));
        for word in &self.words {
            out.extend_from_slice(&word.to_ne_bytes());
        }
    }

    /// The first address.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Size of a page, in bytes; a power of two.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// How many pages there are, dirty or not. The last one may be incomplete.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The bits, 64 pages in each word, the first page lowest.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Marks the page with that number, counted from the beginning of the range. Pages beyond the
    /// range are none.
    pub fn mark(&mut self, page: u64) {
        if page < self.pages {
            let word = usize::try_from(page / 64).ok().and_then(|at| self.words.get_mut(at));
            if let Some(word) = word {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// How many pages are dirty.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the page with this address is dirty; false for addresses outside the range.
    #[must_use]
    pub fn is_dirty(&self, iova: u64) -> bool {
        let Some(page) = iova.checked_sub(self.iova).map(|offset| offset / self.page_size) else {
            return false;
        };
        let word = usize::try_from(page / 64).ok().and_then(|at| self.words.get(at));
        word.is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// The addresses of all dirty pages, in order.
    pub fn dirty(&self) -> impl Iterator<Item = u64> + '_ {
        (0..).zip(&self.words).filter(|(_, word)| **word != 0).flat_map(move |(at, word)| {
            let bits = (0..64_u64).filter(move |bit| word >> bit & 1 != 0);
            bits.map(move |bit| self.iova.wrapping_add((at * 64 + bit) * self.page_size))
        })
    }
}
