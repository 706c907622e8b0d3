//! The picture: the machine, its devices, its last transition, its events, the keys.

use super::app::{App, Note, RATES, Rate, Sort};
use super::transition::{Shown, bar};
use crate::commands::show::{Tone, tone};
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table};
use standstill::coordinator::report::Nanos;
use standstill::coordinator::status::JsonDeviceStatus;

const HEAD: Style = Style::new().add_modifier(Modifier::BOLD);
const FAINT: Style = Style::new().fg(Color::DarkGray);
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

const GOOD: Style = Style::new().fg(Color::Green);
const ODD: Style = Style::new().fg(Color::Yellow);
const BAD: Style = Style::new().fg(Color::Red);

/// The colour of a state, a standing or an outcome.
fn style_of(word: &str) -> Style {
    match tone(word) {
        Tone::Good => GOOD,
        Tone::Odd => ODD,
        Tone::Bad => BAD,
        Tone::Plain => Style::new(),
    }
}

/// Draws everything; on a screen that is too low the events are left out first, then the last
/// transition.
pub(super) fn draw(frame: &mut Frame<'_>, app: &App) {
    let area = frame.area();
    let height = area.height;
    let last = app.last.as_ref().map_or(0, |last| {
        let lines = last.phases.len() + usize::from(last.failure.is_some());
        u16::try_from(lines).unwrap_or(u16::MAX).min(8) + 1
    });
    let last = if height >= 8 + last { last } else { 0 };
    let events = match height.saturating_sub(7 + last) {
        0..3 => 0,
        left => (left / 2).clamp(3, 12),
    };
    let rows = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(last),
        Constraint::Length(events),
        Constraint::Length(1),
    ]);
    let [title, devices, transition, tail, keys] = rows.areas(area);
    frame.render_widget(headline(app), title);
    draw_devices(frame, app, devices);
    if let Some(shown) = &app.last {
        frame.render_widget(last_transition(shown, transition), transition);
    }
    draw_events(frame, app, tail);
    frame.render_widget(note(app), keys);
}

fn headline(app: &App) -> Line<'_> {
    let mut spans = vec![Span::styled(format!(" {} ", app.machine), HEAD)];
    if let Some(lost) = &app.lost {
        // What is below is as it was.
        spans.push(Span::styled(format!("no answer, trying again: {lost}"), BAD));
    } else if let Some(status) = &app.status {
        let state = &status.status.machine;
        spans.push(Span::styled(state.clone(), style_of(state).add_modifier(Modifier::BOLD)));
        if let Some(operation) = &status.status.operation {
            spans.push(Span::styled(format!(" ({operation} …)"), ODD));
        }
        let devices = status.status.devices.len();
        let ready = status.status.devices.iter().filter(|d| d.standing == "ready").count();
        spans.push(Span::raw(format!("  {ready} of {devices} devices ready")));
        spans.push(Span::styled(
            format!("  run by {}, devices {}", status.pid, status.orphan),
            FAINT,
        ));
    }
    Line::from(spans)
}

fn draw_devices(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let mark = |sort: Sort, title: &'static str| {
        let arrow = if app.reversed { "▲" } else { "▼" };
        let sorted = app.sort == sort && sort != Sort::Machine;
        Cell::from(if sorted { format!("{title}{arrow}") } else { title.to_owned() })
    };
    let head = Row::new([
        mark(Sort::Name, "DEVICE"),
        mark(Sort::Standing, "STANDING"),
        Cell::from("STATE"),
        Cell::from("PID"),
        Cell::from("STARTS"),
        mark(Sort::Rate, "WORK/s"),
        Cell::from(""),
        Cell::from(""),
    ])
    .style(HEAD);
    let devices = app.devices();
    // As many as there are lines, and no empty ones at the end.
    let lines = usize::from(area.height.saturating_sub(1));
    let first = app.first.min(devices.len().saturating_sub(lines));
    let rows = devices.iter().skip(first).take(lines).map(|device| row(app, device));
    let longest = devices.iter().map(|device| device.name.chars().count()).max().unwrap_or(0);
    let name = u16::try_from(longest).unwrap_or(u16::MAX).clamp(7, 24);
    let rates = u16::try_from(RATES).unwrap_or(0);
    let widths = [
        Constraint::Length(name),
        Constraint::Length(10),
        Constraint::Length(12),
        Constraint::Length(8),
        Constraint::Length(6),
        Constraint::Length(8),
        Constraint::Length(rates),
        Constraint::Fill(1),
    ];
    frame.render_widget(Table::new(rows, widths).header(head), area);
}

