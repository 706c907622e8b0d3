//! `standstill events`.

use super::show::{json, line};
use super::target::Target;
use super::{CommandError, finish};
use crate::exit::Exit;
use crate::operator::client::{ClientError, Told};
use clap::Args;
use std::process::ExitCode;

/// What follows `standstill events`.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    target: Target,
    /// How many of the past events, at most 256
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256)]
    last: u32,
    /// Go on with what happens from now on, until the machine ends
    #[arg(short, long)]
    follow: bool,
}

pub(crate) fn run(args: &EventsArgs) -> ExitCode {
    finish(events(args), args.target.json)
}

fn events(args: &EventsArgs) -> Result<Exit, CommandError> {
    let mut client = args.target.connect()?;
    let told = client.events(args.last, args.follow, |told| {
        match (told, args.target.json) {
            (Told::Event(event), true) => json(&event),
            (Told::Event(event), false) => line(&format!("{}  {}", event.time, event.text)),
            (Told::Lost(events), true) => json(&serde_json::json!({ "lost": events })),
            (Told::Lost(events), false) => line(&format!("({events} events were lost)")),
        }
        true
    });
    match told {
        // The machine has ended, and its coordinator with it.
        Err(ClientError::Closed { .. }) if args.follow => Ok(Exit::Done),
        told => Ok(told.map(|()| Exit::Done)?),
    }
}
