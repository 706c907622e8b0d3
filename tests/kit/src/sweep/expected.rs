//! What is to come of a fault: the table of outcomes that was written by hand.
//!
//! The table is text that people read; [`Expected::ours`] is that of this project
//! (`tests/expected-outcomes`). It has blocks:
//!
//! ```text
//! group ends = exit abort kill
//!
//! rollback        |         | PrepareStop       | Stop              | PrepareStart      | Start
//! ends            | receipt | Degraded running  | Degraded running  | Degraded stopped  | Degraded stopped
//! two-acks delay  | receipt | Done              | Done              | Done              | Done
//! ```
//!
//! The first line of a block names policies and columns; each further line says for faults, at places
//! of a row, what comes in each column: what the act of the phase ends in and then, after a comma, what
//! comes next. Whatever is not mentioned is *Done*. See [`Seen`] for the words.

use super::nature::Place;
use crate::plan::Policy;
use std::collections::HashMap;
use std::fmt;
use thiserror::Error;

/// One thing that is seen when a plan is run, in the words of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Seen {
    /// `Done`: a pause stops the machine, a resume starts it.
    Done,
    /// `RolledBack`: nobody was fenced, all are where they were.
    RolledBack,
    /// `Stopped`: nobody was fenced, all are stopped.
    Stopped,
    /// `Degraded running`: the victim was fenced, and nobody else; all others run.
    DegradedRunning,
    /// `Degraded stopped`: the victim was fenced, and nobody else; all others are stopped.
    DegradedStopped,
    /// `Held`: something is not proven.
    Held,
    /// `refused`: it was not begun, or not accepted.
    Refused,
    /// `lost`: outside of any transition the victim was lost, and is fenced.
    Lost,
    /// `given up`: all attempts to start the victim again that its policy has have failed.
    GivenUp,
    /// `not started`: the machine has not started.
    NotStarted,
}

/// One way in which a fault can end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Course {
    /// From the act of the fault on, in order; nothing is Done at its end.
    pub seen: Vec<Seen>,
    /// `late`: bytes are written while the machine stands still.
    pub late: bool,
}

/// What comes of faults.
#[derive(Clone, Debug)]
pub struct Expected {
    cells: HashMap<(Policy, String, String, String), Vec<Course>>,
}

/// The table cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line} of the expected outcomes: {what}")]
pub struct TableError {
    /// Which line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: String,
}

const POLICIES: [Policy; 4] =
    [Policy::Rollback, Policy::StayStopped, Policy::ContinueWithout, Policy::Restart];

impl Expected {
    /// The table of this project, for machines of three devices or more of which one is faulty.
    ///
    /// # Errors
    ///
    /// If the text that was built in is none.
    pub fn ours() -> Result<Self, TableError> {
        Self::parse(include_str!("../../expected-outcomes"))
    }

    /// Reads a table.
    ///
    /// # Errors
    ///
    /// [`TableError`] with the line.
    pub fn parse(text: &str) -> Result<Self, TableError> {
        let mut reader = Reader::default();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.split('#').next().unwrap_or_default().trim_end();
            reader.line(text).map_err(|what| TableError { line, what })?;
        }
        Ok(Self { cells: reader.cells })
    }

    /// What is to come of the fault with that word at that place, under a policy: each course is
    /// possible. None is, if there cannot be such a fault; `None` if the table does not say.
    #[must_use]
    pub fn courses(&self, policy: Policy, word: &str, place: Place) -> Option<&[Course]> {
        let key = (policy, word.to_owned(), place.row.to_owned(), place.column.to_owned());
        self.cells.get(&key).map(Vec::as_slice)
    }

    /// How many cells there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// True if the table says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }
}

#[derive(Default)]
struct Reader {
    groups: HashMap<String, Vec<String>>,
    policies: Vec<Policy>,
    columns: Vec<String>,
    cells: HashMap<(Policy, String, String, String), Vec<Course>>,
}

impl Reader {
    fn line(&mut self, text: &str) -> Result<(), String> {
        if text.trim().is_empty() {
            return Ok(());
        }
        if let Some(group) = text.strip_prefix("group ") {
            let (name, words) = group.split_once('=').ok_or("a group is `group NAME = WORDS`")?;
            let words = words.split_whitespace().map(str::to_owned).collect();
            self.groups.insert(name.trim().to_owned(), words);
            return Ok(());
        }
        let mut fields = text.split('|').map(str::trim);
        let (first, second) = (fields.next().unwrap_or_default(), fields.next());
        let rest: Vec<_> = fields.collect();
        let places =
            second.filter(|_| !rest.is_empty()).ok_or("a row has three fields at least")?;
        if places.is_empty() { self.block(first, &rest) } else { self.row(first, places, &rest) }
    }

    fn block(&mut self, policies: &str, columns: &[&str]) -> Result<(), String> {
        let known = |word: &str| {
            let mut known = POLICIES.iter().copied();
            known.find(|p| p.to_string() == word).ok_or_else(|| format!("no policy: {word:?}"))
        };
        self.policies = policies.split_whitespace().map(known).collect::<Result<_, _>>()?;
        self.columns = columns.iter().map(|&column| column.to_owned()).collect();
        Ok(())
    }