fn row<'a>(app: &App, device: &'a JsonDeviceStatus) -> Row<'a> {
    let state = device.state.as_deref().unwrap_or("-");
    let rate = app.rates.get(&device.name);
    // Why it is missing says more than what it is.
    let about = device.lost.as_deref().unwrap_or(&device.kind);
    Row::new([
        Cell::from(device.name.as_str()),
        Cell::from(device.standing.as_str()).style(style_of(&device.standing)),
        Cell::from(state).style(style_of(state)),
        Cell::from(device.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
        Cell::from(device.incarnation.to_string()),
        Cell::from(rate.and_then(Rate::now).map_or_else(|| "-".to_owned(), short)),
        Cell::from(rate.map(spark).unwrap_or_default()).style(GOOD),
        Cell::from(about).style(if device.lost.is_some() { BAD } else { FAINT }),
    ])
}

/// The last rates as bars; the highest of them is a whole one.
fn spark(rate: &Rate) -> String {
    let most = rate.last.iter().copied().max().unwrap_or(0);
    let bar = |&rate: &u64| match u128::from(rate) * 8 {
        0 => ' ',
        eighths => {
            let filled = eighths.div_ceil(u128::from(most.max(1))).clamp(1, 8);
            BARS[usize::try_from(filled - 1).unwrap_or(7)]
        }
    };
    rate.last.iter().map(bar).collect()
}

/// A number with three digits and a unit: `950`, `12.3k`, `4.56M`.
fn short(number: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = number as f64;
    let (value, unit) = match number {
        0..1_000 => return number.to_string(),
        1_000..1_000_000 => (value / 1e3, "k"),
        1_000_000..1_000_000_000 => (value / 1e6, "M"),
        _ => (value / 1e9, "G"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$}{unit}")
}

fn last_transition(shown: &Shown, area: Rect) -> Paragraph<'_> {
    let Shown { operation, outcome, total_ns, downtime_ns, phases, failure } = shown;
    let mut title = vec![
        Span::styled(format!(" last: {operation} "), HEAD),
        Span::styled(outcome.clone(), style_of(outcome)),
        Span::raw(format!(" in {} ", Nanos(*total_ns))),
    ];
    if let Some(downtime) = downtime_ns {
        title.push(Span::raw(format!("downtime {} ", Nanos(*downtime))));
    }
    let width = area.width.saturating_sub(48).min(60);
    let mut lines: Vec<Line<'_>> = phases
        .iter()
        .map(|phase| {
            let name = if phase.undo { format!("undo {}", phase.name) } else { phase.name.clone() };
            let took = Nanos(phase.to_ns.saturating_sub(phase.from_ns)).to_string();
            let bar = bar(phase, *total_ns, width);
            let fill = usize::from(width).saturating_sub(bar.chars().count());
            let last = if phase.all_answered { "last" } else { "missing" };
            let style = if phase.all_answered { GOOD } else { BAD };
            Line::from(vec![
                Span::raw(format!(" {name:<17} {took:>9}  ")),
                Span::styled(format!("{bar}{:fill$}", ""), style),
                Span::styled(format!("  {last}: {}", phase.last), FAINT),
            ])
        })
        .collect();
    if let Some(failure) = failure {
        lines.push(Line::styled(format!(" {failure}"), BAD));
    }
    Paragraph::new(lines).block(Block::new().borders(Borders::TOP).title(Line::from(title)))
}

fn draw_events(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let lines = usize::from(area.height.saturating_sub(1));
    let from = app.events.len().saturating_sub(lines);
    let shown = app.events.iter().skip(from).map(|(time, text)| {
        // 2026-01-31T12:34:56.789Z: the day is today's, mostly.
        let clock = time.get(11..23).unwrap_or_default();
        Line::from(vec![Span::styled(format!(" {clock:<12}  "), FAINT), Span::raw(text.as_str())])
    });
    let block = Block::new().borders(Borders::TOP).title(Span::styled(" events (UTC) ", HEAD));
    frame.render_widget(Paragraph::new(shown.collect::<Vec<_>>()).block(block), area);
}

fn note(app: &App) -> Paragraph<'_> {
    let question = ODD.add_modifier(Modifier::BOLD);
    let line = match &app.note {
        Note::Keys => {
            Line::styled(" q quit   p pause   r resume   s sort   S reverse   ↑↓ scroll", FAINT)
        }
        Note::Sure(action) => {
            Line::styled(format!(" {} {}? y/n", action.name(), app.machine), question)
        }
        Note::Asked(action) => Line::styled(format!(" {} …", action.name()), question),
        Note::Done(action) => Line::styled(format!(" {}: done", action.name()), GOOD),
        Note::Failed(action, why) => {
            // The first line says it; the report has the rest.
            let why = why.lines().next().unwrap_or_default();
            Line::styled(format!(" {}: {why}", action.name()), BAD)
        }
    };
    Paragraph::new(line).alignment(Alignment::Left)
}
