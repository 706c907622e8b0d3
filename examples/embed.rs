//! A VMM in thirty lines: starts two device processes, pauses and resumes them.
//!
//! `cargo run --example embed` plays both parts: started with `device` it is a device process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::{DeviceSpec, Hook, HookSpec, LocalError, MachineBuilder, Slot};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use std::error::Error;

/// What stops before the devices and starts after them.
struct Vcpus;

impl Hook for Vcpus {
    fn stop(&mut self) -> Result<(), LocalError> {
        println!("vCPUs stop");
        Ok(())
    }

    fn start(&mut self) -> Result<(), LocalError> {
        println!("vCPUs start");
        Ok(())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn vmm() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let engine = |name: &str| {
        Ok::<_, std::io::Error>(
            DeviceSpec::new(name, std::env::current_exe()?)
                .arg("device")
                .arg(folder.path().join(name)),
        )
    };
    let machine = MachineBuilder::new("vm0")
        .device(engine("engine0")?)
        .device(engine("engine1")?)
        .hook(HookSpec::new("vcpus", Slot::Before), Vcpus)
        .start()
        .await?;
    let stopped = machine.pause().await?;
    print!("{}", stopped.report());
    print!("{}", stopped.resume().await?);
    machine.shutdown().await?;
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
