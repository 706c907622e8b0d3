//! What the machine can do without any device model: plain copies of the same size.

use crate::engines::layout::BLOCK;
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::time::Duration;

/// How much CPU time is spent on it.
const BUDGET: Duration = Duration::from_millis(60);
/// How many blocks are copied to in turn: about as many as an engine has.
const BLOCKS: usize = 5;
/// Where the engines' blocks begin: at pages.
const ALIGNMENT: usize = 4096;

/// Bytes per second of CPU time that one thread copies between blocks of [`BLOCK`] bytes.
pub(crate) fn bytes_per_second() -> u64 {
    let block = BLOCK as usize;
    let mut memory = vec![0x5a_u8; (BLOCKS + 2) * block];
    // Aligned as the engines' blocks are: copies between unaligned blocks are slower.
    let aligned = memory.as_ptr().align_offset(ALIGNMENT).min(block);
    let (source, rest) = memory[aligned..].split_at_mut(block);
    let mut destinations: Vec<_> = rest.chunks_exact_mut(block).take(BLOCKS).collect();
    let began = cpu_time();
    let mut bytes = 0_u64;
    loop {
        for _ in 0..16 {
            for destination in &mut destinations {
                black_box(&mut **destination).copy_from_slice(black_box(&*source));
                bytes += u64::from(BLOCK);
            }
        }
        let spent = cpu_time().saturating_sub(began);
        if spent >= BUDGET {
            return per_second(bytes, spent);
        }
    }
}

/// A rate, rounded down; 0 if no time was spent.
pub(crate) fn per_second(bytes: u64, spent: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / spent.as_nanos().max(1);
    if spent.is_zero() { 0 } else { u64::try_from(rate).unwrap_or(u64::MAX) }
}

fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_bytes_by_seconds() {
        assert_eq!(per_second(500, Duration::from_millis(250)), 2_000);
        assert_eq!(per_second(500, Duration::ZERO), 0);
        assert_eq!(per_second(u64::MAX, Duration::from_nanos(1)), u64::MAX);
    }

    #[test]
    fn plain_copies_have_a_speed() {
        assert!(bytes_per_second() > 1 << 20);
    }
}