    fn row(&mut self, faults: &str, places: &str, fields: &[&str]) -> Result<(), String> {
        if self.policies.is_empty() {
            return Err("a row before the first line with policies".to_owned());
        }
        if fields.len() != self.columns.len() {
            return Err(format!("{} columns, expected {}", fields.len(), self.columns.len()));
        }
        let mut words = Vec::new();
        for word in faults.split_whitespace() {
            match self.groups.get(word) {
                Some(group) => words.extend(group.iter().cloned()),
                None => words.push(word.to_owned()),
            }
        }
        for (column, field) in self.columns.clone().into_iter().zip(fields) {
            let alternatives = field.split(" or ").filter(|field| *field != "-");
            let courses = alternatives.map(course).collect::<Result<Vec<_>, _>>()?;
            for policy in self.policies.clone() {
                for word in &words {
                    for place in places.split_whitespace() {
                        let key = (policy, word.clone(), place.to_owned(), column.clone());
                        let case = format!("{word} at {place} of {column} under {policy}");
                        if self.cells.insert(key, courses.clone()).is_some() {
                            return Err(format!("{case} is there already"));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn course(text: &str) -> Result<Course, String> {
    let mut course = Course { seen: Vec::new(), late: false };
    for part in text.split(',').map(str::trim) {
        let seen = match part {
            "Done" => Seen::Done,
            "RolledBack" => Seen::RolledBack,
            "Stopped" => Seen::Stopped,
            "Degraded running" => Seen::DegradedRunning,
            "Degraded stopped" => Seen::DegradedStopped,
            "Held" => Seen::Held,
            "refused" => Seen::Refused,
            "lost" => Seen::Lost,
            "given up" => Seen::GivenUp,
            "not started" => Seen::NotStarted,
            "late" => {
                course.late = true;
                continue;
            }
            other => return Err(format!("{other:?} is nothing that comes of a fault")),
        };
        course.seen.push(seen);
    }
    trim(&mut course.seen);
    Ok(course)
}

/// What is Done at the end need not be said.
pub(super) fn trim(seen: &mut Vec<Seen>) {
    while seen.last() == Some(&Seen::Done) {
        seen.pop();
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Done => "Done",
            Self::RolledBack => "RolledBack",
            Self::Stopped => "Stopped",
            Self::DegradedRunning => "Degraded running",
            Self::DegradedStopped => "Degraded stopped",
            Self::Held => "Held",
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::GivenUp => "given up",
            Self::NotStarted => "not started",
        })
    }
}

impl fmt::Display for Course {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = [Seen::Done];
        let seen = if self.seen.is_empty() { &done[..] } else { &self.seen };
        for (at, seen) in seen.iter().enumerate() {
            if at > 0 {
                f.write_str(", ")?;
            }
            seen.fmt(f)?;
        }
        if self.late {
            f.write_str(", late")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
# A comment.
group ends = exit abort
rollback restart |            | PrepareStop          | Stop
ends kill        | receipt    | Degraded running     | Done, lost or Degraded running  # why
keep-dma         | before-ack | Done, late           | -

stay-stopped     |            | running
kill             | -          | lost, Done
";
    const RECEIPT: Place = Place { row: "receipt", column: "Stop" };

    #[test]
    fn a_cell_counts_for_each_policy_fault_and_place_of_its_row() {
        let expected = Expected::parse(TABLE).unwrap();
        // Two policies, four faults, two columns; one of the last block.
        assert_eq!(expected.len(), 2 * 4 * 2 + 1);
        for policy in [Policy::Rollback, Policy::Restart] {
            for word in ["exit", "abort", "kill"] {
                let courses = expected.courses(policy, word, RECEIPT).unwrap();
                let text: Vec<_> = courses.iter().map(ToString::to_string).collect();
                assert_eq!(text, ["Done, lost", "Degraded running"]);
            }
        }
        let liar = Place { row: "before-ack", column: "PrepareStop" };
        let courses = expected.courses(Policy::Rollback, "keep-dma", liar).unwrap();
        assert_eq!(courses, [Course { seen: Vec::new(), late: true }]);
        let running = Place { row: "-", column: "running" };
        let courses = expected.courses(Policy::StayStopped, "kill", running).unwrap();
        assert_eq!(courses[0].seen, [Seen::Lost]);
    }

    #[test]
    fn what_is_not_in_the_table_is_not_guessed() {
        let expected = Expected::parse(TABLE).unwrap();
        let stop = Place { row: "before-ack", column: "Stop" };
        assert_eq!(expected.courses(Policy::Rollback, "keep-dma", stop), Some(&[][..]));
        assert_eq!(expected.courses(Policy::StayStopped, "exit", RECEIPT), None);
        assert_eq!(expected.courses(Policy::Rollback, "segv", RECEIPT), None);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let cases = [
            ("exit | receipt | Done", 1, "before the first line"),
            ("\nforgive | | Stop", 2, "no policy"),
            ("rollback | | Stop\nexit | receipt | Done | Done", 2, "2 columns, expected 1"),
            ("rollback | | Stop\nexit | receipt | Fine", 2, "\"Fine\" is nothing"),
            ("rollback | | Stop\nexit", 2, "three fields"),
            ("rollback | | Stop\nexit | receipt | Done\nexit | receipt | Done", 3, "there already"),
            ("group ends", 1, "a group is"),
        ];
        for (text, line, what) in cases {
            let error = Expected::parse(text).unwrap_err();
            assert!(error.line == line && error.what.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn our_table_can_be_read() {
        assert!(Expected::ours().unwrap().len() > 500);
    }
}
