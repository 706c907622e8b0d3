//! A device with a program of its own, and a VMM that starts two of them.
//!
//! The device is `scratch_device.rs`; in a workspace of yours it would be a package beside the VMM's:
//!
//! ```text
//! my-vmm/            depends on standstill-coordinator
//!   src/main.rs      this file
//! my-device/         depends on standstill-device-proc
//!   src/main.rs      scratch_device.rs
//! ```
//!
//! `cargo build --examples && target/debug/examples/own_binary`

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::{DeviceSpec, MachineBuilder};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let program = std::env::current_exe()?.with_file_name("scratch_device");
    let scratch = |name| DeviceSpec::new(name, &program).arg(folder.path().join(name));
    let machine = MachineBuilder::new("vm0")
        .devices(["scratch0", "scratch1"].map(scratch))
        .start_blocking()?;
    for device in machine.status()?.devices {
        let pid = device.pid.unwrap_or_default();
        println!("{} is {} in process {pid}", device.name, device.kind);
    }
    println!("{}", machine.pause()?.resume()?);
    for (name, exit) in machine.shutdown()? {
        println!("{name}: {}", exit.map_or("unknown".into(), |exit| exit.to_string()));
    }
    Ok(())
}
