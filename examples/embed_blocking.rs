//! A VMM without async, of the shape of Cloud Hypervisor: a `Vm` owns its vCPUs and its devices, and
//! each of them is `Pausable`.
//!
//! `cargo run --example embed_blocking` plays both parts: started with `device` it is a device
//! process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::blocking::{Machine, Stopped};
use standstill::coordinator::{DeviceSpec, MachineBuilder, MachineError};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use std::error::Error;
use std::time::Duration;

/// The most that a pause may take before it is given up and undone.
const PATIENCE: Duration = Duration::from_secs(10);

trait Pausable {
    fn pause(&mut self) -> Result<(), MachineError>;
    fn resume(&mut self) -> Result<(), MachineError>;
}

/// Stands for the threads that run the guest; `vcpus.rs` has real ones.
struct CpuManager;

impl Pausable for CpuManager {
    fn pause(&mut self) -> Result<(), MachineError> {
        println!("vCPUs pause");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        println!("vCPUs resume");
        Ok(())
    }
}

/// All device processes of the VM. They stop as one, so this is one `Pausable`.
struct DeviceManager {
    machine: Machine,
    stopped: Option<Stopped>,
}

impl Pausable for DeviceManager {
    fn pause(&mut self) -> Result<(), MachineError> {
        let stopped = self.machine.pause_timeout(PATIENCE)?;
        print!("{}", stopped.report());
        self.stopped = Some(stopped);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        let report = match self.stopped.take() {
            Some(stopped) => stopped.resume()?,
            None => self.machine.resume()?,
        };
        print!("{report}");
        Ok(())
    }
}

struct Vm {
    cpu_manager: CpuManager,
    device_manager: DeviceManager,
}

impl Pausable for Vm {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.cpu_manager.pause()?;
        self.device_manager.pause().inspect_err(|error| {
            // The devices run again, or the error says which do not: see the report in it.
            println!("the VM is not paused: {error}");
            let _ = self.cpu_manager.resume();
        })
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.device_manager.resume()?;
        self.cpu_manager.resume()
    }
}

fn vmm() -> Result<(), Box<dyn Error>> {
    let (folder, program) = (tempfile::tempdir()?, std::env::current_exe()?);
    let engine = |name| {
        let socket = folder.path().join(name);
        DeviceSpec::new(name, &program).arg("device").arg(socket)
    };
    let machine = MachineBuilder::new("vm0").devices(["engine0", "engine1"].map(engine));
    let device_manager = DeviceManager { machine: machine.start_blocking()?, stopped: None };
    // Guest RAM: whatever else a device maps counts as a peer's memory.
    device_manager.machine.declare_ram(tempfile::tempfile()?)?;
    let mut vm = Vm { cpu_manager: CpuManager, device_manager };
    vm.pause()?;
    vm.resume()?;
    vm.device_manager.machine.shutdown()?;
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
