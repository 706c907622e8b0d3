//! `standstill report`.

use super::show::{json, line};
use super::target::Target;
use super::{CommandError, finish};
use crate::exit::Exit;
use crate::operator::message::{ReportsReply, Request};
use clap::Args;
use std::process::ExitCode;

/// What follows `standstill report`.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    target: Target,
    /// How many of the last reports, at most 32
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    last: u32,
}

pub(crate) fn run(args: &ReportArgs) -> ExitCode {
    finish(report(args), args.target.json)
}

fn report(args: &ReportArgs) -> Result<Exit, CommandError> {
    let request = Request::Report { last: args.last };
    let ReportsReply { reports } = args.target.connect()?.ask(request)?;
    for report in &reports {
        if args.target.json {
            json(report);
        } else {
            line(&format!("report {}, {}\n{}", report.number, report.time, report.text));
        }
    }
    if reports.is_empty() && !args.target.json {
        line("there was no transition yet");
    }
    Ok(Exit::Done)
}
