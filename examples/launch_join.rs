//! A VMM with an event loop of its own drives a stop and a start in four calls each: launch and join
//! of the first phase, launch and join of the second.
//!
//! `cargo run --example launch_join`; started with `device` the program is a device process.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use rustix::event::{PollFd, PollFlags, poll};
use standstill::coordinator::blocking::Events;
use standstill::coordinator::{DeviceSpec, MachineBuilder};
use standstill::device_proc::devices::copy_engine::{CopyEngine, CopyEngineConfig};
use standstill::device_proc::{ServeOptions, serve};
use std::error::Error;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// How long the VMM may take between the phases.
const GAP: Duration = Duration::from_secs(1);

/// The event loop of the VMM: goes round until that fd is readable.
fn until_ready(fd: BorrowedFd<'_>, events: &mut Events) -> Result<(), Box<dyn Error>> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
            PollFd::from_borrowed_fd(events.fd()?, PollFlags::IN),
            // … and whatever else the VMM listens to.
        ];
        poll(&mut fds, None)?;
        let [ready, _] = fds.map(|fd| fd.revents().contains(PollFlags::IN));
        while let Some(event) = events.try_recv() {
            println!("  event: {event}");
        }
        if ready {
            return Ok(());
        }
    }
}

fn vmm() -> Result<(), Box<dyn Error>> {
    let (folder, program) = (tempfile::tempdir()?, std::env::current_exe()?);
    let engine = |name| {
        let socket = folder.path().join(name);
        DeviceSpec::new(name, &program).arg("device").arg(socket)
    };
    let machine = MachineBuilder::new("vm0").devices(["engine0", "engine1"].map(engine));
    let machine = machine.start_blocking()?;
    let mut events = machine.events();

    let preparing = machine.launch_prepare_stop(GAP)?;
    println!("every device is told to be quiet; meanwhile the VMM flushes its block layer");
    until_ready(preparing.fd()?, &mut events)?;
    let quiet = preparing.join()?;
    println!("no device writes into another one any more; the VMM stops its timers");
    let stopping = quiet.launch_stop();
    until_ready(stopping.fd()?, &mut events)?;
    let stopped = stopping.join()?;
    print!("{}", stopped.report());

    let preparing = stopped.launch_prepare_start(GAP)?;
    until_ready(preparing.fd()?, &mut events)?;
    let accepting = preparing.join()?;
    println!("every device accepts what others write; the VMM starts its timers");
    let starting = accepting.launch_start();
    until_ready(starting.fd()?, &mut events)?;
    print!("{}", starting.join()?);
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
