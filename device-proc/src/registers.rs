//! A register file: plain bytes behind a BAR, with everything that a migration asks of them.

use crate::device::{AccessError, DeviceError};
use std::io::{Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `SIZE` bytes of registers without side effects, little endian.
///
/// Its methods are those of [`Device`](crate::device::Device), to be called from there. Save, load
/// and reset take all registers at once.
///
/// ```
/// use standstill_device_proc::registers::RegisterFile;
///
/// let registers = RegisterFile::new([0; 8]);
/// registers.write(4, &7_u32.to_le_bytes()).unwrap();
/// let mut low = [0; 2];
/// registers.read(4, &mut low).unwrap();
/// assert_eq!(low, [7, 0]);
/// assert!(registers.write(6, &[0; 4]).is_err(), "it ends before that");
/// registers.reset();
/// assert_eq!(registers.get(), [0; 8]);
/// ```
#[derive(Debug)]
pub struct RegisterFile<const SIZE: usize> {
    power_on: [u8; SIZE],
    bytes: Mutex<[u8; SIZE]>,
}

impl<const SIZE: usize> RegisterFile<SIZE> {
    /// Registers with these contents at power-on.
    #[must_use]
    pub fn new(power_on: [u8; SIZE]) -> Self {
        Self { power_on, bytes: Mutex::new(power_on) }
    }

    fn lock(&self) -> MutexGuard<'_, [u8; SIZE]> {
        // Whole at any time: nothing between lock and unlock can panic half-way.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, as they are now.
    #[must_use]
    pub fn get(&self) -> [u8; SIZE] {
        *self.lock()
    }

    /// Replaces all of them.
    pub fn set(&self, bytes: [u8; SIZE]) {
        *self.lock() = bytes;
    }

    /// Reads the bytes from that offset on.
    ///
    /// # Errors
    ///
    /// [`AccessError::NoRegister`] if they are not all there.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let bytes = self.lock();
        data.copy_from_slice(&bytes[range::<SIZE>(offset, data.len())?]);
        Ok(())
    }

    /// Writes the bytes from that offset on.
    ///
    /// # Errors
    ///
    /// [`AccessError::NoRegister`] if they are not all there; nothing is written then.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let mut bytes = self.lock();
        bytes[range::<SIZE>(offset, data.len())?].copy_from_slice(data);
        Ok(())
    }

    /// As at power-on.
    pub fn reset(&self) {
        self.set(self.power_on);
    }

    /// Writes all of them to a saved state.
    ///
    /// # Errors
    ///
    /// Whatever the stream says.
    pub fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        to.write_all(&self.get()).map_err(DeviceError::new)
    }

    /// Reads what [`save`](Self::save) wrote. Whether the values are acceptable is the device's
    /// business: [`get`](Self::get) them and check.
    ///
    /// # Errors
    ///
    /// Whatever the stream says, and an early end; nothing has changed then.
    pub fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        let mut bytes = [0; SIZE];
        from.read_exact(&mut bytes).map_err(DeviceError::new)?;
        self.set(bytes);
        Ok(())
    }
}

fn range<const SIZE: usize>(
    offset: u64,
    width: usize,
) -> Result<std::ops::Range<usize>, AccessError> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    match start.checked_add(width) {
        Some(end) if end <= SIZE => Ok(start..end),
        _ => Err(AccessError::NoRegister { offset, width }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_access_reaches_beyond_its_end() {
        let registers = RegisterFile::new([1, 2, 3, 4, 5, 6, 7, 8]);
        let mut data = [0; 8];
        registers.read(0, &mut data).unwrap();
        assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
        for (offset, width) in [(1, 8), (8, 1), (u64::MAX, 1), (u64::MAX - 1, 4)] {
            let refused = AccessError::NoRegister { offset, width };
            assert_eq!(registers.read(offset, &mut data[..width]), Err(refused));
            assert_eq!(registers.write(offset, &[0; 8][..width]), Err(refused));
        }
        assert_eq!(registers.get(), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn what_is_saved_is_loaded_and_a_short_state_changes_nothing() {
        let registers = RegisterFile::new([0; 4]);
        registers.write(1, &[7, 9]).unwrap();
        let mut state = Vec::new();
        registers.save(&mut state).unwrap();
        let other = RegisterFile::new([0; 4]);
        assert!(other.load(&mut &state[..3]).is_err());
        assert_eq!(other.get(), [0; 4]);
        other.load(&mut state.as_slice()).unwrap();
        assert_eq!(other.get(), [0, 7, 9, 0]);
        other.reset();
        assert_eq!(other.get(), [0; 4]);
    }
}
