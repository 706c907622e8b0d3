//! What is known of a machine, and what is going on at the keyboard.

use super::transition::Shown;
use crate::operator::client::Told;
use crate::operator::message::StatusReply;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use standstill::coordinator::events::JsonEvent;
use standstill::coordinator::report::JsonReport;
use standstill::coordinator::status::JsonDeviceStatus;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How many events are kept.
const EVENTS: usize = 200;
/// How many rates of a device are kept.
pub(super) const RATES: usize = 12;
/// How far Page Up and Page Down go.
const PAGE: usize = 10;

/// What comes from outside.
#[derive(Debug)]
pub(super) enum Input {
    /// A key, or another size.
    Terminal(Event),
    /// Where the machine is.
    Status(Box<StatusReply>),
    /// The last report at the beginning.
    Report(Box<JsonReport>),
    /// The events begin, the past ones first.
    EventsBegin,
    /// An event.
    Event(Told),
    /// The machine does not answer, for this reason.
    Lost(String),
    /// What came of something that was asked.
    Answer(Action, Result<(), String>),
    /// Some time has passed.
    Tick,
    /// It is over.
    Quit,
}

/// What can be asked of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Pause,
    Resume,
}

impl Action {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }
}

/// What is to be done about an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Todo {
    Nothing,
    Quit,
    Ask(Action),
}

/// What the devices are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// As the machine has them.
    Machine,
    Name,
    Standing,
    Rate,
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Machine => Self::Name,
            Self::Name => Self::Standing,
            Self::Standing => Self::Rate,
            Self::Rate => Self::Machine,
        }
    }
}

/// How much a device does.
#[derive(Clone, Debug, Default)]
pub(super) struct Rate {
    incarnation: u64,
    progress: u64,
    at: Duration,
    /// Per second, the oldest first.
    pub(super) last: VecDeque<u64>,
}

impl Rate {
    fn take(&mut self, device: &JsonDeviceStatus, now: Duration) {
        let same = self.incarnation == device.incarnation && device.progress >= self.progress;
        let passed = now.saturating_sub(self.at).as_millis();
        if same && passed > 0 {
            let done = u128::from(device.progress - self.progress);
            let rate = u64::try_from(done * 1000 / passed).unwrap_or(u64::MAX);
            if self.last.len() == RATES {
                self.last.pop_front();
            }
            self.last.push_back(rate);
        } else if !same {
            self.last.clear();
        }
        (self.incarnation, self.progress, self.at) = (device.incarnation, device.progress, now);
    }

    pub(super) fn now(&self) -> Option<u64> {
        self.last.back().copied()
    }
}

/// What is said at the bottom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// Nothing but the keys.
    Keys,
    /// Whether this is meant.
    Sure(Action),
    /// It is under way.
    Asked(Action),
    /// It was done.
    Done(Action),
    /// It was not.
    Failed(Action, String),
}

/// Everything that is shown.
#[derive(Debug)]
pub(super) struct App {
    pub(super) machine: String,
    pub(super) status: Option<StatusReply>,
    /// Why what is shown is old.
    pub(super) lost: Option<String>,
    pub(super) rates: BTreeMap<String, Rate>,
    pub(super) events: VecDeque<(String, String)>,
    pub(super) last: Option<Shown>,
    pub(super) sort: Sort,
    pub(super) reversed: bool,
    /// The first device that is shown.
    pub(super) first: usize,
    pub(super) note: Note,
}

impl App {
    pub(super) fn new(machine: String) -> Self {
        Self {
            machine,
            status: None,
            lost: None,
            rates: BTreeMap::new(),
            events: VecDeque::new(),
            last: None,
            sort: Sort::Machine,
            reversed: false,
            first: 0,
            note: Note::Keys,
        }
    }

