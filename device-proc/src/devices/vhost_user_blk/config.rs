//! The configuration space: `struct virtio_blk_config` of the virtio specification, section 5.2.4.

#![forbid(unsafe_code)]

use super::SECTOR;
use super::request::{MAX_RANGE_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Length of the fields that there are, up to `zoned`, in bytes; all beyond it reads as 0.
const LEN: usize = 72;
/// The most data segments of a request that a driver is told to make: with header and status they
/// fit into a ring of 128 descriptors, the smallest in wide use.
const SEG_MAX: u32 = 126;

/// What a driver finds there, all of which it can only read.
///
/// A driver can flush (`VIRTIO_BLK_F_FLUSH`) but not choose the cache mode (`VIRTIO_BLK_F_CONFIG_WCE`).
/// What it had chosen would be lost with the process, in a live migration and, since QEMU tells it only
/// when it changes, in a reboot of the guest; and a guest that believes in writethrough sends no flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConfigSpace {
    /// Size of the disk in bytes, a multiple of `block`.
    pub(super) size: u64,
    /// Size of a logical block in bytes, a power of two of at least 512.
    pub(super) block: u32,
    /// Number of request queues.
    pub(super) queues: u16,
    /// Whether nothing can be written.
    pub(super) read_only: bool,
}

impl ConfigSpace {
    /// The device's own feature bits.
    pub(super) fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        if self.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    /// `len` bytes at `offset`; what lies beyond the fields is 0.
    pub(super) fn read(&self, offset: u32, len: u32) -> Vec<u8> {
        let fields = self.fields();
        let at = |index: u32| {
            let place = usize::try_from(u64::from(offset) + u64::from(index)).unwrap_or(usize::MAX);
            fields.get(place).copied().unwrap_or(0)
        };
        (0..len).map(at).collect()
    }

    fn fields(&self) -> [u8; LEN] {
        let mut fields = [0; LEN];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (field, byte) in fields.iter_mut().skip(offset).zip(bytes) {
                *field = *byte;
            }
        };
        let sectors_per_block = self.block / SECTOR;
        put(0, &(self.size / u64::from(SECTOR)).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.block.to_le_bytes());
        // Topology: a physical block is a logical one, and of the sizes of I/O only the smallest
        // good one is known.
        put(26, &1_u16.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        if !self.read_only {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &sectors_per_block.to_le_bytes());
            put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
            put(52, &1_u32.to_le_bytes());
            put(56, &[1]);
        }
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: ConfigSpace =
        ConfigSpace { size: 1 << 30, block: 4096, queues: 3, read_only: false };

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = DISK.read(0, 57);
        assert_eq!(bytes.len(), 57);
        let field = |at: usize, len: usize| number(&bytes[at..at + len]);
        assert_eq!(field(0, 8), (1 << 30) / 512, "capacity");
        assert_eq!(field(8, 4), 0, "size_max");
        assert_eq!(field(12, 4), 126, "seg_max");
        assert_eq!(field(20, 4), 4096, "blk_size");
        assert_eq!(field(24, 1), 0, "physical_block_exp");
        assert_eq!(field(26, 2), 1, "min_io_size");
        assert_eq!(field(32, 1), 0, "writeback, which is none");
        assert_eq!(field(34, 2), 3, "num_queues");
        assert_eq!(field(36, 4), u64::from(MAX_RANGE_SECTORS), "max_discard_sectors");
        assert_eq!(field(40, 4), u64::from(MAX_RANGES), "max_discard_seg");
        assert_eq!(field(44, 4), 8, "discard_sector_alignment");
        assert_eq!(field(48, 4), u64::from(MAX_ZEROES_SECTORS), "max_write_zeroes_sectors");
        assert_eq!(field(52, 4), 1, "max_write_zeroes_seg");
        assert_eq!(field(56, 1), 1, "write_zeroes_may_unmap");
        // A driver cuts a range at the longest one, and the next begins where it ends.
        for field in [field(36, 4), field(48, 4)] {
            assert!((field * 512).is_multiple_of(64 << 10), "{field}");
        }
    }

    #[test]
    fn a_disk_that_cannot_be_written_offers_no_way_to() {
        let read_only = ConfigSpace { read_only: true, ..DISK };
        let has = |config: ConfigSpace, bit: u32| config.features() & 1 << bit != 0;
        assert!(has(read_only, VIRTIO_BLK_F_RO) && !has(DISK, VIRTIO_BLK_F_RO));
        for bit in [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] {
            assert!(has(DISK, bit) && !has(read_only, bit));
        }
        assert_eq!(number(&read_only.read(36, 21)), 0);
    }

    proptest! {
        #[test]
        fn exactly_what_was_asked_for_is_answered(offset: u32, len in 0_u32..1024) {
            let all = DISK.read(0, 1024);
            let read = DISK.read(offset, len);
            prop_assert_eq!(read.len(), len as usize);
            let begin = (offset as usize).min(all.len());
            let end = (begin + len as usize).min(all.len());
            prop_assert_eq!(&read[..end - begin], &all[begin..end]);
            prop_assert!(read[end - begin..].iter().all(|byte| *byte == 0));
        }
    }
}
