//! The connection to QEMU: made when there is one to be had, and again after it was lost.
//!
//! A task has it, and whoever calls QEMU waits for that task and not for QEMU, up to a deadline. A call
//! is never taken back: one without an answer costs the connection, since nobody knows what an answer
//! that comes later still belongs to, and another connection is made.

use super::news::{Bound, Now, meaning, shown};
use super::wire::{Message, Reader, Refusal, line};
use super::{Shared, TARGET};
use crate::operator::message::VmStatus;
use qapi::Command;
use qapi::qmp::{self, QmpCommand, StatusInfo};
use serde::Deserialize;
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

/// How soon a connection is tried again that nobody waits for.
const RETRY: Duration = Duration::from_secs(1);
/// How long QEMU may take to make room for a command of some bytes.
const WRITE: Duration = Duration::from_secs(1);
/// How long after a call's deadline the task may take to say so.
const GRACE: Duration = Duration::from_millis(500);
/// How many calls wait for the task. Each caller has one at a time.
const CALLS: usize = 4;

/// A call has no answer, or a bad one.
#[derive(Debug, Error)]
pub(super) enum CallError {
    /// QEMU has not got it: nothing has changed.
    #[error("{0}")]
    NotSent(String),
    /// QEMU may have got it, and may have done it, or do it later.
    #[error("{0}")]
    Unanswered(String),
    /// QEMU does not do it.
    #[error("QEMU refuses {command}: {refusal}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Why.
        refusal: Refusal,
    },
}

/// A command on its way.
struct Call {
    id: u64,
    command: &'static str,
    line: Vec<u8>,
    end: Instant,
    answer: SyncSender<Result<Value, CallError>>,
}

impl Call {
    fn answer(self, answer: Result<Value, CallError>) {
        // Who waits for it may have given up this moment.
        let _ = self.answer.send(answer);
    }
}

/// For threads that call QEMU.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    calls: mpsc::Sender<Call>,
    next_id: Arc<AtomicU64>,
}

impl Handle {
    /// Executes a command; blocks until its answer or that moment, and a little longer.
    pub(super) fn call<C: QmpCommand>(&self, command: C, end: Instant) -> Result<C::Ok, CallError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = sync_channel(1);
        let call = Call { id, command: C::NAME, line: line(command, id), end, answer };
        let over = || CallError::NotSent("this `standstill run` ends".to_owned());
        self.calls.blocking_send(call).map_err(|_| over())?;
        let within = end.saturating_duration_since(Instant::now()) + GRACE;
        let value = match answered.recv_timeout(within) {
            Ok(answer) => answer?,
            Err(RecvTimeoutError::Timeout) => {
                let why = format!("no answer to {}, and the connection hangs", C::NAME);
                return Err(CallError::Unanswered(why));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(CallError::Unanswered("this `standstill run` ends".to_owned()));
            }
        };
        C::Ok::deserialize(value).map_err(|error| {
            CallError::Unanswered(format!("QEMU answers {} with something else: {error}", C::NAME))
        })
    }
}

/// The task that has the connection.
pub(super) struct Link {
    path: PathBuf,
    calls: mpsc::Receiver<Call>,
    next_id: Arc<AtomicU64>,
    status: watch::Sender<VmStatus>,
    shared: Arc<Shared>,
    bound: Bound,
    /// What was last told of a connection that is not there.
    told: String,
}

/// A link to the QEMU at that path, and what it tells of the VM.
pub(super) fn link(path: &Path, shared: Arc<Shared>) -> (Link, Handle, watch::Receiver<VmStatus>) {
    let (send, calls) = mpsc::channel(CALLS);
    let next_id = Arc::new(AtomicU64::new(1));
    let (status, seen) = watch::channel(VmStatus {
        qmp: path.to_owned(),
        qemu: None,
        state: None,
        missing: Some("nobody has looked yet".to_owned()),
    });
    let handle = Handle { calls: send, next_id: Arc::clone(&next_id) };
    let path = path.to_owned();
    let (bound, told) = (Bound::new(), String::new());
    (Link { path, calls, next_id, status, shared, bound, told }, handle, seen)
}

