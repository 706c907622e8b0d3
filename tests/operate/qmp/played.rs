//! A QEMU that a test plays: it serves QMP as QEMU does, or does not.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

/// What it does with a command that is not right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Nothing is wrong.
    Good,
    /// It carries the command out, and hangs from then on: it does not answer, and greets nobody.
    DoesNotAnswer(&'static str),
    /// It hangs before it has carried the command out, and never does.
    Ignores(&'static str),
    /// It carries the command out and closes the connection.
    Closes(&'static str),
    /// It says that it has done it, and has not.
    Lies(&'static str),
    /// It refuses.
    Refuses(&'static str),
    /// It greets nobody.
    Silent,
    /// These bytes are its answer.
    Says(&'static str, &'static [u8]),
    /// So many bytes without an end of the line are its answer.
    Endless(&'static str, usize),
}

struct Inner {
    manner: Manner,
    state: String,
    commands: Vec<String>,
    connections: Vec<UnixStream>,
}

/// It ends when it is dropped.
pub(super) struct Played {
    inner: Arc<Mutex<Inner>>,
    path: PathBuf,
}

impl Played {
    /// Serves QMP at that path, for a VM that runs.
    pub(super) fn begin(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let inner = Inner {
            manner: Manner::Good,
            state: "running".into(),
            commands: Vec::new(),
            connections: Vec::new(),
        };
        let inner = Arc::new(Mutex::new(inner));
        let served = Arc::downgrade(&inner);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Some(inner) = served.upgrade() else { return };
                let stream = stream.unwrap();
                inner.lock().unwrap().connections.push(stream.try_clone().unwrap());
                thread::spawn(move || {
                    // Whoever is at the other end may go at any time.
                    let _ = serve(stream, &inner);
                });
            }
        });
        Self { inner, path: path.to_owned() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// How it behaves from now on.
    pub(super) fn set_manner(&self, manner: Manner) {
        self.lock().manner = manner;
    }

    /// Where the VM is from now on, without a word of it.
    pub(super) fn set_state(&self, state: &str) {
        state.clone_into(&mut self.lock().state);
    }

    /// Where the VM is.
    pub(super) fn state(&self) -> String {
        self.lock().state.clone()
    }

    /// Something happens to the VM, and is told.
    pub(super) fn tells(&self, event: &str, state: &str) {
        let mut inner = self.lock();
        state.clone_into(&mut inner.state);
        inner.tell(event);
    }

    /// Every `stop` and `cont` that has come.
    pub(super) fn commands(&self) -> Vec<String> {
        self.lock().commands.clone()
    }

    /// How many have connected.
    pub(super) fn connections(&self) -> usize {
        self.lock().connections.len()
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        for connection in &self.lock().connections {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        let _ = UnixStream::connect(&self.path);
        std::fs::remove_file(&self.path).unwrap();
    }
}

impl Inner {
    fn tell(&mut self, event: &str) {
        let event = json!({ "event": event, "timestamp": { "seconds": 1, "microseconds": 2 } });
        if let Some(mut last) = self.connections.last() {
            let _ = last.write_all(format!("{event}\r\n").as_bytes());
        }
    }

    /// Carries a command out.
    fn execute(&mut self, command: &str) -> Value {
        let state = match command {
            "stop" => "paused",
            "cont" => "running",
            "query-status" => {
                return json!({ "running": self.state == "running", "status": self.state });
            }
            _ => return json!({}),
        };
        if self.state != state {
            state.clone_into(&mut self.state);
            // The later the QEMU, the more it has to tell.
            self.tell("NEW_FANGLED");
            self.tell(if command == "stop" { "STOP" } else { "RESUME" });
        }
        json!({})
    }
}

fn serve(stream: UnixStream, inner: &Mutex<Inner>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut stream = stream;
    if inner.lock().unwrap().manner == Manner::Silent {
        return wait_for_end(lines);
    }
    let version = json!({ "qemu": { "major": 11, "minor": 1, "micro": 0 }, "package": "played" });
    let greeting = json!({ "QMP": { "version": version, "capabilities": ["oob", { "new": 1 }] } });
    stream.write_all(format!("{greeting}\r\n").as_bytes())?;
    while let Some(line) = lines.next() {
        let line: Value = serde_json::from_str(&line?).unwrap();
        let command = line["execute"].as_str().unwrap();
        let answer = {
            let mut inner = inner.lock().unwrap();
            if ["stop", "cont"].contains(&command) {
                inner.commands.push(command.to_owned());
            }
            match inner.manner {
                Manner::Ignores(this) if this == command => {
                    inner.manner = Manner::Silent;
                    None
                }
                Manner::DoesNotAnswer(this) if this == command => {
                    inner.execute(command);
                    inner.manner = Manner::Silent;
                    None
                }
                Manner::Closes(this) if this == command => {
                    inner.execute(command);
                    return stream.shutdown(std::net::Shutdown::Both);
                }
                Manner::Lies(this) if this == command => Some(json!({ "return": {} })),
                Manner::Refuses(this) if this == command => {
                    Some(json!({ "error": { "class": "GenericError", "desc": "not today" } }))
                }
                Manner::Says(this, bytes) if this == command => {
                    drop(inner);
                    stream.write_all(bytes)?;
                    continue;
                }
                Manner::Endless(this, bytes) if this == command => {
                    drop(inner);
                    stream.write_all(&vec![b'x'; bytes])?;
                    None
                }
                _ => Some(json!({ "return": inner.execute(command) })),
            }
        };
        let Some(mut answer) = answer else { return wait_for_end(lines) };
        answer["id"] = line["id"].clone();
        stream.write_all(format!("{answer}\r\n").as_bytes())?;
    }
    Ok(())
}

fn wait_for_end(mut lines: impl Iterator<Item = std::io::Result<String>>) -> std::io::Result<()> {
    lines.try_for_each(|line| line.map(drop))
}
