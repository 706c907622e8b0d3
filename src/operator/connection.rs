//! One client of the operator socket: reads its requests, bounded in every way, and writes what is
//! answered.
//!
//! A client that does not read holds nobody up: what it is told waits in a short queue, the events
//! that do not fit there are counted, and a client that takes nothing for [`WRITE_DEADLINE`] is
//! dropped.

use super::history::{History, Past};
use super::message::{Body, Code, Greeting, Line, MAX_REQUEST, Request, RequestLine, line};
use super::server::problem;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

/// How long one line may take to be written.
pub(crate) const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// How many lines may wait to be written.
const QUEUE: usize = 16;
/// How many requests of one client may be under way; the next one is read when one is done.
const REQUESTS: usize = 8;

/// Who does what the clients ask.
pub(crate) trait Responder: Send + Sync + 'static {
    /// What a client is told first.
    fn greeting(&self) -> Greeting;

    /// What a client that asks for events gets.
    fn history(&self) -> &History;

    /// Does what is asked. Only `events` has more than one answer and is not for this.
    fn answer(&self, request: Request) -> impl Future<Output = Body> + Send;
}

/// Why no more requests are read.
enum Stop {
    /// The client has closed its end.
    End,
    /// The machine has ended.
    Closing,
    /// The connection is of no use any more.
    Broken,
}

/// Serves one client until it goes, or everything ends.
pub(crate) async fn serve(
    stream: UnixStream,
    operator: Arc<impl Responder>,
    closing: watch::Receiver<bool>,
) {
    let (reader, writer) = stream.into_split();
    let (send, queue) = mpsc::channel(QUEUE);
    let writing = tokio::spawn(write(writer, queue));
    let mut client =
        Client { send, operator, under_way: Arc::new(Semaphore::new(REQUESTS)), events: None };
    let stop = client.read(reader, closing).await;
    let Client { send, under_way, events, .. } = client;
    match (events, stop) {
        // The history has ended, and so does the stream by itself.
        (Some(events), Stop::Closing) => drop(events.await),
        (Some(events), _) => events.abort(),
        (None, _) => {}
    }
    let all = u32::try_from(REQUESTS).unwrap_or(u32::MAX);
    // Whoever closes its end still gets the answers that are under way.
    let _ = under_way.acquire_many(all).await;
    drop(send);
    let _ = writing.await;
}

struct Client<R> {
    send: mpsc::Sender<Vec<u8>>,
    operator: Arc<R>,
    under_way: Arc<Semaphore>,
    /// The stream of events, if there is one.
    events: Option<JoinHandle<()>>,
}

impl<R: Responder> Client<R> {
    async fn read(&mut self, reader: OwnedReadHalf, mut closing: watch::Receiver<bool>) -> Stop {
        let greeting = line(&self.operator.greeting());
        if self.send.send(greeting).await.is_err() {
            return Stop::Broken;
        }
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        loop {
            let got = tokio::select! {
                got = next_line(&mut reader, &mut bytes) => got,
                () = self.send.closed() => return Stop::Broken,
                _ = closing.wait_for(|closing| *closing) => return Stop::Closing,
            };
            match got {
                Ok(Got::Line) => {}
                Ok(Got::End) => return Stop::End,
                Ok(Got::TooLong) => {
                    let message = format!("a request has at most {MAX_REQUEST} bytes");
                    let body = Body::Error(problem(Code::BadRequest, message));
                    let _ = self.send.send(line(&Line { id: None, body })).await;
                    return Stop::Broken;
                }
                Err(_) => return Stop::Broken,
            }
            if bytes.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let answered = match RequestLine::parse(&bytes) {
                Ok(RequestLine { id, request: Request::Events { last, follow } }) => {
                    self.events(id, last, follow).await
                }
                Ok(RequestLine { id, request }) => self.begin(id, request).await,
                Err((id, error)) => {
                    let body = Body::Error(problem(Code::BadRequest, error.to_string()));
                    self.send.send(line(&Line { id, body })).await.is_ok()
                }
            };
            if !answered {
                return Stop::Broken;
            }
        }
    }

    /// Begins what is asked, and goes on to read. False if the client is gone.
    async fn begin(&self, id: u64, request: Request) -> bool {
        let permit = tokio::select! {
            permit = Arc::clone(&self.under_way).acquire_owned() => permit,
            () = self.send.closed() => return false,
        };
        let (send, operator) = (self.send.clone(), Arc::clone(&self.operator));
        // Goes on also if the client goes away: a pause is not given up by a lost connection.
        tokio::spawn(async move {
            let body = operator.answer(request).await;
            let _ = send.send(line(&Line { id: Some(id), body })).await;
            drop(permit);
        });
        true
    }

    /// Begins a stream of events. False if the client is gone.
    async fn events(&mut self, id: u64, last: u32, follow: bool) -> bool {
        if self.events.as_ref().is_some_and(|events| !events.is_finished()) {
            let message = "this connection has a stream of events already";
            let body = Body::Error(problem(Code::Busy, message));
            return self.send.send(line(&Line { id: Some(id), body })).await.is_ok();
        }
        let past = self.operator.history().events(usize::try_from(last).unwrap_or(usize::MAX));
        self.events = Some(tokio::spawn(stream(self.send.clone(), id, past, follow)));
        true
    }
}

/// Tells past events and, if wanted, those that come.
async fn stream(send: mpsc::Sender<Vec<u8>>, id: u64, past: Past, follow: bool) {
    let say = async |body| send.send(line(&Line { id: Some(id), body })).await;
    for event in past.events {
        if say(Body::Event(Box::new((*event).clone()))).await.is_err() {
            return;
        }
    }
    let mut why = "these were the last ones";
    if follow {
        why = "the machine has ended";
        let Some(mut live) = past.live else {
            let _ = say(Body::End(why.to_owned())).await;
            return;
        };
        loop {
            let body = match live.recv().await {
                Ok(event) => Body::Event(Box::new((*event).clone())),
                Err(RecvError::Lagged(events)) => Body::Lost(events),
                Err(RecvError::Closed) => break,
            };
            if say(body).await.is_err() {
                return;
            }
        }
    }
    let _ = say(Body::End(why.to_owned())).await;
}

enum Got {
    Line,
    TooLong,
    End,
}

/// Reads a line, bounded. What an unfinished last line says is not known, so it is none.
async fn next_line(reader: &mut BufReader<OwnedReadHalf>, bytes: &mut Vec<u8>) -> io::Result<Got> {
    bytes.clear();
    let limit = MAX_REQUEST as u64 + 1;
    reader.take(limit).read_until(b'\n', bytes).await?;
    Ok(match bytes.last() {
        Some(b'\n') => Got::Line,
        _ if bytes.len() > MAX_REQUEST => Got::TooLong,
        _ => Got::End,
    })
}

/// Writes what is in the queue until it is closed, or the client does not read.
async fn write(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = queue.recv().await {
        match tokio::time::timeout(WRITE_DEADLINE, writer.write_all(&bytes)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                tracing::warn!("an operator that does not read is dropped");
                return;
            }
        }
    }
}