impl Link {
    /// Connects, serves calls and tells events until nobody can call any more.
    pub(super) async fn run(mut self) {
        let mut first = None;
        loop {
            let why = match UnixStream::connect(&self.path).await {
                Ok(stream) => Talk::new(stream, first.take()).go_on(&mut self).await,
                Err(error) => unreachable(&error),
            };
            self.missing(&why);
            if let Some(call) = first.take() {
                call.answer(Err(CallError::NotSent(self.no_qemu(&why))));
            }
            tokio::select! {
                call = self.calls.recv() => match call {
                    Some(call) => first = Some(call),
                    None => return,
                },
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    fn no_qemu(&self, why: &str) -> String {
        format!("no QMP at {}: {why}", self.path.display())
    }

    /// There is no connection, and that is why: told once.
    fn missing(&mut self, why: &str) {
        let path = self.path.display();
        if self.present() {
            tracing::warn!(target: TARGET, %path, "the QMP connection to the VM is lost: {why}");
        } else if self.told != why {
            tracing::info!(target: TARGET, %path, "no QMP connection to the VM: {why}");
        }
        why.clone_into(&mut self.told);
        self.absent(why);
    }

    fn present(&self) -> bool {
        self.status.borrow().missing.is_none()
    }

    fn absent(&self, why: &str) {
        self.status.send_modify(|status| {
            (status.qemu, status.state) = (None, None);
            status.missing = Some(why.to_owned());
        });
    }

    /// QEMU says where the VM is.
    fn seen(&self, version: &str, info: &StatusInfo) {
        let state = qapi::Enum::name(&info.status);
        if !self.present() {
            let path = self.path.display();
            tracing::info!(target: TARGET, %path, "connected to {version}, whose VM is {state}");
        }
        self.status.send_modify(|status| {
            status.qemu = Some(version.to_owned());
            status.state = Some(state.to_owned());
            status.missing = None;
        });
    }
}

/// Why QEMU cannot be reached.
fn unreachable(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such socket; has QEMU come so far?".to_owned(),
        io::ErrorKind::ConnectionRefused => "nobody serves the socket".to_owned(),
        io::ErrorKind::WouldBlock => "whoever serves it takes no connection".to_owned(),
        _ => error.to_string(),
    }
}

/// How far a connection is.
enum Stage {
    /// QEMU has not greeted. It serves one client at a time, and the others wait for that.
    Silent,
    /// It was told that we understand each other: the number of that command.
    Negotiates(u64),
    /// Commands can be said.
    Ready,
}

/// One connection.
struct Talk {
    reader: Reader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    stage: Stage,
    /// What QEMU calls itself.
    version: String,
    /// Calls that QEMU has not got.
    waiting: Vec<Call>,
    /// Calls that QEMU has got.
    sent: Vec<Call>,
    /// The number of our own question for the state.
    asked: Option<u64>,
    /// The state may have changed since.
    changed: bool,
}

/// Why a connection ends.
type End = String;

impl Talk {
    fn new(stream: UnixStream, first: Option<Call>) -> Self {
        let (read, writer) = stream.into_split();
        Self {
            reader: Reader::new(read),
            writer,
            stage: Stage::Silent,
            version: String::new(),
            waiting: first.into_iter().collect(),
            sent: Vec::new(),
            asked: None,
            changed: true,
        }
    }

    /// Until the end of the connection; says why.
    async fn go_on(mut self, link: &mut Link) -> End {
        link.absent("QEMU does not greet: it hangs, or serves another client");
        let why = loop {
            if let Err(why) = self.step(link).await {
                break why;
            }
        };
        for call in self.waiting {
            let why = link.no_qemu(&why);
            call.answer(Err(CallError::NotSent(why)));
        }
        for call in self.sent {
            let why = format!("no answer to {}: {why}", call.command);
            call.answer(Err(CallError::Unanswered(why)));
        }
        why
    }

    async fn step(&mut self, link: &mut Link) -> Result<(), End> {
        let end = self.waiting.iter().chain(&self.sent).map(|call| call.end).min();
        let late = async {
            match end {
                Some(end) => tokio::time::sleep_until(end.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = self.reader.next() => {
                let message = message.map_err(|error| error.to_string())?;
                self.take(message, link).await
            }
            Some(call) = link.calls.recv() => {
                self.waiting.push(call);
                self.send_waiting().await
            }
            () = late => Err("QEMU hangs, or is very slow".to_owned()),
        }
    }

    async fn take(&mut self, message: Message, link: &mut Link) -> Result<(), End> {
        let Message { greeting, event, data, id, value, error } = message;
        if let Some(event) = event {
            self.event(&event, &data, link);
        } else if let Some(greeting) = greeting {
            self.greeted(greeting, link).await?;
        } else {
            // An error before it has read the number has none, and we send no such command.
            let Some(id) = id.as_u64() else {
                let error =
                    error.map_or_else(|| "an answer without number".into(), |e| e.to_string());
                return Err(format!("QEMU does not understand us: {error}"));
            };
            let answer = match error {
                Some(refusal) => Err(refusal),
                None => Ok(value.unwrap_or_default()),
            };
            self.answered(id, answer, link).await?;
        }
        if self.changed && self.asked.is_none() && matches!(self.stage, Stage::Ready) {
            self.changed = false;
            let id = link.next_id.fetch_add(1, Ordering::Relaxed);
            self.asked = Some(id);
            self.write(&line(qmp::query_status {}, id)).await?;
        }
        Ok(())
    }

    async fn greeted(&mut self, greeting: Value, link: &Link) -> Result<(), End> {
        if !matches!(self.stage, Stage::Silent) {
            return Err("QEMU greets twice".to_owned());
        }
        let greeting: qmp::QMP = serde_json::from_value(greeting)
            .map_err(|error| format!("it greets as no QEMU does: {error}"))?;
        let qmp::VersionTriple { major, minor, micro } = greeting.version.qemu;
        self.version = format!("QEMU {major}.{minor}.{micro}");
        let id = link.next_id.fetch_add(1, Ordering::Relaxed);
        self.stage = Stage::Negotiates(id);
        self.write(&line(qmp::qmp_capabilities { enable: None }, id)).await
    }

    async fn answered(
        &mut self,
        id: u64,
        answer: Result<Value, Refusal>,
        link: &mut Link,
    ) -> Result<(), End> {
        if let Stage::Negotiates(negotiated) = self.stage
            && negotiated == id
        {
            answer.map_err(|refusal| format!("QEMU refuses to talk: {refusal}"))?;
            self.stage = Stage::Ready;
            return self.send_waiting().await;
        }
        if self.asked == Some(id) {
            self.asked = None;
            let wrong = |error: &dyn std::fmt::Display| format!("QEMU knows no state: {error}");
            let value = answer.map_err(|refusal| wrong(&refusal))?;
            let info = StatusInfo::deserialize(value).map_err(|error| wrong(&error))?;
            link.seen(&self.version, &info);
            return Ok(());
        }
        let Some(place) = self.sent.iter().position(|call| call.id == id) else {
            return Err("QEMU answers what it was not asked".to_owned());
        };
        let call = self.sent.swap_remove(place);
        let command = call.command;
        call.answer(answer.map_err(|refusal| CallError::Refused { command, refusal }));
        Ok(())
    }

    /// Says what waits, if it can be said.
    async fn send_waiting(&mut self) -> Result<(), End> {
        if !matches!(self.stage, Stage::Ready) {
            return Ok(());
        }
        while let Some(call) = self.waiting.pop() {
            let line = call.line.clone();
            // Before it is written: a part of it may have gone when that fails.
            self.sent.push(call);
            self.write(&line).await?;
        }
        Ok(())
    }

    async fn write(&mut self, line: &[u8]) -> Result<(), End> {
        match tokio::time::timeout(WRITE, self.writer.write_all(line)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("QEMU takes no command: {error}")),
            Err(_) => Err("QEMU takes no command: it does not read".to_owned()),
        }
    }

    fn event(&mut self, event: &str, data: &Value, link: &mut Link) {
        let is_ours = |call: &Call| [qmp::stop::NAME, qmp::cont::NAME].contains(&call.command);
        let now = Now {
            stands: link.shared.stands.load(Ordering::Acquire),
            ours: self.sent.iter().any(is_ours),
        };
        let Some((level, text)) = meaning(event, now) else { return };
        self.changed = true;
        let data = (!data.is_null()).then(|| shown(data));
        let data = data.as_deref();
        if level == tracing::Level::DEBUG {
            return tracing::debug!(target: TARGET, event, data, "{text}");
        }
        let (admitted, left_out) = link.bound.admits(Instant::now());
        if left_out > 0 {
            tracing::warn!(target: TARGET, left_out, "QEMU has sent more events than fit into the log");
        }
        if !admitted {
            return;
        }
        match level {
            tracing::Level::ERROR => tracing::error!(target: TARGET, event, data, "{text}"),
            tracing::Level::WARN => tracing::warn!(target: TARGET, event, data, "{text}"),
            _ => tracing::info!(target: TARGET, event, data, "{text}"),
        }
    }
}
