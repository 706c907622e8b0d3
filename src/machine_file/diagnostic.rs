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
        Self { message: message.into(), span, label: String::new(), help: None, other: None }
    }

    #[must_use]
    pub(crate) fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    #[must_use]
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    #[must_use]
    pub(crate) fn other(mut self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.other = Some((span, label.into()));
        self
    }
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
        Self { name: name.into(), text: text.into(), found: Vec::new() }
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
