//! `standstill status`.

use super::show::{Table, json, line, styled};
use super::target::Target;
use super::{CommandError, finish};
use crate::exit::Exit;
use crate::operator::message::{Request, StatusReply, VmStatus};
use clap::Args;
use standstill::coordinator::report::Nanos;
use standstill::protocol::transition::MachineState;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// What follows `standstill status`.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    target: Target,
}

pub(crate) fn run(args: &StatusArgs) -> ExitCode {
    finish(status(args), args.target.json)
}

fn status(args: &StatusArgs) -> Result<Exit, CommandError> {
    let reply: StatusReply = args.target.connect()?.ask(Request::Status {})?;
    if args.target.json {
        json(&reply);
    } else {
        line(&shown(&reply));
    }
    Ok(Exit::Done)
}

/// As a person wants to see it.
fn shown(reply: &StatusReply) -> String {
    let StatusReply { status, since, pid, orphan, last, vm } = reply;
    let mut text = format!("machine {}: {}", status.name, styled(&status.machine));
    if let Some(operation) = &status.operation {
        text.push_str(&format!(", a {operation} is under way"));
    }
    if status.machine == MachineState::LeaseExpired.to_string() {
        text.push_str(
            "\n  devices have left STOP; `standstill resume` starts all, `pause` stops them",
        );
    }
    for reason in &status.held {
        text.push_str(&format!("\n  held: {reason}"));
    }
    let kept = if orphan == "keep" { "devices outlive it" } else { "devices end with it" };
    text.push_str(&format!("\n  run by process {pid} for {}, {kept}\n", ago(since)));
    if let Some(last) = last {
        text.push_str(&format!(
            "  last: {} {} in {}, {} ago (report {})",
            last.operation,
            styled(&last.outcome),
            Nanos(last.total_ns),
            ago(&last.time),
            last.number,
        ));
        if let Some(downtime) = last.downtime_ns {
            text.push_str(&format!(", downtime {}", Nanos(downtime)));
        }
        text.push('\n');
    }
    if let Some(vm) = vm {
        text.push_str(&format!("  VM: {}\n", shown_vm(vm)));
    }
    text.push('\n');
    let mut table = Table::new(&["device", "standing", "state", "pid", "starts", "kind", ""]);
    for device in &status.devices {
        let dash = || "-".to_owned();
        table.row(vec![
            device.name.clone(),
            device.standing.clone(),
            device.state.clone().unwrap_or_else(dash),
            device.pid.map_or_else(dash, |pid| pid.to_string()),
            device.incarnation.to_string(),
            device.kind.clone(),
            device.lost.clone().unwrap_or_default(),
        ]);
    }
    text.push_str(&table.render());
    text
}

fn shown_vm(vm: &VmStatus) -> String {
    let VmStatus { qmp, qemu, state, missing } = vm;
    let qmp = qmp.display();
    match (qemu, state, missing) {
        (Some(qemu), Some(state), None) => format!("{state}, {qemu} at {qmp}"),
        (.., Some(why)) => format!("cannot be stopped, no QMP at {qmp}: {why}"),
        (.., None) => format!("unknown, QMP at {qmp}"),
    }
}

/// How long ago a time was, in whole seconds.
fn ago(time: &str) -> String {
    let then = humantime::parse_rfc3339(time).ok();
    let passed = then.and_then(|then| SystemTime::now().duration_since(then).ok());
    let seconds = passed.unwrap_or_default().as_secs();
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}
