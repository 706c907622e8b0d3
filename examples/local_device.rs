//! A device inside the VMM that takes part in both phases beside the device processes, such as a
//! physical function that the kernel's VFIO driver moves: setting its state blocks.
//!
//! `cargo run --example local_device`; started with `device` the program is a device process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::{DeviceSpec, LocalDevice, LocalError, MachineBuilder};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use standstill::protocol::message::Command;
use standstill::protocol::migration::{MigrationFlags, MigrationState};
use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

/// Stands for the device's fd and its ioctls, of the kind `VFIO_DEVICE_FEATURE`.
struct Kernel {
    state: MigrationState,
}

impl Kernel {
    /// `VFIO_DEVICE_FEATURE_MIGRATION`: what the driver can do.
    fn migration_flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY_P2P
    }

    /// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, get.
    fn state(&self) -> MigrationState {
        self.state
    }

    /// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, set: the driver walks every state on the way, and
    /// returns when the hardware is there.
    fn set_state(&mut self, state: MigrationState) -> io::Result<()> {
        let there = Instant::now() + Duration::from_millis(30);
        while let Some(left) = there.checked_duration_since(Instant::now()) {
            std::thread::park_timeout(left);
        }
        self.state = state;
        Ok(())
    }
}

struct VfioDevice(Kernel);

impl LocalDevice for VfioDevice {
    fn migration(&self) -> MigrationFlags {
        self.0.migration_flags()
    }

    // On a thread of its own: it holds up nobody but the barrier, as every participant does.
    fn set_state(
        &mut self,
        target: MigrationState,
        _command: &Command,
    ) -> Result<(), (LocalError, MigrationState)> {
        // After an error the device is in some state on the way: the driver knows in which.
        self.0.set_state(target).map_err(|error| (error.into(), self.0.state()))
    }
}

fn vmm() -> Result<(), Box<dyn Error>> {
    let (folder, program) = (tempfile::tempdir()?, std::env::current_exe()?);
    let engine = DeviceSpec::new("engine0", program).arg("device").arg(folder.path().join("e0"));
    let machine = MachineBuilder::new("vm0")
        .device(engine)
        .local_device("0000:3b:00.0", VfioDevice(Kernel { state: MigrationState::Running }))
        .start_blocking()?;
    let stopped = machine.pause()?;
    println!("{}", stopped.report());
    println!("{}", stopped.resume()?);
    machine.shutdown()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().collect::<Vec<_>>().as_slice() {
        [_, device, socket] if device == "device" => {
            let build = |handles| CopyEngine::build(CopyEngineConfig::default(), handles);
            Ok(serve(ServeOptions::new(socket), build)?)
        }
        _ => vmm(),
    }
}
