//! `standstill pause`, `resume`, `cancel`, `accept-hold` and `shutdown`.

use super::show::{json, line};
use super::target::Target;
use super::{CommandError, exit_of_report, finish};
use crate::exit::Exit;
use crate::operator::message::{DeviceEnd, ReportReply, Request, ShutdownReply, StatusReply};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

/// How long `standstill run` may take to end when its machine has.
const LAST_STEPS: Duration = Duration::from_secs(5);

/// What follows a command that needs nothing but the machine.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct PlainArgs {
    #[command(flatten)]
    target: Target,
}

/// What follows `standstill pause`.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct PauseArgs {
    #[command(flatten)]
    target: Target,
    /// Let the devices leave STOP by themselves if they are told nothing for so long, such as 3s
    ///
    /// For a VM that runs on meanwhile: its accesses to a stopped device wait. It must be shorter
    /// than 5s, after which QEMU takes a device that does not answer for broken.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    lease: Option<Duration>,
}

/// What follows `standstill shutdown`.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct ShutdownArgs {
    #[command(flatten)]
    target: Target,
    /// Leave the device processes as they are, for a later `standstill run --attach`
    #[arg(long)]
    keep_devices: bool,
}

/// Stops all devices.
pub(crate) fn pause(args: &PauseArgs) -> ExitCode {
    // What does not fit is too long in any case.
    let ns = |lease: Duration| u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
    let request = Request::Pause { lease_ns: args.lease.map(ns) };
    finish(moved(&args.target, request), args.target.json)
}

/// Starts all devices again.
pub(crate) fn resume(args: &PlainArgs) -> ExitCode {
    finish(moved(&args.target, Request::Resume {}), args.target.json)
}

fn moved(target: &Target, request: Request) -> Result<Exit, CommandError> {
    let reply: ReportReply = target.connect()?.ask(request)?;
    if target.json {
        json(&reply);
    } else {
        line(&reply.text);
    }
    Ok(exit_of_report(&reply))
}

/// Asks for something that has nothing to tell but that it is done.
pub(crate) fn tell(args: &PlainArgs, request: Request, done: &str) -> ExitCode {
    finish(told(&args.target, request, done), args.target.json)
}

pub(super) fn told(target: &Target, request: Request, done: &str) -> Result<Exit, CommandError> {
    let reply: Value = target.connect()?.ask(request)?;
    if target.json {
        json(&reply);
    } else {
        line(done);
    }
    Ok(Exit::Done)
}

/// Gives up what is under way.
pub(crate) fn cancel(args: &PlainArgs) -> ExitCode {
    finish(cancelled(&args.target), args.target.json)
}

fn cancelled(target: &Target) -> Result<Exit, CommandError> {
    let mut client = target.connect()?;
    let before: StatusReply = client.ask(Request::Status {})?;
    let reply: Value = client.ask(Request::Cancel {})?;
    if target.json {
        json(&reply);
    } else {
        line(match before.status.operation {
            Some(_) => "given up",
            None => "nothing was under way",
        });
    }
    Ok(Exit::Done)
}

pub(crate) fn shutdown(args: &ShutdownArgs) -> ExitCode {
    finish(shut_down(args), args.target.json)
}

fn shut_down(args: &ShutdownArgs) -> Result<Exit, CommandError> {
    let request = Request::Shutdown { keep_devices: args.keep_devices };
    let mut client = args.target.connect()?;
    let process = client.process();
    let reply: ShutdownReply = client.ask(request)?;
    // Who runs the machine again at once must not meet the process that ran it.
    if let Some(process) = process {
        drop(client);
        wait_for_end(&process);
    }
    if args.target.json {
        json(&reply);
    } else if reply.kept {
        line("the devices are left as they are; `standstill run --attach` takes them over");
    } else {
        reply.devices.iter().for_each(|end| line(&end.to_string()));
    }
    let all_gone = reply.devices.iter().all(DeviceEnd::is_gone);
    Ok(if all_gone { Exit::Done } else { Exit::Failed })
}

/// Waits until a process has ended, but not for long.
fn wait_for_end(process: &OwnedFd) {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    // Whoever does not end has answered all the same.
    let _ = poll(&mut fds, Timespec::try_from(LAST_STEPS).ok().as_ref());
}
