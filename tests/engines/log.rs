//! The log of this process, in which the lines of its devices are.

use std::io::{self, Write};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::MakeWriter;

static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static START: Once = Once::new();

/// From now on all lines are kept.
pub(crate) fn keep() {
    START.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(Lines).init());
}

/// Waits for a line in which all of this is.
pub(crate) async fn wait_for(parts: &[&str]) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let text = String::from_utf8_lossy(&LINES.lock().unwrap()).into_owned();
        if text.lines().any(|line| parts.iter().all(|part| line.contains(part))) {
            return;
        }
        assert!(Instant::now() < end, "no line with {parts:?} in:\n{text}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LINES.lock().unwrap().write(bytes)
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
