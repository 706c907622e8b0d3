//! A device of your own, whole: eight bytes of scratch memory behind a BAR, which survive migration.
//!
//! `cargo run --example scratch_device -- /run/scratch.sock` serves it to any vfio-user client;
//! started by a coordinator, it stops and starts with its machine (see `own_binary.rs`). There is
//! nothing to do for that: the runtime has the lifecycle.

use standstill::device_proc::device::{AccessError, Bar, Device, DeviceError};
use standstill::device_proc::device::{DeviceInfo, PciIdentity};
use standstill::device_proc::registers::RegisterFile;
use standstill::device_proc::{ServeOptions, serve};
use std::error::Error;
use std::io::{Read, Write};

struct Scratch(RegisterFile<8>);

impl Device for Scratch {
    fn region_read(&self, _bar: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.0.read(offset, data)
    }

    fn region_write(&self, _bar: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.0.write(offset, data)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.0.reset();
        Ok(())
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        self.0.save(to)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        self.0.load(from)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args().nth(1).ok_or("usage: scratch_device SOCKET")?;
    let info = DeviceInfo::new("scratch", PciIdentity::new(0x1234, 0x0001))
        .bar(0, Bar::registers(4096))
        .ram_only();
    Ok(serve(ServeOptions::new(socket), |_handles| Ok((Scratch(RegisterFile::new([0; 8])), info)))?)
}
