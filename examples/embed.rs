//! A VMM in thirty lines: starts two device processes, pauses and resumes them.
//!
//! `cargo run --example embed` plays both parts: started with `device` it is a device process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::{DeviceSpec, MachineBuilder};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use std::error::Error;

#[tokio::main(flavor = "current_thread")]
async fn vmm() -> Result<(), Box<dyn Error>> {
    let (folder, program) = (tempfile::tempdir()?, std::env::current_exe()?);
    let engine = |name| {
        let socket = folder.path().join(name);
        DeviceSpec::new(name, &program).arg("device").arg(socket)
    };
    let machine = MachineBuilder::new("vm0").devices(["engine0", "engine1"].map(engine));
    let machine = machine.start().await?;
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
