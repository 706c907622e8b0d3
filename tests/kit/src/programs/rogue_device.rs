//! A device process without a device that misbehaves as its script says; see
//! [`crate::script`].

mod device;
mod orphan;
mod packet;

use crate::script::Script;
use device::RogueDevice;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use standstill_protocol::channel::DeviceEnd;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;

type Error = Box<dyn std::error::Error>;

/// Runs the device; what to exit with.
#[expect(clippy::print_stderr, reason = "standard error is how a device process says why it ends")]
pub(super) fn main(arguments: &[OsString]) -> u8 {
    run(arguments).unwrap_or_else(|error| {
        eprintln!("rogue-device: {error}");
        1
    })
}

fn run(arguments: &[OsString]) -> Result<u8, Error> {
    let argument = arguments.first().and_then(|argument| argument.to_str());
    let argument = argument.ok_or("usage: rogue-device SCRIPT (JSON)")?;
    let script: Script = serde_json::from_str(argument)?;
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
