//! The log of this process, in which the lines of its devices are, too.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::MakeWriter;

static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// From now on all lines from INFO on are kept, of all tests of this process. Does nothing the second
/// time.
///
/// # Panics
///
/// If the process has another subscriber to its events.
pub fn keep() {
    static START: Once = Once::new();
    START.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(Lines).init());
}

/// What was kept so far.
#[must_use]
pub fn text() -> String {
    String::from_utf8_lossy(&lines()).into_owned()
}

/// Waits for a line in which all of this is.
///
/// # Panics
///
/// If there is none after a minute; says what there is.
pub async fn wait_for(parts: &[&str]) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let text = text();
        if text.lines().any(|line| parts.iter().all(|part| line.contains(part))) {
            return;
        }
        assert!(Instant::now() < end, "no line with {parts:?} in:\n{text}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn lines() -> MutexGuard<'static, Vec<u8>> {
    LINES.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lines().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}
