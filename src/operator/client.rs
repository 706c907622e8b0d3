//! The end of the commands: connects, asks, and waits for answers without waiting for ever.
//!
//! Whoever waits for a long answer asks for the status now and then: a `standstill run` that hangs
//! is told from one that is at work.

use super::message::{Body, EventLine, Greeting, Line, PROTOCOL, Problem, Request, RequestLine};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// How long the other end may be silent before it is asked whether it is alive.
const SILENCE: Duration = Duration::from_secs(5);
/// How often that may be without an answer.
const UNANSWERED: u32 = 2;
/// The longest line that is read, in bytes.
const MAX_LINE: u64 = 64 * 1024 * 1024;
/// The number of requests that nobody but this module has made.
const PROBE: u64 = u64::MAX;

/// Why an operator got no answer.
#[derive(Debug, Error)]
pub(crate) enum ClientError {
    /// Nobody listens.
    #[error("no machine runs at {}", socket.display())]
    NotRunning {
        /// The operator socket.
        socket: PathBuf,
        /// True if the socket is there: whoever listened was killed.
        left: bool,
    },
    /// The system does not let this user connect, or talk.
    #[error("cannot talk to {}", socket.display())]
    System {
        /// The operator socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not answer.
    #[error("{} does not answer: its process hangs", socket.display())]
    Silent {
        /// The operator socket.
        socket: PathBuf,
    },
    /// It has closed the connection.
    #[error("{} has closed the connection", socket.display())]
    Closed {
        /// The operator socket.
        socket: PathBuf,
    },
    /// It speaks another version.
    #[error(
        "{program} speaks version {theirs} of the operator protocol, this program speaks {PROTOCOL}"
    )]
    Version {
        /// What it says that it is.
        program: String,
        /// What it speaks.
        theirs: u32,
    },
    /// What it says is not understood.
    #[error("{} says something that is not understood", socket.display())]
    Garbage {
        /// The operator socket.
        socket: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It says why it was not done.
    #[error("{}", .0.message)]
    Problem(Box<Problem>),
}

/// A connection to a running `standstill run`.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    reader: BufReader<UnixStream>,
    /// A line that has not come as a whole.
    partial: Vec<u8>,
    next_id: u64,
    /// What it said first.
    pub(crate) greeting: Greeting,
}

