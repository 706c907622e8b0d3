//! Ways for the fuzz targets into what reads machine files and requests of operators.

use crate::machine_file::{MachineFile, Places, Problems};
use crate::operator::connection::{self, Responder};
use crate::operator::history::History;
use crate::operator::message::{
    Body, Code, Greeting, Line, MAX_REQUEST, PROTOCOL, Request, RequestError, RequestLine,
};
use crate::operator::server::problem;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// The longest request in bytes, without its line end.
pub const LONGEST_REQUEST: usize = MAX_REQUEST;

/// What reading a machine file gives.
#[derive(Debug)]
pub struct Machine {
    /// Everything that is wrong, as a program reads it: `line`, `column`, `message`, …
    pub problems: Value,
    /// The same for a person.
    pub shown: String,
    /// The same in colour.
    pub coloured: String,
    /// Name and data socket of each device.
    pub devices: Vec<(String, Option<PathBuf>)>,
    /// What the machine is called.
    pub name: String,
}

fn places() -> Places {
    Places { file: "/etc/standstill".into(), runtime: "/run/standstill".into() }
}

fn machine(file: &MachineFile, problems: &Problems) -> Machine {
    let devices = file.devices.iter().map(|device| {
        (device.name.value.clone(), device.socket.as_ref().map(|socket| socket.value.clone()))
    });
    Machine {
        problems: serde_json::to_value(problems.to_json()).unwrap_or_default(),
        shown: problems.render(false),
        coloured: problems.render(true),
        devices: devices.collect(),
        name: file.name.clone(),
    }
}

/// Reads a machine file and, if nothing is wrong with it, makes a machine of it that could be
/// started.
///
/// # Panics
///
/// If that is not possible.
#[must_use]
pub fn read_machine(text: &str) -> Machine {
    let mut problems = Problems::new("vm.toml", text);
    let file = MachineFile::read(text, &places(), &mut problems);
    if problems.is_empty() {
        let control = file.folder.join("control");
        file.builder(&file.devices, &control).expect("a file without problems is a machine");
    }
    machine(&file, &problems)
}

/// Reads the text of one device, as `standstill add` sends it; whether there is one, and what is
/// wrong with it.
///
/// # Panics
///
/// If nothing is wrong with it, and it is no device that could be started.
#[must_use]
pub fn read_device(text: &str) -> (bool, Machine) {
    let owner = "name = \"vm0\"\n";
    let file = MachineFile::read(owner, &places(), &mut Problems::new("vm.toml", owner));
    let mut problems = Problems::new("device", text);
    let device = file.read_device(text, &places(), &mut problems);
    if let Some(device) = device.as_ref().filter(|_| problems.is_empty()) {
        let _ = device.spec().expect("a device without problems can be started");
    }
    (device.is_some(), machine(&file, &problems))
}

/// What a line of a client is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// No request, with the number that its answer must have.
    Nonsense(Option<u64>),
    /// Events.
    Events {
        /// The request's number.
        id: u64,
        /// Whether they are to go on.
        follow: bool,
    },
    /// Anything else, with the request's number.
    Once(u64),
}

/// Says what a line is that a client has sent, and checks that what is written again means the same
/// and that an error says what is wrong.
///
/// # Panics
///
/// If one of these is not so.
#[must_use]
pub fn asked(line: &[u8]) -> Asked {
    match RequestLine::parse(line) {
        Ok(read) => {
            let again = RequestLine::parse(&read.to_line());
            assert!(again.as_ref().is_ok_and(|again| *again == read), "{read:?}: {again:?}");
            match read.request {
                Request::Events { follow, .. } => Asked::Events { id: read.id, follow },
                _ => Asked::Once(read.id),
            }
        }
        Err((id, error)) => {
            let text = error.to_string();
            if let RequestError::Unknown { name, .. } | RequestError::With { name, .. } = &error {
                assert!(id.is_some(), "{text}: the number was there");
                assert!(text.contains(&format!("{name:?}")), "{text}: {name:?} is not in it");
            }
            Asked::Nonsense(id)
        }
    }
}

