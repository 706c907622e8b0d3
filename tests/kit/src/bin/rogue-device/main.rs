//! A device process without a device that misbehaves as its script says; see
//! [`standstill_testkit::script`].

#![forbid(unsafe_code)]

mod device;
mod orphan;
mod packet;

use device::RogueDevice;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use standstill_protocol::channel::DeviceEnd;
use standstill_testkit::Script;
use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

type Error = Box<dyn std::error::Error>;

#[expect(clippy::print_stderr, reason = "standard error is how a device process says why it ends")]
fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("rogue-device: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8, Error> {
    let argument = std::env::args().nth(1).ok_or("usage: rogue-device SCRIPT (JSON)")?;
    let script: Script = serde_json::from_str(&argument)?;
    let channel = DeviceEnd::from_fd(io::stdin().as_fd().try_clone_to_owned()?)?;
    // The control channel must end with the one fd that is used from here on.
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    // A frozen process does not see the end of its channel.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get());
    if parent != Some(channel.peer_credentials()?.pid) {
        return Err("the coordinator is gone".into());
    }
    RogueDevice::new(script, channel)?.run()
}
