//! Takes a TOML table apart key by key, and notes everything that does not fit.

use super::diagnostic::{Problem, Problems};
use crate::nearest::nearest;
use crate::size::parse_size;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A value, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed<T> {
    pub(crate) value: T,
    pub(crate) span: Range<usize>,
}

/// One table and the keys that it may have.
pub(crate) struct Fields<'a> {
    table: &'a DeTable<'a>,
    /// Where the table is.
    pub(crate) span: Range<usize>,
    /// What it is, for messages: `a device`.
    what: &'static str,
    problems: &'a RefCell<Problems>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(
        table: &'a DeTable<'a>,
        span: Range<usize>,
        what: &'static str,
        problems: &'a RefCell<Problems>,
    ) -> Self {
        Self { table, span, what, problems }
    }

    pub(crate) fn note(&self, problem: Problem) {
        self.problems.borrow_mut().add(problem);
    }

    /// Notes every key that is none of these.
    pub(crate) fn only(&self, known: &[&str]) {
        for key in self.table.keys() {
            let name = key.get_ref().as_ref();
            if known.contains(&name) {
                continue;
            }
            let problem = Problem::new(format!("{} has no key `{name}`", self.what), key.span())
                .label("unknown");
            self.note(match nearest(name, known.iter().copied()) {
                Some(meant) => problem.help(format!("did you mean `{meant}`?")),
                None => problem.help(format!("its keys are {}", known.join(", "))),
            });
        }
    }

    /// The place of a key, if it is there.
    pub(crate) fn key(&self, name: &str) -> Option<Range<usize>> {
        self.table.keys().find(|key| key.get_ref() == name).map(Spanned::span)
    }

    fn value(&self, name: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.table.get(name)
    }

    /// Notes that a value is of the wrong type.
    fn wrong(&self, name: &str, value: &Spanned<DeValue<'_>>, expected: &str) {
        let problem = Problem::new(format!("`{name}` must be {expected}"), value.span());
        self.note(problem.label(format!("this is {}", type_of(value.get_ref()))));
    }

    /// A text that must be there.
    pub(crate) fn needed_text(&self, name: &str) -> Option<Placed<String>> {
        if self.value(name).is_none() {
            let what = self.what;
            self.note(Problem::new(format!("{what} needs a `{name}`"), self.span.clone()));
        }
        self.text(name)
    }

    pub(crate) fn text(&self, name: &str) -> Option<Placed<String>> {
        let value = self.value(name)?;
        match value.get_ref() {
            DeValue::String(text) => {
                Some(Placed { value: text.clone().into_owned(), span: value.span() })
            }
            _ => {
                self.wrong(name, value, "a text in quotes");
                None
            }
        }
    }

    /// One of a few words.
    pub(crate) fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Option<T> {
        let Placed { value, span } = self.text(name)?;
        if let Some((_, choice)) = choices.iter().find(|(word, _)| *word == value) {
            return Some(*choice);
        }
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        let listed = words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ");
        let problem = Problem::new(format!("`{name}` cannot be {value:?}"), span);
        let problem = problem.label(format!("expected one of {listed}"));
        self.note(match nearest(&value, words) {
            Some(meant) => problem.help(format!("did you mean {meant:?}?")),
            None => problem,
        });
        None
    }

    /// A text such as `"20ms"`.
    pub(crate) fn duration(&self, name: &str) -> Option<Duration> {
        self.parsed(name, "a time in quotes, such as \"5s\" or \"20ms\"", |text| {
            humantime::parse_duration(text).map_err(|error| error.to_string())
        })
    }

    /// The same, for a deadline: nobody could meet one of no time at all.
    pub(crate) fn deadline(&self, name: &str) -> Option<Duration> {
        let deadline = self.duration(name)?;
        if deadline.is_zero() {
            let span = self.key(name).unwrap_or_default();
            self.note(Problem::new(format!("`{name}` cannot be zero"), span));
        }
        Some(deadline)
    }

    /// A text such as `"1MiB"`.
    pub(crate) fn size(&self, name: &str) -> Option<Placed<u64>> {
        let value =
            self.parsed(name, "a size in quotes, such as \"64KiB\" or \"1MiB\"", parse_size)?;
        Some(Placed { value, span: self.value(name)?.span() })
    }

    fn parsed<T>(
        &self,
        name: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.value(name)?;
        let DeValue::String(text) = value.get_ref() else {
            self.wrong(name, value, expected);
            return None;
        };
        match parse(text) {
            Ok(parsed) => Some(parsed),
            Err(why) => {
                let problem = Problem::new(format!("`{name}` must be {expected}"), value.span());
                self.note(problem.label(why));
                None
            }
        }
    }

    /// A whole number from that range.
    pub(crate) fn number<T>(&self, name: &str) -> Option<T>
    where
        T: TryFrom<i128> + Bounds,
    {
        let value = self.value(name)?;
        let expected = format!("a whole number from {} to {}", T::LEAST, T::MOST);
        let DeValue::Integer(number) = value.get_ref() else {
            self.wrong(name, value, &expected);
            return None;
        };
        let parsed = i128::from_str_radix(number.as_str(), number.radix()).ok();
        let parsed = parsed.and_then(|number| T::try_from(number).ok());
        if parsed.is_none() {
            let problem = Problem::new(format!("`{name}` must be {expected}"), value.span());
            self.note(problem.label("out of range"));
        }
        parsed
    }

    /// A list of texts.
    pub(crate) fn texts(&self, name: &str) -> Option<Vec<Placed<String>>> {
        let value = self.value(name)?;
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong(name, value, "a list of texts, such as [\"a\", \"b\"]");
            return None;
        };
        let texts = items.iter().filter_map(|item| match item.get_ref() {
            DeValue::String(text) => {
                Some(Placed { value: text.clone().into_owned(), span: item.span() })
            }
            _ => {
                self.wrong(name, item, "a list of texts");
                None
            }
        });
        Some(texts.collect())
    }

    /// A table of texts.
    pub(crate) fn variables(&self, name: &str) -> BTreeMap<String, String> {
        let Some(value) = self.value(name) else { return BTreeMap::new() };
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong(name, value, "a table of texts, such as { RUST_LOG = \"info\" }");
            return BTreeMap::new();
        };
        let mut variables = BTreeMap::new();
        for (key, value) in table {
            let key_text = key.get_ref().as_ref();
            if key_text.is_empty() || key_text.contains(['=', '\0']) {
                let message = format!("{key_text:?} cannot name an environment variable");
                self.note(Problem::new(message, key.span()));
            }
            match value.get_ref() {
                DeValue::String(text) => {
                    variables.insert(key_text.to_owned(), text.clone().into_owned());
                }
                _ => self.wrong(name, value, "a table of texts"),
            }
        }
        variables
    }

    /// A table in the table.
    pub(crate) fn table(&self, name: &str, what: &'static str) -> Option<Fields<'a>> {
        let value = self.value(name)?;
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong(name, value, "a table");
            return None;
        };
        // The header alone, not everything below it.
        let span = self.key(name).unwrap_or_else(|| value.span());
        Some(Fields::new(table, span, what, self.problems))
    }

    /// The same of what is read elsewhere as well, where it is noted if it is no table.
    pub(crate) fn quiet_table(&self, name: &str, what: &'static str) -> Option<Fields<'a>> {
        matches!(self.value(name)?.get_ref(), DeValue::Table(_)).then(|| self.table(name, what))?
    }

    /// Tables with the same header, `[[name]]`.
    pub(crate) fn tables(&self, name: &str, what: &'static str) -> Vec<Fields<'a>> {
        let Some(value) = self.value(name) else { return Vec::new() };
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong(name, value, &format!("a list of tables: write [[{name}]]"));
            return Vec::new();
        };
        let tables = items.iter().filter_map(|item| match item.get_ref() {
            DeValue::Table(table) => Some(Fields::new(table, item.span(), what, self.problems)),
            _ => {
                self.wrong(name, item, &format!("a list of tables: write [[{name}]]"));
                None
            }
        });
        tables.collect()
    }
}

/// The least and the most of a number, for messages.
pub(crate) trait Bounds {
    /// The least.
    const LEAST: i64;
    /// The most.
    const MOST: i64;
}

impl Bounds for u32 {
    const LEAST: i64 = 0;
    const MOST: i64 = u32::MAX as i64;
}

impl Bounds for i32 {
    const LEAST: i64 = i32::MIN as i64;
    const MOST: i64 = i32::MAX as i64;
}

fn type_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