    /// The devices in the order in which they are shown.
    pub(super) fn devices(&self) -> Vec<&JsonDeviceStatus> {
        let status = self.status.iter().flat_map(|status| &status.status.devices);
        let mut devices: Vec<_> = status.collect();
        let rate = |name: &str| self.rates.get(name).and_then(Rate::now).unwrap_or_default();
        match self.sort {
            Sort::Machine => {}
            Sort::Name => devices.sort_by(|a, b| a.name.cmp(&b.name)),
            Sort::Standing => {
                // Those that are well last.
                let well = |device: &JsonDeviceStatus| device.standing == "ready";
                devices.sort_by(|a, b| (well(a), &a.standing).cmp(&(well(b), &b.standing)));
            }
            Sort::Rate => devices.sort_by_key(|device| std::cmp::Reverse(rate(&device.name))),
        }
        if self.reversed {
            devices.reverse();
        }
        devices
    }

    /// Takes an input that comes at that time, counted from any moment.
    pub(super) fn handle(&mut self, input: Input, now: Duration) -> Todo {
        match input {
            Input::Terminal(Event::Key(key)) if key.kind != KeyEventKind::Release => {
                return self.key(key);
            }
            Input::Terminal(_) | Input::Tick => {}
            Input::Status(status) => self.take(*status, now),
            Input::Report(report) => self.last = Some(Shown::from(&*report)),
            Input::EventsBegin => self.events.clear(),
            Input::Event(Told::Event(line)) => {
                if let JsonEvent::Transition { report } = &line.event {
                    self.last = Some(Shown::from(&**report));
                }
                self.event(line.time, line.text);
            }
            Input::Event(Told::Lost(events)) => {
                self.event(String::new(), format!("({events} events were missed)"));
            }
            Input::Lost(why) => self.lost = Some(why),
            Input::Answer(action, Ok(())) => self.note = Note::Done(action),
            Input::Answer(action, Err(why)) => self.note = Note::Failed(action, why),
            Input::Quit => return Todo::Quit,
        }
        Todo::Nothing
    }

    fn take(&mut self, status: StatusReply, now: Duration) {
        let devices = &status.status.devices;
        self.rates.retain(|name, _| devices.iter().any(|device| device.name == *name));
        for device in devices {
            self.rates.entry(device.name.clone()).or_default().take(device, now);
        }
        self.first = self.first.min(devices.len().saturating_sub(1));
        self.machine.clone_from(&status.status.name);
        self.lost = None;
        self.status = Some(status);
    }

    fn event(&mut self, time: String, text: String) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back((time, text));
    }

    fn key(&mut self, key: KeyEvent) -> Todo {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if let Note::Sure(action) = self.note {
            self.note = Note::Keys;
            match key.code {
                KeyCode::Char('c') if control => return Todo::Quit,
                KeyCode::Char('y' | 'Y') | KeyCode::Enter => {
                    self.note = Note::Asked(action);
                    return Todo::Ask(action);
                }
                // Everything else is a no.
                _ => return Todo::Nothing,
            }
        }
        match key.code {
            KeyCode::Char('c') if control => return Todo::Quit,
            KeyCode::Char('q') => return Todo::Quit,
            KeyCode::Char('p') => self.ask(Action::Pause),
            KeyCode::Char('r') => self.ask(Action::Resume),
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('S') => self.reversed = !self.reversed,
            KeyCode::Up | KeyCode::Char('k') => self.scroll_up(1),
            KeyCode::PageUp => self.scroll_up(PAGE),
            KeyCode::Down | KeyCode::Char('j') => self.scroll_down(1),
            KeyCode::PageDown => self.scroll_down(PAGE),
            KeyCode::Home => self.first = 0,
            KeyCode::Esc => self.note = Note::Keys,
            _ => {}
        }
        Todo::Nothing
    }

    /// One thing at a time; the machine itself refuses the rest.
    fn ask(&mut self, action: Action) {
        if !matches!(self.note, Note::Asked(_)) {
            self.note = Note::Sure(action);
        }
    }

    fn scroll_up(&mut self, by: usize) {
        self.first = self.first.saturating_sub(by);
    }

    fn scroll_down(&mut self, by: usize) {
        let devices = self.status.as_ref().map_or(0, |status| status.status.devices.len());
        self.first = (self.first + by).min(devices.saturating_sub(1));
    }
}
