//! Tables and colours for people; lines for programs.

use anstyle::{AnsiColor, Style};
use std::io::Write;

/// Writes a line to standard output, with colours only where a terminal shows them.
pub(crate) fn line(text: &str) {
    let mut stdout = anstream::stdout().lock();
    // A reader that has gone away wants no more.
    let _ = writeln!(stdout, "{}", text.trim_end_matches('\n')).and_then(|()| stdout.flush());
}

/// Writes a value as one JSON object.
pub(crate) fn json(value: &impl serde::Serialize) {
    line(&serde_json::to_string(value).unwrap_or_default());
}

/// Whether standard error is a terminal that shows colours, and nobody has asked for none.
pub(crate) fn colours_on_stderr() -> bool {
    anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never
}

/// What is well.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// What wants to be looked at.
pub(crate) const ODD: Style = AnsiColor::Yellow.on_default();
/// What is wrong.
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
/// Headings.
pub(crate) const HEAD: Style = Style::new().bold();

/// How something is, by the word for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    /// It is well.
    Good,
    /// It wants to be looked at.
    Odd,
    /// It is wrong.
    Bad,
    /// The word says nothing about that.
    Plain,
}

/// The tone of a machine's state, a device's standing or state, or an outcome.
pub(crate) fn tone(word: &str) -> Tone {
    match word {
        "running" | "ready" | "RUNNING" | "Done" => Tone::Good,
        "held" | "lease-expired" | "lost" | "fenced" | "Held" => Tone::Bad,
        "stopped" | "joining" | "leaving" | "starting" | "restarting" | "Degraded"
        | "RolledBack" | "Stopped" => Tone::Odd,
        _ => Tone::Plain,
    }
}

/// The colour of such a word.
pub(crate) fn style_of(word: &str) -> Style {
    match tone(word) {
        Tone::Good => GOOD,
        Tone::Odd => ODD,
        Tone::Bad => BAD,
        Tone::Plain => Style::new(),
    }
}

/// A text in its colour.
pub(crate) fn styled(text: &str) -> String {
    let style = style_of(text);
    format!("{style}{text}{style:#}")
}

/// A table without lines; the last column is as long as it likes.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(heads: &[&str]) -> Self {
        Self { rows: vec![heads.iter().map(|head| (*head).to_owned()).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table; every line ends in a line end.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let style = match cell.as_str() {
                    // An escape sequence at the end of a line would keep the blanks before it.
                    "" => Style::new(),
                    _ if number == 0 => HEAD,
                    cell => style_of(cell),
                };
                let fill = width.saturating_sub(cell.chars().count());
                line.push_str(&format!("{style}{cell}{style:#}{:fill$}  ", ""));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["device", "state", ""]);
        table.row(vec!["a".into(), "RUNNING".into(), String::new()]);
        table.row(vec!["längerer".into(), "STOP".into(), String::new()]);
        let plain = anstream::adapter::strip_str(&table.render()).to_string();
        assert_eq!(plain, "device    state\na         RUNNING\nlängerer  STOP\n");
    }
}
