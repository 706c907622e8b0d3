//! What the log says of a machine: each event a line, the same fields everywhere, and lines inside
//! the spans of the transition and of the phase that they belong to.

use crate::fixture::{LONG, builder, honest, report_of, short_in, start, three};
use crate::supervised::device;
use serde_json::Value;
use standstill_coordinator::DroppedLogs;
use standstill_coordinator::logs::MAX_LINES_PER_SECOND;
use standstill_protocol::message::Phase;
use standstill_testkit::{DROPPED_LOGS, Script, Step, Trace, within};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing::subscriber::DefaultGuard;

/// All lines of this thread, on which the coordinator runs, too.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn keep() -> (Self, DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines(&self) -> Vec<Value> {
        let bytes = self.0.lock().unwrap();
        let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    /// The lines whose message begins like that.
    fn with(&self, message: &str) -> Vec<Value> {
        let begins = |line: &Value| {
            line["fields"]["message"].as_str().is_some_and(|text| text.starts_with(message))
        };
        self.lines().into_iter().filter(begins).collect()
    }

    fn one(&self, message: &str) -> Value {
        let found = self.with(message);
        assert_eq!(found.len(), 1, "{message:?} in {:#?}", self.lines());
        found.into_iter().next().unwrap()
    }
}

/// The names of the spans in which a line was written, the outermost first.
fn spans(line: &Value) -> Vec<&str> {
    let spans = line["spans"].as_array().map_or(&[][..], Vec::as_slice);
    spans.iter().map(|span| span["name"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_transition_is_told_from_its_beginning_to_its_end() {
    let (log, _guard) = Log::keep();
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace)).device(honest("d1", &trace))).await;
    machine.pause().await.unwrap().resume().await.unwrap();

    let started = log.one("the machine has started");
    assert_eq!(
        (&started["fields"]["machine"], &started["fields"]["devices"]),
        (&"vm".into(), &2.into())
    );
    let began = log.one("pause begins");
    assert_eq!((&began["level"], spans(&began)), (&"INFO".into(), vec!["transition"]));
    assert_eq!((&began["fields"]["term"], &began["fields"]["epoch"]), (&1.into(), &1.into()));

    let phases = log.with("phase begins");
    let names: Vec<_> = phases.iter().map(|line| line["fields"]["phase"].clone()).collect();
    assert_eq!(names, ["PrepareStop", "Stop", "PrepareStart", "Start"]);
    for line in &phases {
        assert_eq!((&line["level"], spans(line)), (&"DEBUG".into(), vec!["transition", "phase"]));
        assert_eq!(line["spans"][1]["phase"], line["fields"]["phase"]);
        assert_eq!(line["spans"][1]["epoch"], line["fields"]["epoch"]);
    }
    assert_eq!(log.with("all have answered").len(), 4);

    let ended = log.with("transition ended");
    let [paused, resumed] = &ended[..] else { panic!("{ended:#?}") };
    for (line, operation, state, epoch) in
        [(paused, "pause", "stopped", 1), (resumed, "resume", "running", 2)]
    {
        let fields = &line["fields"];
        assert_eq!(line["level"], "INFO");
        assert_eq!((&fields["operation"], &fields["outcome"]), (&operation.into(), &"Done".into()));
        assert_eq!((&fields["state"], &fields["epoch"]), (&state.into(), &epoch.into()));
        assert!(fields["total_ns"].as_u64().unwrap() > 0);
        assert_eq!(
            (spans(line), &line["spans"][0]["operation"]),
            (vec!["transition"], &operation.into())
        );
    }
    assert!(paused["fields"].get("downtime_ns").is_none());
    assert!(resumed["fields"]["downtime_ns"].as_u64() > paused["fields"]["total_ns"].as_u64());
    // Nothing is left entered when nothing is under way.
    machine.shutdown().await.unwrap();
    assert!(!spans(&log.one("the machine is shut down")).contains(&"transition"));
}

#[tokio::test]
async fn a_loss_is_told_in_the_phase_in_which_it_was_seen() {
    let (log, _guard) = Log::keep();
    let trace = Trace::new().unwrap();
    let silent = Script::honest().on(Phase::Stop, []);
    let machine = start(three(&trace, Phase::Stop, silent)).await;
    let error = machine.pause().await.unwrap_err();
    let report = report_of(&error);

    let lost = log.one("d1 (1) is lost");
    assert_eq!((&lost["level"], spans(&lost)), (&"WARN".into(), vec!["transition", "phase"]));
    assert_eq!(lost["spans"][1]["phase"], "Stop");
    let fenced = log.one("d1 (1) is fenced");
    assert_eq!(fenced["level"], "INFO");
    for line in [&lost, &fenced] {
        let fields = &line["fields"];
        assert_eq!((&fields["device"], &fields["incarnation"]), (&"d1".into(), &1.into()));
        assert_eq!(fields["term"], 1);
    }
    let ended = log.one("transition ended");
    assert_eq!(ended["fields"]["outcome"], "Degraded");
    assert_eq!(ended["fields"]["epoch"], report.last_epoch.0);
    // What went wrong is in the log as it is in the report.
    for line in report.failure_lines() {
        assert_eq!(log.one(&line)["level"], "WARN");
    }
}

#[tokio::test]
async fn lines_that_are_in_no_log_are_counted() {
    let (log, _guard) = Log::keep();
    let trace = Trace::new().unwrap();
    let excess = 5;
    let lines = usize::try_from(MAX_LINES_PER_SECOND + excess).unwrap();
    let chatty =
        Script::honest().on(Phase::PrepareStop, [Step::Say("x\n".repeat(lines)), Step::Ack]);
    let chatty = short_in(Phase::Stop, chatty.device("d0", &trace).unwrap());
    let machine = start(builder().device(chatty).heartbeat(Duration::from_millis(20))).await;
    machine.pause().await.unwrap().leave_stopped();
    let told = async {
        loop {
            let DroppedLogs { by_device, by_coordinator } =
                device(&machine, "d0").await.dropped_logs;
            if by_device > 0 && by_coordinator > 0 {
                return (by_device, by_coordinator);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let (by_device, by_coordinator) = within(LONG, "the counts", told).await;
    assert_eq!(by_device, DROPPED_LOGS);
    // The lines may fall into two seconds; the text of the step ends in an empty line.
    assert!(by_coordinator <= excess, "{by_coordinator}");
    assert!(log.with("x").len() as u64 >= MAX_LINES_PER_SECOND);
}