/// What a line of the server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The first one.
    Greeting,
    /// The answer to the request of that number.
    Done(u64),
    /// The request was not carried out, or the line was none.
    Refused {
        /// Its number, if it had one.
        id: Option<u64>,
        /// True if that was because the line is no request.
        nonsense: bool,
    },
    /// Part of a stream of events.
    Event(u64),
    /// Its end.
    End(u64),
}

/// Says what a line is that the server has sent; `None` if it is no line of the protocol.
#[must_use]
pub fn told(line: &[u8]) -> Option<Told> {
    if let Ok(greeting) = serde_json::from_slice::<Greeting>(line) {
        return (greeting.protocol == PROTOCOL).then_some(Told::Greeting);
    }
    let Line { id, body } = serde_json::from_slice(line).ok()?;
    Some(match body {
        Body::Ok(_) => Told::Done(id?),
        Body::Error(problem) => Told::Refused { id, nonsense: problem.code == Code::BadRequest },
        Body::Event(_) | Body::Lost(_) => Told::Event(id?),
        Body::End(_) => Told::End(id?),
    })
}

/// Answers requests in the place of a machine: nothing is started, stopped or opened.
#[derive(Debug)]
pub struct Desk {
    history: History,
    file: MachineFile,
    /// How many turns an answer takes, one after another, again and again.
    turns: Vec<u8>,
    begun: AtomicUsize,
    under_way: AtomicUsize,
    most: AtomicUsize,
}

impl Desk {
    /// One whose answers take so many turns.
    #[must_use]
    pub fn new(turns: Vec<u8>) -> Self {
        let owner = "name = \"vm0\"\n";
        let file = MachineFile::read(owner, &places(), &mut Problems::new("vm.toml", owner));
        Self {
            history: History::new(),
            file,
            turns,
            begun: AtomicUsize::new(0),
            under_way: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        }
    }

    /// The machine has ended: there are no events any more.
    pub fn end(&self) {
        self.history.end();
    }

    /// How many requests it was asked to carry out.
    #[must_use]
    pub fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// The most that were under way at a time.
    #[must_use]
    pub fn most_at_once(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }
}

impl Responder for Desk {
    fn greeting(&self) -> Greeting {
        Greeting {
            protocol: PROTOCOL,
            program: "standstill".to_owned(),
            machine: self.file.name.clone(),
            pid: std::process::id(),
        }
    }

    fn history(&self) -> &History {
        &self.history
    }

    async fn answer(&self, request: Request) -> Body {
        let at = self.begun.fetch_add(1, Ordering::Relaxed);
        let now = self.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(now, Ordering::Relaxed);
        for _ in 0..self.turns.get(at % self.turns.len().max(1)).copied().unwrap_or(0) {
            tokio::task::yield_now().await;
        }
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        match request {
            Request::Add { toml, .. } => {
                let mut problems = Problems::new("device", toml.clone());
                let device = self.file.read_device(&toml, &places(), &mut problems);
                if device.is_some() && problems.is_empty() {
                    Body::Ok(json!({}))
                } else {
                    Body::Error(problem(Code::BadDevice, problems.render(false)))
                }
            }
            Request::Events { .. } => {
                Body::Error(problem(Code::BadRequest, "events are not one answer"))
            }
            Request::Remove { device } | Request::Restart { device } => {
                Body::Error(problem(Code::Refused, format!("no device {device:?}")))
            }
            _ => Body::Ok(json!({})),
        }
    }
}

/// Serves one client until it goes, or `closing` says that the machine has ended.
pub async fn serve(stream: UnixStream, desk: Arc<Desk>, closing: watch::Receiver<bool>) {
    connection::serve(stream, desk, closing).await;
}
