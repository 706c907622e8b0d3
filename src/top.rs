//! `standstill top`: a machine as it is, again and again, in a terminal.
//!
//! - [`app`]: what is known, and what a key or an answer changes about it; no terminal, no socket;
//! - [`transition`]: the last pause or resume, phase by phase;
//! - [`draw`]: the same as a picture;
//! - [`feed`]: asks the machine, and again when its coordinator has been replaced.

mod app;
mod draw;
mod feed;
mod transition;

use crate::commands::target::Target;
use crate::commands::{CommandError, finish};
use crate::exit::Exit;
use app::{App, Input, Todo};
use clap::Args;
use feed::Feed;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

const AFTER_HELP: &str = "\
Keys:
  p, r    pause, resume the machine (asks first)
  s       sort the devices by another column; S: the other way round
  ↑ ↓     move through the devices (also j and k, Page Up and Down)
  q       quit (also Ctrl-C)";

/// What follows `standstill top`.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP, mut_arg("json", |arg| arg.hide(true)))]
pub(crate) struct TopArgs {
    #[command(flatten)]
    target: Target,
    /// How often the machine is asked: 100ms to 1m
    #[arg(long, value_name = "DURATION", value_parser = interval, default_value = "500ms")]
    interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let possible = Duration::from_millis(100)..=Duration::from_secs(60);
    if possible.contains(&interval) { Ok(interval) } else { Err("expected 100ms to 1m".to_owned()) }
}

pub(crate) fn run(args: &TopArgs) -> ExitCode {
    finish(top(args), false)
}

fn top(args: &TopArgs) -> Result<Exit, CommandError> {
    let terminal = |source| CommandError::File { what: "use the terminal".to_owned(), source };
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let why = "standard input or output is none; `standstill status` needs no terminal";
        return Err(terminal(io::Error::new(io::ErrorKind::Unsupported, why)));
    }
    // A machine that is not there is told before the screen changes.
    let client = args.target.connect()?;
    let machine = client.greeting.machine.clone();
    let (send, inputs) = channel();
    listen(&send).map_err(terminal)?;
    let feed = Feed::start(args.target.clone(), args.interval, &send);
    // Restores the terminal also if this panics.
    let screen = ratatui::try_init().map_err(terminal)?;
    let ended = show(screen, App::new(machine), &inputs, &feed);
    ratatui::restore();
    ended.map_err(terminal)?;
    Ok(Exit::Done)
}

/// Keys and signals come as inputs from now on, each from a thread that ends with this process.
fn listen(send: &Sender<Input>) -> io::Result<()> {
    let keys = send.clone();
    std::thread::Builder::new().name("keys".to_owned()).spawn(move || {
        while let Ok(event) = event::read() {
            if keys.send(Input::Terminal(event)).is_err() {
                return;
            }
        }
        // A terminal that is gone shows nothing.
        let _ = keys.send(Input::Quit);
    })?;
    let signals = send.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            let listen = |kind| signal(kind);
            let (Ok(mut terminate), Ok(mut hangup), Ok(mut interrupt)) = (
                listen(SignalKind::terminate()),
                listen(SignalKind::hangup()),
                listen(SignalKind::interrupt()),
            ) else {
                return;
            };
            tokio::select! {
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
                _ = interrupt.recv() => {}
            }
            let _ = signals.send(Input::Quit);
        });
    })?;
    Ok(())
}

fn show(
    mut terminal: DefaultTerminal,
    mut app: App,
    inputs: &Receiver<Input>,
    feed: &Feed,
) -> io::Result<()> {
    let began = Instant::now();
    loop {
        terminal.draw(|frame| draw::draw(frame, &app))?;
        let mut input = match inputs.recv_timeout(Duration::from_secs(1)) {
            Ok(input) => Some(input),
            Err(RecvTimeoutError::Timeout) => Some(Input::Tick),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        // All that has come is one picture.
        while let Some(next) = input {
            match app.handle(next, began.elapsed()) {
                Todo::Nothing => {}
                Todo::Quit => return Ok(()),
                Todo::Ask(request) => feed.ask(request),
            }
            input = inputs.try_recv().ok();
        }
    }
}

#[cfg(test)]
mod tests;
