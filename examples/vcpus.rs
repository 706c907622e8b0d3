//! A hook for vCPUs: they stop before the first device is told anything, and run again when the last
//! device runs.
//!
//! `cargo run --example vcpus`; started with `device` the program is a device process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use standstill::coordinator::{DeviceSpec, Hook, HookSpec, LocalError, MachineBuilder, Slot};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What the vCPU threads and whoever pauses them share.
#[derive(Default)]
struct Control {
    pause: AtomicBool,
    instructions: AtomicU64,
    /// How many are paused.
    paused: Mutex<usize>,
    changed: Condvar,
}

impl Control {
    /// A vCPU: an instruction at a time, and a look at the control after each. (One that runs in
    /// `KVM_RUN` is kicked out of it by a signal.)
    fn run(&self) {
        loop {
            while !self.pause.load(Ordering::Acquire) {
                self.instructions.fetch_add(1, Ordering::Relaxed);
            }
            let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
            *paused += 1;
            self.changed.notify_all();
            while self.pause.load(Ordering::Acquire) {
                paused = self.changed.wait(paused).unwrap_or_else(PoisonError::into_inner);
            }
            *paused -= 1;
            self.changed.notify_all();
        }
    }
}

/// All vCPUs of the VM, as one hook.
struct Vcpus {
    control: Arc<Control>,
    count: usize,
}

impl Vcpus {
    fn all(&mut self, pause: bool) -> Result<(), LocalError> {
        let Control { paused, changed, .. } = &*self.control;
        let paused = paused.lock().unwrap_or_else(PoisonError::into_inner);
        self.control.pause.store(pause, Ordering::Release);
        changed.notify_all();
        let all = if pause { self.count } else { 0 };
        // Shorter than the hook's deadline: an error is undone, a hook that hangs is held.
        let patience = Duration::from_secs(2);
        let waited = changed.wait_timeout_while(paused, patience, |paused| *paused != all);
        let (paused, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            // As before the call: that is what an error means.
            self.control.pause.store(!pause, Ordering::Release);
            changed.notify_all();
            return Err(format!("{paused} of {} vCPUs are paused", self.count).into());
        }
        Ok(())
    }

    fn say(&self, what: &str) {
        println!("vCPUs {what} instruction {}", self.control.instructions.load(Ordering::Relaxed));
    }
}

impl Hook for Vcpus {
    fn stop(&mut self) -> Result<(), LocalError> {
        self.all(true)?;
        self.say("stand at");
        Ok(())
    }

    fn start(&mut self) -> Result<(), LocalError> {
        self.say("go on from");
        self.all(false)
    }
}

fn vmm() -> Result<(), Box<dyn Error>> {
    let control = Arc::new(Control::default());
    let count = 2;
    for _ in 0..count {
        let control = Arc::clone(&control);
        std::thread::spawn(move || control.run());
    }
    let (folder, program) = (tempfile::tempdir()?, std::env::current_exe()?);
    let engine = |name| {
        let socket = folder.path().join(name);
        DeviceSpec::new(name, &program).arg("device").arg(socket)
    };
    let machine = MachineBuilder::new("vm0")
        .devices(["engine0", "engine1"].map(engine))
        // Before the first phase of a stop, and so after the second phase of a start.
        .hook(HookSpec::new("vcpus", Slot::Before), Vcpus { control, count })
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
