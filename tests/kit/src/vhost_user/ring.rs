//! The driver's side of one split ring: virtio 1.3, section 2.7.

use super::error::VhostUserError;
use super::guest::{Completion, Part, RequestId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{Ordering, fence};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Rings and the parts of one begin at multiples of this.
const PAGE: u64 = 4096;
/// What writable buffers have in them before the device has written to them.
const UNTOUCHED: u8 = 0xee;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
/// A device that has this in its used ring wants no kicks.
const NO_NOTIFY: u16 = 1;

/// How large rings are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptors of each ring: a power of two, at most 32768.
    pub descriptors: u16,
    /// Size of the buffer that each descriptor has, in bytes, at least 1: the most that one part of a
    /// request can have.
    pub buffer: u32,
}

impl Default for RingLayout {
    /// 16 descriptors with 512 bytes each.
    fn default() -> Self {
        Self { descriptors: 16, buffer: 512 }
    }
}

impl RingLayout {
    /// Size of guest memory with that many rings, in bytes.
    #[must_use]
    pub fn size(&self, queues: usize) -> u64 {
        (queues as u64).saturating_mul(self.place(0).size)
    }

    pub(super) fn is_possible(&self, queues: usize) -> bool {
        let descriptors = self.descriptors.is_power_of_two() && self.descriptors <= 1 << 15;
        descriptors && self.buffer > 0 && (1..=64).contains(&queues)
    }

    /// Where the ring of a queue is.
    pub(super) fn place(&self, queue: usize) -> RingPlace {
        let pages = |bytes: u64| bytes.div_ceil(PAGE) * PAGE;
        let descriptors = u64::from(self.descriptors);
        // Each with the index at which its reader wants to hear of it.
        let avail = pages(16 * descriptors);
        let used = avail + pages(6 + 2 * descriptors);
        let buffers = used + pages(6 + 8 * descriptors);
        let size = buffers + pages(descriptors * u64::from(self.buffer));
        let base = queue as u64 * size;
        RingPlace {
            descriptors: base,
            avail: base + avail,
            used: base + used,
            buffers: base + buffers,
            size,
        }
    }
}

/// Where the parts of a ring are: guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    /// The buffers of the descriptors, in their order.
    pub buffers: u64,
    /// How much memory all of it has, in bytes.
    pub size: u64,
}

/// What a driver knows of its ring.
#[derive(Clone, Debug)]
pub(super) struct Ring {
    queue: usize,
    layout: RingLayout,
    pub(super) place: RingPlace,
    /// Whether device and driver say at which index they want to hear of each other.
    pub(super) event_idx: bool,
    /// Index of the available ring.
    pub(super) avail: u16,
    /// How far the available ring was told to the device.
    told: u16,
    /// How far the used ring was read.
    seen: u16,
    pushed: u64,
    free: VecDeque<u16>,
    /// Requests that the device has, by their first descriptor.
    outstanding: BTreeMap<u16, Outstanding>,
    /// Those that were read from the used ring and that nobody has asked for.
    pub(super) kept: Vec<Completion>,
}

#[derive(Clone, Debug)]
struct Outstanding {
    request: RequestId,
    descriptors: Vec<u16>,
    /// Addresses and lengths of what the device may write to.
    writable: Vec<(u64, usize)>,
}

fn memory(error: GuestMemoryError) -> VhostUserError {
    VhostUserError::Memory(error.into())
}