impl Client {
    /// Connects and reads the greeting.
    pub(crate) fn connect(socket: &Path) -> Result<Self, ClientError> {
        let system = |source| ClientError::System { socket: socket.to_owned(), source };
        let stream = connect_within(socket, SILENCE).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => ClientError::Silent { socket: socket.to_owned() },
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning {
                socket: socket.to_owned(),
                left: error.kind() == io::ErrorKind::ConnectionRefused,
            },
            _ => system(error),
        })?;
        stream.set_read_timeout(Some(SILENCE)).map_err(system)?;
        stream.set_write_timeout(Some(SILENCE)).map_err(system)?;
        let mut client = Self {
            socket: socket.to_owned(),
            reader: BufReader::new(stream),
            partial: Vec::new(),
            next_id: 1,
            greeting: Greeting {
                protocol: 0,
                program: String::new(),
                machine: String::new(),
                pid: 0,
            },
        };
        let line = client.line()?.ok_or_else(|| client.silent())?;
        client.greeting = match serde_json::from_slice(&line) {
            Ok(greeting) => greeting,
            Err(error) => match serde_json::from_slice::<Line>(&line) {
                Ok(Line { body: Body::Error(problem), .. }) => {
                    return Err(ClientError::Problem(Box::new(problem)));
                }
                _ => return Err(client.garbage(error)),
            },
        };
        let Greeting { protocol, program, .. } = &client.greeting;
        if *protocol != PROTOCOL {
            return Err(ClientError::Version { program: program.clone(), theirs: *protocol });
        }
        Ok(client)
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: Request) -> Result<T, ClientError> {
        let id = self.send(request)?;
        match self.next(id)? {
            Body::Ok(value) => serde_json::from_value(value).map_err(|e| self.garbage(e)),
            Body::Error(problem) => Err(ClientError::Problem(Box::new(problem))),
            other => Err(self.garbage(serde::de::Error::custom(format!("{other:?}")))),
        }
    }

    /// Asks for events, and calls `each` for each, with the number of those that were lost before
    /// it; until they end or `each` says that it has enough.
    pub(crate) fn events(
        &mut self,
        last: u32,
        follow: bool,
        mut each: impl FnMut(Told) -> bool,
    ) -> Result<(), ClientError> {
        let id = self.send(Request::Events { last, follow })?;
        loop {
            let told = match self.next(id)? {
                Body::Event(event) => Told::Event(event),
                Body::Lost(events) => Told::Lost(events),
                Body::End(_) => return Ok(()),
                Body::Error(problem) => return Err(ClientError::Problem(Box::new(problem))),
                other @ Body::Ok(_) => {
                    return Err(self.garbage(serde::de::Error::custom(format!("{other:?}"))));
                }
            };
            if !each(told) {
                return Ok(());
            }
        }
    }

    /// The process at the other end; `None` if it cannot be seen from here.
    pub(crate) fn process(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.greeting.pid).ok()?)?;
        pidfd_open(pid, PidfdFlags::empty()).ok()
    }

    fn send(&mut self, request: Request) -> Result<u64, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        self.write(&RequestLine { id, request })?;
        Ok(id)
    }

    fn write(&mut self, line: &RequestLine) -> Result<(), ClientError> {
        let written = self.reader.get_mut().write_all(&line.to_line());
        written.map_err(|source| match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                ClientError::Closed { socket: self.socket.clone() }
            }
            _ => ClientError::System { socket: self.socket.clone(), source },
        })
    }

    /// The next answer to that request.
    fn next(&mut self, id: u64) -> Result<Body, ClientError> {
        let mut unanswered = 0;
        loop {
            let Some(bytes) = self.line()? else {
                if unanswered == UNANSWERED {
                    return Err(self.silent());
                }
                unanswered += 1;
                self.write(&RequestLine { id: PROBE, request: Request::Status {} })?;
                continue;
            };
            unanswered = 0;
            let line: Line = serde_json::from_slice(&bytes).map_err(|e| self.garbage(e))?;
            match line {
                Line { id: Some(found), body } if found == id => return Ok(body),
                Line { id: None, body: Body::Error(problem) } => {
                    return Err(ClientError::Problem(Box::new(problem)));
                }
                _ => {}
            }
        }
    }

    /// The next line; `None` if none came for a while.
    fn line(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        let left = MAX_LINE.saturating_sub(self.partial.len() as u64);
        let read = self.reader.by_ref().take(left).read_until(b'\n', &mut self.partial);
        match read {
            Ok(_) if self.partial.last() == Some(&b'\n') => {
                Ok(Some(std::mem::take(&mut self.partial)))
            }
            Ok(_) => Err(ClientError::Closed { socket: self.socket.clone() }),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ok(None),
                io::ErrorKind::ConnectionReset => {
                    Err(ClientError::Closed { socket: self.socket.clone() })
                }
                _ => Err(ClientError::System { socket: self.socket.clone(), source: error }),
            },
        }
    }

    fn silent(&self) -> ClientError {
        ClientError::Silent { socket: self.socket.clone() }
    }

    fn garbage(&self, source: serde_json::Error) -> ClientError {
        ClientError::Garbage { socket: self.socket.clone(), source }
    }
}

/// Connects, and waits no longer than that: a process that hangs takes nobody out of its socket's queue,
/// which those fill who have given up.
fn connect_within(socket: &Path, time: Duration) -> io::Result<UnixStream> {
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // To wait for a place in the queue is to send.
    sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(time))?;
    let address = SocketAddrUnix::new(socket)?;
    rustix::io::retry_on_intr(|| connect(&fd, &address))?;
    Ok(fd.into())
}

/// What a stream of events says.
#[derive(Debug)]
pub(crate) enum Told {
    /// An event.
    Event(Box<EventLine>),
    /// That many were lost.
    Lost(u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_whose_queue_is_full_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let flags = SocketFlags::CLOEXEC;
        let hangs = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&hangs, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&hangs, 0).unwrap();
        // It stays in the queue although this end is closed at once.
        drop(connect_within(&path, SILENCE).unwrap());
        let error = connect_within(&path, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        let error = Client::connect(&path).unwrap_err();
        assert!(matches!(error, ClientError::Silent { .. }), "{error}");
    }
}
