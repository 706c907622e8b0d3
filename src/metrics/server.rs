//! A small HTTP server: one page, few clients, nobody waits for them.

use super::Page;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// How many clients are served at the same time; others wait for their turn.
const CLIENTS: usize = 16;
/// How long a client may take, from its connection to the end of its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long its request may take.
const REQUEST: Duration = Duration::from_secs(2);
/// How much of a request is kept, in bytes; the least that hyper takes.
const BUFFER: usize = 8192;
/// How many headers a request may have.
const HEADERS: usize = 64;

const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Serves the page until it is dropped.
pub(super) async fn serve(listener: TcpListener, page: Arc<Page>) {
    let turns = Arc::new(Semaphore::new(CLIENTS));
    loop {
        // It is never closed.
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let page = Arc::clone(&page);
                tokio::spawn(async move {
                    let served = tokio::time::timeout(PATIENCE, client(stream, page)).await;
                    tracing::debug!(?served, "a client of the metrics");
                    drop(turn);
                });
            }
            Err(error) => {
                // Nothing of this program's own is wrong: a client that went away, or no fds.
                tracing::debug!(%error, "a client of the metrics cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn client(stream: TcpStream, page: Arc<Page>) -> hyper::Result<()> {
    let service = service_fn(move |request| {
        let page = Arc::clone(&page);
        async move { Ok::<_, Infallible>(answer(&request, &page).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST)
        .max_buf_size(BUFFER)
        .max_headers(HEADERS)
        // A scraper comes every few seconds: a place of 16 is not kept for it meanwhile.
        .keep_alive(false)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn answer(request: &Request<Incoming>, page: &Page) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| response(status, PLAIN, text.into());
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "the metrics are at /metrics\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "the metrics can be read only\n");
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    match page.text().await {
        Some(text) => response(StatusCode::OK, OPEN_METRICS, text.into()),
        None => plain(StatusCode::SERVICE_UNAVAILABLE, "the machine does not answer\n"),
    }
}

fn response(status: StatusCode, kind: HeaderValue, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
