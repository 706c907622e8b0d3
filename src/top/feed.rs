//! Asks the machine for its status and listens to its events, on threads of their own, and begins
//! again when the connection is lost: a coordinator may be replaced meanwhile.

use super::app::{Action, Input};
use crate::commands::target::Target;
use crate::explain::explain;
use crate::operator::client::Client;
use crate::operator::message::{ReportsReply, Request, StatusReply};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How soon a lost connection is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How many past events are shown at first.
const PAST: u32 = 100;

/// The threads that ask.
pub(super) struct Feed {
    target: Target,
    inputs: Sender<Input>,
    /// Whoever waits, waits for the end of these.
    _ends: [Sender<()>; 2],
}

impl Feed {
    pub(super) fn start(target: Target, interval: Duration, inputs: &Sender<Input>) -> Self {
        let (status_end, ended) = channel();
        let (own, to) = (target.clone(), inputs.clone());
        std::thread::spawn(move || again(&to, &ended, || statuses(&own, interval, &to, &ended)));
        let (events_end, ended) = channel();
        let (own, to) = (target.clone(), inputs.clone());
        std::thread::spawn(move || again(&to, &ended, || events(&own, &to)));
        Self { target, inputs: inputs.clone(), _ends: [status_end, events_end] }
    }

    /// Asks for something that may take its time.
    pub(super) fn ask(&self, action: Action) {
        let (target, inputs) = (self.target.clone(), self.inputs.clone());
        std::thread::spawn(move || {
            let request = match action {
                Action::Pause => Request::Pause { lease_ns: None },
                Action::Resume => Request::Resume {},
            };
            let answer = target.connect().and_then(|mut client| {
                client.ask::<serde_json::Value>(request).map_err(Into::into)
            });
            let answer = answer.map(drop).map_err(|error| explain(&error));
            // Nobody is there to be told when this process ends.
            let _ = inputs.send(Input::Answer(action, answer));
        });
    }
}

/// Does it again and again until nobody listens any more.
fn again(inputs: &Sender<Input>, ended: &Receiver<()>, connected: impl Fn() -> Option<String>) {
    loop {
        if let Some(why) = connected()
            && inputs.send(Input::Lost(why)).is_err()
        {
            return;
        }
        if !waits(ended, AGAIN) {
            return;
        }
    }
}

/// Waits; false if it has ended meanwhile.
fn waits(ended: &Receiver<()>, time: Duration) -> bool {
    ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout)
}

/// Asks for the status until that fails; why it did.
fn statuses(
    target: &Target,
    interval: Duration,
    inputs: &Sender<Input>,
    ended: &Receiver<()>,
) -> Option<String> {
    let mut client = match target.connect() {
        Ok(client) => client,
        Err(error) => return Some(explain(&error)),
    };
    loop {
        match client.ask::<StatusReply>(Request::Status {}) {
            Ok(status) => inputs.send(Input::Status(Box::new(status))).ok()?,
            Err(error) => return Some(explain(&error)),
        }
        if !waits(ended, interval) {
            return None;
        }
    }
}

/// Tells of events until they end. That the connection is lost is said by the status.
fn events(target: &Target, inputs: &Sender<Input>) -> Option<String> {
    let mut client: Client = target.connect().ok()?;
    if let Ok(ReportsReply { reports }) = client.ask(Request::Report { last: 1 })
        && let Some(report) = reports.into_iter().next_back()
    {
        inputs.send(Input::Report(Box::new(report.report))).ok()?;
    }
    inputs.send(Input::EventsBegin).ok()?;
    let _ = client.events(PAST, true, |told| inputs.send(Input::Event(told)).is_ok());
    None
}
