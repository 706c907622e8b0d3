//! The lines that a coordinator reads: as `tracing-subscriber` writes JSON, with the term and the
//! epoch beside it.

use standstill_protocol::message::{Epoch, Term};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::{Event, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The term that this process knows; 0 before the first welcome.
static TERM: AtomicU64 = AtomicU64::new(0);
/// The last epoch that it knows.
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// Lines name this term and epoch from now on.
pub(crate) fn knows(term: Term, epoch: Epoch) {
    // A line that is written meanwhile on another thread may mix the two: it is a log.
    TERM.store(term.0, Ordering::Relaxed);
    EPOCH.store(epoch.0, Ordering::Relaxed);
}

/// Formats an event as one JSON object on a line. Spans are left out.
pub(super) struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // Lines of the crate `log` come in one shape, with their own level and target as fields.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        line.write_str("{\"timestamp\":\"")?;
        SystemTime.format_time(&mut line)?;
        write!(line, "\",\"level\":\"{}\"", metadata.level())?;
        let term = TERM.load(Ordering::Relaxed);
        if term > 0 {
            let epoch = EPOCH.load(Ordering::Relaxed);
            write!(line, ",\"term\":{term},\"epoch\":{epoch}")?;
        }
        let target = serde_json::to_string(metadata.target()).map_err(|_| fmt::Error)?;
        write!(line, ",\"target\":{target},\"fields\":")?;
        context.format_fields(line.by_ref(), event)?;
        line.write_str("}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::fmt::format::JsonFields;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written while `log` runs, each line taken apart.
    fn lines(log: impl FnOnce()) -> Vec<Value> {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = sink.0.lock().unwrap();
        let lines = bytes.split_inclusive(|&byte| byte == b'\n');
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    /// One test, since what a process knows is the process's.
    #[test]
    fn lines_name_term_and_epoch_once_there_are_any() {
        let lines = lines(|| {
            tracing::info!(count = 3, text = "a\"b\n", "before");
            knows(Term(2), Epoch(7));
            tracing::warn!(target: "a\"target", "after");
        });
        assert_eq!(lines.len(), 2);
        assert!(lines[0].get("term").is_none() && lines[0].get("epoch").is_none());
        let fields = json!({ "message": "before", "count": 3, "text": "a\"b\n" });
        assert_eq!((&lines[0]["level"], &lines[0]["fields"]), (&json!("INFO"), &fields));
        assert_eq!(lines[0]["target"], module_path!());
        assert!(lines[0]["timestamp"].as_str().unwrap().ends_with('Z'));
        assert_eq!((&lines[1]["term"], &lines[1]["epoch"]), (&json!(2), &json!(7)));
        assert_eq!(lines[1]["target"], "a\"target");
        assert_eq!(lines[1]["fields"], json!({ "message": "after" }));
    }
}
