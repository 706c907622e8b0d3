//! What is wrong with a machine file, and where: shown with the offending words underlined.

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde::Serialize;
use std::ops::Range;

/// How many problems are shown. Each costs a look through the whole text, and nobody reads hundreds.
const SHOWN: usize = 20;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// What, in one sentence.
    pub(crate) message: String,
    /// Where, in bytes of the text.
    pub(crate) span: Range<usize>,
    /// What to write beside that place.
    pub(crate) label: String,
    /// What to do about it.
    pub(crate) help: Option<String>,
    /// Another place that has to do with it.
    pub(crate) other: Option<(Range<usize>, String)>,
}

impl Problem {
    pub(crate) fn new(message: impl Into<String>, span: Range<usize>) -> Self {
        let message = visible(message);
        Self { message, span, label: String::new(), help: None, other: None }
    }

    #[must_use]
    pub(crate) fn label(mut self, label: impl Into<String>) -> Self {
        self.label = visible(label);
        self
    }

    #[must_use]
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(visible(help));
        self
    }

    #[must_use]
    pub(crate) fn other(mut self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.other = Some((span, visible(label)));
        self
    }
}

/// The text with its control characters escaped: much of it are words of the file, which are for
/// people to read and not for their terminals.
fn visible(text: impl Into<String>) -> String {
    let text = text.into();
    if !text.contains(char::is_control) {
        return text;
    }
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    text.chars().map(escaped).collect()
}

/// Everything that is wrong with one text.
#[derive(Clone, Debug)]
pub(crate) struct Problems {
    /// The text's name: a path, or what it is.
    name: String,
    text: String,
    found: Vec<Problem>,
}

/// A problem for a program that reads it.
#[derive(Debug, Serialize)]
pub(crate) struct JsonProblem<'a> {
    file: &'a str,
    line: usize,
    column: usize,
    message: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    label: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    help: Option<&'a str>,
}

impl Problems {
    /// None yet, of that text.
    pub(crate) fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        // The renderer shows pictures of other control characters, and passes these on. What is in
        // their place is as long, so that every place stays where it is.
        let text = text.into().replace(|c| matches!(c, '\u{80}'..='\u{9f}'), "\u{b7}");
        Self { name: name.into(), text, found: Vec::new() }
    }

    pub(crate) fn add(&mut self, problem: Problem) {
        self.found.push(problem);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.found.len()
    }

    /// As they are shown to a person, in the order of the text; the first [`SHOWN`] of them.
    pub(crate) fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let mut found = self.in_order();
        let more = found.len().saturating_sub(SHOWN);
        found.truncate(SHOWN);
        let mut text = String::new();
        for problem in found {
            let mut snippet = Snippet::source(&self.text).path(&self.name).annotation(
                AnnotationKind::Primary.span(self.fitting(&problem.span)).label(&problem.label),
            );
            if let Some((span, label)) = &problem.other {
                snippet = snippet
                    .annotation(AnnotationKind::Context.span(self.fitting(span)).label(label));
            }
            let mut group =
                Group::with_title(Level::ERROR.primary_title(&problem.message)).element(snippet);
            if let Some(help) = &problem.help {
                group = group.element(Level::HELP.message(help));
            }
            text.push_str(&renderer.render(&[group]));
            text.push_str("\n\n");
        }
        if more > 0 {
            text.push_str(&format!("and {more} more problems"));
        }
        text.truncate(text.trim_end().len());
        text
    }

    fn in_order(&self) -> Vec<&Problem> {
        let mut found: Vec<_> = self.found.iter().collect();
        found.sort_by_key(|problem| problem.span.start);
        found
    }

    /// As a program reads them, in the order of the text.
    pub(crate) fn to_json(&self) -> Vec<JsonProblem<'_>> {
        let each = self.in_order().into_iter().map(|problem| {
            let (line, column) = self.place(problem.span.start);
            JsonProblem {
                file: &self.name,
                line,
                column,
                message: &problem.message,
                label: &problem.label,
                help: problem.help.as_deref(),
            }
        });
        each.collect()
    }

    /// Line and column (in characters) of a byte, from 1.
    fn place(&self, byte: usize) -> (usize, usize) {
        let before = self.text.get(..self.fitting(&(byte..byte)).start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }

    /// The part of it that is in the text, on character boundaries.
    fn fitting(&self, span: &Range<usize>) -> Range<usize> {
        let within = |byte: usize| {
            let byte = byte.min(self.text.len());
            (0..=byte).rev().find(|byte| self.text.is_char_boundary(*byte)).unwrap_or(0)
        };
        let start = within(span.start);
        start..within(span.end).max(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_underlined_with_file_line_and_column() {
        let text = "name = \"vm\"\nonn-loss = \"fail\"\nrom = 1\n";
        let mut problems = Problems::new("vm.toml", text);
        problems.add(Problem::new("unknown key `rom`", 30..33));
        problems
            .add(Problem::new("unknown key `onn-loss`", 12..20).help("did you mean `on-loss`?"));
        let shown = problems.render(false);
        for part in ["error: unknown key", "vm.toml:2:1", "^^^^^^^^", "help: did you mean"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert!(!shown.contains('\x1b'));
        let json = serde_json::to_value(problems.to_json()).unwrap();
        assert_eq!((&json[0]["line"], &json[0]["column"]), (&2.into(), &1.into()));
        assert_eq!(json[1]["line"], 3);
    }

    #[test]
    fn nothing_that_is_shown_moves_the_cursor_or_colours_a_terminal() {
        let mut problems = Problems::new("vm.toml", "name = \"a\x1b[31m\u{9b}31m\"");
        let path = "/run/a\x1b[31m\r\u{9b}b";
        problems.add(Problem::new(path, 0..4).label(path).help(path).other(7..8, path));
        let shown = problems.render(false);
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
        assert_eq!(shown.matches("/run/a\\u{1b}[31m\\r\\u{9b}b").count(), 4, "{shown}");
    }

    #[test]
    fn no_more_than_a_few_problems_are_shown_and_the_rest_is_counted() {
        let text = "k = 1\n".repeat(10_000);
        let mut problems = Problems::new("vm.toml", text);
        for line in (0..10_000).rev() {
            problems.add(Problem::new(format!("line {line} is odd"), line * 6..line * 6 + 1));
        }
        let shown = problems.render(false);
        assert_eq!(shown.matches("error: ").count(), SHOWN);
        assert!(shown.contains("line 0 is odd") && shown.contains("line 19 is odd"), "{shown}");
        assert!(shown.ends_with("and 9980 more problems"), "{shown}");
    }

    #[test]
    fn a_place_outside_the_text_or_inside_a_character_is_no_panic() {
        let mut problems = Problems::new("vm.toml", "ä");
        for span in [0..1, 1..1, 1..99, 99..100] {
            problems.add(Problem::new("odd", span));
        }
        assert!(problems.render(true).contains("odd"));
        assert_eq!(problems.to_json().len(), 4);
    }
}