impl Ring {
    pub(super) fn new(queue: usize, layout: RingLayout) -> Self {
        Self {
            queue,
            layout,
            place: layout.place(queue),
            event_idx: false,
            avail: 0,
            told: 0,
            seen: 0,
            pushed: 0,
            free: (0..layout.descriptors).collect(),
            outstanding: BTreeMap::new(),
            kept: Vec::new(),
        }
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// The index that the device has published.
    pub(super) fn used(&self, guest: &GuestMemoryMmap) -> Result<u16, VhostUserError> {
        load(guest, self.place.used + 2)
    }

    /// Puts a request into the available ring.
    pub(super) fn push(
        &mut self,
        guest: &GuestMemoryMmap,
        parts: &[Part<'_>],
    ) -> Result<RequestId, VhostUserError> {
        let most = self.layout.buffer;
        let too_long = |length| VhostUserError::Length { length, most };
        let lengths = parts.iter().map(|part| u32::try_from(part.len()));
        let lengths: Vec<_> = lengths.map(|length| length.unwrap_or(u32::MAX)).collect();
        if let Some(part) = parts.iter().find(|part| part.len() > most as usize) {
            return Err(too_long(part.len()));
        }
        if parts.is_empty() {
            return Err(too_long(0));
        }
        if parts.len() > self.free.len() {
            let (free, needed) = (self.free.len(), parts.len());
            return Err(VhostUserError::Full { queue: self.queue, free, needed });
        }
        let descriptors: Vec<_> = self.free.drain(..parts.len()).collect();
        let mut writable = Vec::new();
        for (number, ((part, length), &own)) in
            parts.iter().zip(lengths).zip(&descriptors).enumerate()
        {
            let address = self.place.buffers + u64::from(own) * u64::from(most);
            let mut flags = 0;
            match part {
                Part::Readable(bytes) => write(guest, bytes, address)?,
                Part::Writable(length) => {
                    write(guest, &vec![UNTOUCHED; *length], address)?;
                    writable.push((address, *length));
                    flags |= WRITABLE;
                }
            }
            let next = descriptors.get(number + 1).copied();
            flags |= if next.is_some() { NEXT } else { 0 };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&length.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
            write(guest, &bytes, self.place.descriptors + 16 * u64::from(own))?;
        }
        let head = descriptors[0];
        let slot = u64::from(self.avail % self.layout.descriptors);
        write(guest, &head.to_le_bytes(), self.place.avail + 4 + 2 * slot)?;
        self.avail = self.avail.wrapping_add(1);
        let request = RequestId { queue: self.queue, number: self.pushed };
        self.pushed += 1;
        self.outstanding.insert(head, Outstanding { request, descriptors, writable });
        let index = GuestAddress(self.place.avail + 2);
        guest.store(self.avail.to_le(), index, Ordering::Release).map_err(memory)?;
        Ok(request)
    }

    /// Whether the device wants to be told of what was pushed since this was asked last.
    pub(super) fn wants_kick(&mut self, guest: &GuestMemoryMmap) -> Result<bool, VhostUserError> {
        // Before it is read what the device wants, it must be able to see what was pushed.
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.avail);
        self.told = new;
        if self.event_idx {
            let slots = 8 * u64::from(self.layout.descriptors);
            let event = load(guest, self.place.used + 4 + slots)?;
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        let flags = load(guest, self.place.used)?;
        Ok(old != new && flags & NO_NOTIFY == 0)
    }

    /// Asks for a signal when anything is used that was not seen yet.
    pub(super) fn want_signal(&self, guest: &GuestMemoryMmap) -> Result<(), VhostUserError> {
        if !self.event_idx {
            return Ok(());
        }
        let slots = 2 * u64::from(self.layout.descriptors);
        write(guest, &self.seen.to_le_bytes(), self.place.avail + 4 + slots)?;
        // Before the index is read once more.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Reads what the device has used since the last time; how many requests.
    pub(super) fn collect(&mut self, guest: &GuestMemoryMmap) -> Result<usize, VhostUserError> {
        let used = self.used(guest)?;
        let new = usize::from(used.wrapping_sub(self.seen));
        if new > self.outstanding.len() {
            let (seen, made) = (self.seen, self.outstanding.len());
            let text = format!("its index goes from {seen} to {used}, and it has {made} requests");
            return Err(self.broken(text));
        }
        for _ in 0..new {
            let slot = u64::from(self.seen % self.layout.descriptors);
            let mut entry = [0; 8];
            let at = GuestAddress(self.place.used + 4 + 8 * slot);
            guest.read_slice(&mut entry, at).map_err(memory)?;
            let [a, b, c, d, e, f, g, h] = entry;
            let (head, written) =
                (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            let known = u16::try_from(head).ok().and_then(|head| self.outstanding.remove(&head));
            let Some(Outstanding { request, descriptors, writable }) = known else {
                let seen = self.seen;
                let text = format!("the entry of index {seen} is {head}, which it does not have");
                return Err(self.broken(text));
            };
            self.seen = self.seen.wrapping_add(1);
            let mut data = Vec::new();
            for (address, length) in writable {
                let mut bytes = vec![0; length];
                guest.read_slice(&mut bytes, GuestAddress(address)).map_err(memory)?;
                data.push(bytes);
            }
            self.free.extend(descriptors);
            self.kept.push(Completion { request, written, data });
        }
        Ok(new)
    }

    fn broken(&self, what: String) -> VhostUserError {
        VhostUserError::Used { queue: self.queue, what }
    }
}

fn write(guest: &GuestMemoryMmap, bytes: &[u8], at: u64) -> Result<(), VhostUserError> {
    guest.write_slice(bytes, GuestAddress(at)).map_err(memory)
}

fn load(guest: &GuestMemoryMmap, at: u64) -> Result<u16, VhostUserError> {
    guest.load::<u16>(GuestAddress(at), Ordering::Acquire).map(u16::from_le).map_err(memory)
}
