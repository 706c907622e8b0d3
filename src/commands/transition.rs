//! `standstill pause`, `resume`, `cancel`, `accept-hold` and `shutdown`.

use super::show::{json, line};
use super::target::Target;
use super::{CommandError, exit_of_report, finish};
use crate::exit::Exit;
use crate::operator::message::{ReportReply, Request, ShutdownReply};
use clap::Args;
use serde_json::Value;
use std::process::ExitCode;

/// What follows a command that needs nothing but the machine.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct PlainArgs {
    #[command(flatten)]
    target: Target,
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

/// Pauses or resumes.
pub(crate) fn move_to(args: &PlainArgs, request: Request) -> ExitCode {
    finish(moved(args, request), args.target.json)
}

fn moved(args: &PlainArgs, request: Request) -> Result<Exit, CommandError> {
    let reply: ReportReply = args.target.connect()?.ask(request)?;
    if args.target.json {
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

pub(crate) fn shutdown(args: &ShutdownArgs) -> ExitCode {
    finish(shut_down(args), args.target.json)
}

fn shut_down(args: &ShutdownArgs) -> Result<Exit, CommandError> {
    let request = Request::Shutdown { keep_devices: args.keep_devices };
    let reply: ShutdownReply = args.target.connect()?.ask(request)?;
    if args.target.json {
        json(&reply);
    } else if reply.kept {
        line("the devices are left as they are; `standstill run --attach` takes them over");
    } else {
        for end in &reply.devices {
            let exit = end.exit.as_deref().unwrap_or("ended unseen");
            line(&format!("{} {exit}", end.device));
        }
    }
    Ok(Exit::Done)
}
