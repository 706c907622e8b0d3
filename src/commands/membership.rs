//! `standstill add`, `remove`, `restart` and `declare-ram`.

use super::show::{json, line};
use super::target::Target;
use super::transition::told;
use super::{CommandError, finish};
use crate::exit::Exit;
use crate::machine_file::folder_of;
use crate::operator::message::{RemoveReply, Request};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use toml::{Table, Value};

const ADD_HELP: &str = "\
Examples:
  standstill add nic1.toml
      A file with the keys of one [[device]], as in a machine file.
  standstill add --name engine9 --kind copy-engine --data-socket engine9.sock
  standstill add --name nic1 --program ./my-nic --arg --socket --arg {socket} --data-socket nic1.sock
      The same by options; --set has all other keys: --set presence=optional

";

/// What follows `standstill add`.
#[derive(Args, Clone, Debug)]
#[command(after_help = format!("{ADD_HELP}{}", crate::exit::HELP))]
pub(crate) struct AddArgs {
    #[command(flatten)]
    target: Target,
    /// A file with the keys of one [[device]]
    #[arg(value_name = "DEVICE.toml", required_unless_present = "name")]
    file: Option<PathBuf>,
    /// Its name
    #[arg(long, conflicts_with = "file")]
    name: Option<String>,
    /// A device of this program: copy-engine or vhost-user-blk
    #[arg(long, conflicts_with_all = ["file", "program"])]
    kind: Option<String>,
    /// Another program
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    program: Option<String>,
    /// An argument of the program; can be repeated
    #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true, conflicts_with = "file")]
    args: Vec<String>,
    /// Where its data socket is
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    data_socket: Option<String>,
    /// Any other key with a text; can be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value, conflicts_with = "file")]
    set: Vec<(String, String)>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').ok_or("expected KEY=VALUE, such as presence=optional")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl AddArgs {
    /// The keys of the device, and where its relative paths begin.
    fn device(&self) -> Result<(String, PathBuf), CommandError> {
        let file = |what: String| move |source| CommandError::File { what, source };
        if let Some(path) = &self.file {
            let text = std::fs::read_to_string(path);
            let text = text.map_err(file(format!("read {}", path.display())))?;
            return Ok((text, folder_of(path)));
        }
        let mut table = Table::new();
        let texts = [
            ("name", &self.name),
            ("kind", &self.kind),
            ("program", &self.program),
            ("socket", &self.data_socket),
        ];
        for (key, text) in texts {
            if let Some(text) = text {
                table.insert(key.to_owned(), Value::String(text.clone()));
            }
        }
        if !self.args.is_empty() {
            table.insert("args".to_owned(), self.args.clone().into());
        }
        for (key, value) in &self.set {
            table.insert(key.clone(), Value::String(value.clone()));
        }
        let folder = std::path::absolute(Path::new("."));
        Ok((table.to_string(), folder.map_err(file("find the current folder".to_owned()))?))
    }
}

pub(crate) fn add(args: &AddArgs) -> ExitCode {
    let added = args.device().and_then(|(toml, directory)| {
        let done = match name_of(&toml) {
            Some(name) => format!("{name} is added"),
            None => "added".to_owned(),
        };
        let request = Request::Add { toml, directory: Some(directory) };
        told(&args.target, request, &done)
    });
    finish(added, args.target.json)
}

/// The name of a device in the text of its keys, with or without the header of its table.
fn name_of(toml: &str) -> Option<String> {
    let table: Table = toml.parse().ok()?;
    let keys = match table.get("device") {
        Some(devices) => devices.get(0)?.as_table()?,
        None => &table,
    };
    Some(keys.get("name")?.as_str()?.to_owned())
}

/// What follows `standstill remove` and `standstill restart`.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct DeviceNameArgs {
    #[command(flatten)]
    target: Target,
    /// The device's name
    #[arg(value_name = "DEVICE")]
    device: String,
}

pub(crate) fn remove(args: &DeviceNameArgs) -> ExitCode {
    finish(removed(args), args.target.json)
}

fn removed(args: &DeviceNameArgs) -> Result<Exit, CommandError> {
    let device = args.device.clone();
    let reply: RemoveReply = args.target.connect()?.ask(Request::Remove { device })?;
    if args.target.json {
        json(&reply);
    } else {
        match &reply.exit {
            Some(exit) => line(&format!("{} is removed, its process {exit}", args.device)),
            None => line(&format!("{} is removed", args.device)),
        }
    }
    Ok(Exit::Done)
}

pub(crate) fn restart(args: &DeviceNameArgs) -> ExitCode {
    let request = Request::Restart { device: args.device.clone() };
    let done = format!("{} is started again, and counts", args.device);
    finish(told(&args.target, request, &done), args.target.json)
}

/// What follows `standstill declare-ram`.
#[derive(Args, Clone, Debug)]
#[command(after_help = crate::exit::HELP)]
pub(crate) struct DeclareRamArgs {
    #[command(flatten)]
    target: Target,
    /// The file that the guest's memory is mapped from
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

pub(crate) fn declare_ram(args: &DeclareRamArgs) -> ExitCode {
    let path = std::path::absolute(&args.path).unwrap_or_else(|_| args.path.clone());
    let done = format!("{} is guest RAM to every device", path.display());
    finish(told(&args.target, Request::DeclareRam { path }, &done), args.target.json)
}
