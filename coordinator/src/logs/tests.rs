//! Lines through a real pipe into a real subscriber, and the pieces by themselves.

use super::*;
use std::fs::File;
use std::io::Write;
use tracing_subscriber::fmt::MakeWriter;

/// Collects what a subscriber writes.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Sink {
    type Writer = Self;
    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Sink {
    fn subscriber(&self) -> impl tracing::Subscriber + use<> {
        tracing_subscriber::fmt()
            .json()
            .with_max_level(Level::TRACE)
            .with_writer(self.clone())
            .finish()
    }

    fn events(&self) -> Vec<serde_json::Value> {
        let bytes = self.0.lock().unwrap();
        bytes
            .split(|&byte| byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect()
    }

    /// Level and message of each event.
    fn messages(&self) -> Vec<(String, String)> {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let of =
            |event: &serde_json::Value| (text(&event["level"]), text(&event["fields"]["message"]));
        self.events().iter().map(of).collect()
    }
}

fn origin() -> Origin {
    Origin { device: "nvme0".into(), incarnation: 2 }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Forwards these bytes to their end.
fn forwarded(bytes: &[u8]) -> (Sink, LogTail, LogSummary) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let sink = Sink::default();
    let tail = LogTail::default();
    let bytes = bytes.to_owned();
    let device = std::thread::spawn(move || File::from(writer).write_all(&bytes).unwrap());
    let summary = tracing::subscriber::with_default(sink.subscriber(), || {
        run(forward(reader, origin(), tail.clone())).unwrap()
    });
    device.join().unwrap();
    (sink, tail, summary)
}

#[test]
fn json_lines_keep_their_level_and_target() {
    let line = br#"{"timestamp":"2026-01-01T00:00:00Z","level":"INFO","fields":{"message":"opened","log.line":7,"queues":4,"path":"a b"},"target":"nvme::queue"}"#;
    let (sink, tail, summary) = forwarded(&[line, &b"\n"[..]].concat());
    assert_eq!(summary, LogSummary { emitted: 1, dropped: 0, cut: 0 });
    let events = sink.events();
    assert_eq!(events[0]["level"], "INFO");
    assert_eq!(events[0]["target"], "standstill::device");
    let fields = &events[0]["fields"];
    assert_eq!(fields["message"], r#"opened path="a b" queues=4"#);
    assert_eq!(fields["device"], "nvme0");
    assert_eq!(fields["incarnation"], 2);
    assert_eq!(fields["origin"], "nvme::queue");
    assert_eq!(tail.lines(), [r#"INFO nvme::queue: opened path="a b" queues=4"#]);
}

#[test]
fn term_and_epoch_are_passed_on_as_the_device_knew_them() {
    let lines = br#"{"level":"INFO","term":3,"epoch":17,"fields":{"message":"quiet"}}
{"level":"INFO","fields":{"message":"not welcomed yet"}}
{"level":"INFO","term":-1,"fields":{"message":"a lie"}}
"#;
    let (sink, ..) = forwarded(lines);
    let fields = |number: usize| sink.events()[number]["fields"].clone();
    assert_eq!((&fields(0)["term"], &fields(0)["epoch"]), (&3.into(), &17.into()));
    for number in [1, 2] {
        assert!(fields(number).get("term").is_none() && fields(number).get("epoch").is_none());
    }
    // What is no number is no line of our runtime.
    assert_eq!(sink.messages()[2].0, "WARN");
}

#[test]
fn each_level_is_emitted_as_itself() {
    let levels = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"];
    let lines: String = levels
        .iter()
        .map(|level| format!("{{\"level\":\"{level}\",\"fields\":{{\"message\":\"m\"}}}}\n"))
        .collect();
    let (sink, ..) = forwarded(lines.as_bytes());
    assert_eq!(sink.messages(), levels.map(|level| (level.to_owned(), "m".to_owned())));
}

#[test]
fn other_lines_are_warnings_as_they_are() {
    let lines =
        "thread 'main' panicked\r\n\n{\"level\":\"LOUD\",\"fields\":{}}\n{\"half\": \nno end";
    let (sink, tail, summary) = forwarded(lines.as_bytes());
    let expected =
        ["thread 'main' panicked", "{\"level\":\"LOUD\",\"fields\":{}}", "{\"half\": ", "no end"];
    assert_eq!(sink.messages(), expected.map(|text| ("WARN".to_owned(), text.to_owned())));
    assert!(sink.events()[0]["fields"].get("origin").is_none());
    assert_eq!(tail.lines(), expected);
    assert_eq!(summary.emitted, 4);
}

#[test]
fn control_characters_do_not_reach_the_log() {
    let json = r#"{"level":"INFO","target":"t\u001b[2J","fields":{"message":"a\nb\u202ec"}}"#;
    let mut bytes = format!("\x1b[31mred\x07\n{json}\n").into_bytes();
    bytes.extend_from_slice(b"\x80\xc2\x9b\n");
    let (sink, tail, _) = forwarded(&bytes);
    assert_eq!(tail.lines()[0], r"\u{1b}[31mred\u{7}");
    assert_eq!(tail.lines()[1], r"INFO t\u{1b}[2J: a\nb\u{202e}c");
    assert_eq!(tail.lines()[2], "\u{fffd}\\u{9b}");
    assert_eq!(sink.messages()[1].1, r"a\nb\u{202e}c");
    assert_eq!(sink.events()[1]["fields"]["origin"], r"t\u{1b}[2J");
}

#[test]
fn a_long_line_is_cut_and_counted() {
    let mut bytes = vec![b'x'; 3 * MAX_LINE + 1];
    bytes.extend_from_slice(b"\nnext\n");
    let (sink, tail, summary) = forwarded(&bytes);
    assert_eq!(summary, LogSummary { emitted: 2, dropped: 0, cut: 1 });
    assert_eq!(tail.lines()[0].len(), MAX_LINE);
    assert_eq!(tail.lines()[1], "next");
    let report = format!("cut 1 lines, longer than {MAX_LINE} bytes");
    assert_eq!(sink.messages()[2], ("WARN".to_owned(), report));
}

#[test]
fn a_line_of_exactly_the_limit_is_whole() {
    let mut splitter = Splitter::default();
    let mut seen = Vec::new();
    splitter.push(&[b'x'; MAX_LINE], |line, cut| seen.push((line.len(), cut)));
    splitter.push(b"\n", |line, cut| seen.push((line.len(), cut)));
    splitter.push(&[b'x'; MAX_LINE + 1], |line, cut| {
        seen.push((line.len(), cut));
    });
    splitter.finish(|line, cut| seen.push((line.len(), cut)));
    assert_eq!(seen, [(MAX_LINE, false), (MAX_LINE, true)]);
}

#[test]
fn lines_are_the_same_however_the_bytes_come() {
    let bytes = b"one\r\ntwo\n\nthree";
    for size in 1..=bytes.len() {
        let mut splitter = Splitter::default();
        let mut lines = Vec::new();
        for piece in bytes.chunks(size) {
            splitter.push(piece, |line, _| lines.push(line.to_owned()));
        }
        splitter.finish(|line, _| lines.push(line.to_owned()));
        assert_eq!(lines, [&b"one"[..], b"two", b"three"], "in pieces of {size}");
    }
}

#[test]
fn escaping_does_not_grow_a_line_beyond_the_limit() {
    let clean = clean(&"\x1b".repeat(MAX_LINE));
    assert!(clean.len() <= MAX_LINE && clean.len() > MAX_LINE - 8, "{}", clean.len());
}

#[test]
fn the_tail_keeps_the_last_lines_only() {
    let tail = LogTail::default();
    for number in 0..TAIL_LINES + 5 {
        tail.push(format!("line {number}").as_bytes());
    }
    let lines = tail.clone().lines();
    assert_eq!(lines.len(), TAIL_LINES);
    assert_eq!(lines[0], "line 5");
    assert_eq!(lines[TAIL_LINES - 1], format!("line {}", TAIL_LINES + 4));
}

#[test]
fn the_tail_keeps_fewer_of_long_lines_and_the_last_one_in_any_case() {
    let tail = LogTail::default();
    for number in 0..TAIL_LINES {
        tail.push(format!("{number:MAX_LINE$}").as_bytes());
    }
    let kept = |tail: &LogTail| tail.lines.lock().unwrap().iter().map(Vec::capacity).sum::<usize>();
    assert!(kept(&tail) <= TAIL_BYTES, "{} bytes", kept(&tail));
    assert_eq!(tail.lines().len(), TAIL_BYTES / MAX_LINE);
    assert!(tail.lines()[1].ends_with(&format!(" {}", TAIL_LINES - 1)));
}

#[test]
fn a_flood_is_dropped_counted_and_reported_once_per_second() {
    let sink = Sink::default();
    let tail = LogTail::default();
    let mut log = Forwarder::new(origin(), tail.clone());
    let start = Instant::now();
    tracing::subscriber::with_default(sink.subscriber(), || {
        for number in 0..MAX_LINES_PER_SECOND + 234 {
            log.line(format!("{number}").as_bytes(), false, start);
        }
        assert_eq!(log.report_due(), Some(start + REPORT_INTERVAL));
        log.line(b"next second", false, start + REPORT_INTERVAL);
    });
    assert_eq!((log.summary.dropped, tail.dropped()), (234, 234));
    assert_eq!(log.report_due(), None);
    let messages = sink.messages();
    assert_eq!(messages.len() as u64, MAX_LINES_PER_SECOND + 2);
    let last: Vec<&str> = messages.iter().rev().take(2).map(|(_, text)| text.as_str()).collect();
    assert_eq!(last, ["next second", "dropped 234 lines, more than 1000 in a second"]);
    // What was not emitted is in the tail all the same: it may say why a process ended.
    assert_eq!(tail.lines()[TAIL_LINES - 2], format!("{}", MAX_LINES_PER_SECOND + 233));
}

#[test]
fn a_report_does_not_wait_for_the_next_line() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut writer = File::from(writer);
    let sink = Sink::default();
    let flood = "x\n".repeat(usize::try_from(MAX_LINES_PER_SECOND).unwrap() + 5);
    writer.write_all(flood.as_bytes()).unwrap();
    let _guard = tracing::subscriber::set_default(sink.subscriber());
    run(async {
        // The writer stays open, so the task ends only by this timeout.
        let forward = forward(reader, origin(), LogTail::default());
        tokio::time::timeout(REPORT_INTERVAL + Duration::from_millis(500), forward)
            .await
            .unwrap_err();
    });
    let report = "dropped 5 lines, more than 1000 in a second";
    assert_eq!(sink.messages().last().unwrap().1, report);
}

#[test]
fn a_full_pipe_leaves_the_runtime_to_others() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    // As much as a pipe takes; all of it can be read without ever waiting.
    File::from(writer).write_all(&[b'\n'; 65536]).unwrap();
    let turns = run(async {
        let task = tokio::spawn(forward(reader, origin(), LogTail::default()));
        let mut turns = 0;
        while !task.is_finished() {
            turns += 1;
            tokio::task::yield_now().await;
        }
        task.await.unwrap().unwrap();
        turns
    });
    assert!(turns >= 16, "others had their turn {turns} times only");
}

#[test]
fn an_fd_that_is_no_pipe_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let error = run(forward(file.into(), origin(), LogTail::default())).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}
