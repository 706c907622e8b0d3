//! Numbers out of bytes and back, in the machine's byte order.

use super::error::WireError;

/// Takes a body apart from its beginning.
pub(super) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
    taken: usize,
}

impl<'a> Reader<'a> {
    /// `what` names the message in errors.
    pub(super) fn new(what: &'static str, body: &'a [u8]) -> Self {
        Self { what, rest: body, taken: 0 }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let Some((taken, rest)) = self.rest.split_first_chunk() else {
            return Err(self.short(N));
        };
        self.rest = rest;
        self.taken += N;
        Ok(*taken)
    }

    fn short(&self, more: usize) -> WireError {
        WireError::Short {
            what: self.what,
            length: self.taken + self.rest.len(),
            needed: self.taken.saturating_add(more),
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_ne_bytes)
    }

    /// So many bytes.
    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            return Err(self.short(count));
        };
        self.rest = rest;
        self.taken += count;
        Ok(taken)
    }

    /// All that is left.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

/// Puts numbers at the end of a buffer.
pub(super) trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    #[inline]
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_ne_bytes());
    }

    #[inline]
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_ne_bytes());
    }

    #[inline]
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_ne_bytes());
    }
}

/// A size that was made here, as it travels. Nothing that is sent is longer than 4 GiB.
pub(super) fn size_u32(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// Refuses an `argsz` below `needed`.
pub(super) fn check_argsz(what: &'static str, argsz: u32, needed: u64) -> Result<(), WireError> {
    if u64::from(argsz) < needed { Err(WireError::Argsz { what, argsz, needed }) } else { Ok(()) }
}

/// Refuses ranges of addresses that are empty or reach beyond the last address.
pub(super) fn check_range(what: &'static str, start: u64, size: u64) -> Result<(), WireError> {
    // The last byte has an address; the one after it need not have one.
    match size.checked_sub(1).and_then(|more| start.checked_add(more)) {
        Some(_) => Ok(()),
        None => Err(WireError::Range { what, start, size }),
    }
}
