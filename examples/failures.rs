//! What a VMM sees when device processes die: `cargo run --release --example failures`.
//!
//! One is killed while the machine runs and is started again; another one is killed in the middle
//! of a pause, which is rolled back. Started with `device`, the program is a device process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use rustix::process::{Pid, Signal, kill_process};
use standstill::coordinator::{
    DeviceSpec, LossPolicy, Machine, MachineBuilder, MachineError, MachineEvent, RestartPolicy,
};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use std::error::Error;
use std::time::Duration;

#[tokio::main(flavor = "current_thread")]
async fn vmm() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let engines = ["engine0", "engine1", "engine2"].map(|name| {
        DeviceSpec::new(name, std::env::current_exe().unwrap_or_default())
            .arg("device")
            .arg(folder.path().join(name))
            .on_loss(LossPolicy::Restart(RestartPolicy::default()))
    });
    let machine = MachineBuilder::new("vm0").devices(engines).start().await?;

    println!("engine0 is killed while the machine runs:");
    let mut events = machine.events();
    kill(&machine, "engine0").await?;
    loop {
        let event = events.recv().await.ok_or("the machine is gone")?;
        println!("  {event}");
        if matches!(event, MachineEvent::DeviceJoined { .. }) {
            break;
        }
    }

    println!("\nengine1 is killed while the machine stops:");
    let pausing = tokio::spawn({
        let machine = machine.clone();
        async move { machine.pause().await }
    });
    // Each engine takes 100 ms to become quiet.
    tokio::time::sleep(Duration::from_millis(50)).await;
    kill(&machine, "engine1").await?;
    match pausing.await? {
        Err(MachineError::Transition(report)) => println!("{report}"),
        other => println!("it stopped all the same: {other:?}"),
    }
    machine.shutdown().await?;
    Ok(())
}

async fn kill(machine: &Machine, name: &str) -> Result<(), Box<dyn Error>> {
    let status = machine.status().await?;
    let device = status.devices.iter().find(|device| device.name == name);
    let pid =
        device.and_then(|device| device.pid).and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    Ok(kill_process(pid.ok_or("no such process")?, Signal::KILL)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().collect::<Vec<_>>().as_slice() {
        [_, device, socket] if device == "device" => {
            let config = CopyEngineConfig {
                slow_prepare: Duration::from_millis(100),
                ..CopyEngineConfig::default()
            };
            Ok(serve(ServeOptions::new(socket), |handles| CopyEngine::build(config, handles))?)
        }
        _ => vmm(),
    }
}
